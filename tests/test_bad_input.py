"""Whatever is sent, the answer is a no that says what would be accepted, and nothing is left behind."""

import asyncio
import base64
import io
import json
import struct
import zlib

import pytest
from PIL import Image

import videofly as v
from conftest import books_are_right, error_of, image_bytes, person, rows

pytestmark = pytest.mark.anyio
FOX = {"model": "told", "prompt": "a red fox over snow"}
GENERATE, QUOTE, UPLOAD = "/api/v1/video/generate", "/api/v1/video/quote", "/api/v1/upload"
NOBODYS = "http://test/media/uploads/00000000-0000-7000-8000-000000000000.png?until=1&signature=x"


def fox(**changes):
    return json.dumps(FOX | changes).encode()


async def kept(app):
    """How many rows each table has, but for those that count sign-ins and what happened."""
    tables = await rows(app, "SELECT name FROM sqlite_schema WHERE type = 'table'")
    others = [name for (name,) in tables if name not in ("sessions", "sign_in_failures", "events")]
    assert {"users", "videos", "uploads", "credit_transactions", "idempotency_keys"} <= {*others}
    return {name: (await rows(app, f"SELECT count(*) FROM {name}"))[0][0] for name in others}


# What is sent, what it is refused with, and words of the sentence.
BODIES = {
    "nothing": (b"", "E4009", "must be a JSON object"),
    "blanks": (b" \n ", "E4009", "not JSON"),
    "half an object": (b'{"model": "told"', "E4009", "not JSON"),
    "words": (b"model=told&prompt=x", "E4009", "not JSON"),
    "something after the object": (fox() + b"{}", "E4009", "not JSON"),
    "UTF-16": (fox().decode().encode("utf-16"), "E4009", "not JSON"),
    "bytes that are no UTF-8": (b'{"model": "told", "prompt": "\xff\xfe"}', "E4009", "not JSON"),
    "half a surrogate pair": (b'{"model": "told", "prompt": "\\ud800 fox"}', "E4009", "not JSON"),
    "the other half": (b'{"model": "told", "prompt": "fox \\udc00"}', "E4009", "not JSON"),
    "NaN": (b'{"model": "told", "prompt": "x", "duration": NaN}', "E4009", "not JSON"),
    "an array": (b"[" + fox() + b"]", "E4009", "Expected `object`"),
    "a string": (b'"fox"', "E4009", "Expected `object`"),
    "null": (b"null", "E4009", "Expected `object`"),
    "brackets without end": (b"[" * 200_000, "E4009", "Expected `object`"),
    "brackets in a field": (b'{"model": ' + b"[" * 200_000, "E4002", "model: Expected `str`"),
    "an unknown field": (fox(colour="red"), "E4009", "unknown field `colour`; the fields are model, prompt"),
    "the template's field": (fox(outputNumber=4), "E4009", "unknown field `outputNumber`"),
    "a field in the wrong case": (fox(aspect_ratio="16:9"), "E4009", "aspectRatio"),
    "no model": (b'{"prompt": "x"}', "E4009", "`model`"),
    "model null": (fox(model=None), "E4002", "Expected `str`"),
    "model number": (fox(model=7), "E4002", "Expected `str`"),
    "model unknown": (fox(model="sora-9"), "E4002", "On offer: told, from-image, preview."),
    "model empty": (fox(model=""), "E4002", "On offer: told"),
    "model too long": (fox(model="m" * 101), "E4002", "length <= 100"),
    "model disabled": (fox(model="withdrawn"), "E4002", "On offer: told, from-image, preview."),
    "model in capitals": (fox(model="TOLD"), "E4002", "On offer: told"),
    "no prompt": (b'{"model": "told"}', "E4009", "`prompt`"),
    "prompt null": (fox(prompt=None), "E4009", "prompt: Expected `str`"),
    "prompt array": (fox(prompt=["a fox"]), "E4009", "prompt: Expected `str`"),
    "prompt empty": (fox(prompt=""), "E4009", "length >= 1"),
    "prompt blank": (fox(prompt=" \t\n\u3000"), "E4009", "1 to 4000 characters"),
    "prompt of 4001": (fox(prompt="x" * 4001), "E4009", "length <= 4000"),
    "prompt of 100 kB": (fox(prompt="x" * 100_000), "E4009", "length <= 4000"),
    "prompt of NUL": (fox(prompt="\0"), "E4009", "U+0000"),
    "NUL in the prompt": (fox(prompt="a fox\0"), "E4009", "U+0000"),
    "NUL as it is": (b'{"model": "told", "prompt": "a\0fox"}', "E4009", "not JSON"),
    "NUL in the negative prompt": (fox(negativePrompt="a\0b"), "E4009", "U+0000"),
    "negative prompt of 4001": (fox(negativePrompt="x" * 4001), "E4009", "length <= 4000"),
    "duration text": (fox(duration="5"), "E4003", "Expected `int"),
    "duration true": (fox(duration=True), "E4003", "Expected `int"),
    "duration 5.0": (fox(duration=5.0), "E4003", "Expected `int"),
    "duration 5.5": (fox(duration=5.5), "E4003", "Expected `int"),
    "duration array": (fox(duration=[5]), "E4003", "Expected `int"),
    "duration 0": (fox(duration=0), "E4003", ">= 1"),
    "duration -10": (fox(duration=-10), "E4003", ">= 1"),
    "duration 1e30": (b'{"model": "told", "prompt": "x", "duration": 1e30}', "E4003", "Expected `int"),
    "duration 10**30": (fox(duration=10**30), "E4003", "<= 600"),
    "duration -10**30": (fox(duration=-(10**30)), "E4003", ">= 1"),
    "duration not offered": (fox(duration=7), "E4003", "must be one of 5, 10 seconds"),
    "ratio not offered": (fox(aspectRatio="4:3"), "E4023", "must be one of 16:9, 1:1"),
    "ratio empty": (fox(aspectRatio=""), "E4023", "must be one of 16:9, 1:1"),
    "ratio number": (fox(aspectRatio=1.78), "E4023", "Expected `str"),
    "quality not offered": (fox(quality="4K"), "E4023", "must be one of 480p, 720p"),
    "quality too long": (fox(quality="7" * 11), "E4023", "length <= 10"),
    "seed -1": (fox(seed=-1), "E4009", "seed: Expected `int` >= 0"),
    "seed 2**31": (fox(seed=2**31), "E4009", "<= 2147483647"),
    "seed text": (fox(seed="1"), "E4009", "seed: Expected `int"),
    "maxCredits 0": (fox(maxCredits=0), "E4009", "maxCredits: Expected `int` >= 1"),
    "maxCredits too high": (fox(maxCredits=10**10), "E4009", "<= 1000000000"),
    "no image for an image model": (fox(model="from-image"), "E4004", "uploaded image as imageUrl"),
    "no images for an image model": (fox(model="from-image", imageUrls=[]), "E4004", "uploaded image"),
    "nobody's image": (fox(imageUrl=NOBODYS), "E4004", "upload it first"),
    "an image elsewhere": (fox(imageUrl="https://elsewhere.test/fox.png"), "E4004", "POST /api/v1/upload"),
    "the machine's own address": (fox(imageUrl="http://169.254.169.254"), "E4004", "POST /api/v1/upload"),
    "a file as an image": (fox(imageUrl="file:///etc/passwd"), "E4004", "POST /api/v1/upload"),
    "an image in the field": (fox(imageUrl="data:image/png;base64,AA"), "E4004", "POST /api/v1/upload"),
    "a path outside": (fox(imageUrl="uploads/../../secret"), "E4004", "POST /api/v1/upload"),
    "imageUrl empty": (fox(imageUrl=""), "E4009", "length >= 1"),
    "imageUrl number": (fox(imageUrl=1), "E4009", "Expected `str"),
    "imageUrl too long": (fox(imageUrl="x" * 2001), "E4009", "length <= 2000"),
    "both kinds of images": (fox(imageUrl=NOBODYS, imageUrls=[NOBODYS]), "E4009", "not both"),
    "two images": (fox(imageUrls=[NOBODYS, NOBODYS]), "E4009", "length <= 1"),
    "images as text": (fox(imageUrls=NOBODYS), "E4009", "Expected `array"),
}


@pytest.mark.parametrize("path", [GENERATE, QUOTE])
async def test_a_bad_order_is_refused_and_leaves_nothing(client, app, ada, path, subtests):
    before = await kept(app)
    for name, (body, code, words) in BODIES.items():
        with subtests.test(name):
            answer = await client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert error_of(answer) == (400, code), answer.text
            assert words in answer.json()["error"]["message"]
            assert await kept(app) == before


async def test_what_may_be_left_out_may_be_null(client, ada):
    optional = ["duration", "aspectRatio", "quality", "imageUrl", "imageUrls", "negativePrompt", "seed",
                "maxCredits"]
    answer = await client.post(GENERATE, json=FOX | dict.fromkeys(optional))
    assert (answer.status_code, answer.json()["data"]["duration"]) == (201, 5)


async def test_any_text_is_a_prompt(client, ada):
    for prompt in ("x" * 4000, "狐" * 4000, "🦊 \u202e fox", "'; DROP TABLE videos; --", "\ufffd"):
        quote = await client.post(QUOTE, json=FOX | {"prompt": prompt})
        assert quote.status_code == 200, quote.text


async def test_a_backslash_before_u0000_is_text(client, ada):
    answer = await client.post(GENERATE, json=FOX | {"prompt": "\\u0000"})
    assert (answer.status_code, answer.json()["data"]["prompt"]) == (201, "\\u0000")


async def chunks(count):
    for _ in range(count):
        yield b" " * 8192


async def test_a_body_over_256_kib_is_too_large_declared_or_not(client, app, ada):
    before = await kept(app)
    for content in (b" " * (v.BODY_MAX + 1), chunks(33)):
        assert error_of(await client.post(GENERATE, content=content)) == (413, "E4013")
    assert error_of(await client.post("/api/auth/sign-in", content=chunks(33))) == (413, "E4013")
    assert error_of(await client.post(QUOTE, content=fox().ljust(v.BODY_MAX + 1))) == (413, "E4013")
    assert (await client.post(QUOTE, content=fox().ljust(v.BODY_MAX))).status_code == 200
    assert await kept(app) == before


async def test_a_form_is_not_an_order(client, app, ada):
    before = await kept(app)
    for sent in ({"data": FOX}, {"data": FOX, "files": {"image": b"x"}}, {"content": b"<order/>"}):
        assert error_of(await client.post(GENERATE, **sent)) == (400, "E4009")
    assert await kept(app) == before


async def test_an_idempotency_key_has_1_to_255_characters(client, app, ada):
    before = await kept(app)
    for key in ("", "k" * 256):
        answer = await client.post(GENERATE, json=FOX, headers={"Idempotency-Key": key})
        assert error_of(answer) == (400, "E4009")
        assert "Idempotency-Key must be 1 to 255 characters" in answer.json()["error"]["message"]
    assert await kept(app) == before


async def test_an_idempotency_key_may_be_any_bytes(client, app, ada):
    for key in (b"k" * 255, b"\xff\xfe", b"a b;c"):
        first = await client.post(GENERATE, json=FOX, headers={b"Idempotency-Key": key})
        again = await client.post(GENERATE, json=FOX, headers={b"Idempotency-Key": key})
        assert (first.status_code, again.content) == (201, first.content)
    assert len(await rows(app, "SELECT 1 FROM videos")) == 3


async def test_a_key_is_free_again_after_a_refusal(client, ada):
    headers = {"Idempotency-Key": "k"}
    assert error_of(await client.post(GENERATE, content=fox(duration=7), headers=headers)) == (400, "E4003")
    assert (await client.post(GENERATE, content=fox(), headers=headers)).status_code == 201


async def test_somebody_elses_image_is_nobodys(client, app, ada):
    bob = await person(app, "bob@example.com", credits=100)
    his = await client.post(UPLOAD, files={"file": image_bytes()}, headers=bob.headers)
    before = await kept(app)
    for url in his.json()["data"].values():
        assert error_of(await client.post(GENERATE, json=FOX | {"imageUrl": url})) == (400, "E4004")
    assert await kept(app) == before
    answer = await client.post(GENERATE, json=FOX | {"imageUrls": [url]}, headers=bob.headers)
    assert answer.status_code == 201


# --- lists


def cursor(position):
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode().rstrip("=")


QUERIES = {
    **{f"limit={text}": "limit must be a whole number from 1 to 100" for text in (
        0, -1, 101, "abc", "", 2.5, "%ff", 10**30, "0x10")},
    **{f"cursor={text}": "must be a nextCursor" for text in (
        "abc", "a", "null", "%00", "%ff", "%F0%9F", "é", "====", "A" * 501, "A" * 500,
        *map(cursor, [
            None, True, {}, [], "x", 1.5, -1, 2**63, 2**64, -(2**63) - 1, [1], [1, 2], [1, 2, 3], ["x", 1],
            [2**63, "x"], [2**64, "x"], [10**40, "x"], [-1, "x"], [-(2**70), "x"], [1, None], [1.5, "x"],
            [1, "\ud800"], "\ud800", "0" * 35, "g" * 36,
        ]))},
}


@pytest.mark.parametrize("path", ["/api/v1/video/list", "/api/v1/credit/history", "/api/v1/credit/packages"])
async def test_a_page_that_cannot_be_is_refused(client, app, ada, path, subtests):
    before = await kept(app)
    for query, words in QUERIES.items():
        with subtests.test(query):
            answer = await client.get(f"{path}?{query}")
            assert error_of(answer) == (400, "E4009")
            assert words in answer.json()["error"]["message"]
    assert await kept(app) == before


async def test_a_status_that_cannot_be_is_refused(client, ada):
    for status in ["DONE", "completed", "", "%ff", "%00", "PENDING,FAILED"]:
        answer = await client.get(f"/api/v1/video/list?status={status}")
        assert error_of(answer) == (400, "E4009"), status
        assert "PENDING, GENERATING, UPLOADING, COMPLETED, FAILED" in answer.json()["error"]["message"]


# --- addresses

UUIDS = [
    "00000000-0000-7000-8000-000000000000", "x", "%00", "%ff", "%ED%A0%80", "%2e%2e", "é", "🦊", "x" * 5000,
    "' OR 1=1 --", "%25", "*", "LIST",
]
ON_A_VIDEO = [("GET", ""), ("GET", "/status"), ("GET", "/receipt"), ("POST", "/cancel"), ("POST", "/retry"),
              ("DELETE", "")]


async def test_a_video_that_is_not_there_is_not_found(client, app, ada, subtests):
    before = await kept(app)
    for uuid in UUIDS:
        with subtests.test(uuid[:50]):
            for method, rest in ON_A_VIDEO:
                assert error_of(await client.request(method, f"/api/v1/video/{uuid}{rest}")) == (404, "E4006")
            assert error_of(await client.delete(f"/api/v1/keys/{uuid}")) == (404, "E4012")
    assert await kept(app) == before


async def test_an_address_that_is_not_there_is_not_found(client, ada):
    for path in ["/nope", "/api", "/api/v1", "/api/v2/video/list", "/api/v1/video/a/b", "/%00", "/%ff", "/é",
                 "/videofly.db", "/static/../videofly.py", "/docs/swagger/%2e%2e/%2e%2e/x"]:
        assert error_of(await client.get(path)) == (404, "E4012"), path


async def test_a_file_without_a_right_link_is_refused(client):
    for path in ["x", "../videofly.db", "%2e%2e/videofly.db", "%00", "uploads/x.png?until=9&signature=x",
                 "x?until=²&signature=%ff", "x?until=99999999999999&signature=x", "x?until=-1"]:
        answer = await client.get(f"/media/{path}")
        assert error_of(answer) in [(403, "E4022"), (404, "E4012")], path


async def test_a_method_that_is_not_allowed_says_which_are(client, ada):
    for method, path, allowed in [
        ("PUT", GENERATE, "POST"), ("GET", GENERATE, "POST"), ("DELETE", QUOTE, "POST"),
        ("PUT", "/docs", "GET"),
        ("PATCH", "/api/v1/keys", "GET"), ("FOO", "/api/v1/keys", "POST"), ("TRACE", "/", "GET"),
        ("POST", "/openapi.json", "GET"), ("GET", "/api/auth/sign-out", "POST"),
        ("POST", "/api/v1/video/list", "GET"),
    ]:
        answer = await client.request(method, path)
        assert error_of(answer) == (405, "E4021"), (method, path)
        assert allowed in answer.headers["allow"] and allowed in answer.json()["error"]["message"]
    assert (await client.head("/api/v1/video/list")).status_code == 405


# --- images


def saved(image, format, **how):
    out = io.BytesIO()
    image.save(out, format, **how)
    return out.getvalue()


def png_that_claims(width, height):
    """The header of a PNG of that size, with hardly anything behind it."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'
NO_IMAGES = {
    "text": lambda: b"hello",
    "nothing": lambda: b"",
    "half an image": lambda: image_bytes(size=(400, 300))[:500],
    "the first bytes of an image": lambda: image_bytes()[:20],
    "half a JPEG": lambda: image_bytes("JPEG", (400, 300))[:900],
    "SVG": lambda: SVG,
    "HTML": lambda: b"<!doctype html><script>alert(1)</script>",
    "BMP": lambda: image_bytes("BMP"),
    "TIFF": lambda: image_bytes("TIFF"),
    "PDF": lambda: b"%PDF-1.7\n",
    "50 megapixels in a small file": lambda: saved(Image.new("1", (10_000, 5_000)), "PNG"),
    "10 gigapixels claimed": lambda: png_that_claims(100_000, 100_000),
    "0 pixels claimed": lambda: png_that_claims(0, 0),
    "pixels claimed and not there": lambda: png_that_claims(100, 100),
}


async def test_what_is_no_image_is_not_kept(client, app, ada, subtests):
    before = await kept(app)
    for name, content in NO_IMAGES.items():
        with subtests.test(name):
            answer = await client.post(UPLOAD, files={"file": ("fox.png", content(), "image/png")})
            assert error_of(answer) == (415, "E4019")
            assert "JPEG, PNG, WebP or GIF" in answer.text or "40 megapixels" in answer.text
    assert await kept(app) == before
    assert [path for path in app.storage.root.rglob("*") if path.is_file()] == []
    assert list(app.temporary.iterdir()) == []


UPLOADS = {
    "no file": {"files": {"other": b"x"}},
    "wrong field": {"files": {"image": ("fox.png", b"x", "image/png")}},
    "text in the field": {"data": {"file": "fox"}, "files": {"other": b"x"}},
    "two files": {"files": [("file", b"a"), ("file", b"b")]},
    "JSON": {"json": {"file": "fox.png"}},
    "nothing": {},
    "the image itself": {"content": b"\x89PNG", "headers": {"Content-Type": "image/png"}},
    "no boundary": {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
    "another boundary": {"content": b"--a--", "headers": {"Content-Type": "multipart/form-data; boundary=b"}},
}


async def test_an_upload_without_a_file_is_refused(client, app, ada, subtests):
    before = await kept(app)
    for name, sent in UPLOADS.items():
        with subtests.test(name):
            answer = await client.post(UPLOAD, **sent)
            assert error_of(answer) == (400, "E4009")
            assert "field `file`" in answer.json()["error"]["message"]
    assert await kept(app) == before


async def test_an_image_has_10_mb_at_most(client, app, ada):
    before, image = await kept(app), image_bytes()
    for size in (10_000_001, 10_200_000):
        answer = await client.post(UPLOAD, files={"file": image.ljust(size, b"\0")})
        assert error_of(answer) == (413, "E4013")
    assert await kept(app) == before
    assert (await client.post(UPLOAD, files={"file": image.ljust(10_000_000, b"\0")})).status_code == 201


def turned():
    """Red above blue, for whoever heeds the EXIF orientation; else blue is at the right."""
    image = Image.new("RGB", (64, 48), "red")
    image.paste("blue", (32, 0, 64, 48))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    return saved(image, "JPEG", exif=exif, quality=95)


def animated():
    frames = [Image.new("P", (64, 48), n) for n in range(3)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)


ODD_IMAGES = {
    "animated GIF": (animated, "gif"),
    "CMYK JPEG": (lambda: saved(Image.new("CMYK", (64, 48), (0, 200, 200, 0)), "JPEG"), "jpg"),
    "16-bit PNG": (lambda: saved(Image.new("I;16", (64, 48), 30_000), "PNG"), "png"),
    "PNG with holes": (lambda: saved(Image.new("RGBA", (64, 48), (200, 0, 0, 100)), "PNG"), "png"),
    "PNG of a palette": (lambda: saved(Image.new("P", (64, 48), 3), "PNG", transparency=0), "png"),
    "PNG in black and white": (lambda: saved(Image.new("1", (64, 48), 1), "PNG"), "png"),
    "WebP": (lambda: saved(Image.new("RGB", (64, 48), "red"), "WEBP"), "webp"),
    "JPEG turned by EXIF": (turned, "jpg"),
    "one pixel": (lambda: saved(Image.new("RGB", (1, 1)), "PNG"), "png"),
}


async def test_an_odd_image_is_an_image(client, app, ada, subtests):
    for name, (content, ending) in ODD_IMAGES.items():
        with subtests.test(name):
            answer = await client.post(UPLOAD, files={"file": ("page.html", content(), "text/html")})
            assert (answer.status_code, answer.json()["data"]["key"].rpartition(".")[2]) == (201, ending)
            shown = await client.get(answer.json()["data"]["url"])
            assert shown.content == content() and shown.headers["content-type"].startswith("image/")
            assert shown.headers["x-content-type-options"] == "nosniff"
            assert "sandbox" in shown.headers["content-security-policy"]
            still = v.open_still(content(), 64)
            assert (still.mode, max(still.size) <= 64) == ("RGB", True)


def test_an_image_is_shown_upright_and_in_its_colours():
    upright = v.open_still(turned(), 64)
    (red, _, blue), (_, _, below) = upright.getpixel((24, 8)), upright.getpixel((24, 56))
    assert (upright.size, red > 200, blue < 60, below > 200) == ((48, 64), True, True, True)
    grey = v.open_still(ODD_IMAGES["16-bit PNG"][0](), 64).getpixel((5, 5))
    assert all(100 < part < 135 for part in grey), grey


async def middle(client, video):
    """The mean colour of the picture a third into the video."""
    poster = await client.get(video["posterUrl"])
    return Image.open(io.BytesIO(poster.content)).convert("RGB").resize((1, 1)).getpixel((0, 0))


async def test_a_preview_shows_the_image(client, app, ada):
    posters = []
    wish = {"model": "preview", "prompt": "a fox", "seed": 7, "duration": 1}
    async with v.working(app):
        for colour in [None, (220, 20, 20), (20, 20, 220)]:
            image = {}
            if colour:
                uploaded = await client.post(UPLOAD, files={"file": image_bytes(colour=colour)})
                image = {"imageUrl": uploaded.json()["data"]["url"]}
            made = await client.post(GENERATE, json=wish | image, headers={"Prefer": "wait=30"})
            assert made.json()["data"]["status"] == "COMPLETED", made.text
            posters.append(await middle(client, made.json()["data"]))
    plain, red, blue = posters
    assert red[0] > red[2] + 80 and blue[2] > blue[0] + 80
    assert plain not in (red, blue)
    await books_are_right(app)


async def test_bad_requests_at_once_leave_nothing_either(client, app, ada):
    before = await kept(app)
    headers = {"Idempotency-Key": "k"}
    sent = [client.post(GENERATE, content=body, headers=headers) for body, _, _ in BODIES.values()]
    answers = await asyncio.gather(*sent)
    assert {answer.status_code for answer in answers} == {400}
    assert await kept(app) == before
    assert (await client.get("/api/v1/credit/balance")).json()["data"]["availableCredits"] == 100
    await books_are_right(app)


@pytest.mark.parametrize("path", [GENERATE, UPLOAD, "/api/auth/sign-in"])
async def test_a_client_that_goes_away_in_the_middle_is_no_bug(app, ada, path, caplog):
    parts = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    form = b"multipart/form-data; boundary=b" if path == UPLOAD else b"application/json"
    named = {**ada.headers, "Host": "test", "Content-Type": form.decode(), "Content-Length": "99"}
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [(name.lower().encode(), text.encode()) for name, text in named.items()],
             "scheme": "http", "server": ("test", 80), "client": ("192.0.2.1", 1), "root_path": ""}
    sent = []

    async def receive():
        return parts.pop(0) if len(parts) > 1 else parts[0]

    async def send(message):
        sent.append(message)

    before = await kept(app)
    await v.http(app)(scope, receive, send)
    assert (sent[0]["status"], caplog.records) == (400, [])
    assert await kept(app) == before
