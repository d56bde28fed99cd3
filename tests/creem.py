"""Creem, acted out over a real socket: its REST API, and the webhook events of what people do there.

    with Creem(key="creem_test_x", clock=clock) as creem:
        creem.product("prod_pro", price=2990, interval="month")
        ...                                               # the product orders a checkout at creem.url
        completed, active, paid = creem.pay(checkout_id)  # events, which the test may send
        creem.next("refund", creem.refusal(503, "down"))  # this fault, or one of upstream.py
        assert creem.calls[-1] == ("POST", "/v1/refunds", {"transaction_id": "tran_1"})

The steps are those of ROUTES, or unauthorized.  What the manual does not tell is chosen here: a renewal has
no order of its own, a failed one leaves a declined transaction, lists begin with the newest, unknown fields
are refused, and a month has 30 days."""

import copy
import functools
import hashlib
import hmac
import http
from datetime import UTC, datetime
from typing import Annotated, Literal
from urllib.parse import urlencode

import msgspec
from msgspec import UNSET, Meta, UnsetType

from conftest import Clock
from upstream import Refused, Upstream, refuse, standard_signature

# Step, route, and the fields of the body or query.
ROUTES = """
checkout      POST /v1/checkouts         product_id request_id? units? custom_price? discount_code? \
                                         affiliate_code? customer? custom_fields? success_url? metadata?
get_checkout  GET /v1/checkouts                 checkout_id
products      GET /v1/products/search           status? page_number? page_size?
product       GET /v1/products/{id}
product       GET /v1/products                  product_id
portal        POST /v1/customers/billing        customer_id
subscriptions GET /v1/subscriptions/search      page_number? page_size?
subscription  GET /v1/subscriptions             subscription_id
cancel        POST /v1/subscriptions/{id}/cancel  mode? onExecute?
resume        POST /v1/subscriptions/{id}/resume
pause         POST /v1/subscriptions/{id}/pause
upgrade       POST /v1/subscriptions/{id}/upgrade product_id update_behavior?
transactions  GET /v1/transactions/search       customer_id? order_id? product_id? page_number? page_size?
transaction   GET /v1/transactions              transaction_id
refund        POST /v1/refunds                  transaction_id
moderation    POST /v1/moderation/prompt        prompt external_id?"""
Text, Count = Annotated[str, Meta(min_length=1)], Annotated[int, Meta(ge=1)]
FIELDS = {  # those that are not just a Text
    "page_number": Count, "page_size": Count, "units": Count, "metadata": dict,
    "custom_price": Annotated[int, Meta(ge=100, le=99999999)],
    "customer": dict[Literal["id", "email", "name"], Text],
    "custom_fields": Annotated[list[dict], Meta(max_length=3)],
    "success_url": Annotated[str, Meta(pattern="^https?://[^/]")],
    "mode": Literal["immediate", "scheduled"], "onExecute": Literal["cancel", "pause"],
    "update_behavior": Literal["proration-charge-immediately", "proration-charge", "proration-none"],
}
ACTED_ON = {"upgrade": ["active"], "pause": ["active"], "resume": ["paused", "scheduled_cancel"]}
ACTED_ON |= {"cancel": ["active", "trialing", "scheduled_cancel", "past_due", "unpaid", "paused"]}
RETURNED = ["request_id", "checkout_id", "order_id", "customer_id", "subscription_id", "product_id"]
PERIOD = ["current_period_start_date", "current_period_end_date"]
# Fields of a subscription that not every event carries, and which one carries what.
PARTS = {"items": "items", "next_transaction_date": "next", "metadata": "metadata"}
PARTS |= {"last_transaction_id": "last", "last_transaction_date": "last"} | dict.fromkeys(PERIOD, "period")
CARRIED = {"active": "", "paid": "items last next period metadata"}
CARRIED |= dict.fromkeys(["update", "paused", "expired"], "items period")
CARRIED |= dict.fromkeys(["scheduled_cancel", "canceled", "past_due", "unpaid"], "last period metadata")


def signed(body, secret, header="creem-signature"):
    """The headers of a delivery."""
    return {"content-type": "application/json", header: hmac.digest(secret.encode(), body, "sha256").hex()}


def signed_standard(id, timestamp, body, secret):
    """The same as Standard Webhooks."""
    said = {"webhook-signature": standard_signature(secret, id, timestamp, body), "webhook-id": id}
    return said | {"webhook-timestamp": str(timestamp), "content-type": "application/json"}


def redirect_query(params, api_key):
    """What the buyer's browser brings back: params (a dict or pairs, in their order), then the signature.
    Names that are not Creem's are in the query but not signed, and so is the text null."""
    pairs = [(name, text) for name, text in dict(params).items() if text]
    said = [f"{name}={text}" for name, text in pairs if name in RETURNED and text != "null"]
    signature = hashlib.sha256("|".join([*said, f"salt={api_key}"]).encode()).hexdigest()
    return urlencode([*pairs, ("signature", signature)])


def iso(seconds):
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def bill(amount, tax=0.0, discount=0, currency="USD"):
    """What orders and transactions say of money."""
    taxes = round((amount - discount) * tax)
    said = {"amount": amount, "tax_amount": taxes, "discount_amount": discount, "currency": currency}
    return said | {"amount_paid": amount - discount + taxes}


def form(step, fields):
    """The fields of a request as a type; an optional one ends with a question mark."""
    must = [(name, FIELDS.get(name, Text)) for name in fields if name[-1] != "?"]
    may = [(name[:-1], FIELDS.get(name[:-1], Text) | UnsetType, UNSET) for name in fields if name[-1] == "?"]
    return msgspec.defstruct(step, must + may, forbid_unknown_fields=True)


class Creem(Upstream):
    """What people do: pay, buy, renew, fail_renewal, change_plan, cancel, pause, resume, refund and dispute;
    each returns the events that follow, and all, with those of API calls, are kept in events.  What exists is
    in dicts: products, customers, checkouts, orders, subscriptions, transactions, refunds, disputes."""

    key, mode = "creem_test_x", "test"
    message = "list"  # of an error; or text, or none
    expands = True  # answers nest products, customers and subscriptions, not their ids
    refund_status = "succeeded"  # what POST /v1/refunds comes to: also pending, requiresAction, failed
    pay_page = "https://creem.io/{mode}/checkout/{product}/{id}"

    def __init__(self, *, clock=None, **switches):
        super().__init__(clock=clock or Clock(), **switches)
        self.products, self.customers, self.checkouts, self.orders = {}, {}, {}, {}
        self.subscriptions, self.transactions, self.refunds, self.disputes = {}, {}, {}, {}
        self.events, self.made, self.buyers, self.rates, self.sold = [], 0, {}, {}, {}
        for line in ROUTES.strip().splitlines():
            step, method, path, *fields = line.split()
            act = self.post if method == "POST" else self.search if path.endswith("/search") else self.look
            self.route(step, method, path, functools.partial(act, form(step, fields)))

    @property
    def calls(self):
        """(method, path, JSON body or query) of each request so far."""
        return [(each.method, each.path, each.json if each.body else each.query) for each in self.requests]

    def pay(self, checkout_id, tax=0.21, *, discount=0, email=None):
        """Somebody pays; email is what they typed, if not what the order named."""
        checkout = self.checkouts[checkout_id]
        assert checkout["status"] == "pending", checkout
        product = self.products[checkout["product"]]
        price = checkout.get("custom_price", product["price"]) * checkout["units"]
        buyer = self.customer(**self.buyers[checkout_id] | ({"email": email} if email else {}))
        said = bill(price, tax, discount, product["currency"]) | {"sub_total": price, "status": "paid"}
        said |= {"customer": buyer["id"], "product": product["id"], "type": product["billing_type"]}
        order = self.keep("order", "ord_", **said, amount_due=said["amount_paid"])
        checkout |= {"status": "completed", "order": order["id"], "customer": buyer["id"]}
        sub = self.subscribe(checkout, tax) if product["billing_type"] == "recurring" else None
        self.charge(order, sub)
        said = checkout | self.nested(checkout)
        del said["checkout_url"]
        events = [self.event("checkout.completed", said)]
        return [*events, self.tell(sub, "active"), self.tell(sub, "paid")] if sub else events

    def buy(self, product_id, email="stranger@example.test", **how):
        """A sale by payment link, which has neither request_id nor metadata."""
        return self.pay(self.new_checkout({"product_id": product_id})["id"], email=email, **how)

    def renew(self, subscription_id):
        """The next period is paid, whatever the time; also after a failure."""
        sub = self.subscriptions[subscription_id]
        assert sub["status"] in ("active", "past_due", "unpaid"), sub["status"]
        self.charge_again(self.begin_period(sub))
        return [self.tell(sub, "paid")]

    def fail_renewal(self, subscription_id, *stages):
        """stages: of past_due (which alone is the default), expired, unpaid, canceled."""
        sub = self.subscriptions[subscription_id]
        self.charge_again(sub, status="declined")["amount_paid"] = None
        stages = [(sub["status"] if to == "expired" else to, to) for to in stages or ("past_due",)]
        return [event for stage in stages for event in self.turn(subscription_id, *stage)]

    def change_plan(self, subscription_id, product_id, paid=True):
        """At once; when paid, more is charged for the time left, or a part refunded.  The period stays."""
        sub, new = self.subscriptions[subscription_id], self.products[product_id]
        old, item, bought = self.products[sub["product"]], sub["items"][0], sub["last_transaction_id"]
        start, end = (datetime.fromisoformat(sub[name]).timestamp() for name in PERIOD)
        left = max(0, min(1, (end - self.clock()) / (end - start)))
        cost = round((new["price"] - old["price"]) * item["units"] * left)
        item |= {"product_id": product_id, "price_id": self.new_id("pprice_")}
        sub["product"] = product_id
        events = self.turn(subscription_id, sub["status"], "update")
        if paid and cost > 0:
            self.charge_again(sub, cost)
            events.append(self.tell(sub, "paid"))
        if paid and cost < 0 and self.left(bought):
            part = round(-cost * (1 + self.rates[subscription_id]))
            events += self.refund(bought, min(part, self.left(bought)))
        return events

    def cancel(self, subscription_id, when="now"):
        """when: scheduled, or now, as a scheduled one ends too."""
        return self.turn(subscription_id, {"now": "canceled", "scheduled": "scheduled_cancel"}[when])

    pause = lambda self, subscription_id: self.turn(subscription_id, "paused")
    resume = lambda self, subscription_id: self.turn(subscription_id, "active", "update")

    def refund(self, transaction_id, amount=None, *, status="succeeded", reason="requested_by_customer"):
        """amount: cents with tax; by default what is left, or all after a dispute.  No event tells when a
        pending refund comes true: change creem.transactions and creem.refunds."""
        transaction = self.transactions[transaction_id]
        paid, left = transaction["amount_paid"], self.left(transaction_id)
        amount = (left or paid) if amount is None else amount
        if status == "succeeded":
            said = {"refunded_amount": min(paid, paid - left + amount)}
            transaction |= said | {"status": "refunded" if amount >= left else "partialRefund"}
        refund = self.keep("refund", "ref_", status=status, reason=reason, transaction=transaction_id,
                           refund_amount=amount, refund_currency=transaction["currency"])
        return [self.event("refund.created", refund | self.around(transaction))]

    def dispute(self, transaction_id):
        """A chargeback of all that was paid; its event carries no metadata."""
        transaction = self.transactions[transaction_id]
        transaction |= {"status": "chargeback", "refunded_amount": (paid := transaction["amount_paid"])}
        said = {"amount": paid, "currency": transaction["currency"], "transaction": transaction_id}
        said = self.keep("dispute", "disp_", **said) | self.around(transaction)
        for name in {"checkout", "subscription"} & said.keys():
            said[name].pop("metadata", None)
        return [self.event("dispute.created", said)]

    def product(self, id, price=1490, interval=None, *, mode=None, **more):
        """interval: None, month or year; more overrules fields."""
        at = iso(self.clock())
        self.products[id] = {
            "id": id, "object": "product", "name": id, "description": f"About {id}", "image_url": None,
            "price": price, "currency": "USD", "billing_type": "recurring" if interval else "onetime",
            "billing_period": f"every-{interval}" if interval else "once", "status": "active",
            "tax_mode": "exclusive", "tax_category": "saas", "default_success_url": "",
            "created_at": at, "updated_at": at, "mode": mode or self.mode,
        } | more
        return self.products[id]

    def returned(self, checkout_id):
        """The query with which the buyer's browser comes back."""
        checkout = self.checkouts[checkout_id]
        known = checkout | {"request": checkout.get("request_id"), "checkout": checkout_id}
        return redirect_query({name: known.get(name.removesuffix("_id")) for name in RETURNED}, self.key)

    def refusal(self, status, *texts, **headers):
        """A fault: Creem says no in its own shape, and did nothing."""
        return refuse(status, self.error_body(status, texts), **headers)

    def new_id(self, prefix):
        self.made += 1
        return f"{prefix}{self.mode}{self.made:06}"

    def keep(self, object, prefix, **fields):
        """A new entity, among the others of its kind."""
        said = {"id": self.new_id(prefix), "object": object, **fields, "mode": self.mode}
        if object in ("transaction", "refund", "dispute"):
            said["created_at"] = round(self.clock() * 1000)
        elif object != "checkout":
            said |= dict.fromkeys(["created_at", "updated_at"], iso(self.clock()))
        return getattr(self, f"{object}s").setdefault(said["id"], said)

    def customer(self, id=None, email="buyer@example.test", name="A Buyer"):
        """The one of this id or email, of which there is one only."""
        if found := [each for each in self.customers.values() if id == each["id"] or email == each["email"]]:
            return self.customers.get(id, found[0])
        return self.keep("customer", "cust_", email=email, name=name, country="NL")

    def new_checkout(self, said):
        echoed = ("units", "custom_fields", "request_id", "custom_price", "success_url", "metadata")
        more = {"units": 1, "custom_fields": []} | {name: said[name] for name in echoed if name in said}
        checkout = self.keep("checkout", "ch_", product=said["product_id"], status="pending", **more)
        checkout["checkout_url"] = self.pay_page.format(**checkout)
        self.buyers[checkout["id"]] = said.get("customer", {})
        return checkout

    def subscribe(self, checkout, tax):
        at, shared = iso(self.clock()), {name: checkout[name] for name in ("product", "customer")}
        item = {"object": "subscription_item", "product_id": checkout["product"], "units": checkout["units"]}
        item |= {"id": self.new_id("sitem_"), "price_id": self.new_id("pprice_"), "mode": self.mode}
        shared |= {"metadata": checkout["metadata"]} if "metadata" in checkout else {}
        shared |= {"items": [item | {"created_at": at, "updated_at": at}], PERIOD[1]: at, "canceled_at": None}
        sub = self.keep("subscription", "sub_", **shared, collection_method="charge_automatically")
        checkout["subscription"], self.rates[sub["id"]] = sub["id"], tax
        return self.begin_period(sub)

    def begin_period(self, sub):
        """When the last one ends, which at first is at once."""
        start, product = sub[PERIOD[1]], self.products[sub["product"]]
        days = 30 if product["billing_period"] == "every-month" else 365
        end = iso(datetime.fromisoformat(start).timestamp() + days * 86400)
        sub |= {"status": "active", "updated_at": iso(self.clock()), "next_transaction_date": end}
        sub |= dict(zip(PERIOD, [start, end], strict=True))
        return sub

    def charge(self, bill, sub=None, status="paid"):
        """A new transaction; bill is an order, or the like of it."""
        copied = ("amount", "amount_paid", "tax_amount", "discount_amount", "currency", "customer")
        said = {name: bill[name] for name in copied} | {"tax_country": "NL", "refunded_amount": None}
        said |= {"type": "payment", "description": "Payment"}
        said |= {"order": bill["id"]} if "id" in bill else {}
        if sub:
            said |= {"type": "invoice", "description": "Subscription payment", "subscription": sub["id"]}
            start, end = (datetime.fromisoformat(sub[name]).timestamp() for name in PERIOD)
            said |= {"period_start": round(start * 1000), "period_end": round(end * 1000)}
        transaction = self.keep("transaction", "tran_", **said, status=status)
        bill["transaction"] = id = transaction["id"]
        self.sold[id] = bill["product"]
        if sub and status == "paid":
            sub |= {"last_transaction_id": id, "last_transaction_date": iso(self.clock())}
        return transaction

    def charge_again(self, sub, amount=None, **how):
        """Without an order; by default the whole price."""
        product = self.products[sub["product"]]
        amount = product["price"] * sub["items"][0]["units"] if amount is None else amount
        said = bill(amount, self.rates[sub["id"]], currency=product["currency"])
        return self.charge(said | {"product": product["id"], "customer": sub["customer"]}, sub, **how)

    def left(self, transaction_id):
        transaction = self.transactions[transaction_id]
        return (transaction["amount_paid"] or 0) - (transaction["refunded_amount"] or 0)

    def turn(self, subscription_id, status, told=None):
        """The subscription's new status, and the event of it."""
        sub, now = self.subscriptions[subscription_id], iso(self.clock())
        sub |= {"status": status, "updated_at": now, "next_transaction_date": sub[PERIOD[1]]}
        if status in ("paused", "scheduled_cancel", "canceled"):
            del sub["next_transaction_date"]
        sub |= {"canceled_at": now} if status == "canceled" else {}
        return [self.tell(sub, told or status)]

    def event(self, name, object):
        said = {"id": self.new_id("evt_"), "eventType": name, "created_at": round(self.clock() * 1000)}
        self.events.append(copy.deepcopy(said | {"object": object}))
        return self.events[-1]

    def tell(self, sub, name):
        """subscription.<name>, with the oddities of the real ones."""
        said = self.shown(sub, CARRIED[name]) | self.nested(sub)
        odd = {"active": "object", "paused": "image_url"}.get(name)
        said["product"] = {key: value for key, value in said["product"].items() if key != odd}
        said |= {"canceled_at": sub["created_at"]} if name == "active" else {}
        said |= {"status": "active", PERIOD[1]: sub[PERIOD[0]]} if name == "expired" else {}
        return self.event(f"subscription.{name}", said)

    def shown(self, sub, parts):
        return {name: value for name, value in sub.items() if PARTS.get(name, "") in parts}

    def nested(self, entity, parts="metadata"):
        """What it has the ids of; of a subscription these parts."""
        kinds = [kind for kind in ("product", "customer", "order") if kind in entity]
        said = {kind: getattr(self, f"{kind}s")[entity[kind]] for kind in kinds}
        sub = self.subscriptions.get(entity.get("subscription"))
        return said | ({"subscription": self.shown(sub, parts)} if sub else {})

    def around(self, transaction):
        """The entities that refunds and disputes nest."""
        said = {"transaction": transaction} | self.nested(transaction, "last period metadata")
        slim = ("id", "object", "request_id", "custom_fields", "status", "metadata", "mode")
        for checkout in self.checkouts.values():
            if "order" in said and checkout.get("order") == said["order"]["id"]:
                said["checkout"] = {name: checkout[name] for name in slim if name in checkout}
        return said

    def answered(self, kind, each):
        """An entity as the API tells it."""
        ids = {name: each[name] for name in ("product", "customer", "subscription") if name in each}
        said = each | (self.nested(each) if kind in ("checkout", "subscription") else {})
        if kind == "subscription":
            said["last_transaction"] = self.transactions.get(each.get("last_transaction_id"))
        return said if self.expands else said | ids

    # The API

    def match(self, request):
        act, step = super().match(request)
        sent = request.headers.get("x-api-key")
        if step == "unknown" or sent == self.key:
            return act, step
        return lambda request: self.no(403 if sent else 401, "Invalid API key"), "unauthorized"

    def error_body(self, status, texts):
        said = {"error": http.HTTPStatus(400 if status == 404 else status).phrase, "status": status}
        said |= {"trace_id": self.new_id("trace_"), "timestamp": round(self.clock() * 1000)}
        message = {"list": list(texts), "text": ", ".join(texts)}
        return said | ({} if self.message == "none" else {"message": message[self.message]})

    def no(self, status, *texts):
        raise Refused(status, self.error_body(status, texts))

    def checked(self, form, said, strict=True):
        """The fields that came, when they are as the manual has them."""
        try:
            return msgspec.to_builtins(msgspec.convert(said, form, strict=strict))
        except msgspec.ValidationError as wrong:
            return self.no(400, str(wrong))

    def have(self, kind, id):
        found = getattr(self, f"{kind}s").get(id)
        ours = found and found["mode"] == self.mode
        return found if ours else self.no(404, f"{kind.capitalize()} not found")

    def look(self, form, request, id=None):
        said = self.checked(form, request.query)
        kind = next(iter(said), "product_id").removesuffix("_id")
        return self.answered(kind, self.have(kind, id or said[f"{kind}_id"]))

    def search(self, form, request):
        said, kinds = self.checked(form, request.query, strict=False), form.__name__
        number, size, found = said.pop("page_number", 1), said.pop("page_size", 10), []
        for id, each in getattr(self, kinds).items():
            has = {"product": self.sold.get(id)} | each
            same = all(has.get(name.removesuffix("_id")) == text for name, text in said.items())
            found = [self.answered(kinds[:-1], each), *found] if same and each["mode"] == self.mode else found
        pages = -(-len(found) // size)
        turned = {"next_page": number + 1 if number < pages else None, "prev_page": number - 1 or None}
        said = {"total_records": len(found), "total_pages": pages, "current_page": number} | turned
        return {"items": found[(number - 1) * size : number * size], "pagination": said}

    def post(self, form, request, **path):
        said, step = self.checked(form, request.json if request.body else {}), form.__name__
        return self.act(step, said, **path) if path else getattr(self, f"post_{step}")(said)

    def act(self, step, said, id):
        sub = self.have("subscription", id)
        product = self.have("product", said["product_id"]) if step == "upgrade" else {}
        if sub["status"] not in ACTED_ON[step] or product.get("billing_type") == "onetime":
            self.no(400, f"Can not {step} a subscription which is {sub['status']}")
        if step == "upgrade":
            self.change_plan(id, product["id"], said.get("update_behavior") != "proration-none")
        else:
            getattr(self, step)(id, *(["scheduled"] if said.get("mode") == "scheduled" else []))
        return self.answered("subscription", sub)

    def post_checkout(self, said):
        product, buyer = self.have("product", said["product_id"]), said.get("customer", {"id": None})
        if "custom_price" in said and product["billing_type"] != "onetime":
            self.no(400, "custom_price is for one-time products")
        if ("id" in buyer) == ("email" in buyer) or "@" not in buyer.get("email", "@"):
            self.no(400, "customer must have an id or an email")
        if buyer.get("id"):
            self.have("customer", buyer["id"])
        return self.new_checkout(said)

    def post_portal(self, said):
        id = self.have("customer", said["customer_id"])["id"]
        return {"customer_portal_link": f"https://creem.io/my-orders/{id}/{self.new_id('login_')}"}

    def post_refund(self, said):
        self.have("transaction", id := said["transaction_id"])
        if not self.left(id):
            self.no(400, "Transaction can not be refunded")
        return self.refund(id, status=self.refund_status)[0]["object"]

    def post_moderation(self, said):
        decision = next((word for word in ("DENY", "FLAG") if word in said["prompt"]), "ALLOW").lower()
        result = {"id": self.new_id("mod_"), "object": "moderation_result", "decision": decision}
        return {**result, "external_id": None, **said, "usage": {"units": 1}}
