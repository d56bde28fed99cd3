"""What Creem tells comes in any order, any number of times, under several names, and the books follow."""

import functools
import itertools
import json
import random
from pathlib import Path

import pytest

import videofly as v

EVENTS = Path(__file__).parent / "creem-events"
SAMPLES = {file.stem: file.read_bytes() for file in sorted(EVENTS.glob("*.*.json"))}
NOW = 1_772_400_000_000  # in the first period of the samples' subscription
RULES = v.CreditRules(gift=0, gift_days=30, plan_days=30, pack_days=365)
CATALOGUE = v.Catalogue(
    credits=RULES, models=[],
    packs=[v.Pack(id="starter", name="Starter", cents=1490, currency="USD", credits=280, open_to="all",
                  creem_id="prod_StarterPack0001")],
    plans=[v.Plan(id=id, name=id, cents=cents, currency="USD", credits=credits, interval=interval,
                  creem_id=creem_id)
           for id, cents, credits, interval, creem_id in (
               ("pro", 2990, 960, "month", "prod_ProMonthly0001"),
               ("ultimate", 7990, 2850, "month", "prod_UltMonthly0001"),
               ("yearly", 29900, 11520, "year", "prod_ProYearly0001"))])
SHOP = v.Shop(CATALOGUE, "next_cycle", False)
AT_ONCE = v.Shop(CATALOGUE, "immediate", False)


@pytest.fixture
def db():
    db = v.connect(":memory:")
    v.migrate(db)
    for id in ("usr_mira", "usr_bob"):
        v.insert(db, "users", id=id, email=f"{id}@example.test", created_at=1)
    yield db
    db.close()


def body(name, **changes):
    """A sample whose buyer is usr_mira; changes by path, where __ leads inside."""
    event = json.loads(SAMPLES[name].replace(b"user_0001", b"usr_mira"))
    for path, value in changes.items():
        *steps, last = path.split("__")
        place = functools.reduce(lambda part, step: part[step], steps, event)
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return json.dumps(event).encode()


def hear(db, *bodies, shop=SHOP, now=NOW):
    for raw in bodies:
        with db:
            db.execute("BEGIN IMMEDIATE")
            v.hear_event(db, body=raw.decode(), row=v.read_event(raw, now=now), shop=shop, now=now)
    assert v.audit(db)["faults"] == []


def credits(db, user="usr_mira", now=NOW):
    """(available, owed)"""
    found = v.balance(db, user_id=user, now=now)
    return found["availableCredits"], found["debt"]


def give(db, n, ref):
    """So many credits, by an administrator."""
    v.grant(db, user_id="usr_mira", credits=n, trans_type="SYSTEM_ADJUST", source_ref=ref, note="",
            expires_at=None, now=NOW)


def states(db):
    return [row[0] for row in db.execute("SELECT state FROM payment_events ORDER BY id")]


def effects(db):
    return [row[0] for row in db.execute("SELECT effect FROM payment_events ORDER BY id")]


PACK = body("checkout.completed.onetime")
SUBSCRIBED = [
    body("checkout.completed.subscription"),
    body("subscription.active"),
    body("subscription.paid.initial"),
]
RENEWED = body("subscription.paid.renewal")


# --- what is paid for is granted, once


def test_a_pack_is_granted_by_its_checkout(db):
    hear(db, PACK)
    assert credits(db) == (280, 0)
    assert effects(db) == ["280 credits granted."]


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_of_the_three_that_announce_a_subscription_one_grants(db, order):
    hear(db, *(SUBSCRIBED[n] for n in order))
    assert credits(db) == (960, 0)
    assert v.balance(db, user_id="usr_mira", now=NOW)["plan"] == "pro"


def test_a_renewal_grants_again(db):
    hear(db, *SUBSCRIBED, RENEWED)
    assert credits(db) == (1920, 0)


@pytest.mark.parametrize("pair", [
    ("checkout.completed.onetime", "alias.payment.completed"),
    ("refund.created.full.onetime", "alias.refund.completed"),
    ("subscription.active", "alias.subscription.created"),
    ("subscription.update", "alias.subscription.updated"),
    ("subscription.canceled", "alias.subscription.cancelled"),
])
def test_an_alias_means_the_same(db, pair):
    hear(db, *SUBSCRIBED, PACK)
    before = credits(db)
    first, second = (body(name, id=f"evt_{n}") for n, name in enumerate(pair))
    hear(db, first)
    once = (credits(db), standing(db))
    hear(db, second)
    assert (credits(db), standing(db)) == once
    if "refund" in pair[0]:
        assert once[0] == (before[0] - 280, 0)
    assert set(states(db)) == {"applied"}


def standing(db):
    return db.execute("SELECT status, plan, is_running FROM subscriptions").fetchall()


def test_a_renewal_under_its_other_name_is_the_same_renewal(db):
    hear(
        db,
        *SUBSCRIBED,
        RENEWED,
        body("subscription.paid.renewal", id="evt_again", eventType="subscription.renewed"),
    )
    assert credits(db) == (1920, 0)


def test_every_sample_is_heard_and_none_is_left_open(db):
    hear(db, *(body(name) for name in SAMPLES))
    assert set(states(db)) == {"applied"}


def test_all_samples_in_any_order_each_told_twice_end_the_same(db):
    ends, names = set(), [*SAMPLES] * 2
    for seed in range(40):
        random.Random(seed).shuffle(names)
        fresh = v.connect(":memory:")
        v.migrate(fresh)
        v.insert(fresh, "users", id="usr_mira", email="a@b.c", created_at=1)
        hear(fresh, *(body(name) for name in names))
        ends.add((credits(fresh), tuple(sorted(map(str, standing(fresh)))), tuple(sorted(states(fresh)))))
        fresh.close()
    assert len(ends) == 1


def test_units_multiply_a_pack(db):
    hear(db, body("checkout.completed.onetime", object__units=3))
    assert credits(db) == (840, 0)


def test_a_purchase_of_nothing_is_a_purchase(db):
    hear(db, body("checkout.completed.onetime", object__order__amount_paid=0, object__order__amount_due=0))
    assert credits(db) == (280, 0)


def test_a_plans_credits_end_with_their_period_and_a_packs_after_a_year(db):
    hear(db, SUBSCRIBED[2], PACK)
    ends = dict(db.execute("SELECT trans_type, expires_at FROM credit_packages"))
    assert ends == {"SUBSCRIPTION": 1_775_030_705_000, "ORDER_PAY": NOW + 365 * v.DAY}


def test_what_is_heard_after_its_period_lasts_as_long_as_a_plan_does(db):
    later = 1_800_000_000_000
    hear(db, SUBSCRIBED[2], now=later)
    assert credits(db, now=later + 29 * v.DAY) == (960, 0)
    assert credits(db, now=later + 31 * v.DAY) == (0, 0)


def test_a_yearly_plan_ends_with_its_year(db):
    year = {
        "object__product__id": "prod_ProYearly0001",
        "object__current_period_end_date": "2027-03-01T08:05:05.000Z",
    }
    hear(db, body("subscription.paid.initial", **year))
    assert credits(db, now=1_772_352_305_000 + 364 * v.DAY) == (11520, 0)
    assert credits(db, now=1_772_352_305_000 + 366 * v.DAY) == (0, 0)


def test_a_year_that_is_heard_of_late_lasts_a_year(db):
    later = 1_800_000_000_000
    hear(db, body("subscription.paid.initial", object__product__id="prod_ProYearly0001"), now=later)
    assert credits(db, now=later + 364 * v.DAY) == (11520, 0)


def test_the_price_of_the_day_counts_also_when_it_is_told_again(db):
    hear(db, PACK)
    dearer = v.msgspec.structs.replace(CATALOGUE.packs[0], credits=999)
    shop = v.Shop(v.msgspec.structs.replace(CATALOGUE, packs=[dearer]), "next_cycle", False)
    hear(db, body("alias.payment.completed"), body("refund.created.full.onetime"), shop=shop)
    assert credits(db) == (0, 0)


def dearer(n, credits):
    plans = [*CATALOGUE.plans]
    plans[n] = v.msgspec.structs.replace(plans[n], credits=credits)
    return v.Shop(v.msgspec.structs.replace(CATALOGUE, plans=plans), "immediate", False)


def test_the_same_change_may_promise_more_when_the_catalogue_gives_more(db):
    hear(db, *SUBSCRIBED, body("subscription.update"), shop=AT_ONCE)
    hear(db, body("subscription.update", id="evt_again"), shop=dearer(1, 3000))
    hear(db, body("subscription.update", id="evt_once_more"), shop=dearer(1, 3100))
    assert credits(db) == (3100, 0)


def test_what_was_paid_may_become_known_in_steps(db):
    unknown = {"object__order__amount_paid": None, "object__order__amount": None}
    refund = functools.partial(body, "refund.created.partial.onetime", object__transaction=None)
    refund = refund(object__refund_amount=745, **unknown)
    hear(db, body("checkout.completed.onetime", **unknown), refund)
    assert credits(db) == (140, 0)  # of the price
    for cents in (1639, 1788):
        hear(db, body("checkout.completed.onetime", id=f"evt_{cents}", object__order__amount_paid=cents))
    assert credits(db) == (280 - 117, 0)


# --- what is paid back is taken back


def test_a_full_refund_takes_all_that_the_payment_gave(db):
    hear(db, PACK, body("refund.created.full.onetime"))
    assert credits(db) == (0, 0)
    assert effects(db)[1] == "280 credits to be taken back: 280 were there, 0 are owed."


def test_a_partial_refund_takes_its_part_rounded_half_up(db):
    hear(db, PACK, body("refund.created.partial.onetime"))
    assert credits(db) == (
        280 - 93,
        0,
    )  # 280 * 600 / 1803 is 93.18; of the price without tax it would be 112.75


def test_a_refund_of_very_much_is_reckoned_like_any_other(db):
    units, cents = 3_500_000, 10**10
    hear(db, body("checkout.completed.onetime", object__units=units, object__order__amount_paid=cents),
         body("refund.created.full.onetime", object__refund_amount=cents,
              object__transaction__amount_paid=cents,
              object__transaction__refunded_amount=cents))
    assert credits(db) == (0, 0)


def test_partial_refunds_end_at_the_whole(db):
    refund = functools.partial(body, "refund.created.partial.onetime", object__refund_amount=601)
    hear(db, PACK)
    for n in (1, 2, 3):
        hear(db, refund(id=f"evt_{n}", object__id=f"ref_{n}", object__transaction__refunded_amount=601 * n))
    assert credits(db) == (0, 0)


def test_a_refund_counts_once_however_often_it_is_told(db):
    alone = {"object__transaction__refunded_amount": None}  # without what was paid back in all
    hear(db, PACK, *(body("refund.created.partial.onetime", id=f"evt_{n}", **alone) for n in (1, 2)))
    assert (credits(db), states(db)) == ((187, 0), ["applied"] * 3)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_a_refund_may_come_before_its_payment(db, order):
    events = [PACK, body("refund.created.partial.onetime"), body("alias.payment.completed")]
    hear(db, *(events[n] for n in order))
    assert credits(db) == (187, 0)
    assert set(states(db)) == {"applied"}


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_what_a_plans_checkout_says_was_paid_counts_whenever_it_is_told(db, order):
    bare = {"object__order": None, "object__transaction": "tran_1proMonthly001",
            "object__refund_amount": 1809}
    events = [SUBSCRIBED[0], SUBSCRIBED[2], body("refund.created.full.subscription", **bare)]
    hear(db, *(events[n] for n in order))
    assert credits(db) == (480, 0)  # half of 3618 cents; the price alone is 2990
    assert {*db.execute("SELECT expires_at FROM credit_packages")} == {(1_775_030_705_000,)}


def test_what_was_spent_is_owed_and_the_next_grant_pays_it(db):
    hear(db, PACK)
    with db:
        v.deduct(db, user_id="usr_mira", credits=200, note="spent", now=NOW)
    hear(db, body("refund.created.full.onetime"))
    assert credits(db) == (0, 200)
    assert effects(db)[1] == "280 credits to be taken back: 80 were there, 200 are owed."
    hear(db, *SUBSCRIBED)
    assert credits(db) == (760, 0)
    with db:
        give(db, 5, "x")
    assert credits(db) == (765, 0)


def test_the_packs_own_credits_go_first_and_then_the_newest(db):
    hear(db, PACK)
    for n in (1, 2):
        with db:
            give(db, 100, str(n))
    v.deduct(db, user_id="usr_mira", credits=150, note="spent", now=NOW)  # of the pack, which ends first
    hear(db, body("refund.created.full.onetime"))
    assert [row[0] for row in db.execute("SELECT remaining FROM credit_packages ORDER BY id")] == [0, 50, 0]


def test_credits_that_come_back_pay_what_is_owed(db):
    hear(db, PACK)
    order = v.Order("told", "scripted", "a fox", "", 5, "16:9", "480p", 1, [], 100)
    with db:
        db.execute("BEGIN")
        v.request_video(
            db,
            id="v" * 36,
            user_id="usr_mira",
            api_key_id=None,
            order=order,
            max_running=3,
            catalog_version="v1",
            timeout=60_000,
            now=NOW,
        )
    hear(db, body("refund.created.full.onetime"))
    assert credits(db) == (0, 100)
    v.cancel_video(db, user_id="usr_mira", id="v" * 36, now=NOW)
    assert credits(db) == (0, 0)
    assert v.audit(db)["faults"] == []


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_a_full_refund_of_the_running_period_ends_the_plan(db, order):
    events = [*SUBSCRIBED[1:], body("refund.created.full.subscription")]
    hear(db, *(events[n] for n in order))
    assert (credits(db), v.balance(db, user_id="usr_mira", now=NOW)["plan"]) == ((0, 0), None)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_of_two_events_of_one_moment_the_one_that_names_the_period_says_how_the_plan_stands(db, order):
    paid = SUBSCRIBED[2]
    active = body("subscription.active", object__updated_at=json.loads(paid)["object"]["updated_at"])
    events = [active, paid, body("refund.created.full.subscription")]
    hear(db, *(events[n] for n in order))
    assert standing(db) == [("active", "pro", 0)]


def dispute(**changes):
    event = json.loads(body("refund.created.full.onetime"))
    event |= {"id": "evt_dispute", "eventType": "dispute.created"}
    event["object"] |= {"id": "disp_1", "object": "dispute", "amount": 1803, "currency": "USD"}
    event["object"]["transaction"] |= {"status": "chargeback"}
    del event["object"]["status"], event["object"]["refund_amount"]
    return json.dumps(event).encode()


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_a_dispute_takes_once_what_a_refund_would_and_flags_the_account(db, order):
    events = [PACK, dispute(), body("refund.created.full.onetime")]
    hear(db, *(events[n] for n in order))
    assert credits(db) == (0, 0)
    assert v.get_user(db, user_id="usr_mira")["isDisputed"]
    assert not v.get_user(db, user_id="usr_bob")["isDisputed"]


@pytest.mark.parametrize("status", ["pending", "requiresAction", "failed", "canceled"])
def test_a_refund_that_has_not_happened_takes_nothing(db, status):
    refund = functools.partial(body, "refund.created.full.onetime", object__status=status)
    hear(db, PACK, refund(object__transaction__status="paid", object__transaction__refunded_amount=None))
    assert credits(db) == (280, 0)
    hear(db, body("refund.created.full.onetime", id="evt_done"))
    assert credits(db) == (0, 0)


# --- plans change


def paid_for_ultimate(**changes):
    """Paid in the first period, after it began with Pro."""
    return body(
        "subscription.paid.initial",
        id="evt_more",
        object__product__id="prod_UltMonthly0001",
        object__last_transaction_id="tran_more",
        object__updated_at="2026-03-10T09:30:00.000Z",
        **changes,
    )


def test_a_higher_plan_comes_with_its_payment(db):
    hear(db, *SUBSCRIBED, body("subscription.update"))
    assert credits(db) == (960, 0)
    hear(db, paid_for_ultimate())
    assert credits(db) == (2850, 0)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_with_immediate_a_higher_plan_comes_at_once_and_its_payment_adds_nothing(db, order):
    events = [SUBSCRIBED[2], body("subscription.update"), paid_for_ultimate()]
    hear(db, *(events[n] for n in order), shop=AT_ONCE)
    assert credits(db) == (2850, 0)


def test_with_immediate_a_change_may_be_told_before_it_is_known_whose_the_subscription_is(db):
    hear(db, body("subscription.update"), SUBSCRIBED[2], shop=AT_ONCE)
    assert credits(db) == (2850, 0)


def test_with_immediate_the_difference_is_there_before_any_payment(db):
    hear(db, *SUBSCRIBED, body("subscription.update"), shop=AT_ONCE)
    assert credits(db) == (2850, 0)
    hear(
        db,
        body("subscription.update", id="evt_down", object__product__id="prod_ProMonthly0001"),
        shop=AT_ONCE,
    )
    assert credits(db) == (2850, 0)


def test_a_change_in_a_period_that_nobody_paid_for_gives_nothing(db):
    hear(db, body("subscription.update", object__metadata={"referenceId": "usr_mira"}), shop=AT_ONCE)
    assert credits(db) == (0, 0)


def test_a_refund_of_the_change_leaves_what_was_paid_for_before(db):
    refund = functools.partial(body, "refund.created.full.subscription", object__transaction__id="tran_more")
    hear(db, *SUBSCRIBED, paid_for_ultimate(), refund(object__transaction__period_start=1_772_352_305_000))
    assert credits(db) == (960, 0)


def test_paying_twice_for_one_period_gives_its_credits_once_and_one_refund_takes_nothing(db):
    twice = body("subscription.paid.initial", id="evt_twice", object__last_transaction_id="tran_twice")
    hear(db, *SUBSCRIBED, twice)
    assert credits(db) == (960, 0)
    hear(db, body("refund.created.full.subscription", object__transaction__id="tran_twice"))
    assert credits(db) == (960, 0)
    hear(db, body("refund.created.full.subscription", id="evt_other", object__id="ref_other"))
    assert credits(db) == (0, 0)


def test_paying_again_after_a_refund_gives_the_credits_again(db):
    again = body("subscription.paid.initial", id="evt_again", object__last_transaction_id="tran_again")
    hear(db, *SUBSCRIBED, body("refund.created.full.subscription"), again)
    assert credits(db) == (960, 0)


@pytest.mark.parametrize(("names", "end"), [
    (["subscription.scheduled_cancel"], ("scheduled_cancel", 1)),
    (["subscription.scheduled_cancel", "subscription.canceled"], ("canceled", 0)),
    (["subscription.canceled", "subscription.scheduled_cancel", "subscription.update"], ("canceled", 0)),
    (["subscription.past_due"], ("past_due", 1)), (["subscription.unpaid"], ("unpaid", 0)),
    (["subscription.paused"], ("paused", 0)), (["subscription.paid.renewal", "subscription.past_due"], None),
])
def test_a_subscription_stands_as_its_latest_event_says(db, names, end):
    hear(db, *SUBSCRIBED, *(body(name) for name in names))
    (found,) = db.execute("SELECT status, is_running FROM subscriptions").fetchall()
    if end is None:  # whichever is later
        late = max(names, key=lambda name: json.loads(SAMPLES[name])["object"]["updated_at"])
        end = ("active", 1) if "paid" in late else ("past_due", 1)
    assert found == end
    assert credits(db)[1] == 0


def test_an_end_is_final_whatever_comes_after_it(db):
    late = {"object__updated_at": "2026-12-01T00:00:00.000Z"}
    hear(db, *SUBSCRIBED, body("subscription.canceled"), body("subscription.past_due", **late))
    assert standing(db)[0][0] == "canceled"


def test_an_expired_subscription_gives_nothing_and_a_payment_brings_it_back(db):
    expired = body("subscription.past_due", eventType="subscription.expired", object__status="active",
                   object__updated_at="2026-03-20T00:00:00.000Z")
    hear(db, *SUBSCRIBED, expired)
    assert standing(db) == [("expired", "pro", 0)]
    hear(db, RENEWED)
    assert (standing(db), credits(db)) == ([("active", "pro", 1)], (1920, 0))


# --- whose it is


def test_our_own_checkout_says_best_whose_a_purchase_is(db):
    v.insert(db, "checkouts", id="chk_1", user_id="usr_bob", product="starter", units=1, created_at=1)
    hear(db, body("checkout.completed.onetime", object__request_id="chk_1"))
    assert (credits(db), credits(db, "usr_bob")) == ((0, 0), (280, 0))


def test_a_subscription_stays_whose_it_was(db):
    hear(db, *SUBSCRIBED, body("subscription.paid.renewal", object__metadata={"referenceId": "usr_bob"}))
    assert (credits(db), credits(db, "usr_bob")) == ((1920, 0), (0, 0))


def test_two_people_with_one_card_keep_what_is_theirs(db):
    hear(db, PACK)  # mira's, of the same customer
    hear(db, body("subscription.active"))  # says of nobody whose it is
    metadata = {"referenceId": "usr_bob"}
    hear(db, body("subscription.paid.initial", object__metadata=metadata))
    assert (credits(db), credits(db, "usr_bob")) == ((280, 0), (960, 0))
    assert db.execute("SELECT user_id FROM subscriptions").fetchone() == ("usr_bob",)


def test_a_sale_by_a_link_goes_to_whom_the_customer_is(db):
    hear(db, PACK)
    hear(db, body("subscription.paid.initial", object__metadata=None))
    assert credits(db) == (1240, 0)


def test_a_sale_by_a_link_goes_there_also_when_the_customer_becomes_known_later(db):
    hear(db, body("subscription.paid.initial", object__metadata=None), PACK)
    assert (credits(db), states(db)) == ((1240, 0), ["applied"] * 2)


@pytest.mark.parametrize("wish", [{}, {"product": "ultimate"}])
def test_what_is_of_somebodys_subscription_cannot_be_assigned_to_another(db, wish):
    unknown = {"object__product__id": "prod_new", "object__last_transaction_id": "tran_new"}
    hear(db, *SUBSCRIBED, body("subscription.paid.renewal", **unknown))
    assert states(db)[-1] == "attention"
    to_bob, to_mira = {"email": "usr_bob@example.test", **wish}, {"email": "usr_mira@example.test"}
    with pytest.raises(v.AlreadyFinished):
        v.assign_event(db, id="4", **to_bob, shop=SHOP, now=NOW)
    with db:
        found = v.assign_event(db, id="4", **to_mira, product="pro", shop=SHOP, now=NOW)
    assert found == {"effect": "960 credits granted."}
    hear(db, body("subscription.paid.renewal", id="evt_more"))
    assert (credits(db), credits(db, "usr_bob")) == ((1920, 0), (0, 0))


def test_a_payment_of_nobody_waits_until_it_is_known_whose_it_is(db):
    anonymous = [body("subscription.paid.initial", object__metadata=None), body("subscription.active")]
    hear(db, *anonymous)
    assert states(db) == ["attention", "applied"]
    assert effects(db)[0] == "Nobody is known who has paid this."
    hear(db, SUBSCRIBED[0])
    assert (states(db), credits(db)) == (["applied"] * 3, (960, 0))


def test_an_unknown_product_waits_until_the_catalogue_knows_it(db):
    hear(
        db,
        body("checkout.completed.onetime", object__product__id="prod_new", object__order__product="prod_new"),
    )
    assert effects(db) == ["Product prod_new is not in the catalogue."]
    pack = v.msgspec.structs.replace(CATALOGUE.packs[0], creem_id="prod_new")
    shop = v.Shop(v.msgspec.structs.replace(CATALOGUE, packs=[pack]), "next_cycle", False)
    with db:
        assert v.apply_event(db, id=1, shop=shop, now=NOW) == {"effect": "280 credits granted."}
        assert v.apply_event(db, id=1, shop=shop, now=NOW) == {"effect": "Everything was as it should be."}
    assert credits(db) == (280, 0)


@pytest.mark.parametrize("mode", ["test", "sandbox", "local", "anything"])
def test_what_is_not_real_counts_for_nothing_in_production(db, mode):
    real = v.Shop(CATALOGUE, "next_cycle", True)
    hear(db, body("checkout.completed.onetime", object__mode=mode), shop=real)
    assert (credits(db), states(db)) == ((0, 0), ["ignored"])
    hear(db, body("checkout.completed.onetime", id="evt_real", object__mode="prod"), shop=real)
    assert credits(db) == (280, 0)


# --- bad input


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"null", b'"x"', b"7", b"{}", b'{"eventType": "x"}', b'{"object": {}}', b"\xff\xfe",
    b"[" * 5000,
    b'{"eventType": 7, "object": []}', b'{"a":' * 100_000, b'{"eventType": "", "object": {"id": "x"}}',
    b'{"eventType": "x", "object": {"id": "\\ud800"}}',
])
def test_what_is_no_event_is_refused(raw):
    with pytest.raises(v.Invalid):
        v.read_event(raw, now=NOW)


@pytest.mark.parametrize(("changes", "after"), [
    ({"object__order__id": 7, "object__product__id": "prod_StarterPack0001"}, (280, 0)),
    ({"object__order__amount_paid": "1803"}, (280, 0)), ({"object__order__amount_paid": -5}, (280, 0)),
    ({"object__order__amount_paid": 1e300}, (280, 0)), ({"object__order__amount_paid": [1]}, (280, 0)),
    ({"object__units": 10**11}, (0, 0)), ({"object__units": 10**30}, (280, 0)),
    ({"object__units": -3}, (280, 0)), ({"object__units": "2"}, (560, 0)),
    ({"object__order": None}, (280, 0)), ({"object__order": "ord_2starterPack001"}, (280, 0)),
    ({"object__customer": None}, (280, 0)), ({"object__metadata": "usr_bob"}, (0, 0)),
    ({"object__metadata": {"referenceId": {"id": "usr_mira"}}}, (0, 0)),
    ({"object__product": "prod_StarterPack0001"}, (280, 0)),
    ({"object__product": None}, (280, 0)), ({"object__product": None, "object__order": None}, (0, 0)),
    ({"object__status": "pending"}, (0, 0)), ({"object__order__status": "pending"}, (0, 0)),
    ({"object__status": None}, (280, 0)),
    ({"id": None}, (280, 0)), ({"id": {"x": 1}}, (280, 0)), ({"created_at": "yesterday"}, (280, 0)),
    ({"created_at": 10**40}, (280, 0)), ({"object__mode": 5}, (280, 0)),
    ({"object__id": "x" * 10_000}, (280, 0)),
    ({"object__subscription": "sub_x"}, (0, 0)), ({"object__order__type": "recurring"}, (0, 0)),
    ({"object__product__billing_type": "one-time"}, (280, 0)), ({"eventType": "something.new"}, (0, 0)),
])
def test_strange_facts_grant_nothing_that_was_not_paid_and_lose_nothing_that_was(db, changes, after):
    hear(db, body("checkout.completed.onetime", **changes))
    assert credits(db) == after
    assert db.execute("SELECT count(*) FROM payment_events").fetchone() == (1,)


@pytest.mark.parametrize(("changes", "left"), [
    ({"object__refund_amount": "600"}, 187), ({"object__refund_amount": -600}, 187),
    ({"object__refund_amount": 10**9}, 0), ({"object__refund_amount": 10**40}, 187),
    ({"object__refund_amount": None}, 187), ({"object__transaction": None}, 187),
    ({"object__refund_amount": None, "object__transaction__refunded_amount": None}, 280),
    ({"object__refund_amount": 0, "object__transaction__refunded_amount": 0}, 280),
    ({"object__order": None}, 187),
    ({"object__order": None, "object__transaction": "tran_2starterPack01"}, 187),
    ({"object__status": None}, 187), ({"object__customer": None, "object__checkout": None}, 187),
])
def test_strange_refunds_take_no_more_than_was_granted(db, changes, left):
    hear(db, PACK, body("refund.created.partial.onetime", **changes))
    assert credits(db) == (left, 0)


def test_a_payment_told_as_a_bare_order_or_transaction_is_that_payment(db):
    order = json.loads(PACK)["object"]["order"]
    transaction = json.loads(body("refund.created.partial.onetime"))["object"]["transaction"] | {
        "status": "paid",
        "refunded_amount": 0,
        "product": "prod_StarterPack0001",
    }
    for n, entity in enumerate((order, transaction, transaction | {"order": None})):
        entity = entity | {"metadata": {"referenceId": "usr_mira"}}
        hear(db, json.dumps({"id": f"evt_{n}", "type": "payment.completed", "data": entity}).encode())
    hear(db, PACK)
    assert credits(db) == (280, 0)
