"""How fast it is, as ratios measured side by side in one run.

    python tests/benchmark.py [SECONDS] [ROUNDS]

1. Accepted orders a second over HTTP, and signed webhooks of purchases, each durably committed, against a
   bare Litestar endpoint that decodes and encodes the same bodies as an order.  Both servers run as they are
   deployed (uvicorn, uvloop, httptools, one process), ours with its log and its schedule; one client of many
   connections drives them in turn.  The worker stands still: who makes the videos is elsewhere.
2. Start to ready, and memory when idle, of the real server.
"""

import asyncio
import contextlib
import hmac
import itertools
import json
import os
import platform
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import uvicorn
import uvloop
from litestar import Litestar, post
from litestar.params import JSONBody

sys.path.insert(0, str(Path(__file__).parent.parent))
import videofly as v

PEOPLE, CONNECTIONS = 1000, 128
ORDER = b'{"model":"preview","prompt":"a red fox over snow","duration":5}'
SECRET = "whsec_benchmark"
SAMPLE = (Path(__file__).parent / "creem-events/checkout.completed.onetime.json").read_text()
SAMPLE = re.sub(r'"(evt|ch|ord|tran)_\w+"', r'"\1_NUMBER"', SAMPLE)
OURS = {"prod_StarterPack0001": "starter-pack", "cust_7aVideoFlyDemo0001": "cust_USER", "user_0001": "USER"}
SAMPLE = re.sub("|".join(OURS), lambda found: OURS[found[0]], SAMPLE)
NUMBERS = itertools.count()  # no event comes twice


# --- the two servers


def serve(app, port):
    config = uvicorn.Config(
        app, port=port, lifespan="off", log_config=None, access_log=False, server_header=False
    )
    return uvicorn.Server(config).serve()


@post("/api/v1/video/generate")
async def bare(data: JSONBody[v.NewVideo]) -> v.Answer[v.Video]:
    video = dict.fromkeys(v.Video.__annotations__) | {
        "videoUuid": "0" * 36, "status": "PENDING", "model": data.model, "prompt": data.prompt,
        "negativePrompt": "", "duration": 5, "aspectRatio": "16:9", "quality": "480p", "seed": 1,
        "creditsUsed": 5, "progress": 0, "createdAt": v.moment(0)}
    return v.Answer(True, video)


async def serve_bare(port, _):
    await serve(Litestar([bare], openapi_config=None, logging_config=None), port)


async def serve_videofly(port, people_file):
    """The server as it is deployed, log and schedule too, and a thousand people with a key and credits."""
    with tempfile.TemporaryDirectory() as folder:
        limits = {"video_max_concurrent": 100_000}
        settings = v.Settings(data=folder, port=port, creem_webhook_secret=SECRET, **limits)
        async with v.open_app(settings) as app:
            people = await asyncio.gather(*[a_person(app, n) for n in range(PEOPLE)])
        Path(people_file).write_text(json.dumps(people))
        v.begin_steps = stand_still
        await v.serve_until_stopped(settings)


async def stand_still(app):
    return v.LONGEST_PAUSE_S


async def a_person(app, n):
    key = v.new_api_key()
    user = await app.db.write(
        v.add_user,
        email=f"{n}@example.com",
        password_hash=None,
        is_admin=False,
        rules=app.catalogue.credits,
        now=app.now(),
    )
    await app.db.write(
        v.grant,
        user_id=user["id"],
        credits=10**8,
        trans_type="SYSTEM_ADJUST",
        source_ref=str(n),
        note="",
        expires_at=None,
        now=app.now(),
    )
    await app.db.write(v.add_key, user_id=user["id"], new_key=key, now=app.now())
    return user["id"], key


# --- the client


class Connection(asyncio.Protocol):
    """Sends one request after the other and counts what is accepted."""

    def __init__(self, requests):
        self.requests, self.accepted, self.refused, self.buffer = requests, 0, 0, b""

    def connection_made(self, transport):
        self.transport = transport
        self.send()

    def send(self):
        for request in itertools.islice(self.requests, 1):
            self.transport.write(request)

    def data_received(self, data):
        self.buffer += data
        head, _, rest = self.buffer.partition(b"\r\n\r\n")
        at = head.lower().find(b"content-length: ")
        if at < 0 or len(rest) < int(head[at + 16 :].split(b"\r\n", 1)[0]):
            return
        if head.startswith(b"HTTP/1.1 20"):
            self.accepted += 1
        else:
            self.refused += 1
        self.buffer = b""
        self.send()


def request(path, header, body):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{header}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def order(user, key):
    return request("/api/v1/video/generate", f"Authorization: Bearer {key}", ORDER)


def webhook(user, key):
    """A purchase of its own."""
    body = SAMPLE.replace("USER", user).replace("NUMBER", str(next(NUMBERS))).encode()
    signature = hmac.digest(SECRET.encode(), body, "sha256").hex()
    return request("/api/webhooks/creem", f"creem-signature: {signature}", body)


async def accepted_per_second(port, make, people, seconds):
    loop, connections = asyncio.get_running_loop(), []
    for n in range(CONNECTIONS):
        mine = itertools.cycle(people[n::CONNECTIONS])
        _, connection = await loop.create_connection(
            lambda mine=mine: Connection(make(*who) for who in mine), "127.0.0.1", port
        )
        connections.append(connection)
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    accepted, took = sum(c.accepted for c in connections), time.perf_counter() - began
    for connection in connections:
        connection.requests = iter(())
    await asyncio.sleep(0.5)  # for what is under way
    refused = sum(c.refused for c in connections)
    for connection in connections:
        connection.transport.abort()
    assert refused == 0, f"{refused} were refused"
    return accepted / took


@contextlib.contextmanager
def server(name, port, *words):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, __file__, name, str(port), *words], **quiet)
    try:
        wait_for(port)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(port, path="/"):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False).status_code in (200, 404):
                return
        time.sleep(0.01)
    raise SystemExit("a server does not start")


def compare(seconds, rounds):
    with tempfile.TemporaryDirectory() as folder:
        people_file = f"{folder}/people.json"
        with server("serve_bare", 8791), server("serve_videofly", 8792, people_file):
            people, ratios = json.loads(Path(people_file).read_text()), {order: [], webhook: []}
            for n in range(rounds + 1):
                plain = uvloop.run(accepted_per_second(8791, order, people, seconds))
                print(f"round {n}" if n else "warm-up", f"bare {plain:.0f}/s", sep=": ", end="")
                for make, counted in ratios.items():
                    found = uvloop.run(accepted_per_second(8792, make, people, seconds))
                    counted.append(found / plain)
                    print(f", {make.__name__}s {found:.0f}/s, ratio {found / plain:.3f}", end="")
                print()
    for make, (_, *counted) in ratios.items():
        median = statistics.median(counted)
        print(f"{make.__name__}s / bare: median {median:.3f}, min {min(counted):.3f}, max {max(counted):.3f}")


# --- the real server at rest


def start_and_rest(rounds):
    ready, memory = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            environ = os.environ | {"VIDEOFLY_DATA": folder, "VIDEOFLY_PORT": "8793"}
            began = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "videofly", "serve"],
                env=environ,
                stdout=subprocess.DEVNULL,
                cwd=v.HERE,
            )
            wait_for(8793, "/readyz")
            ready.append(time.perf_counter() - began)
            time.sleep(1)  # let what start left behind be freed
            status = Path(f"/proc/{process.pid}/status").read_text()
            memory.append(int(status.split("VmRSS:")[1].split()[0]) / 1024)
            process.terminate()
            process.wait()
    print(
        f"start to ready: median {statistics.median(ready):.2f} s, min {min(ready):.2f}, max {max(ready):.2f}"
    )
    print(f"idle memory: median {statistics.median(memory):.0f} MiB, max {max(memory):.0f}")


def main():
    if len(sys.argv) > 2 and sys.argv[1].startswith("serve_"):
        uvloop.run(globals()[sys.argv[1]](int(sys.argv[2]), *(sys.argv[3:] or [None])))
        return
    seconds, rounds = float((sys.argv[1:] or [3])[0]), int((sys.argv[2:] or [5])[0])
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    print(f"{versions}, {os.cpu_count()} cores, {CONNECTIONS} connections, {PEOPLE} people")
    compare(seconds, rounds)
    start_and_rest(5)


if __name__ == "__main__":
    main()
