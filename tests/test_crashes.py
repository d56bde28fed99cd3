"""A power cut before and after every write, and before and after every call outside.

A scenario is what a stubborn client does: each request may be repeated, and carries its Idempotency-Key.  It
is run once, and at each point where power could be cut the world is kept as it is then: the data folder as
it lies on the disk, and what the provider knows.  Then the server is started on each of these worlds.  Worlds
that are equal to the byte need one start: within a transaction all are, as long as nothing escapes it before
its COMMIT.  So the cut is no exception that unwinds: it is what a restart finds.  (That SQLite and storage
wait for the disk cannot be shown here, where no disk forgets what it was told.)"""

import contextlib
import hashlib
import shutil
import sqlite3
import types

import httpx
import pytest

import videofly as v
from conftest import CATALOG, Clock, ScriptedProvider, books_are_right, person, rows, work

pytestmark = pytest.mark.anyio
ORDER = {"model": "told", "prompt": "a red fox over snow"}  # 10 credits
FINISHED = ("COMPLETED", "FAILED")
NOT_KEPT = ("videofly.db-shm", "lock")  # they are memory, not disk


class Wires:
    """Every point at which power could be cut, in order, with the world as it is there."""

    def __init__(self, world):
        self.world, self.points, self.worlds = world, [], {}

    @contextlib.contextmanager
    def around(self, what):
        self.keep(f"before {what}")
        yield
        self.keep(f"after {what}")

    def keep(self, point):
        """Keep the world, unless there is one like it."""
        self.points.append(point)
        look = self.world.fingerprint()
        if look not in self.worlds:
            self.worlds[look] = (point, self.world.copied(len(self.worlds)))


class Writer(sqlite3.Connection):
    """A connection whose statements are points."""

    wires = None

    def execute(self, sql, *params):
        return self.watched(super().execute, sql, *params)

    def executescript(self, sql):
        return self.watched(super().executescript, sql)

    def watched(self, call, sql, *params):
        with self.wires.around(" ".join(sql.split())[:60]) if self.wires else contextlib.nullcontext():
            return call(sql, *params)


class Maker(ScriptedProvider):
    """A provider that lives through the cut.  It keeps each job, by the video's id when it is repeatable;
    what becomes of a job depends on nothing but the maker's kind and the time that the job has had."""

    def __init__(self, repeatable, clock, kind="makes"):
        super().__init__(repeatable)
        self.clock, self.kind, self.jobs, self.wires = clock, kind, {}, None
        self.half_way = None  # awaited once, when half of a result was sent

    def twin(self, clock):
        twin = type(self)(self.repeatable, clock, self.kind)
        twin.jobs = dict(self.jobs)
        return twin

    def around(self, what):
        return self.wires.around(what) if self.wires else contextlib.nullcontext()

    async def submit(self, job):
        with self.around("submit"):
            if self.kind == "refuses":
                raise v.SubmitRefused("no foxes")
            ref = job.id if self.repeatable else f"{job.id}-{len(self.jobs)}"
            again = ref in self.jobs
            self.jobs.setdefault(ref, self.clock())
            if self.kind == "is lost" and not again:
                raise httpx.ReadTimeout("no answer")
            return ref

    async def fetch(self, ref):
        with self.around("fetch"):
            if ref not in self.jobs:
                return v.Snapshot("missing")
            if self.jobs[ref] == "canceled":
                return v.Snapshot("canceled")
            if self.clock() < self.jobs[ref] + 3:
                return v.Snapshot("running", 50)
            if self.kind == "fails":
                return v.Snapshot("failed", error="no foxes")
            return v.Snapshot("succeeded", 100, f"https://provider.test/{ref}")

    async def cancel(self, ref):
        with self.around("cancel"):
            if self.clock() < self.jobs[ref] + 3:
                self.jobs[ref] = "canceled"

    async def open_result(self, ref, url, *, part=False):
        with self.around("open_result"):
            yield self.result[:1000]
        if self.half_way:
            half_way, self.half_way = self.half_way, None
            await half_way()
        with self.around("the rest of the result"):
            yield self.result[1000:]


class WiredStorage:
    """The real storage, where each call is two points."""

    def __init__(self, storage, wires):
        self.storage, self.wires = storage, wires

    def __getattr__(self, name):
        return getattr(self.storage, name)

    async def put(self, key, *rest):
        with self.wires.around(f"put {key[-4:]}"):
            await self.storage.put(key, *rest)

    async def delete(self, key):
        with self.wires.around(f"delete {key[-4:]}"):
            await self.storage.delete(key)


class World:
    """What survives a power cut: the folder, the provider, the time, and a client who wants a video."""

    catalog, settings = CATALOG, {}

    def __init__(self, folder, provider, clock):
        self.folder, self.provider, self.clock, self.wires = folder, provider, clock, None
        folder.mkdir(exist_ok=True)
        (folder / "catalog.toml").write_text(self.catalog)

    def files(self):
        return sorted(file for file in self.folder.rglob("*") if file.is_file() and file.name not in NOT_KEPT)

    def fingerprint(self):
        digest = hashlib.blake2b()
        for file in self.files():
            content = file.read_bytes()
            digest.update(f"{file.relative_to(self.folder)}\0{len(content)}\0".encode() + content)
        digest.update(f"{self.provider.jobs}".encode())
        return digest.digest()

    def copied(self, n):
        folder = self.folder.with_name(f"{self.folder.name}-{n}")
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(*NOT_KEPT))
        clock = Clock()
        clock.t = self.clock.t
        return type(self)(folder, self.provider.twin(clock), clock)

    @contextlib.asynccontextmanager
    async def server(self, http):
        data, catalog = str(self.folder / "data"), str(self.folder / "catalog.toml")
        settings = v.Settings(data=data, catalog=catalog, **self.settings)
        providers = {"scripted": self.provider}
        async with v.open_app(settings, clock=self.clock, providers=providers) as app:
            if self.wires:
                app.storage = WiredStorage(app.storage, self.wires)
            http.opt["parts"] = app
            yield app


@pytest.fixture(scope="module")
def http():
    """The HTTP side, built once; each world's app is put behind it."""
    return v.http(types.SimpleNamespace(creem=None, settings=v.Settings()))


class Client:
    """Somebody with 30 credits who does not give up: the same requests again are the same wish."""

    def __init__(self, app, http):
        self.app, self.http = app, http

    async def arrive(self):
        with contextlib.suppress(v.EmailTaken):
            await person(self.app, "ada@example.com")
        user = await self.app.db.read(v.get_user, email="ada@example.com")
        await self.app.db.write(v.grant, user_id=user["id"], credits=30, trans_type="ORDER_PAY",
                                source_ref="order-1", note="", expires_at=None, now=self.app.now())
        self.key = v.new_api_key()
        await self.app.db.write(v.add_key, user_id=user["id"], new_key=self.key,
                                now=self.app.now())

    async def ask(self, method, path, **words):
        headers = {"Authorization": f"Bearer {self.key}", "Idempotency-Key": path}
        async with client_of_http(self.http) as client:
            return await client.request(method, f"/api/v1/video/{path}", headers=headers, **words)

    async def order(self):
        answer = await self.ask("POST", "generate", json=ORDER)
        assert answer.status_code == 201, answer.text
        self.id = answer.json()["data"]["videoUuid"]

    async def cancel(self):
        assert (await self.ask("POST", f"{self.id}/cancel")).status_code in (200, 409)

    async def delete(self):
        assert (await self.ask("DELETE", self.id)).status_code in (204, 404, 409)


def client_of_http(http):
    return httpx.AsyncClient(transport=httpx.ASGITransport(http), base_url="http://test")


# --- what happens


async def life(app, client, world):
    await client.arrive()
    await client.order()
    await work(app)


async def refusal(app, client, world):
    world.provider.kind = "refuses"
    await life(app, client, world)


async def failure(app, client, world):
    world.provider.kind = "fails"
    await life(app, client, world)


async def cancelled_while_it_is_made(app, client, world):
    await client.arrive()
    await client.order()
    await work(app, for_s=1)
    await client.cancel()
    await work(app)


async def cancelled_while_it_is_stored(app, client, world):
    world.provider.half_way = client.cancel
    await life(app, client, world)
    await client.cancel()
    await work(app)


async def deleted_while_it_is_stored(app, client, world):
    world.provider.half_way = client.delete
    await life(app, client, world)
    await client.delete()
    await work(app)


async def answered_by_a_callback(app, client, world):
    """The order arrives, its answer is lost, and the provider's callback tells its id."""
    world.provider.kind = "is lost"
    await client.arrive()
    await client.order()
    await work(app, for_s=0)
    app.clock.pass_s(70)
    for ref in world.provider.jobs:
        await app.db.write(v.hear_callback, id=client.id, provider="scripted", ref=ref, now=app.now())
    await work(app)


async def deleted_when_it_is_done(app, client, world):
    await life(app, client, world)
    await client.delete()
    await work(app)


async def deleted_while_it_is_made(app, client, world):
    await client.arrive()
    await client.order()
    await work(app, for_s=0)
    await client.delete()
    await work(app)


async def retried_when_storage_works_again(app, client, world):
    """The folder of videos is a file for a while, so nothing can be stored."""
    videos = world.folder / "data/media/videos"
    await client.arrive()
    if not videos.is_dir():
        videos.touch()
    await client.order()
    for _ in range(v.STORE_TRIES):
        await work(app, for_s=0)
        app.clock.pass_s(60)
    if videos.is_file():
        videos.unlink()
    assert (await client.ask("POST", f"{client.id}/retry")).status_code in (202, 400)
    await work(app)


# How each may end.  Where power is cut before a client can cancel or delete, the video is delivered and paid.
SCENARIOS = {
    life: {"COMPLETED"},
    refusal: {"FAILED"},
    failure: {"FAILED"},
    cancelled_while_it_is_made: {"FAILED", "COMPLETED"},
    cancelled_while_it_is_stored: {"FAILED", "COMPLETED"},
    answered_by_a_callback: {"COMPLETED", "FAILED"},
    deleted_when_it_is_done: {"COMPLETED"},
    deleted_while_it_is_made: {"FAILED", "COMPLETED"},
    deleted_while_it_is_stored: {"FAILED", "COMPLETED"},
    retried_when_storage_works_again: {"COMPLETED"},
}


# --- what must be true afterwards


async def check(app, world):
    """Every video has ended, and is paid exactly when it was delivered; nothing was made twice."""
    found = await rows(app, """
        SELECT v.id, v.status, v.due_at, v.storage_key, v.poster_key, v.deleted_at,
               (SELECT total(credits) FROM credit_holds WHERE video_id = v.id AND state = 'settled')
        FROM videos v
    """)
    assert all(status in FINISHED for _, status, *_ in found), found
    cleaned = [due_at is None for _, _, due_at, *_ in found]
    assert all(cleaned) or (app.storage.root / "videos").is_file(), found
    assert [paid for *_, paid in found] == [10 if status == "COMPLETED" else 0 for _, status, *_ in found]
    packages = await rows(app, "SELECT initial, remaining, frozen, used, expired FROM credit_packages")
    spent = sum(paid for *_, paid in found)
    assert packages in ([], [(30, 30 - spent, 0, spent, 0)])
    await books_are_right(app)
    assert len(world.provider.jobs) <= len(found) <= 1
    root = app.storage.root
    kept = {str(file.relative_to(root)) for file in root.rglob("*.*") if file.is_file()}
    assert kept == {key for *_, mp4, jpg, gone, _ in found for key in (mp4, jpg) if key and not gone}
    assert list(app.temporary.iterdir()) == []
    return [(id, status) for id, status, *_ in found]


async def let_the_clock_finish(app):
    """Whatever a video waits for: the provider, a back-off, its deadline, a result that comes late."""
    for seconds in (4, *[31] * v.STORE_TRIES, 3600, 90_000):
        await work(app, for_s=0)
        app.clock.pass_s(seconds)
    await work(app, for_s=0)


async def come_back(world, http, scenario, expected):
    """Start on what the power cut left, with no client; then the client asks for the same again."""
    async with world.server(http) as app:
        unknown = await rows(app, """
            SELECT 1 FROM videos WHERE submitted_at IS NOT NULL AND ref IS NULL AND status = 'PENDING'
        """)
        accepted = await rows(app, "SELECT id FROM videos")
        await let_the_clock_finish(app)
        alone = await check(app, world)
        assert [id for id, _ in alone] == [id for id, in accepted]
        client = Client(app, http)
        await scenario(app, client, world)
        await let_the_clock_finish(app)
        [(id, status)] = await check(app, world)
        assert not alone or (id, client.id) == (alone[0][0], alone[0][0])
        assert status == "FAILED" if unknown and not world.provider.repeatable else status in expected


async def test_storage_that_is_away_for_a_moment_is_tried_again(app, client, ada, clock, provider):
    videos = app.storage.root / "videos"
    videos.touch()
    video = (await client.post("/api/v1/video/generate", json=ORDER)).json()["data"]
    await work(app, for_s=2)
    assert await rows(app, "SELECT status, tries > 0 FROM videos") == [("UPLOADING", 1)]
    videos.unlink()
    clock.pass_s(30)
    await work(app)
    assert await rows(app, "SELECT id, status, attempt FROM videos") == [(video["videoUuid"], "COMPLETED", 1)]
    assert provider.count("submit") == 1
    await books_are_right(app)


@pytest.fixture
def quick(monkeypatch):
    """These worlds are copies of files, which need no fsync; and two tries to store show as much as six."""
    pragmas = v.WRITER_PRAGMAS.replace("synchronous = FULL", "synchronous = OFF")
    monkeypatch.setattr(v, "WRITER_PRAGMAS", pragmas)
    monkeypatch.setattr(v, "sync", lambda path: None)
    monkeypatch.setattr(v, "STORE_TRIES", 2)


@contextlib.contextmanager
def wired(world, monkeypatch):
    """Keep the world at every statement of the writer and every call outside."""
    wires = world.wires = world.provider.wires = Wires(world)
    real = sqlite3.connect

    def connect(file, **words):
        connection = real(file, factory=Writer, **words)
        connection.wires = wires if "mode=rwc" in file else None
        return connection

    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", connect)
        yield wires


@pytest.mark.parametrize("repeatable", [False, True], ids=["once", "repeatable"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_power_is_cut_anywhere(scenario, repeatable, tmp_path, clock, http, monkeypatch, quick):
    world = World(tmp_path / "world", Maker(repeatable, clock), clock)
    with wired(world, monkeypatch) as wires:
        async with world.server(http) as app:
            await scenario(app, Client(app, http), world)
            [(_, status)] = await check(app, world)
            assert status in SCENARIOS[scenario]
    assert len(wires.points) > 100 and len(wires.worlds) > 10
    for point, left in wires.worlds.values():
        try:
            await come_back(left, http, scenario, SCENARIOS[scenario])
        except BaseException as failure:
            failure.add_note(f"power was cut {point}, in {left.folder}")
            raise
