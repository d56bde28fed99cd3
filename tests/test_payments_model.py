"""Payments against a model: any history of buying and spending, told in any order, the books after each step.

What people do at Creem is acted out by creem.py; what it tells of that comes at once or is held back, once
or again, under other names, with less in it.  The model reads the same events in its own way, reckons in
fractions and knows nothing of SQL; its packages, holds and hours are those of the ledger's model.  In the end
all is told, and the books must be those of the same events in the order in which they happened."""

import functools
import json
import math
import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from datetime import datetime
from fractions import Fraction

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import videofly as v
from creem import Creem
from test_ledger import START, Model, at

PEOPLE = ["usr_ada", "usr_bob", "usr_cy"]
SOLD = {"prod_pack": (280, 1490, None), "prod_big": (7, 999, None), "prod_pro": (960, 2990, "month"),
        "prod_top": (2850, 7990, "month"), "prod_year": (11520, 29900, "year"),
        "prod_more": (34200, 79900, "year")}  # credits, cents, interval
PACKS, PLANS = ([id for id, it in SOLD.items() if (it[2] is None) == once] for once in (True, False))
CATALOGUE = v.Catalogue(
    credits=v.CreditRules(gift=0, gift_days=30, plan_days=30, pack_days=365), models=[],
    packs=[v.Pack(id=id, name=id, cents=cents, currency="USD", credits=credits, creem_id=id, open_to="all")
           for id, (credits, cents, interval) in SOLD.items() if not interval],
    plans=[v.Plan(id=id, name=id, cents=cents, currency="USD", credits=credits, creem_id=id, interval=every)
           for id, (credits, cents, every) in SOLD.items() if every])
OTHER_NAMES = {
    "checkout.completed": "payment.completed", "subscription.active": "subscription.created",
    "subscription.update": "subscription.updated", "subscription.canceled": "subscription.cancelled",
    "subscription.paid": "subscription.renewed", "refund.created": "refund.completed"}
WHO, ANY = st.sampled_from(PEOPLE), st.integers(0, 2**16)
PARTS = st.sampled_from([0, Fraction(1, 3), Fraction(1, 2), 1])
NOW_OR_LATER = st.sampled_from([0, 0, 0, 1, 2, 3, 4, 6, 7])  # which of an act's events are held back, as bits


def bare(event):
    """The same, where the payment is only named."""
    said = dict(event["object"])
    if isinstance(said.get("transaction"), dict):
        said["transaction"] = said["transaction"]["id"]
        if "subscription" in said:
            said.pop("order", None)
    return event | {"object": said}


@dataclass
class Books(Model):
    """What was told, and what it comes to.  A payment goes by its transaction; what it is for, by its order,
    or by its subscription and when the period begins."""

    at_once: bool = False  # a change to a higher plan brings its credits before it is paid
    lines: dict = field(default_factory=lambda: defaultdict(list))
    sales: dict = field(default_factory=dict)  # payment: (what for, whose purchase, credits, price)
    paid: dict = field(default_factory=dict)
    back: dict = field(default_factory=lambda: defaultdict(dict))  # payment: cents by refund
    total: Counter = field(default_factory=Counter)
    promised: Counter = field(default_factory=Counter)
    ends: dict = field(default_factory=dict)  # what for: when, and for how long if that is over
    owners: dict = field(default_factory=dict)
    given: Counter = field(default_factory=Counter)
    taken_back: Counter = field(default_factory=Counter)
    owed: Counter = field(default_factory=Counter)

    def learn(self, event, buyers):
        """buyers: who they are that our own checkouts name."""
        type, said = event["eventType"], event["object"]
        how = {"checkout.completed": self.learn_checkout, "subscription.paid": self.learn_paid,
               "subscription.update": self.learn_update, "refund.created": self.learn_refund,
               "dispute.created": self.learn_dispute}.get(type)
        if how:
            how(said)
        who = said.get("metadata", {}).get("referenceId") or buyers.get(said.get("request_id"))
        if who and type in ("checkout.completed", "subscription.paid"):
            purchase = said["order"] if type == "checkout.completed" else said
            self.owners.setdefault(said.get("subscription", purchase)["id"], who)

    def learn_checkout(self, said):
        order = said["order"]
        self.paid[order["transaction"]] = order["amount_paid"]
        if "subscription" not in said:
            what, (credits, price, _) = f"order:{order['id']}", SOLD[said["product"]["id"]]
            self.sales[order["transaction"]] = (what, order["id"], credits * said["units"], price)
            self.ends[what] = (0, 365)

    def period(self, said):
        begins, ends = (datetime.fromisoformat(said[f"current_period_{name}_date"]).timestamp() * 1000
                        for name in ("start", "end"))
        what, (credits, price, interval) = f"{said['id']}:{round(begins)}", SOLD[said["product"]["id"]]
        self.ends[what] = ((ends - START) / v.HOUR, 365 if interval == "year" else 30)
        return what, credits, price

    def learn_paid(self, said):
        what, credits, price = self.period(said)
        self.sales[said["last_transaction_id"]] = (what, said["id"], credits, price)

    def learn_update(self, said):
        what, credits, _ = self.period(said)
        if self.at_once:
            self.promised[what] = max(self.promised[what], credits)

    def learn_refund(self, said, amount="refund_amount"):
        if said.get("status", "succeeded") != "succeeded":
            return
        transaction, payment = said["transaction"], said["transaction"]
        if isinstance(transaction, dict):
            payment = transaction["id"]
            self.paid[payment] = transaction["amount_paid"]
            self.total[payment] = max(self.total[payment], transaction["refunded_amount"])
        if amount == "refund_amount":
            self.back[payment][said["id"]] = said[amount]
        else:
            self.total[payment] = max(self.total[payment], said[amount])

    def learn_dispute(self, said):
        self.learn_refund(said, "amount")

    def left(self, payment):
        _, _, credits, price = self.sales[payment]
        paid = self.paid.get(payment, price)
        back = min(paid, max(self.total[payment], sum(self.back[payment].values())))
        return credits - math.floor(Fraction(credits * back, paid) + Fraction(1, 2))

    def worth(self):
        """By what it was for, whose it is and how many credits it is worth."""
        known = defaultdict(list)
        for payment, (what, purchase, *_) in self.sales.items():
            if purchase in self.owners:
                known[what, self.owners[purchase]].append(payment)
        return {key: self.worth_of(key[0], payments) for key, payments in known.items()}

    def worth_of(self, what, payments):
        left = max(map(self.left, payments))
        highest = max(self.sales[payment][2] for payment in payments)
        return left + max(self.promised[what] - highest, 0) if left else 0

    def follow(self, steps):
        """Steps: what the ledger has newly granted and taken back, of which the order alone is believed."""
        worth = {what: (who, credits) for (what, who), credits in self.worth().items()}
        for what, credits in steps:
            who, (end, days) = worth[what][0], self.ends[what]
            if credits > 0:
                date = end if end > self.now else self.now + days * 24
                self.given[what] += credits
                self.grant(who, credits, f"{what} {self.given[what]}", date, what)
            else:
                self.taken_back[what] -= credits
                self.owed[who] -= credits
                self.take_owed(who, what)
        due = {what: credits for what, (_, credits) in worth.items() if credits}
        assert due == +(self.given - self.taken_back)

    def grant(self, who, credits, source, date, what=None):
        super().grant(who, credits, source, date)
        self.packages[-1].what = what
        self.take_owed(who)

    def release(self, who, hold):
        super().release(who, hold)
        self.take_owed(who)

    def take_owed(self, who, first=""):
        mine = [package for package in self.of(who) if package.can_be_spent(self.now)]
        own = [package for package in mine if package.what == first]
        for package in own[::-1] + mine[::-1]:
            taken = min(package.left, self.owed[who])
            package.left -= taken
            self.owed[who] -= taken


class Payments(RuleBasedStateMachine):
    @initialize(at_once=st.booleans())
    def open(self, at_once):
        self.creem, self.books, self.n = Creem(), Books(at_once=at_once), 0
        for id, (_, cents, interval) in SOLD.items():
            self.creem.product(id, cents, interval)
        self.shop = v.Shop(CATALOGUE, "immediate" if at_once else "next_cycle", False)
        self.held, self.heard, self.buyers, self.seen = [], [], {}, (0, 0)
        self.frozen = []  # (video, whose, hold)
        self.db = self.new_database()

    def new_database(self):
        db = v.connect(":memory:")
        v.migrate(db)
        for who in PEOPLE:
            v.insert(db, "users", id=who, email=f"{who}@example.test", created_at=0)
        return db

    @property
    def now(self):
        return at(self.books.now)

    def do(self, fn, **words):
        [result], _ = v.commit(self.db, [functools.partial(fn, now=self.now, **words)])
        assert not isinstance(result, BaseException), result
        return result

    # --- telling

    def hear(self, db, raw, now):
        v.hear_event(db, body=raw.decode(), row=v.read_event(raw, now=now), shop=self.shop, now=now)

    def tell(self, event, body=None):
        raw = json.dumps(body or event).encode()
        self.heard.append((event, raw))
        self.do(self.hear, raw=raw)
        self.books.learn(event, self.buyers)
        self.follow()

    def follow(self):
        steps = self.db.execute("""
            SELECT entitlement, initial FROM credit_packages WHERE id > ?1 AND entitlement IS NOT NULL
            UNION ALL SELECT entitlement, -credits FROM credit_clawbacks WHERE id > ?2
        """, self.seen).fetchall()
        self.seen = self.db.execute("""
            SELECT (SELECT coalesce(max(id), 0) FROM credit_packages),
                   (SELECT coalesce(max(id), 0) FROM credit_clawbacks)
        """).fetchone()
        self.books.follow(steps)

    def happened(self, events, later):
        self.creem.clock.pass_s(1)
        for n, event in enumerate(events):
            if later >> n & 1:
                self.held.append(event)
            else:
                self.tell(event)

    @precondition(lambda self: self.held)
    @rule(seed=ANY, count=st.integers(1, 4))
    def tell_what_was_held_back(self, seed, count):
        random.Random(seed).shuffle(self.held)
        for _ in range(min(count, len(self.held))):
            self.tell(self.held.pop())

    @precondition(lambda self: self.heard)
    @rule(n=ANY, how=st.sampled_from(["the same", "bare", "renamed", "as data", "without id"]))
    def tell_again(self, n, how):
        event, raw = self.heard[n % len(self.heard)]
        self.n += 1
        event = bare(event) if how == "bare" else event
        name, told = OTHER_NAMES.get(event["eventType"], event["eventType"]), {"id": f"evt_again{self.n}"}
        self.tell(event, {
            "the same": json.loads(raw), "bare": event | told, "renamed": event | told | {"eventType": name},
            "as data": told | {"type": name, "data": event["object"], "created_at": event["created_at"]},
            "without id": {"type": name, "data": event["object"], "created_at": event["created_at"]}}[how])

    @precondition(lambda self: self.heard)
    @rule(n=ANY)
    def replay(self, n):
        ids = [id for id, in self.db.execute("SELECT id FROM payment_events ORDER BY id")]
        self.do(v.apply_event, id=ids[n % len(ids)], shop=self.shop)
        self.follow()

    @rule(n=ANY, who=WHO)
    def assign(self, n, who):
        if nobodys := self.nobodys(self.db):
            self.assign_one(self.db, *nobodys[n % len(nobodys)], who)
            self.follow()

    def nobodys(self, db):
        """Sales of which nobody could tell whose they are: (event, purchase)."""
        return db.execute("""
            SELECT id, coalesce(subscription_id, order_id) FROM payment_events
            WHERE state = 'attention' AND is_sale ORDER BY id
        """).fetchall()

    def assign_one(self, db, id, purchase, who):
        """Operators find out who it is, if there is anybody."""
        who = self.books.owners.setdefault(purchase, self.buyers.get(purchase, who))
        with db:
            email = f"{who}@example.test"
            v.assign_event(db, id=str(id), email=email, shop=self.shop, now=self.now)

    # --- what people do at Creem

    @rule(who=WHO, product=st.sampled_from([*SOLD]), units=st.sampled_from([1, 1, 3]), later=NOW_OR_LATER,
          how=st.sampled_from(["named", "named", "by our checkout", "by a link"]))
    def buy(self, who, product, units, later, how):
        self.n += 1
        wish = {"product_id": product, "units": units if product in PACKS else 1}
        if how == "named":
            wish |= {"metadata": {"referenceId": who}, "customer": {"email": f"{who}@example.test"}}
        elif how == "by our checkout":
            id = wish["request_id"] = f"chk_{self.n}"
            v.insert(self.db, "checkouts", id=id, user_id=who, product=product, units=1, created_at=1)
            self.buyers[id] = who
        events = self.creem.pay(self.creem.new_checkout(wish)["id"], email=f"buyer{self.n}@example.test")
        said = events[0]["object"]
        if how == "by our checkout":
            self.buyers[said.get("subscription", said["order"])["id"]] = who
        self.happened(events, later)

    def subscription(self, n, *states):
        found = [id for id, sub in self.creem.subscriptions.items() if sub["status"] in states]
        return found and found[n % len(found)]

    @rule(n=ANY, later=NOW_OR_LATER)
    def renew(self, n, later):
        if sub := self.subscription(n, "active", "past_due"):
            self.happened(self.creem.renew(sub), later)

    @rule(n=ANY, paid=st.booleans(), later=NOW_OR_LATER)
    def change_plan(self, n, paid, later):
        if sub := self.subscription(n, "active"):
            has = self.creem.subscriptions[sub]["product"]
            [other] = [id for id in PLANS if SOLD[id][2] == SOLD[has][2] and id != has]
            self.happened(self.creem.change_plan(sub, other, paid), later)

    @rule(n=ANY, act=st.sampled_from(["pause", "cancel", "fail", "resume"]), later=NOW_OR_LATER)
    def turn(self, n, act, later):
        if sub := self.subscription(n, "paused" if act == "resume" else "active"):
            acts = {"pause": self.creem.pause, "resume": self.creem.resume, "fail": self.creem.fail_renewal,
                    "cancel": self.creem.cancel}
            self.happened(acts[act](sub), later)

    def payment(self, n):
        found = [id for id, each in self.creem.transactions.items() if each["amount_paid"]]
        return found and found[n % len(found)]

    @rule(n=ANY, part=PARTS, later=NOW_OR_LATER, less=st.booleans())
    def refund(self, n, part, later, less):
        payment = self.payment(n)
        if payment and (left := self.creem.left(payment)) > 0:
            [event] = self.creem.refund(payment, max(1, math.floor(left * part)))
            self.happened([bare(event) if less else event], later)

    @rule(n=ANY, later=NOW_OR_LATER)
    def refund_that_never_happens(self, n, later):
        if payment := self.payment(n):
            self.happened(map(bare, self.creem.refund(payment, status="pending")), later)

    @rule(n=ANY, later=NOW_OR_LATER)
    def dispute(self, n, later):
        if payment := self.payment(n):
            self.happened(self.creem.dispute(payment), later)

    # --- what happens here

    @rule(hours=st.sampled_from([1, 20, 24 * 8, 24 * 31, 24 * 400]), sweep=st.booleans())
    def pass_time(self, hours, sweep):
        self.books.now += hours
        self.creem.clock.pass_s(hours * 3600)
        limit = 500 if sweep else 0
        assert self.do(v.expire, limit=limit).get("expiredPackages", 0) == self.books.expire(limit)

    @rule(who=WHO, credits=st.sampled_from([5, 300]), days=st.none() | st.integers(1, 40))
    def give(self, who, credits, days):
        self.n += 1
        date = None if days is None else self.books.now + days * 24
        self.do(v.grant, user_id=who, credits=credits, trans_type="SYSTEM_ADJUST", source_ref=str(self.n),
                note="", expires_at=at(date))
        self.books.grant(who, credits, str(self.n), date)

    @rule(who=WHO, part=st.sampled_from([0.3, 1.0]))
    def deduct(self, who, part):
        if credits := math.floor(self.books.available(who) * part):
            self.do(v.deduct, user_id=who, credits=credits, note="")
            self.books.deduct(who, credits)

    @rule(who=WHO, part=st.sampled_from([0.2, 0.9]))
    def order_video(self, who, part):
        if credits := math.floor(self.books.available(who) * part):
            self.n += 1
            order = v.Order("told", "scripted", "a fox", "", 5, "16:9", "480p", 1, [], credits)
            self.do(v.request_video, id=f"{self.n:036}", user_id=who, api_key_id=None, order=order,
                    max_running=99, catalog_version="v1", timeout=v.HOUR)
            self.frozen.append((f"{self.n:036}", who, self.books.freeze(who, credits, None)))

    @precondition(lambda self: self.frozen)
    @rule(n=ANY, made=st.booleans())
    def end_video(self, n, made):
        id, who, hold = self.frozen.pop(n % len(self.frozen))
        if made:
            job = functools.partial(v.one, self.db, v.Job, "FROM videos WHERE id = :id", id=id)
            self.do(v.mark_uploading, job=job(), original_url="https://x.test/x", until_at=None)
            self.do(v.complete, job=job(), stored=v.stored_keys(id, 1))
            self.books.settle(hold)
        else:
            self.do(v.cancel_video, user_id=who, id=id)
            self.books.release(who, hold)

    # --- what is always true

    @invariant()
    def what_was_given_and_taken_back_is_the_models(self):
        given, taken = (dict(self.db.execute(sql).fetchall()) for sql in (
            "SELECT entitlement, sum(initial) FROM credit_packages WHERE entitlement IS NOT NULL GROUP BY 1",
            "SELECT entitlement, sum(credits) FROM credit_clawbacks GROUP BY 1"))
        assert (given, taken) == (+self.books.given, +self.books.taken_back)
        for (what, _), worth in self.books.worth().items():
            sold = max(credits for for_, _, credits, _ in self.books.sales.values() if for_ == what)
            net = given.get(what, 0) - taken.get(what, 0)
            assert 0 <= net == worth <= max(sold, self.books.promised[what])

    @invariant()
    def every_balance_is_the_models(self):
        for who in PEOPLE:
            found, packages = v.balance(self.db, user_id=who, now=self.now), self.books.of(who)
            assert found["availableCredits"] == self.books.available(who)
            assert found["debt"] == self.books.owed[who]
            assert not (found["availableCredits"] and found["debt"])
            assert self.db.execute("""
                SELECT remaining, frozen, used, expires_at FROM credit_packages WHERE user_id = ? ORDER BY id
            """, [who]).fetchall() == [
                (p.left, p.frozen, p.used, p.date and round(at(p.date))) for p in packages]

    @invariant()
    def the_auditor_is_content(self):
        assert v.audit(self.db)["faults"] == []

    # --- in the end

    def teardown(self):
        """Not after a failure, which is what should be told."""
        if hasattr(self, "db"):
            if sys.exc_info()[0] is None:
                self.tell_all()
                assert self.meaning(self.db) == self.meaning(self.told_in_order())
            self.db.close()

    def tell_all(self):
        while self.held:
            self.tell(self.held.pop())
        while nobodys := self.nobodys(self.db):
            self.assign_one(self.db, *nobodys[0], PEOPLE[0])
            self.follow()
        self.what_was_given_and_taken_back_is_the_models()
        self.every_balance_is_the_models()
        self.the_auditor_is_content()

    def told_in_order(self):
        """Another database, which was told the same as it happened."""
        db, order = self.new_database(), [event["id"] for event in self.creem.events]
        checkouts = self.db.execute("SELECT * FROM checkouts")
        db.executemany("INSERT INTO checkouts VALUES (?, ?, ?, ?, ?, ?, ?)", checkouts)
        for _, raw in sorted(self.heard, key=lambda heard: order.index(heard[0]["id"])):
            self.hear(db, raw, self.now)
        while nobodys := self.nobodys(db):
            self.assign_one(db, *nobodys[0], PEOPLE[0])
        assert v.audit(db)["faults"] == []
        return db

    def meaning(self, db):
        return [sorted(map(repr, db.execute(sql))) for sql in (
            """SELECT user_id, entitlement, payment, product, credits, promised, paid, back, credits_left
               FROM payments""",
            "SELECT id, user_id, plan, status, period_start_at, period_end_at, is_running FROM subscriptions",
            "SELECT delivery_key, product, credits, state FROM payment_events",
            """SELECT entitlement, sum(credits) FROM (
                   SELECT entitlement, initial AS credits FROM credit_packages WHERE entitlement IS NOT NULL
                   UNION ALL SELECT entitlement, -credits FROM credit_clawbacks)
               GROUP BY 1 HAVING sum(credits)""")]


# The same examples each time, so that what fails here fails everywhere; the blob repeats a failure by itself.
Payments.TestCase.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, database=None, print_blob=True,
    phases=[Phase.generate, Phase.shrink], suppress_health_check=[HealthCheck.too_slow])
TestPayments = Payments.TestCase
