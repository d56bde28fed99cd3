"""What the rest of the program believes about write() and read()."""

import asyncio
import contextlib
import random
import sqlite3
import threading
import time

import anyio
import pytest

import videofly as v

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path):
    return tmp_path / "test.db"


@pytest.fixture
async def db(path):
    async with v.Database.open(path) as db:
        yield db


def add(db, *, id, then=None, text=""):
    """Two statements, of which one alone must never be seen."""
    v.run(db, """
        INSERT INTO users (id, email, password_hash, created_at) VALUES (:id, :id || '@b.c', :text, 0)
    """, id=id, text=text)
    v.run(db, """
        INSERT INTO events (user_id, type, data, created_at) VALUES (:id, 'video.pending', '{}', 0)
    """, id=id)
    if then:
        raise then
    return id


def add_orphan(db, *, id):
    """Passes every statement, and fails at COMMIT."""
    add(db, id=id)
    v.run(db, """
        INSERT INTO credit_holds (video_id, attempt, credits, catalog_version, created_at)
        VALUES ('none', 1, 1, '', 0)
    """)


def ids(db):
    """Who is there; everybody with exactly one event."""
    found = db.execute("""
        SELECT u.id, count(e.id) FROM users u LEFT JOIN events e ON e.user_id = u.id GROUP BY u.id
    """).fetchall()
    assert {events for _, events in found} <= {1}
    return {id for id, _ in found}


def adding(db, *names):
    return [asyncio.create_task(db.write(add, id=f"usr_{name}")) for name in names]


async def statements(db):
    """What the writer runs from now on."""
    seen = []
    await db._writer.run(sqlite3.Connection.set_trace_callback, seen.append)
    return seen


def ends(seen):
    return [sql for sql in seen if sql in ("COMMIT", "ROLLBACK")]


async def outcomes(*calls):
    return await asyncio.gather(*calls, return_exceptions=True)


@contextlib.contextmanager
def no_thread_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


# --- one transaction


async def test_transactions_run_on_one_other_thread(db):
    first, second = [await db.write(lambda _: threading.get_ident()) for _ in range(2)]
    assert first == second != threading.get_ident()


async def test_a_transaction_returns_what_its_function_returns(db):
    assert await db.write(add, id="usr_a") == "usr_a"
    assert await db.read(ids) == {"usr_a"}


@pytest.mark.parametrize("problem", [ZeroDivisionError(), v.Busy(), sqlite3.IntegrityError("x")])
async def test_an_exception_undoes_everything_and_reaches_the_caller(db, problem):
    with pytest.raises(type(problem)) as raised:
        await db.write(add, id="usr_a", then=problem)
    assert raised.value is problem
    assert await db.read(ids) == set()


async def test_a_broken_law_undoes_the_statements_before_it(db):
    await db.write(add, id="usr_a")
    with pytest.raises(sqlite3.IntegrityError):
        await db.write(lambda c: (add(c, id="usr_b"), add(c, id="usr_a")))
    assert await db.read(ids) == {"usr_a"}


async def test_a_cancelled_caller_leaves_all_or_nothing_and_the_writer_at_work(db):
    dice = random.Random(1)
    callers = adding(db, *range(200))
    for caller in dice.sample(callers, 100):
        await asyncio.sleep(0)
        caller.cancel()
    found = await outcomes(*callers)
    heard = {id for id in found if isinstance(id, str)}
    assert 100 <= len(heard) < 200
    assert heard <= await db.read(ids)
    await db.write(add, id="usr_after")


async def test_a_reader_cannot_write(db):
    for _ in range(v.READERS):
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            await db.read(add, id="usr_a")


async def test_people_do_not_wait_for_what_reads_for_long(db):
    running, release = threading.Semaphore(0), threading.Event()
    audits = [lambda c: (running.release(), release.wait(10))] * (v.READERS - 1)
    long = [asyncio.create_task(db.read(audit)) for audit in audits]
    for _ in long:
        await asyncio.to_thread(running.acquire, timeout=10)
    with anyio.fail_after(5):
        assert await asyncio.gather(*[db.read(ids) for _ in range(20)]) == [set()] * 20
    release.set()
    await asyncio.gather(*long)


async def test_whoever_stops_waiting_for_an_answer_holds_nobody_up(db):
    running, release = threading.Event(), threading.Event()
    asked = asyncio.create_task(db.read(lambda c: (running.set(), release.wait(10))))
    await asyncio.to_thread(running.wait, 10)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    with anyio.fail_after(5):
        assert [await db.read(ids) for _ in range(2 * v.READERS)] == [set()] * 2 * v.READERS
    release.set()


async def test_at_the_end_everybody_is_answered(path):
    async with v.Database.open(path) as db:
        asked = [asyncio.create_task(db.read(lambda c: time.sleep(0.01))) for _ in range(40)]
        await asyncio.sleep(0)
    assert await asyncio.gather(*asked) == [None] * 40


async def test_a_reader_does_not_wait_for_a_writer(db):
    running, release = threading.Event(), threading.Event()
    writing = asyncio.create_task(db.write(lambda c: (add(c, id="usr_a"), running.set(), release.wait(10))))
    await asyncio.to_thread(running.wait, 10)
    assert await db.read(ids) == set()
    release.set()
    await writing
    assert await db.read(ids) == {"usr_a"}


async def test_commits_are_durable_and_foreign_keys_hold(db):
    full = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "query_only": 0}
    assert {name: await db.write(lambda c, name=name: v.value(c, f"PRAGMA {name}")) for name in full} == full
    for _ in range(v.READERS):
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            await db.read(add, id="usr_z")


# --- many transactions in one commit


async def test_those_who_wait_together_share_a_commit(db):
    seen = await statements(db)
    await asyncio.gather(*adding(db, *range(2 * v.BATCH_MAX + 1)))
    assert ends(seen) == ["COMMIT"] * 3
    assert len(await db.read(ids)) == 2 * v.BATCH_MAX + 1


async def test_one_who_comes_alone_waits_for_nobody(db):
    seen = await statements(db)
    for name in "abc":
        await asyncio.gather(*adding(db, name))
    assert ends(seen) == ["COMMIT"] * 3


async def test_one_failing_neighbour_harms_nobody(db):
    seen = await statements(db)
    bad = db.write(add, id="usr_x", then=ZeroDivisionError())
    others = [db.write(add, id=id) for id in ("usr_b", "usr_a")]
    found = await outcomes(db.write(add, id="usr_a"), bad, *others)
    assert (found[0], found[2]) == ("usr_a", "usr_b")
    assert (type(found[1]), type(found[3])) == (ZeroDivisionError, sqlite3.IntegrityError)
    assert await db.read(ids) == {"usr_a", "usr_b"}
    assert ends(seen) == ["ROLLBACK", "COMMIT", "ROLLBACK", "COMMIT", "ROLLBACK"]


async def test_one_who_is_refused_before_it_writes_costs_the_others_nothing(db):
    def refuse(_):
        raise v.Busy

    seen = await statements(db)
    found = await outcomes(db.write(add, id="usr_a"), db.write(refuse), db.write(add, id="usr_b"))
    assert (found[0], type(found[1]), found[2]) == ("usr_a", v.Busy, "usr_b")
    assert (await db.read(ids), ends(seen)) == ({"usr_a", "usr_b"}, ["COMMIT"])


async def test_they_are_run_in_the_order_in_which_they_came(db):
    await asyncio.gather(*[db.write(add, id=f"usr_{n:03}") for n in range(300)])
    order = await db.read(lambda c: [id for (id,) in c.execute("SELECT user_id FROM events ORDER BY id")])
    assert order == sorted(order)


async def test_nobody_is_answered_before_the_commit(db):
    running, release = threading.Event(), threading.Event()
    (first,) = adding(db, "a")
    second = asyncio.create_task(db.write(lambda _: (running.set(), release.wait(10))[1]))
    await asyncio.to_thread(running.wait, 10)  # the first has been run, in the same transaction
    assert (first.done(), await db.read(ids)) == (False, set())
    release.set()
    assert (await first, await second) == ("usr_a", True)


async def test_a_commit_that_fails_harms_only_whose_fault_it_is(db):
    seen = await statements(db)
    bad = db.write(add_orphan, id="usr_x")
    found = await outcomes(db.write(add, id="usr_a"), bad, db.write(add, id="usr_b"))
    assert (found[0], type(found[1]), found[2]) == ("usr_a", sqlite3.IntegrityError, "usr_b")
    assert await db.read(ids) == {"usr_a", "usr_b"}
    assert ends(seen) == ["COMMIT", "ROLLBACK", "COMMIT", "COMMIT", "ROLLBACK", "COMMIT"]


async def test_too_many_who_wait_are_refused_at_once(db, monkeypatch):
    monkeypatch.setattr(v, "WAITING_MAX", 5)
    found = await outcomes(*adding(db, *range(8)))
    assert [type(answer) for answer in found] == [str] * 5 + [v.Busy] * 3
    assert len(await db.read(ids)) == 5
    await db.write(add, id="usr_later")


async def test_a_full_disk_is_a_problem_and_loses_nothing(db):
    await db.write(add, id="usr_before")
    pages = await db.read(lambda c: v.value(c, "PRAGMA page_count"))
    await db.write(lambda c: c.execute(f"PRAGMA max_page_count = {pages}").fetchall())
    large = db.write(add, id="usr_large", text="x" * 1_000_000)
    found = await outcomes(db.write(add, id="usr_small"), large, db.write(add, id="usr_other"))
    assert (found[0], type(found[1]), found[2]) == ("usr_small", v.DiskFull, "usr_other")
    assert (found[1].status, found[1].code) == (507, "E5005")
    assert await db.read(ids) == {"usr_before", "usr_small", "usr_other"}
    await db.write(lambda c: c.execute("PRAGMA max_page_count = 100000").fetchall())
    assert await db.write(add, id="usr_large", text="x" * 1_000_000) == "usr_large"
    assert await db.read(lambda c: v.integrity_faults(c)) == []


async def test_news_is_told_after_its_commit_and_only_then(db, path):
    told = []

    def hear(users):
        with sqlite3.connect(path) as other:
            there = {user_id for (user_id,) in other.execute("SELECT user_id FROM events")}
        other.close()
        told.extend((user_id, user_id in there) for user_id in sorted(users))

    db.on_news = hear
    bad = db.write(add, id="usr_x", then=ValueError())
    await outcomes(db.write(add, id="usr_a"), bad, db.write(add, id="usr_b"))
    await db.write(lambda _: None)
    assert told == [("usr_a", True), ("usr_b", True)]


# --- the file


async def refusal(path):
    """What opening the file is refused with; no thread stays behind."""
    with no_thread_left(), pytest.raises(v.Refused) as refused:
        async with v.Database.open(path):
            pass
    return str(refused.value)


def file_with(path, *statements):
    db = sqlite3.connect(path)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


async def test_a_database_from_the_future_is_refused(path):
    async with v.Database.open(path):
        pass
    file_with(path, "PRAGMA user_version = 99")
    assert "version 99; this program knows up to 4" in await refusal(path)


@pytest.mark.parametrize("version", [0, 1, 99])
async def test_the_database_of_another_program_is_refused_and_left_alone(path, version):
    file_with(path, "CREATE TABLE notes (text)", f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    assert "not one of VideoFly's" in await refusal(path)
    assert path.read_bytes() == before


async def test_a_file_that_is_no_database_is_refused(path):
    path.write_bytes(b"Dear diary, today I met a fox. " * 1000)
    assert str(path) in await refusal(path)


async def test_a_file_that_cannot_be_opened_is_refused(path):
    path.mkdir()
    assert str(path) in await refusal(path)


JOURNAL = "SELECT id, hash FROM credit_transactions"
OLD = sorted((v.HERE / "tests" / "schemas").glob("*.sql"), key=lambda file: int(file.stem))


def shape(db):
    """Everything that the database is, but for the rows."""
    return db.execute("SELECT type, name, sql FROM sqlite_schema WHERE name NOT GLOB 'sqlite_*'"
                      " ORDER BY type, name").fetchall()


def old_file(path, schema):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(schema.read_text())
        return db.execute(JOURNAL).fetchall()


@pytest.mark.parametrize("schema", OLD, ids=lambda file: file.stem)
async def test_each_older_database_becomes_what_a_new_one_is_and_loses_nothing(path, tmp_path, schema):
    journal = old_file(path, schema)
    async with v.Database.open(tmp_path / "new.db") as new, v.Database.open(path) as db:
        assert await db.read(shape) == await new.read(shape)
        newest = await new.read(lambda c: v.value(c, "PRAGMA user_version"))
        assert await db.read(lambda c: v.value(c, "PRAGMA user_version")) == newest
        assert await db.read(lambda c: c.execute(JOURNAL).fetchall()) == journal
        assert (await db.read(v.audit))["faults"] == []
        with pytest.raises(sqlite3.IntegrityError):  # the laws hold again
            await db.write(lambda c: c.execute("UPDATE sessions SET user_id = 'nobody'"))
    with contextlib.closing(sqlite3.connect(path.with_name(f"test.db.before-{newest}"))) as copy:
        assert v.value(copy, "PRAGMA user_version") == int(schema.stem)
        assert copy.execute(JOURNAL).fetchall() == journal


async def test_there_is_an_older_database_for_each_version_but_the_newest(path):
    async with v.Database.open(path) as db:
        newest = await db.read(lambda c: v.value(c, "PRAGMA user_version"))
    assert [int(file.stem) for file in OLD] == [*range(1, newest)]


async def test_an_events_number_is_never_used_again(path):
    old_file(path, OLD[0])
    async with v.Database.open(path) as db:
        last = await db.read(v.value, sql=v.LAST_EVENT)
        await db.write(v.run, sql=v.TICK, now=10**13, kept=2 * 10**13)  # when all of them are old
        assert await db.read(v.rows, sql="SELECT id FROM events") == [(last,)]


async def test_a_migration_that_fails_changes_nothing(path):
    old_file(path, OLD[0])
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("UPDATE sessions SET user_id = 'nobody'")
        before = shape(db)
    assert "refers to what is gone" in await refusal(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert (shape(db), v.value(db, "PRAGMA user_version")) == (before, 1)


async def test_a_new_database_is_made_whole_and_needs_no_copy(path):
    async with v.Database.open(path) as db:
        assert await db.read(lambda c: v.audit(c)["valid"])
    assert [file.name for file in path.parent.iterdir()] == ["test.db"]


async def test_a_second_server_on_the_folder_is_refused(tmp_path):
    settings = v.Settings(data=str(tmp_path / "data"))
    async with v.open_app(settings) as app:
        with pytest.raises(v.AlreadyRunning) as refused:
            async with v.open_app(settings):
                pass
        assert str(refused.value).endswith("http://127.0.0.1:8000")
        await app.db.write(add, id="usr_a")
    async with v.open_app(settings) as app:
        assert await app.db.read(ids) == {"usr_a"}


def test_closing_waits_for_what_was_asked_and_leaves_no_thread(path):
    async def ask_and_leave():
        async with v.Database.open(path) as db:
            callers = adding(db, *range(300))
            await asyncio.sleep(0)
        return await asyncio.wait_for(outcomes(*callers), 10)

    with no_thread_left():
        assert len(set(asyncio.run(ask_and_leave()))) == 300


def test_a_server_that_is_torn_down_while_it_writes_keeps_what_it_answered(path):
    answered = set()

    async def ask(db, name):
        answered.add(await db.write(add, id=f"usr_{name}"))

    async def be_torn_down():
        async with v.Database.open(path) as db:
            callers = [asyncio.create_task(ask(db, name)) for name in range(500)]
            while not answered:
                await asyncio.sleep(0)
            for caller in callers:
                caller.cancel()

    asyncio.run(be_torn_down())
    db = sqlite3.connect(path)
    assert answered <= ids(db)
    db.close()
