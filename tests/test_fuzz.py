"""The OpenAPI document says what the server does, and neither what fits it nor what does not breaks it."""

import asyncio
import types
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


def anonymous():
    """A client of an app without parts: it has its document and its pages, and that is all."""
    requests = v.prometheus.Histogram("requests", "Answers", ("method", "path", "status"), registry=None)
    parts = types.SimpleNamespace(creem=None, requests=requests, settings=v.Settings())
    return httpx.AsyncClient(transport=httpx.ASGITransport(v.http(parts)), base_url="http://test")


def read_document():
    """The OpenAPI document; it is the same whatever runs."""
    async def fetch():
        async with anonymous() as client:
            return (await client.get("/openapi.json")).json()

    return asyncio.run(fetch())


DOCUMENT = read_document()
documented = schemathesis.openapi.from_dict(DOCUMENT, config=SchemathesisConfig(seed=20_271))


@documented.exclude(path="/api/v1/video/events").parametrize()  # a stream never ends
@settings(max_examples=5, deadline=None, derandomize=True, database=None,
          phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))
def test_whatever_is_sent_the_answer_is_one_of_those_documented(case, running):
    headers = {"Authorization": f"Bearer {running.key}"}
    case.call_and_validate(base_url=running.url, headers=headers, checks=CHECKS)


def test_the_document_is_openapi_3_1():
    documented.validate()
    assert DOCUMENT["openapi"].startswith("3.1.")
    ids = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids)) > 30


def test_the_document_says_that_unknown_fields_are_refused():
    schemas = DOCUMENT["components"]["schemas"]
    bodies = [kind.__name__ for kind in v.Input.__subclasses__()]
    assert "NewVideo" in bodies
    assert [name for name in bodies if schemas[name]["additionalProperties"] is not False] == []
    assert schemas["NewVideo"]["properties"]["seed"]["anyOf"][0] == {
        "type": "integer", "minimum": 0, "maximum": 2**31 - 1}


def test_the_document_says_which_addresses_want_a_key():
    open_ones = {path for path, operations in DOCUMENT["paths"].items()
                 if not all(operation.get("security") for operation in operations.values())}
    assert open_ones == {"/api/auth/set-up", "/api/auth/sign-in", "/api/auth/sign-out", "/api/auth/sign-up",
                         "/api/v1/config/models", "/api/v1/config/products"}
    assert DOCUMENT["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}


def test_the_document_says_in_which_field_an_image_is_sent():
    forms = DOCUMENT["paths"]["/api/v1/upload"]["post"]["requestBody"]["content"]
    named = forms["multipart/form-data"]["schema"]["$ref"].removeprefix("#/components/schemas/")
    body = DOCUMENT["components"]["schemas"][named]
    assert (body["required"], body["properties"]["file"]["format"]) == (["file"], "binary")


# --- /docs


class Named(HTMLParser):
    """(tag, address) of whatever a page names."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        names = ("src", "href", "srcset", "action")
        self.found += [(tag, text) for name, text in attributes if name in names]


@pytest.mark.parametrize("path", ["/docs", "/", "/sign-in", "/set-up"])
def test_a_page_needs_no_other_server(path):
    async def check():
        async with anonymous() as client:
            page = await client.get(path)
            assert "//" not in page.text.replace("<!--", "")
            assert "default-src 'self'" in page.headers["content-security-policy"]
            files = [text for tag, text in Named(page.text).found if tag in ("script", "link", "img")]
            assert len(files) >= 3
            for file in files:
                answer = await client.get(file)
                assert (answer.status_code, len(answer.content) > 0) == (200, True), file
                if file.endswith(".css"):
                    assert "url(http" not in answer.text and "@import" not in answer.text

    asyncio.run(check())
