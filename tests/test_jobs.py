"""What is done by itself: when, how often, and what of it operators see and can ask for."""

import asyncio
import random
from collections import Counter
from itertools import pairwise

import pytest

import videofly as v

pytestmark = pytest.mark.anyio
MINUTE, HOUR, DAY = 60, 3600, 86400  # seconds, as the tests' clock counts
TIMES = {  # of each job: how often, and how long after the epoch for the first time; that was a Thursday
    "expire-credits": (DAY, 2 * HOUR),
    "cleanup-videos": (7 * DAY, 3 * DAY + 3 * HOUR),
    "reconcile": (DAY, 2 * HOUR + 30 * MINUTE),
    "audit": (DAY, 4 * HOUR),
    "prune": (10 * MINUTE, 0),
}


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
