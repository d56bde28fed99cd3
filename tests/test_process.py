"""The real server as a process: how it starts, is asked, stops, is killed, and starts again.

    KILLS=20 pytest -s tests/test_process.py -k killed

kills it twenty times, and prints what came of it; the suite does it six times."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import av
import httpx
import pytest

import videofly as v
from conftest import Server, is_api_key

KILLS = int(os.environ.get("KILLS", "6"))
EACH = 20 if KILLS >= 20 else 8  # videos ordered between two kills
SMALL = """
[credits]
gift = 10
gift_days = 30
plan_days = 30
pack_days = 365

[[models]]
id = "preview"
name = "Preview renderer"
description = "Small, so that many fit into a test."
providers = ["local"]
modes = ["text", "image"]
durations = [1, 5, 30]
aspect_ratios = ["16:9"]
qualities = { "120p" = 1, "480p" = 1, "720p" = 1 }
price = { base = 1, per_second = 0 }
"""
FOX = {"model": "preview", "prompt": "a red fox over snow"}


@pytest.fixture
def small(tmp_path):
    """A server that sells small previews, and is not started yet."""
    (tmp_path / "catalog.toml").write_text(SMALL)
    server = Server(
        tmp_path / "data", VIDEOFLY_CATALOG=str(tmp_path / "catalog.toml"), VIDEO_MAX_CONCURRENT="1000"
    )
    yield server
    if server.process and server.process.poll() is None:
        server.kill()


def account(server, email="ada@example.com", credits=0):
    """A client with the key of somebody new, who has ten credits and so many more."""
    with client_with(server, v.operator_token((server.data / "secret").read_text())) as operator:
        data_of(operator.post("/api/v1/admin/users", json={"email": email}))
        if credits:
            data_of(operator.post("/api/v1/admin/credits/grant", json={"email": email, "credits": credits}))
        return client_with(
            server, data_of(operator.post("/api/v1/admin/keys", json={"email": email}))["apiKey"]
        )


def client_with(server, key):
    return httpx.Client(
        base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=30, trust_env=False
    )


def data_of(answer):
    assert answer.status_code < 300, answer.text
    return answer.json()["data"]


def status_of(client, video):
    return data_of(client.get(f"/api/v1/video/{video}/status"))


def until(holds, within_s=30.0):
    """Wait for something to be so, and return it."""
    ends = time.monotonic() + within_s
    while not (found := holds()):
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(0.02)
    return found


def log_of(server):
    return (server.data.parent / f"{server.data.name}.log").read_text()


def look_into(server, sql):
    """What the file of a stopped server holds."""
    with contextlib.closing(sqlite3.connect(server.data / "videofly.db")) as db:
        return db.execute(sql).fetchall()


def books_of_stopped(server):
    assert look_into(server, "SELECT * FROM discrepancies") == []
    assert look_into(server, "PRAGMA integrity_check") == [("ok",)]
    with contextlib.closing(sqlite3.connect(server.data / "videofly.db")) as db:
        assert v.audit(db)["faults"] == []


# --- starting


def test_it_answers_soon_after_it_is_started(small):
    began = time.monotonic()
    small.start()
    ready_ms = round((time.monotonic() - began) * 1000)
    print(f"start to ready: {ready_ms} ms")
    assert ready_ms < 10_000
    for path in ("/up", "/healthz", "/readyz", "/openapi.json", "/docs", "/"):
        assert httpx.get(small.url + path, trust_env=False).status_code == 200, path
    assert small.stop() == 0


def refused(server, *words, **environ):
    """The one line with which it does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "videofly", "serve", *words],
        cwd=v.HERE,
        env=server.environ | environ,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode not in (0, None) and done.stdout == "", done
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("variable, text, reason", [
    ("VIDEOFLY_PORT", "eighty", "VIDEOFLY_PORT"),
    ("VIDEOFLY_PROT", "80", "VIDEOFLY_PROT is not a setting"),
    ("S3_BUCKET", "films", "S3_ENDPOINT and S3_ACCESS_KEY and S3_SECRET_KEY must be set too"),
    ("VIDEOFLY_CATALOG", "/nowhere/catalog.toml", "/nowhere/catalog.toml"),
    ("VIDEOFLY_DATA", "/dev/null", "VIDEOFLY_DATA"),
    ("VIDEOFLY_HOST", "192.0.2.1", "192.0.2.1"),
])
def test_a_bad_setting_is_one_clear_line(small, variable, text, reason):
    assert reason in refused(small, **{variable: text})


@pytest.mark.parametrize("was, becomes, reason", [
    ("gift = 10", "gift = -1", "credits.gift"),
    ("durations = [1, 5, 30]", "durations = [", "catalog.toml"),
    ('"local"', '"nobody"', "nobody"),
])
def test_a_bad_catalogue_is_one_clear_line(small, was, becomes, reason):
    (small.data.parent / "catalog.toml").write_text(SMALL.replace(was, becomes))
    assert reason in refused(small)


def test_a_port_in_use_is_one_clear_line(small):
    with socket.create_server(("127.0.0.1", small.port)):
        assert f"127.0.0.1:{small.port} cannot be listened on: Address already in use." in refused(small)
    small.start()
    assert small.stop() == 0


def test_a_second_server_on_the_folder_is_refused_and_the_first_goes_on(small):
    small.start()
    line = refused(Server(small.data))
    assert small.url in line and "already" in line
    assert httpx.get(small.url + "/readyz", trust_env=False).status_code == 200


@pytest.mark.parametrize("content, reason", [
    ("PRAGMA user_version = 99", "version 99"),
    ("CREATE TABLE notes (t TEXT)", "not one of VideoFly's"),
    (None, "videofly.db"),
])
def test_a_file_that_is_not_ours_is_left_alone(small, content, reason):
    small.data.mkdir()
    file = small.data / "videofly.db"
    if content:
        with contextlib.closing(sqlite3.connect(file)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(content)
    else:
        file.write_bytes(b"These are my notes, and no database. " * 100)
    before = file.read_bytes()
    assert reason in refused(small)
    assert file.read_bytes() == before


# --- the first minute


CURL = """#!{python}
import sys, httpx
words, headers, body, url = sys.argv[1:], {{}}, None, None
while words:
    word = words.pop(0)
    if word == "-H": name, _, text = words.pop(0).partition(": "); headers[name] = text
    elif word == "-d": body = words.pop(0)
    elif not word.startswith("-"): url = word
answer = httpx.request("POST", url, headers=headers, content=body, timeout=70, trust_env=False)
sys.exit(22) if answer.is_error else print(answer.text, end="")
"""


def shell(line, folder):
    """What sh makes of a line that somebody pasted; with a curl, which fresh machines may lack."""
    tools = folder / "tools"
    if not shutil.which("curl"):
        tools.mkdir(exist_ok=True)
        (tools / "curl").write_text(CURL.format(python=sys.executable))
        (tools / "curl").chmod(0o755)
    environ = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-c", line], env=environ, capture_output=True, text=True, timeout=90)


def test_the_line_of_the_first_start_makes_an_account_and_a_video_once(server, tmp_path):
    (line,) = [line for line in log_of(server).splitlines() if line.strip().startswith("KEY=")]
    done = shell(line, tmp_path)
    assert done.returncode == 0, done.stderr
    greeting, _, answer = done.stdout.partition("\n")
    video = json.loads(answer)["data"]
    assert (greeting.startswith("Your API key: vf_"), video["status"]) == (True, "COMPLETED")
    with client_with(server, greeting.split()[-1]) as client:
        assert data_of(client.get("/api/v1/user/me"))["isAdmin"]
        assert data_of(client.get("/api/v1/credit/balance"))["usedCredits"] == video["creditsUsed"] > 0
    assert shell(line, tmp_path).returncode != 0
    assert server.stop() == 0
    assert look_into(server, "SELECT count(*) FROM users") == [(1,)]
    server.start()
    assert log_of(server).count("set-up#") == 1
    assert shell(line, tmp_path).returncode != 0


@pytest.mark.parametrize("running", [True, False], ids=["server", "no server"])
def test_the_command_line_does_the_same_with_and_without_a_server(small, tmp_path, running):
    if running:
        small.start()
    assert small.command(
        "user", "add", "ada@example.com", "--admin", "--password", "correct horse"
    ).startswith("usr_")
    key = small.command("key", "create", "ada@example.com")
    assert is_api_key(key) and len(key.split()) == 1
    assert (
        small.command("grant", "ada@example.com", "20", "--days", "3", "--note", "welcome") == "available: 30"
    )
    film = tmp_path / "fox.mp4"
    assert small.command("generate", "a red fox over snow", "--out", str(film)).splitlines() == [str(film)]
    with av.open(film) as container:
        assert (container.format.name.split(",")[0], container.streams.video[0].codec_context.name) == (
            "mov",
            "h264",
        )
        assert sum(1 for _ in container.decode(video=0)) > 5
    assert small.command("audit").endswith("valid")
    assert all(line.startswith(("ok ", "BAD disk")) for line in small.command("check").splitlines())
    if running:
        assert small.stop() == 0
    assert look_into(small, "SELECT status, count(*) FROM videos") == [("COMPLETED", 1)]
    books_of_stopped(small)


def test_a_command_that_is_refused_says_why_in_one_line(small):
    for words in (
        "key create nobody@example.com",
        "grant nobody@example.com 5",
        "user add no-address",
        "generate fox --duration 7",
    ):
        done = subprocess.run(
            [sys.executable, "-m", "videofly", *words.split()],
            cwd=v.HERE,
            env=small.environ,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "Error: E40" in done.stderr, (
            done
        )


# --- the log


def test_a_bug_is_logged_with_the_id_that_the_answer_carries_and_without_secrets(small):
    small.start()
    with account(small) as client:
        key = client.headers["Authorization"].removeprefix("Bearer ")
        made = data_of(client.post("/api/v1/video/generate", json=FOX, headers={"Prefer": "wait=30"}))
        signed = httpx.URL(made["videoUrl"])
        assert client.get(signed).status_code == 200
        assert client.get(signed.copy_set_param("until", "1")).status_code == 403
        person = {"email": "bob@example.com", "password": "a-password-of-bob"}
        with httpx.Client(base_url=small.url, trust_env=False) as browser:
            assert browser.post("/api/auth/sign-up", json=person).status_code == 201
            cookie = browser.cookies["videofly"]
            assert (
                browser.post("/api/auth/sign-in", json=person | {"password": "a-wrong-one"}).status_code
                == 401
            )
        assert small.stop() == 0
        look_into(small, "DROP TABLE idempotency_keys")
        look_into(small, "DROP TABLE sign_in_failures")
        small.start()
        broken = [client.post("/api/v1/video/generate", json=FOX, headers={"Idempotency-Key": "k"}),
                  httpx.post(small.url + "/api/auth/sign-in", json=person, trust_env=False)]
        assert client.get("/api/v1/user/me").status_code == 200
    assert small.stop() == 0
    log = log_of(small)
    for answer in broken:
        problem = answer.json()["error"]
        assert (answer.status_code, problem["code"]) == (500, "E5007")
        assert problem["details"]["requestId"] == answer.headers["x-request-id"]
        lines = [json.loads(line) for line in log.splitlines() if answer.headers["x-request-id"] in line]
        assert [line["levelname"] for line in lines] == ["ERROR", "INFO"]
        assert lines[0]["message"] == f"POST {answer.request.url.path}"
        assert "OperationalError" in lines[0]["exc_info"]
        assert lines[1]["message"].startswith(f"POST {answer.request.url.path} 500 in ")
        assert "OperationalError" not in answer.text and "no such table" not in answer.text
    secret = (small.data / "secret").read_text()
    for hidden in (
        key,
        cookie,
        signed.params["signature"],
        person["password"],
        "a-wrong-one",
        secret,
        v.operator_token(secret),
    ):
        assert hidden not in log


# --- stopping


def test_sigterm_ends_it_soon_and_cleanly_though_streams_are_open(small):
    small.start()
    with account(small) as client, ThreadPoolExecutor() as threads:
        lines, listening = [], threading.Event()

        def listen():
            with client.stream("GET", "/api/v1/video/events", timeout=30) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    listening.set()
            return "the stream ended"

        wish = FOX | {"quality": "720p", "duration": 30}
        stream = threads.submit(listen)
        assert listening.wait(10)
        waiting = threads.submit(
            client.post, "/api/v1/video/generate", json=wish, headers={"Prefer": "wait=60"}
        )
        until(lambda: any("video.generating" in line for line in lines))
        began = time.monotonic()
        code = small.stop()
        took_s = time.monotonic() - began
        print(f"stopped in {took_s * 1000:.0f} ms")
        assert (code, stream.result(5)) == (0, "the stream ended") and took_s < 6
        answer = waiting.result(5)
        assert (answer.status_code, answer.json()["data"]["status"]) == (201, "GENERATING")
    assert "Traceback" not in log_of(small) and "ERROR" not in log_of(small)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_it_can_be_stopped_as_soon_as_it_listens(small, kind):
    small.start()
    with small.log:
        small.process.send_signal(kind)
        assert small.process.wait(10) == 0
    assert "Traceback" not in log_of(small) and "ERROR" not in log_of(small)


def test_previews_that_a_stop_interrupted_are_made_after_the_next_start(small):
    small.start()
    with account(small) as client:
        ids = [
            data_of(client.post("/api/v1/video/generate", json=FOX | {"quality": "480p", "duration": 30}))[
                "videoUuid"
            ]
        ]
        ids += [data_of(client.post("/api/v1/video/generate", json=FOX))["videoUuid"] for _ in range(3)]
        until(lambda: status_of(client, ids[0])["progress"])
        assert small.stop() == 0
        assert ("GENERATING",) in look_into(small, "SELECT status FROM videos")
        small.start()
        for video in ids:
            until(lambda video=video: status_of(client, video)["status"] == "COMPLETED", 60)
    assert small.stop() == 0
    assert look_into(small, "SELECT state, count(*) FROM credit_holds GROUP BY state") == [
        ("settled", len(ids))
    ]
    books_of_stopped(small)


# --- killing


def order_all(clients, orders, acknowledged):
    """Every order once, again and again with its own key while nobody answers: as a careful client does."""

    def send(number, key):
        with contextlib.suppress(httpx.TransportError):
            answer = clients[number % len(clients)].post(
                "/api/v1/video/generate", json=FOX, headers={"Idempotency-Key": key}
            )
            acknowledged[key] = data_of(answer)["videoUuid"]

    with ThreadPoolExecutor(4) as threads:
        for _ in [threads.submit(send, number, key) for number, key in orders if key not in acknowledged]:
            pass


def test_killed_at_any_moment_it_loses_nothing_and_charges_once(small):
    seed = int(os.environ.get("SEED", random.randrange(1_000_000)))
    print(f"seed {seed}, {KILLS} kills")  # pytest shows it when the test fails; again with SEED=
    dice, orders, acknowledged = random.Random(seed), [], {}
    small.start()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(account(small, f"user{n}@example.com", 1000)) for n in range(4)]
        for kill in range(KILLS):
            orders += [(number, f"order-{kill}-{number}") for number in range(EACH)]
            ordering = threading.Thread(target=order_all, args=(clients, orders, acknowledged))
            ordering.start()
            time.sleep(dice.uniform(0.0, 1.5 if KILLS >= 20 else 0.8))
            small.kill()
            ordering.join()
            small.start()
        at_last = len(acknowledged)
        order_all(clients, orders, acknowledged)
        assert len(acknowledged) == len(orders) == len(set(acknowledged.values()))
        for client in clients:
            until(lambda client=client: not unfinished(client), 120)
        assert small.command("audit").endswith("valid")
    assert small.stop() == 0
    found = dict(look_into(small, "SELECT id, status FROM videos"))
    assert set(acknowledged.values()) == set(found)
    completed = sum(status == "COMPLETED" for status in found.values())
    print(
        f"{KILLS} kills, {len(found)} videos, {at_last} of them acknowledged by then, {completed} completed"
    )
    assert completed == len(found)
    holds = look_into(
        small, "SELECT state, count(*), count(DISTINCT video_id), sum(credits) FROM credit_holds GROUP BY 1"
    )
    assert holds == [("settled", len(found), len(found), completed)]
    assert look_into(small, "SELECT sum(used), sum(frozen) FROM credit_packages") == [(completed, 0)]
    for key, size in look_into(small, "SELECT storage_key, size_bytes FROM videos"):
        file = small.data / "media" / key
        assert file.stat().st_size == size
        with av.open(file) as container:
            assert container.streams.video[0].frames > 0
    assert list((small.data / "temporary").iterdir()) == []
    books_of_stopped(small)


def unfinished(client):
    """One video of each status that is no end."""
    pages = [
        client.get(f"/api/v1/video/list?limit=1&status={status}")
        for status in ("PENDING", "GENERATING", "UPLOADING")
    ]
    return [video for page in pages for video in data_of(page)["videos"]]
