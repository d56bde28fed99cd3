"""With Litestream the bucket follows the database: what a lost machine knew, another one knows in seconds.

    pytest -s tests/test_litestream.py -k drill

prints how many seconds, and how many accepted orders were lost.  Servers, Litestream and S3 server are all
real processes: what is started becomes Litestream, and the server is its child."""

import contextlib
import os
import re
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import httpx
import pytest

import videofly as v
from conftest import Server
from test_backups import TAMPER, books_in
from test_process import FOX, SMALL, account, client_with, data_of, refused, status_of, until

pytest_plugins = ["s3server"]


class Machine(Server):
    """A real server under Litestream; self.server is the child, by a handle that outlives its number."""

    server = None

    def start(self):
        super().start()
        self.forget()
        (self.pid,) = map(int, subprocess.check_output(["pgrep", "-P", str(self.process.pid)]).split())
        self.server = os.pidfd_open(self.pid)
        return self

    def signal_server(self, kind):
        signal.pidfd_send_signal(self.server, kind)

    def wait_for_server(self, within_s=15):
        assert select.select([self.server], [], [], within_s)[0], "the server does not end"

    def forget(self):
        if self.server is not None:
            os.close(self.server)
        self.server = None

    def lose(self):
        """All at once, as a machine is lost."""
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            self.signal_server(signal.SIGKILL)
        self.wait_for_server()
        self.kill()

    def ship(self):
        """Have all that was committed until now brought to the bucket: whether it was."""
        line = httpx.HTTPTransport(uds=str(self.data / "litestream" / "socket"), retries=5)
        with httpx.Client(transport=line, timeout=30) as litestream:
            wish = {"path": str(self.data / "videofly.db"), "wait": True, "timeout": 20}
            return litestream.post("http://litestream/sync", json=wish).is_success

    def lag_s(self):
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        return float(re.search(r"^videofly_replica_lag_seconds (\S+)$", text, re.M)[1])

    @property
    def books(self):
        return books_in(self.data / "videofly.db")


@pytest.fixture
def machine(tmp_path, bucket_settings):
    """Makes machines, each with a folder of its own, and all with one bucket."""
    (tmp_path / "catalog.toml").write_text(SMALL)
    made, common = [], {v.variable(name): text for name, text in bucket_settings.items()}

    def make(name, **other):
        made.append(Machine(tmp_path / name, **{
            **common, "VIDEOFLY_LITESTREAM": "on", "VIDEOFLY_CATALOG": str(tmp_path / "catalog.toml"),
            "VIDEO_MAX_CONCURRENT": "100000", **other}))
        return made[-1]

    yield make
    for one in made:
        if one.process and not one.log.closed:
            one.lose()
        one.forget()


def take_over(machine, name):
    """What a first start on an empty folder finds, up to where it would become Litestream."""
    settings = v.read_settings(other := machine(name).environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "execve", lambda *words: None)
        v.go_under_litestream(settings)
    found = v.in_file(v.Path(settings.data, "videofly.db"), v.audit)
    assert (found["valid"], found["faults"]) == (True, [])
    return books_in(f"{other['VIDEOFLY_DATA']}/videofly.db")


def credits_in(books):
    return sorted(row[1] for row in books)


# --- what is there after a stop, and after a start


def test_after_a_stop_everything_is_in_the_bucket_and_a_start_goes_on_from_there(machine, s3):
    one = machine("a").start()
    account(one).close()
    one.process.send_signal(signal.SIGUSR1)  # Litestream's own, and nothing to it
    backup = one.command("backup")  # which has its tables too
    account(one, "bob@example.com", credits=5).close()
    assert one.command("audit").endswith("valid")
    assert one.stop() == 0
    one.wait_for_server(0)
    assert take_over(machine, "b") == one.books and credits_in(one.books) == [10, 15]

    before = s3.keys(one.environ["S3_BUCKET"])
    one.command("grant", "ada@example.com", "7")  # with no server; commands do not replicate
    assert one.command("audit").endswith("valid") and "can be upgraded" in one.command("check", "--upgrade")
    assert s3.keys(one.environ["S3_BUCKET"]) == before
    assert one.start().stop() == 0
    assert take_over(machine, "c") == one.books and credits_in(one.books) == [15, 17]

    one.command("restore", backup)
    assert one.start().stop() == 0
    assert take_over(machine, "d") == one.books and credits_in(one.books) == [10]


def test_a_machine_that_was_given_up_and_comes_back_spoils_nothing(machine):
    first, second = machine("a").start(), machine("b")
    account(first).close()
    assert first.stop() == 0
    second.start()
    account(second, "bob@example.com", credits=1).close()
    first.start()
    account(first, "eve@example.com", credits=2).close()
    assert first.ship() and second.ship()
    account(second, "cid@example.com", credits=3).close()
    assert second.ship()
    account(first, "fay@example.com", credits=4).close()
    assert first.ship()
    assert [(one.data / "litestream" / "number").read_text() for one in (first, second)] == ["1", "2"]
    stray = machine("c")  # of a database that is gone: not the replica's
    stray.data.mkdir()
    shutil.copy(first.data / "videofly.db-wal", stray.data)
    assert credits_in(take_over(machine, "c")) == [10, 11, 13]
    assert second.stop() == 0 == first.stop()


def test_a_replica_that_is_not_right_is_not_taken(machine):
    one, other = machine("a"), machine("b")
    with pytest.raises(AssertionError, match="start the server first"):  # what it began would hide a replica
        one.command("user", "add", "ada@example.com")
    assert one.start().stop() == 0
    one.command("user", "add", "ada@example.com")
    one.command("backup")
    with contextlib.closing(sqlite3.connect(one.data / "videofly.db")) as db:
        db.executescript(TAMPER)
    assert one.start().stop() == 0
    assert "not right" in refused(other)  # and nothing is there that another try would take
    assert [*other.data.glob("videofly.db*"), *other.data.glob("litestream/number")] == []
    off = machine("b", VIDEOFLY_LITESTREAM="off")
    assert Server.start(off).stop() == 0  # with the newest backup instead
    assert off.books == one.books and v.in_file(off.data / "videofly.db", v.audit)["valid"]
    assert other.start().stop() == 0  # and from then on there is a replica of that
    assert take_over(machine, "c") == other.books == off.books


# --- what is missing or wrong


def test_where_it_is_not_installed_the_start_is_refused(machine, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(os, "execve", None)
    for _ in range(2):
        with pytest.raises(v.Refused, match=r"^VIDEOFLY_LITESTREAM: .*pip install 'videofly\[litestream\]'$"):
            v.go_under_litestream(v.read_settings(machine("a").environ))


def test_it_needs_a_bucket(tmp_path):
    assert "S3_ENDPOINT must be set too" in refused(Server(tmp_path / "a", VIDEOFLY_LITESTREAM="on"))


@pytest.mark.parametrize("wrong", [{"S3_SECRET_KEY": "mistyped"}, {"S3_ENDPOINT": "http://127.0.0.1:9"}])
def test_a_first_start_does_not_begin_anew_where_the_bucket_cannot_be_asked(machine, wrong):
    one = machine("a", **wrong)
    assert "S3_ENDPOINT" in (said := refused(one)) and "mistyped" not in said
    assert not (one.data / "videofly.db").exists()


def test_while_the_bucket_is_away_it_serves_and_says_how_far_the_replica_is_behind(machine, s3):
    one = machine("a").start()
    account(one).close()
    assert one.ship()
    s3.stop()
    try:
        account(one, "bob@example.com", credits=1).close()
        until(lambda: one.lag_s() > 4)  # it is asked every 3 s
        one.process.send_signal(signal.SIGTERM)
        one.wait_for_server()
        one.lose()  # Litestream may try for a minute, and whoever waits for it kills it: nothing is lost
        one.start()
        account(one, "cid@example.com", credits=2).close()
    finally:
        s3.start()
    assert one.ship()
    until(lambda: one.lag_s() < 3)
    assert one.stop() == 0
    assert take_over(machine, "b") == one.books and credits_in(one.books) == [10, 11, 12]


def test_with_a_wrong_key_it_serves_too_and_the_log_says_why_but_no_secret(machine):
    one = machine("a", S3_SECRET_KEY="mistyped", CREEM_WEBHOOK_SECRET="whsec_hidden")
    one.data.mkdir()
    (one.data / "litestream").mkdir(mode=0o700)
    (one.data / "litestream" / "number").write_text("1")  # it has started before
    v.in_file(one.data / "videofly.db", v.migrate, "rwc")
    one.start()
    until(lambda: "SignatureDoesNotMatch" in one.output())
    assert not one.ship()
    seen = [v.Path(f"/proc/{pid}/cmdline").read_text() for pid in (one.process.pid, one.pid)]
    seen += [one.output(), (one.data / "litestream" / "config").read_text()]
    assert "replicate" in seen[0] and "serve" in seen[1]
    assert [text for text in seen if "mistyped" in text or "whsec_hidden" in text] == []
    one.lose()


def test_checkpoints_are_left_to_it_and_an_older_database_is_brought_up_to_date_under_it(machine):
    one = machine("a")
    one.data.mkdir()
    with contextlib.closing(sqlite3.connect(one.data / "videofly.db")) as db:
        db.executescript((v.HERE / "tests" / "schemas" / "1.sql").read_text())
    one.start()
    account(one, "new@example.com").close()
    assert one.ship()
    with contextlib.closing(sqlite3.connect(f"file:{one.data}/videofly.db?mode=ro", uri=True)) as db:
        theirs = db.execute("SELECT name FROM sqlite_schema WHERE name GLOB '_litestream_*'").fetchall()
    assert len(theirs) == 2  # without which it could not go on
    wal = one.data / "videofly.db-wal"
    with client_with(one, v.operator_token((one.data / "secret").read_text())) as operator:
        before = wal.stat().st_size
        data_of(operator.post("/api/v1/admin/jobs/tidy"))
        assert wal.stat().st_size >= before > 0
    assert one.stop() == 0


@pytest.mark.anyio
async def test_but_no_disk_fills_while_it_cannot(machine, monkeypatch):
    async def look(server, sockets):
        app = server.config.app.opt["parts"]
        found.append(await app.db.write(v.value, sql="PRAGMA wal_autocheckpoint"))

    found = []
    monkeypatch.setattr(v.Server, "serve", look)
    monkeypatch.setattr(v, "write_log", lambda form: None)
    one = machine("a")
    (one.data / "litestream").mkdir(parents=True)
    (one.data / "litestream" / "number").write_text("1")  # as going under it leaves it
    await v.serve_until_stopped(v.read_settings(one.environ))
    assert found[0] * 4096 == 256 * 2**20


# --- what is killed


def test_when_the_server_is_killed_the_rest_is_shipped_and_it_ends_with_an_error(machine):
    one = machine("a").start()
    customers = Customers(one)
    assert one.ship()
    many = len(customers.accepted)
    until(lambda: len(customers.accepted) > many + 50)
    one.signal_server(signal.SIGKILL)
    assert one.process.wait(15) not in (0, None)  # so that whoever started it starts it again
    customers.leave()
    one.log.close()
    take_over(machine, "b")
    here, there, accepted = videos_in(one), videos_in(machine("b")), {id for _, id in customers.accepted}
    assert accepted <= here and accepted <= there
    # Killed between a commit's writing and its end, the file may be without it, and the replica have it: then
    # nobody has been answered, and of each customer that is one order at most.
    assert here <= there and len(there - here) <= len(customers.threads)


def test_when_litestream_is_killed_the_server_goes_on_and_no_second_one_starts(machine):
    """In a container, and under systemd, the first process's end is everybody's."""
    one = machine("a").start()
    account(one).close()
    assert one.ship()
    one.process.kill()
    one.process.wait()
    account(one, "bob@example.com", credits=1).close()
    until(lambda: one.lag_s() > 4)
    assert "A server is running on this data folder already" in refused(one)
    one.signal_server(signal.SIGTERM)
    one.wait_for_server()
    one.log.close()
    assert one.start().stop() == 0
    assert take_over(machine, "b") == one.books and credits_in(one.books) == [10, 11]


class Customers:
    """Some who order without a pause, until they are told to stop; accepted: when, and which video."""

    def __init__(self, server, many=3):
        self.client, self.accepted, self.gone = account(server, credits=50_000), [], False
        self.threads = [threading.Thread(target=self.order) for _ in range(many)]
        for thread in self.threads:
            thread.start()

    def order(self):
        while not self.gone:
            with contextlib.suppress(httpx.HTTPError):
                answer = self.client.post("/api/v1/video/generate", json=FOX)
                if answer.status_code == 201:
                    self.accepted.append((time.monotonic(), data_of(answer)["videoUuid"]))

    def leave(self):
        self.gone = True
        for thread in self.threads:
            thread.join()
        self.client.close()


def videos_in(server):
    with contextlib.closing(sqlite3.connect(server.data / "videofly.db")) as db:
        return {id for (id,) in db.execute("SELECT id FROM videos")}


def test_the_drill_another_machine_takes_over(machine):
    first, second = machine("a").start(), machine("b")
    customers = Customers(first)
    key = customers.client.headers["Authorization"].removeprefix("Bearer ")
    video = customers.client.post("/api/v1/video/generate", json=FOX, headers={"Prefer": "wait=20"}).json()
    assert video["data"]["status"] == "COMPLETED"
    began = time.monotonic()
    assert first.ship()
    until(lambda: len(customers.accepted) > 300 and time.monotonic() - began > 3)  # seconds under load

    lost_at = time.monotonic()
    first.lose()
    customers.gone = True
    shutil.rmtree(first.data)

    second.start()
    ready_s = time.monotonic() - lost_at
    with client_with(second, key) as client:
        data_of(client.post("/api/v1/video/generate", json=FOX))
        took_s = time.monotonic() - lost_at
        again = status_of(client, video["data"]["videoUuid"])
        assert httpx.get(again["videoUrl"], trust_env=False).content[4:8] == b"ftyp"
    assert second.command("audit").endswith("valid")
    second.lose()
    customers.leave()
    there = videos_in(second)
    lost = [at for at, id in customers.accepted if id not in there]
    print(f"\nthe first machine lost with {len(customers.accepted)} orders accepted; the second ready after "
          f"{ready_s:.2f} s, its first order accepted after {took_s:.2f} s; lost: {len(lost)} orders, of the "
          f"last {max((lost_at - at for at in lost), default=0):.2f} s")
    assert took_s < 30
    assert all(lost_at - at < 5 for at in lost)


# --- how it is called


def test_spaces_quotes_options_and_a_relative_folder_survive(machine, tmp_path):
    one = machine("it's a $HOME")
    (tmp_path / "my venv").symlink_to(sys.prefix)
    one.environ |= {"VIDEOFLY_DATA": one.data.name, "PYTHONPATH": str(v.HERE), "VIDEOFLY_PORT": "1"}
    line = [str(tmp_path / "my venv" / "bin" / "python"), "-m", "videofly", "serve", "--port", str(one.port)]
    one.program = ["-c", f"import os; os.chdir({str(tmp_path)!r}); os.execv({line[0]!r}, {line})"]
    one.start()
    account(one).close()
    assert {file.stat().st_mode & 0o077 for file in one.data.rglob("*")} == {0}
    assert one.stop() == 0
    assert credits_in(take_over(machine, "b")) == [10]
