"""What is done by itself: when, how often, and what of it operators see and can ask for."""

import asyncio
import base64
import csv
import io
import random
import re
import statistics
import time
from collections import Counter
from itertools import pairwise

import pytest

import videofly as v
from conftest import books_are_right, client_of, error_of, person, rows, work

pytestmark = pytest.mark.anyio
MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds, as the tests' clock counts
TIMES = {  # of each job: how often, and how long after the epoch for the first time; that was a Thursday
    "expire-credits": (DAY, 2 * HOUR),
    "reconcile": (DAY, 2 * HOUR + 30 * MINUTE),
    "cleanup-videos": (7 * DAY, 3 * DAY + 3 * HOUR),
    "backup": (DAY, 3 * HOUR + 15 * MINUTE),
    "audit": (DAY, 4 * HOUR),
    "media": (DAY, 4 * HOUR + 30 * MINUTE),
    "tidy": (DAY, 4 * HOUR + 45 * MINUTE),
    "release-holds": (HOUR, 20 * MINUTE),
    "prune": (10 * MINUTE, 0),
}
DAILY = [name for name, (every, _) in TIMES.items() if every == DAY]
FOX = {"model": "told", "prompt": "a red fox over snow"}  # 10 credits


@pytest.fixture
def open_app(settings, clock, provider):
    """Open it once more, with other settings if wanted: a restart."""
    return lambda **changes: v.open_app(
        v.msgspec.structs.replace(settings, **changes), clock=clock, providers={"scripted": provider})


@pytest.fixture
def diary(monkeypatch, clock):
    """Which job ran when; nothing else comes of it."""
    ran = []
    for name in v.JOBS:
        replace(monkeypatch, name, lambda name=name: ran.append((name, clock.t)))
    return ran


def replace(monkeypatch, name, act):
    """Let a job do something else: a function, which may return what is to be awaited."""
    async def job(app):
        if (waits := act()) is not None:
            await waits
        return {}

    monkeypatch.setitem(v.JOBS, name, (v.JOBS[name][0], job))


def passed(name, t):
    """How many of a job's times there have been."""
    every, first = TIMES[name]
    return (t - first) // every


def expected(looks):
    """What runs when somebody looks at these moments: first all, then what had a time since the look before;
    or has one again, because the clock went back behind it."""
    found = [(name, looks[0]) for name in TIMES]
    for before, now in pairwise(looks):
        found += [(name, now) for name in TIMES if passed(name, before) != passed(name, now)]
    return found


async def jobs(app):
    return {job["name"]: job for job in (await app.db.read(v.list_jobs))["jobs"]}


async def ran(app, name):
    """What came of a job that is run now."""
    return await v.run_job(app, name, at_once=True)


# --- when


@pytest.mark.parametrize(("days", "step", "often"), [
    (365, 12 * HOUR, {"prune": 731, "release-holds": 731, "cleanup-videos": 53} | dict.fromkeys(DAILY, 366)),
    (8, 10 * MINUTE, {"prune": 1153, "release-holds": 193, "cleanup-videos": 2} | dict.fromkeys(DAILY, 9)),
])
async def test_each_job_runs_as_often_as_its_crontab_says(app, clock, diary, days, step, often):
    looks = []
    for _ in range(days * DAY // step + 1):
        await v.run_due_jobs(app)
        looks.append(clock.t)
        clock.pass_s(step)
    assert diary == expected(looks)
    assert Counter(name for name, _ in diary) == often
    assert {name: job["runs"] for name, job in (await jobs(app)).items()} == often


async def test_what_was_missed_is_made_up_for_once_however_the_clock_jumps(open_app, clock, diary):
    chance, looks, end = random.Random(7), [], clock.t + 365 * DAY
    while clock.t < end:
        async with open_app() as app:
            for _ in range(chance.randrange(1, 60)):
                await v.run_due_jobs(app)
                looks.append(clock.t)
                clock.pass_s(chance.choice([10 * MINUTE] * 4 + [7 * HOUR, 41 * MINUTE, -HOUR, DAY]))
        clock.pass_s(chance.randrange(400) * HOUR)
    assert diary == expected(looks)
    assert min(b - a for a, b in pairwise(looks)) == -HOUR and len(looks) > 400


async def test_looking_every_minute_does_nothing_more(app, clock, diary):
    clock.pass_s(30)
    for _ in range(120):
        await v.run_due_jobs(app)
        clock.pass_s(MINUTE)
    assert Counter(name for name, _ in diary) == dict.fromkeys(TIMES, 1) | {"prune": 12, "release-holds": 3}


async def test_a_server_that_starts_does_at_once_what_is_due(app):
    async with v.working(app):
        async with asyncio.timeout(5):
            found = {}
            while sum(job["runs"] for job in found.values()) < len(TIMES):
                await asyncio.sleep(0.01)
                found = await jobs(app)
    results = {name: job["result"] for name, job in found.items()}
    assert results.pop("backup")["transactions"] == results.pop("audit")["transactions"] == 0
    assert results == {
        "cleanup-videos": {"archivedCompleted": 0, "deletedFailed": 0},
        "expire-credits": {"expiredPackages": 0}, "prune": {}, "tidy": {}, "release-holds": {"holds": 0},
        "media": {"files": 0, "missing": [], "removed": 0, "unknown": 0},
        "reconcile": {"heard": 0, "unknownProducts": []}}


# --- once at a time


async def test_of_those_who_run_a_job_at_the_same_time_one_does(app, monkeypatch):
    begun = []
    replace(monkeypatch, "audit", lambda: begun.append(1) or asyncio.sleep(0.05))
    found = await asyncio.gather(*(v.run_job(app, "audit", at_once=n > 0) for n in range(5)))
    assert (found.count(None), found.count({}), len(begun)) == (4, 1, 1)


async def test_nothing_runs_twice_at_once(app, clock, diary, monkeypatch):
    begun, go_on = asyncio.Event(), asyncio.Event()
    replace(monkeypatch, "audit", lambda: begun.set() or go_on.wait())
    first = asyncio.create_task(ran(app, "audit"))
    await asyncio.wait_for(begun.wait(), 5)
    clock.pass_s(9 * MINUTE)
    await asyncio.wait_for(v.run_due_jobs(app), 5)
    assert {name for name, _ in diary} == TIMES.keys() - {"audit"}
    assert await ran(app, "audit") is None
    go_on.set()
    assert (await first, await ran(app, "audit")) == ({}, {})


async def test_a_job_that_raises_stops_no_other_and_is_tried_again_after_ten_minutes(
        app, clock, diary, monkeypatch):
    def fails():
        diary.append(("expire-credits", clock.t))
        if len(diary) <= len(TIMES) + 1:
            raise OSError("the disk is gone")

    replace(monkeypatch, "expire-credits", fails)
    await v.run_due_jobs(app)
    assert [name for name, _ in diary] == list(TIMES)
    failed = (await jobs(app))["expire-credits"]
    assert (failed["result"], failed["runs"]) == ({"error": "the disk is gone"}, 1)
    assert failed["succeededAt"] is None and failed["beganAt"] is not None
    clock.pass_s(10 * MINUTE - 1)
    await v.run_due_jobs(app)
    assert len(diary) == len(TIMES)
    clock.pass_s(1)
    await v.run_due_jobs(app)
    assert [name for name, _ in diary[len(TIMES):]] == ["expire-credits", "prune"]
    clock.pass_s(10 * MINUTE)
    await v.run_due_jobs(app)
    well = (await jobs(app))["expire-credits"]
    assert (well["result"], well["runs"], well["succeededAt"]) == ({}, 3, v.moment(app.now()))
    assert well["dueAt"].hour == 2


@pytest.mark.parametrize("name", TIMES)
async def test_what_keeps_failing_is_tried_every_ten_minutes_and_no_oftener(
        app, clock, diary, monkeypatch, name):
    def fails():
        diary.append((name, clock.t))
        raise ValueError

    replace(monkeypatch, name, fails)
    clock.pass_s(30)
    for _ in range(45):
        await v.run_due_jobs(app)
        clock.pass_s(MINUTE)
    times = [t for each, t in diary if each == name]
    assert [later - sooner for sooner, later in pairwise(times)] == [10 * MINUTE] * 4
    assert (await jobs(app))[name]["result"] == {"error": "ValueError"}


async def test_a_job_whose_process_died_is_taken_again_after_its_lease(open_app, clock, diary, monkeypatch):
    begun = asyncio.Event()
    with monkeypatch.context() as until_then:
        replace(until_then, "expire-credits", lambda: begun.set() or asyncio.Event().wait())
        async with open_app() as app:
            task = asyncio.create_task(v.run_due_jobs(app))
            await asyncio.wait_for(begun.wait(), 5)
            task.cancel()
            await task
    async with open_app() as app:
        clock.pass_s(10 * MINUTE - 1)
        await v.run_due_jobs(app)
        assert {name for name, _ in diary} == TIMES.keys() - {"expire-credits"}
        assert await ran(app, "expire-credits") is None
        clock.pass_s(2)
        await v.run_due_jobs(app)
        assert ("expire-credits", clock.t) in diary


@pytest.mark.parametrize("ahead", [11 * MINUTE, HOUR, 400 * DAY])
async def test_a_lease_from_a_clock_that_was_ahead_blocks_nobody(app, clock, diary, ahead):
    await v.run_due_jobs(app)
    clock.t = (await jobs(app))["audit"]["dueAt"].timestamp() + ahead
    assert await app.write(v.claim_job, name="audit", next_at=app.now() + DAY * 1000, at_once=False)
    clock.pass_s(-ahead)
    await v.run_due_jobs(app)
    assert diary.count(("audit", clock.t)) == 1


async def test_a_job_run_by_hand_takes_nothing_from_its_time(app, clock, diary):
    await v.run_due_jobs(app)
    due = (await jobs(app))["audit"]["dueAt"]
    for _ in range(3):
        clock.pass_s(1)
        assert await ran(app, "audit") == {}
    assert ((await jobs(app))["audit"]["dueAt"], due.isoformat()) == (due, "2027-01-16T04:00:00+00:00")


# --- expiry


async def balance(client):
    found = (await client.get("/api/v1/credit/balance")).json()["data"]
    return found["availableCredits"], found["frozenCredits"]


async def order(client, **wish):
    answer = await client.post("/api/v1/video/generate", json=FOX | wish)
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]["videoUuid"]


def packages(db, *, user_id, how_many, expires_at, now):
    """So many packages of seven credits."""
    for n in range(how_many):
        v.grant(db, user_id=user_id, credits=7, trans_type="SYSTEM_ADJUST", source_ref=f"{expires_at}:{n}",
                note="", expires_at=expires_at, now=now)


async def test_credits_expire_at_their_date_and_others_never(app, client, ada, clock):
    date = app.now() + 5 * DAY * 1000
    await app.write(packages, user_id=ada.id, how_many=3, expires_at=date)
    clock.pass_s(5 * DAY - 0.001)
    assert await ran(app, "expire-credits") == {"expiredPackages": 0}
    clock.t = date / 1000
    assert await ran(app, "expire-credits") == {"expiredPackages": 3}
    assert await ran(app, "expire-credits") == {"expiredPackages": 0}
    assert await balance(client) == (100, 0)
    assert await rows(app, "SELECT DISTINCT remaining, expired FROM credit_packages") == [(100, 0), (0, 7)]
    await books_are_right(app)


async def test_frozen_credits_never_expire_and_what_lies_beside_them_waits(app, client, clock, provider):
    eve = await person(app, "eve@example.com", credits=25, expires_at=app.now() + DAY * 1000)
    client.headers.update(eve.headers)
    provider.script = ["ref", v.Snapshot("running")]
    await order(client)
    await work(app, for_s=2)
    clock.pass_s(400 * DAY)
    assert await ran(app, "expire-credits") == {"expiredPackages": 0}
    assert await balance(client) == (0, 10)
    await work(app, for_s=0)  # it was not made in time
    assert await balance(client) == (10, 0)
    clock.pass_s(DAY)
    assert await ran(app, "expire-credits") == {"expiredPackages": 1}
    await books_are_right(app)


async def test_credits_that_come_back_late_keep_their_day(app, client, clock):
    eve = await person(app, "eve@example.com", credits=10, expires_at=app.now() + DAY * 1000)
    client.headers.update(eve.headers)
    video = await order(client)
    clock.pass_s(3 * DAY)
    await client.post(f"/api/v1/video/{video}/cancel")
    clock.pass_s(DAY - 1)
    assert await ran(app, "expire-credits") == {"expiredPackages": 0}
    assert await balance(client) == (10, 0)
    clock.pass_s(1)
    assert await ran(app, "expire-credits") == {"expiredPackages": 1}
    assert await balance(client) == (0, 0)
    await books_are_right(app)


async def test_ten_thousand_packages_expire_while_others_write(app, ada, clock, monkeypatch):
    await app.write(packages, user_id=ada.id, how_many=10_000, expires_at=app.now() + 1)
    clock.pass_s(1)
    spent, others, write = [], [], app.db.write

    async def timed(fn, /, **words):
        began = time.perf_counter()
        answer = await write(fn, **words)
        (spent if fn is v.expire else others).append(time.perf_counter() - began)
        return answer

    async def somebody():
        while True:
            await timed(v.value, sql="SELECT 1")
            await asyncio.sleep(0.005)

    monkeypatch.setattr(app.db, "write", timed)
    somebody = asyncio.create_task(somebody())
    assert await ran(app, "expire-credits") == {"expiredPackages": 10_000}
    somebody.cancel()
    # The median, because another program may take the processor or the disk from any one of them.
    assert statistics.median(spent) < 0.05 and len(spent) > 10 and len(others) > 5
    assert await rows(app, "SELECT sum(remaining), sum(expired) FROM credit_packages") == [(100, 70_000)]
    await books_are_right(app)


# --- clean-up


@pytest.fixture
async def two(app, client, ada, provider):
    """Two videos that ended: one failed, the other did not."""
    provider.script = ["ref", v.Snapshot("failed", error="no foxes today")]
    failed = await order(client)
    await work(app)
    completed = await order(client)
    await work(app)
    return failed, completed


def files(app):
    return sorted(path.name for path in (app.storage.root / "videos").rglob("*.*"))


async def age(app, id, days):
    """Let so many days have passed since a video ended, of which its owner was told a week before."""
    ((at,),) = await rows(app, "SELECT finished_at FROM videos WHERE id = :id", id=id)
    app.clock.t = at / 1000 + (days - 7) * DAY
    await ran(app, "prune")
    app.clock.t = at / 1000 + days * DAY


async def taken_away(app):
    found = await ran(app, "cleanup-videos")
    return found["deletedFailed"], found["archivedCompleted"]


async def not_deleted(app):
    return {id for (id,) in await rows(app, "SELECT id FROM videos WHERE deleted_at IS NULL")}


async def test_a_failed_video_is_kept_30_days_a_completed_one_90_and_not_a_minute_less(app, two):
    failed, completed = two
    for id, days, found in ((failed, 30, (1, 0)), (completed, 90, (0, 1))):
        await age(app, id, days)
        app.clock.pass_s(-MINUTE)
        assert await taken_away(app) == (0, 0)
        app.clock.pass_s(MINUTE)
        assert (await taken_away(app), id in await not_deleted(app)) == (found, False)
    await books_are_right(app)


async def test_younger_ones_stay(app, client, two, clock):
    clock.pass_s(60 * DAY)
    young = await order(client)
    await work(app)
    unmade = await order(client)
    await age(app, two[1], 90)
    assert await taken_away(app) == (1, 1)
    assert await not_deleted(app) == {young, unmade}
    listed = (await client.get("/api/v1/video/list")).json()["data"]["videos"]
    assert [video["videoUuid"] for video in listed] == [unmade, young]
    assert error_of(await client.get(f"/api/v1/video/{two[1]}")) == (404, "E4006")


async def test_how_long_they_are_kept_can_be_set(open_app, clock, provider):
    async with open_app(video_failed_days=2, video_completed_days=1) as app:
        ada = await person(app, "ada@example.com", credits=100)
        await app.write(ended, user_id=ada.id, completed=1, failed=1)
        await ran(app, "prune")
        clock.pass_s(DAY - 1)
        assert await taken_away(app) == (0, 0)
        clock.pass_s(1)
        assert await taken_away(app) == (0, 1)
        clock.pass_s(DAY)
        assert await taken_away(app) == (1, 0)


async def test_files_go_a_day_after_their_video(app, client, two, clock):
    completed = two[1]
    await age(app, completed, 90)
    link = (await client.get(f"/api/v1/video/{completed}")).json()["data"]["videoUrl"]
    assert await taken_away(app) == (1, 1)
    await work(app, for_s=0)
    assert files(app) == ["1.jpg", "1.mp4"] and (await client.get(link)).status_code == 200
    clock.pass_s(DAY - MINUTE)
    await work(app, for_s=0)
    assert files(app) == ["1.jpg", "1.mp4"]
    clock.pass_s(MINUTE)
    await work(app, for_s=0)
    assert files(app) == []
    assert await rows(app, "SELECT DISTINCT storage_key, poster_key, due_at FROM videos") == [(None,) * 3]


async def test_the_row_says_deleted_before_any_file_goes(app, two, clock, monkeypatch):
    seen, delete = [], app.storage.delete
    state = "SELECT deleted_at FROM videos WHERE id = :id"

    async def watched(key):
        seen.extend(await rows(app, state, id=key.split("/")[1]))
        await delete(key)

    monkeypatch.setattr(app.storage, "delete", watched)
    await age(app, two[1], 90)
    now = app.now()
    await taken_away(app)
    assert seen == []
    clock.pass_s(DAY)
    await work(app, for_s=0)
    assert seen == [(now,)] * len(seen) and len(seen) >= 2


async def test_storage_that_is_down_is_asked_until_it_agrees(app, two, clock, monkeypatch):
    async def down(key):
        asked.append(clock.t)
        raise v.StorageFailed

    asked = []
    await age(app, two[1], 90)
    await taken_away(app)
    clock.pass_s(DAY)
    with monkeypatch.context() as until_then:
        until_then.setattr(app.storage, "delete", down)
        await work(app, for_s=2 * HOUR)
    assert 200 < len(asked) < 400 and asked[-1] > clock.t - 32  # every half minute at last
    assert files(app) == ["1.jpg", "1.mp4"]
    await work(app, for_s=31)
    assert files(app) == [] and await rows(app, "SELECT DISTINCT due_at FROM videos") == [(None,)]


async def test_the_ledger_does_not_notice(app, client, two, clock):
    journal = "SELECT * FROM credit_transactions"
    before = await rows(app, journal), await balance(client)
    await age(app, two[1], 90)
    await taken_away(app)
    clock.pass_s(DAY)
    await work(app)
    assert (await rows(app, journal), await balance(client)) == before
    await books_are_right(app)


async def test_a_second_clean_up_changes_nothing(app, two, clock):
    await age(app, two[1], 90)
    assert await taken_away(app) == (1, 1)
    before = await rows(app, "SELECT * FROM videos")
    clock.pass_s(HOUR)
    assert await taken_away(app) == (0, 0)
    assert await rows(app, "SELECT * FROM videos") == before


async def test_what_people_deleted_themselves_is_left_alone(app, client, two, clock):
    for id in two:
        await client.delete(f"/api/v1/video/{id}")
    await work(app)
    before = await rows(app, "SELECT * FROM videos")
    clock.pass_s(100 * DAY)
    assert await taken_away(app) == (0, 0)
    assert await rows(app, "SELECT * FROM videos") == before


def ended(db, *, user_id, completed, failed, now, model="told"):
    """So many videos that have just ended; of the completed ones, the keys of their files."""
    keys = []
    for n in range(completed + failed):
        id = v.new_uuid(now)
        order = v.Order(model, "scripted", "a fox", "", 5, "16:9", "480p", 1, [], 10)
        v.request_video(db, id=id, user_id=user_id, api_key_id=None, order=order, max_running=1,
                        catalog_version="", timeout=1, now=now)
        find = {"as_": v.Job, "user_id": user_id, "id": id}
        if n < failed:
            v.fail(db, job=v.find_own(db, **find), problem=v.ProviderFailed(), now=now)
            continue
        url, stored = "https://provider.test/1.mp4", v.stored_keys(id, 1)
        v.mark_uploading(db, job=v.find_own(db, **find), original_url=url, until_at=None, now=now)
        v.complete(db, job=v.find_own(db, **find), stored=stored, now=now)
        keys += stored.values()
    return keys


async def test_1200_videos_are_taken_away_at_once(app, clock):
    ada = await person(app, "ada@example.com", credits=10_000)
    for key in await app.write(ended, user_id=ada.id, completed=700, failed=500):
        file = app.storage.root / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    clock.pass_s(90 * DAY)
    assert await taken_away(app) == (500, 0)  # nobody was told a week before of the others
    await ran(app, "prune")
    await ran(app, "prune")
    clock.pass_s(7 * DAY)
    assert await taken_away(app) == (0, 700)
    assert len(files(app)) == 1400
    clock.pass_s(DAY)
    await work(app, for_s=0)
    assert files(app) == []
    await books_are_right(app)


# --- who may run them

SECRET = "what only the scheduler knows"
NIGHTLY = ["/api/cron/expire-credits", "/api/cron/cleanup-videos"]


@pytest.fixture
async def timed(open_app):
    """A server that an outside scheduler may call."""
    async with open_app(cron_secret=SECRET) as app, client_of(app) as client:
        yield app, client


def bearer(secret):
    return {"Authorization": f"Bearer {secret}".encode()}


@pytest.mark.parametrize("path", [*NIGHTLY, "/api/cron/nothing"])
async def test_without_the_secret_nobody_runs_a_job(timed, path):
    app, client = timed
    assert error_of(await client.get(path)) == (401, "E4010")
    for sent in ("", "Bearer", "Bearer ", "Bearer wrong", SECRET, f"Basic {SECRET}", f"Bearer {SECRET[:-1]}",
                 f"Bearer {SECRET}s", f"Bearer {SECRET.upper()}", "Bearer \xe9"):
        headers = {"Authorization": sent.encode("latin-1")}
        assert error_of(await client.get(path, headers=headers)) == (401, "E4010"), sent
    assert await jobs(app) == {}


@pytest.mark.parametrize("path", [*NIGHTLY, "/api/cron/nothing"])
async def test_while_no_secret_is_set_none_is_right(app, client, path):
    for sent in ("", "Bearer", "Bearer ", "Bearer None", f"Bearer {SECRET}"):
        assert error_of(await client.get(path, headers={"Authorization": sent})) == (401, "E4010"), sent
    assert await jobs(app) == {}


@pytest.mark.parametrize("path", NIGHTLY)
async def test_what_opens_everything_else_to_administrators_opens_no_cron(timed, path):
    app, client = timed
    admin = await person(app, "root@example.com", is_admin=True)
    assert error_of(await client.get(path, headers=admin.headers)) == (401, "E4010")
    operator = bearer(v.operator_token(app.secret))
    assert error_of(await client.get(path, headers=operator)) == (401, "E4010")
    account = {"email": "boss@example.com", "password": "correct horse"}
    await client.post("/api/v1/admin/users", json=account | {"isAdmin": True}, headers=operator)
    await client.post("/api/auth/sign-in", json=account)
    assert (await client.get("/api/v1/admin/jobs")).status_code == 200
    assert error_of(await client.get(path)) == (401, "E4010")
    assert await jobs(app) == {}


async def test_a_scheduler_elsewhere_may_call_any_number_of_times(timed, clock):
    app, client = timed
    ada = await person(app, "ada@example.com", credits=50, expires_at=app.now() + 90 * DAY * 1000)
    await app.write(ended, user_id=ada.id, completed=2, failed=1)
    clock.pass_s(83 * DAY)
    await ran(app, "prune")
    clock.pass_s(7 * DAY)
    expiry, cleanup = NIGHTLY
    for packages, failed, completed in ((1, 1, 2), (0, 0, 0), (0, 0, 0)):
        for path, data in ((expiry, {"expiredPackages": packages}),
                           (cleanup, {"deletedFailed": failed, "archivedCompleted": completed})):
            answer = await client.get(path, headers=bearer(SECRET))
            assert (answer.status_code, answer.json()) == (200, {"success": True, "data": data})
    await books_are_right(app)


async def test_a_scheduler_is_told_what_cannot_be(timed, monkeypatch):
    _, client = timed
    for path in ("/api/cron/nothing", "/api/cron/"):
        assert error_of(await client.get(path, headers=bearer(SECRET)))[0] == 404
    assert error_of(await client.post(NIGHTLY[0], headers=bearer(SECRET)))[0] == 405
    replace(monkeypatch, "expire-credits", lambda: asyncio.sleep(0.05))
    both = await asyncio.gather(*(client.get(NIGHTLY[0], headers=bearer(SECRET)) for _ in range(2)))
    assert sorted(answer.status_code for answer in both) == [200, 503]


async def test_the_secret_of_schedulers_opens_nothing_else(timed):
    _, client = timed
    for path in ("/api/v1/admin/jobs", "/api/v1/credit/balance"):
        assert error_of(await client.get(path, headers=bearer(SECRET))) == (401, "E4010")


async def test_jobs_are_for_administrators_only(app, client, ada):
    run = "/api/v1/admin/jobs/expire-credits"
    assert error_of(await client.get("/api/v1/admin/jobs")) == (403, "E4011")
    assert error_of(await client.post(run)) == (403, "E4011")
    del client.headers["Authorization"]
    assert error_of(await client.get("/api/v1/admin/jobs")) == (401, "E4010")
    assert error_of(await client.post(run)) == (401, "E4010")
    assert await jobs(app) == {}


async def test_administrators_see_and_run_jobs(app, boss, clock):
    assert await ask(boss, "jobs") == {"jobs": []}
    answer = await boss.post("/api/v1/admin/jobs/expire-credits")
    assert (answer.status_code, answer.json()["data"]) == (200, {"expiredPackages": 0})
    assert await ask(boss, "jobs") == {"jobs": [{
        "name": "expire-credits", "dueAt": "2027-01-16T02:00:00Z", "beganAt": "2027-01-15T08:00:00Z",
        "succeededAt": "2027-01-15T08:00:00Z", "runs": 1, "result": {"expiredPackages": 0}}]}
    for name in ("nothing", "Prune", "prune%20"):
        assert error_of(await boss.post(f"/api/v1/admin/jobs/{name}")) == (404, "E4012")


# --- reports


@pytest.fixture
async def boss(app):
    """A client that an administrator uses."""
    admin = await person(app, "root@example.com", is_admin=True)
    async with client_of(app, **admin.headers) as client:
        yield client


async def ask(client, path):
    answer = await client.get(f"/api/v1/admin/{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


@pytest.fixture
async def story(app, client, ada, provider):
    """Ada orders four videos: two fail alike, one is made at the second try, one is being made.  Eve has two
    gifts and the rest of a package; what she made was with a model that is no longer there."""
    made = v.Snapshot("succeeded", 100, "https://provider.test/fox.mp4", cost=0.25)
    unmade = v.Snapshot("failed", error="no foxes today", cost=0.5)
    for script in (["a", unmade], ["b", unmade], [v.SubmitRefused("=too busy", again=True), "c", made],
                   ["d", v.Snapshot("running", 30)]):
        provider.script = script
        await order(client)
        await work(app, for_s=0 if "d" in script else 5)
    date = app.now() + 30 * DAY * 1000
    eve = await person(app, "eve@example.com", credits=45, expires_at=date)
    await app.write(ended, user_id=eve.id, completed=2, failed=1, model="forgotten")
    for source, credits in (("x", 3), ("y", 4)):
        await app.write(v.grant, user_id=eve.id, credits=credits, trans_type="NEW_USER", source_ref=source,
                        note="", expires_at=date)
    return {"ada@example.com": ada.id, "eve@example.com": eve.id}


async def test_users_are_reported_with_what_they_have_and_did(boss, story):
    found = {row["email"]: row for row in (await ask(boss, "reports/users"))["rows"]}
    common = {"plan": None, "isAdmin": False, "isDisputed": False}
    mine = {"creditsRemaining": 80, "creditsUsed": 10, "videos": 4}
    hers = {"creditsRemaining": 32, "creditsUsed": 20, "videos": 3}
    for email, told in (("ada@example.com", mine), ("eve@example.com", hers)):
        row = found[email]
        assert row.pop("createdAt").startswith("2027-01-15T08:00:")
        assert row == common | told | {"id": story[email], "email": email}
    assert found["root@example.com"]["isAdmin"] is True
    (only,) = (await ask(boss, "reports/users?email=eve@example.com"))["rows"]
    assert only["videos"] == 3


async def test_models_are_reported_with_what_they_earned_and_cost(boss, story):
    assert (await ask(boss, "reports/models"))["rows"] == [
        {"model": "told", "videos": 4, "completed": 1, "failed": 2, "creditsCharged": 10, "cost": 1.25},
        {"model": "forgotten", "videos": 3, "completed": 2, "failed": 1, "creditsCharged": 20, "cost": None},
    ]


async def test_failures_are_reported_by_how_they_were_put(boss, story):
    found = (await ask(boss, "reports/failures"))["rows"]
    assert [(row["provider"], row["state"], row["error"], row["times"]) for row in found] == [
        ("scripted", "away", "=too busy", 1), ("scripted", "failed", "no foxes today", 2)]
    assert all(row["lastAt"].startswith("2027-01-15T08:00:") for row in found)
    assert len((await ask(boss, "reports/failures?state=away"))["rows"]) == 1


async def test_what_may_still_be_spent_is_reported_by_the_month_in_which_it_ends(boss, story):
    found = (await ask(boss, "reports/unearned"))["rows"]
    assert [(row["month"], row["transType"], row["credits"], row["packages"]) for row in found] == [
        ("never", "SYSTEM_ADJUST", 90, 1),  # the frozen ones too
        ("2027-02", "SYSTEM_ADJUST", 25, 1), ("2027-02", "NEW_USER", 7, 2)]
    assert (await ask(boss, "reports/unearned?month=2027-02&transType=NEW_USER"))["rows"] == [found[2]]


async def test_orders_to_providers_are_reported(boss, story):
    found = (await ask(boss, "reports/provider-jobs"))["rows"]
    assert [(row["state"], row["providerId"], row["cost"]) for row in found] == [
        ("taken", "d", None), ("succeeded", "c", 0.25), ("away", None, None), ("failed", "b", 0.5),
        ("failed", "a", 0.5)]


async def names(app):
    found = await rows(app, "SELECT substr(name, 8) FROM sqlite_schema WHERE name GLOB 'report_*' ORDER BY 1")
    return [name.replace("_", "-") for (name,) in found]


async def test_where_nothing_happened_reports_are_empty(app, boss):
    assert len(await names(app)) == 9
    for name in await names(app):
        found = await ask(boss, f"reports/{name}")
        assert (len(found["rows"]), found["nextCursor"]) == (int(name == "users"), None)


async def test_page_by_page_a_report_has_every_row_once(app, boss, story):
    for name in await names(app):
        whole, seen, cursor = (await ask(boss, f"reports/{name}"))["rows"], [], ""
        while cursor is not None:
            page = await ask(boss, f"reports/{name}?limit=1{cursor and '&cursor=' + cursor}")
            seen, cursor = seen + page["rows"], page["nextCursor"]
        assert seen == whole, name


def cell(value):
    """As CSV has it: formulas are defused, and UTC is written in numbers."""
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith("=") else re.sub(r"^(20\d\d-\S+)Z$", r"\1+00:00", text)


async def test_a_report_in_csv_says_the_same_page_by_page(app, boss, story):
    for name in ("users", "models", "failures", "unearned", "provider-jobs"):
        whole, seen, cursor = (await ask(boss, f"reports/{name}"))["rows"], [], ""
        while cursor is not None:
            path = f"/api/v1/admin/reports/{name}?limit=2&format=csv{cursor and '&cursor=' + cursor}"
            answer = await boss.get(path)
            assert answer.headers["content-type"].startswith("text/csv")
            seen += csv.DictReader(io.StringIO(answer.text))
            cursor = answer.headers.get("x-next-cursor")
        assert seen == [{key: cell(value) for key, value in row.items()} for row in whole], name


async def test_a_cursor_that_somebody_made_up_breaks_nothing(app, boss, story):
    for text in ("9" * 30, "-1", "1.5", "null", "[1]", '"\\u0000"', '"\\ud800"', '"\xff"', '"x"', "7", ""):
        cursor = base64.urlsafe_b64encode(text.encode("latin-1")).decode()
        for name in await names(app):
            answer = await boss.get(f"/api/v1/admin/reports/{name}", params={"cursor": cursor})
            assert answer.status_code == 200 or error_of(answer) == (400, "E4009"), text


async def test_reports_are_for_administrators_only(app, client, ada):
    for name in await names(app):
        assert error_of(await client.get(f"/api/v1/admin/reports/{name}")) == (403, "E4011")
