"""A backup counts when it is known to restore; and when one is not right, everything stays as it was."""

import contextlib
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import videofly as v
from conftest import Server, books_are_right, person, rows
from test_process import account, data_of

BOOKS = """SELECT user_id, sum(remaining), sum(frozen), sum(used) FROM credit_packages
           GROUP BY user_id ORDER BY user_id"""
ORDER = {"model": "preview", "prompt": "a red fox over snow", "duration": 2, "quality": "360p"}


TAMPER = "DROP TRIGGER transactions_no_update; UPDATE credit_transactions SET credits = 7"


def books_in(file):
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db:
        return db.execute(BOOKS).fetchall()


@pytest.mark.anyio
async def test_a_backup_is_the_database_as_it_was_and_nobody_notices(app, ada):
    made = await v.run_job(app, "backup", at_once=True)
    assert books_in(made["file"]) == await rows(app, BOOKS)
    assert v.in_file(Path(made["file"]), v.prove)["headHash"] == made["head"]
    made_here = {Path(made["file"]), Path(made["file"]).with_suffix(".media")}
    assert {*(Path(app.settings.data) / "backups").iterdir()} == made_here
    with pytest.raises(sqlite3.OperationalError):  # readers still only read
        await app.db.read(lambda db: db.execute("DELETE FROM users"))
    await person(app, "bob@example.com", credits=5)
    await books_are_right(app)


@pytest.mark.anyio
async def test_a_copy_that_is_not_right_does_not_count(app, ada, monkeypatch):
    fine = v.run

    def copy_badly(db, sql, **words):
        done = fine(db, sql, **words)
        if sql == v.COPY:
            with contextlib.closing(sqlite3.connect(words["path"])) as copy:
                copy.executescript(TAMPER)
        return done

    monkeypatch.setattr(v, "run", copy_badly)
    assert "not right" in (await v.run_job(app, "backup", at_once=True))["error"]
    assert list((Path(app.settings.data) / "backups").glob("*.db")) == []


@pytest.mark.anyio
async def test_a_bucket_gets_each_backup_and_loses_what_is_thinned(app, ada, clock, monkeypatch):
    class Bucket(v.BucketStorage):
        def __init__(self):
            self.kept = {}

        async def put(self, key, file, media_type):
            self.kept[key] = file.read_bytes()
            file.unlink()

        async def delete(self, key):
            del self.kept[key]

    app.storage = bucket = Bucket()
    for _ in range(9):
        made = await v.run_job(app, "backup", at_once=True)
        clock.pass_s(86400)
    here = {f"backups/{file.name}" for file in Path(made["file"]).parent.glob("*.db")}
    assert {*bucket.kept} == here
    assert len([*Path(made["file"]).parent.iterdir()]) == 2 * len(here)  # each with its manifest
    assert bucket.kept[f"backups/{Path(made['file']).name}"] == Path(made["file"]).read_bytes()


def test_seven_days_four_weeks_and_twelve_months_are_kept():
    day = datetime(2026, 11, 25, 3, 15, tzinfo=UTC)
    names = [(day - timedelta(days=n, hours=h)).strftime(v.BACKUP) for n in range(800) for h in (0, 1)]
    kept = {*names} - v.thinned(names)
    assert {(day - timedelta(days=n)).strftime(v.BACKUP) for n in range(7)} <= kept
    assert 7 + 2 + 11 <= len(kept) <= 7 + 4 + 12
    months = {name[:7] for name in kept}
    assert len(months) == 12 and min(months) == "2025-12"
    assert v.thinned(names[:3]) == {names[1]} and v.thinned([]) == set()


def run(data, *words):
    command = [sys.executable, "-m", "videofly", *words]
    done = subprocess.run(command, cwd=v.HERE, capture_output=True, text=True, env=Server(data).environ,
                          timeout=60)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_under_load_killed_and_restored_elsewhere_nothing_from_before_is_missing(server, tmp_path):
    with account(server, credits=1000) as client, ThreadPoolExecutor(8) as pool:
        first = [pool.submit(client.post, "/api/v1/video/generate", json=ORDER) for _ in range(3)]
        before = {data_of(answer.result())["videoUuid"] for answer in first}
        more = [pool.submit(client.get, "/api/v1/credit/balance") for _ in range(50)]
        file = server.command("backup", str(tmp_path / "copy.db"))
        [answer.result() for answer in more]
    server.kill()
    code, said, _ = run(tmp_path / "elsewhere", "restore", file)
    assert code == 0 and "is restored" in said
    again = Server(tmp_path / "elsewhere").start()
    assert again.command("audit").endswith("valid")
    assert again.stop() == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "elsewhere" / "videofly.db")) as db:
        assert before <= {id for (id,) in db.execute("SELECT id FROM videos")}


def test_the_latest_is_restored_and_what_was_there_is_kept_aside(server):
    server.command("user", "add", "ada@example.com")
    server.command("grant", "ada@example.com", "70")
    server.command("backup")
    server.command("grant", "ada@example.com", "30")
    code, _, said = run(server.data, "restore", "latest")
    assert code == 1 and "A server is running" in said
    assert server.stop() == 0
    now = books_in(server.data / "videofly.db")
    assert {file.stat().st_mode & 0o077 for file in (server.data / "backups").iterdir()} == {0}
    code, said, _ = run(server.data, "restore", "latest")
    assert code == 0
    assert [row[1] for row in books_in(server.data / "videofly.db")] == [80]
    (aside,) = server.data.glob("replaced-*")
    assert books_in(aside / "videofly.db") == now and str(aside) in said
    assert run(server.data, "audit")[0] == 0


@pytest.mark.parametrize("harm", ["damaged", "another's", "changed", "absent", "newer"])
def test_what_is_not_right_is_not_restored(tmp_path, harm):
    data, file = tmp_path / "data", tmp_path / "backup.db"
    run(data, "user", "add", "ada@example.com")
    assert run(data, "backup", str(file))[0] == 0
    before = books_in(data / "videofly.db")
    if harm == "damaged":
        content = bytearray(file.read_bytes())
        content[20_000:60_000] = bytes(40_000)
        file.write_bytes(content)
    elif harm == "absent":
        file.unlink()
    else:
        script = {"another's": "PRAGMA application_id = 7", "newer": "PRAGMA user_version = 99",
                  "changed": TAMPER}
        with contextlib.closing(sqlite3.connect(file)) as db:
            db.executescript(script[harm])
    code, _, said = run(data, "restore", str(file))
    assert code == 1 and len(said.splitlines()) == 1
    assert books_in(data / "videofly.db") == before
    assert list(data.glob("replaced-*")) == [] and run(data, "audit")[0] == 0


def test_an_older_backup_is_brought_up_to_date(tmp_path):
    file = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(file)) as db:
        db.executescript((v.HERE / "tests" / "schemas" / "1.sql").read_text())
    assert run(tmp_path / "data", "restore", str(file))[0] == 0
    code, said, _ = run(tmp_path / "data", "audit")
    assert code == 0 and said.endswith("valid")


def test_a_restore_that_is_cut_off_before_its_end_leaves_what_was_there(tmp_path, monkeypatch):
    data, file = tmp_path / "data", tmp_path / "backup.db"
    run(data, "user", "add", "ada@example.com")
    run(data, "backup", str(file))
    run(data, "grant", "ada@example.com", "30")
    before = books_in(data / "videofly.db")

    def cut(part, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(v, "move_durably", cut)
    with pytest.raises(KeyboardInterrupt):
        v.restore(data, file)
    assert books_in(data / "videofly.db") == before
    assert run(data, "audit")[0] == 0


def test_a_backup_that_was_cut_off_hinders_none_after_the_next_start(tmp_path):
    data = tmp_path / "data"
    run(data, "user", "add", "ada@example.com")
    with contextlib.closing(sqlite3.connect(data / "videofly.db")) as db:
        db.executescript("UPDATE jobs SET leased_until_at = 9e15")
    assert run(data, "backup")[0] == 0
