"""The outside providers that the tests act out do as their manuals say, and break as they are told to."""

import asyncio
import io
import json
import threading
from urllib.parse import quote

import av
import httpx
import pytest
from Crypto.PublicKey import ECC

import upstream as u
from conftest import tiny_video
from upstream import Upstream, cut, held, redirect, refuse, reset_after, reset_before

FOX = {"prompt": "a red fox over snow"}


@pytest.fixture
def provider(request):
    """One that speaks what the test is parametrized with; openai where it does not matter."""
    with Upstream(getattr(request, "param", "openai")) as provider:
        yield provider


def speaks(name):
    return pytest.mark.parametrize("provider", [name], indirect=True, ids=[name])


@pytest.fixture
def http(provider):
    """A client of it that has the right key."""
    with client_of(provider) as http:
        yield http


def client_of(provider, word="Bearer", **headers):
    headers = {"Authorization": f"{word} {provider.key}"} | headers
    return httpx.Client(base_url=provider.url, headers=headers, trust_env=False, verify=False)


def get(url, method="GET", **kwargs):
    """As somebody without a key."""
    return httpx.request(method, url, trust_env=False, verify=False, **kwargs)


def form(**fields):
    """As multipart, even without a file."""
    return {"files": {name: (None, text) for name, text in fields.items()}}


def order(http):
    answer = http.post("/v1/videos", **form(**FOX))
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def finished(http):
    """The path of the bytes of a video that is ready."""
    path = f"/v1/videos/{order(http)}"
    assert http.get(path).json()["status"] == "completed"
    return path + "/content"


@pytest.fixture
def ear():
    """Somebody who takes callbacks: another provider, whose only act is to listen."""
    with Upstream() as ear:
        ear.route("callback", "POST", "/callbacks/{token}", lambda request, token: {})
        yield ear


def test_openai_makes_a_video_whose_bytes_need_the_key(provider, http):
    provider.timeline = ["queued", ("running", 40), "succeeded"]
    id = order(http)
    seen = [http.get(f"/v1/videos/{id}").json() for _ in range(2)]
    assert [(video["status"], video["progress"]) for video in seen] == [("queued", 0), ("in_progress", 40)]
    assert http.get(f"/v1/videos/{id}/content").status_code == 404
    video = http.get(f"/v1/videos/{id}").json()
    assert (video["status"], video["seconds"], video["error"]) == ("completed", "4", None)
    assert http.get(f"/v1/videos/{id}/content").content == tiny_video()
    assert get(f"{provider.url}/v1/videos/{id}/content").status_code == 401
    assert (provider.paid, provider.count("poll"), provider.requests[0].fields) == (1, 3, FOX)


def test_the_dialects_of_openai_differ_in_what_they_take(provider, http):
    image = {"input_reference": ("first.png", b"\x89PNG\r\n\r\n--", "image/png")}
    for dialect, wrong, right in [
        ("openai", {"json": FOX | {"seconds": 8}}, {"json": FOX | {"seconds": "8"}}),
        ("openai", {"json": FOX | {"input_reference": "https://x.test/a"}}, {"data": FOX, "files": image}),
        ("vllm", {"json": FOX}, form(**FOX, seconds="8")),
        ("sglang", {"json": FOX | {"seconds": "8"}}, {"json": FOX | {"seconds": 8}}),
    ]:
        provider.dialect = dialect
        assert http.post("/v1/videos", **wrong).status_code in (400, 422)
        assert http.post("/v1/videos", **right).status_code == 200
    sent = provider.requests[3].file("input_reference")
    assert (sent.filename, sent.data, sent.type, provider.paid) == (*image["input_reference"], 4)


def test_vllm_says_a_failed_job_with_a_status_of_500(provider, http):
    provider.dialect, provider.timeline = "vllm", ["failed"]
    answer = http.get(f"/v1/videos/{order(http)}")
    assert (answer.status_code, answer.json()["object"], answer.json()["status"]) == (500, "video", "failed")


@speaks("fal")
def test_fal_tells_three_addresses_and_hides_a_failure_behind_completed(provider):
    provider.timeline = ["queued", "running", "succeeded"]
    with client_of(provider, "Key") as http:
        told = http.post("/fal-ai/kling/v2/master?fal_webhook=https%3A%2F%2Fus.test%2Fcb", json=FOX).json()
        assert told["status_url"] == f"{provider.url}/fal-ai/kling/requests/{told['request_id']}/status"
        assert provider.jobs[told["request_id"]].callback_url == "https://us.test/cb"
        seen = []
        for _ in range(3):
            seen.append(http.get(told["status_url"]).status_code)
            seen.append(http.get(told["response_url"]).status_code)
        assert seen == [202, 400, 202, 400, 200, 200]
        url = http.get(told["response_url"]).json()["video"]["url"]
        assert http.get(url).status_code == 400  # for it carries our key
        assert get(url).content == tiny_video()
        assert get(url, "HEAD").status_code == 405
        assert http.put(told["cancel_url"]).json() == {"status": "ALREADY_COMPLETED"}

        provider.moderate("422 at result")
        told = http.post("/fal-ai/kling/v2/master", json=FOX).json()
        assert http.get(told["status_url"]).json()["status"] == "COMPLETED"
        answer = http.get(told["response_url"])
        assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, "content_policy_violation")


@speaks("replicate")
def test_replicate_says_its_result_in_three_shapes_and_forgets_it(provider, http):
    seen = []
    for provider.shape in ("string", "list", "object"):
        answer = http.post("/v1/models/wan/wan-2/predictions", json={"input": FOX})
        assert (answer.status_code, answer.json()["status"]) == (201, "starting")
        seen.append(http.get(answer.json()["urls"]["get"]).json()["output"])
    links = [seen[0], seen[1][0], seen[2]["video"]]
    assert [get(link).content for link in links] == [tiny_video()] * 3
    provider.jobs["prediction1"].result = None
    erased = http.get("/v1/predictions/prediction1").json()
    assert (erased["status"], erased["output"], erased["data_removed"]) == ("succeeded", None, True)
    assert http.post("/v1/predictions", json={"input": FOX}).status_code == 422  # no version


@speaks("comfyui")
@pytest.mark.parametrize("has_jobs", [True, False], ids=["new", "old"])
def test_comfyui_takes_our_name_for_a_job(provider, http, has_jobs):
    provider.has_jobs, provider.timeline, provider.outputs_under = has_jobs, ["queued", "running"], "gifs"
    names = [http.post("/upload/image", files={"image": ("a.png", b"x")}).json()["name"] for _ in range(2)]
    assert names == ["a.png", "a (1).png"]
    id = "00000000-0000-4000-8000-000000000001"
    nodes = {"52": {"class_type": "LoadImage", "inputs": {"image": "a (1).png"}}, "58": {"inputs": {}}}
    assert http.post("/prompt", json={"prompt": nodes, "prompt_id": "ours"}).status_code == 400
    assert http.post("/prompt", json={"prompt": nodes, "prompt_id": id}).json()["prompt_id"] == id
    assert http.get(f"/history/{id}").json() == {}
    assert [item[1] for item in http.get("/queue").json()["queue_pending"]] == [id]
    assert http.get(f"/api/history/{id}").json() == {}
    assert [item[1] for item in http.get("/queue").json()["queue_running"]] == [id]
    provider.jobs[id].state = "succeeded"
    found = http.get(f"/history/{id}").json()[id]
    assert found["status"]["status_str"] == "success"
    assert http.get("/view", params=found["outputs"]["58"]["gifs"][0]).content == tiny_video()
    answer = http.get(f"/api/jobs/{id}")
    assert (answer.json()["status"] if has_jobs else answer.status_code) == ("completed" if has_jobs else 404)


@speaks("comfyui")
def test_an_old_comfyui_interrupts_whatever_runs(provider, http):
    provider.has_jobs, provider.timeline = False, ["running"]
    ids = [http.post("/prompt", json={"prompt": {"1": {"inputs": {}}}}).json()["prompt_id"] for _ in range(2)]
    http.get(f"/history/{ids[0]}")
    http.post("/queue", json={"delete": [ids[1]]})
    http.post("/interrupt", json={"prompt_id": ids[1]})
    ended = http.get(f"/history/{ids[0]}").json()[ids[0]]
    assert ended["status"]["messages"][-1][0] == "execution_interrupted"
    assert http.get(f"/history/{ids[1]}").json() == {}


# The others, each from its manual.  A test of our templates begins with MANUALS[name](upstream).


def kie(up):
    words = {"queued": "waiting", "running": "generating", "succeeded": "success", "failed": "fail"}

    def told(job):
        links, error = job.links, job.error or {}
        result = json.dumps({"resultUrls": links}) if links else ""
        state = {"taskId": job.id, "state": job.word(words), "resultJson": result, "param": "{}"}
        state |= {"failCode": error.get("code"), "failMsg": error.get("message")}
        return {"code": 200, "msg": "success", "data": state}

    up.documented(
        "POST /api/v1/jobs/createTask", "GET /api/v1/jobs/recordInfo?taskId={id}", told=told,
        took=lambda job: {"code": 200, "msg": "success", "data": {"taskId": job.id}},
        callback="callBackUrl", sign=up.sign_kie,
    )


def kie_veo(up):
    flags = {"queued": 0, "running": 0, "succeeded": 1, "failed": 2}

    def told(job):
        error = job.error or {}
        data = {"taskId": job.id, "successFlag": job.word(flags), "response": {"resultUrls": job.links}}
        data |= {"errorCode": error.get("code"), "errorMessage": error.get("message")}
        return {"code": 200, "msg": "success", "data": data}

    up.documented(
        "POST /api/v1/veo/generate", "GET /api/v1/veo/record-info?taskId={id}", told=told,
        took=lambda job: {"code": 200, "msg": "success", "data": {"taskId": job.id}},
        tell=lambda job, event: {"code": 200, "data": {"taskId": job.id, "info": {"resultUrls": job.links}}},
        callback="callBackUrl", sign=up.sign_kie,
    )


PLAIN = {"queued": "pending", "running": "processing", "succeeded": "completed", "failed": "failed"}
PLAIN |= {"canceled": "cancelled"}


def evolink(up):
    told = lambda job: {"id": job.id, "object": "video.generation.task", "status": job.word(PLAIN),
                        "progress": job.progress, "results": job.links, "error": job.error}
    up.documented("POST /v1/videos/generations", "GET /v1/tasks/{id}", took=told, told=told,
                  callback="callback_url")


def apimart(up):
    def told(job):
        data = {"id": job.id, "status": job.word(PLAIN), "progress": job.progress, "error": job.error}
        return {"code": 200, "data": data | {"result": {"videos": [{"url": job.links}]}}}

    took = lambda job: {"code": 200, "data": [{"status": "submitted", "task_id": job.id}]}
    up.documented("POST /v1/videos/generations", "GET /v1/tasks/{id}", took=took, told=told)


def runway(up):
    words = {"queued": "THROTTLED", "running": "RUNNING", "succeeded": "SUCCEEDED", "failed": "FAILED"}

    def told(job):
        said = {"id": job.id, "status": job.word(words | {"canceled": "CANCELLED"})}
        if job.failed:
            return said | {"failure": job.error["message"], "failureCode": job.error["code"]}
        return said | ({"output": job.links} if job.done else {"progress": job.progress / 100})

    needs = u.BEARER | {"x-runway-version": "2024-11-06"}
    up.documented("POST /v1/{kind}_to_video", "GET /v1/tasks/{id}", cancel="DELETE /v1/tasks/{id}",
                  took=lambda job: {"id": job.id}, told=told, needs=needs)


def luma(up):
    words = {"queued": "queued", "running": "dreaming", "succeeded": "completed"}
    words |= dict.fromkeys(["failed", "canceled"], "failed")
    told = lambda job: {"id": job.id, "state": job.word(words), "assets": {"video": [*job.links, None][0]},
                        "failure_reason": job.error and job.error["message"]}
    place = "/dream-machine/v1/generations"
    up.documented(f"POST {place}/video", f"GET {place}/{{id}}", took=lambda job: (201, told(job)), told=told,
                  cancel=f"DELETE {place}/{{id}}", callback="callback_url",
                  events=("start", "completed"))


def openrouter(up):
    words = PLAIN | {"running": "in_progress"}
    place = "/api/v1/videos"
    told = lambda job: {"id": job.id, "polling_url": f"{up.url}{place}/{job.id}", "status": job.word(words),
                        "urls": job.links, "error": job.error, "usage": {"cost": 0.5}}
    up.documented(f"POST {place}", f"GET {place}/{{id}}", took=lambda job: (202, told(job)), told=told)


def gemini(up):
    """Its result's address needs the key, and leads to another host, which must not see it."""
    needs = {"x-goog-api-key": "{key}"}

    def told(job):
        said = {"name": job.id, "done": True}
        if job.failed:
            return said | {"error": {"code": 13, "message": job.error["message"]}}
        video = {"uri": f"{up.url}/v1beta/files/{quote(job.id, safe='')}:download?alt=media"}
        made = {"generatedSamples": [{"video": video}]} if job.done else {}
        made |= {"raiMediaFilteredReasons": up.filtered, "raiMediaFilteredCount": len(up.filtered)}
        said |= {"response": {"generateVideoResponse": made}}
        return said if job.state == "succeeded" else {"name": job.id}

    def lead(request, file):
        return 302, b"", {"location": up.find(file).links[0]}

    up.route("result", "GET", "/v1beta/files/{file}:download", lead, needs=needs)
    up.documented("POST /v1beta/models/{model}:predictLongRunning", "GET /v1beta/{id:path}", told=told,
                  took=lambda job: {"name": job.id}, needs=needs, prefix="models/veo/jobs/")


def localai(up):
    """One long request, and no second one."""

    def make(request):
        job = up.take(request, up.new_id("video-"))
        return {"id": job.poll().id, "created": job.created_at, "data": [{"url": link} for link in job.links]}

    up.route("submit", "POST", "/video", make)


MANUALS = {manual.__name__: manual for manual in [
    kie, kie_veo, evolink, apimart, runway, luma, openrouter, gemini, localai]}


@pytest.mark.parametrize(("name", "submit", "poll"), [
    ("kie", "/api/v1/jobs/createTask", "/api/v1/jobs/recordInfo?taskId=task-1"),
    ("kie_veo", "/api/v1/veo/generate", "/api/v1/veo/record-info?taskId=task-1"),
    ("evolink", "/v1/videos/generations", "/v1/tasks/task-1"),
    ("apimart", "/v1/videos/generations", "/v1/tasks/task-1"),
    ("runway", "/v1/image_to_video", "/v1/tasks/task-1"),
    ("luma", "/dream-machine/v1/generations/video", "/dream-machine/v1/generations/task-1"),
    ("openrouter", "/api/v1/videos", "/api/v1/videos/task-1"),
])
def test_a_provider_is_acted_out_from_its_manual(name, submit, poll):
    with Upstream(timeline=["running", "succeeded", "succeeded"]) as provider:
        MANUALS[name](provider)
        with client_of(provider, **{"X-Runway-Version": "2024-11-06"}) as http:
            assert "task-1" in http.post(submit, json=FOX).text
            running, *done = [http.get(poll).text for _ in range(3)]
        link = f"{provider.cdn_url}/task-1/"
        assert link not in running
        assert all(f"{link}{n}.mp4" in text for n, text in enumerate(done, 1))
        assert get(f"{link}2.mp4").content == tiny_video()
        assert (provider.paid, provider.jobs["task-1"].order) == (1, FOX)


def test_geminis_result_needs_the_key_and_leads_to_a_host_that_must_not_see_it():
    with Upstream() as provider, httpx.Client(base_url=provider.url, trust_env=False) as http:
        gemini(provider)
        key = {"x-goog-api-key": provider.key}
        name = http.post("/v1beta/models/veo:predictLongRunning", json={}, headers=key).json()["name"]
        made = http.get(f"/v1beta/{name}", headers=key).json()["response"]["generateVideoResponse"]
        uri = made["generatedSamples"][0]["video"]["uri"]
        assert http.get(uri).status_code == 401
        leads = http.get(uri, headers=key)
        assert leads.status_code == 302 and leads.headers["location"].startswith(provider.cdn_url)
        assert http.get(leads.headers["location"], headers=key).status_code == 400
        assert http.get(leads.headers["location"]).content == tiny_video()
        provider.moderate("zero samples")
        name = http.post("/v1beta/models/veo:predictLongRunning", json={}, headers=key).json()["name"]
        made = http.get(f"/v1beta/{name}", headers=key).json()["response"]["generateVideoResponse"]
        assert "generatedSamples" not in made and made["raiMediaFilteredReasons"] == [u.FLAGGED]


def test_localai_answers_once_with_all():
    with Upstream() as provider:
        localai(provider)
        url = get(f"{provider.url}/video", "POST", json=FOX).json()["data"][0]["url"]
        assert get(url).content == tiny_video()


def test_a_line_that_breaks_before_the_order_is_taken_costs_nothing(provider, http):
    provider.next("submit", reset_before(), reset_after(), None)
    for paid in (0, 1):
        with pytest.raises(httpx.ReadError):
            order(http)
        assert (provider.paid, len(provider.requests)) == (paid, paid + 1)
    order(http)
    assert provider.paid == 2


def test_a_refusal_a_lost_answer_and_a_404_come_when_they_are_told_to(provider, http):
    provider.next("submit", u.throttled(7), refuse(503), u.lost())
    answers = [http.post("/v1/videos", **form(**FOX)) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [429, 503, 500, 200]
    assert (answers[0].headers["retry-after"], provider.paid) == ("7", 2)
    provider.next("poll", *[u.missing()] * 3)
    path = f"/v1/videos/{answers[3].json()['id']}"
    assert [http.get(path).status_code for _ in range(4)] == [404, 404, 404, 200]
    provider.forget()
    assert http.get(path).status_code == 404


def test_a_held_answer_waits_until_it_is_let_go(provider, http):
    gate = threading.Event()
    provider.next("submit", held(gate))
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/videos", **form(**FOX), timeout=httpx.Timeout(10, read=0.01))
    asyncio.run(provider.until(lambda: provider.paid == 1))
    provider.next("submit", held(gate))
    gate.set()
    order(http)


def test_a_body_cut_short_looks_whole_where_its_length_was_not_told(provider, http):
    path = finished(http)
    provider.next("content", cut(100), cut(100, told=False), cut(9, reset=True), u.unsized(), u.drip(99, 0))
    with pytest.raises(httpx.RemoteProtocolError):
        http.get(path)
    assert http.get(path).content == tiny_video()[:100]
    with pytest.raises(httpx.ReadError):
        http.get(path)
    assert [http.get(path).content for _ in range(3)] == [tiny_video()] * 3


def test_a_result_may_be_a_page_or_a_bomb_or_somewhere_else(provider, http):
    path = finished(http)
    provider.next("content", u.html(), u.bomb(1 << 22), redirect("http://169.254.169.254/"), refuse(410))
    page = http.get(path)
    assert (page.headers["content-type"], page.content[:9]) == ("video/mp4", b"<!doctype")
    with http.stream("GET", path) as bomb:
        assert bomb.headers["content-encoding"] == "gzip"
        assert sum(map(len, bomb.iter_raw())) < 1 << 16
    elsewhere = http.get(path)
    assert (elsewhere.status_code, elsewhere.headers["location"]) == (302, "http://169.254.169.254/")
    assert http.get(path).status_code == 410


@pytest.mark.parametrize(("name", "shape", "place", "poll", "words"), [
    ("openai", "400 at submit", "/v1/videos", None, ["moderation_blocked"]),
    ("openai", "failed with code", "/v1/videos", "/v1/videos/video_1", ["failed", "moderation_blocked"]),
    ("replicate", "failed with text", "/v1/predictions", "/v1/predictions/prediction1", [u.FLAGGED]),
    ("kie", "code 501", "/api/v1/jobs/createTask", "/api/v1/jobs/recordInfo?taskId=task-1", ["fail", "501"]),
])
def test_what_is_unfit_is_said_in_each_providers_own_way(name, shape, place, poll, words):
    with Upstream() as provider, client_of(provider) as http:
        (u.FORMATS | MANUALS)[name](provider)
        provider.moderate(shape)
        answer = http.post(place, json=FOX | {"version": "v", "input": FOX})
        assert (answer.status_code == 400, provider.paid) == ((True, 0) if poll is None else (False, 1))
        text = http.get(poll).text if poll else answer.text
        assert all(json.dumps(word) in text for word in words), text


def test_a_large_result_is_a_video_that_is_never_held_whole(provider, http):
    provider.result = u.big_result(5_000_000)
    path, size = finished(http), 0
    with http.stream("GET", path) as answer:
        for chunk in answer.iter_raw():
            size += len(chunk)
    assert size == len(provider.result) == 5_000_000 == int(answer.headers["content-length"])
    assert max(map(len, provider.result)) < 1 << 17
    with av.open(io.BytesIO(b"".join(u.big_result(200_000)))) as video:
        assert len(list(video.decode(video=0))) == 4


@speaks("fal")
def test_an_expired_link_is_renewed_by_asking_again(provider):
    provider.on_job = lambda job: job.expire_links(410)
    with client_of(provider, "Key") as http:
        url = http.post("/fal-ai/kling", json=FOX).json()["response_url"]
        http.get(url + "/status")
        links = [http.get(url).json()["video"]["url"] for _ in range(2)]
    assert [get(link).status_code for link in links] == [410, 200]


def test_providers_stopped_and_started_again_keep_their_address(provider, http):
    id = order(http)
    provider.stop()
    with pytest.raises(httpx.ConnectError):
        http.get(f"/v1/videos/{id}")
    provider.start()
    assert http.get(f"/v1/videos/{id}").status_code == 200


@pytest.mark.parametrize(("how", "paths"), [
    (None, []), ("on time", ["/callbacks/s"]), ("early", ["/callbacks/s"]), ("twice", ["/callbacks/s"] * 2),
    ("forged", ["/callbacks/0"]),
])
@speaks("replicate")
def test_callbacks_come_as_they_are_told_to(provider, http, ear, how, paths):
    provider.callbacks, wish = how, {"version": "v", "input": FOX, "webhook": f"{ear.url}/callbacks/s"}
    assert http.post("/v1/predictions", json=wish).status_code == 201
    assert len(ear.requests) == (how == "early")
    http.get("/v1/predictions/prediction1")
    asyncio.run(provider.until(lambda: len(provider.delivered) == len(paths)))
    assert [request.path for request in ear.requests] == paths
    assert [status for _, status in provider.delivered] == [200] * len(paths)
    late = asyncio.run(provider.deliver(*provider.outbox))
    assert late == [200] and ear.requests[-1].json["status"] == "succeeded"


@speaks("replicate")
def test_callbacks_can_come_in_the_wrong_order(provider, http, ear):
    wish = {"version": "v", "input": FOX, "webhook": f"{ear.url}/callbacks/s"}
    provider.callbacks, provider.timeline = "reordered", ["running", "succeeded"]
    http.post("/v1/predictions", json=wish | {"webhook_events_filter": ["start", "completed"]})
    for _ in range(2):
        http.get("/v1/predictions/prediction1")
    asyncio.run(provider.until(lambda: len(provider.delivered) == 2))
    assert [request.json["status"] for request in ear.requests] == ["succeeded", "processing"]


def test_signatures_are_those_of_the_manuals():
    body = (b'{"id":"evt_1","object":"event","type":"video.completed","created_at":1750000000,'
            b'"data":{"id":"video_abc"}}')
    signature = u.standard_signature(Upstream.secret, "evt_1", 1750000000, body)
    assert signature == "v1,IBH8zD/3aIMyMzAb1LxcKkvLqukeMIFfOjzbcrsiYMI="
    signature = u.kie_signature("kie-secret", "task_123", 1750000000)
    assert signature == "15Jwp2mVHDN+UzpRGtDCKWLOsnlrM4KD0CCg+iJmzHs="
    body = (b'{"request_id":"req-1","gateway_request_id":"req-1","status":"OK","payload":{"video":'
            b'{"url":"https://example.com/a.mp4"}}}')
    key = ECC.construct(curve="Ed25519", seed=bytes(range(32)))
    signature = u.fal_signature(key, "req-1", "user-1", 1750000000, body)
    assert signature.startswith("c9955078db59a0b67ee15104621043279d5c4258aaa19ad24b67dc343b51b0dd03561556")
    with Upstream("fal") as provider:
        provider.keys.append(key)
        keys = get(f"{provider.url}/.well-known/jwks.json").json()["keys"]
    assert keys[-1] == {"kty": "OKP", "crv": "Ed25519", "x": "A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg"}


def test_an_act_that_breaks_fails_the_test():
    with pytest.raises(AssertionError, match="KeyError"), Upstream() as provider:
        provider.route("poll", "GET", "/x", lambda request: request.query["absent"])
        assert get(f"{provider.url}/x").status_code == 500
