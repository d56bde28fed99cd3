"""Buying, from both sides: people over HTTP, Creem by its webhooks, and the sandbox that acts Creem out."""

import asyncio
import contextlib
import json

import httpx
import pytest

import videofly as v
from conftest import CATALOG, books_are_right, client_of, error_of, person, rows, work
from creem import Creem, redirect_query, signed
from test_payments import EVENTS, SAMPLES
from upstream import slow

pytestmark = pytest.mark.anyio
VECTORS = json.loads((EVENTS / "vectors.json").read_text())
SECRET = VECTORS["webhook_secret"]
SHOP = """
[[packs]]
id = "starter"
name = "Starter pack"
cents = 1490
currency = "USD"
credits = 280
open_to = "all"
creem_id = "prod_StarterPack0001"

[[packs]]
id = "big"
name = "Big pack"
cents = 3990
currency = "USD"
credits = 960
open_to = "subscribers"

[[plans]]
id = "pro"
name = "Pro"
cents = 2990
currency = "USD"
credits = 960
interval = "month"
creem_id = "prod_ProMonthly0001"

[[plans]]
id = "ultimate"
name = "Ultimate"
cents = 7990
currency = "USD"
credits = 2850
interval = "month"
"""


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "catalog.toml").write_text(CATALOG + SHOP)
    return v.Settings(data=str(tmp_path / "data"), catalog=str(tmp_path / "catalog.toml"))


def with_settings(settings, **changes):
    return v.msgspec.structs.replace(settings, **changes)


@pytest.fixture
async def ada(app, client):
    """Somebody with nothing, whose key the client sends."""
    ada = await person(app, "ada@example.com")
    client.headers["Authorization"] = ada.headers["Authorization"]
    return ada


async def ask(client, line, **body):
    """The data of an answer."""
    method, path = line.split()
    answer = await client.request(method, path, json=body if method == "POST" else None)
    assert answer.status_code < 300, answer.text
    return answer.json()["data"]


async def refused(client, line, **body):
    method, path = line.split()
    return error_of(await client.request(method, path, json=body if method == "POST" else None))


async def balance(client):
    found = await ask(client, "GET /api/v1/credit/balance")
    return found["availableCredits"], found["debt"], found["plan"]


# --- the sandbox


async def buy(client, product, card="4242 4242 4242 4242", **wish):
    begun = await ask(client, "POST /api/v1/billing/checkout", productId=product, **wish)
    assert begun["isSandbox"] and begun["url"].startswith("http://test/sandbox/checkout#chk_")
    await ask(client, f"POST /api/v1/sandbox/checkouts/{begun['checkoutId']}/pay", number=card)
    return begun["checkoutId"]


async def test_the_whole_story_from_sign_up_to_a_debt_that_is_paid(app, client, clock, provider):
    await client.post("/api/auth/sign-up", json={"email": "mira@example.test", "password": "correct horse"})
    assert await balance(client) == (10, 0, None)  # the welcome gift
    await buy(client, "pro")
    assert await balance(client) == (970, 0, "pro")

    order = {"model": "told", "prompt": "a red fox over snow"}
    video = (await client.post("/api/v1/video/generate", json=order)).json()["data"]["videoUuid"]
    await work(app)
    assert (await ask(client, f"GET /api/v1/video/{video}/status"))["status"] == "COMPLETED"
    assert await balance(client) == (960, 0, "pro")

    clock.pass_s(30 * 86400)
    await client.post("/api/auth/sign-in", json={"email": "mira@example.test", "password": "correct horse"})
    await ask(client, "POST /api/v1/sandbox/act", act="renew")
    assert await balance(client) == (960, 0, "pro")  # the first period's have ended with it
    for _ in range(3):
        for _ in range(3):
            await client.post("/api/v1/video/generate", json=order | {"duration": 10, "quality": "720p"})
        await work(app)
    assert await balance(client) == (960 - 9 * 40, 0, "pro")

    found = await ask(client, "GET /api/v1/user/billing")
    assert [payment["product"] for payment in found["payments"]] == ["pro", "pro"]
    renewal = found["payments"][0]["payment"]
    found = await ask(client, "POST /api/v1/sandbox/act", act="refund", payment=renewal, cents=2000)
    # 960 * 2000 / 2990 is 642.1: 600 were there
    assert (await balance(client), found["payments"][0]["back"]) == ((0, 42, "pro"), 2000)

    await buy(client, "starter")
    assert await balance(client) == (280 - 42, 0, "pro")
    history = (await ask(client, "GET /api/v1/credit/history"))["transactions"]
    assert [(line["transType"], line["credits"]) for line in history[:3]] == [
        ("REFUND", -42),
        ("ORDER_PAY", 280),
        ("REFUND", -600),
    ]
    await books_are_right(app)


async def test_paying_twice_pays_once(app, client, ada):
    id = await buy(client, "starter")
    await ask(client, f"POST /api/v1/sandbox/checkouts/{id}/pay", number="4111111111111111")
    assert await balance(client) == (280, 0, None)


@pytest.mark.parametrize(("card", "said"), [
    ("4000 0000 0000 0002", "It was declined."), ("4507 9900 0000 0028", "It was declined."),
    ("4000-0000-0000-9995", "Its funds are insufficient."),
    ("4507990000000010", "Its funds are insufficient."),
    ("4000000000000127", "Its security code is wrong."), ("4507990000000044", "Its security code is wrong."),
    ("4000000000000069", "It has expired."),
])
async def test_a_card_without_luck_pays_nothing(app, client, ada, card, said):
    begun = await ask(client, "POST /api/v1/billing/checkout", productId="starter")
    answer = await client.post(f"/api/v1/sandbox/checkouts/{begun['checkoutId']}/pay", json={"number": card})
    assert error_of(answer) == (402, "E4031")
    assert answer.json()["error"]["message"] == said
    assert await balance(client) == (0, 0, None)
    assert await rows(app, "SELECT count(*) FROM payment_events") == [(0,)]


async def test_no_real_card_is_taken(client, ada):
    begun = await ask(client, "POST /api/v1/billing/checkout", productId="starter")
    path = f"POST /api/v1/sandbox/checkouts/{begun['checkoutId']}/pay"
    assert await refused(client, path, number="5555 5555 5555 4444") == (400, "E4009")


async def test_a_subscription_can_be_cancelled_resumed_upgraded_and_ended(app, client, clock, ada):
    await buy(client, "pro")

    async def act(line, **body):
        clock.pass_s(1)
        answer = await client.post(f"/api/v1/{line}", json=body or None)  # which may be none at all
        found = answer.json()["data"]
        await books_are_right(app)
        return found["subscription"]["status"], found["plan"], found["subscription"]["isRunning"]

    assert await act("billing/subscription/cancel") == ("scheduled_cancel", "pro", True)
    assert await act("billing/subscription/resume") == ("active", "pro", True)
    assert await act("billing/subscription/upgrade", productId="ultimate") == ("active", "ultimate", True)
    assert await balance(client) == (960, 0, "ultimate")  # next_cycle
    assert await act("sandbox/act", act="renew") == ("active", "ultimate", True)
    assert await balance(client) == (960 + 2850, 0, "ultimate")
    assert await act("billing/subscription/cancel", mode="immediate") == ("canceled", None, False)
    assert await balance(client) == (3810, 0, None)
    for line in ("billing/subscription/cancel", "billing/subscription/resume", "sandbox/act"):
        assert await refused(
            client, f"POST /api/v1/{line}", **({"act": "renew"} if "act" in line else {})
        ) == (409, "E4030")


async def test_nobody_pays_for_two_plans(client, ada):
    await buy(client, "pro")
    assert await refused(client, "POST /api/v1/billing/checkout", productId="ultimate") == (409, "E4032")


async def test_the_sandbox_sends_people_back_as_creem_does(client, ada):
    begun = await ask(client, "POST /api/v1/billing/checkout", productId="starter")
    line = f"POST /api/v1/sandbox/checkouts/{begun['checkoutId']}/pay"
    paid = await ask(client, line, number="4242424242424242")
    query = httpx.URL(paid["url"]).query.decode()
    assert await ask(client, f"GET /api/v1/billing/return?{query}") == {"received": True}
    assert await ask(client, f"GET /api/v1/billing/return?{query}0") == {"received": False}


async def test_a_cancelled_subscription_ends_where_it_would_have_been_renewed(client, clock, ada):
    await buy(client, "pro")
    clock.pass_s(1)
    await ask(client, "POST /api/v1/billing/subscription/cancel")
    clock.pass_s(1)
    await ask(client, "POST /api/v1/sandbox/act", act="renew")
    assert await balance(client) == (960, 0, None)


async def test_with_immediate_an_upgrade_brings_the_difference_at_once(settings, clock, provider):
    settings = with_settings(settings, upgrade_policy="immediate")
    async with v.open_app(settings, clock=clock, providers={"scripted": provider}) as app:
        ada = await person(app, "ada@example.com")
        async with client_of(app, **ada.headers) as client:
            await buy(client, "pro")
            clock.pass_s(1)
            await ask(client, "POST /api/v1/billing/subscription/upgrade", productId="ultimate")
            assert await balance(client) == (2850, 0, "ultimate")
            await books_are_right(app)


async def test_a_dispute_takes_the_credits_and_flags_the_account(app, client, ada):
    await buy(client, "starter", units=2)
    (payment,) = (await ask(client, "GET /api/v1/user/billing"))["payments"]
    assert (payment["credits"], payment["paid"]) == (560, 2980)
    found = await ask(client, "POST /api/v1/sandbox/act", act="dispute", payment=payment["payment"])
    assert found["isDisputed"] and await balance(client) == (0, 0, None)
    assert (await ask(client, "GET /api/v1/user/me"))["isDisputed"]


@pytest.mark.parametrize("cents", [1491, 10**15])
async def test_no_more_is_refunded_than_was_paid(client, ada, cents):
    await buy(client, "starter")
    (payment,) = (await ask(client, "GET /api/v1/user/billing"))["payments"]
    line = "POST /api/v1/sandbox/act"
    assert await refused(client, line, act="refund", payment=payment["payment"], cents=cents) == (
        400,
        "E4009",
    )
    await ask(client, line, act="refund", payment=payment["payment"])
    assert await refused(client, line, act="refund", payment=payment["payment"]) == (400, "E4009")
    assert await refused(client, line, act="refund", payment="order:x") == (409, "E4030")
    assert await balance(client) == (0, 0, None)


async def test_nobody_sees_or_pays_anothers_checkout(app, client, ada):
    id = await buy(client, "starter")
    bob = await person(app, "bob@example.com")
    async with client_of(app, **bob.headers) as other:
        assert await refused(other, f"GET /api/v1/sandbox/checkouts/{id}") == (404, "E4012")
        assert await refused(
            other, f"POST /api/v1/sandbox/checkouts/{id}/pay", number="4242424242424242"
        ) == (404, "E4012")
        (payment,) = (await ask(client, "GET /api/v1/user/billing"))["payments"]
        line = "POST /api/v1/sandbox/act"
        assert await refused(other, line, act="refund", payment=payment["payment"]) == (409, "E4030")
    assert await balance(client) == (280, 0, None)


async def test_what_is_for_subscribers_is_sold_to_them_alone(client, ada):
    line = "POST /api/v1/billing/checkout"
    assert await refused(client, line, productId="big") == (403, "E4029")
    await buy(client, "pro")
    await buy(client, "big")
    assert await balance(client) == (1920, 0, "pro")


@pytest.mark.parametrize(("wish", "end"), [
    ({"productId": "nothing"}, (400, "E4028")), ({}, (400, "E4009")), ({"productId": 7}, (400, "E4028")),
    ({"productId": "starter", "units": 0}, (400, "E4009")),
    ({"productId": "starter", "units": "2"}, (400, "E4009")),
    ({"productId": "starter", "units": 101}, (400, "E4009")),
    ({"productId": "starter", "price": 1}, (400, "E4009")),
])
async def test_a_bad_wish_to_buy_says_what_is_wrong(app, client, ada, wish, end):
    assert await refused(client, "POST /api/v1/billing/checkout", **wish) == end
    assert await rows(app, "SELECT count(*) FROM checkouts") == [(0,)]


async def test_everybody_sees_what_is_sold_and_how_it_is_paid(client):
    found = await ask(client, "GET /api/v1/config/products")
    assert found["packs"][0] == {"id": "starter", "name": "Starter pack", "cents": 1490, "currency": "USD",
                                 "credits": 280, "openTo": "all"}
    plans = [(plan["id"], plan["interval"]) for plan in found["plans"]]
    assert plans == [("pro", "month"), ("ultimate", "month")]
    assert (found["gift"], found["payments"]) == (10, "sandbox")


async def test_the_same_key_makes_one_checkout(app, client, ada):
    client.headers["Idempotency-Key"] = "k"
    answers = await asyncio.gather(
        *(ask(client, "POST /api/v1/billing/checkout", productId="starter") for _ in range(9))
    )
    assert len({answer["checkoutId"] for answer in answers}) == 1


async def test_nothing_is_sold_in_production_without_a_key(settings, clock, provider):
    settings = with_settings(settings, env="production", creem_webhook_secret=SECRET)
    async with v.open_app(settings, clock=clock, providers={"scripted": provider}) as app:
        ada = await person(app, "ada@example.com")
        async with client_of(app, **ada.headers) as client:
            for line in ("billing/checkout", "billing/portal", "billing/subscription/resume"):
                assert (await refused(client, f"POST /api/v1/{line}", productId="starter"))[0] in (400, 503)
            assert await refused(client, "GET /api/v1/sandbox/checkouts/chk_x") == (503, "E5008")


# --- webhooks


@contextlib.asynccontextmanager
async def opened(settings, clock, provider, **changes):
    changes = {"creem_api_key": "creem_test_x", "creem_webhook_secret": SECRET} | changes
    async with v.open_app(with_settings(settings, **changes), clock=clock,
                          providers={"scripted": provider}) as app, client_of(app) as client:
        yield app, client


@pytest.fixture
async def shop(settings, clock, provider):
    """A server that Creem tells its events, with user_0001 of the samples."""
    async with opened(settings, clock, provider) as (app, client):
        await app.db.write(add_mira)
        yield app, client


def add_mira(db):
    v.insert(db, "users", id="usr_mira", email="mira@example.test", created_at=1)


def send(client, body, headers=None, path="/api/webhooks/creem"):
    return client.post(path, content=body, headers=signed(body, SECRET) if headers is None else headers)


@pytest.mark.parametrize("name", VECTORS["creem_signature"])
@pytest.mark.parametrize("path", ["/api/webhooks/creem", "/api/auth/creem/webhook"])
async def test_every_sample_is_taken_as_it_is_signed(shop, name, path):
    app, client = shop
    header = "creem-signature" if "auth" in path else "X-Creem-Signature"
    body, signature = (EVENTS / name).read_bytes(), VECTORS["creem_signature"][name]
    for given in (signature, f" sha256={signature.upper()} "):
        answer = await send(client, body, {header: given}, path)
        assert (answer.status_code, answer.json()) == (200, {"success": True, "data": {"received": True}})
    assert await rows(app, "SELECT body FROM payment_events") == [(body.decode(),)]
    flipped = body.replace(b'"id"', b'"iD"', 1)
    assert (await send(client, flipped, {header: signature}, path)).status_code == 401


async def test_standard_webhooks_are_taken_while_they_are_fresh(settings, clock, provider):
    vector = VECTORS["standard_webhooks"]
    body = (EVENTS / vector.pop("file")).read_bytes()
    clock.t = int(vector["webhook-timestamp"]) + 299
    async with opened(settings, clock, provider) as (_, client):
        assert (await send(client, body, vector)).status_code == 200
        assert (await send(client, body + b" ", vector)).status_code == 401
        clock.pass_s(2)
        assert (await send(client, body, vector)).status_code == 401
        assert (await send(client, body, vector | signed(body, SECRET))).status_code == 200


@pytest.mark.parametrize("headers", [
    {}, {"creem-signature": ""}, {"creem-signature": "0" * 64}, {"creem-signature": b"\xff\xfe"},
    signed(SAMPLES["subscription.active"], "another secret"),
    {"creem-signature": "0" * 64} | signed(SAMPLES["subscription.active"], SECRET, "x-creem-signature"),
    {"webhook-id": "x", "webhook-timestamp": "1800000000", "webhook-signature": "v1,AAAA v1 junk"},
])
async def test_what_is_not_signed_is_refused_and_not_kept(shop, headers):
    app, client = shop
    assert error_of(await send(client, SAMPLES["subscription.active"], headers)) == (401, "E4010")
    assert await rows(app, "SELECT count(*) FROM payment_events") == [(0,)]


async def test_without_a_secret_nothing_is_taken(settings, clock, provider):
    for changes in (
        {"creem_webhook_secret": ""},
        {"creem_webhook_secret": "", "creem_api_key": "", "env": "production"},
    ):
        async with opened(settings, clock, provider, **changes) as (_, client):
            for headers in ({}, signed(b"{}", "")):
                assert error_of(await send(client, b"{}", headers)) == (503, "E5008")


@pytest.mark.parametrize(("body", "status"), [
    (b"", 400), (b"[]", 400), (b"not JSON", 400), (b'{"id": "evt_1"}', 400), (b"\xff", 400),
    (b"[" * 100_000, 400),
    (b'{"id": "evt_1", "eventType": "new.kind", "object": {}}', 200), (b" " * (1 << 20) + b"{}", 413),
])
async def test_what_is_signed_and_strange_is_answered_as_it_should_be(shop, body, status):
    assert (await send(shop[1], body)).status_code == status


async def test_fifty_copies_at_once_grant_once(shop):
    app, client = shop
    body = SAMPLES["checkout.completed.onetime"].replace(b"user_0001", b"usr_mira")
    copies = [body.replace(b"evt_01packCompleted001", f"evt_{n % 2}".encode()) for n in range(50)]
    answers = await asyncio.gather(*(send(client, copy) for copy in copies))
    assert {answer.status_code for answer in answers} == {200}
    assert await rows(app, "SELECT sum(initial), count(*) FROM credit_packages") == [(280, 1)]
    await books_are_right(app)


# --- Creem, acted out


class Store:
    """A server whose payments are taken by a Creem that is acted out over a socket."""

    def __init__(self, app, client, creem, user):
        self.app, self.client, self.creem, self.user = app, client, creem, user

    async def tell(self, events):
        for event in events:
            answer = await send(self.client, json.dumps(event).encode())
            assert answer.status_code == 200, answer.text

    async def give(self, credits):
        """By an administrator."""
        await ask(self.client, "POST /api/v1/admin/credits/grant", email=self.user.email, credits=credits)

    async def check_out(self, product, **wish):
        begun = await ask(self.client, "POST /api/v1/billing/checkout", productId=product, **wish)
        (checkout_id,) = (
            await rows(self.app, "SELECT checkout_id FROM checkouts WHERE id = :id", id=begun["checkoutId"])
        )[0]
        return begun, checkout_id


@contextlib.asynccontextmanager
async def store_of(settings, clock, provider, monkeypatch, **changes):
    production = changes.get("env") == "production"
    key = changes.setdefault("creem_api_key", "creem_x" if production else "creem_test_x")
    with Creem(key=key, mode="prod" if production else "test", clock=clock) as creem:
        monkeypatch.setitem(v.CREEM, "hosts", {"test": creem.url, "production": creem.url})
        creem.product("prod_StarterPack0001", price=1490)
        creem.product("big", price=3990)
        creem.product("prod_ProMonthly0001", price=2990, interval="month")
        creem.product("ultimate", price=7990, interval="month")
        async with opened(settings, clock, provider, **changes) as (app, client):
            ada = await person(app, "ada@example.com", is_admin=True)
            client.headers.update(ada.headers)
            yield Store(app, client, creem, ada)


@pytest.fixture
async def store(settings, clock, provider, monkeypatch):
    async with store_of(settings, clock, provider, monkeypatch) as store:
        yield store


async def test_a_pack_is_bought_at_creem(store):
    begun, checkout_id = await store.check_out("starter", units=2)
    assert not begun["isSandbox"] and "creem.io/" in begun["url"]
    method, path, body = store.creem.calls[-1]
    assert (method, path, body["request_id"], body["units"]) == (
        "POST",
        "/v1/checkouts",
        begun["checkoutId"],
        2,
    )
    assert (body["metadata"], body["customer"]) == (
        {"referenceId": store.user.id},
        {"email": "ada@example.com"},
    )
    await store.tell(store.creem.pay(checkout_id))
    assert await balance(store.client) == (560, 0, None)


async def test_a_plan_is_bought_renewed_changed_refunded_and_cancelled_at_creem(store, clock):
    creem, client = store.creem, store.client
    _, checkout_id = await store.check_out("pro")
    await store.tell(reversed(creem.pay(checkout_id)))
    assert await balance(client) == (960, 0, "pro")
    (sub,) = creem.subscriptions
    clock.pass_s(30 * 86400)
    await store.tell(creem.renew(sub))
    assert await balance(client) == (960, 0, "pro")
    clock.pass_s(60)
    events = creem.events
    before = len(events)
    found = await ask(client, "POST /api/v1/billing/subscription/upgrade", productId="ultimate")
    assert (found["plan"], creem.calls[-1][2]["update_behavior"]) == ("ultimate", "proration-none")
    await store.tell(events[before:])
    assert await balance(client) == (960, 0, "ultimate")
    clock.pass_s(60)
    assert (await ask(client, "POST /api/v1/billing/subscription/cancel"))["subscription"][
        "status"
    ] == "scheduled_cancel"
    clock.pass_s(60)
    assert (await ask(client, "POST /api/v1/billing/subscription/resume"))["subscription"][
        "status"
    ] == "active"
    last = creem.subscriptions[sub]["last_transaction_id"]
    await store.tell(creem.refund(last, 1000))
    paid = creem.transactions[last]["amount_paid"]
    assert await balance(client) == (960 - int(960 * 1000 / paid + 0.5), 0, "ultimate")
    clock.pass_s(60)
    assert (await ask(client, "POST /api/v1/billing/subscription/cancel", mode="immediate"))["plan"] is None
    await books_are_right(store.app)


async def test_cancelling_what_is_cancelled_at_creem_already_is_done(store, clock):
    _, checkout_id = await store.check_out("pro")
    await store.tell(store.creem.pay(checkout_id))
    (sub,) = store.creem.subscriptions
    clock.pass_s(60)
    store.creem.cancel(sub, when="now")  # of which nothing is told
    found = await ask(store.client, "POST /api/v1/billing/subscription/cancel")
    assert (found["subscription"]["status"], found["plan"]) == ("canceled", None)


async def test_the_portal_is_opened_for_who_has_bought(store):
    assert await refused(store.client, "POST /api/v1/billing/portal") == (409, "E4030")
    _, checkout_id = await store.check_out("starter")
    await store.tell(store.creem.pay(checkout_id))
    assert (await ask(store.client, "POST /api/v1/billing/portal"))["url"].startswith("https://")


async def test_what_was_never_told_is_found_by_reconciling(store, clock):
    creem, client = store.creem, store.client
    _, pack = await store.check_out("starter")
    _, plan = await store.check_out("pro")
    creem.pay(pack), creem.pay(plan)  # and every webhook is lost
    line = "POST /api/v1/admin/jobs/reconcile"
    assert (await ask(client, line))["heard"] > 0
    assert await balance(client) == (1240, 0, "pro")
    clock.pass_s(30 * 86400)
    (sub,) = creem.subscriptions
    creem.renew(sub)
    (sold,) = [id for id, each in creem.transactions.items() if each["type"] == "payment"]
    creem.refund(sold)
    await ask(client, line)
    assert await balance(client) == (960, 0, "pro")
    assert (await ask(client, line))["heard"] == 0
    await store.tell(creem.events)  # they come after all
    assert await balance(client) == (960, 0, "pro")
    await books_are_right(store.app)


async def test_reconciling_reads_every_page(store):
    for n in range(3):
        store.creem.buy("prod_StarterPack0001", email=f"{n}@example.com")
    asked = list(store.creem.calls)
    await ask(store.client, "POST /api/v1/admin/jobs/reconcile")
    assert await rows(store.app, "SELECT count(*) FROM payment_events WHERE state = 'attention'") == [(3,)]
    assert len(store.creem.calls) > len(asked)


@pytest.mark.parametrize("message", ["list", "text", "none"])
@pytest.mark.parametrize("status", [401, 403, 404, 409, 429, 500, 503])
async def test_what_creem_refuses_is_a_clear_error_and_the_same_key_may_try_again(store, status, message):
    store.creem.message = message
    store.creem.next("checkout", store.creem.refusal(status, "Something about it", **{"retry-after": "7"}))
    store.client.headers["Idempotency-Key"] = "k"
    answer = await store.client.post("/api/v1/billing/checkout", json={"productId": "starter"})
    assert error_of(answer) == (502, "E5004")
    assert str(status) in answer.json()["error"]["message"]
    assert answer.headers.get("retry-after") == ("7" if status == 429 else None)
    begun, _ = await store.check_out("starter")
    assert await rows(store.app, "SELECT id FROM checkouts") == [(begun["checkoutId"],)]


async def test_a_creem_that_does_not_answer_is_given_up(store, monkeypatch):
    monkeypatch.setattr(v, "CALL_S", 0.3)
    store.creem.next("checkout", slow(5))
    monkeypatch.setattr(v.Creem.call, "__kwdefaults__", {"within_s": 0.3})
    assert await refused(store.client, "POST /api/v1/billing/checkout", productId="starter") == (502, "E5004")


async def test_nobody_is_sent_to_pay_anywhere_but_at_creem(store):
    store.creem.pay_page = "https://creem.io.evil.test/{id}"
    assert await refused(store.client, "POST /api/v1/billing/checkout", productId="starter") == (502, "E5004")


async def test_who_comes_back_from_creem_is_believed_only_when_creem_signed(store):
    _, checkout_id = await store.check_out("starter")
    store.creem.pay(checkout_id)
    query = store.creem.returned(checkout_id)
    line = "GET /api/v1/billing/return?"
    assert await ask(store.client, line + query.replace("checkout_id=ch_", "checkout_id=ch_x")) == {
        "received": False
    }
    assert await ask(store.client, line) == {"received": False}
    assert await balance(store.client) == (0, 0, None)
    assert await ask(store.client, line + query) == {"received": True}
    assert await balance(store.client) == (280, 0, None)  # for Creem was asked
    await store.tell(store.creem.events)
    assert await balance(store.client) == (280, 0, None)


@pytest.mark.parametrize("vector", ["redirect", "redirect_onetime_no_request_id"])
def test_the_signature_of_a_return_is_as_documented(vector):
    pairs, key = [*map(tuple, VECTORS[vector]["params_in_url_order"])], VECTORS["redirect"]["api_key"]
    signature = VECTORS[vector]["signature_sha256"]
    more = [("signature", signature), ("tab", "credits"), ("order_id", "null")]
    query = str(httpx.QueryParams([*pairs, *more]))
    assert v.sign_return(query, key) == signature
    assert redirect_query(pairs, key).endswith(f"signature={signature}")
    assert v.sign_return(query, key + "x") != signature
    assert v.sign_return(query.replace("prod_", "prad_"), key) != signature


# --- moderation


async def generate(store, **wish):
    return await store.client.post("/api/v1/video/generate", json={"model": "told", "prompt": "a fox"} | wish)


async def test_live_prompts_are_judged_before_anything_is_taken(settings, clock, provider, monkeypatch):
    async with store_of(settings, clock, provider, monkeypatch, env="production") as store:
        await store.give(100)
        for wish in ({"prompt": "DENY this"}, {"prompt": "FLAG"}, {"negativePrompt": "DENY"}):
            assert error_of(await generate(store, **wish)) == (422, "E4026")
        store.creem.next("moderation", store.creem.refusal(500, "away"))
        assert error_of(await generate(store)) == (502, "E5004")
        assert await rows(store.app, "SELECT count(*) FROM videos") == [(0,)]
        judged = len(store.creem.calls)
        store.client.headers["Idempotency-Key"] = "k"
        first, again = await generate(store), await generate(store)
        assert first.json() == again.json() and first.status_code == 201
        assert len(store.creem.calls) == judged + 1
        ((verdict, note),) = await rows(
            store.app,
            """
            SELECT moderation_id, note FROM videos v JOIN credit_holds h ON h.video_id = v.id
            JOIN credit_transactions t ON t.hold_id = h.id""",
        )
        assert verdict == note and verdict


@pytest.mark.parametrize("changes", [{"env": "production", "creem_moderation": "off"}, {}])
async def test_nothing_is_judged_where_that_is_not_asked_for(settings, clock, provider, monkeypatch, changes):
    async with store_of(settings, clock, provider, monkeypatch, **changes) as store:
        await store.give(100)
        assert (await generate(store, prompt="DENY this")).status_code == 201
        assert store.creem.count("moderation") == 0


# --- operators


async def test_what_needs_attention_is_seen_tried_assigned_and_applied_once(store):
    creem, client = store.creem, store.client
    await store.tell(creem.buy("prod_StarterPack0001", email="stranger@example.com"))
    inbox = "GET /api/v1/admin/reports/inbox"
    (event,) = (await ask(client, f"{inbox}?state=attention"))["rows"]
    assert event["effect"] == "Nobody is known who has paid this."
    assert json.loads(event["body"])["id"] == event["eventId"]
    line = f"POST /api/v1/admin/events/{event['id']}"
    bob = await person(store.app, "bob@example.com")
    assert (await ask(client, f"{line}/dry-run"))["effect"] == "Nobody is known who has paid this."
    assert await refused(client, f"{line}/assign", email="nobody@example.com") == (404, "E4012")
    assert await refused(client, f"{line}/assign", email="bob@example.com", product="nothing") == (
        400,
        "E4028",
    )
    assert (await ask(client, f"{line}/assign", email="bob@example.com"))["effect"] == "280 credits granted."
    assert await refused(client, f"{line}/assign", email="ada@example.com") == (409, "E4025")
    assert (await ask(client, f"{line}/replay"))["effect"] == "Everything was as it should be."
    async with client_of(store.app, **bob.headers) as other:
        assert await balance(other) == (280, 0, None)
        assert await refused(other, inbox) == (403, "E4011")
        assert await refused(other, f"{line}/replay") == (403, "E4011")
    assert (await ask(client, f"{inbox}?state=attention"))["rows"] == []


async def test_a_dry_run_says_what_would_follow_and_changes_nothing(store):
    sold = store.creem.buy("prod_StarterPack0001", email="stranger@example.com")
    await store.tell(sold)
    await store.app.db.write(
        lambda db: v.run(db, "UPDATE payment_events SET reference = :id", id=store.user.id)
    )
    before = await rows(store.app, "SELECT * FROM payment_events")
    assert (await ask(store.client, "POST /api/v1/admin/events/1/dry-run"))[
        "effect"
    ] == "280 credits granted."
    assert await rows(store.app, "SELECT * FROM payment_events") == before
    assert await balance(store.client) == (0, 0, None)


@pytest.mark.parametrize("id", ["0", "99", "x", "1; DROP TABLE users"])
async def test_an_event_that_is_not_there_is_not_found(store, id):
    for act in ("replay", "dry-run"):
        assert (await refused(store.client, f"POST /api/v1/admin/events/{id.replace(' ', '%20')}/{act}"))[
            0
        ] == 404


async def test_reports_can_be_filtered_paged_and_had_as_csv(store):
    for n in range(5):
        await store.tell(store.creem.buy("prod_StarterPack0001", email=f"{n}@example.com"))
    path = "/api/v1/admin/reports/inbox?type=checkout.completed&limit=2"
    seen, cursor = [], ""
    while cursor is not None:
        page = await ask(store.client, f"GET {path}{cursor and '&cursor=' + cursor}")
        seen, cursor = seen + [row["id"] for row in page["rows"]], page["nextCursor"]
    assert seen == [5, 4, 3, 2, 1]
    answer = await store.client.get(f"{path}&format=csv")
    assert answer.headers["content-type"].startswith("text/csv") and answer.headers["x-next-cursor"]
    assert answer.text.splitlines()[0].startswith("id,eventId,type")
    assert await refused(store.client, "GET /api/v1/admin/reports/inbox?colour=red") == (400, "E4009")
    assert await refused(store.client, "GET /api/v1/admin/reports/nothing") == (404, "E4012")
    assert await refused(store.client, "GET /api/v1/admin/reports/inbox?cursor=x") == (400, "E4009")
    for name in ("orders", "subscriptions", "debts", "provider-jobs"):
        assert (await ask(store.client, f"GET /api/v1/admin/reports/{name}"))["nextCursor"] is None


def test_no_cell_is_a_formula():
    assert [v.csv_cell(text) for text in ("=1+1", "@x", "-2", "a=b", 7)] == ["'=1+1", "'@x", "'-2", "a=b", 7]


async def test_products_that_creem_does_not_know_are_told(store):
    del store.creem.products["big"]
    checks = (await ask(store.client, "GET /api/v1/admin/check"))["checks"]
    (found,) = [check for check in checks if check["what"] == "payments"]
    assert not found["ok"] and "big" in found["detail"] and "starter" not in found["detail"]


async def test_a_start_tells_which_products_creem_does_not_know(store, caplog):
    del store.creem.products["big"]
    async with v.working(store.app), asyncio.timeout(5):
        while "does not know big" not in caplog.text:
            await asyncio.sleep(0.01)
    assert "starter" not in caplog.text
