"""A person at a real browser, with a real server: everything by role and label, and not one complaint.

SHOTS=folder keeps pictures of the pages, for people to look at."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--host-resolver-rules=MAP videofly.test 127.0.0.1",
]  # fmt: skip
EMAIL, PASSWORD = "ada@example.com", "correct horse"
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1100, "height": 760}


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


class Visit:
    """A browser window of somebody's own, and all that it complained about.

    Chromium reports every answer of 400 or more as an error of the page.  A test that means to be refused says
    so beforehand with will_be_refused, and the refusal must then happen, once, there and so."""

    def __init__(self, browser, server, *, host="127.0.0.1", **options):
        self.url = f"http://{host}:{server.port}"
        self.context = browser.new_context(base_url=self.url, **{"locale": "en-GB", "viewport": DESK} | options)
        self.context.set_default_timeout(10_000)
        expect.set_options(timeout=10_000)
        self.complaints, self.refusals, self.expected, self.paths = [], [], [], []
        self.page = self.context.new_page()
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"{request.url}: {request.failure}"))
        self.page.on("request", self.see)

    def hear(self, message):
        refused = re.match(r"Failed to load resource: the server responded with a status of (\d+)", message.text)
        if refused:
            self.refusals.append((int(refused[1]), urlsplit(message.location["url"]).path))
        elif message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def see(self, request):
        address = urlsplit(request.url)
        self.paths.append(address.path)
        if address.scheme not in ("data", "blob") and f"{address.scheme}://{address.netloc}" != self.url:
            self.complaints.append(f"left for {request.url}")

    def will_be_refused(self, status, path):
        self.expected.append((status, path))

    def shot(self, name):
        if os.environ.get("SHOTS"):
            Path(os.environ["SHOTS"]).mkdir(exist_ok=True)
            self.page.screenshot(path=Path(os.environ["SHOTS"]) / f"{name}.png", full_page=True)

    def close(self):
        self.context.close()
        assert self.complaints == []
        assert sorted(self.refusals) == sorted(self.expected)


@pytest.fixture
def visit(chromium, server):
    """Opens windows; at the end none may have complained."""
    visits = []

    def open_window(**options):
        visits.append(Visit(chromium, server, **options))
        return visits[-1]

    yield open_window
    for one in visits:
        one.close()


def set_up_link(server):
    return re.search(r"http://\S+/set-up#\S+", server.output())[0]


def path_of(link):
    return "/set-up#" + link.partition("#")[2]


def fill_in(page, email, password, button):
    page.get_by_label("E-mail").fill(email)
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name=button, exact=True).click()


def make_administrator(window, server):
    """The first account, by the link that the server printed."""
    window.page.goto(path_of(set_up_link(server)))
    fill_in(window.page, EMAIL, PASSWORD, "Make the account")
    expect(window.page.get_by_role("heading", level=1)).to_have_text("Your account")


def make_key(page, name):
    """An API key made on the page, as the page shows it."""
    page.get_by_label("Name of the key").fill(name)
    page.get_by_role("button", name="Make a key").click()
    shown = page.get_by_role("status").get_by_text(re.compile(r"^vf_"))
    expect(shown).to_be_visible()
    return shown.inner_text()


def credits_shown(page):
    """What the card of credits says, as {what: how many}."""
    card = page.get_by_role("region", name="Credits")
    names, numbers = card.get_by_role("term").all_inner_texts(), card.get_by_role("definition").all_inner_texts()
    return {name: int(number) for name, number in zip(names, numbers, strict=True)}


def client(server, key):
    return httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60)


def test_the_link_that_the_server_prints_makes_the_administrator(visit, server):
    window = visit()
    page = window.page
    page.goto(path_of(set_up_link(server)))
    expect(page).to_have_title("Set up VideoFly · VideoFly")
    window.shot("set-up")
    fill_in(page, EMAIL, PASSWORD, "Make the account")
    expect(page.get_by_text(EMAIL)).to_be_visible()
    expect(page).to_have_title("Your account · VideoFly")
    assert credits_shown(page) == {"available": 10, "set aside": 0, "spent": 0, "expire within a week": 0}
    assert urlsplit(page.url).path == "/" and not urlsplit(page.url).fragment
    made = client(server, make_key(page, "admin")).get("/api/v1/user/me").json()["data"]
    assert made["isAdmin"] is True


def test_a_set_up_link_works_once(visit, server):
    window, late = visit(), visit()
    make_administrator(window, server)
    late.will_be_refused(403, "/api/auth/set-up")
    late.page.goto(path_of(set_up_link(server)))
    fill_in(late.page, "eve@example.com", PASSWORD, "Make the account")
    expect(late.page.get_by_role("alert")).to_have_text("That link was used, or is not valid any more.")
    late.page.goto("/set-up")
    late.page.reload()  # only what follows the # had changed
    expect(late.page.get_by_role("main")).to_contain_text("Open the link that the server printed when it started.")


def test_a_key_made_on_the_page_makes_a_video_until_it_is_revoked(visit, server):
    window = visit()
    page = window.page
    make_administrator(window, server)
    keys = page.get_by_role("region", name="API keys")
    expect(keys).to_contain_text("You have none yet.")
    key = make_key(page, "my <b>laptop</b>")
    window.shot("key-made")
    expect(keys.get_by_role("listitem")).to_contain_text("my <b>laptop</b>")  # text, not markup
    expect(keys.get_by_role("listitem")).to_contain_text("never used")
    with client(server, key) as program:
        wish = {"model": "preview", "prompt": "a red fox over snow", "duration": 2, "quality": "360p"}
        video = program.post("/api/v1/video/generate", json=wish, headers={"Prefer": "wait=60"}).json()["data"]
        assert (video["status"], video["creditsUsed"]) == ("COMPLETED", 1)
        assert program.get(video["videoUrl"]).content[4:8] == b"ftyp"
        page.reload()
        expect(keys.get_by_role("listitem")).to_contain_text("last used")
        assert credits_shown(page) == {"available": 9, "set aside": 0, "spent": 1, "expire within a week": 0}
        expect(page.get_by_text(key)).to_have_count(0)
        page.on("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Revoke the key my <b>laptop</b>").click()
        expect(keys).to_contain_text("You have none yet.")
        expect(page.get_by_role("heading", name="API keys")).to_be_focused()
        assert program.get("/api/v1/user/me").status_code == 401


def test_signing_out_and_in_again(visit, server):
    window = visit()
    page = window.page
    make_administrator(window, server)
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
    expect(page.get_by_role("button", name="Sign out")).to_have_count(0)
    page.goto("/")
    expect(page).to_have_url(window.url + "/sign-in")
    window.will_be_refused(401, "/api/auth/sign-in")
    fill_in(page, EMAIL, "wrong horse", "Sign in")
    expect(page.get_by_role("alert")).to_have_text("The e-mail address or the password is wrong.")
    window.shot("wrong-password")
    fill_in(page, EMAIL, PASSWORD, "Sign in")
    expect(page.get_by_role("heading", level=1)).to_have_text("Your account")
    expect(page.get_by_text(EMAIL)).to_be_visible()


def test_a_session_that_ended_elsewhere_leads_to_signing_in(visit, server):
    window = visit()
    make_administrator(window, server)
    window.context.clear_cookies()
    window.will_be_refused(401, "/api/v1/keys")
    window.page.get_by_label("Name of the key").fill("late")
    window.page.get_by_role("button", name="Make a key").click()
    expect(window.page.get_by_role("heading", level=1)).to_have_text("Sign in")


def test_a_second_person_signs_up_and_is_nobody_special(visit, server):
    make_administrator(visit(), server)
    window = visit()
    page = window.page
    page.goto("/")
    page.get_by_role("link", name="Make an account").click()
    expect(page.get_by_role("main")).to_be_focused()
    window.will_be_refused(409, "/api/auth/sign-up")
    fill_in(page, EMAIL.upper(), PASSWORD, "Make an account")
    expect(page.get_by_role("alert")).to_have_text("There is an account with that e-mail address.")
    fill_in(page, "bob@example.com", PASSWORD, "Make an account")
    expect(page.get_by_text("bob@example.com")).to_be_visible()
    assert credits_shown(page)["available"] == 10
    with client(server, make_key(page, "bob")) as program:
        assert program.get("/api/v1/user/me").json()["data"]["isAdmin"] is False


def test_nobody_leaves_a_field_wrong(visit, server):
    """The browser itself refuses, in the reader's language, before anything is sent."""
    window = visit()
    page = window.page
    page.goto("/sign-up")
    for email, password in [("", PASSWORD), ("not an address", PASSWORD), (EMAIL, ""), (EMAIL, "short")]:
        fill_in(page, email, "", "Make an account")
        page.get_by_label("Password").press_sequentially(password)
        page.get_by_role("button", name="Make an account").click()
    assert page.get_by_label("Password").get_attribute("aria-describedby")
    expect(page.get_by_label("Password")).to_have_accessible_description("8 characters or more.")
    assert "/api/auth/sign-up" not in window.paths


def test_the_page_speaks_chinese_and_remembers_it(visit, server):
    window = visit()
    page = window.page
    page.goto("/sign-in")
    expect(page.locator(":root")).to_have_attribute("lang", "en")
    page.get_by_role("button", name="中文").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("登录")
    expect(page.locator(":root")).to_have_attribute("lang", "zh-Hans")
    expect(page).to_have_title("登录 · VideoFly")
    page.get_by_role("link", name="注册").click()
    expect(page.get_by_label("邮箱")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("注册")
    page.get_by_role("button", name="English").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Make an account")
    expect(page.locator(":root")).to_have_attribute("lang", "en")


def test_a_browser_in_chinese_is_spoken_to_in_chinese(visit, server):
    window = visit(locale="zh-CN", viewport=PHONE)
    page = window.page
    page.goto(path_of(set_up_link(server)))
    page.get_by_label("邮箱").fill(EMAIL)
    page.get_by_label("密码").fill(PASSWORD)
    window.shot("phone-zh-set-up")
    page.get_by_role("button", name="创建账户").click()
    page.get_by_label("密钥名称").fill("笔记本")
    page.get_by_role("button", name="创建密钥").click()
    expect(page.get_by_role("status")).to_contain_text("vf_")
    expect(page.get_by_role("button", name="吊销密钥 笔记本")).to_be_visible()
    window.shot("phone-zh-account")
    page.get_by_role("button", name="退出").click()
    window.will_be_refused(401, "/api/auth/sign-in")
    page.get_by_label("邮箱").fill(EMAIL)
    page.get_by_label("密码").fill("wrong horse")
    page.get_by_role("button", name="登录").click()
    expect(page.get_by_role("alert")).to_have_text("邮箱或密码错误。")


def focus_stops(page, presses):
    """What Tab comes to, one after the other, by its accessible name."""
    stops = []
    for _ in range(presses):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("""() => {
            const at = document.activeElement
            return at.ariaLabel ?? at.labels?.[0]?.textContent.trim() ?? at.textContent.trim() }"""))
    return stops


def test_everything_can_be_done_with_the_keyboard_alone(visit, server):
    window = visit()
    page = window.page
    page.goto(path_of(set_up_link(server)))
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    header = ["Skip to content", "VideoFly", "API manual", "中文"]
    assert focus_stops(page, 7) == [*header, "E-mail", "Password", "Make the account"]
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.type(EMAIL)
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")  # and the link's token is still there
    expect(page.get_by_role("heading", level=1)).to_have_text("Your account")
    expect(page.get_by_role("main")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.type("keyboard")
    page.keyboard.press("Enter")
    expect(page.get_by_role("listitem")).to_contain_text("keyboard")
    page.reload()
    expect(page.get_by_role("listitem")).to_be_visible()
    assert focus_stops(page, 8) == [*header, "Sign out", "Revoke the key keyboard", "Name of the key", "Make a key"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_every_page_fits_the_window_in_light_and_dark(visit, server, viewport, scheme):
    window = visit(viewport=viewport, color_scheme=scheme)
    page, name = window.page, f"{'phone' if viewport is PHONE else 'desk'}-{scheme}"
    for path in ("/sign-in", "/sign-up", "/set-up"):
        page.goto(path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert overflow(page) == 0
    page.goto("/sign-in")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    window.shot(f"{name}-sign-in")
    make_administrator(window, server)
    make_key(page, "a-very-long-name-without-any-space-in-it-" * 2)
    expect(page.get_by_role("listitem")).to_be_visible()
    assert overflow(page) == 0
    window.shot(f"{name}-account")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = float(re.search(r"[\d.]+", background)[0])
    assert (lightness > 0.9) == (scheme == "light"), background


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize(("viewport", "scheme"), [(PHONE, "dark"), (DESK, "light")], ids=["phone", "desk"])
def test_the_manual_lists_every_operation_and_asks_nobody_else(visit, server, viewport, scheme):
    """Under a name of its own: on 127.0.0.1 Swagger UI does not even try to call its validator."""
    window = visit(host="videofly.test", viewport=viewport, color_scheme=scheme)
    page = window.page
    page.goto("/docs")
    expect(page.get_by_role("heading", level=1).or_(page.get_by_role("heading", level=2)).first).to_contain_text("VideoFly")
    described = httpx.get(server.url + "/openapi.json", trust_env=False).json()["paths"]
    operations = {(method.upper(), path) for path, methods in described.items() for method in methods}
    rows = page.get_by_role("button", name=re.compile(r"^(get|post|delete|put|patch) ", re.I))
    expect(rows).to_have_count(len(operations))
    window.shot(f"{'phone' if viewport is PHONE else 'desk'}-docs")
    page.get_by_role("button", name=re.compile(r"GET.*/api/v1/config/models")).first.click()
    page.get_by_role("button", name="Execute").click()
    expect(page.get_by_role("main")).to_contain_text('"preview"')
    page.get_by_role("link", name="VideoFly", exact=True).click()
    expect(page).to_have_url(window.url + "/sign-in")


def test_an_address_without_a_page_says_so(visit, server):
    window = visit()
    window.will_be_refused(404, "/videoz")
    assert window.page.goto("/videoz").status == 404
