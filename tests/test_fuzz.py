"""The OpenAPI document says what the server does, and nothing that fits it, or does not, breaks the server."""

import asyncio
from html.parser import HTMLParser

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi import checks

import videofly as v
from conftest import Server

CATALOG = """
credits = { gift = 10, gift_days = 30, plan_days = 30, pack_days = 365 }

[[models]]
id = "preview"
name = "Preview renderer"
description = "Not an AI model."
providers = ["local"]
modes = ["text", "image"]
durations = [1]
aspect_ratios = ["16:9"]
qualities = { "120p" = 1 }
price = { base = 1, per_second = 0 }
"""
CHECKS = [
    schemathesis.checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance,
    checks.response_headers_conformance, checks.response_schema_conformance, checks.unsupported_method,
    checks.negative_data_rejection, checks.ignored_auth,
]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A real server, and the key of its administrator, who has few credits."""
    data = tmp_path_factory.mktemp("fuzz") / "data"
    data.mkdir()
    (data / "catalog.toml").write_text(CATALOG)
    server = Server(data, VIDEO_MAX_CONCURRENT="2")
    server.start()
    server.command("user", "add", "ada@example.com", "--admin")
    server.key = server.command("key", "create", "ada@example.com")
    yield server
    assert server.stop() == 0


def read_document():
    """The OpenAPI document; it is the same whatever runs."""
    async def fetch():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(v.http(None)), base_url="http://test") as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(fetch())


DOCUMENT = read_document()
documented = schemathesis.openapi.from_dict(DOCUMENT, config=SchemathesisConfig(seed=20_271))


@documented.exclude(path="/api/v1/video/events").parametrize()  # a stream never ends
@settings(max_examples=10, deadline=None, derandomize=True, database=None,
          phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_the_answer_is_one_of_those_documented(case, running):
    headers = {"Authorization": f"Bearer {running.key}"}
    case.call_and_validate(base_url=running.url, headers=headers, checks=CHECKS)
