"""A person at a real browser, with a real server: everything by role and label, and not one complaint.

SHOTS=folder keeps pictures of the pages, for people to look at."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

from conftest import Server

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync", "--no-first-run", "--host-resolver-rules=MAP videofly.test 127.0.0.1",
]  # fmt: skip
REFUSED = r"Failed to load resource: the server responded with a status of (\d+)"
EMAIL, PASSWORD = "ada@example.com", "correct horse"
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1100, "height": 760}


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A server that has its administrator, for all those who come later."""
    house = Server(tmp_path_factory.mktemp("browser") / "data").start()
    token = set_up_link(house).partition("#")[2]
    account = {"token": token, "email": "admin@example.com", "password": PASSWORD}
    assert httpx.post(house.url + "/api/auth/set-up", json=account, trust_env=False).status_code == 201
    yield house
    house.stop()


class Visit:
    """A browser window of somebody's own, and all that it complained about.

    Chromium reports every answer of 400 or more as an error of the page.  A test that means to be refused
    says so beforehand with will_be_refused, and the refusal must then happen, once, there and so."""

    def __init__(self, browser, server, *, host="127.0.0.1", **options):
        self.url = f"http://{host}:{server.port}"
        options = {"locale": "en-GB", "viewport": DESK} | options
        self.context = browser.new_context(base_url=self.url, **options)
        self.context.set_default_timeout(10_000)
        expect.set_options(timeout=10_000)
        self.complaints, self.refusals, self.expected, self.paths = [], [], [], []
        self.page = self.context.new_page()
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        self.page.on("requestfailed", self.miss)
        self.page.on("request", self.see)

    def hear(self, message):
        refused = re.match(REFUSED, message.text)
        if refused:
            self.refusals.append((int(refused[1]), urlsplit(message.location["url"]).path))
        elif message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def see(self, request):
        address = urlsplit(request.url)
        self.paths.append(address.path)
        if address.scheme not in ("data", "blob") and f"{address.scheme}://{address.netloc}" != self.url:
            self.complaints.append(f"left for {request.url}")

    def miss(self, request):
        if request.failure != "net::ERR_ABORTED":  # by going on before the icon came
            self.complaints.append(f"{request.url}: {request.failure}")

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
def visit(chromium, house):
    """Opens windows; at the end none may have complained."""
    visits = []

    def open_window(server=house, **options):
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


def sign_up(window, email=EMAIL):
    window.page.goto("/sign-up")
    fill_in(window.page, email, PASSWORD, "Make an account")
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
    names = card.get_by_role("term").all_inner_texts()
    numbers = map(int, card.get_by_role("definition").all_inner_texts())
    return dict(zip(names, numbers, strict=True))


def client(server, key):
    headers = {"Authorization": f"Bearer {key}", "Prefer": "wait=60"}
    return httpx.Client(base_url=server.url, headers=headers, trust_env=False, timeout=90)


def test_the_link_that_the_server_prints_makes_the_administrator_once(visit, server):
    window, late = visit(server), visit(server)
    page = window.page
    page.goto(path_of(set_up_link(server)))
    expect(page).to_have_title("Set up VideoFly · VideoFly")
    window.shot("set-up")
    fill_in(page, EMAIL, PASSWORD, "Make the account")
    expect(page.get_by_text(EMAIL)).to_be_visible()
    expect(page).to_have_title("Your account · VideoFly")
    assert credits_shown(page) == {"available": 10, "set aside": 0, "spent": 0, "expire within a week": 0}
    assert urlsplit(page.url).path == "/" and not urlsplit(page.url).fragment
    with client(server, make_key(page, "admin")) as program:
        assert program.get("/api/v1/user/me").json()["data"]["isAdmin"] is True
    late.will_be_refused(403, "/api/auth/set-up")
    late.page.goto(path_of(set_up_link(server)))
    fill_in(late.page, "eve@example.com", PASSWORD, "Make the account")
    expect(late.page.get_by_role("alert")).to_have_text("That link was used, or is not valid any more.")


def test_a_set_up_page_without_its_link_says_where_that_is(visit):
    page = visit().page
    page.goto("/set-up")
    expect(page.get_by_role("main")).to_contain_text("Open the link that the server printed when it started.")


def test_a_key_made_on_the_page_makes_a_video_until_it_is_revoked(visit, house):
    window = visit()
    page = window.page
    sign_up(window, "maker@example.com")
    keys = page.get_by_role("region", name="API keys")
    expect(keys).to_contain_text("You have none yet.")
    key = make_key(page, "my <b>laptop</b>")
    window.shot("key-made")
    expect(keys.get_by_role("listitem")).to_contain_text("my <b>laptop</b>")  # text, not markup
    expect(keys.get_by_role("listitem")).to_contain_text("never used")
    with client(house, key) as program:
        wish = {"model": "preview", "prompt": "a red fox over snow", "duration": 2, "quality": "360p"}
        video = program.post("/api/v1/video/generate", json=wish).json()["data"]
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


def test_signing_out_and_in_again(visit):
    window = visit()
    page = window.page
    sign_up(window, "again@example.com")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
    expect(page.get_by_role("button", name="Sign out")).to_have_count(0)
    page.goto("/")
    expect(page).to_have_url(window.url + "/sign-in")
    window.will_be_refused(401, "/api/auth/sign-in")
    fill_in(page, "again@example.com", "wrong horse", "Sign in")
    expect(page.get_by_role("alert")).to_have_text("The e-mail address or the password is wrong.")
    window.shot("wrong-password")
    fill_in(page, "again@example.com", PASSWORD, "Sign in")
    expect(page.get_by_role("heading", level=1)).to_have_text("Your account")
    expect(page.get_by_text("again@example.com")).to_be_visible()


def test_a_session_that_ended_elsewhere_leads_to_signing_in(visit):
    window = visit()
    sign_up(window, "elsewhere@example.com")
    window.context.clear_cookies()
    window.will_be_refused(401, "/api/v1/keys")
    window.page.get_by_label("Name of the key").fill("late")
    window.page.get_by_role("button", name="Make a key").click()
    expect(window.page.get_by_role("heading", level=1)).to_have_text("Sign in")


def test_a_second_person_signs_up_and_is_nobody_special(visit, house):
    window = visit()
    page = window.page
    page.goto("/")
    page.get_by_role("link", name="Make an account").click()
    expect(page.get_by_role("main")).to_be_focused()
    window.will_be_refused(409, "/api/auth/sign-up")
    fill_in(page, "ADMIN@example.com", PASSWORD, "Make an account")
    expect(page.get_by_role("alert")).to_have_text("There is an account with that e-mail address.")
    fill_in(page, "bob@example.com", PASSWORD, "Make an account")
    expect(page.get_by_text("bob@example.com")).to_be_visible()
    assert credits_shown(page)["available"] == 10
    with client(house, make_key(page, "bob")) as program:
        assert program.get("/api/v1/user/me").json()["data"]["isAdmin"] is False


def test_going_back_and_forward(visit):
    page = visit().page
    page.goto("/set-up")
    page.goto("/")
    page.get_by_role("link", name="Make an account").click()
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_have_text("Sign in")
    page.go_forward()
    expect(page.get_by_role("heading", level=1)).to_have_text("Make an account")
    page.go_back()
    page.go_back()
    expect(page.get_by_role("heading", level=1)).to_have_text("Set up VideoFly")  # "/" is not in the way


def test_the_server_going_away_is_said_in_a_sentence(visit):
    window = visit()
    page = window.page
    page.goto("/sign-in")
    page.route("**/api/**", lambda route: route.abort("connectionrefused"))
    fill_in(page, EMAIL, PASSWORD, "Sign in")
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    expect(page.get_by_role("button", name="Sign in")).to_be_enabled()
    assert len(window.complaints) == 2 and all("ERR_CONNECTION_REFUSED" in one for one in window.complaints)
    window.complaints.clear()


def test_a_wrong_field_is_refused_before_anything_is_sent(visit):
    window = visit()
    page = window.page
    page.goto("/sign-up")
    for email, password in [("", PASSWORD), ("not an address", PASSWORD), (EMAIL, ""), (EMAIL, "short")]:
        fill_in(page, email, "", "Make an account")
        page.get_by_label("Password").press_sequentially(password)
        page.get_by_role("button", name="Make an account").click()
    expect(page.get_by_label("Password")).to_have_accessible_description("8 characters or more.")
    assert "/api/auth/sign-up" not in window.paths


def test_the_page_speaks_chinese_and_remembers_it(visit):
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


def test_a_browser_in_chinese_is_spoken_to_in_chinese(visit):
    window = visit(locale="zh-CN", viewport=PHONE)
    page = window.page
    page.goto("/sign-up")
    page.get_by_label("邮箱").fill("li@example.com")
    page.get_by_label("密码").fill(PASSWORD)
    window.shot("phone-zh-sign-up")
    page.get_by_role("button", name="注册").click()
    page.get_by_label("密钥名称").fill("笔记本")
    page.get_by_role("button", name="创建密钥").click()
    expect(page.get_by_role("status")).to_contain_text("vf_")
    expect(page.get_by_role("button", name="吊销密钥 笔记本")).to_be_visible()
    window.shot("phone-zh-account")
    page.get_by_role("button", name="退出").click()
    window.will_be_refused(401, "/api/auth/sign-in")
    page.get_by_label("邮箱").fill("li@example.com")
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
    window = visit(server)
    page = window.page
    page.goto(path_of(set_up_link(server)))
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    header = ["Skip to content", "VideoFly", "API docs", "中文"]
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
    rest = ["Sign out", "Name of the key", "Make a key", "Revoke the key keyboard"]
    assert focus_stops(page, 8) == header + rest


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_every_page_fits_the_window_in_light_and_dark(visit, viewport, scheme):
    window = visit(viewport=viewport, color_scheme=scheme)
    page, name = window.page, f"{'phone' if viewport is PHONE else 'desk'}-{scheme}"
    for path in ("/sign-in", "/sign-up", "/set-up"):
        page.goto(path)
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        assert overflow(page) == 0
    page.goto("/sign-in")
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    window.shot(f"{name}-sign-in")
    sign_up(window, f"{name}@example.com")
    make_key(page, "a-very-long-name-without-any-space-in-it-" * 2)
    expect(page.get_by_role("listitem")).to_be_visible()
    assert overflow(page) == 0
    window.shot(f"{name}-account")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    lightness = float(re.search(r"[\d.]+", background)[0])
    assert (lightness > 0.9) == (scheme == "light"), background


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_the_manual_lists_every_operation_and_asks_nobody_else(visit, house):
    """Under a name of its own, as people will have it; on localhost some libraries behave better."""
    window = visit(host="videofly.test", viewport=PHONE, color_scheme="dark")
    page = window.page
    page.goto("/docs")
    expect(page.get_by_role("heading", level=1)).to_contain_text("VideoFly")
    described = httpx.get(house.url + "/openapi.json", trust_env=False).json()["paths"]
    operations = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    rows = page.get_by_role("button", name=re.compile(r"^[A-Z]+ \/"))
    expect(rows).to_have_count(len(operations))
    assert {" ".join(row.replace("\u200b", "").split()[:2]) for row in rows.all_inner_texts()} == operations
    assert overflow(page) == 0
    window.shot("phone-dark-docs")
    page.get_by_role("button", name=re.compile(r"^GET \/api\/v1\/config\/models")).click()
    page.get_by_role("button", name="Execute").click()
    expect(page.get_by_role("main")).to_contain_text('"preview"')
    page.get_by_role("link", name="VideoFly", exact=True).click()
    expect(page).to_have_url(window.url + "/sign-in")
