"""What is done by itself: when, how often, and what of it operators see and can ask for."""

import asyncio
import random
import statistics
import time
from collections import Counter
from itertools import pairwise

import pytest

import videofly as v
from conftest import books_are_right, error_of, person, rows, work

pytestmark = pytest.mark.anyio
MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds, as the tests' clock counts
TIMES = {  # of each job: how often, and how long after the epoch for the first time; that was a Thursday
    "expire-credits": (DAY, 2 * HOUR),
    "cleanup-videos": (7 * DAY, 3 * DAY + 3 * HOUR),
    "reconcile": (DAY, 2 * HOUR + 30 * MINUTE),
    "audit": (DAY, 4 * HOUR),
    "prune": (10 * MINUTE, 0),
}
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
    (365, 4 * HOUR, {"prune": 2191, "cleanup-videos": 53} | dict.fromkeys(
        ("expire-credits", "reconcile", "audit"), 366)),
    (10, 10 * MINUTE, {"prune": 1441, "cleanup-videos": 3} | dict.fromkeys(
        ("expire-credits", "reconcile", "audit"), 11)),
])  # fmt: skip
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
        clock.pass_s(chance.randrange(200) * HOUR)
    assert diary == expected(looks)
    assert min(b - a for a, b in pairwise(looks)) == -HOUR and len(looks) > 500


async def test_looking_every_minute_does_nothing_more(app, clock, diary):
    clock.pass_s(30)
    for _ in range(120):
        await v.run_due_jobs(app)
        clock.pass_s(MINUTE)
    assert Counter(name for name, _ in diary) == dict.fromkeys(TIMES, 1) | {"prune": 12}


async def test_a_server_that_starts_does_at_once_what_is_due(app):
    async with v.working(app):
        async with asyncio.timeout(5):
            while len(found := await jobs(app)) < 5 or not all(job["runs"] for job in found.values()):
                await asyncio.sleep(0.01)
    assert {name: job["result"] for name, job in found.items()} == {
        "audit": {"faults": []}, "cleanup-videos": {"archivedCompleted": 0, "deletedFailed": 0},
        "expire-credits": {"expiredPackages": 0}, "prune": {},
        "reconcile": {"heard": 0, "unknownProducts": []}}  # fmt: skip


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
        app, clock, diary, monkeypatch):  # fmt: skip
    def fails():
        diary.append(("expire-credits", clock.t))
        if len(diary) < 8:
            raise OSError("the disk is gone")

    replace(monkeypatch, "expire-credits", fails)
    await v.run_due_jobs(app)
    assert [name for name, _ in diary] == list(TIMES)
    failed = (await jobs(app))["expire-credits"]
    assert (failed["result"], failed["runs"]) == ({"error": "the disk is gone"}, 1)
    assert failed["succeededAt"] is None and failed["beganAt"] is not None
    clock.pass_s(10 * MINUTE - 1)
    await v.run_due_jobs(app)
    assert len(diary) == 5
    clock.pass_s(1)
    await v.run_due_jobs(app)
    assert [name for name, _ in diary[5:]] == ["expire-credits", "prune"]
    clock.pass_s(10 * MINUTE)
    await v.run_due_jobs(app)
    well = (await jobs(app))["expire-credits"]
    assert (well["result"], well["runs"], well["succeededAt"]) == ({}, 3, v.moment(app.now()))
    assert well["dueAt"].hour == 2


@pytest.mark.parametrize("name", TIMES)
async def test_what_keeps_failing_is_tried_every_ten_minutes_and_no_oftener(
        app, clock, diary, monkeypatch, name):  # fmt: skip
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
                note="", expires_at=expires_at, now=now)  # fmt: skip


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
    """Let so many days have passed since a video ended."""
    ((at,),) = await rows(app, "SELECT finished_at FROM videos WHERE id = :id", id=id)
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


def ended(db, *, user_id, completed, failed, now):
    """So many videos that have just ended; of the completed ones, the keys of their files."""
    keys = []
    for n in range(completed + failed):
        id = v.new_uuid(now)
        order = v.Order("told", "scripted", "a fox", "", 5, "16:9", "480p", 1, [], 10)
        v.request_video(db, id=id, user_id=user_id, api_key_id=None, order=order, max_running=1,
                        catalog_version="", timeout=1, now=now)  # fmt: skip
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
    assert await taken_away(app) == (500, 700)
    assert len(files(app)) == 1400
    clock.pass_s(DAY)
    await work(app, for_s=0)
    assert files(app) == []
    await books_are_right(app)
