"""The built-in renderer makes real videos, and what is not a video or an image is told from what is."""

import io
import itertools
import wave

import av
import pytest
from PIL import Image

import videofly as v


def make(target, **changes):
    wish = {"prompt": "A red kite", "seed": 1, "seconds": 1, "width": 320, "height": 180, "image": None}
    v.render_preview(target, **{**wish, "report": lambda percent: None, **changes})
    return target


def examine(path):
    return v.examine_video(path, path.with_suffix(".jpg"))


def pictures(path):
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_image()


def pixels(path):
    return [picture.tobytes() for picture in pictures(path)]


def still(size=(300, 200), kind="JPEG", orientation=1):
    """Red on the left, blue on the right."""
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", size, (200, 40, 40))
    image.paste((40, 40, 200), (size[0] // 2, 0, *size))
    image.save(out, kind, exif=exif)
    return out.getvalue()


def sound():
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    return out.getvalue()


@pytest.fixture(scope="session")
def kite(tmp_path_factory):
    """A video made once: 3 seconds of 320 x 180."""
    return make(tmp_path_factory.mktemp("preview") / "kite.mp4", seconds=3)


@pytest.mark.parametrize("size", [(320, 180), (180, 320), (240, 240)])
def test_the_video_has_exactly_the_size_and_length_asked_for(tmp_path, size):
    path = make(tmp_path / "a.mp4", seconds=2, width=size[0], height=size[1])
    measured = {"width": size[0], "height": size[1], "duration_ms": 2000, "size_bytes": path.stat().st_size}
    assert examine(path) == measured
    with v.av.open(str(path)) as film:
        assert film.streams.video[0].codec.name == "h264"
    assert len(pixels(path)) == 2 * v.FPS


@pytest.mark.parametrize(("ratio", "quality", "size"), [
    ("16:9", "480p", (854, 480)), ("9:16", "480p", (480, 854)), ("1:1", "720p", (720, 720)),
    ("4:3", "360p", (480, 360)), ("3:4", "720p", (720, 960)), ("21:9", "1080p", (2520, 1080)),
    ("16:9", "121p", (214, 120)),
])
def test_quality_names_the_shorter_side_and_both_are_even(ratio, quality, size):
    assert v.frame_size(ratio, quality) == size


def test_the_index_comes_first_so_that_a_browser_can_begin_at_once(kite):
    data = kite.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_the_file_says_that_no_ai_made_it(tmp_path):
    with av.open(str(make(tmp_path / "a.mp4", prompt="word " * 100))) as container:
        assert container.metadata["comment"] == v.NOTE
        assert container.metadata["title"] == "word " * 40
    assert "not an AI model" in v.NOTE


@pytest.mark.parametrize("image", [None, still()], ids=["a prompt", "a still"])
@pytest.mark.parametrize("size", [(640, 360), (360, 640), (214, 120)])
def test_every_picture_says_that_it_is_a_preview(tmp_path, size, image):
    film = [*pictures(make(tmp_path / "a.mp4", width=size[0], height=size[1], image=image))]
    for picture in (film[0], film[12], film[-1]):  # white letters with a black line around them
        corner = picture.convert("L").crop((size[0] - 100, 10, size[0] - 10, 30))
        assert corner.getextrema()[1] > 220 and corner.getextrema()[0] < 90


def test_the_picture_depends_on_prompt_and_seed_and_nothing_else(tmp_path):
    first = pixels(make(tmp_path / "a.mp4"))
    assert first == pixels(make(tmp_path / "b.mp4"))
    assert first != pixels(make(tmp_path / "c.mp4", seed=2))
    assert first != pixels(make(tmp_path / "d.mp4", prompt="A blue kite"))


def test_the_picture_moves_and_never_jumps(kite):
    grey = [picture.convert("L").resize((32, 18)).tobytes() for picture in pictures(kite)]
    pairs = [*itertools.pairwise(grey), (grey[-1], grey[0])]  # it loops
    assert max(abs(a - b) for before, after in pairs for a, b in zip(before, after, strict=True)) < 16
    assert grey[0] != grey[12]


PROMPTS = ["一只猫在弹钢琴", "🦊", "a 🦊 in the 雪", "W" * 500, "a\n\tb" * 100, " ", "\U0010ffff", "العربية"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_prompt_can_be_rendered(tmp_path, prompt):
    assert examine(make(tmp_path / "a.mp4", prompt=prompt))["duration_ms"] == 1000


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_still_is_brought_to_life(tmp_path, kind):
    frames = list(pictures(make(tmp_path / "a.mp4", image=still(kind=kind))))
    assert frames[0].getpixel((20, 90))[0] > 150 and frames[0].getpixel((300, 90))[2] > 150
    assert frames[0].tobytes() != frames[-1].tobytes()


def test_a_still_moves_and_never_jumps(tmp_path):
    light = io.BytesIO()
    Image.radial_gradient("L").save(light, "PNG")
    film = pictures(make(tmp_path / "a.mp4", seconds=2, image=light.getvalue()))
    grey = [picture.convert("L").resize((32, 18)).tobytes() for picture in film]
    pairs = itertools.pairwise(grey)
    assert max(abs(a - b) for before, after in pairs for a, b in zip(before, after, strict=True)) < 16
    assert len({grey[0], grey[24], grey[-1]}) == 3


def test_a_still_is_turned_upright(tmp_path):
    turned = next(pictures(make(tmp_path / "a.mp4", image=still(orientation=3))))
    assert turned.getpixel((20, 90))[2] > 150


@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 2000), (3000, 2000)])
def test_a_still_of_any_shape_fills_the_frame(tmp_path, size):
    assert examine(make(tmp_path / "a.mp4", image=still(size, "PNG")))["width"] == 320


def test_an_unusable_still_is_refused_and_leaves_no_file(tmp_path):
    huge = io.BytesIO()
    Image.new("1", (8001, 5000)).save(huge, "PNG")
    for data in (b"", b"not an image", still()[:400], huge.getvalue(), sound()):
        with pytest.raises(v.NotAnImage):
            v.examine_image(data)
        with pytest.raises(v.NotAnImage):
            make(tmp_path / "a.mp4", image=data)
    assert not list(tmp_path.iterdir())


def test_an_image_is_known_by_its_content():
    assert v.examine_image(still(kind="WEBP")) == ("image/webp", "webp")


@pytest.mark.parametrize("limit", [0, 50, 100])
def test_cancelling_stops_at_once_and_leaves_no_file(tmp_path, limit):
    seen = []

    def report(percent):
        seen.append(percent)
        if percent >= limit:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make(tmp_path / "a.mp4", report=report)
    assert seen == sorted(seen) and sum(percent >= limit for percent in seen) == 1
    assert not list(tmp_path.iterdir())


def test_progress_is_reported_about_twenty_times(tmp_path):
    seen = []
    make(tmp_path / "a.mp4", seconds=2, report=seen.append)
    assert (seen[0], seen[-1], len(seen)) == (0, 100, 21)


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nkite.mp4\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("data", [b"", b'{"error": 1}', still(), still(kind="GIF"), sound(), PLAYLIST], ids=[
    "nothing", "an error message", "a photograph", "an animation", "a sound", "a playlist"])
def test_whatever_is_not_a_video_is_refused(tmp_path, data):
    (tmp_path / "bad.mp4").write_bytes(data)
    with pytest.raises(v.NotAVideo, match=r"^it "):
        examine(tmp_path / "bad.mp4")
    assert not (tmp_path / "bad.jpg").exists()


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_video_that_was_cut_short_is_refused(kite, tmp_path, share):
    whole = kite.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(v.NotAVideo, match=r"^it "):
        examine(tmp_path / "cut.mp4")


def test_a_video_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(v.NotAVideo):
        examine(tmp_path / "missing.mp4")


@pytest.mark.parametrize(("size", "shown"), [((1280, 720), (640, 360)), ((360, 640), (360, 640))])
def test_the_poster_is_a_progressive_jpeg_of_640_pixels_at_most(tmp_path, size, shown):
    examine(make(tmp_path / "a.mp4", width=size[0], height=size[1]))
    with Image.open(tmp_path / "a.jpg") as poster:
        assert (poster.format, poster.size, bool(poster.info.get("progressive"))) == ("JPEG", shown, True)
