"""Where files are kept: a folder behind our own links, or a bucket on a real S3 server."""

import asyncio
import os
import subprocess
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path

import httpx
import pytest

import videofly as v
from conftest import (
    ScriptedProvider,
    books_are_right,
    client_of,
    error_of,
    image_bytes,
    person,
    rows,
    tiny_video,
    work,
)
from test_videos import FOX, order, show
from test_videos import credits as credits_of

pytestmark = pytest.mark.anyio
pytest_plugins = ["s3server"]
DIGITS = bytes(range(48, 58)) * 10  # 100 bytes


async def put(app, key="videos/a/1.mp4", content=DIGITS):
    file = app.temporary / "a-file"
    file.write_bytes(content)
    await app.storage.put(key, file, "video/mp4")
    assert not file.exists()
    return app.storage.link(key, base="http://test", now=app.now())


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- the folder


async def test_a_folder_keeps_what_is_put_until_it_is_deleted(client, app):
    link = await put(app)
    assert await app.storage.read("videos/a/1.mp4") == DIGITS
    answer = await client.get(link)
    assert (answer.content, answer.headers["content-type"]) == (DIGITS, "video/mp4")
    await app.storage.delete("videos/a/1.mp4")
    await app.storage.delete("videos/a/1.mp4")
    assert error_of(await client.get(link)) == (404, "E4012")
    with pytest.raises(v.StorageFailed):
        await app.storage.read("videos/a/1.mp4")
    assert files_in(app.storage.root) == []


async def test_putting_again_replaces_the_file(client, app):
    await put(app)
    assert (await client.get(await put(app, content=b"other"))).content == b"other"


async def test_a_link_ends(client, app, clock):
    link = await put(app)
    clock.pass_s(app.settings.link_minutes * 60 - 1)
    assert (await client.get(link)).status_code == 200
    clock.pass_s(app.settings.link_minutes * 60 + 1)
    assert error_of(await client.get(link)) == (403, "E4022")


async def test_a_link_stays_the_same_for_a_while_so_that_browsers_keep_the_file(app, clock):
    clock.t = 3600.0 * 500_000
    link = await put(app)
    clock.pass_s(3599)
    assert app.storage.link("videos/a/1.mp4", base="http://test", now=app.now()) == link


@pytest.mark.parametrize("change", [
    {"signature": "0" * 43}, {"signature": ""}, {"signature": "é"}, {"until": "99999999999"}, {"until": ""},
    {"until": "-1"}, {"until": "1e30"}, {"until": "9" * 400}, {"until": "\u0661" * 10},
])
async def test_a_forged_link_is_refused(client, app, change):
    link = httpx.URL(await put(app))
    assert error_of(await client.get(link.copy_merge_params(change))) == (403, "E4022")


async def test_a_signature_opens_one_file_only(client, app):
    mine, his = await put(app), httpx.URL(await put(app, "videos/b/1.mp4"))
    assert error_of(await client.get(his.copy_with(query=httpx.URL(mine).query))) == (403, "E4022")


@pytest.mark.parametrize("path", [
    "../secret", "..%2Fsecret", "%2e%2e/secret", "videos/..%2f..%2fsecret", "videos/a/../../../secret",
    "/etc/passwd", "%2Fetc%2Fpasswd", "..%5csecret", "videos%2Fa%2F1.mp4%00", "....//secret",
    "../videofly.db",
    "", "videos", "videos/a/",
])
async def test_nothing_else_can_be_reached_and_nothing_is_listed(client, app, path):
    link = httpx.URL(await put(app))
    answer = await client.get(f"http://test/media/{path}?{link.query.decode()}")
    assert answer.status_code in (400, 403, 404)
    assert app.secret not in answer.text and "1.mp4" not in answer.text.replace(path, "")


async def test_a_folder_is_no_file_even_behind_a_good_link(client, app):
    await put(app)
    link = app.storage.link("videos/a", base="http://test", now=app.now())
    assert error_of(await client.get(link)) == (404, "E4012")


@pytest.mark.parametrize("wanted, status, content, range", [
    ("bytes=0-3", 206, b"0123", "bytes 0-3/100"),
    ("bytes=95-", 206, b"56789", "bytes 95-99/100"),
    ("bytes=-3", 206, b"789", "bytes 97-99/100"),
    ("bytes=90-500", 206, b"0123456789", "bytes 90-99/100"),
    ("bytes=100-", 416, None, "bytes */100"),
    ("bytes=500-600", 416, None, "bytes */100"),
])
async def test_a_part_of_a_file_can_be_asked_for(client, app, wanted, status, content, range):
    answer = await client.get(await put(app), headers={"Range": wanted})
    assert (answer.status_code, answer.headers["content-range"].removeprefix("bytes ")) == (
        status,
        range.removeprefix("bytes "),
    )
    assert content in (None, answer.content)


async def test_head_tells_the_size_and_sends_nothing(client, app):
    answer = await client.head(await put(app))
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "100", b"")
    assert answer.headers["accept-ranges"] == "bytes"


async def test_a_browser_shows_a_file_and_runs_nothing_in_it(client, app):
    answer = await client.get(await put(app))
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"].startswith("private")


async def test_a_deleted_video_leaves_no_file(client, app, ada):
    video = await order(client)
    await work(app)
    assert files_in(app.storage.root) == [
        f"videos/{video['videoUuid']}/1.{ending}" for ending in ("jpg", "mp4")
    ]
    await client.delete(f"/api/v1/video/{video['videoUuid']}")
    await work(app)
    assert files_in(app.storage.root) == files_in(app.temporary) == []


async def test_a_step_that_ends_while_the_worker_looks_for_work_is_not_taken_again(
    client, app, ada, provider, monkeypatch
):
    """It would find the video stored already, think it cancelled, and take its file away.  (It did.)"""
    read = app.db.read

    async def read_slowly(fn, **given):
        found = await read(fn, **given)
        if fn is v.due_jobs:
            await asyncio.gather(*app.working.values())
        return found

    monkeypatch.setattr(app.db, "read", read_slowly)
    video = await order(client)
    for _ in range(12):
        await v.begin_steps(app)
        app.clock.pass_s(0.5)
    await asyncio.gather(*app.working.values())
    assert (await show(client, video))["status"] == "COMPLETED"
    assert files_in(app.storage.root) == [
        f"videos/{video['videoUuid']}/1.{ending}" for ending in ("jpg", "mp4")
    ]
    assert [call[0] for call in provider.calls] == ["submit", "fetch", "open"]


async def test_storing_the_same_video_twice_keeps_its_file(client, app, ada):
    video = await order(client)
    await work(app, for_s=0)
    app.clock.pass_s(1)
    jobs = []
    while not jobs or jobs[0].status != "UPLOADING":
        await v.begin_steps(app)
        await asyncio.gather(*app.working.values())
        jobs, _ = await app.db.read(v.due_jobs, now=app.now(), busy=[], limit=1)
    for _ in range(2):
        await v.step(app, jobs[0])
    assert len(files_in(app.storage.root)) == 2
    assert ((await show(client, video))["status"], await credits_of(client)) == ("COMPLETED", (90, 0, 10))
    await books_are_right(app)


# --- a bucket


@pytest.fixture
def bucket(settings, bucket_settings):
    """Settings that name a new bucket on the S3 server."""
    return v.msgspec.structs.replace(settings, **bucket_settings)


def opened(settings, clock, provider):
    return v.open_app(settings, clock=clock, providers={"scripted": provider})


async def plain_get(link, **headers):
    async with httpx.AsyncClient(trust_env=False) as anybody:
        return await anybody.get(link, headers=headers)


async def test_a_bucket_keeps_what_is_put_until_it_is_deleted(bucket, clock, provider, s3):
    async with opened(bucket, clock, provider) as app:
        link = await put(app)
        assert await app.storage.read("videos/a/1.mp4") == DIGITS
        whole, part, end = (
            await plain_get(link),
            await plain_get(link, Range="bytes=3-5"),
            await plain_get(link, Range="bytes=-2"),
        )
        assert (whole.content, whole.headers["content-type"]) == (DIGITS, "video/mp4")
        assert (part.status_code, part.content, part.headers["content-range"]) == (
            206,
            b"345",
            "bytes 3-5/100",
        )
        assert (end.status_code, end.content) == (206, b"89")
        assert (await plain_get(link, Range="bytes=100-")).status_code == 416
        await app.storage.delete("videos/a/1.mp4")
        await app.storage.delete("videos/a/1.mp4")
        assert ((await plain_get(link)).status_code, s3.keys(bucket.s3_bucket)) == (404, [])
        with pytest.raises(v.StorageFailed):
            await app.storage.read("videos/a/1.mp4")


async def test_a_link_to_a_bucket_opens_one_file_and_cannot_be_forged(bucket, clock, provider, s3):
    async with opened(bucket, clock, provider) as app:
        mine, his = httpx.URL(await put(app)), httpx.URL(await put(app, "videos/b/1.mp4"))
    assert int(mine.params["X-Amz-Expires"]) == bucket.link_minutes * 60
    for forged in (his.copy_with(query=mine.query), mine.copy_set_param("X-Amz-Expires", "604800"),
                   mine.copy_set_param("X-Amz-Signature", "0" * 64), mine.copy_with(query=b"")):
        assert (await plain_get(forged)).status_code == 403
    assert (await plain_get(f"{s3.url}/{bucket.s3_bucket}/?list-type=2")).status_code == 403


async def test_a_link_is_signed_for_the_address_that_people_see(bucket, clock, provider, s3):
    async with opened(
        v.msgspec.structs.replace(bucket, s3_public_url=f"http://localhost:{s3.port}"), clock, provider
    ) as app:
        link = await put(app)
        assert link.startswith(f"http://localhost:{s3.port}/{bucket.s3_bucket}/videos/a/1.mp4?")
        assert (await plain_get(link)).content == DIGITS
        assert (await plain_get(link.replace("localhost", "127.0.0.1"))).status_code == 403


def media(keys):
    """Without the backups, which a server that starts makes at once."""
    return [key for key in keys if not key.startswith("backups/")]


async def test_the_whole_product_on_a_bucket(bucket, s3):
    """With nothing told: the real worker, the real clock, the real renderer, an image to start from."""
    async with (
        v.open_app(bucket, providers={"scripted": ScriptedProvider()}) as app,
        v.working(app),
        client_of(app) as client,
    ):
        ada = await person(app, "ada@example.com", credits=100)
        client.headers.update(ada.headers)
        image = (await client.post("/api/v1/upload", files={"file": ("a.png", image_bytes())})).json()["data"]
        assert (await plain_get(image["url"])).content == image_bytes()
        wish = {"model": "preview", "prompt": "it moves", "imageUrl": image["url"], "duration": 1}
        made = await order(client, wish, Prefer="wait=30")
        assert made["status"] == "COMPLETED"
        film, poster = await plain_get(made["videoUrl"]), await plain_get(made["posterUrl"])
        assert (len(film.content), film.content[4:8], poster.content[:2]) == (
            made["sizeBytes"],
            b"ftyp",
            b"\xff\xd8",
        )
        assert (await client.get("/media/" + image["key"])).status_code == 404
        assert len(media(s3.keys(bucket.s3_bucket))) == 3
        await client.delete(f"/api/v1/video/{made['videoUuid']}")
        await until(lambda: media(s3.keys(bucket.s3_bucket)) == [image["key"]])
        await books_are_right(app)


async def until(holds, within_s=30):
    ends = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < ends, "it did not come to pass"
        await asyncio.sleep(0.02)


async def ended(client, id, within_s=30):
    """The video, when the worker is done with it."""
    ends = time.monotonic() + within_s
    while (video := await show(client, {"videoUuid": id}))["finishedAt"] is None:
        assert time.monotonic() < ends, video
        await asyncio.sleep(0.02)
    return video


async def test_with_a_wrong_secret_a_video_fails_free_and_is_stored_when_it_is_right(
    bucket, clock, provider, s3, caplog
):
    wrong = v.msgspec.structs.replace(bucket, s3_secret_key="not-the-secret")
    async with opened(bucket, clock, provider):
        pass  # from now on there is a database
    async with opened(wrong, clock, provider) as app, client_of(app) as client:
        ada = await person(app, "ada@example.com", credits=100, is_admin=True)
        client.headers.update(ada.headers)
        video = await order(client)
        await work(app, for_s=60)
        failed = await show(client, video)
        assert (failed["status"], failed["error"]["code"]) == ("FAILED", "E5002")
        assert "SignatureDoesNotMatch" in failed["error"]["message"]
        receipt = (await client.get(f"/api/v1/video/{video['videoUuid']}/receipt")).json()["data"]
        assert (receipt["creditsCharged"], [hold["state"] for hold in receipt["holds"]]) == (0, ["released"])
        assert receipt["error"]["code"] == "E5002"
        assert (await credits_of(client), s3.keys(bucket.s3_bucket)) == ((100, 0, 0), [])
        checks = (await client.get("/api/v1/admin/check")).json()["data"]["checks"]
        assert [item["what"] for item in checks if not item["ok"]] == ["storage"]
        assert error_of(await client.post("/api/v1/upload", files={"file": ("a.png", image_bytes())})) == (
            500,
            "E5002",
        )
        assert await rows(app, "SELECT * FROM uploads") == []
        assert "SignatureDoesNotMatch" in caplog.text and "not-the-secret" not in caplog.text
        await books_are_right(app)
    async with opened(bucket, clock, provider) as app, client_of(app, **ada.headers) as client:
        assert (await client.post(f"/api/v1/video/{video['videoUuid']}/retry")).status_code == 202
        await work(app)
        made = await show(client, video)
        assert (await plain_get(made["videoUrl"])).content == provider.result
        assert (made["status"], await credits_of(client), provider.count("submit")) == (
            "COMPLETED",
            (90, 0, 10),
            1,
        )
        await books_are_right(app)


async def test_without_the_bucket_everything_says_so(settings, bucket, clock, provider):
    async with opened(settings, clock, provider):
        pass  # from now on there is a database
    async with opened(v.msgspec.structs.replace(bucket, s3_bucket="never-made"), clock, provider) as app:
        with pytest.raises(v.StorageFailed, match="There is no bucket never-made"):
            await app.storage.check()
        with pytest.raises(v.StorageFailed, match="NoSuchBucket"):
            (app.temporary / "a").write_bytes(b"a")
            await app.storage.put("a", app.temporary / "a", "video/mp4")


class Unplugging(ScriptedProvider):
    """Delivers, and then something happens."""

    async def open_result(self, ref, url):
        yield self.result
        self.then()


async def test_a_server_that_goes_away_before_the_upload_is_waited_for(bucket, clock, s3):
    provider = Unplugging()
    provider.then = s3.stop
    async with opened(bucket, clock, provider) as app, client_of(app) as client:
        client.headers.update((await person(app, "ada@example.com", credits=100)).headers)
        video = await order(client)
        try:
            await work(app, for_s=2)
            assert ((await show(client, video))["status"], await credits_of(client)) == (
                "UPLOADING",
                (90, 10, 0),
            )
        finally:
            s3.start()
        provider.then = lambda: None
        await work(app)
        made = await show(client, video)
        assert (await plain_get(made["videoUrl"])).content == provider.result
        assert (made["status"], await credits_of(client), provider.count("submit")) == (
            "COMPLETED",
            (90, 0, 10),
            1,
        )
        await books_are_right(app)


def large_video(megabytes):
    """A video that no single request carries: MP4 readers pass over a box named free."""
    size = megabytes << 20
    return tiny_video() + size.to_bytes(4, "big") + b"free" + os.urandom(size - 8)


async def test_an_upload_that_is_cut_half_way_is_made_again(bucket, clock, provider, s3, line):
    provider.result = large_video(20)
    settings = v.msgspec.structs.replace(bucket, s3_endpoint=line.url, s3_public_url=s3.url)
    async with opened(settings, clock, provider) as app, client_of(app) as client:
        client.headers.update((await person(app, "ada@example.com", credits=100)).headers)
        video = await order(client)
        line.left = 12 << 20  # the poster, one part, and half of another
        await work(app, for_s=2)
        assert ((await show(client, video))["status"], await credits_of(client)) == ("UPLOADING", (90, 10, 0))
        assert line.cuts >= 1 and f"videos/{video['videoUuid']}/1.mp4" not in s3.keys(bucket.s3_bucket)
        line.left = None
        await work(app)
        made = await show(client, video)
        assert (
            made["status"] == "COMPLETED" and (await plain_get(made["videoUrl"])).content == provider.result
        )
        assert (await credits_of(client), provider.count("submit"), files_in(app.temporary)) == (
            (90, 0, 10),
            1,
            [],
        )
        await books_are_right(app)


# --- what is stored, and what the database speaks of


class Later:
    """The clock of the machine, two days ahead."""

    def __getattr__(self, name):
        return getattr(time, name)

    def time(self):
        return time.time() + 2 * 86_400


async def look_at_media(app):
    found = await v.run_job(app, "media", at_once=True)
    return found["files"], found["missing"], found["removed"], found["unknown"]


async def put_at(app, *keys):
    for key in keys:
        await put(app, key)


async def kept_and_deleted(app, client):
    """(a video that is there, one that was deleted and whose files wait to be removed, an image)"""
    kept, deleted = (await order(client))["videoUuid"], (await order(client))["videoUuid"]
    await work(app)
    await client.delete(f"/api/v1/video/{deleted}")
    image = (await client.post("/api/v1/upload", files={"file": ("a.png", image_bytes())})).json()["data"]
    return kept, deleted, image["key"]


OTHERS = ["uploads/notes.png", "videos/notes.mp4", "videos/01a3185c-9650-7218-9163-7b5c2e9b1979/1.mp4"]


async def both_sides_are_compared(app, client, stored, monkeypatch):
    """In a folder, and in a bucket; stored() lists what is there."""
    kept, deleted, image = await kept_and_deleted(app, client)
    unmade = (await order(client))["videoUuid"]
    ours = [image, *(f"videos/{id}/1.{ending}" for id in (kept, deleted) for ending in ("jpg", "mp4"))]
    orphans = [f"videos/{kept}/2.mp4", f"videos/{deleted}/2.jpg", f"videos/{unmade}/1.jpg"]
    await put_at(app, *orphans, *OTHERS, "elsewhere/1.mp4")
    everything = stored()
    assert await look_at_media(app) == (11, [], 0, 0)  # some may be of what is being stored
    assert stored() == everything
    with monkeypatch.context() as until_then:
        until_then.setattr(v, "time", Later())
        assert await look_at_media(app) == (11, [], 2, 4)
        assert stored() == sorted([*ours, *OTHERS, f"videos/{unmade}/1.jpg", "elsewhere/1.mp4"])
        assert await look_at_media(app) == (9, [], 0, 4)  # one may still come to be what is stored
        for key in (f"videos/{kept}/1.mp4", f"videos/{deleted}/1.mp4", image):
            await app.storage.delete(key)
        assert await look_at_media(app) == (6, sorted([f"videos/{kept}/1.mp4", image]), 0, 4)
    assert await rows(app, "SELECT count(*) FROM videos") == [(3,)]
    await books_are_right(app)


async def test_a_folder_is_compared_with_the_database(client, app, ada, monkeypatch, caplog):
    await both_sides_are_compared(app, client, lambda: files_in(app.storage.root), monkeypatch)
    assert "job media: 2 missing" in caplog.text


async def test_a_bucket_is_compared_with_the_database(bucket, clock, provider, s3, monkeypatch):
    async with opened(bucket, clock, provider) as app, client_of(app) as client:
        client.headers.update((await person(app, "ada@example.com", credits=100)).headers)
        await both_sides_are_compared(app, client, lambda: s3.keys(bucket.s3_bucket), monkeypatch)


async def test_of_very_many_that_are_missing_a_hundred_are_named(app, ada):
    def add(db):
        for n in range(150):
            v.insert(db, "uploads", key=f"uploads/{n:03}.png", user_id=ada.id, media_type="image/png",
                     size_bytes=1, created_at=1)

    await app.db.write(add)
    files, missing, removed, unknown = await look_at_media(app)
    assert (files, missing, removed, unknown) == (0, [f"uploads/{n:03}.png" for n in range(100)], 0, 0)


async def test_an_upload_that_was_cut_off_is_given_up_after_a_day(bucket, clock, provider, s3, monkeypatch):
    def unfinished():
        return {(each.object_name, each.upload_id)
                for each in s3.client._list_multipart_uploads(bucket.s3_bucket).uploads}

    async with opened(bucket, clock, provider) as app:
        await put(app)
        begun = {(key, s3.client._create_multipart_upload(bucket.s3_bucket, key, {}))
                 for key in ("videos/b/1.mp4", "videos/c/1.mp4")}
        assert await look_at_media(app) == (1, [], 0, 0) and unfinished() == begun

        class Tomorrow(datetime):
            @classmethod
            def now(cls, zone=None):
                return datetime.now(zone) + timedelta(days=1, minutes=1)

        monkeypatch.setattr(v, "datetime", Tomorrow)
        assert await look_at_media(app) == (1, [], 0, 0) and unfinished() == set()
        assert s3.keys(bucket.s3_bucket) == ["videos/a/1.mp4"]


# --- a full disk


async def test_an_order_that_the_database_has_no_room_for_changes_nothing(client, app, ada):
    pages = await app.db._writer.run(lambda db: v.value(db, "PRAGMA page_count"))
    await app.db._writer.run(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchall())
    long = FOX | {"prompt": "x" * 4000}
    answers = [await client.post("/api/v1/video/generate", json=long) for _ in range(3)]
    assert error_of(answers[-1]) == (507, "E5005")
    taken = sum(answer.status_code == 201 for answer in answers)
    assert (await credits_of(client), len(await rows(app, "SELECT 1 FROM videos"))) == (
        (100 - 10 * taken, 10 * taken, 0),
        taken,
    )
    await app.db._writer.run(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchall())
    await order(client, long)
    await books_are_right(app)


def mount_small_disk(folder):
    """8 MB that only this machine's administrator can give."""
    folder.mkdir()
    return (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True
        ).returncode
        == 0
    )


def may_mount():
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        return mount_small_disk(disk) and subprocess.run(["umount", disk]).returncode == 0


# Where nobody may mount (an ordinary user's machine), the test above stands alone; .ci/run may.
on_a_small_disk = pytest.mark.parametrize("size", ["8m"] if may_mount() else [])


@pytest.fixture
def small_disk(tmp_path, settings):
    """Settings whose data folder is a disk of 8 MB."""
    disk = tmp_path / "disk"
    assert mount_small_disk(disk)
    yield v.msgspec.structs.replace(settings, data=str(disk), video_max_concurrent=1000, disk_low_mb=0)
    subprocess.run(["umount", "--lazy", disk], check=True)


def fill(disk, leave=0):
    """Write until nothing more goes in, then give back so many bytes."""
    with (Path(disk) / "ballast").open("wb", buffering=0) as ballast:
        with pytest.raises(OSError, match="No space left"):
            while True:
                ballast.write(bytes(4096))
        if leave:
            ballast.truncate(ballast.tell() - leave)


def make_room(disk):
    (Path(disk) / "ballast").unlink()


@on_a_small_disk
async def test_what_was_ordered_before_the_disk_was_full_is_made_when_there_is_room(small_disk, size):
    async with (
        v.open_app(small_disk, providers={"scripted": ScriptedProvider()}) as app,
        v.working(app),
        client_of(app) as client,
    ):
        client.headers.update((await person(app, "ada@example.com", credits=10_000)).headers)
        fill(small_disk.data)
        taken = []
        while (answer := await client.post("/api/v1/video/generate", json=FOX)).status_code == 201:
            taken.append(answer.json()["data"]["videoUuid"])
            fill(small_disk.data)
        assert error_of(answer) == (507, "E5005")
        assert error_of(await client.post("/api/v1/upload", files={"file": ("a.png", image_bytes())})) == (
            507,
            "E5005",
        )
        assert (await client.get("/api/v1/video/list")).status_code == 200
        assert len(await rows(app, "SELECT 1 FROM videos")) == len(taken)
        make_room(small_disk.data)
        taken.append((await order(client))["videoUuid"])
        assert (
            await client.post("/api/v1/upload", files={"file": ("a.png", image_bytes())})
        ).status_code == 201
        assert {(await ended(client, video))["status"] for video in taken} == {"COMPLETED"}
        assert await credits_of(client) == (10_000 - 10 * len(taken), 0, 10 * len(taken))
        assert await app.db.read(v.integrity_faults) == []
        await books_are_right(app)


@on_a_small_disk
async def test_a_video_that_the_disk_has_no_room_for_fails_free_and_can_be_stored_later(
    small_disk, size, clock, provider
):
    provider.result = large_video(3)
    async with opened(small_disk, clock, provider) as app, client_of(app) as client:
        client.headers.update((await person(app, "ada@example.com", credits=100)).headers)
        video = await order(client)
        fill(small_disk.data, leave=1 << 20)
        await work(app, for_s=60)
        assert ((await show(client, video))["error"]["code"], await credits_of(client)) == (
            "E5002",
            (100, 0, 0),
        )
        assert files_in(app.temporary) == files_in(app.storage.root) == []
        make_room(small_disk.data)
        await client.post(f"/api/v1/video/{video['videoUuid']}/retry")
        await work(app)
        made = await show(client, video)
        assert (made["status"], made["sizeBytes"], await credits_of(client)) == (
            "COMPLETED",
            len(provider.result),
            (90, 0, 10),
        )
        assert provider.count("submit") == 1
        await books_are_right(app)


async def test_what_was_stored_of_a_video_that_failed_is_removed_as_soon_as_storage_lets_it(client, app, ada):
    video = await order(client)
    folder = app.storage.root / "videos" / video["videoUuid"]
    (folder / "1.mp4").mkdir(parents=True)  # so that the poster can be stored, and the video cannot
    for _ in range(10):
        await work(app, for_s=0)
        app.clock.pass_s(60)
    assert (await show(client, video))["error"]["code"] == "E5002"
    assert (folder / "1.jpg").exists()
    (folder / "1.mp4").rmdir()
    await work(app)
    assert list(folder.iterdir()) == []
    assert await rows(app, "SELECT due_at FROM videos") == [(None,)]
