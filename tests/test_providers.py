"""Outside providers over a real socket, with their real behaviour: every video ends, the books are right, and
no more than one job is ever paid for one order."""

import asyncio
import base64
import contextlib
import functools
import json
import re
import tomllib
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import pytest
from Crypto.PublicKey import ECC

import videofly as v
from conftest import (
    Clock,
    books_are_right,
    client_of,
    error_of,
    image_bytes,
    person,
    rows,
    tiny_video,
    work,
)
from test_upstream import MANUALS
from upstream import (
    Upstream,
    bomb,
    cut,
    drip,
    html,
    instead,
    json_video,
    lost,
    missing,
    redirect,
    refuse,
    reset_after,
    reset_before,
    slow,
    throttled,
    unsized,
)

pytestmark = pytest.mark.anyio
ORDER = {"model": "outside", "prompt": "a red fox over snow", "seed": 7}
NATIVE = ["openai", "fal", "replicate", "comfyui"]
DIALECTS = {"openai": "vllm", "sglang": "sglang", "gateway": "openai"}  # of one wire format
TEXT = {"3": {"class_type": "KSampler", "inputs": {"seed": 0, "model": ["4", 0]}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "55": {"class_type": "EmptyHunyuanLatentVideo", "inputs": {"width": 0, "height": 0, "length": 0}},
        "58": {"class_type": "SaveVideo", "inputs": {"filename_prefix": "", "video": ["57", 0]}}}
IMAGE = {"52": {"class_type": "LoadImage", "inputs": {"image": "example.png"}}, **TEXT}
BIND = """
    "6.inputs.text" = { "$" = "prompt" }, "3.inputs.seed" = { "$" = "seed" },
    "55.inputs.width" = { "$" = "width", multiple = 16 },
    "55.inputs.height" = { "$" = "height", multiple = 16 },
    "55.inputs.length" = { "$" = "seconds", times = 16, plus = 1 },
    "58.inputs.filename_prefix" = { "$" = "uuid" }
""".replace("\n", " ")  # one line, as TOML wants it
WITH_TEXT = f'{{ prompt = {{ "$file" = "text.json", bind = {{ {BIND} }} }} }}'
WITH_IMAGE = WITH_TEXT.replace("text.json", "image.json").replace(
    "bind = {", 'bind = { "52.inputs.image" = { "$" = "uploaded" },')
MODELS = {"fal": "fal-ai/kling-video/v2/master/text-to-video", "replicate": "kwaivgi/kling-v2.1"}

CATALOG = """
[credits]
gift = 10
gift_days = 30
plan_days = 30
pack_days = 365

[[models]]
id = "outside"
name = "Outside"
description = "Made by the simulator."
providers = ["there"]
modes = ["text", "image"]
durations = [5, 8]
aspect_ratios = ["16:9", "9:16"]
qualities = {{ "480p" = 1, "720p" = 2 }}
price = {{ base = 10, per_second = 0 }}
upstream = {{ there = {{ model = "{model}", body = {body} }} }}

[[providers]]
name = "there"
like = "{like}"
base_url = "{url}"
key = "THERE_KEY"
{extra}
"""


class Place:
    """An app whose only provider is the simulator, and somebody with 100 credits."""

    def __init__(self, upstream, app, client):
        self.upstream, self.app, self.client = upstream, app, client

    async def order(self, **wish):
        answer = await self.client.post("/api/v1/video/generate", json=ORDER | wish)
        assert answer.status_code == 201, answer.text
        self.id = answer.json()["data"]["videoUuid"]

    async def look(self):
        return (await self.client.get(f"/api/v1/video/{self.id}")).json()["data"]

    async def credits(self):
        found = (await self.client.get("/api/v1/credit/balance")).json()["data"]
        return found["availableCredits"], found["frozenCredits"], found["usedCredits"]

    async def unknown(self):
        """What an operator sees of orders that were never answered."""
        operator = {"Authorization": f"Bearer {v.operator_token(self.app.secret)}"}
        report = "/api/v1/admin/reports/provider-jobs?state=unknown"
        answer = await self.client.get(report, headers=operator)
        return answer.json()["data"]["rows"]

    async def until_it_ends(self):
        """Let hours pass, until nothing is to do."""
        for _ in range(200):
            await work(self.app, for_s=0)
            if (await self.look())["finishedAt"]:
                break
            self.app.clock.pass_s(40)
        await books_are_right(self.app)
        return await self.look()

    async def ends(self, status, code=None):
        video = await self.until_it_ends()
        said = video["error"] and video["error"]["code"]
        assert (video["status"], said) == (status, code), video["error"]
        cost = video["creditsUsed"] if status == "COMPLETED" else 0
        assert await self.credits() == (100 - cost, 0, cost)
        assert self.upstream.paid <= 1
        assert (self.upstream.count("unknown"), self.upstream.count("unauthorized")) == (0, 0)
        return video


@pytest.fixture
async def place(request, tmp_path):
    like = request.param
    clock = Clock()
    spoken = "openai" if like in DIALECTS else like
    with Upstream(*[spoken] * (spoken in NATIVE), clock=clock) as upstream:
        upstream.dialect = DIALECTS.get(like)
        if spoken not in NATIVE:
            MANUALS[like.replace("-", "_")](upstream)
        base = upstream.url + path_of(like)
        bodies = {"kie": '{ input.image_urls = { "$" = "images" } }',
                  "comfyui": f"{WITH_TEXT}, image_body = {WITH_IMAGE}"}
        body = bodies.get(like, "{}")
        for name, workflow in (("text", TEXT), ("image", IMAGE)):
            (tmp_path / f"{name}.json").write_text(json.dumps(workflow))
        extra = f'secrets_url = "{upstream.url}/.well-known/jwks.json"' if like == "fal" else ""
        text = CATALOG.format(like=like, url=base, model=MODELS.get(like, "a-model"), body=body, extra=extra)
        async with placed(tmp_path, upstream, text) as place:
            yield place


@contextlib.asynccontextmanager
async def placed(folder, upstream, text, credits=100):
    """A Place with that catalogue."""
    (folder / "catalog.toml").write_text(text)
    settings = v.Settings(data=str(folder / "data"), catalog=str(folder / "catalog.toml"),
                          public_url="http://us.test")
    environ = {"THERE_KEY": upstream.key, "REPLICATE_WEBHOOK_SECRET": upstream.secret,
               "KIE_WEBHOOK_SECRET": upstream.kie_secret}
    async with v.open_app(settings, clock=upstream.clock, environ=environ) as app:
        ada = await person(app, "ada@example.com", credits=credits)
        async with client_of(app, **ada.headers) as client:
            place = Place(upstream, app, client)
            place.user_id = ada.id
            yield place


def path_of(like):
    """The path of a template's address: the simulator stands in for the host only."""
    known = tomllib.loads((v.FILES / "catalog.toml").read_text())["templates"][like]
    return "/v1" if like in DIALECTS else urlsplit(known.get("base_url", "")).path


native = pytest.mark.parametrize("place", NATIVE, indirect=True)
paid = pytest.mark.parametrize("place", NATIVE[:3], indirect=True)
comfyui = pytest.mark.parametrize("place", ["comfyui"], indirect=True)
DECLARED = [name.replace("_", "-") for name in MANUALS]
every = pytest.mark.parametrize("place", [*NATIVE, "sglang", "gateway", *DECLARED], indirect=True)


@every
async def test_an_order_becomes_a_stored_video(place):
    await place.order()
    video = await place.ends("COMPLETED")
    assert (video["width"], video["height"]) == (64, 48)
    (sent,) = [request for request in place.upstream.requests if request.step == "submit"]
    assert b"a red fox over snow" in sent.body


@every
async def test_an_image_reaches_the_provider_as_it_wants_it(place):
    png = image_bytes()
    sent = await place.client.post("/api/v1/upload", files={"file": ("a.png", png, "image/png")})
    await place.order(imageUrl=sent.json()["data"]["url"])
    await place.ends("COMPLETED")
    sent = b"".join(each.body for each in place.upstream.requests if each.step in ("upload", "submit"))
    assert png in sent or base64.b64encode(png) in sent


# --- before the order is taken


@native
@pytest.mark.parametrize("refusal", [400, 401, 402, 404, 422])
async def test_a_refusal_gives_the_credits_back_with_the_providers_words(place, refusal):
    place.upstream.next("submit", refuse(refusal, {"error": {"message": "no foxes"}, "detail": "no foxes"}))
    await place.order()
    video = await place.ends("FAILED", "E5001")
    assert "no foxes" in video["error"]["message"] and place.upstream.paid == 0


@native
async def test_who_is_asked_to_wait_waits_as_long_and_orders_once(place):
    place.upstream.next("submit", throttled(7), throttled(7))
    await place.order()
    await place.ends("COMPLETED")
    assert place.upstream.count("submit") == 3


@paid
@pytest.mark.parametrize("fault", [reset_after(), lost(500), lost(502)], ids=["reset", "500", "502"])
async def test_an_order_whose_answer_was_lost_is_never_given_twice(place, fault):
    place.upstream.next("submit", fault)
    await place.order()
    await work(place.app, for_s=100)
    assert [job["state"] for job in await place.unknown()] == ["unknown"]
    await place.ends("FAILED", "E5001")
    assert place.upstream.count("submit") == 1
    assert [job["endedAt"] is None for job in await place.unknown()] == [False]
    operator = {"Authorization": f"Bearer {v.operator_token(place.app.secret)}"}
    checks = (await place.client.get("/api/v1/admin/check", headers=operator)).json()["data"]["checks"]
    (orders,) = [check["detail"] for check in checks if check["what"] == "orders"]
    assert orders.startswith("1 never answered")


@comfyui
@pytest.mark.parametrize("fault", [reset_after(), lost(500), lost(502)], ids=["reset", "500", "502"])
async def test_who_takes_our_id_is_asked_for_an_order_whose_answer_was_lost(place, fault):
    place.upstream.timeline = ["queued", "running", "running", "running", "succeeded"]
    place.upstream.next("submit", fault)
    await place.order()
    await place.ends("COMPLETED")
    assert place.upstream.count("submit") == 1


async def test_a_lost_order_goes_to_nobody_else_however_often_its_provider_fails(tmp_path):
    clock = Clock()
    with Upstream("comfyui", clock=clock) as first, Upstream("openai", clock=clock) as other:
        other.dialect, other.key = "vllm", first.key
        (tmp_path / "text.json").write_text(json.dumps(TEXT))
        text = CATALOG.format(like="comfyui", url=first.url, model="m", body=WITH_TEXT, extra="")
        text = text.replace('["there"]', '["there", "other"]')
        text += f'[[providers]]\nname = "other"\nlike = "openai"\nbase_url = "{other.url}/v1"\n'
        text += 'key = "THERE_KEY"\n'
        async with placed(tmp_path, first, text) as place:
            first.next("submit", reset_after())  # taken; then it is away for longer than the breaker waits
            first.always("poll", refuse(500, {}))
            await place.order()
            await work(place.app, for_s=100)
            first.always("poll", None)
            await place.ends("COMPLETED")
            assert (first.paid, other.paid) == (1, 0)


@comfyui
async def test_an_order_that_never_arrived_is_given_again_where_that_can_be_known(place):
    place.upstream.next("submit", reset_before())
    place.upstream.next("poll", refuse(503, {}), refuse(503, {}))
    await place.order()
    await place.ends("COMPLETED")
    assert (place.upstream.count("submit"), place.upstream.paid) == (2, 1)


@comfyui
async def test_an_image_that_cannot_be_sent_is_sent_again_and_ordered_once(place):
    place.upstream.next("upload", reset_before(), refuse(503, {"error": {"message": "full"}}))
    sent = await place.client.post("/api/v1/upload", files={"file": ("a.png", image_bytes(), "image/png")})
    await place.order(imageUrl=sent.json()["data"]["url"])
    await place.ends("COMPLETED")
    assert (place.upstream.count("upload"), place.upstream.count("submit")) == (3, 1)


@pytest.mark.parametrize(("workflow", "words"), [
    ({"nodes": [], "links": []}, "no workflow in the API format"), ([], "no workflow in the API format"),
    ({"1": {"class_type": "x", "inputs": {}}}, r"text.json has no \d+\.inputs\.\w+"),
])
def test_a_workflow_that_cannot_be_filled_stops_the_start(tmp_path, workflow, words):
    body = WITH_TEXT
    (tmp_path / "text.json").write_text(json.dumps(workflow))
    text = CATALOG.format(like="comfyui", url="http://127.0.0.1:8188", model="wan", body=body, extra="")
    (tmp_path / "catalog.toml").write_text(text)
    with pytest.raises(v.Refused, match=words):
        v.read_catalogue(tmp_path / "catalog.toml", {"local"})


async def test_the_readmes_workflow_is_one(tmp_path):
    (tmp_path / "wan.json").write_text(json.dumps(TEXT))
    blocks = re.findall(r"```toml\n(.*?)```", (v.HERE / "README.md").read_text(), re.S)
    (block,) = [block for block in blocks if "$file" in block]
    (tmp_path / "catalog.toml").write_text((v.FILES / "catalog.toml").read_text() + block)
    catalogue = v.read_catalogue(tmp_path / "catalog.toml", {"local"})
    upstream = catalogue.model("wan").upstream["my-comfy"]
    assert upstream.body["prompt"]["6"]["inputs"]["text"] == {"$": "prompt"}


@comfyui
async def test_a_workflow_is_filled_by_place_and_no_quote_breaks_out(place):
    prompt = 'a "fox", "6": {"inputs": {"text": "no"}}'
    await place.order(prompt=prompt, duration=8, quality="720p")
    await place.ends("COMPLETED")
    (sent,) = [request.json["prompt"] for request in place.upstream.requests if request.step == "submit"]
    assert sent["6"]["inputs"] == {"text": prompt, "clip": ["4", 1]} and sent["3"]["inputs"]["seed"] == 7
    assert sent["55"]["inputs"] == {"width": 1280, "height": 720, "length": 129}


@comfyui
@pytest.mark.parametrize("old", [{"has_jobs": False}, {"takes_prompt_id": False},
                                 {"outputs_under": "gifs"}, {"outputs_under": "videos"}], ids=str)
async def test_older_and_other_comfyuis_are_understood(place, old):
    for name, value in old.items():
        setattr(place.upstream, name, value)
    place.upstream.timeline = ["queued", "running", "succeeded"]
    await place.order()
    await place.ends("COMPLETED")


@comfyui
@pytest.mark.parametrize("until", [1, 3], ids=["queued", "running"])
async def test_cancelling_stops_our_job_and_nobody_elses(place, until):
    place.upstream.has_jobs = False  # an old one, which stops whatever runs
    place.upstream.timeline = ["running"]
    await place.order(prompt="another's")
    await work(place.app, for_s=3)
    place.upstream.timeline = ["queued", "running"][:until]
    await place.order()
    await work(place.app, for_s=10)
    other, ours = place.upstream.jobs.values()
    if until > 1:
        other.state = "succeeded"
    assert ours.state == ["queued", "running"][until > 1]
    await place.client.post(f"/api/v1/video/{place.id}/cancel")
    await work(place.app, for_s=10)
    assert (await place.look())["error"]["code"] == "E4024"
    assert ours.state == "canceled" and other.state != "canceled"


@paid
async def test_a_wish_to_cancel_reaches_the_provider_and_its_answer_counts(place):
    place.upstream.timeline = ["running"]
    await place.order()
    await work(place.app, for_s=0)
    await place.client.post(f"/api/v1/video/{place.id}/cancel")
    assert await place.credits() == (90, 10, 0)
    await place.ends("FAILED", "E4024")
    assert place.upstream.count("cancel") >= 1


@paid
async def test_a_provider_that_goes_on_after_a_cancel_is_paid_and_so_is_the_video(place):
    place.upstream.timeline, place.upstream.obeys = ["running"], False
    await place.order()
    await work(place.app, for_s=0)
    (job,) = place.upstream.jobs.values()
    await place.client.post(f"/api/v1/video/{place.id}/cancel")
    job.state = "succeeded"
    job.gone = False
    place.upstream.always("cancel", refuse(409, {"detail": "too late"}))
    await place.ends("COMPLETED")


async def test_a_provider_that_fails_again_and_again_gets_no_orders_for_a_while(
        tmp_path, monkeypatch):
    clock = Clock()
    with Upstream("openai", clock=clock) as bad, Upstream("openai", clock=clock) as good:
        bad.dialect = good.dialect = "vllm"
        good.key = bad.key
        bad.always("submit", refuse(503, {"error": {"message": "overloaded"}}))
        text = CATALOG.format(like="openai", url=bad.url + "/v1", model="m", body="{}", extra="")
        text = text.replace('["there"]', '["there", "good"]')
        text += '[[providers]]\nname = "good"\nlike = "openai"\nkey = "THERE_KEY"\n'
        text += f'base_url = "{good.url}/v1"\n'
        async with placed(tmp_path, good, text, credits=1000) as place:

            async def order_ten():
                for _ in range(10):
                    await place.order()
                    assert (await place.until_it_ends())["status"] == "COMPLETED"

            monkeypatch.setattr(v, "BREAK", 2 * v.HOUR)
            await order_ten()
            assert (bad.count("submit"), good.count("submit")) == (v.FAILURES_MAX, 10)
            clock.pass_s(7201)
            await order_ten()
            assert (bad.count("submit"), good.count("submit")) == (v.FAILURES_MAX + 1, 20)
            clock.pass_s(7201)
            bad.always("submit", None)
            await order_ten()
            assert (bad.count("submit"), good.count("submit")) == (v.FAILURES_MAX + 11, 20)


@pytest.mark.parametrize("place", ["kie"], indirect=True)
async def test_an_answer_of_200_that_is_none_is_a_refusal(place):
    place.upstream.next("submit", refuse(200, {"code": 402, "msg": "no credits"}))
    await place.order()
    assert "no credits" in (await place.ends("FAILED", "E5001"))["error"]["message"]


@pytest.mark.parametrize("place", ["runway"], indirect=True)
async def test_what_the_provider_has_no_word_for_is_not_ordered(place):
    await place.order(aspectRatio="9:16")
    await place.ends("COMPLETED")
    assert place.upstream.requests[0].json["ratio"] == "720:1280"


async def test_the_next_provider_is_asked_where_one_refuses_or_is_away(tmp_path):
    clock = Clock()
    with Upstream("replicate", clock=clock) as away, Upstream("fal", clock=clock) as picky, \
            Upstream("openai", clock=clock) as good:
        good.dialect = "vllm"
        picky.always("submit", refuse(422, {"detail": "no foxes"}))
        away.stop()
        text = CATALOG.format(like="replicate", url=away.url, model="a/b", body="{}", extra="")
        text = text.replace('["there"]', '["there", "picky", "good"]')
        for name, upstream, path in (("picky", picky, ""), ("good", good, "/v1")):
            like = "fal" if name == "picky" else "openai"
            text += f'[[providers]]\nname = "{name}"\nlike = "{like}"\nkey = "THERE_KEY"\n'
            text += f'base_url = "{upstream.url}{path}"\n'
            upstream.key = away.key
        async with placed(tmp_path, good, text) as place:
            await place.order()
            await place.ends("COMPLETED")
            receipt = (await place.client.get(f"/api/v1/video/{place.id}/receipt")).json()["data"]
            jobs = receipt["providerJobs"]
            jobs = [(job["provider"], bool(job["takenAt"]), job["error"]) for job in jobs]
            assert [job[:2] for job in jobs] == [("there", False), ("picky", False), ("good", True)]
            assert "no foxes" in jobs[1][2] and jobs[2][2] is None
            assert picky.count("submit") == 1

            good.always("submit", refuse(400, {"error": {"message": "nor here"}}))
            await place.order()
            away.start()
            away.always("submit", refuse(422, {"detail": "nor I"}))
            assert (await place.until_it_ends())["error"]["code"] == "E5001"
            assert await place.credits() == (90, 0, 10)


# --- while it is made


@native
async def test_a_provider_that_is_away_for_a_while_is_asked_again(place):
    await place.order()
    await work(place.app, for_s=0)
    place.upstream.stop()
    for _ in range(5):
        await work(place.app, for_s=0)
        place.app.clock.pass_s(40)
    place.upstream.start()
    await place.ends("COMPLETED")


@native
async def test_a_job_that_is_not_known_at_first_is_waited_for(place):
    place.upstream.next("poll", missing(), missing())
    await place.order()
    await place.ends("COMPLETED")


@native
@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
async def test_an_error_that_does_not_name_the_job_says_nothing_of_it(place, status):
    body = {"status": "failed", "detail": "not now", "id": "another", "request_id": "another"}
    place.upstream.next("poll", refuse(status, body), refuse(status, {"status": status, "detail": "no"}))
    await place.order()
    await place.ends("COMPLETED")


@pytest.mark.parametrize("place", ["fal"], indirect=True)
@pytest.mark.parametrize("status", [401, 429, 503])
async def test_a_result_that_cannot_be_asked_for_just_now_is_asked_for_again(place, status):
    place.upstream.next("result", refuse(status, {"detail": "not now"}))
    await place.order()
    await place.ends("COMPLETED")


@pytest.mark.parametrize("place", ["fal"], indirect=True)
async def test_a_provider_cannot_send_our_key_to_another_host(place):
    elsewhere = place.upstream.cdn_url + "/status"
    place.upstream.next("submit", instead(200, {"request_id": "r", "status_url": elsewhere}))
    await place.order()
    await place.ends("FAILED", "E5001")
    assert [request for request in place.upstream.requests if request.origin == "cdn"] == []


async def test_a_key_goes_out_as_it_is_and_only_to_its_own_origin(tmp_path):
    text = CATALOG.format(like="fal", url="https://fal.test", model="m", body="{}", extra="")
    (tmp_path / "catalog.toml").write_text(text)
    catalogue = v.read_catalogue(tmp_path / "catalog.toml", {"local"})
    provider = v.HttpProvider(catalogue.providers[0], {"THERE_KEY": "id:secret/+="}, catalogue.models,
                              v.Settings(), None, "secret", Clock())
    ours, others = ["/x?y", ":443/"], ["http://fal.test/x", "https://fal.test:444/", "https://u@fal.test/"]
    key = "Key id:secret/+="
    for url, sent in [(f"https://fal.test{end}", key) for end in ours] + [(url, None) for url in others]:
        assert provider.identify(httpx.Request("GET", url)).headers.get("Authorization") == sent, url
        if sent is None:
            with pytest.raises(v.ProviderFailed):
                provider.request(v.Call("{+url}"), {"url": url})
    await provider.close()


@pytest.mark.parametrize("place", ["openai"], indirect=True)
@pytest.mark.parametrize("dialect", ["openai", "vllm", "sglang"])
async def test_each_dialect_of_openai_is_spoken(place, dialect):
    place.upstream.dialect = dialect
    place.upstream.timeline = ["queued", ("running", 40), "succeeded"]
    await place.order()
    await place.ends("COMPLETED")
    place.upstream.moderate("failed with code")
    await place.order()
    assert (await place.until_it_ends())["error"]["code"] == "E4026"


@native
async def test_a_job_that_the_provider_has_forgotten_is_lost_after_three_answers_and_a_minute(place):
    place.upstream.timeline = []
    await place.order()
    await work(place.app, for_s=0)
    place.upstream.forget()
    began = place.app.clock()
    video = await place.until_it_ends()
    assert (video["status"], video["error"]["code"]) == ("FAILED", "E5001")
    assert "does not know" in video["error"]["message"]
    assert place.upstream.count("poll") >= 3 and 60 <= place.app.clock() - began < 600
    assert await place.credits() == (100, 0, 0)


@native
async def test_progress_is_told(place):
    place.upstream.timeline = ["queued", ("running", 40), ("running", 60), "succeeded"]
    await place.order()
    await place.ends("COMPLETED")
    assert place.upstream.count("poll") >= 4


@native
async def test_a_job_that_never_ends_fails_at_its_deadline_and_its_late_result_can_still_be_had(
        place, monkeypatch):
    place.upstream.timeline = []
    await place.order()
    await place.ends("FAILED", "E5001")
    assert place.upstream.count("cancel") == 0
    (job,) = place.upstream.jobs.values()
    for _ in range(10):
        place.app.clock.pass_s(700)
        await work(place.app, for_s=0)
    job.state = "succeeded"
    place.app.clock.pass_s(1000)
    await work(place.app, for_s=0)
    assert await place.credits() == (100, 0, 0)
    monkeypatch.setattr(v, "RETRY_WAIT_S", 30)
    retried = asyncio.create_task(place.client.post(f"/api/v1/video/{place.id}/retry"))
    while not retried.done():
        await work(place.app, for_s=0)
    assert (retried.result().status_code, retried.result().json()["data"]["status"]) == (200, "COMPLETED")
    assert await place.credits() == (90, 0, 10)


async def test_a_model_may_give_its_providers_less_time(tmp_path):
    clock = Clock()
    with Upstream("openai", clock=clock) as upstream:
        upstream.dialect, upstream.timeline = "vllm", []
        text = CATALOG.format(like="openai", url=upstream.url + "/v1", model="m", body="{}", extra="")
        text = text.replace('modes = ', 'minutes = 2\nmodes = ')
        async with placed(tmp_path, upstream, text) as place:
            await place.order()
            began = clock()
            await place.ends("FAILED", "E5001")
            assert 120 <= clock() - began < 200


@pytest.mark.parametrize("place", ["openrouter"], indirect=True)
async def test_what_a_provider_took_for_it_is_in_the_receipt(place):
    await place.order()
    await place.ends("COMPLETED")
    receipt = (await place.client.get(f"/api/v1/video/{place.id}/receipt")).json()["data"]
    (job,) = receipt["providerJobs"]
    (id,) = place.upstream.jobs
    assert (job["providerId"], job["state"], job["cost"]) == (id, "succeeded", 0.5)


@pytest.mark.parametrize("place", ["gateway"], indirect=True)
async def test_answers_of_openais_own_types_are_understood(place):
    place.upstream.official = True
    place.upstream.timeline = ["queued", ("running", 40), "succeeded"]
    await place.order(duration=8, quality="720p")
    await place.ends("COMPLETED")
    place.upstream.timeline = ["failed"]
    await place.order(duration=8, quality="720p")
    assert "The model stopped" in (await place.until_it_ends())["error"]["message"]
    place.upstream.moderate("failed with code")
    await place.order(duration=8, quality="720p")
    assert (await place.until_it_ends())["error"]["code"] == "E4026"


@pytest.mark.parametrize("place", ["sglang"], indirect=True)
async def test_a_result_in_the_servers_own_bucket_is_fetched_from_there(place):
    place.upstream.cloud = True
    await place.order()
    await place.ends("COMPLETED")
    assert [each.origin for each in place.upstream.requests if each.step == "content"] == ["cdn"]


@pytest.mark.parametrize(("place", "shape"), [
    ("openai", "400 at submit"), ("openai", "failed with code"), ("fal", "422 at result"),
    ("replicate", "failed with text"), ("gemini", "zero samples"), ("kie", "code 501"),
    ("runway", "failed with code"),
], indirect=["place"])
async def test_what_a_provider_refuses_to_show_is_told_apart_from_what_it_cannot_make(place, shape):
    place.upstream.moderate(shape)
    await place.order()
    await place.ends("FAILED", "E4026")
    assert await place.unknown() == []


@native
async def test_done_without_a_result_is_a_failure(place):
    place.upstream.result = None
    await place.order()
    video = await place.until_it_ends()
    assert video["status"] == "FAILED" and await place.credits() == (100, 0, 0)


# --- callbacks

calling = pytest.mark.parametrize("place", ["fal", "replicate", "kie", "evolink", "luma"], indirect=True)


async def call_back(place, callback):
    return await place.client.post(callback.path, content=callback.body, headers=callback.headers)


async def due(place):
    return await rows(place.app, "SELECT status, due_at - :now FROM videos", now=place.app.now())


@calling
async def test_a_callback_makes_us_look_at_once_and_nothing_else(place):
    place.upstream.timeline = []
    await place.order()
    await work(place.app, for_s=0)
    (job,) = place.upstream.jobs.values()
    job.state = "succeeded"
    assert (await due(place))[0][1] > 0
    answer = await call_back(place, place.upstream.outbox[-1])
    assert (answer.status_code, await due(place)) == (200, [("GENERATING", 0)])
    await work(place.app, for_s=0)
    assert (await place.ends("COMPLETED"))["progress"] == 100
    for callback in [*place.upstream.outbox, *reversed(place.upstream.outbox)]:  # late and again
        assert (await call_back(place, callback)).status_code == 200
    await place.ends("COMPLETED")


@calling
async def test_a_callback_may_come_before_the_answer_to_the_order(place):
    def at_once(job):
        job.state = "succeeded"

    place.upstream.on_job = at_once
    provider, statuses = place.app.providers["there"], []
    taken = provider.submit

    async def submit(job):
        ref = await taken(job)
        answers = [await call_back(place, callback) for callback in place.upstream.outbox * 2]
        statuses.extend(answer.status_code for answer in answers)
        return ref

    provider.submit = submit
    await place.order()
    await place.ends("COMPLETED")
    assert statuses == [200, 200] and place.upstream.count("submit") == 1


@calling
async def test_a_callback_that_is_forged_is_refused(place):
    place.upstream.timeline = []
    await place.order()
    await work(place.app, for_s=0)
    (job,) = place.upstream.jobs.values()
    job.state = "succeeded"
    before, real, there = await due(place), place.upstream.outbox[-1], place.app.providers["there"]
    assert error_of(await call_back(place, real.forged())) == (401, "E4010")
    if there.template.callback in ("standard", "fal"):  # the others sign no body
        assert error_of(await call_back(place, real.badly_signed())) == (401, "E4010")
    assert await due(place) == before
    for path in ("nobody?job=x", "there", f"there?job={place.id}&attempt=1&token=", "local?job=x&token=y"):
        answer = await place.client.post(f"/api/v1/video/callback/{path}", content=real.body)
        assert error_of(answer) == (401, "E4010")


@pytest.mark.parametrize("place", ["replicate", "kie", "evolink", "luma"], indirect=True)
async def test_a_callback_brings_back_an_order_whose_answer_was_lost(place):
    place.upstream.next("submit", reset_after())
    place.upstream.timeline = []
    await place.order()
    await work(place.app, for_s=0)
    (job,) = place.upstream.jobs.values()
    place.app.clock.pass_s(90)
    job.state = "succeeded"
    assert (await call_back(place, place.upstream.outbox[-1])).status_code == 200
    await place.ends("COMPLETED")
    assert place.upstream.count("submit") == 1


async def test_a_callback_that_cannot_be_written_down_says_so(app, client, monkeypatch):
    class Broken(v.HttpProvider):
        def __init__(self):
            pass

        async def is_signed(self, headers, body):
            raise OSError("no")

    app.providers["there"] = Broken()
    token = v.sign(app.secret, "callback", "there", "x", 1)
    answer = await client.post(f"/api/v1/video/callback/there?job=x&attempt=1&token={token}", content=b"{}")
    assert error_of(answer) == (500, "E5003")


@pytest.mark.parametrize("like", ["replicate", "fal"])
async def test_secrets_that_a_provider_tells_are_fetched_once_and_again_when_they_change(tmp_path, like):
    clock = Clock()
    with Upstream(like, clock=clock) as upstream:
        address = {"replicate": "/v1/webhooks/default/secret", "fal": "/.well-known/jwks.json"}[like]
        extra = f'secrets_url = "{upstream.url}{address}"'
        text = CATALOG.format(like=like, url=upstream.url, model="a/b", body="{}", extra=extra)
        (tmp_path / "catalog.toml").write_text(text)
        catalogue = v.read_catalogue(tmp_path / "catalog.toml", {"local"})
        provider = v.HttpProvider(catalogue.providers[0], {"THERE_KEY": upstream.key}, catalogue.models,
                                  v.Settings(), None, "secret", clock)
        body = b'{"id": "x"}'

        def signed():
            sign = upstream.sign_standard if like == "replicate" else upstream.sign_fal
            headers = sign(SimpleNamespace(id="x"), body)
            return {name.lower(): text for name, text in headers.items()}

        for _ in range(3):
            assert await provider.is_signed(signed(), body)
        assert upstream.count("keys") == 1
        upstream.secret = "whsec_" + base64.b64encode(b"another").decode()
        upstream.keys.append(ECC.generate(curve="Ed25519"))
        for _ in range(3):
            assert not await provider.is_signed(signed(), body)  # for a minute nobody makes us ask again
        clock.pass_s(61)
        assert await provider.is_signed(signed(), body)
        assert not await provider.is_signed(signed() | {"webhook-id": "", "x-fal-webhook-user-id": ""}, body)
        assert upstream.count("keys") == 2
        await provider.close()


STANDARD = ("whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX", {
    "webhook-id": "evt_1", "webhook-timestamp": "1750000000",
    "webhook-signature": "v1,IBH8zD/3aIMyMzAb1LxcKkvLqukeMIFfOjzbcrsiYMI=",
}, b'{"id":"evt_1","object":"event","type":"video.completed","created_at":1750000000,'
   b'"data":{"id":"video_abc"}}')
KIE = ("kie-secret", {"x-webhook-timestamp": "1750000000",
                      "x-webhook-signature": "15Jwp2mVHDN+UzpRGtDCKWLOsnlrM4KD0CCg+iJmzHs="},
       b'{"data":{"taskId":"task_123"}}')
FAL_KEY = "A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg"
FAL = (FAL_KEY, {
    "x-fal-webhook-request-id": "req-1", "x-fal-webhook-user-id": "user-1",
    "x-fal-webhook-timestamp": "1750000000", "x-fal-webhook-signature":
        "c9955078db59a0b67ee15104621043279d5c4258aaa19ad24b67dc343b51b0dd"
        "03561556c46fd888af6c6806913e2fdc556a6ef871780b83bad86212d047d808",
}, b'{"request_id":"req-1","gateway_request_id":"req-1","status":"OK",'
   b'"payload":{"video":{"url":"https://example.com/a.mp4"}}}')
SIGNED = {
    "standard": (STANDARD, "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYY"),
    "kie": (KIE, "kie-secreT"),
    "fal": (FAL, "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo")}


@pytest.mark.parametrize("kind", SIGNED)
def test_a_signature_is_right_as_it_is_and_wrong_in_every_other_way(kind):
    (secret, headers, body), other = SIGNED[kind]
    now = 1_750_000_000_000

    def signed(headers=headers, body=body, keys=(other, "short", secret), now=now):
        return v.is_signed_by(kind, headers, body, keys, now)

    assert signed() and signed(now=now + 300_000) and signed(keys=[secret])
    assert not signed(now=now + 301_000) and not signed(now=now - 301_000)
    for name in headers:
        assert not signed({**headers, name: ""})
        flipped = headers[name][:-3] + chr(ord(headers[name][-3]) ^ 1) + headers[name][-2:]
        assert not signed({**headers, name: flipped}), name
    assert not signed(body=body.replace(b"1", b"2"))
    assert not signed(keys=[other]) and not signed(keys=[])


def test_one_right_signature_among_several_is_enough():
    secret, headers, body = STANDARD
    several = "v1a,abc v1,wrong " + headers["webhook-signature"]
    signed = {**headers, "webhook-signature": several}
    assert v.is_signed_by("standard", signed, body, [secret], 1_750_000_000_000)


# --- the result


@native
@pytest.mark.parametrize("fault", [html(), json_video(), bomb(50_000_000), cut(900, told=False)], ids=[
    "a page", "an error", "a bomb", "half of it"])
async def test_what_is_no_video_is_not_delivered(place, fault):
    place.upstream.always("content", fault)
    await place.order()
    video = await place.ends("FAILED", "E5001")
    assert "sent no video" in video["error"]["message"]


@native
async def test_a_result_that_breaks_off_is_fetched_again(place):
    place.upstream.next("content", cut(900), cut(100))
    await place.order()
    await place.ends("COMPLETED")


@native
async def test_a_result_may_come_without_saying_how_long_it_is(place):
    place.upstream.always("content", unsized())
    await place.order()
    await place.ends("COMPLETED")


@native
@pytest.mark.parametrize("inside", [
    "http://169.254.169.254/latest/meta-data/", "http://localhost:1/", "http://[::1]:1/", "https://0x7f000001/",
    "http://10.0.0.1/", "file:///etc/passwd", "https://[::ffff:127.0.0.1]/",
])
async def test_a_result_that_leads_inside_is_not_fetched(place, inside):
    place.upstream.always("content", redirect(inside))
    await place.order()
    video = await place.until_it_ends()
    assert video["status"] == "FAILED" and await place.credits() == (100, 0, 0)


@pytest.mark.parametrize(("named", "end"), [("", "FAILED"), ('private_hosts = ["localhost"]', "COMPLETED")])
async def test_a_host_inside_is_called_only_where_the_operator_named_it(tmp_path, named, end):
    clock = Clock()
    with Upstream("replicate", clock=clock) as upstream, Upstream(clock=clock) as other:
        other.route("content", "GET", "/a.mp4", lambda request: (200, tiny_video(), {}))
        inside = other.url.replace("127.0.0.1", "localhost")
        upstream.always("content", redirect(f"{inside}/a.mp4"))
        text = CATALOG.format(like="replicate", url=upstream.url + "/v1", model="a/b", body="{}", extra=named)
        async with placed(tmp_path, upstream, text) as place:
            await place.order()
            assert (await place.until_it_ends())["status"] == end


@pytest.mark.parametrize("place", ["fal", "replicate", "runway"], indirect=True)
async def test_a_link_that_has_ended_is_asked_for_again_once(place):
    place.upstream.on_job = lambda job: job.expire_links(410)
    await place.order()
    await place.ends("COMPLETED")


# --- which addresses may be called


@pytest.mark.parametrize(("address", "public"), [
    ("93.184.216.34", True), ("2606:4700::6810:84e5", True), ("127.0.0.1", False), ("10.1.2.3", False),
    ("169.254.169.254", False), ("100.100.100.200", False), ("168.63.129.16", False), ("192.0.0.192", False),
    ("224.0.0.1", False), ("0.0.0.0", False), ("::1", False), ("::ffff:127.0.0.1", False),
    ("fd00:ec2::254", False), ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("::127.0.0.1", False),
    ("fec0::1", False), ("ff02::1", False),
])
def test_public_addresses_are_told_from_those_inside(address, public):
    assert v.is_public(address) is public


@pytest.mark.parametrize("host", [
    "127.1", "2130706433", "0", "localhost", "0x7f000001", "017700000001", "[::1]"])
async def test_no_spelling_of_this_machine_is_called(host):
    async with v.outside_client(()) as client:
        with pytest.raises(httpx.UnsupportedProtocol, match="not a public address"):
            await client.get(f"https://{host}/")


async def test_two_thousand_calls_end_at_their_deadlines_and_take_no_connection_with_them():
    with Upstream("openai") as upstream:
        upstream.always("poll", drip(1, 0.02))
        headers, url = {"Authorization": f"Bearer {upstream.key}"}, f"{upstream.url}/v1/videos/x"
        async with v.outside_client({"127.0.0.1"}) as client:
            asked = functools.partial(client.build_request, "GET", url, headers=headers)
            for _ in range(20):
                calls = [v.exchange(client, asked(), within_s=0.05) for _ in range(100)]
                found = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(failure, httpx.TimeoutException) for failure in found)
            upstream.always("poll", None)
            answer, _ = await v.exchange(client, asked(), within_s=10)
            assert answer.status_code == 404
            assert len(client._transport._pool.connections) <= 1


# --- whatever goes wrong, wherever

FAULTS = [
    refuse(500), refuse(403), throttled(5), missing(), reset_before(), reset_after(), lost(502), slow(0.05),
    drip(64, 0.001), cut(20), cut(20, told=False), cut(20, reset=True), unsized(), html(), bomb(10_000_000),
    redirect("http://127.0.0.1:1/"), redirect("http://169.254.169.254/latest/meta-data/"),
]


@native
@pytest.mark.parametrize("step", ["submit", "poll", "content"])
@pytest.mark.parametrize("times", [1, 3])
async def test_whatever_goes_wrong_a_video_ends_is_paid_when_delivered_and_ordered_once(place, step, times):
    made, spent = 0, 0
    await place.app.db.write(v.grant, user_id=place.user_id, credits=900, trans_type="SYSTEM_ADJUST",
                             source_ref="more", note="", expires_at=None, now=place.app.now())
    for fault in FAULTS:
        before = place.upstream.paid
        place.upstream.faults.clear()
        place.upstream.next(step, *[fault] * times)
        await place.order()
        video = await place.until_it_ends()
        assert video["status"] in ("COMPLETED", "FAILED"), fault
        assert place.upstream.paid - before <= 1, fault
        made += video["status"] == "COMPLETED"
        spent += video["creditsUsed"] if video["status"] == "COMPLETED" else 0
        assert await place.credits() == (1000 - spent, 0, spent), fault
    assert made >= 4


# --- a retry


@pytest.fixture
async def unstored(place, monkeypatch):
    """A video that was made, and that could not be stored."""
    folder = place.app.storage.root / "videos"
    folder.touch()
    await place.order()
    await place.ends("FAILED", "E5002")
    folder.unlink()
    monkeypatch.setattr(v, "RETRY_WAIT_S", 30)
    return place


def retry(place, **words):
    return asyncio.create_task(place.client.post(f"/api/v1/video/{place.id}/retry", **words))


async def worked(place, *asked):
    while not all(one.done() for one in asked):
        await work(place.app, for_s=0)
    await books_are_right(place.app)
    return [one.result() for one in asked]


@native
async def test_a_retry_answers_when_the_video_is_stored(unstored):
    (answer,) = await worked(unstored, retry(unstored))
    assert (answer.status_code, answer.json()["data"]["status"]) == (200, "COMPLETED")
    assert await unstored.credits() == (90, 0, 10)
    asked = [each for each in unstored.upstream.requests if each.headers.get("range")]
    assert [each.headers["range"] for each in asked] == ["bytes=0-1023"]


@native
async def test_of_two_retries_at_once_one_runs(unstored):
    answers = await worked(unstored, retry(unstored), retry(unstored))
    assert sorted(answer.status_code for answer in answers) == [200, 400]
    assert await unstored.credits() == (90, 0, 10)


@native
@pytest.mark.parametrize("status", [403, 404, 410])
async def test_a_retry_of_what_is_gone_is_refused_before_it_costs_anything(unstored, status):
    unstored.upstream.always("content", refuse(status))
    (answer,) = await worked(unstored, retry(unstored))
    assert error_of(answer) == (410, "E4008")
    assert (await unstored.look())["error"]["code"] == "E5002" and await unstored.credits() == (100, 0, 0)


@native
async def test_a_retry_that_cannot_store_it_either_costs_nothing(unstored):
    folder = unstored.app.storage.root / "videos"
    folder.touch()
    asked = retry(unstored)
    for _ in range(20):
        await work(unstored.app, for_s=0)
        unstored.app.clock.pass_s(40)
    (answer,) = await worked(unstored, asked)
    assert error_of(answer) == (500, "E5002")
    assert await unstored.credits() == (100, 0, 0)


@native
async def test_a_retry_that_takes_long_says_so(unstored, monkeypatch):
    monkeypatch.setattr(v, "RETRY_WAIT_S", 0)
    (answer,) = await asyncio.gather(retry(unstored, headers={"Idempotency-Key": "k"}))
    assert (answer.status_code, answer.json()["data"]["status"]) == (202, "UPLOADING")
    await work(unstored.app)
    (again,) = await asyncio.gather(retry(unstored, headers={"Idempotency-Key": "k"}))
    assert (again.status_code, again.json()["data"]["status"]) == (200, "COMPLETED")
    assert await unstored.credits() == (90, 0, 10)


@native
async def test_a_retry_without_credits_is_refused(unstored):
    app = unstored.app
    await app.db.write(v.deduct, user_id=unstored.user_id, credits=95, note="", now=app.now())
    (answer,) = await worked(unstored, retry(unstored))
    assert error_of(answer) == (402, "E4001")
    assert (await unstored.look())["status"] == "FAILED"


# --- the catalogue


@pytest.mark.parametrize("address", ["http://[zz]/", "https://xn--/"])
async def test_an_address_that_is_none_stops_the_start_with_one_line(tmp_path, address):
    text = (v.FILES / "catalog.toml").read_text()
    text += f'\n[[providers]]\nname = "mine"\nlike = "openai"\nbase_url = "{address}"\n'
    (tmp_path / "catalog.toml").write_text(text)
    settings = v.Settings(data=str(tmp_path / "data"), catalog=str(tmp_path / "catalog.toml"))
    with pytest.raises(v.Refused, match=r"^provider mine: base_url: [^\n]+$"):
        async with v.open_app(settings):
            raise AssertionError("it started")


async def test_a_model_is_offered_when_the_key_of_a_provider_is_there(tmp_path):
    for environ, offered in [({}, {"preview"}), ({"FAL_KEY": "x"}, {"preview", "kling-2-master"})]:
        settings = v.Settings(data=str(tmp_path / str(len(environ))))
        async with v.open_app(settings, environ=environ) as app, client_of(app) as client:
            found = (await client.get("/api/v1/config/models")).json()["data"]["models"]
            assert {model["id"] for model in found} == offered


def test_a_key_may_come_from_a_file_but_not_from_both(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    environ = {"FAL_KEY_FILE": str(tmp_path / "key")}
    assert v.read_variable(environ, "FAL_KEY") == "secret"
    assert (v.read_variable({"FAL_KEY": "x"}, "FAL_KEY"), v.read_variable({}, "FAL_KEY")) == ("x", None)
    for broken in ({**environ, "FAL_KEY": "x"}, {"FAL_KEY_FILE": str(tmp_path / "none")}):
        with pytest.raises(v.Refused, match="FAL_KEY"):
            v.read_variable(broken, "FAL_KEY")


@pytest.mark.parametrize(("change", "words"), [
    ('like = "openai"', "base_url"), ('like = "nobody"', "no template 'nobody'"),
    ('like = "fal"\nstatus = [{ path = "/{secret}" }]', "names secret"),
    ('like = "fal"\nsubmit.body.x = { "$" = "promt" }', "names promt"),
    ('like = "fal"\nsubmit.body.x = { "$" = "prompt", suffx = "s" }', "no way to shape"),
    ('like = "fal"\nsubmit.query.x = { "$" = "seconds", as = "integer" }', "no way to shape"),
    ('like = ["fal"]', "list"), ('like = "fal"\nsubmit.body.x = { "$file" = "none.json" }', "none.json"),
    ('like = "fal"\nresults = []', "says where the result is"), ('like = "fal"\nkey = "lower"', "key"),
    ('like = "fal"\nbase_url = "ftp://x"', "base_url"), ('like = "fal"\nname = "local"', "there twice"),
    ('like = "fal"\ncolour = "red"', "colour"), ('like = "fal"\nbase_url = "https://a:b/"', "base_url"),
])
def test_a_provider_that_cannot_be_stops_the_start(tmp_path, change, words):
    name = "" if "name =" in change else 'name = "a"\n'
    text = (v.FILES / "catalog.toml").read_text() + f"\n[[providers]]\n{name}{change}\n"
    (tmp_path / "catalog.toml").write_text(text)
    with pytest.raises(v.Refused, match=words):
        v.read_catalogue(tmp_path / "catalog.toml", {"local"})
