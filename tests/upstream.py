"""Outside video providers, acted out over a real socket: each one's own words, and all that goes wrong.

    with Upstream("fal") as upstream:               # or openai, replicate, comfyui, or a manual of your own
        upstream.timeline = ["queued", ("running", 40), "succeeded"]            # what each poll finds
        upstream.next("submit", reset_after())      # the first order is taken, and the answer to it lost
        upstream.always("content", cut(100))        # no result ever comes whole
        ...
        assert upstream.paid == 1

A request belongs to a step: submit, poll, result (JSON that names the video), content (its bytes), cancel,
upload, list, queue, keys; or it is unauthorized or unknown, which the product should never be.  No clock
moves a job: it moves when it is polled, or told."""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import json
import re
import socket
import struct
import threading
import time
import traceback
import uuid
import zlib
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import httpx
import openai.types as openai_types
from Crypto.PublicKey import ECC  # minio brings it
from Crypto.Signature import eddsa

from conftest import tiny_video

ENDED = ("succeeded", "failed", "canceled")
MP4 = {"content-type": "video/mp4"}
BEARER = {"authorization": "Bearer {key}"}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
FLAGGED = "The prompt was flagged as sensitive by our content policy (E005)"


class big_result:  # noqa: N801  # reads like a function, and holds one chunk
    """A real video of about so many bytes, most of them padding that every player skips."""

    def __init__(self, n_bytes):
        self.video = tiny_video()
        self.padding = max(n_bytes - len(self.video) - 16, 0)

    def __len__(self):
        return len(self.video) + 16 + self.padding

    def __iter__(self):
        yield self.video + struct.pack(">I4sQ", 1, b"free", 16 + self.padding)
        chunk = bytes(1 << 16)
        for left in range(self.padding, 0, -len(chunk)):
            yield chunk[:left]


@dataclasses.dataclass
class Answer:
    """body is bytes, a big_result, or anything that becomes JSON."""

    status: int = 200
    body: object = b""
    headers: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.body, bytes | big_result):
            self.body = json.dumps(self.body).encode()
            self.headers = {"content-type": "application/json"} | self.headers


class Refused(Exception):
    """Raised by an act: the provider answers this, and does nothing."""

    def __init__(self, status, body, headers=()):
        self.answer = Answer(status, body, dict(headers))


# Faults: what happens to one request.  Combine them with dataclasses.replace.


@dataclasses.dataclass
class Fault:
    first: object = None  # called before the request is looked at; here a test moves the world for a race
    taken: bool = True  # the provider acts on the request before things go wrong
    delay: float = 0  # seconds before the answer
    hold: object = None  # a threading.Event: no answer before it is set
    reset: bool = False  # the line breaks where the answer, or what is left of it, should be
    answer: Answer | None = None  # comes in place of the true one
    told: bool = True  # the answer says how long it is
    cut: int | None = None  # the line ends after so many bytes of the body
    drip: tuple | None = None  # (bytes, seconds between them)


def refuse(status, body=None, **headers):
    """A plain no: nothing was done."""
    headers = {name.replace("_", "-"): str(text) for name, text in headers.items()}
    body = {"error": {"message": f"refused with {status}", "code": str(status)}} if body is None else body
    return Fault(taken=False, answer=Answer(status, body, headers))


def instead(status, body, **headers):
    """All was done, and something else is answered."""
    return dataclasses.replace(refuse(status, body, **headers), taken=True)


throttled = lambda retry_after=30: refuse(429, retry_after=retry_after)
missing = lambda: refuse(404)
reset_before = lambda: Fault(taken=False, reset=True)  # nothing was done
reset_after = lambda: Fault(reset=True)  # all was done
lost = lambda status=500: instead(status, b"<html>Bad gateway</html>", content_type="text/html")
slow = lambda seconds: Fault(delay=seconds)
held = lambda gate: Fault(hold=gate)  # until gate.set()
drip = lambda size=1, pause=0.01: Fault(drip=(size, pause))
cut = lambda after, told=True, reset=False: Fault(cut=after, told=told, reset=reset)  # untold it looks whole
unsized = lambda: Fault(told=False)  # whole, and only the end of the line says so
redirect = lambda url, status=302: instead(status, b"", location=url)
html = lambda: instead(200, b"<!doctype html><title>Sign in</title>" + b" " * 4096, content_type="video/mp4")
json_video = lambda: instead(200, b'{"error": {"message": "Video not ready"}}', content_type="video/mp4")


def bomb(n_bytes=1 << 28):
    """A small gzip which becomes a large video."""
    return instead(200, zipped(n_bytes), content_type="video/mp4", content_encoding="gzip")


@functools.cache
def zipped(n_bytes):
    packer = zlib.compressobj(9, wbits=31)
    return b"".join([*map(packer.compress, big_result(n_bytes)), packer.flush()])


# What is said: requests, callbacks, jobs.


Part = collections.namedtuple("Part", "name filename type data")  # of a multipart form


class Request:
    def __init__(self, origin, method, target, headers, body):
        self.origin, self.method = origin, method  # origin: api or cdn
        self.headers, self.body = headers, body
        self.path, _, query = target.partition("?")  # as it was sent, percent signs and all
        self.query = dict(parse_qsl(query, keep_blank_values=True))
        self.step = self.job = None

    def __repr__(self):
        return f"{self.method} {self.path} ({self.step})"

    @property
    def json(self):
        """None when the body is not JSON."""
        with contextlib.suppress(ValueError):
            return json.loads(self.body)

    @functools.cached_property
    def parts(self):
        """Those of a multipart form; none of anything else."""
        kind = self.headers.get("content-type", "")
        found = re.fullmatch(r'multipart/form-data;.*boundary="?([^";]+)"?', kind)
        pieces = (b"\r\n" + self.body).split(b"\r\n--" + found[1].encode())[1:-1] if found else []
        return [self.part(*piece.removeprefix(b"\r\n").split(b"\r\n\r\n", 1)) for piece in pieces]

    @staticmethod
    def part(head, data):
        said = {word.lower(): text for word, text in re.findall(r'(\w+)="([^"]*)"', head.decode())}
        kind = re.search(r"(?im)^content-type: *([^\r\n]+)", head.decode())
        return Part(said.get("name"), said.get("filename"), kind[1] if kind else "text/plain", data)

    @property
    def fields(self):
        """What is ordered, from a form (its text fields) or from JSON."""
        texts = {part.name: part.data.decode() for part in self.parts if part.filename is None}
        return texts or self.json or {}

    def file(self, name):
        return next((part for part in self.parts if part.name == name and part.filename is not None), None)


@dataclasses.dataclass
class Callback:
    """To an app without a socket: client.post(each.path, content=each.body, headers=each.headers)."""

    job: object
    event: str  # start or completed
    url: str
    headers: dict
    body: bytes
    sent: bool = False

    @property
    def path(self):
        parts = urlsplit(self.url)
        return parts.path + (f"?{parts.query}" if parts.query else "")

    def forged(self):
        """By somebody who knows the address but for the secret at its end."""
        return dataclasses.replace(self, url=re.sub(r"[^/]+$", lambda end: "0" * len(end[0]), self.url))

    def badly_signed(self):
        """The same with a space put into the body after it was signed."""
        return dataclasses.replace(self, body=self.body[:-1] + b" }")


class Job:
    """A video at the provider.  Setting its state ends the time-line, shows in polls and makes callbacks."""

    def __init__(self, upstream, id, request, callback_url, tell, sign, events):
        self.upstream, self.id, self.request, self.order = upstream, id, request, request.fields
        self.callback_url, self.tell, self.sign, self.events = callback_url, tell, sign, events
        self.timeline = list(upstream.timeline)
        self.result, self.error, self.shape = upstream.result, upstream.error, upstream.shape
        self.progress = self.polls = self.issued = self.dead = 0
        self.gone = self.answered = self.started = False
        self.created_at, self.ended_at = int(upstream.clock()), None
        self.dead_status, self._state = 403, "queued"

    @property
    def state(self):
        return self._state

    @state.setter
    def state(self, state):
        self.timeline = []
        self.become(state)

    def become(self, state):
        if state == self._state:
            return
        self._state = state
        self.progress = 100 if state == "succeeded" else self.progress
        self.started = self.started or state == "running"
        self.ended_at = int(self.upstream.clock()) if state in ENDED else None
        if state == "failed":
            self.error = self.error or {"code": "internal_error", "message": "The model stopped."}
        event = "completed" if state in ENDED else "start" if state == "running" else None
        if self.callback_url and event in self.events:
            self.upstream.outbox.append(self.callback(event))
            self.upstream.nudge()

    def poll(self):
        """Somebody asks: the next thing on the time-line comes true."""
        self.polls += 1
        if self.timeline:
            state = self.timeline.pop(0)
            state, self.progress = state if isinstance(state, tuple) else (state, self.progress)
            self.become(state)
        return self

    def cancel(self):
        """False when it was too late.  A provider may say yes and go on: upstream.obeys = False."""
        wanted = self.state not in ENDED
        if wanted and self.upstream.obeys:
            self.state = "canceled"
        return wanted

    def expire_links(self, status=403, *, renewable=True):
        """The links told so far are dead (or the first, when none was told); a new poll names a new one."""
        self.dead = max(self.issued, 1) if renewable else 1 << 60
        self.dead_status = status

    @property
    def done(self):
        return self.state == "succeeded" and self.result is not None

    @property
    def failed(self):
        return self.state == "failed"

    @property
    def links(self):
        """A new link to the result in a list, which is empty while there is none."""
        self.issued += self.done
        return [f"{self.upstream.cdn_url}/{quote(self.id, safe='')}/{self.issued}.mp4"] if self.done else []

    def word(self, words):
        """The state as this provider says it; upstream.words overrules, to act a gateway."""
        return (words | self.upstream.words)[self.state]

    def callback(self, event="completed"):
        body = json.dumps(self.tell(self, event)).encode()
        headers = {"content-type": "application/json"} | (self.sign(self, body) if self.sign else {})
        return Callback(self, event, self.callback_url, headers, body)


def standard_signature(secret, id, timestamp, body):
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = hmac.digest(key, f"{id}.{timestamp}.".encode() + body, "sha256")
    return "v1," + base64.b64encode(signed).decode()


def fal_signature(key, request_id, user_id, timestamp, body):
    said = "\n".join([request_id, user_id, str(timestamp), hashlib.sha256(body).hexdigest()])
    return eddsa.new(key, "rfc8032").sign(said.encode()).hex()


def kie_signature(secret, task_id, timestamp):
    signed = hmac.digest(secret.encode(), f"{task_id}.{timestamp}".encode(), "sha256")
    return base64.b64encode(signed).decode()


class Upstream:
    """A provider on its own thread.  Its results lie on another origin, which refuses our credentials."""

    key = "upstream-key"
    secret = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYX"  # signs Standard Webhooks
    kie_secret, fal_user = "kie-secret", "user-1"
    # How new jobs go; on_job(job) may change each one.
    timeline, result, error, shape, on_job = ["succeeded"], None, None, None, None
    # How callbacks go: None (they wait in outbox), on time, early, twice, reordered, forged.
    callbacks = None
    obeys = True  # a cancel stops the job
    words = {}  # our state -> what is said in place of the provider's own word
    # Of openai: openai, vllm or sglang; the HTTP status of a poll that finds a failed job (None: as the
    # dialect has it); results lie elsewhere, and content is 400; the only model; the project's callbacks;
    # whether it says only what OpenAI's own package would.
    dialect, failed_status, cloud, model, project_webhook = "openai", None, False, None, None
    official = False
    # Of comfyui: has the newer /api/jobs; takes the caller's prompt_id; where outputs stand; what is wrong.
    has_jobs, takes_prompt_id, outputs_under, node_errors = True, True, "images", {}
    filtered = ()  # why Gemini leaves out samples

    def __init__(self, *names, clock=time.time, **switches):
        """switches: any of the above by name."""
        self.result, self.clock = tiny_video(), clock
        for name, value in switches.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self.requests, self.jobs, self.outbox, self.delivered, self.errors = [], {}, [], [], []
        self.paid, self.routes, self.faults, self.uploads, self.ports = 0, [], {}, {}, {"api": 0, "cdn": 0}
        self.keys = [ECC.generate(curve="Ed25519")]  # the last one signs, for fal
        self.route("content", "*", "/{id}/{n}.mp4", self.serve_link, origin="cdn")
        for name in names:
            FORMATS[name](self)

    # For tests

    def next(self, step, *faults):
        """The next requests of the step meet these, one each; None lets one pass."""
        script = self.faults.get(step, [])
        self.faults[step] = [*([] if isinstance(script, Fault) else script), *faults]

    def always(self, step, fault):
        """Every request of the step meets it, until told otherwise (None)."""
        self.faults[step] = fault if fault else []

    def moderate(self, shape):
        """All that is ordered from now on is found unfit, and this is how it is said."""
        self.timeline = ["failed"]
        if shape == "400 at submit":
            said = {"message": FLAGGED, "type": "invalid_request_error", "code": "moderation_blocked"}
            self.always("submit", refuse(400, {"error": said}))
        elif shape == "zero samples":
            self.timeline, self.result, self.filtered = ["succeeded"], None, [FLAGGED]
        else:
            self.error = {
                "422 at result": {"code": "content_policy_violation", "message": FLAGGED},
                "failed with text": {"code": "", "message": FLAGGED},
                "failed with code": {"code": "moderation_blocked", "message": "Failed."},
                "code 501": {"code": "501", "message": FLAGGED},
            }[shape]

    def forget(self):
        """A restart of a server that keeps its jobs in memory."""
        for job in self.jobs.values():
            job.gone = True

    def count(self, step):
        return sum(request.step == step for request in self.requests)

    async def until(self, met, within_s=10):
        """Wait for what the provider's own thread brings about; from a plain test: asyncio.run(...)."""
        async with asyncio.timeout(within_s):
            while not met():
                await asyncio.sleep(0.002)

    async def deliver(self, *callbacks):
        """Send callbacks in this order; returns the status of each answer, or the exception."""
        sending = asyncio.run_coroutine_threadsafe(self.send_callbacks(callbacks), self.loop)
        return await asyncio.wrap_future(sending)

    # For formats

    def route(self, step, method, path, act, *, origin="api", needs=None):
        """act(request, **what the path's {braces} hold) returns an Answer, a status with JSON, or JSON.
        {name:path} spans slashes; needs are headers, without which the answer is 401."""
        pattern = re.sub(r"\{(\w+):path\}", r"(?P<\1>.+)", path)
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern)
        self.routes.append((origin, method, re.compile(pattern), step, act, needs or {}))

    def take(self, request, id, *, callback_url=None, tell=None, sign=None, events=("completed",)):
        """An order is accepted, and costs money."""
        self.paid += 1
        job = request.job = self.jobs[id] = Job(self, id, request, callback_url, tell, sign, events)
        if self.on_job:
            self.on_job(job)
        return job

    def new_id(self, prefix):
        """Another can be put in its place: upstream.new_id = lambda prefix: "x" * 1000 + "=="."""
        return f"{prefix}{self.paid + 1}"

    def find(self, id, otherwise=None):
        job = self.jobs.get(id)
        if job is None or job.gone:
            raise Refused(404, otherwise or {"error": {"message": "not found", "code": "not_found"}})
        return job

    def serve_link(self, request, id, n):
        """The CDN: signed links bind the verb, and cannot stand a second way to sign in."""
        if request.method != "GET":
            raise Refused(405, {"error": "method not allowed"})
        if {"authorization", "x-goog-api-key", "cookie"} & set(request.headers):
            raise Refused(400, {"error": "only one auth mechanism allowed"})
        job = self.find(id)
        if int(n) <= job.dead:
            raise Refused(job.dead_status, {"error": "link expired"})
        return Answer(200, job.result, MP4) if job.done else (404, {"error": "no such file"})

    def documented(self, submit, poll, *, took, told, cancel=None, callback=None, sign=None, needs=BEARER,
                   prefix="task-", events=("completed",), tell=None):
        """A provider from its manual: "POST /path", "GET /path/{id}" or "GET /path?name={id}", the order's
        field for a callback; took(job) answers an order, told(job) a poll, and callbacks say the same."""
        verb, path = submit.split()
        asks, where = poll.split()
        where, _, query = where.partition("?")

        def take(request, **_):
            url = request.json.get(callback) if callback else None
            say = tell or (lambda job, event: told(job))
            id = self.new_id(prefix)
            return took(self.take(request, id, callback_url=url, tell=say, sign=sign, events=events))

        def look(request, id=None, **_):
            return told(self.find(id or request.query.get(query.partition("=")[0])).poll())

        def drop(request, id):
            job = self.find(id)
            job.gone = not job.cancel()  # of a finished one it removes the record
            return 204, b""

        self.route("submit", verb, path, take, needs=needs)
        self.route("poll", asks, where, look, needs=needs)
        if cancel:
            self.route("cancel", *cancel.split(), drop, needs=needs)

    def sign_standard(self, job, body):
        id, now = f"msg_{len(self.outbox)}", int(self.clock())
        signature = standard_signature(self.secret, id, now, body)
        return {"webhook-id": id, "webhook-timestamp": str(now), "webhook-signature": signature}

    def sign_fal(self, job, body):
        said = [job.id, self.fal_user, str(int(self.clock()))]
        names = ["Request-Id", "User-Id", "Timestamp", "Signature"]
        signature = fal_signature(self.keys[-1], *said, body)
        return {f"X-Fal-Webhook-{name}": text for name, text in zip(names, [*said, signature], strict=True)}

    def sign_kie(self, job, body):
        now = str(int(self.clock()))
        signature = kie_signature(self.kie_secret, job.id, now)
        return {"X-Webhook-Timestamp": now, "X-Webhook-Signature": signature}

    # The server

    def start(self):
        """Also again after stop(), at the same address and with what it knew."""
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run(ready)), daemon=True)
        self.thread.start()
        assert ready.wait(10), "the provider does not start"
        self.url, self.cdn_url = (f"http://127.0.0.1:{self.ports[origin]}" for origin in ("api", "cdn"))
        return self

    def stop(self):
        """Every line is cut; from now on connections are refused."""
        self.loop.call_soon_threadsafe(self.stopping.set)
        self.thread.join(10)

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, *_):
        if self.thread.is_alive():
            self.stop()
        assert kind or not self.errors, "\n".join(self.errors)

    async def run(self, ready):
        self.loop, self.stopping, self.sending = asyncio.get_running_loop(), asyncio.Event(), asyncio.Lock()
        self.tasks, self.lines = set(), set()
        async with contextlib.AsyncExitStack() as stack:
            for origin, port in self.ports.items():
                serve = functools.partial(self.serve, origin)
                server = await asyncio.start_server(serve, "127.0.0.1", port)
                stack.callback(server.close)
                self.ports[origin] = server.sockets[0].getsockname()[1]
            client = httpx.AsyncClient(trust_env=False, verify=False, timeout=15)
            self.client = await stack.enter_async_context(client)
            ready.set()
            await self.stopping.wait()
            for line in self.lines:
                line.transport.abort()

    async def serve(self, origin, reader, writer):
        self.lines.add(writer)
        try:
            while request := await read_request(origin, reader):
                if not await self.answer(request, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # they hung up, or we stop
        finally:
            self.lines.discard(writer)
            writer.close()

    async def answer(self, request, writer):
        """True when the line can carry another request."""
        act, request.step = self.match(request)
        script = self.faults.get(request.step, [])
        fault = script if isinstance(script, Fault) else (script.pop(0) if script else None) or Fault()
        self.requests.append(request)
        if fault.first:
            fault.first()
        answer = self.perform(act, request) if fault.taken else None
        if request.job and self.callbacks == "early":
            if request.job.state not in ENDED:
                request.job.state = "succeeded"
            await self.send_callbacks(self.due(request.job))
        await asyncio.sleep(fault.delay)
        while fault.hold and not fault.hold.is_set():
            await asyncio.sleep(0.002)
        try:
            if fault.reset and fault.cut is None:
                return reset(writer)
            return await write_answer(writer, request, fault.answer or answer, fault)
        finally:
            if request.job:
                request.job.answered = True
                self.nudge()

    def match(self, request):
        for origin, method, pattern, step, act, needs in self.routes:
            found = pattern.fullmatch(request.path)
            if origin == request.origin and method in ("*", request.method) and found:
                for name, text in needs.items():
                    if request.headers.get(name) != text.format(key=self.key):
                        return (lambda request: (401, {"detail": "Unauthenticated"})), "unauthorized"
                names = {name: unquote(text) for name, text in found.groupdict().items()}
                return functools.partial(act, **names), step
        return (lambda request: (404, {"detail": "Not Found"})), "unknown"

    def perform(self, act, request):
        try:
            said = act(request)
        except Refused as refused:
            return refused.answer
        except Exception:  # of the test's own act: the test shall fail, not the product look bad
            self.errors.append(traceback.format_exc())
            return Answer(500, {"detail": "the simulator broke"})
        if isinstance(said, tuple):
            return Answer(*said)
        return said if isinstance(said, Answer) else Answer(200, said)

    def nudge(self):
        """Send the callbacks that are due, from whichever thread this is called."""
        with contextlib.suppress(RuntimeError):  # we are stopped
            self.loop.call_soon_threadsafe(self.flush)

    def flush(self):
        if self.callbacks and (due := self.due()):
            task = asyncio.ensure_future(self.send_callbacks(due))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    def due(self, job=None):
        """What goes out now: of this job, or of all whose order was answered."""
        due = [each for each in self.outbox if each.job is job or (job is None and each.job.answered)]
        due = [each for each in due if not each.sent]
        if self.callbacks == "reordered":
            due = [each for each in reversed(due) if each.job.state in ENDED]
        for each in due:
            each.sent = True
        if self.callbacks == "forged":
            due = [each.forged() for each in due]
        return [each for each in due for _ in range(2 if self.callbacks == "twice" else 1)]

    async def send_callbacks(self, callbacks):
        """One after the other; delivered holds (callback, status or exception)."""
        async with self.sending:
            start = len(self.delivered)
            for each in callbacks:
                try:
                    said = await self.client.post(each.url, content=each.body, headers=each.headers)
                    self.delivered.append((each, said.status_code))
                except httpx.HTTPError as failure:
                    self.delivered.append((each, failure))
            return [said for _, said in self.delivered[start:]]


async def read_request(origin, reader):
    """None at the end of the line."""
    if not (line := await reader.readline()):
        return None
    method, target, _ = line.decode("latin-1").split()
    headers = {}
    while (line := await reader.readline()) not in (b"\r\n", b""):
        name, _, text = line.decode("latin-1").partition(":")
        headers[name.lower()] = text.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    return Request(origin, method, target, headers, body)


async def write_answer(writer, request, answer, fault):
    body, head = answer.body, {"content-type": "application/octet-stream"} | answer.headers
    head |= {"content-length": str(len(body))} if fault.told else {"connection": "close"}
    lines = [f"HTTP/1.1 {answer.status} ", *(f"{name}: {text}" for name, text in head.items())]
    writer.write("\r\n".join([*lines, "\r\n"]).encode("latin-1"))
    left = len(body) if fault.cut is None else min(fault.cut, len(body))
    for chunk in [body] if isinstance(body, bytes) else body:
        chunk = chunk[:left]
        left -= len(chunk)
        size, pause = fault.drip or (len(chunk) or 1, 0)
        for start in range(0, 0 if request.method == "HEAD" or answer.status == 204 else len(chunk), size):
            writer.write(chunk[start : start + size])
            await writer.drain()
            await asyncio.sleep(pause)
        if not left:
            break
    await writer.drain()
    return reset(writer) if fault.reset else fault.told and fault.cut is None


def reset(writer):
    """A reset, not a polite end."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


# The providers


def openai(up):
    """POST /v1/videos and its family, as up.dialect speaks it."""
    words = {"queued": "queued", "running": "in_progress", "succeeded": "completed", "failed": "failed"}
    words |= {"canceled": "cancelled"}

    def no(status, message, code=None):
        said = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        raise Refused(status, {"error": said})

    def video(job):
        said = {
            "id": job.id, "object": "video", "model": job.order.get("model"), "status": job.word(words),
            "progress": job.progress, "created_at": job.created_at, "completed_at": job.ended_at,
            "expires_at": job.ended_at and job.ended_at + 3600, "prompt": job.order["prompt"],
            "seconds": str(job.order.get("seconds", 4)), "size": job.order.get("size", "720x1280"),
            "error": job.error if job.failed else None,
        } | ({"url": next(iter(job.links), None)} if up.cloud else {})
        return openai_types.Video.model_validate(said).model_dump(mode="json") if up.official else said

    def submit(request):
        order, wrong = request.fields, 400 if up.dialect == "openai" else 422
        if up.dialect == "vllm" and not request.parts:
            no(422, "multipart/form-data only")
        seconds = order.get("seconds")
        kind = int if up.dialect == "sglang" and not request.parts else str
        if not order.get("prompt"):
            no(wrong, "prompt is missing")
        if seconds is not None and (type(seconds) is not kind or not re.fullmatch(r"[1-9]\d*", str(seconds))):
            no(wrong, "seconds: wrong type or value", "invalid_type")
        if not re.fullmatch(r"\d+x\d+", order.get("size", "720x1280")):
            no(wrong, "size: not WIDTHxHEIGHT")
        if up.model and order.get("model", up.model) != up.model:
            no(400, "not the served model", "model_not_found")
        if not isinstance(order.get("input_reference", {}), dict):
            no(wrong, "input_reference: neither a file nor an object", "invalid_type")
        return video(up.take(request, up.new_id("video_"), callback_url=up.project_webhook, tell=thin,
                             sign=up.sign_standard))

    def thin(job, event):
        kind = "video.completed" if job.state == "succeeded" else "video.failed"
        return {"id": f"evt_{job.id}", "object": "event", "created_at": int(up.clock()), "type": kind,
                "data": {"id": job.id}}

    def poll(request, id):
        job = up.find(id).poll()
        if not job.failed:
            return video(job)
        code, usual = job.error.get("code"), 500 if up.dialect == "vllm" else 200
        return up.failed_status or (code if isinstance(code, int) else usual), video(job)

    def content(request, id):
        job = up.find(id)
        if job.failed and up.dialect == "vllm":
            no(422, "the job failed")
        if up.cloud:
            no(400, "uploaded elsewhere: see url")
        return Answer(200, job.result, MP4) if job.done else no(404, "Video is not ready yet")

    def delete(request, id):
        job = up.find(id)
        if up.dialect == "openai" and job.state not in ENDED:
            no(409, "only finished videos can be deleted")
        if up.dialect == "vllm":
            job.cancel()
        job.gone = True  # SGLang forgets it, and computes on
        return {"id": id, "object": "video.deleted", "deleted": True}

    def list_all(request):
        found = [video(job) for job in up.jobs.values() if not job.gone]
        return {"object": "list", "data": found[::-1], "has_more": False}

    for step, method, path, act in [
        ("submit", "POST", "", submit), ("list", "GET", "", list_all), ("poll", "GET", "/{id}", poll),
        ("content", "GET", "/{id}/content", content), ("cancel", "DELETE", "/{id}", delete),
    ]:
        up.route(step, method, f"/v1/videos{path}", act, needs=BEARER)


def fal(up):
    """The queue: COMPLETED says only that the result may be asked for, and that may be a refusal."""
    words = dict.fromkeys(ENDED, "COMPLETED") | {"queued": "IN_QUEUE", "running": "IN_PROGRESS"}

    def find(app, id):
        job = up.find(id, {"detail": "Request not found"})
        if app != job.app:
            raise Refused(405, {"detail": "Method Not Allowed"})  # asked with the subpath
        return job

    def payload(job):
        files = [{"url": url, "content_type": "video/mp4", "file_name": "a.mp4"} for url in job.links]
        shapes = {"video": files and files[0], "videos": files, "video_url": files and files[0]["url"]}
        shape = job.shape or "video"
        return {"seed": 1} | ({shape: shapes[shape]} if files else {})

    def refusal(job):
        if kind := job.error.get("error_type"):
            return 503, {"detail": job.error["message"], "error_type": kind}, {"X-Fal-Error-Type": kind}
        detail = {"loc": ["body", "prompt"], "msg": job.error["message"], "type": job.error.get("code")}
        return 422, {"detail": [detail]}, {"X-Fal-Retryable": "false"}

    def tell(job, event):
        said = {"request_id": job.id, "gateway_request_id": job.id, "status": "ERROR" if job.failed else "OK"}
        if job.failed:
            return said | {"error": job.error["message"], "payload": refusal(job)[1]}
        return said | {"payload": payload(job)}

    def submit(request, app):
        if not (request.json or {}).get("prompt"):
            detail = {"loc": ["body", "prompt"], "msg": "Field required", "type": "missing"}
            raise Refused(422, {"detail": [detail]})
        job = up.take(request, up.new_id("req-"), callback_url=request.query.get("fal_webhook"), tell=tell,
                      sign=up.sign_fal)
        parts = app.split("/")
        job.app = "/".join(parts[: 3 if parts[0] in ("workflows", "comfy") else 2])
        return status(job)[1] | {"queue_position": 0}

    def status(job):
        url = f"{up.url}/{job.app}/requests/{job.id}"
        said = {"request_id": job.id, "status": job.word(words), "response_url": url, "logs": []}
        said |= {"status_url": url + "/status", "cancel_url": url + "/cancel"}
        if job.failed and "error_type" in job.error:
            said |= {"error": job.error["message"], "error_type": job.error["error_type"]}
        return 200 if job.state in ENDED else 202, said

    def result(request, app, id):
        job = find(app, id)
        if job.state == "canceled":
            raise Refused(404, {"detail": "Request was cancelled"})
        if job.state not in ENDED:
            raise Refused(400, {"detail": "Request is still in progress"})
        return refusal(job) if job.failed else payload(job)

    def cancel(request, app, id):
        job = find(app, id)
        waited = job.state == "queued"
        if job.cancel():
            return 200 if waited else 202, {"status": "CANCELLATION_REQUESTED"}
        return 400, {"status": "ALREADY_COMPLETED"}

    def jwks(request):
        raw = [key.public_key().export_key(format="raw") for key in up.keys]
        x = [base64.urlsafe_b64encode(each).decode().rstrip("=") for each in raw]
        return {"keys": [{"kty": "OKP", "crv": "Ed25519", "x": each} for each in x]}

    needs, request = {"authorization": "Key {key}"}, "/{app:path}/requests/{id}"
    up.route("keys", "GET", "/.well-known/jwks.json", jwks)
    up.route("poll", "GET", request + "/status", lambda _, **ids: status(find(**ids).poll()), needs=needs)
    up.route("cancel", "PUT", request + "/cancel", cancel, needs=needs)
    up.route("result", "GET", request, result, needs=needs)
    up.route("submit", "POST", "/{app:path}", submit, needs=needs)


def replicate(up):
    words = {"queued": "starting", "running": "processing"} | {word: word for word in ENDED}

    def prediction(job, event=None):
        links, url = job.links, f"{up.url}/v1/predictions/{job.id}"
        shapes = {"list": links, "string": links and links[0], "object": {"video": links and links[0]}}
        return {
            "id": job.id, "status": job.word(words), "input": job.order["input"], "logs": "",
            "output": shapes[job.shape or "string"] if links else None, "version": job.order.get("version"),
            "error": job.error["message"] if job.failed else None, "metrics": {},
            "data_removed": job.state == "succeeded" and not links,
            "urls": {"get": url, "cancel": url + "/cancel"},
        }

    def submit(request, **model):
        order = request.json or {}
        if not isinstance(order.get("input"), dict) or ("version" in order) == bool(model):
            detail = "- input is required\n- version is required, but for an official model\n"
            raise Refused(422, {"title": "Input validation failed", "detail": detail, "status": 422})
        events = order.get("webhook_events_filter", ["output", "completed"])
        job = up.take(request, up.new_id("prediction"), callback_url=order.get("webhook"), tell=prediction,
                      sign=up.sign_standard, events=events)
        return 201, prediction(job)

    def cancel(request, id):
        job = up.find(id)
        job.cancel()
        return prediction(job)

    for step, method, path, act in [
        ("submit", "POST", "predictions", submit),
        ("submit", "POST", "models/{owner}/{name}/predictions", submit),
        ("poll", "GET", "predictions/{id}", lambda _, **ids: prediction(up.find(**ids).poll())),
        ("cancel", "POST", "predictions/{id}/cancel", cancel),
        ("keys", "GET", "webhooks/default/secret", lambda _: {"key": up.secret}),
    ]:
        up.route(step, method, f"/v1/{path}", act, needs=BEARER)


def comfyui(up):
    """Polled by /history, or by the newer /api/jobs where up.has_jobs; knows no callbacks and no keys."""

    def upload(request):
        part = request.file("image")
        name, n = part.filename, 0
        while name in up.uploads and request.fields.get("overwrite") != "true":
            n += 1
            name = re.sub(r"(\.\w+)?$", rf" ({n})\1", part.filename, count=1)
        up.uploads[name] = part.data
        return {"name": name, "subfolder": request.fields.get("subfolder", ""), "type": "input"}

    def submit(request):
        order = request.json
        id = order.get("prompt_id") if up.takes_prompt_id else None
        nodes = order["prompt"].values()
        images = [node["inputs"].get("image") for node in nodes if node.get("class_type") == "LoadImage"] \
            if "nodes" not in order["prompt"] else [None]
        if not set(images) <= set(up.uploads) or (id and not UUID.fullmatch(id)):
            error = {"type": "prompt_outputs_failed_validation", "message": "Invalid prompt", "details": ""}
            raise Refused(400, {"error": error, "node_errors": {}})
        job = up.take(request, id or str(uuid.uuid4()))
        return {"prompt_id": job.id, "number": up.paid, "node_errors": up.node_errors}

    def outputs(job):
        file = {"filename": f"{job.id}.mp4", "subfolder": "video", "type": "output", "format": "video/mp4"}
        node = list(job.order["prompt"])[-1]
        return {node: {up.outputs_under: [file], "animated": [True]}} if job.done else {}

    def history(request, id):
        job = up.jobs.get(id)
        deleted = job and job.state == "canceled" and not job.started
        if not job or job.gone or deleted or job.poll().state not in ENDED:
            return {}
        messages = [["execution_start", {"prompt_id": id}]]
        if job.failed:
            said = {"exception_message": job.error["message"], "exception_type": job.error.get("code")}
            messages.append(["execution_error", said | {"node_id": "3", "node_type": "KSampler"}])
        elif job.state == "canceled":
            messages.append(["execution_interrupted", {"node_id": "3"}])
        said = {"status_str": "success" if job.state == "succeeded" else "error", "messages": messages}
        said["completed"] = job.state == "succeeded"
        return {id: {"prompt": [1, id, job.order["prompt"], {}, []], "outputs": outputs(job), "status": said}}

    def queue(request):
        def those(state):
            found = [job for job in up.jobs.values() if job.state == state and not job.gone]
            return [[n, job.id, job.order["prompt"], {}, []] for n, job in enumerate(found)]

        return {"queue_running": those("running"), "queue_pending": those("queued")}

    def drop(request):
        for id in request.json.get("delete", []):
            if id in up.jobs and up.jobs[id].state == "queued":
                up.jobs[id].cancel()
        return 200, b""

    def interrupt(request):
        """Old servers do not read whom it is meant for."""
        id = (request.json or {}).get("prompt_id") if up.has_jobs else None
        for job in up.jobs.values():
            if job.state == "running" and id in (None, job.id):
                job.cancel()
        return 200, b""

    def jobs(request, id):
        words = {"queued": "pending", "running": "in_progress", "succeeded": "completed", "failed": "failed"}
        if not up.has_jobs:
            raise Refused(404, b"404: Not Found")
        job = up.find(id).poll()
        error = {"execution_error": {"exception_message": job.error["message"]}} if job.failed else {}
        state = job.word(words | {"canceled": "cancelled"})
        return {"id": id, "status": state, "outputs": outputs(job)} | error

    def cancel(request, id):
        if not up.has_jobs:
            raise Refused(404, b"404: Not Found")
        return {"cancelled": up.find(id).cancel()}

    def view(request):
        job = up.find(request.query["filename"].removesuffix(".mp4"))
        where = request.query.get("subfolder"), request.query.get("type")
        return Answer(200, job.result, MP4) if job.done and where == ("video", "output") else (404, b"")

    for prefix in ("", "/api"):
        for step, method, path, act in [
            ("upload", "POST", "/upload/image", upload), ("submit", "POST", "/prompt", submit),
            ("poll", "GET", "/history/{id}", history), ("queue", "GET", "/queue", queue),
            ("cancel", "POST", "/queue", drop), ("cancel", "POST", "/interrupt", interrupt),
            ("content", "GET", "/view", view),
        ]:
            up.route(step, method, prefix + path, act)
    up.route("poll", "GET", "/api/jobs/{id}", jobs)
    up.route("cancel", "POST", "/api/jobs/{id}/cancel", cancel)


FORMATS = {"openai": openai, "fal": fal, "replicate": replicate, "comfyui": comfyui}
