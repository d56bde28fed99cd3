"""The Creem that the tests act out answers as its manual says, and breaks as it is told to."""

import hashlib
import hmac
import itertools
import time
from urllib.parse import parse_qsl

import httpx
import pytest

from conftest import Clock
from creem import Creem, redirect_query, signed, signed_standard
from upstream import reset_after, reset_before, slow

PACK, PRO, TOP = "prod_pack", "prod_pro", "prod_top"
ORDER = {"request_id": "ours-1", "metadata": {"referenceId": "u1"}, "customer": {"email": "ada@example.com"}}


@pytest.fixture
def creem():
    with Creem(clock=Clock()) as creem:
        creem.product(PACK)
        creem.product(PRO, price=2990, interval="month")
        creem.product(TOP, price=7990, interval="month")
        creem.product("prod_live", mode="prod")
        yield creem


@pytest.fixture
def http(creem):
    with client_of(creem, **{"x-api-key": creem.key}) as http:
        yield http


def client_of(creem, **headers):
    return httpx.Client(base_url=f"{creem.url}/v1", headers=headers, trust_env=False)


def told(answer, status=200):
    assert answer.status_code == status, answer.text
    return answer.json()


def checkout(http, product=PACK, **wish):
    return told(http.post("/checkouts", json={"product_id": product} | ORDER | wish))["id"]


def subscribed(creem, http):
    """The id of a new subscription, and of what was paid for it."""
    paid = creem.pay(checkout(http, PRO))[-1]["object"]
    return paid["id"], paid["last_transaction_id"]


def names(events):
    return [event["eventType"] for event in events]


def test_a_checkout_echoes_what_was_asked_and_can_be_read_back(creem, http):
    wish = {"product_id": PACK, "units": 2, "success_url": "https://app.test/done"} | ORDER
    said = told(http.post("/checkouts", json=wish))
    assert said["object"] == "checkout" and said["status"] == "pending" and said["mode"] == "test"
    echoed = ("request_id", "units", "success_url", "metadata")
    assert [said[name] for name in echoed] == [wish[name] for name in echoed]
    assert said["product"] == PACK and said["checkout_url"].startswith("https://creem.io/test/checkout/")
    query = {"checkout_id": said["id"]}
    assert told(http.get("/checkouts", params=query))["status"] == "pending"
    assert creem.calls == [("POST", "/v1/checkouts", wish), ("GET", "/v1/checkouts", query)]


def test_a_pack_is_paid_with_one_event_which_the_api_agrees_with(creem, http):
    [event] = creem.pay(checkout(http))
    bought = event["object"]
    assert event["eventType"] == "checkout.completed" and event["created_at"] == 1_800_000_000_000
    assert bought["status"] == "completed" and "subscription" not in bought and "checkout_url" not in bought
    order, customer = bought["order"], bought["customer"]
    assert (order["amount"], order["tax_amount"], order["amount_paid"]) == (1490, 313, 1803)
    assert order["type"] == "onetime" and customer["email"] == "ada@example.com"
    assert bought["metadata"] == ORDER["metadata"] and bought["request_id"] == "ours-1"
    read = told(http.get("/checkouts", params={"checkout_id": bought["id"]}))
    assert bought.items() <= read.items()
    paid = told(http.get("/transactions", params={"transaction_id": order["transaction"]}))
    assert (paid["type"], paid["status"], paid["amount_paid"]) == ("payment", "paid", 1803)
    assert paid["order"] == order["id"]


def test_a_plan_begins_with_three_events_of_which_the_last_names_the_payment(creem, http):
    completed, active, paid = events = creem.pay(checkout(http, PRO))
    assert names(events) == ["checkout.completed", "subscription.active", "subscription.paid"]
    slim, first, whole = completed["object"]["subscription"], active["object"], paid["object"]
    assert slim["product"] == PRO and slim["metadata"] and "current_period_end_date" not in slim
    assert first["canceled_at"] and "object" not in first["product"]
    assert not {"metadata", "last_transaction_id", "current_period_end_date"} & first.keys()
    assert whole["product"]["id"] == PRO and whole["metadata"] == ORDER["metadata"]
    assert whole["last_transaction_id"] == completed["object"]["order"]["transaction"]
    assert whole["current_period_start_date"] == "2027-01-15T08:00:00.000Z"
    assert whole["current_period_end_date"] == whole["next_transaction_date"] == "2027-02-14T08:00:00.000Z"
    read = told(http.get("/subscriptions", params={"subscription_id": whole["id"]}))
    assert whole.items() <= read.items() and read["last_transaction"]["type"] == "invoice"


def test_a_renewal_is_one_event_with_a_new_payment_and_a_new_period(creem, http):
    id, first = subscribed(creem, http)
    creem.clock.pass_s(30 * 86400)
    [event] = creem.renew(id)
    assert event["eventType"] == "subscription.paid" and event["object"]["last_transaction_id"] != first
    assert event["object"]["current_period_start_date"] == "2027-02-14T08:00:00.000Z"
    failed = creem.fail_renewal(id, "past_due", "expired", "unpaid", "canceled")
    assert names(failed) == [f"subscription.{name}" for name in ("past_due", "expired", "unpaid", "canceled")]
    expired = failed[1]["object"]
    assert expired["status"] == "active"
    assert expired["current_period_start_date"] == expired["current_period_end_date"]
    newest = told(http.get("/transactions/search"))["items"][0]
    assert (newest["status"], newest["amount_paid"]) == ("declined", None)


def test_a_plan_change_charges_or_refunds_what_the_rest_of_the_period_costs(creem, http):
    id, _ = subscribed(creem, http)
    assert names(creem.change_plan(id, TOP, paid=False)) == ["subscription.update"]
    update, refund = creem.change_plan(id, PRO)
    assert refund["eventType"] == "refund.created" and refund["object"]["refund_amount"] == 3618
    assert update["object"]["product"]["id"] == PRO and "metadata" not in update["object"]
    creem.clock.pass_s(15 * 86400)
    said = told(http.post(f"/subscriptions/{id}/upgrade", json={"product_id": TOP}))
    assert said["product"]["id"] == said["items"][0]["product_id"] == TOP
    assert said["last_transaction"]["amount"] == 2500 and names(creem.events[-2:]) == [
        "subscription.update", "subscription.paid"]
    free = {"product_id": PRO, "update_behavior": "proration-none"}
    told(http.post(f"/subscriptions/{id}/upgrade", json=free))
    assert names(creem.events[-1:]) == ["subscription.update"]
    for wrong, status in [({"product_id": "prod_none"}, 404), ({"product_id": PACK}, 400), ({}, 400)]:
        told(http.post(f"/subscriptions/{id}/upgrade", json=wrong), status)


def test_a_subscription_is_paused_resumed_and_canceled_once(creem, http):
    id, _ = subscribed(creem, http)
    act = lambda word, status=200, **body: told(http.post(f"/subscriptions/{id}/{word}", json=body), status)
    assert act("pause")["status"] == "paused" and act("resume")["status"] == "active"
    assert act("resume", 400)["message"]
    soon = act("cancel", mode="scheduled", onExecute="cancel")
    assert soon["status"] == "scheduled_cancel" and "next_transaction_date" not in soon
    assert act("resume")["next_transaction_date"]
    assert act("cancel", 400, mode="sometime")["error"] == "Bad Request"
    assert act("cancel", mode="immediate")["canceled_at"]
    assert act("cancel", 400)["status"] == 400
    words = ["paused", "update", "scheduled_cancel", "update", "canceled"]
    assert names(creem.events[3:]) == [f"subscription.{word}" for word in words]
    assert "image_url" not in creem.events[3]["object"]["product"]


def test_searches_filter_and_turn_pages(creem, http):
    for n in range(5):
        creem.pay(checkout(http, customer={"email": f"{n % 2}@example.com"}))
    creem.buy(PRO)
    search = lambda **query: told(http.get("/transactions/search", params=query))
    first, last = search(page_size=4), search(page_size=4, page_number=2)
    turned = {"total_records": 6, "total_pages": 2}
    assert first["pagination"] == turned | {"current_page": 1, "next_page": 2, "prev_page": None}
    assert last["pagination"] == turned | {"current_page": 2, "next_page": None, "prev_page": 1}
    assert [len(each["items"]) for each in (first, last, search(page_number=9))] == [4, 2, 0]
    assert len(search(product_id=PACK)["items"]) == 5
    one = first["items"][-1]
    assert len(search(customer_id=one["customer"], product_id=PACK)["items"]) in (2, 3)
    assert search(order_id=one["order"])["items"] == [one]
    assert [each["product"]["id"] for each in told(http.get("/subscriptions/search"))["items"]] == [PRO]
    told(http.get("/transactions/search", params={"page_size": "many"}), 400)


def test_products_of_the_other_mode_do_not_exist(creem, http):
    told(http.post("/checkouts", json={"product_id": "prod_live"}), 404)
    assert told(http.get(f"/products/{PACK}")) == told(http.get("/products", params={"product_id": PACK}))
    told(http.get("/products/prod_live"), 404)
    creem.product("prod_old", status="archived")
    listed = lambda **query: [p["id"] for p in told(http.get("/products/search", params=query))["items"]]
    assert listed() == ["prod_old", TOP, PRO, PACK] and listed(status="archived") == ["prod_old"]


@pytest.mark.parametrize(
    "wish",
    [
        {"product_id": ""}, {"productId": PACK}, {"units": 0}, {"units": "2"}, {"custom_price": 99},
        {"custom_price": 100, "product_id": PRO}, {"customer": {"email": ""}}, {"customer": {"name": "Ada"}},
        {"customer": {"id": "cust_1", "email": "ada@example.com"}}, {"success_url": "/done"},
        {"metadata": "u1"}, {"custom_fields": [{}] * 4},
    ],
)
def test_a_checkout_that_the_manual_forbids_is_refused(creem, http, wish):
    assert told(http.post("/checkouts", json={"product_id": PACK} | wish), 400)["message"]
    assert not creem.checkouts


def test_a_refund_of_all_or_a_part_adds_up(creem, http):
    [event] = creem.pay(checkout(http))
    id = event["object"]["order"]["transaction"]
    [part] = creem.refund(id, 600)
    assert part["object"]["transaction"]["status"] == "partialRefund"
    assert part["object"]["transaction"]["refunded_amount"] == part["object"]["refund_amount"] == 600
    assert part["object"]["order"]["transaction"] == id
    assert part["object"]["checkout"]["request_id"] == "ours-1"
    rest = told(http.post("/refunds", json={"transaction_id": id}))
    assert rest["refund_amount"] == 1203 and rest["transaction"]["status"] == "refunded"
    assert names(creem.events) == ["checkout.completed", "refund.created", "refund.created"]
    told(http.post("/refunds", json={"transaction_id": id}), 400)
    told(http.post("/refunds", json={"transaction_id": id, "amount": 5}), 400)
    told(http.post("/refunds", json={"transaction_id": "tran_none"}), 404)


def test_a_pending_refund_gives_nothing_back_yet(creem, http):
    creem.refund_status = "pending"
    _, id = subscribed(creem, http)
    refund = told(http.post("/refunds", json={"transaction_id": id}))
    assert refund["status"] == "pending" and refund["transaction"]["status"] == "paid"
    assert refund["subscription"]["last_transaction_id"] == id and refund["subscription"]["product"] == PRO


def test_a_dispute_takes_all_and_a_refund_may_follow(creem, http):
    _, id = subscribed(creem, http)
    [dispute] = creem.dispute(id)
    said = dispute["object"]
    assert dispute["eventType"] == "dispute.created" and said["amount"] == 3618
    assert said["transaction"]["status"] == "chargeback" and said["transaction"]["refunded_amount"] == 3618
    assert "metadata" not in said["subscription"] and "metadata" not in said["checkout"]
    assert creem.refund(id)[0]["object"]["refund_amount"] == 3618


def test_one_email_is_one_customer_who_has_a_portal(creem, http):
    first = creem.pay(checkout(http))[0]["object"]["customer"]["id"]
    assert creem.pay(checkout(http, customer={"id": first}))[0]["object"]["customer"]["id"] == first
    [linked] = creem.buy(PACK, email="ada@example.com", tax=0)
    assert linked["object"]["customer"]["id"] == first and linked["object"]["order"]["amount_paid"] == 1490
    assert not {"metadata", "request_id"} & linked["object"].keys()
    links = [told(http.post("/customers/billing", json={"customer_id": first})) for _ in range(2)]
    assert links[0] != links[1] and links[0]["customer_portal_link"].startswith("https://creem.io/")
    told(http.post("/customers/billing", json={"customer_id": "cust_none"}), 404)
    told(http.post("/checkouts", json={"product_id": PACK, "customer": {"id": "cust_none"}}), 404)


@pytest.mark.parametrize("prompt, decision", [("a fox", "allow"), ("a FLAG", "flag"), ("DENY FLAG", "deny")])
def test_a_prompt_is_judged_by_the_words_in_it(http, prompt, decision):
    said = told(http.post("/moderation/prompt", json={"prompt": prompt, "external_id": "v1"}))
    assert said == {"id": said["id"], "object": "moderation_result", "prompt": prompt, "external_id": "v1",
                    "decision": decision, "usage": {"units": 1}}
    told(http.post("/moderation/prompt", json={"prompt": ""}), 400)


def test_a_call_needs_the_key_of_this_mode(creem):
    for headers, status in [({}, 401), ({"x-api-key": "creem_x"}, 403), ({"x-api-key": "creem_test_y"}, 403)]:
        with client_of(creem, **headers) as stranger:
            assert told(stranger.get("/products/search"), status)["error"]
    assert creem.count("unauthorized") == 3


def test_an_error_tells_its_message_as_a_list_a_text_or_not(creem, http):
    said = {}
    for creem.message in ("list", "text", "none"):
        said[creem.message] = told(http.get("/products/prod_none"), 404)
    assert {*said["none"]} == {"trace_id", "status", "error", "timestamp"} == {*said["list"]} - {"message"}
    assert (said["list"]["message"], said["text"]["message"]) == (["Product not found"], "Product not found")
    assert said["list"]["error"] == "Bad Request" and said["list"]["timestamp"] == 1_800_000_000_000


def test_what_answers_nest_can_be_ids(creem, http):
    id, _ = subscribed(creem, http)
    creem.expands = False
    said = told(http.get("/subscriptions", params={"subscription_id": id}))
    assert said["product"] == PRO and said["customer"] in creem.customers
    [bought] = creem.checkouts
    assert told(http.get("/checkouts", params={"checkout_id": bought}))["subscription"] == id


def test_faults_come_once_or_always_and_some_after_the_deed(creem, http):
    wish = {"product_id": PACK}
    busy = creem.refusal(429, "Too many requests", retry_after=3)
    creem.next("checkout", busy, reset_before(), reset_after())
    refused = http.post("/checkouts", json=wish)
    assert refused.headers["retry-after"] == "3" and told(refused, 429)["message"] == ["Too many requests"]
    for made in (0, 1):
        with pytest.raises(httpx.TransportError):
            http.post("/checkouts", json=wish)
        assert len(creem.checkouts) == made
    creem.always("product", slow(0.1))
    started = time.monotonic()
    told(http.get(f"/products/{PACK}"))
    assert time.monotonic() - started >= 0.1
    creem.always("product", creem.refusal(503, "down"))
    assert [http.get(f"/products/{PACK}").status_code for _ in range(2)] == [503, 503]


def test_deliveries_are_signed_both_ways():
    body, secret = b'{"id": "evt_1"}', "whsec_c2VjcmV0"
    digest = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    assert signed(body, secret)["creem-signature"] == digest
    assert signed(body, secret, "x-creem-signature")["x-creem-signature"] == digest
    standard = signed_standard("evt_1", 1_800_000_000, body, secret)
    assert (standard["webhook-id"], standard["webhook-timestamp"]) == ("evt_1", "1800000000")
    assert standard["webhook-signature"].startswith("v1,") and len(standard["webhook-signature"]) == 47


def test_the_buyer_returns_with_a_signed_query(creem, http):
    id = checkout(http, PRO)
    creem.pay(id)
    pairs = parse_qsl(creem.returned(id))
    assert [name for name, _ in pairs] == ["request_id", "checkout_id", "order_id", "customer_id",
                                           "subscription_id", "product_id", "signature"]
    said = "|".join(f"{name}={text}" for name, text in itertools.chain(pairs[:-1], [("salt", creem.key)]))
    assert pairs[-1][1] == hashlib.sha256(said.encode()).hexdigest()
    bare = dict(parse_qsl(redirect_query({"checkout_id": "ch_1"}, "k")))
    more = dict(parse_qsl(redirect_query({"ours": "1", "checkout_id": "ch_1", "order_id": "null"}, "k")))
    assert bare["signature"] == more["signature"] and more["ours"] == "1"
