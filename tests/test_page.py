"""The page is plain files: all there, in both languages, legible, and from nowhere else."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

import videofly as v
from conftest import error_of

pytestmark = pytest.mark.anyio
FILES = sorted(file for file in v.STATIC.rglob("*") if file.is_file())
PAGES = {**dict.fromkeys(v.PAGES, v.PAGE), "/docs": v.DOCS}


class References(HTMLParser):
    """What a page loads, and what it does inline."""

    def __init__(self, page):
        super().__init__()
        self.paths, self.inline = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "src" or (name == "href" and tag == "link"):
                self.paths.append(value)
            if name == "style" or name.startswith("on"):
                self.inline.append((tag, name))

    def handle_data(self, data):
        if self.lasttag in ("script", "style") and data.strip():
            self.inline.append((self.lasttag, data))


def imports(module):
    """The files that a module imports."""
    text = module.read_text()
    return [(module.parent / path).resolve() for path in re.findall(r'^import .*?"(.+?)"', text, re.M | re.S)]


def colours(scheme):
    """The tokens of a colour scheme: {name: oklch}."""
    light, dark = (v.STATIC / "css/tokens.css").read_text().split("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--lch-([\w-]+):\s+([^;]+);", light))
    return found | (dict(re.findall(r"--lch-([\w-]+):\s+([^;]+);", dark)) if scheme == "dark" else {})


def luminance(lch):
    """Relative luminance, as WCAG 2 has it, of "lightness% chroma hue" in OKLCH."""
    lightness, chroma, hue = (float(part.rstrip("%")) for part in lch.split())
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness / 100 + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness / 100 - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness / 100 - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short
    red, green, blue = (min(max(linear, 0), 1) for linear in (red, green, blue))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_says_what_it_may_load(client, path):
    answer = await client.get(path)
    assert answer.status_code == 200 and answer.text == PAGES[path]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'; frame-ancestors 'none'; base-uri 'none'")
    assert "unsafe-eval" not in policy and "script-src" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", PAGES)
async def test_everything_a_page_loads_is_there_for_ever(client, path):
    references = References(PAGES[path])
    assert references.paths and references.inline == []
    for wanted in references.paths:
        answer = await client.get(wanted)
        assert answer.status_code == 200, wanted
        assert answer.headers["cache-control"].replace(" ", "") == "max-age=31536000,public,immutable", wanted
        assert re.match(r"text/(css|javascript)|image/svg\+xml", answer.headers["content-type"]), wanted


async def test_the_page_itself_is_asked_for_again_each_time(client):
    for path in PAGES:
        assert "immutable" not in (await client.get(path)).headers.get("cache-control", "")


def test_every_file_is_used_and_every_import_is_there():
    paths = References(v.PAGE).paths + References(v.DOCS).paths
    loaded = {path.removeprefix(v.STATIC_PATH + "/") for path in paths}
    imported = {file for module in FILES if module.suffix == ".js" for file in imports(module)}
    assert all(file.is_file() for file in imported)
    used = {(v.STATIC / path).resolve() for path in loaded} | imported
    unused = {file.name for file in FILES if file.resolve() not in used}
    assert unused == {"index.html", "docs.html", "first-start.txt"}


def test_every_module_of_the_page_is_fetched_at_once():
    """Without a build, an import that was not named in the page costs another round trip."""
    loaded = set(References(v.PAGE).paths)
    modules = {f"{v.STATIC_PATH}/{file.relative_to(v.STATIC)}" for file in FILES if file.suffix == ".js"}
    assert modules - loaded == {f"{v.STATIC_PATH}/js/docs.js"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_is_short_and_refers_to_no_other_host(file):
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|['\"(]//", text)
    assert "eval(" not in text and "innerHTML" not in text.replace("template.innerHTML", "")
    assert len(text.splitlines()) <= 150
    assert max(map(len, text.splitlines())) <= 140 or file.suffix == ".svg"


NOWHERE = [
    "/nowhere", "/sign-in/more", "/static/000000000000/js/app.js", f"{v.STATIC_PATH}/js/nowhere.js",
    f"{v.STATIC_PATH}/../schema.sql", f"{v.STATIC_PATH}/%2e%2e/schema.sql", f"{v.STATIC_PATH}/js",
    "/docs/nowhere", "/docs/swagger/nowhere.js", "/api/v1/nowhere",
]


@pytest.mark.parametrize("path", NOWHERE)
async def test_an_unknown_path_is_really_not_found(client, path):
    assert error_of(await client.get(path)) == (404, "E4012")


def languages():
    """The texts of words.js, read by JavaScript's own rules as far as these go: {language: {key: text}}."""
    source = re.search(r"languages = (\{.*?\n\})\n", (v.STATIC / "js/words.js").read_text(), re.S)[1]
    source = re.sub(r",(\s*})", r"\1", re.sub(r"(?<=[{,\s])(\w+): (?=[{\"])", r'"\1": ', source))
    return json.loads(source)


def test_both_languages_say_everything():
    texts = languages()
    assert list(texts) == ["en", "zh"]
    assert list(texts["en"]) == list(texts["zh"])
    assert all(text.strip() for language in texts.values() for text in language.values())
    own = [text for key, text in texts["zh"].items() if not key.startswith("other")]
    assert all(re.search(r"[\u4e00-\u9fff]", text) for text in own)


def test_every_word_is_said_and_every_said_word_is_there():
    modules = "".join(file.read_text() for file in FILES if file.suffix == ".js")
    said = set(re.findall(r"\bwords\.(\w+)", modules.replace("words.js", "")))
    words = set(languages()["en"])
    codes = {kind.code for kind in v.Problem.__subclasses__()}
    by_name = {"offline", "available", "frozen", "used", "soon", "creditsEnd", "videosEnd"}  # words[…]
    assert said <= words
    assert words - said - by_name <= codes


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(scheme):
    """WCAG 2.2 AA: 4.5 for text, 3 for the edges of fields."""
    tone = colours(scheme)
    for ground in ("paper", "card"):
        for ink in ("ink", "ink-soft", "accent", "bad", "good"):
            assert contrast(tone[ink], tone[ground]) >= 4.5, (ink, ground)
    assert contrast(tone["card"], tone["accent"]) >= 4.5  # the words on a button


def test_contrast_is_measured_as_wcag_has_it():
    assert contrast("100% 0 0", "0% 0 0") == pytest.approx(21, abs=0.01)
    assert contrast("62.8% 0.2577 29.23", "100% 0 0") == pytest.approx(4.0, abs=0.02)  # red on white
