"""What time does: what is forgotten, of whom it is told before, and that a clock which jumps, or storage that
is away for an hour, costs nobody a credit."""

import contextlib
import json

import pytest

import videofly as v
from conftest import books_are_right, client_of, error_of, person, rows, work
from creem import signed
from test_billing import SHOP, VECTORS, ask, balance, refused
from test_jobs import FOX, ended, files
from test_jobs import order as order_video
from test_payments import body

pytestmark = pytest.mark.anyio
HOUR, DAY = 3600, 86400  # seconds, as the tests' clock counts
WEEK = 7 * DAY


async def prune(app):
    assert await v.run_job(app, "prune", at_once=True) == {}


async def run(app, name):
    return await v.run_job(app, name, at_once=True)


async def count(app, table, condition="1"):
    ((number,),) = await rows(app, f"SELECT count(*) FROM {table} WHERE {condition}")
    return number


async def pass_time(app, seconds, step=10):
    """Let the worker look as often as it would, while so much time passes."""
    for _ in range(int(seconds // step)):
        await work(app, for_s=0)
        app.clock.pass_s(step - 1)


# --- what is forgotten


KNOWN = {"email": "mira@example.test", "password": "correct horse"}


async def sign_up(client):
    assert (await client.post("/api/auth/sign-up", json=KNOWN)).status_code == 201


async def fail_to_sign_in(client):
    wrong = await client.post("/api/auth/sign-in", json=KNOWN | {"password": "another horse"})
    assert wrong.status_code == 401


async def order_once(client):
    answer = await client.post("/api/v1/video/generate", json=FOX, headers={"Idempotency-Key": "once"})
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]["videoUuid"], "idempotent-replayed" in answer.headers


@pytest.mark.parametrize("table, act, kept_s, left", [
    ("sessions", sign_up, v.SESSION_LIFE // 1000, 0), ("sign_in_failures", fail_to_sign_in, DAY, 0),
    ("idempotency_keys", order_once, WEEK, 0), ("events", order_once, WEEK, 1),
])
async def test_what_has_had_its_time_goes_and_not_a_moment_sooner(app, client, ada, table, act, kept_s, left):
    app.clock.pass_s(HOUR)  # after ada came
    await act(client)
    before = await count(app, table)
    assert before > left
    app.clock.pass_s(kept_s - 0.001)
    await prune(app)
    assert await count(app, table) == before - (table == "events")  # that ada was given credits
    app.clock.pass_s(0.001)
    await prune(app)
    assert await count(app, table) == left
    await books_are_right(app)


async def test_a_session_that_went_signs_nobody_in_and_others_stay(app, client):
    await sign_up(client)
    app.clock.pass_s(DAY)
    async with client_of(app) as other:
        await other.post("/api/auth/sign-in", json=KNOWN)
        app.clock.pass_s(v.SESSION_LIFE // 1000 - DAY)
        await prune(app)
        assert error_of(await client.get("/api/v1/user/me")) == (401, "E4010")
        assert (await other.get("/api/v1/user/me")).status_code == 200


async def test_a_key_is_remembered_for_a_week(app, client, ada):
    first, _ = await order_once(client)
    app.clock.pass_s(WEEK - 1)
    await prune(app)
    assert await order_once(client) == (first, True)
    app.clock.pass_s(1)
    await prune(app)
    second, replayed = await order_once(client)
    assert (second == first, replayed) == (False, False)
    await books_are_right(app)


async def test_numbers_of_events_are_never_used_again(app, client, ada):
    await order_once(client)
    ((last,),) = await rows(app, "SELECT max(id) FROM events")
    app.clock.pass_s(2 * WEEK)
    await prune(app)
    assert await rows(app, "SELECT id FROM events") == [(last,)]
    await order_video(client)
    assert await rows(app, "SELECT id FROM events ORDER BY id") == [(last,), (last + 1,)]


async def test_the_last_time_is_kept_alone(app):
    for _ in range(3):
        app.clock.pass_s(600)
        await prune(app)
    assert await rows(app, "SELECT now, kept FROM clock") == [(app.now(), 90 * DAY * 1000)]


# --- what Creem told


@pytest.fixture
async def shop(settings, clock, provider):
    """A server that Creem tells its events, and a client of Mira, who is an administrator too."""
    with open(settings.catalog, "a") as catalog:
        catalog.write(SHOP)
    settings = v.msgspec.structs.replace(
        settings, creem_api_key="creem_test_x", creem_webhook_secret=VECTORS["webhook_secret"])
    async with v.open_app(settings, clock=clock, providers={"scripted": provider}) as app:
        mira = await person(app, "mira@example.test", is_admin=True)
        async with client_of(app, **mira.headers) as client:
            yield app, client, mira


async def tell(client, raw):
    answer = await client.post("/api/webhooks/creem", content=raw,
                               headers=signed(raw, VECTORS["webhook_secret"]))
    assert answer.status_code == 200, answer.text


def sale(mira, **changes):
    return body("checkout.completed.onetime", **changes).replace(b"usr_mira", mira.id.encode())


def refund(mira, **changes):
    return body("refund.created.full.onetime", **changes).replace(b"usr_mira", mira.id.encode())


async def bodies(app):
    return [found for (found,) in await rows(app, "SELECT body FROM payment_events ORDER BY id")]


@pytest.fixture
async def paid(shop):
    """A pack was paid for 90 days ago, and somebody unknown paid for another."""
    app, client, mira = shop
    told = [sale(mira), body("checkout.completed.onetime", id="evt_stranger", object__id="ch_stranger",
                             object__metadata=None, object__request_id=None,
                             object__order__id="ord_stranger", object__order__transaction="tran_stranger",
                             object__customer__id="cust_stranger")]
    for raw in told:
        await tell(client, raw)
    app.clock.pass_s(90 * DAY - 0.001)
    await prune(app)
    assert await bodies(app) == [raw.decode() for raw in told]
    app.clock.pass_s(0.001)
    before = await rows(app, "SELECT * FROM payments"), await balance(client)
    await prune(app)
    assert (await rows(app, "SELECT * FROM payments"), await balance(client)) == before
    assert await balance(client) == (280, 0, None)
    return told


async def test_what_was_told_is_forgotten_word_for_word_and_not_in_fact(shop, paid):
    app, client, _ = shop
    assert await bodies(app) == [None, None]
    (event, _) = (await ask(client, "GET /api/v1/admin/reports/inbox"))["rows"][::-1]
    assert (event["body"], event["state"], event["credits"], event["paid"]) == (None, "applied", 280, 1803)
    await books_are_right(app)


async def test_what_is_told_again_after_it_was_forgotten_grants_nothing(shop, paid):
    app, client, _ = shop
    for raw in paid * 2:
        await tell(client, raw)
    assert (await balance(client), await count(app, "payment_events")) == ((280, 0, None), 2)
    assert await bodies(app) == [None, None]
    await books_are_right(app)


async def test_what_was_forgotten_can_be_replayed_assigned_and_paid_back(shop, paid):
    app, client, mira = shop
    event = "POST /api/v1/admin/events"
    assert (await ask(client, f"{event}/1/replay"))["effect"] == "Everything was as it should be."
    assert (await ask(client, f"{event}/2/replay"))["effect"] == "Nobody is known who has paid this."
    assert (await ask(client, f"{event}/2/assign", email="mira@example.test"))["effect"] == (
        "280 credits granted.")
    assert await balance(client) == (560, 0, None)
    await tell(client, refund(mira))
    assert await balance(client) == (280, 0, None)
    assert await refused(client, f"{event}/99/replay") == (404, "E4012")
    await books_are_right(app)


async def test_many_are_forgotten_in_parts(shop):
    app, _, mira = shop
    row = v.read_event(sale(mira), now=app.now()) | {"is_sale": 0, "payment": None}

    def hear(db):
        for n in range(600):
            v.insert(db, "payment_events", **row | {"delivery_key": f"evt_{n}"}, body="{}",
                     received_at=app.now())

    await app.db.write(hear)
    app.clock.pass_s(90 * DAY)
    for left in (100, 0):
        await prune(app)
        assert await count(app, "payment_events", "body IS NOT NULL") == left


# --- of what people are told before


async def warnings(app, kind):
    """(whose, data) of each warning."""
    found = await rows(app, "SELECT user_id, data FROM events WHERE type = :type ORDER BY id",
                       type=f"{kind}.expiring")
    return [(whose, json.loads(data)) for whose, data in found]


async def package_of(app, who):
    ((id,),) = await rows(app, "SELECT id FROM credit_packages WHERE user_id = :id", id=who.id)
    return id


async def test_a_week_before_credits_end_their_owner_is_told_once(app, ada, clock):
    eve = await person(app, "eve@example.com", credits=25, expires_at=app.now() + 30 * DAY * 1000)
    clock.pass_s(23 * DAY - 0.001)
    await prune(app)
    assert await warnings(app, "credits") == []
    clock.pass_s(0.001)
    for _ in range(7):
        await prune(app)
        assert await warnings(app, "credits") == [(eve.id, {
            "packageId": await package_of(app, eve), "credits": 25, "expiresAt": "2027-02-14T08:00:00Z"})]
        clock.pass_s(DAY)
    await run(app, "expire-credits")
    await prune(app)
    assert await warnings(app, "credits") == []  # the one is a week old, and there is no second
    await books_are_right(app)


async def test_a_warning_comes_over_the_stream_too(app, client, clock):
    eve = await person(app, "eve@example.com", credits=25, expires_at=app.now() + DAY * 1000)
    bell = app.bell(eve.id)
    await prune(app)
    assert bell.is_set()
    heard = await app.db.read(v.list_events, user_id=eve.id, after=0, limit=10)
    assert [type for _, type, _ in heard] == ["credits.granted", "credits.expiring"]


async def test_who_spent_all_or_may_keep_it_or_came_too_late_is_told_nothing(app, client, ada, clock):
    date = app.now() + 30 * DAY * 1000
    eve = await person(app, "eve@example.com", credits=10, expires_at=date)
    async with client_of(app, **eve.headers) as other:
        await order_video(other)
        await work(app)
    bob = await person(app, "bob@example.com", credits=10, expires_at=app.now() + DAY * 1000)
    clock.pass_s(25 * DAY)  # bob's are over, though nobody has said so yet
    await prune(app)
    await run(app, "expire-credits")
    await prune(app)
    assert await warnings(app, "credits") == [] and bob
    clock.pass_s(400 * DAY)
    await prune(app)
    assert await warnings(app, "credits") == []


async def test_what_comes_back_within_the_week_is_told_then(app, clock, provider):
    eve = await person(app, "eve@example.com", credits=10, expires_at=app.now() + 7 * DAY * 1000)
    async with client_of(app, **eve.headers) as client:
        video = await order_video(client)
        await prune(app)
        assert await warnings(app, "credits") == []
        await client.post(f"/api/v1/video/{video}/cancel")
    await prune(app)
    ((_, told),) = await warnings(app, "credits")
    assert told["credits"] == 10


@pytest.mark.parametrize("days, told", [(27, 1), (29.9, 1), (30.1, 0), (60, 0)])
async def test_a_server_that_was_away_tells_late_and_not_too_late(app, clock, days, told):
    await person(app, "eve@example.com", credits=10, expires_at=app.now() + 30 * DAY * 1000)
    clock.pass_s(days * DAY)
    for _ in range(2):
        await v.run_due_jobs(app)
        clock.pass_s(600)
    assert len(await warnings(app, "credits")) == told


async def test_of_600_packages_each_is_told_of_once(app, ada, clock):
    def give(db):
        for n in range(600):
            v.grant(db, user_id=ada.id, credits=1, trans_type="SYSTEM_ADJUST", source_ref=f"{n}", note="",
                    expires_at=app.now() + DAY * 1000, now=app.now())

    await app.db.write(give)
    for _ in range(3):
        await prune(app)
    told = [data["packageId"] for _, data in await warnings(app, "credits")]
    assert len(told) == len({*told}) == 600


async def test_a_week_before_a_video_is_archived_its_owner_is_told_once(app, client, ada, clock, provider):
    provider.script = ["ref", v.Snapshot("failed", error="no foxes today")]
    await order_video(client)  # failed: nobody misses it
    await work(app)
    deleted = await order_video(client)
    await work(app)
    await client.delete(f"/api/v1/video/{deleted}")
    kept = await order_video(client)
    await work(app)
    ((at,),) = await rows(app, "SELECT finished_at FROM videos WHERE id = :id", id=kept)
    clock.t = at / 1000 + 83 * DAY - 0.001
    await prune(app)
    assert await warnings(app, "video") == []
    clock.pass_s(0.002)
    for _ in range(7):
        await prune(app)
        date = v.moment(at + 90 * DAY * 1000).strftime("%Y-%m-%dT%H:%M:%SZ")
        assert await warnings(app, "video") == [(ada.id, {"videoUuid": kept, "archiveAt": date})]
        clock.pass_s(DAY)
    clock.t = at / 1000 + 90 * DAY
    assert (await run(app, "cleanup-videos"))["archivedCompleted"] == 0  # a whole week after the warning
    clock.pass_s(1)
    assert (await run(app, "cleanup-videos"))["archivedCompleted"] == 1
    await work(app)
    await prune(app)
    assert await warnings(app, "video") == []


async def test_how_long_videos_are_kept_is_the_operators_to_say(settings, clock, provider):
    settings = v.msgspec.structs.replace(settings, video_completed_days=10)
    async with v.open_app(settings, clock=clock, providers={"scripted": provider}) as app:
        ada = await person(app, "ada@example.com", credits=100)
        await app.write(ended, user_id=ada.id, completed=1, failed=0)
        clock.pass_s(3 * DAY - 0.002)
        await prune(app)
        assert await warnings(app, "video") == []
        clock.pass_s(0.002)
        await prune(app)
        ((_, told),) = await warnings(app, "video")
        assert told["archiveAt"] == "2027-01-25T08:00:00Z"


@pytest.mark.parametrize("days, date", [(88, "2027-04-20T08:00:00Z"), (95, "2027-04-27T08:00:00Z")])
async def test_after_the_server_was_away_there_is_still_a_week_of_warning(app, ada, clock, days, date):
    await app.write(ended, user_id=ada.id, completed=1, failed=0)
    clock.pass_s(days * DAY)
    for _ in range(2):
        await prune(app)
    assert [told["archiveAt"] for _, told in await warnings(app, "video")] == [date]


# --- a clock that jumps


@pytest.mark.parametrize("back", [25 * HOUR, 3 * DAY, 400 * DAY])
async def test_what_a_clock_that_was_ahead_put_off_is_woken(app, client, ada, clock, provider, back):
    provider.script = ["ref", *[v.Snapshot("running", 5)] * 2]
    video = await order_video(client)
    await work(app, for_s=3)
    clock.pass_s(-back)
    assert provider.script == []
    asked = len(provider.calls)
    await work(app, for_s=0)
    assert len(provider.calls) == asked  # it waits for a time that is far away
    await prune(app)
    await work(app, for_s=5)
    assert await rows(app, "SELECT id, status FROM videos") == [(video, "COMPLETED")]
    await books_are_right(app)


async def test_what_is_due_within_a_day_is_left_alone(app, client, ada, clock, provider):
    provider.script = ["ref", *[v.Snapshot("running", 5)] * 2]
    await order_video(client)
    await work(app, for_s=3)
    before = await rows(app, "SELECT due_at, deadline_at, changed_at FROM videos")
    clock.pass_s(-23 * HOUR)
    await prune(app)
    assert await rows(app, "SELECT due_at, deadline_at, changed_at FROM videos") == before


@pytest.mark.parametrize("repeatable", [True, False])
@pytest.mark.parametrize("jump", [-HOUR, DAY, -3 * DAY])
async def test_videos_that_are_made_while_the_clock_jumps_end(app, client, ada, clock, provider, jump,
                                                              repeatable):
    provider.repeatable = repeatable
    states = {}
    for n, script in enumerate([["ref", *[v.Snapshot("running", 5)] * 3], []]):
        provider.script = script
        states[await order_video(client)] = n
        await work(app, for_s=1)
    states[await order_video(client)] = 2
    before = dict(await rows(app, "SELECT id, status FROM videos"))
    assert len({*before.values()}) >= 2 and not {*before.values()} <= {"COMPLETED", "FAILED"}
    clock.pass_s(jump)
    for _ in range(3):
        await prune(app)
        await pass_time(app, HOUR, step=30)
    after = dict(await rows(app, "SELECT id, status FROM videos"))
    assert {*after.values()} <= {"COMPLETED", "FAILED"} and after.keys() == states.keys()
    assert await count(app, "credit_holds", "state = 'frozen'") == 0
    made = [*after.values()].count("COMPLETED")
    assert made > 0 and await count(app, "credit_holds", "state = 'settled'") == made
    assert (await client.get("/api/v1/credit/balance")).json()["data"]["availableCredits"] == 100 - 10 * made
    await books_are_right(app)


# --- holds that hang


def break_off(db, *, id, status, now):
    """Let a video end, and its hold not: as nothing does but a hand with SQL."""
    v.run(db, """
        UPDATE videos SET status = :status, finished_at = :now, due_at = NULL,
                          storage_key = iif(:status = 'COMPLETED', 'videos/' || id || '/1.mp4', NULL),
                          error_code = iif(:status = 'FAILED', 'E5001', NULL), error_message = ''
        WHERE id = :id
    """, id=id, status=status, now=now)


async def test_holds_that_hang_are_settled_or_released(app, client, ada, provider):
    made, failed, running = [await order_video(client) for _ in range(3)]
    await app.write(break_off, id=made, status="COMPLETED")
    await app.write(break_off, id=failed, status="FAILED")
    assert len((await app.db.read(v.audit))["faults"]) == 2
    assert await run(app, "release-holds") == {"holds": 2}
    await books_are_right(app)
    held = dict(await rows(app, "SELECT video_id, state FROM credit_holds"))
    assert held == {made: "settled", failed: "released", running: "frozen"}
    found = (await client.get("/api/v1/credit/balance")).json()["data"]
    assert (found["availableCredits"], found["frozenCredits"], found["usedCredits"]) == (80, 10, 10)
    assert await run(app, "release-holds") == {"holds": 0}
    await work(app)
    assert await count(app, "credit_holds", "state = 'settled'") == 2


# --- storage that is away


@contextlib.contextmanager
def without_storage(app):
    """Somebody has put a file in the folder's place."""
    away = app.storage.root.with_name("away")
    app.storage.root.rename(away)
    app.storage.root.write_text("not a folder")
    yield
    app.storage.root.unlink()
    away.rename(app.storage.root)


async def test_an_hour_without_storage_costs_nobody_anything(app, client, ada, clock, provider):
    old = await order_video(client)
    await work(app)
    clock.pass_s(83 * DAY)
    await prune(app)
    clock.pass_s(7 * DAY)
    assert (await run(app, "cleanup-videos"))["archivedCompleted"] == 1
    clock.pass_s(DAY)
    assert files(app) == ["1.jpg", "1.mp4"]
    with without_storage(app):
        ordered = []
        for _ in range(4):
            ordered.append(await order_video(client))
            await pass_time(app, HOUR / 4)
        failed = await rows(app, "SELECT id, status, error_code FROM videos WHERE id <> :old", old=old)
        assert sorted(failed) == [(id, "FAILED", "E5002") for id in sorted(ordered)]
        assert await count(app, "credit_holds", "state = 'released'") == 4
        assert (await client.get("/api/v1/credit/balance")).json()["data"]["availableCredits"] == 90
        assert await count(app, "videos", "id = (SELECT min(id) FROM videos) AND due_at IS NOT NULL") == 1
        await books_are_right(app)
    assert files(app) == ["1.jpg", "1.mp4"]
    await pass_time(app, 60)
    assert files(app) == [] and await count(app, "videos", "due_at IS NOT NULL") == 0
    assert (await client.post(f"/api/v1/video/{ordered[0]}/retry")).status_code == 202
    await work(app)
    assert files(app) == ["2.jpg", "2.mp4"] and provider.count("submit") == 5
    assert (await client.get("/api/v1/credit/balance")).json()["data"]["availableCredits"] == 80
    await books_are_right(app)


async def test_while_the_folder_is_away_all_is_missing_and_nothing_removed(app, client, ada):
    await order_video(client)
    await work(app)
    with without_storage(app):
        found = await run(app, "media")
        assert (found["files"], len(found["missing"]), found["removed"], found["unknown"]) == (0, 2, 0, 0)
    assert files(app) == ["1.jpg", "1.mp4"]
