"""How it is told whether all is well: numbers, readiness, the log; and what ends by itself where it hangs."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import videofly as v
from conftest import Server, books_are_right, client_of, error_of, image_bytes, person, rows, work
from creem import signed
from test_billing import ask, buy
from test_billing import settings as shop_settings
from test_payments import body
from test_process import FOX as SMALL_FOX
from test_process import account, client_with, data_of, small

small = small  # a fixture
settings = shop_settings  # with packs and plans on sale
anyio_test = pytest.mark.anyio
FOX = {"model": "told", "prompt": "a red fox over snow"}  # 10 credits
DAY = 86400  # seconds
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def from_host(app, host, **headers):
    """A client at an address."""
    transport = httpx.ASGITransport(v.http(app), client=(host, 4711))
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


async def order(client, **wish):
    answer = await client.post("/api/v1/video/generate", json=FOX | wish)
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]["videoUuid"]


# --- numbers


async def text_of(client):
    answer = await client.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return answer.text


def families(text):
    found = [*text_string_to_metric_families(text)]
    assert len({family.name for family in found}) == len(found)
    return {family.name: family for family in found}


def samples(found, name):
    """The numbers of a family, by the values of its labels, in the order of their names."""
    return {told(sample): sample.value for sample in found[name].samples}


def told(sample):
    return tuple(text for _, text in sorted(sample.labels.items()))


async def number(client, name):
    (only,) = samples(families(await text_of(client)), name).values()
    return only


def let_fail(monkeypatch, name):
    async def job(app):
        raise OSError("no such luck")

    monkeypatch.setitem(v.JOBS, name, (v.JOBS[name][0], job))


@pytest.fixture
async def day(app, client, clock, provider, monkeypatch):
    """Ada signs up, subscribes, and orders three videos: one is made, one fails, one is being made.  Bob buys
    a pack, spends ten of it, and is paid back.  Of Eve's credits five expire.  A stranger pays for something.
    The books are audited, a backup is made, and one job has no luck."""
    sign_up = {"email": "ada@example.test", "password": "correct horse"}
    assert (await client.post("/api/auth/sign-up", json=sign_up)).status_code == 201
    await buy(client, "pro")
    ids = [await order(client)]
    await work(app)
    provider.script = ["ref", v.Snapshot("failed", error="no foxes today")]
    ids.append(await order(client))
    await work(app)
    bob = await person(app, "bob@example.test")
    eve = await person(app, "eve@example.test", credits=5, expires_at=app.now() + 1)
    async with client_of(app, **bob.headers) as other:
        await buy(other, "starter")
        ids.append(await order(other))
        await work(app)
        (payment,) = (await ask(other, "GET /api/v1/user/billing"))["payments"]
        await ask(other, "POST /api/v1/sandbox/act", act="refund", payment=payment["payment"], cents=1490)
    provider.script = ["ref", *[v.Snapshot("running", 10)] * 9]
    ids.append(await order(client))
    await work(app, for_s=1)
    sale = body("checkout.completed.onetime", id="evt_stranger", object__metadata=None,
                object__request_id=None)
    told = await client.post("/api/webhooks/creem", content=sale, headers=signed(sale, app.creem.secret))
    assert told.status_code == 200, told.text
    for name in ("expire-credits", "audit", "backup"):
        await v.run_job(app, name, at_once=True)
    let_fail(monkeypatch, "reconcile")
    await v.run_job(app, "reconcile", at_once=True)
    await books_are_right(app)
    return {"ids": ids, "people": [bob, eve]}


COUNTERS = """job_runs credits_granted credits_used credits_expired credits_refunded credits_released
              video_seconds provider_seconds"""
GAUGES = """videos provider_jobs credits_outstanding credits_frozen credits_owed payment_events job_failing
            job_success_timestamp_seconds rows database_bytes wal_bytes disk_free_bytes streams steps
            transactions_waiting"""
KINDS = {"counter": COUNTERS, "gauge": GAUGES, "histogram": "request_seconds step_seconds"}


@anyio_test
async def test_each_number_says_what_it_is(client, day):
    found = families(await text_of(client))
    for kind, names in KINDS.items():
        for name in names.split():
            family = found.pop(f"videofly_{name}")
            assert (family.type, bool(family.documentation), bool(family.samples)) == (kind, True, True), name
            if kind == "counter":
                assert {sample.name for sample in family.samples} == {f"videofly_{name}_total"}
    assert found.keys() <= {"videofly_request_seconds_created", "videofly_step_seconds_created"}


@anyio_test
async def test_the_numbers_are_those_of_the_day(client, app, day, clock):
    found = families(await text_of(client))
    assert samples(found, "videofly_videos") == {
        ("told", "scripted", "COMPLETED"): 2, ("told", "scripted", "FAILED"): 1,
        ("told", "scripted", "GENERATING"): 1}
    assert found["videofly_videos"].samples[0].labels.keys() == {"model", "provider", "status"}
    assert samples(found, "videofly_provider_jobs") == {
        ("scripted", "succeeded"): 2, ("scripted", "failed"): 1, ("scripted", "running"): 1}
    assert samples(found, "videofly_credits_granted") == {
        ("NEW_USER",): 10, ("SUBSCRIPTION",): 960, ("ORDER_PAY",): 280, ("SYSTEM_ADJUST",): 5}
    of_credits = {"used": 20, "expired": 5, "refunded": 270, "released": 10, "owed": 10, "frozen": 10,
                  "outstanding": 960}
    for word, credits in of_credits.items():
        assert samples(found, f"videofly_credits_{word}") == {(): credits}, word
    states = await rows(app, "SELECT state, count(*) FROM payment_events GROUP BY state")
    assert dict(states)["attention"] == 1
    assert samples(found, "videofly_payment_events") == {
        ("applied",): dict(states)["applied"], ("attention",): 1, ("ignored",): 0}
    ran = ["audit", "backup", "expire-credits", "reconcile"]
    assert samples(found, "videofly_job_runs") == {(name,): 1 for name in ran}
    assert samples(found, "videofly_job_failing") == {(name,): name == "reconcile" for name in ran}
    assert samples(found, "videofly_job_success_timestamp_seconds") == {(name,): clock.t for name in ran[:3]}
    for (table,), rows_said in samples(found, "videofly_rows").items():
        assert rows_said == len(await rows(app, f"SELECT 1 FROM {table}")) > 0, table
    assert samples(found, "videofly_steps") == samples(found, "videofly_streams") == {(): 0}
    file = Path(app.settings.data) / "videofly.db"
    assert samples(found, "videofly_database_bytes") == {(): file.stat().st_size}


@anyio_test
async def test_time_is_told_by_model_and_provider(client, app, day):
    ((made,),) = await rows(app, """SELECT sum(finished_at - created_at) FROM videos
                                    WHERE status = 'COMPLETED'""")
    ((had,),) = await rows(app, """SELECT sum(ended_at - taken_at) FROM provider_jobs
                                   WHERE state = 'succeeded'""")
    found = families(await text_of(client))
    assert samples(found, "videofly_video_seconds") == {("told", "scripted"): made / 1000}
    assert samples(found, "videofly_provider_seconds") == {("scripted",): had / 1000}
    steps = {told(sample): sample.value for sample in found["videofly_step_seconds"].samples
             if sample.name.endswith("_count")}
    assert steps["scripted", "PENDING"] == 4 and steps["scripted", "UPLOADING"] == 2


@anyio_test
async def test_there_are_numbers_where_nothing_happened_yet(client):
    found = families(await text_of(client))
    for name in ("credits_used", "credits_expired", "credits_refunded", "credits_released", "credits_owed",
                 "credits_frozen", "credits_outstanding"):
        assert samples(found, f"videofly_{name}") == {(): 0}
    assert set(samples(found, "videofly_payment_events").values()) == {0}


@anyio_test
async def test_there_are_numbers_at_every_moment_of_the_first_video(client, app, ada, provider):
    await order(client)
    seen, ends = set(), time.monotonic() + 20
    while "COMPLETED" not in seen and time.monotonic() < ends:
        await v.begin_steps(app)
        await asyncio.gather(*app.working.values())
        found = families(await text_of(client))
        seen |= {status for *_, status in samples(found, "videofly_videos")}
        app.clock.pass_s(1)
    assert seen == {"GENERATING", "UPLOADING", "COMPLETED"}


@anyio_test
async def test_what_only_grows_never_shrinks(client, app, day):
    def counters(text):
        return {(sample.name, *told(sample)): sample.value for family in families(text).values()
                if family.type == "counter" for sample in family.samples}

    before = counters(await text_of(client))
    await client.delete(f"/api/v1/video/{day['ids'][0]}")
    await work(app, for_s=20)
    for days in (400, 2):  # what is being made ends, and so does the day that its credits have left
        app.clock.pass_s(days * DAY)
        await work(app, for_s=1)
    for name in ("expire-credits", "cleanup-videos", "prune"):
        await v.run_job(app, name, at_once=True)
    after = counters(await text_of(client))
    assert {name for name, value in before.items() if after[name] < value} == set()
    assert after["videofly_credits_expired_total",] > before["videofly_credits_expired_total",]


ASKED = ["/", "/up", "/docs", "/openapi.json", "/api/v1/config/models", "/api/v1/video/{id}",
         "/api/v1/video/{id}/status", "/api/v1/video/ada@example.test", "/nothing/{id}", "/ada@example.test",
         "/media/videos/{id}/1.mp4?until=1&signature=x", "/docs/swagger/ada@example.test",
         v.STATIC_PATH + "/{id}.js", "/api/v1/admin/reports/{id}", "/api/cron/{id}",
         "/api/v1/video/callback/{id}?job={id}&token=ada@example.test", "//{id}", "/{id}/"]


@anyio_test
async def test_requests_are_counted_by_what_they_ask_for_and_not_by_whom(client, app, day):
    before = families(await text_of(client))["videofly_request_seconds"].samples
    for path in ASKED * 2:
        await client.get(path.format(id=day["ids"][0]))
    await client.request("ADA", "/up")
    after = families(await text_of(client))["videofly_request_seconds"].samples
    counted = Counter()
    for sign, part in ((-1, before), (1, after)):
        for sample in part:
            assert {*sample.labels} >= {"method", "path", "status"}
            if sample.name.endswith("_count"):
                counted[sample.labels["path"], sample.labels["status"]] += sign * int(sample.value)
    assert counted["/up", "200"] == counted["/api/v1/video/{uuid}/status", "200"] == 2
    assert counted["/api/v1/video/{uuid}", "200"] == counted["/api/v1/video/{uuid}", "404"] == 2
    assert counted["/metrics", "200"] == 1
    assert sum(counted.values()) == 2 * len(ASKED) + 2
    known = {path for path, _ in counted}
    assert not [path for path in known if "@" in path or UUID.search(path)], known


@anyio_test
async def test_nothing_personal_is_among_the_numbers(client, app, day):
    for path in ASKED:
        await client.get(path.format(id=day["ids"][0]))
    text = await text_of(client)
    hidden = ["@", "correct horse", "fox", "vf_", "usr_", "key_", "evt_", "chk_", app.secret,
              *day["ids"], *(each.key for each in day["people"])]
    assert [word for word in hidden if word in text] == [] and not UUID.search(text)
    assert set(re.findall(r'([a-z_]+)="', text)) <= {
        "method", "path", "status", "provider", "model", "le", "state", "trans_type", "name", "table"}


@pytest.mark.parametrize("host, status", [
    ("127.0.0.1", 200), ("127.8.9.10", 200), ("::1", 200), ("203.0.113.5", 401), ("10.0.0.1", 401),
    ("2001:db8::1", 401), ("localhost", 401), ("unknown", 401), ("", 401),
])
@anyio_test
async def test_without_a_token_this_machine_alone_sees_numbers(app, host, status):
    async with from_host(app, host) as client:
        answer = await client.get("/metrics")
    assert answer.status_code == status and (status == 200 or error_of(answer) == (401, "E4010"))


@anyio_test
async def test_with_a_token_whoever_has_it_sees_numbers_and_nobody_else(settings, clock):
    token = "what only Prometheus knows é"
    settings = v.msgspec.structs.replace(settings, metrics_token=token)
    async with v.open_app(settings, clock=clock, providers={"scripted": None}) as app:
        for host in ("127.0.0.1", "203.0.113.5", "unknown"):
            async with from_host(app, host) as client:
                right = f"Bearer {token}".encode("latin-1")
                assert (await client.get("/metrics", headers={"Authorization": right})).status_code == 200
                for wrong in (b"", b"Bearer", b"Bearer ", right[7:], right[:-1], right + b"x", right.upper(),
                              b"Basic " + right[7:]):
                    assert error_of(await client.get("/metrics", headers={"Authorization": wrong})) == (
                        401, "E4010"), wrong


def test_whom_a_proxy_speaks_for_sees_no_numbers(small):
    small.start()
    for sent, status in (({}, 200), ({"X-Forwarded-For": "203.0.113.5"}, 401),
                         ({"X-Forwarded-For": "127.0.0.1, 203.0.113.5"}, 401),
                         ({"X-Forwarded-For": "unknown"}, 401)):
        answer = httpx.get(small.url + "/metrics", headers=sent, trust_env=False)
        assert answer.status_code == status, sent
    assert small.stop() == 0


# --- readiness


async def readiness(client):
    """Nothing when it is ready; else the reason."""
    answer = await client.get("/readyz")
    if answer.status_code == 200:
        assert answer.json() == {"status": "ready"}
        return ""
    assert error_of(answer) == (503, "E5006") and answer.headers["retry-after"] == "1"
    return answer.json()["error"]["message"]


async def is_up(client):
    answers = [await client.get(path) for path in ("/up", "/healthz")]
    assert {answer.status_code for answer in answers} <= {200, 503}
    return {answer.status_code for answer in answers} == {200}


def set_disk_low(app, mb):
    app.settings = v.msgspec.structs.replace(app.settings, disk_low_mb=mb)


def grow(db):
    v.run(db, "UPDATE users SET password_hash = :long", long="x" * 3_000_000)


def shift(db, *, by):
    """Credits that nothing in the journal speaks of."""
    v.run(db, "UPDATE credit_packages SET remaining = remaining - :by, used = used + :by", by=by)


async def run_all(app, *names):
    for name in names or ("audit", "backup"):
        await v.run_job(app, name, at_once=True)


@contextlib.asynccontextmanager
async def no_room(app, client):
    set_disk_low(app, 1 << 40)
    yield "disk: [0-9]+ MiB free."
    set_disk_low(app, 0)


@contextlib.asynccontextmanager
async def long_log(app, client):
    await app.db.write(grow)
    yield "wal: [23] MiB."
    await app.db.tidy(v.CHECKPOINT)


@contextlib.asynccontextmanager
async def wrong_books(app, client):
    await app.db.write(shift, by=7)
    await run_all(app, "audit")
    yield "last audit: package 1 does not add up."
    await app.db.write(shift, by=-7)
    assert await readiness(client)  # until somebody has looked
    await run_all(app, "audit")


@contextlib.asynccontextmanager
async def no_backup(app, client):
    folder = Path(app.settings.data) / "backups"
    folder.write_text("somebody's notes")
    await run_all(app, "backup")
    yield "last backup: .*File exists.*"
    folder.unlink()
    await run_all(app, "backup")


@contextlib.asynccontextmanager
async def old_audit(app, client):
    await run_all(app)
    app.clock.pass_s(2 * DAY - 0.001)
    assert await readiness(client) == ""
    await run_all(app, "backup")
    app.clock.pass_s(0.001)
    yield "last audit: 2027-01-15 08:00:00[+]00:00."
    await run_all(app, "audit")


@contextlib.asynccontextmanager
async def old_backup(app, client):
    await run_all(app)
    app.clock.pass_s(3 * DAY)
    await run_all(app, "audit")
    yield "last backup: 2027-01-15 08:00:00[+]00:00."
    await run_all(app, "backup")


@contextlib.asynccontextmanager
async def stuck_writer(app, client):
    go_on = threading.Event()
    hanging = asyncio.create_task(app.db._writer.run(lambda db: go_on.wait(30)))
    yield "writer: [0-9]+ transactions wait."
    go_on.set()
    await hanging


@contextlib.asynccontextmanager
async def stopping(app, client):
    app.stopping.set()
    yield "The server is stopping."
    app.stopping.clear()


CAUSES = [no_room, long_log, wrong_books, no_backup, old_audit, old_backup, stuck_writer, stopping]


@pytest.mark.parametrize("cause", CAUSES)
@anyio_test
async def test_each_cause_makes_it_unready_and_up_and_both_end(app, client, ada, monkeypatch, cause):
    monkeypatch.setattr(v, "WAL_MAX_MB", 1)
    monkeypatch.setattr(v, "PATIENCE_S", 0.1)
    assert (await readiness(client), await is_up(client)) == ("", True)
    async with cause(app, client) as reason:
        assert re.fullmatch(reason, said := await readiness(client)), said
        assert await is_up(client)
    assert (await readiness(client), await is_up(client)) == ("", True)


@anyio_test
async def test_a_worker_that_does_not_look_for_work_is_neither_ready_nor_up(app, client):
    app.beat_s = time.monotonic() - v.STALLED_S + 5
    assert (await readiness(client), await is_up(client)) == ("", True)
    app.beat_s = time.monotonic() - v.STALLED_S
    said = await readiness(client)
    assert re.fullmatch(r"worker: looked for work 12\d seconds ago\.", said), said
    assert not await is_up(client)
    async with v.working(app):
        async with asyncio.timeout(10):
            while await readiness(client):
                await asyncio.sleep(0.01)
        assert await is_up(client)


@anyio_test
async def test_every_reason_is_named(app, client):
    app.beat_s = -1e6
    set_disk_low(app, 1 << 40)
    said = await readiness(client)
    assert "worker: " in said and "disk: " in said and "wal: " not in said


@anyio_test
async def test_a_writer_that_cannot_write_is_not_ready(app, client):
    writer, app.db._writer = app.db._writer, v.Thread(lambda: None, 64)
    answer = await client.get("/readyz")
    assert (answer.status_code, await is_up(client)) == (500, True) and error_of(answer)[1] == "E5007"
    app.db._writer = writer
    assert await readiness(client) == ""


# --- a disk that is almost full


@anyio_test
async def test_on_an_almost_full_disk_nothing_new_begins_and_what_runs_comes_to_its_end(
        app, client, day, provider):
    unwanted = await order(client)
    set_disk_low(app, 1 << 40)
    tables = ["videos", "credit_holds", "credit_transactions", "idempotency_keys", "events"]
    before = [await rows(app, f"SELECT * FROM {name}") for name in tables]
    for key in ("one", "two"):
        answer = await client.post("/api/v1/video/generate", json=FOX, headers={"Idempotency-Key": key})
        assert error_of(answer) == (507, "E5005") and "almost full" in answer.text
    assert [await rows(app, f"SELECT * FROM {name}") for name in tables] == before
    provider.script = []
    assert (await client.post(f"/api/v1/video/{unwanted}/cancel")).status_code == 200
    await work(app, for_s=30)
    found = await rows(app, "SELECT status, count(*) FROM videos GROUP BY status")
    assert found == [("COMPLETED", 3), ("FAILED", 2)]
    holds = await rows(app, "SELECT state, count(*) FROM credit_holds GROUP BY state")
    assert holds == [("released", 2), ("settled", 3)]
    (payment,) = (await ask(client, "GET /api/v1/user/billing"))["payments"]
    await ask(client, "POST /api/v1/sandbox/act", act="refund", payment=payment["payment"], cents=100)
    assert len(await rows(app, "SELECT 1 FROM credit_transactions WHERE kind = 'refund'")) == 2
    sale = body("checkout.completed.onetime", id="evt_late", object__request_id=None)
    heard = await client.post("/api/webhooks/creem", content=sale, headers=signed(sale, app.creem.secret))
    assert heard.status_code == 200
    assert len(await rows(app, "SELECT 1 FROM payment_events WHERE delivery_key = 'evt_late'")) == 1
    set_disk_low(app, 0)
    answer = await client.post("/api/v1/video/generate", json=FOX, headers={"Idempotency-Key": "one"})
    assert answer.status_code == 201 and "idempotent-replayed" not in answer.headers
    await books_are_right(app)


# --- the log


def lines_of(server):
    """What it logged as JSON; what it says to people at its start is none."""
    text = (server.data.parent / f"{server.data.name}.log").read_text()
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


REQUEST = re.compile(r"([A-Z]+) (\S+) (\d{3}) in \d+\.\d ms")


def test_each_request_is_one_line_with_the_id_that_the_answer_carries(small):
    small.start()
    asked = []
    with client_with(small, "vf_wrong") as client:
        for method, path in [("GET", "/up"), ("GET", "/nothing?secret=s3cret"), ("POST", "/api/auth/sign-in"),
                             ("GET", "/api/v1/video/list?cursor=x"), ("HEAD", "/"), ("DELETE", "/up")]:
            asked.append((method, path.partition("?")[0], client.request(method, path)))
    assert small.stop() == 0
    lines = lines_of(small)
    for method, path, answer in asked:
        id = answer.headers["x-request-id"]
        (line,) = [line for line in lines if line.get("requestId") == id]
        assert REQUEST.fullmatch(line["message"]).groups() == (method, path, str(answer.status_code))
        assert (line["levelname"], line["name"]) == ("INFO", "videofly") and line["asctime"]
    assert len({answer.headers["x-request-id"] for *_, answer in asked}) == len(asked)


@pytest.mark.parametrize("sent, kept", [
    (b"0123abcd", True), (b"a.b-c_D.e-f", True), (b"x" * 100, True), (b"x" * 101, False), (b"short", False),
    (b"", False), (b"with a space", False), (b"{\"level\":\"x\"}", False), ("é".encode("latin-1") * 9, False),
    ("é".encode() * 9, False), (b"semi;colon;", False),
])
@anyio_test
async def test_an_id_that_is_one_is_kept_and_another_replaced(client, caplog, sent, kept):
    caplog.set_level("INFO", "videofly")
    answer = await client.get("/up", headers={"X-Request-Id": sent})
    (id,) = [text for name, text in answer.headers.raw if name.lower() == b"x-request-id"]
    assert (id == sent) is kept
    assert kept or re.fullmatch(rb"req_[0-9a-f]{20}", id)


def test_nothing_that_is_secret_is_in_the_log_after_a_day(small):
    small.environ |= {"VIDEOFLY_METRICS_TOKEN": "token-of-prometheus", "CRON_SECRET": "secret-of-cron",
                      "CREEM_WEBHOOK_SECRET": "secret-of-creem"}
    small.start()
    hidden = ["token-of-prometheus", "secret-of-cron", "secret-of-creem", "password-of-bob", "wrong-password",
              "prompt-of-ada", "query-of-ada", "bob@example.test", "mira@example.test", "key-of-nobody"]
    with account(small) as ada, httpx.Client(base_url=small.url, trust_env=False) as bob:
        hidden.append(ada.headers["Authorization"].removeprefix("Bearer "))
        known = {"email": "bob@example.test", "password": "password-of-bob"}
        assert bob.post("/api/auth/sign-up", json=known).status_code == 201
        assert bob.post("/api/auth/sign-in", json=known | {"password": "wrong-password"}).status_code == 401
        hidden += bob.cookies.values()
        assert bob.post("/api/auth/sign-in", json=known).status_code == 200
        hidden += bob.cookies.values()
        wish = SMALL_FOX | {"prompt": "prompt-of-ada"}
        made = data_of(ada.post("/api/v1/video/generate", json=wish, headers={"Prefer": "wait=30"}))
        assert ada.post("/api/v1/video/generate", json=wish | {"model": "prompt-of-ada"}).status_code == 400
        link = httpx.URL(made["videoUrl"])
        hidden.append(link.params["signature"])
        assert bob.get(link).status_code == 200
        assert bob.get(link.copy_set_param("until", "1")).status_code == 403
        data_of(ada.post("/api/v1/upload", files={"file": ("a.png", image_bytes())}))
        assert ada.get("/api/v1/video/list?status=query-of-ada").status_code == 400
        assert ada.get("/nothing?x=query-of-ada").status_code == 404
        assert bob.post("/api/v1/video/callback/fal?job=1&token=query-of-ada").status_code == 401
        for sent in ("Bearer key-of-nobody", "Bearer token-of-prometheus"):
            bob.get("/metrics", headers={"Authorization": sent})
        assert bob.get("/api/cron/expire-credits", headers={"Authorization": "Bearer secret-of-cron"}
                       ).status_code == 200
        sale = body("checkout.completed.onetime")
        for secret, status in (("secret-of-creem", 200), ("other", 401)):
            answer = bob.post("/api/webhooks/creem", content=sale, headers=signed(sale, secret))
            assert answer.status_code == status
        key = data_of(bob.post("/api/v1/keys", json={"name": "mine"}))["apiKey"]
        hidden.append(key)
    assert small.stop() == 0
    secret = (small.data / "secret").read_text()
    hidden += [secret, v.operator_token(secret)]
    lines = lines_of(small)
    assert len(lines) > 15
    assert [word for word in hidden if word in json.dumps(lines)] == []
    assert not any("?" in line["message"] for line in lines)
    assert {line["levelname"] for line in lines} == {"INFO"}


def test_in_text_the_log_is_plain_lines_that_nobody_else_can_write(small):
    small.environ |= {"VIDEOFLY_LOG": "text"}
    small.start()
    answer = httpx.get(small.url + "/up", headers={"X-Request-Id": "my-request"}, trust_env=False)
    httpx.get(small.url + "/x%0A2027-01-01 ERROR forged", trust_env=False)
    assert answer.status_code == 200 and small.stop() == 0
    text = (small.data.parent / f"{small.data.name}.log").read_text()
    (line,) = [line for line in text.splitlines() if "my-request" in line]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:,]+ INFO videofly GET /up 200 in \d+\.\d ms my-request", line)
    assert [line for line in text.splitlines() if line.startswith(("{", "2027-01-01"))] == []


# --- where it hangs


SCRIPT = """
import asyncio, sys, time
import videofly as v

v.STALLED_S, v.LONGEST_PAUSE_S = 1.5, 0.2
add_job = v.AsyncIOScheduler.add_job

def add_job_that_comes_oftener(scheduler, fn, *args, **how):
    return add_job(scheduler, fn, *args, **how | ({"seconds": 0.2} if fn is v.watch else {}))

v.AsyncIOScheduler.add_job = add_job_that_comes_oftener

def hang(*_):
    time.sleep(60)

async def hang_quietly(*_):
    await asyncio.sleep(60)

async def main(how):
    settings = v.Settings(data=sys.argv[1])
    async with v.open_app(settings) as app, v.working(app):
        await asyncio.sleep(2.5)
        print("well", flush=True)
        if how == "loop":
            hang()
        elif how == "writer":
            await app.db._writer.run(hang)
        elif how == "worker":
            v.begin_steps = hang_quietly
            await hang_quietly()
    await asyncio.sleep(2.5)
    print("ended", flush=True)

asyncio.run(main(sys.argv[2]))
"""


@anyio_test
async def test_to_be_stopped_while_it_looks_whether_all_is_well_is_no_error(app, caplog):
    go_on = threading.Event()
    async with v.working(app):
        hanging = asyncio.create_task(app.db._writer.run(lambda db: go_on.wait(30)))
        async with asyncio.timeout(10):
            while not app.db._committing or app.db._committing.done():
                await asyncio.sleep(0.01)
    go_on.set()
    await hanging
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


def left_alone(folder, how):
    """(exit code, what it printed, what it said of its end)"""
    command = [sys.executable, "-c", SCRIPT, str(folder / how), how]
    done = subprocess.run(command, cwd=v.HERE, env=Server(folder).environ, capture_output=True, text=True,
                          timeout=60)
    return done.returncode, done.stdout.split(), done.stderr


def test_what_hangs_ends_by_itself_and_says_where(tmp_path):
    with ThreadPoolExecutor() as pool:
        began = {how: pool.submit(left_alone, tmp_path, how)
                 for how in ("loop", "writer", "worker", "nothing")}
    for how in ("loop", "writer", "worker"):
        code, printed, said = began[how].result()
        assert (code, printed) == (1, ["well"]) and "Timeout (0:00:01.5" in said, (how, said)
        assert (" in hang\n" in said) is (how != "worker")
    assert began["nothing"].result() == (0, ["well", "ended"], "")
