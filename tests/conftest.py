"""What every test stands on: a clock wound by hand, a provider that does as told, a server, a person."""

import asyncio
import functools
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import httpx
import pytest

import videofly as v

CATALOG = """
[credits]
gift = 10
gift_days = 30
plan_days = 30
pack_days = 365

[[models]]
id = "told"
name = "Told"
description = "Made by the scripted provider."
providers = ["scripted"]
modes = ["text", "image"]
durations = [5, 10]
aspect_ratios = ["16:9", "1:1"]
qualities = { "480p" = 1, "720p" = 2 }
price = { base = 0, per_second = 2 }

[[models]]
id = "from-image"
name = "From image"
description = "Wants an image."
providers = ["scripted"]
modes = ["image"]
durations = [5]
aspect_ratios = ["16:9"]
qualities = { "480p" = 1 }
price = { base = 10, per_second = 0 }

[[models]]
id = "withdrawn"
name = "Withdrawn"
description = "Not on offer."
providers = ["scripted"]
modes = ["text"]
durations = [5]
aspect_ratios = ["16:9"]
qualities = { "480p" = 1 }
price = { base = 10, per_second = 0 }
enabled = false

[[models]]
id = "preview"
name = "Preview renderer"
description = "Not an AI model."
providers = ["local"]
modes = ["text", "image"]
durations = [1, 5]
aspect_ratios = ["16:9"]
qualities = { "120p" = 1 }
price = { base = 10, per_second = 0 }
"""


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Clock:
    """Seconds since the epoch; moves only when told to."""

    def __init__(self):
        self.t = 1_800_000_000.0

    def __call__(self):
        return self.t

    def pass_s(self, seconds):
        self.t += seconds


@functools.cache
def tiny_video():
    """The bytes of a real MP4, 64 x 48, half a second."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(4):
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([60 * n]) * plane.buffer_size)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


class ScriptedProvider:
    """A provider outside the server, as a real one is: it keeps its jobs, and does what the script says.

    script is a list of answers or exceptions, one for each call of submit and fetch; when it is empty,
    submits are taken and fetches find the job done.  calls lists what was asked, for what did not happen."""

    def __init__(self, repeatable=False):
        self.repeatable, self.poll_s = repeatable, 1.0
        self.script, self.calls, self.result = [], [], tiny_video()

    def next(self, default):
        answer = self.script.pop(0) if self.script else default
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def submit(self, job):
        self.calls.append(("submit", job.id))
        return self.next(f"job-{job.id}")

    async def fetch(self, ref):
        self.calls.append(("fetch", ref))
        return self.next(v.Snapshot("succeeded", 100, f"https://provider.test/{ref}.mp4"))

    async def cancel(self, ref):
        self.calls.append(("cancel", ref))
        self.script.insert(0, v.Snapshot("canceled"))

    async def open_result(self, ref, url, *, part=False):
        self.calls.append(("open", ref))
        if isinstance(self.result, BaseException):
            raise self.result
        yield self.result

    def count(self, what):
        return sum(1 for call in self.calls if call[0] == what)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(autouse=True)
def retries_answer_at_once(monkeypatch):
    """Where a test itself is the worker, nobody works while a retry waits."""
    monkeypatch.setattr(v, "RETRY_WAIT_S", 0)


@pytest.fixture
def provider():
    return ScriptedProvider()


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "catalog.toml").write_text(CATALOG)
    return v.Settings(data=str(tmp_path / "data"), catalog=str(tmp_path / "catalog.toml"))


@pytest.fixture
async def app(settings, clock, provider):
    """The running parts, but the worker stands still: a test calls work()."""
    async with v.open_app(settings, clock=clock, providers={"scripted": provider}) as app:
        yield app


@pytest.fixture
async def client(app):
    async with client_of(app) as client:
        yield client


def client_of(app, **headers):
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(v.http(app)), base_url="http://test", headers=headers
    )


@pytest.fixture
async def ada(app, client):
    """Somebody with 100 credits, whose key the client sends."""
    ada = await person(app, "ada@example.com", credits=100)
    client.headers["Authorization"] = ada.headers["Authorization"]
    return ada


class Person:
    def __init__(self, id, email, key):
        self.id, self.email, self.key = id, email, key
        self.headers = {"Authorization": f"Bearer {key}"}


async def person(app, email, *, credits=0, is_admin=False, expires_at=None):
    """An account without a welcome gift, with a key and so many credits."""
    rules = v.CreditRules(gift=0, gift_days=1, plan_days=1, pack_days=1)
    user = await app.db.write(
        v.add_user, email=email, password_hash=None, is_admin=is_admin, rules=rules, now=app.now()
    )
    key = v.new_api_key()
    await app.db.write(v.add_key, user_id=user["id"], new_key=key, now=app.now())
    if credits:
        await app.db.write(
            v.grant,
            user_id=user["id"],
            credits=credits,
            trans_type="SYSTEM_ADJUST",
            source_ref=f"test:{email}",
            note="",
            expires_at=expires_at,
            now=app.now(),
        )
    return Person(user["id"], email, key)


async def work(app, *, for_s=5):
    """Let the worker take every step that is due, while so many seconds pass on the app's clock."""
    for _ in range(for_s + 1):
        await v.begin_steps(app)
        while app.working:
            await asyncio.gather(*app.working.values())
            await v.begin_steps(app)
        app.clock.pass_s(1)


def is_api_key(text):
    return text == v.api_key(text[3:46])


async def books_are_right(app):
    """The auditor, the journal and the counters agree."""
    found = await app.db.read(v.audit)
    assert (found["valid"], found["faults"]) == (True, [])


def rows(app, sql, **params):
    """Awaitable: what a query finds, for a look behind the API."""
    return app.db.read(lambda db: db.execute(sql, params).fetchall())


def error_of(answer):
    """(status, code) of a refusal, whose shape is checked on the way."""
    body = answer.json()
    assert body["success"] is False and set(body["error"]) == {"code", "message", "details"}
    assert body["error"]["message"]
    return answer.status_code, body["error"]["code"]


class Server:
    """The real server as a process of its own, on a folder and a free port."""

    def __init__(self, data, **environ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.data, self.url = Path(data), f"http://127.0.0.1:{self.port}"
        clean = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("VIDEOFLY_", "S3_", "VIDEO_", "CREEM_", "UPGRADE_"))
        }
        self.environ = clean | {"VIDEOFLY_DATA": str(data), "VIDEOFLY_PORT": str(self.port)} | environ
        self.process, self.program = None, ["-m", "videofly", "serve"]

    def start(self):
        """Start, and return when it answers."""
        self.log = (self.data.parent / f"{self.data.name}.log").open("a+b")
        self.process = subprocess.Popen(
            [sys.executable, *self.program], cwd=v.HERE, env=self.environ, stdout=self.log,
            stderr=subprocess.STDOUT)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                if httpx.get(self.url + "/readyz", trust_env=False).status_code == 200:
                    return self
            except httpx.TransportError:
                assert self.process.poll() is None, self.output()
            time.sleep(0.02)
        raise AssertionError("the server does not start:\n" + self.output())

    def output(self):
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def stop(self, within_s=15):
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(within_s)
        self.log.close()
        return code

    def command(self, *words):
        """The command line on the same folder: what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "videofly", *words],
            cwd=v.HERE,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()


@pytest.fixture
def server(tmp_path):
    """A real server; a test that wants settings makes its own Server."""
    server = Server(tmp_path / "data")
    server.start()
    yield server
    if server.process.poll() is None:
        server.kill()


def image_bytes(format="PNG", size=(64, 48), colour=(200, 80, 40)):
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, format)
    return out.getvalue()


def as_json(answer):
    return json.loads(answer.content)
