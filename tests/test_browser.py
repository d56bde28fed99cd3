"""A person at a real browser, with a real server: everything by role and label, and not one complaint.

SHOTS=folder keeps pictures of the pages, for people to look at."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import expect, sync_playwright

import videofly as v
from conftest import Server
from creem import redirect_query

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync", "--no-first-run", "--host-resolver-rules=MAP videofly.test 127.0.0.1",
]
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


def credits_shown(page, card="Credits"):
    """What a card of numbers says, as {what: how many}."""
    card = page.get_by_role("region", name=card)
    names = card.get_by_role("term").all_inner_texts()
    numbers = [int(text.replace(",", "")) for text in card.get_by_role("definition").all_inner_texts()]
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


def test_below_a_path_that_a_proxy_keeps_everything_is_the_same(visit, tmp_path):
    server = Server(tmp_path / "data")
    server.environ["VIDEOFLY_PUBLIC_URL"] = f"{server.url}/our/films"
    server.start()
    try:
        window = visit(server)
        page = window.page
        page.goto(set_up_link(server))
        fill_in(page, EMAIL, PASSWORD, "Make the account")
        expect(page).to_have_url(f"{server.url}/our/films/")
        page.get_by_role("link", name="Credits").click()
        expect(page).to_have_url(f"{server.url}/our/films/credits")
        page.reload()
        page.get_by_role("button", name=re.compile("^Buy .*")).first.click()
        expect(page).to_have_url(re.compile(f"{server.url}/our/films/sandbox/checkout#chk_"))
        page.get_by_label("Number of the test card").fill("4242 4242 4242 4242")
        page.get_by_role("button", name=re.compile("^Pay ")).click()
        expect(page.get_by_role("status").first).to_contain_text("your credits are here")
        assert page.url.startswith(f"{server.url}/our/films/credits")
        page.get_by_role("link", name="API docs").click()
        expect(page.get_by_text("/api/v1/video/generate").first).to_be_visible()
        page.get_by_role("link", name="VideoFly").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Your account")
        assert server.command("generate", "fox", "--duration", "2", "--out", str(tmp_path / "a.mp4"))
        assert (tmp_path / "a.mp4").stat().st_size > 1000  # its link leads there too
    finally:
        assert server.stop() == 0


def test_what_ends_within_a_week_is_said_in_both_languages(visit, tmp_path):
    server = Server(tmp_path / "data", VIDEO_COMPLETED_DAYS="1").start()
    try:
        server.command("user", "add", EMAIL, "--admin", "--password", PASSWORD)
        window = visit(server)
        page = window.page
        page.goto("/")
        fill_in(page, EMAIL, PASSWORD, "Sign in")
        expect(page.get_by_role("heading", name="Credits")).to_be_visible()
        expect(page.get_by_role("note")).to_have_count(0)
        server.command("generate", "fox", "--duration", "2", "--out", str(tmp_path / "a.mp4"))
        server.command("grant", EMAIL, "30", "--days", "5")
        operator = {"Authorization": f"Bearer {v.operator_token((server.data / 'secret').read_text())}"}
        prune = f"{server.url}/api/v1/admin/jobs/prune"
        assert httpx.post(prune, headers=operator, trust_env=False).status_code == 200
        page.reload()
        expect(page.get_by_role("note")).to_contain_text("30 of your credits expire within a week.")
        expect(page.get_by_role("note")).to_contain_text("1 of your videos will be archived within a week")
        window.shot("ending-soon")
        page.get_by_role("button", name="中文").click()
        expect(page.get_by_role("note")).to_contain_text("有 1 个视频即将归档")
        expect(page.get_by_role("note")).to_contain_text("有 30 积分即将到期")
    finally:
        assert server.stop() == 0


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
    header[2:2] = ["Credits", "Sandbox"]
    rest = ["Sign out", "Name of the key", "Make a key", "Revoke the key keyboard"]
    assert focus_stops(page, 10) == header + rest


# --- buying

SANDBOX = "This is a sandbox. Nothing is paid here, and no real card may be typed in."


def owned(page):
    return credits_shown(page, "Balance")


def begin_to_buy(page, product):
    page.goto("/credits")
    page.get_by_role("button", name=f"Buy {product}, ").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Sandbox checkout")


def pay(page, number):
    page.get_by_label("Number of the test card").fill(number)
    page.get_by_role("button", name="Pay").click()


def buy(page, product):
    begin_to_buy(page, product)
    pay(page, "4242 4242 4242 4242")
    expect(page.get_by_role("heading", level=1)).to_have_text("Credits")


def act(page, button):
    """Press something of the sandbox, and wait for what it says."""
    told = page.get_by_role("status")
    page.get_by_role("button", name=button).first.click()
    expect(told).to_have_text(re.compile("^Done"))
    return told.inner_text()


def spend(house, email, credits):
    """Make somebody have that many less."""
    with httpx.Client(base_url=house.url, trust_env=False) as admin:
        admin.post("/api/auth/sign-in", json={"email": "admin@example.com", "password": PASSWORD})
        taken = {"email": email, "credits": credits}
        assert admin.post("/api/v1/admin/credits/deduct", json=taken).status_code == 201


def test_a_pack_is_bought_and_its_credits_are_there(visit):
    window = visit()
    page, sent = window.page, []
    page.on("request", lambda request: sent.append(request.headers.get("idempotency-key")))
    sign_up(window, "pack@example.com")
    page.get_by_role("link", name="Credits").click()
    expect(page.get_by_role("note")).to_have_text(SANDBOX)
    expect(page.get_by_role("link", name="Credits")).to_have_attribute("aria-current", "page")
    assert owned(page) == {"available": 10, "set aside": 0}
    expect(page.get_by_role("region", name="Payments")).to_contain_text("Nothing yet.")
    packs = page.get_by_role("region", name="Packs of credits")
    expect(packs.get_by_role("button", name="Buy Pro pack, $99.90")).to_be_disabled()
    expect(packs.get_by_role("listitem").filter(has_text="Pro pack")).to_contain_text("For subscribers only.")
    window.shot("credits")
    packs.get_by_role("button", name="Buy Starter pack, $14.90").click()
    expect(page.get_by_role("note")).to_have_text(SANDBOX)
    expect(page.get_by_role("main")).to_contain_text("Starter pack · 280 credits · $14.90")
    window.shot("checkout")
    page.get_by_role("button", name="Pay $14.90").click()
    expect(page).to_have_url(window.url + "/credits")
    (payment, change) = (page.get_by_role("region", name=name).get_by_role("listitem").first
                         for name in ("Payments", "Latest changes"))
    expect(payment).to_contain_text("$14.90")
    expect(payment).to_contain_text("280 credits")
    expect(change).to_contain_text("+280")
    assert owned(page) == {"available": 290, "set aside": 0}
    assert len(list(filter(None, sent))) == 1
    page.get_by_role("button", name="Invoices and cards").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Sandbox")


def test_the_same_wish_keeps_its_key_until_it_is_answered(visit):
    window = visit()
    page, keys = window.page, []
    sign_up(window, "twice@example.com")
    page.goto("/credits")

    def lose_the_first(route):
        keys.append(route.request.headers["idempotency-key"])
        (route.abort if len(keys) == 1 else route.continue_)()

    page.route("**/api/v1/billing/checkout", lose_the_first)
    button = page.get_by_role("button", name="Buy Starter pack, ")
    button.click()
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    assert len(window.complaints) == 2 and all("ERR_FAILED" in one for one in window.complaints)
    window.complaints.clear()
    button.click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Sandbox checkout")
    assert len(keys) == 2 and len(set(keys)) == 1


def test_a_card_that_cannot_pay_says_why_and_nothing_is_bought(visit):
    window = visit()
    page = window.page
    sign_up(window, "poor@example.com")
    begin_to_buy(page, "Starter pack")
    pay_path = f"/api/v1/sandbox/checkouts/{urlsplit(page.url).fragment}/pay"
    said = page.get_by_role("alert")
    pay(page, "5555 5555 5555 4444")  # which might be somebody's
    expect(said).to_have_text("That is none of the test cards below. It was not sent anywhere.")
    assert pay_path not in window.paths
    for number, what in {
        "4000 0000 0000 0002": "was declined", "4507990000000010": "has insufficient funds",
        "4000-0000-0000-0127": "has a wrong security code", "4000000000000069": "has expired",
    }.items():
        window.will_be_refused(402, pay_path)
        pay(page, number)
        expect(said).to_have_text(f"Nothing was bought: the card {what}.")
    window.shot("declined")
    page.get_by_role("link", name="Credits").click()
    expect(page.get_by_role("region", name="Payments")).to_contain_text("Nothing yet.")
    assert owned(page) == {"available": 10, "set aside": 0}


def test_the_test_cards_are_those_of_the_server(visit):
    window = visit()
    page = window.page
    sign_up(window, "cards@example.com")
    begin_to_buy(page, "Starter pack")
    rows = page.get_by_role("region", name="The test cards").get_by_role("listitem")
    said = [row.inner_text().replace(" ", "").split() for row in rows.all()]
    pays = {number: what == "pays" for number, what in said}
    assert pays == {number: not why for number, why in v.CREEM["cards"].items()}
    rows.nth(2).get_by_role("button").click()
    expect(page.get_by_label("Number of the test card")).to_have_value("4000 0000 0000 0002")
    expect(page.get_by_label("Number of the test card")).to_be_focused()


def test_a_plan_its_renewal_a_refund_and_the_debt(visit, house):
    window = visit()
    page = window.page
    sign_up(window, "plan@example.com")
    buy(page, "Pro, monthly")
    mine = page.get_by_role("region", name="Your plan")
    expect(mine).to_contain_text("Pro, monthly")
    expect(mine).to_contain_text("It is renewed on")
    assert owned(page)["available"] == 970
    expect(page.get_by_role("button", name="Buy Pro pack, ")).to_be_enabled()
    page.get_by_role("link", name="Sandbox").click()
    expect(page.get_by_role("note")).to_have_text(SANDBOX)
    assert act(page, "Let a month pass") == "Done: 1,930 credits are available, the debt is 0."
    expect(page.get_by_role("button", name="Let a month pass")).to_be_focused()
    spend(house, "plan@example.com", 1900)
    page.get_by_label("Amount (USD)").first.fill("20.00")
    assert act(page, "Refund Pro, monthly of") == "Done: 0 credits are available, the debt is 612."
    payments = page.get_by_role("region", name="Payments")
    expect(payments.get_by_role("listitem").first).to_contain_text("$20.00 paid back")
    assert owned(page) == {"available": 0, "set aside": 0, "debt": 612}
    window.shot("debt")
    page.get_by_role("link", name="Credits").click()
    expect(page.get_by_role("region", name="Balance")).to_contain_text("You had spent 612 credits")
    expect(payments).to_contain_text("$29.90 · $20.00 paid back")
    window.shot("credits-owed")


def test_a_plan_is_cancelled_gone_on_with_changed_and_ended(visit):
    window = visit()
    page = window.page
    sign_up(window, "changes@example.com")
    buy(page, "Basic, monthly")
    mine = page.get_by_role("region", name="Your plan")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Cancel at the end of the period").click()
    expect(mine).to_contain_text("It is renewed on")  # for it was not meant
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel at the end of the period").click()
    expect(mine).to_contain_text("until then it is yours")
    expect(page.get_by_role("button", name="Go on with the plan")).to_be_focused()
    page.get_by_role("button", name="Go on with the plan").click()
    expect(mine).to_contain_text("It is renewed on")
    page.get_by_role("button", name="Change to Pro, yearly, $299.00 a year").click()
    expect(mine).to_contain_text("Pro, yearly")
    page.get_by_role("link", name="Sandbox").click()
    page.get_by_label("Another plan").select_option("Ultimate, monthly")
    act(page, "Change the plan")
    expect(mine).to_contain_text("Ultimate, monthly")
    act(page, "Cancel now")
    expect(mine).to_contain_text("It has ended.")
    expect(page.get_by_role("button", name="Let a month pass")).to_have_count(0)
    act(page, "Dispute Basic, monthly of")
    expect(page.get_by_role("region", name="Balance")).to_contain_text("A card holder has disputed")


@pytest.fixture
def signing(tmp_path):
    """A server whose returning buyers a test can sign for."""
    server = Server(tmp_path / "data", CREEM_WEBHOOK_SECRET="whsec_test").start()
    yield server
    server.stop()


def test_who_comes_back_from_paying_sees_the_credits_come(visit, signing):
    window = visit(signing)
    page = window.page
    page.goto(path_of(set_up_link(signing)))
    fill_in(page, EMAIL, PASSWORD, "Make the account")
    with client(signing, make_key(page, "program")) as program:
        begun = program.post("/api/v1/billing/checkout", json={"productId": "starter-pack"}).json()["data"]
        order = begun["checkoutId"].replace("chk_", "ord_")
        query = redirect_query([("order_id", order), ("product_id", "starter-pack")], "whsec_test")
        page.goto(f"/credits?{query.replace(order, 'ord_another')}")
        expect(page.get_by_role("status")).to_have_text(re.compile("^We have not heard of a payment yet."))
        page.goto(f"/credits?{query}")
        expect(page.get_by_role("status")).to_have_text("Payment received, your credits are on their way.")
        expect(page).to_have_url(window.url + "/credits")
        path = f"/api/v1/sandbox/checkouts/{begun['checkoutId']}/pay"
        assert program.post(path, json={"number": "4242424242424242"}).status_code == 200
        expect(page.get_by_role("status")).to_have_text("Payment received, your credits are here.")
        assert owned(page) == {"available": 290, "set aside": 0}
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("Credits")
        expect(page.get_by_role("status")).to_be_empty()


def test_where_payments_are_not_acted_out_nothing_says_so(visit, tmp_path):
    server = Server(tmp_path / "data", VIDEOFLY_ENV="production").start()  # and without a key of Creem's
    window = visit(server)
    page = window.page
    page.goto(path_of(set_up_link(server)))
    fill_in(page, EMAIL, PASSWORD, "Make the account")
    page.get_by_role("link", name="Credits").click()
    window.will_be_refused(503, "/api/v1/billing/checkout")
    page.get_by_role("button", name="Buy Starter pack, ").click()
    expect(page.get_by_role("alert")).to_have_text("Nothing can be bought here: payments are not set up.")
    expect(page.get_by_role("note")).to_have_count(0)
    expect(page.get_by_role("link", name="Sandbox")).to_have_count(0)
    page.goto("/sandbox")
    expect(page.get_by_role("main")).to_contain_text("Payments are real here: there is no sandbox.")
    server.stop()


def test_signing_in_leads_on_to_where_one_was_going(visit):
    window = visit()
    page = window.page
    sign_up(window, "onward@example.com")
    begin_to_buy(page, "Starter pack")
    window.context.clear_cookies()
    window.will_be_refused(401, "/api/v1/user/billing")
    window.will_be_refused(401, f"/api/v1/sandbox/checkouts/{urlsplit(page.url).fragment}")
    page.reload()
    fill_in(page, "onward@example.com", PASSWORD, "Sign in")
    expect(page.get_by_role("heading", level=1)).to_have_text("Sandbox checkout")
    expect(page.get_by_role("button", name="Pay $14.90")).to_be_visible()


def test_anothers_checkout_is_not_shown(visit):
    window = visit()
    sign_up(window, "curious@example.com")
    window.will_be_refused(404, "/api/v1/sandbox/checkouts/chk_1")
    window.page.goto("/sandbox/checkout#chk_1")
    expect(window.page.get_by_role("main")).to_contain_text("There is no such checkout of yours.")


def test_paying_with_the_keyboard_alone(visit):
    window = visit()
    page = window.page
    sign_up(window, "typist@example.com")
    begin_to_buy(page, "Basic, monthly")
    page.get_by_role("main").focus()
    stops = ["Number of the test card", "Expiry", "Security code", "Pay $9.90"]
    assert focus_stops(page, 5) == [*stops, "Take the card 4242 4242 4242 4242"]
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # takes the third card, which is declined
    window.will_be_refused(402, f"/api/v1/sandbox/checkouts/{urlsplit(page.url).fragment}/pay")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("Nothing was bought: the card was declined.")
    expect(page.get_by_label("Number of the test card")).to_be_focused()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("4242 4242 4242 4242")
    page.keyboard.press("Tab")
    page.keyboard.type("12 / 34")
    page.keyboard.press("Tab")
    page.keyboard.type("123")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.get_by_role("heading", level=1)).to_have_text("Credits")
    assert owned(page)["available"] == 290


def test_buying_in_chinese_on_a_phone(visit):
    window = visit(locale="zh-CN", viewport=PHONE, color_scheme="dark")
    page = window.page
    page.goto("/sign-up")
    page.get_by_label("邮箱").fill("wang@example.com")
    page.get_by_label("密码").fill(PASSWORD)
    page.get_by_role("button", name="注册").click()
    page.get_by_role("link", name="积分").click()
    expect(page.get_by_role("note")).to_contain_text("这是沙盒环境")
    page.get_by_role("button", name="购买Basic（月付），每月 US$9.90").click()
    page.get_by_label("测试卡号").fill("4000 0000 0000 9995")
    window.will_be_refused(402, f"/api/v1/sandbox/checkouts/{urlsplit(page.url).fragment}/pay")
    page.get_by_role("button", name="支付 US$9.90").click()
    expect(page.get_by_role("alert")).to_have_text("没有购买成功：该卡余额不足。")
    window.shot("phone-zh-declined")
    page.get_by_label("测试卡号").fill("4242 4242 4242 4242")
    page.get_by_role("button", name="支付 US$9.90").click()
    expect(page.get_by_role("region", name="您的套餐")).to_contain_text("续订")
    assert overflow(page) == 0
    window.shot("phone-zh-credits")
    page.get_by_role("link", name="沙盒").click()
    page.get_by_role("button", name="让一个月过去").click()
    expect(page.get_by_role("status")).to_have_text("完成：可用 570 积分，欠额 0。")
    assert overflow(page) == 0
    window.shot("phone-zh-sandbox")


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
    begin_to_buy(page, "Basic, monthly")
    assert overflow(page) == 0
    pay(page, "4111 1111 1111 1111")
    expect(page.get_by_role("heading", level=1)).to_have_text("Credits")
    for path, known in {"/credits": "Latest changes", "/sandbox": "Payments"}.items():
        page.goto(path)
        expect(page.get_by_role("region", name=known).get_by_role("listitem").first).to_be_visible()
        assert overflow(page) == 0
        window.shot(f"{name}{path.replace('/', '-')}")
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
