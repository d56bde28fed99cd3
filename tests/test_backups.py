"""A backup counts when it is known to restore; and when one is not right, everything stays as it was."""

import contextlib
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

import videofly as v
from conftest import Server, books_are_right, image_bytes, person, rows, work
from test_process import account, data_of, until
from test_videos import FOX, order

pytest_plugins = ["s3server"]

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


@pytest.mark.parametrize("harm, said", [
    (TAMPER, "transaction 1 was changed"),
    ("DELETE FROM api_keys WHERE user_id IN (SELECT id FROM users WHERE email LIKE 'bob%');"
     "DELETE FROM users WHERE email LIKE 'bob%'", "the number of users"),
    ("INSERT INTO users (id, email, created_at) VALUES ('usr_x', 'x@example.com', 1)",
     "the number of users"),
    ("DROP TRIGGER transactions_no_delete; DELETE FROM credit_transactions; DELETE FROM credit_packages",
     "the number of credit_(packages|transactions); the number of credit_"),
])
@pytest.mark.anyio
async def test_a_copy_that_is_not_right_or_has_other_rows_does_not_count(app, ada, monkeypatch, harm, said):
    await person(app, "bob@example.com")
    fine = v.run

    def copy_badly(db, sql, **words):
        done = fine(db, sql, **words)
        if sql == v.COPY:
            with contextlib.closing(sqlite3.connect(words["path"])) as copy:
                copy.executescript(harm)
        return done

    with monkeypatch.context() as until_then:
        until_then.setattr(v, "run", copy_badly)
        failed = await v.run_job(app, "backup", at_once=True)
    assert re.search(said, failed["error"])
    assert list((Path(app.settings.data) / "backups").glob("*.db")) == []
    assert "error" not in await v.run_job(app, "backup", at_once=True)


@pytest.mark.anyio
async def test_a_backup_says_which_files_it_is_about(app, client, ada):
    kept, deleted = await order(client), await order(client)
    await work(app)
    await client.delete(f"/api/v1/video/{deleted['videoUuid']}")
    image = (await client.post("/api/v1/upload", files={"file": ("a.png", image_bytes())})).json()["data"]
    await order(client, FOX)  # not made yet
    made = await v.run_job(app, "backup", at_once=True)
    told = Path(made["file"]).with_suffix(".media").read_text()
    names = [image["key"], *(f"videos/{kept['videoUuid']}/1.{ending}" for ending in ("jpg", "mp4"))]
    assert told == "".join(f"{name}\n" for name in sorted(names))
    assert all((app.storage.root / name).is_file() for name in told.split())


@pytest.mark.anyio
async def test_what_somebody_else_put_beside_the_backups_hinders_none_and_is_no_latest(app, ada):
    folder = Path(app.settings.data) / "backups"
    folder.mkdir()
    (folder / "zebra.db").write_text("somebody's own")
    made = await v.run_job(app, "backup", at_once=True)
    assert "error" not in made and (folder / "zebra.db").exists()
    assert await v.newest_backup(Path(app.settings.data), app.storage) == Path(made["file"])


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


def run(data, *words, **environ):
    command = [sys.executable, "-m", "videofly", *words]
    done = subprocess.run(command, cwd=v.HERE, capture_output=True, text=True,
                          env=Server(data, **environ).environ, timeout=60)
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


def test_a_good_backup_takes_the_place_of_a_damaged_database(tmp_path):
    data, file = tmp_path / "data", tmp_path / "backup.db"
    run(data, "user", "add", "ada@example.com")
    assert run(data, "backup", str(file))[0] == 0
    damaged = bytearray((data / "videofly.db").read_bytes())
    damaged[8192:12_288] = random.Random(7).randbytes(4096)  # even to look for what is wrong is an error then
    (data / "videofly.db").write_bytes(damaged)
    code, said, _ = run(data, "restore", str(file))
    assert code == 0 and "is restored" in said
    (aside,) = data.glob("replaced-*")
    assert (aside / "videofly.db").read_bytes() == damaged
    assert run(data, "audit")[0] == 0 and books_in(data / "videofly.db") == books_in(file)


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


def test_a_signal_makes_a_backup_while_the_server_serves(server):
    folder = server.data / "backups"
    (first,) = until(lambda: [*folder.glob("*.db")])  # which every first start makes
    runs = "SELECT runs, json_extract(result, '$.file') FROM jobs WHERE name = 'backup'"

    def look(sql=runs):
        with contextlib.closing(sqlite3.connect(f"file:{server.data}/videofly.db?mode=ro", uri=True)) as db:
            return db.execute(sql).fetchone()

    until(lambda: look()[0] == 1)
    until(lambda: time.strftime(v.BACKUP, time.gmtime()) > first.name)  # names are of seconds
    server.process.send_signal(signal.SIGUSR1)
    until(lambda: look()[0] == 2)
    assert look()[1] != str(first.absolute()) and Path(look()[1]).exists()
    assert v.in_file(Path(look()[1]), v.prove)["valid"] and server.stop() == 0


# --- upgrades


def put_database(data, script):
    data.mkdir()
    with contextlib.closing(sqlite3.connect(data / "videofly.db")) as db:
        db.executescript(script)
    return data / "videofly.db"


def contents(data):
    return {str(file.relative_to(data)): file.read_bytes() for file in data.rglob("*") if file.is_file()}


SCHEMAS = sorted((v.HERE / "tests" / "schemas").glob("*.sql"))


def rehearse(data):
    done = CliRunner().invoke(v.main, ["check", "--upgrade"], env={"VIDEOFLY_DATA": str(data)})
    assert done.output.count("\n") == 1
    return done.exit_code, done.output.strip()


@pytest.mark.parametrize("schema", [*SCHEMAS, v.HERE / "schema.sql"], ids=lambda file: file.stem)
def test_an_upgrade_is_rehearsed_and_the_file_stays_as_it_is(tmp_path, schema):
    put_database(tmp_path / "data", schema.read_text())
    before = contents(tmp_path / "data")
    assert rehearse(tmp_path / "data") == (0, "The database can be upgraded, and its books are right.")
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize("harm, said", [
    (TAMPER, "transaction 1 was changed"), ("PRAGMA user_version = 99", "version 99"),
    ("PRAGMA application_id = 7", "not one of VideoFly's"),
    ("PRAGMA foreign_keys = OFF; DELETE FROM users", "refers to what is gone"),
])
def test_a_rehearsal_that_goes_wrong_says_why_and_the_file_stays_as_it_is(tmp_path, harm, said):
    put_database(tmp_path / "data", SCHEMAS[0].read_text() + harm)
    before = contents(tmp_path / "data")
    code, told = rehearse(tmp_path / "data")
    assert code == 1 and told.startswith("Error: ") and said in told
    assert contents(tmp_path / "data") == before


def test_an_upgrade_can_be_rehearsed_while_the_server_serves(server):
    assert server.command("check", "--upgrade").startswith("The database can be upgraded")
    assert server.stop() == 0
    assert not [file for file in server.data.iterdir() if file.name.startswith("tmp")]


def test_without_a_database_there_is_nothing_to_rehearse(tmp_path):
    (tmp_path / "data").mkdir()
    code, told = rehearse(tmp_path / "data")
    assert code == 1 and "videofly.db" in told and contents(tmp_path / "data") == {}


# --- a bucket that has backups


@pytest.fixture
def bucket(bucket_settings):
    return {name.upper(): text for name, text in bucket_settings.items()}


def opened(data, *, at_s=0, **environ):
    return v.open_app(v.read_settings({"VIDEOFLY_DATA": str(data)} | environ),
                      clock=lambda: time.time() + at_s)


@pytest.fixture
async def backed_up(tmp_path, bucket):
    """The folder of somebody with 80 credits, who had 50 when a backup went to the bucket."""
    async with opened(tmp_path / "old", **bucket) as app:
        ada = await person(app, "ada@example.com", credits=50)
        assert "error" not in await v.run_job(app, "backup", at_once=True)
        await app.write(v.grant, user_id=ada.id, credits=30, trans_type="SYSTEM_ADJUST", source_ref="more",
                        note="", expires_at=None)
    return tmp_path / "old"


def credits_in(data):
    return sorted(credits for _, credits, *_ in books_in(data / "videofly.db"))


@pytest.mark.anyio
async def test_a_new_machine_begins_with_the_newest_backup_of_the_bucket(tmp_path, backed_up, bucket, s3):
    assert len(s3.keys(bucket["S3_BUCKET"])) == 1 and credits_in(backed_up) == [80]
    server = Server(tmp_path / "new", **bucket).start()
    assert credits_in(server.data) == [50]
    assert "the newest backup is restored" in server.output()
    assert [*(server.data / "temporary").iterdir()] == []
    assert server.command("audit").endswith("valid") and server.stop() == 0
    async with opened(server.data, **bucket) as app:  # which does not do it once more
        assert await rows(app, "SELECT runs > 0 FROM jobs WHERE name = 'audit'") == [(1,)]


@pytest.mark.anyio
async def test_a_bucket_without_backups_is_a_beginning(tmp_path, bucket):
    async with opened(tmp_path / "new", **bucket) as app:
        assert await rows(app, "SELECT 1 FROM users") == []


@pytest.mark.anyio
async def test_a_damaged_backup_is_no_beginning(tmp_path, backed_up, bucket, s3):
    (name,) = s3.keys(bucket["S3_BUCKET"])
    s3.client.fget_object(bucket["S3_BUCKET"], name, str(tmp_path / "damaged"))
    content = bytearray((tmp_path / "damaged").read_bytes())
    content[20_000:60_000] = bytes(40_000)
    (tmp_path / "damaged").write_bytes(content)
    s3.client.fput_object(bucket["S3_BUCKET"], "backups/2099-01-01T000000Z.db", str(tmp_path / "damaged"))
    code, out, err = run(tmp_path / "new", "serve", **bucket)
    assert (code, out, err.count("\n")) == (1, "", 0) and "was not restored" in err
    with pytest.raises(v.Refused, match="was not restored"):
        async with opened(tmp_path / "new", **bucket):
            pass
    assert {name.partition("/")[0] for name in contents(tmp_path / "new")} <= {"secret", "lock", "temporary"}
    assert not [*(tmp_path / "new").glob("replaced-*")]
    s3.client.remove_object(bucket["S3_BUCKET"], "backups/2099-01-01T000000Z.db")
    async with opened(tmp_path / "new", **bucket) as app:
        assert await rows(app, "SELECT sum(remaining) FROM credit_packages") == [(50,)]
        assert [*app.temporary.iterdir()] == []


@pytest.mark.parametrize("wrong, said", [
    ({"S3_SECRET_KEY": "not-the-secret"}, "SignatureDoesNotMatch"),
    ({"S3_BUCKET": "never-made"}, "NoSuchBucket"), ({"S3_ENDPOINT": "http://127.0.0.1:9"}, "refused"),
])
def test_a_bucket_that_cannot_be_searched_is_no_beginning(tmp_path, bucket, wrong, said):
    code, out, err = run(tmp_path / "new", "serve", **bucket | wrong)
    (line,) = [line for line in err.splitlines() if not line.startswith("{")]  # which the log does
    assert (code, out) == (1, "") and line.startswith("Error: S3_BUCKET cannot be searched for backups: ")
    assert said in line and "not-the-secret" not in err
    assert not (tmp_path / "new" / "videofly.db").exists()


@pytest.mark.anyio
async def test_of_folder_and_bucket_the_newer_backup_is_the_latest(tmp_path, backed_up, bucket, capsys):
    def in_another_second():
        until(lambda: not (backed_up / f"replaced-{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}").exists())

    async def restore():
        in_another_second()
        await v.bring_back(v.read_settings({"VIDEOFLY_DATA": str(backed_up)} | bucket), "latest")
        return credits_in(backed_up), "temporary/" in capsys.readouterr().out

    (here,) = (backed_up / "backups").glob("*.db")
    here.rename(here.with_name("2020-01-01T000000Z.db"))
    assert await restore() == ([50], True)
    async with opened(backed_up, at_s=700) as app:  # without the bucket
        await person(app, "bob@example.com", credits=5)
        assert "error" not in await v.run_job(app, "backup", at_once=True)
    assert await restore() == ([5, 50], False)
    (backed_up / "videofly.db").unlink()
    in_another_second()
    async with opened(backed_up, **bucket):  # as a first start does
        assert credits_in(backed_up) == [5, 50]
