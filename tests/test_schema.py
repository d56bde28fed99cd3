"""Promises that schema.sql makes about itself, and what it refuses whoever writes."""

import base64
import functools
import re
import sqlite3

import pytest

import videofly as v

RULES = v.CreditRules(gift=10, gift_days=30, plan_days=30, pack_days=365)
ORDER = v.Order("told", "scripted", "a fox", "", 5, "16:9", "480p", 1, ["uploads/a.png"], 20)
STORED = {"storage_key": "videos/x.mp4", "poster_key": "videos/x.jpg", "width": 64, "height": 48,
          "duration_ms": 500, "size_bytes": 1000}
RUNNING, MADE, FAILED, NEW = (name.ljust(36, "0") for name in ("running", "made", "failed", "new"))


@pytest.fixture
def db():
    db = v.connect(":memory:")
    v.migrate(db)
    yield db
    db.close()


@pytest.fixture
def books(db):
    fill(db)
    return db


def fill(db):
    """Somebody with a gift of 10, a purchase of 100, and three videos of 20: one is being made, one was made,
    one failed.  Returns the user's id."""
    user = v.add_user(db, email="ada@example.com", password_hash=None, is_admin=True, rules=RULES, now=1_000)
    v.grant(db, user_id=user["id"], credits=100, trans_type="ORDER_PAY", source_ref="order-1",
            note="two films", expires_at=None, now=1_000)
    made = v.add_key(db, user_id=user["id"], credit_limit=500, new_key=v.new_api_key(), now=1_000)
    key_id = made["key"]["id"]
    v.add_upload(db, user_id=user["id"], key="uploads/a.png", media_type="image/png", size_bytes=1, now=1_000)
    v.admit(db, act=lambda db: user, session_digest=v.digest("session"), now=1_000)
    pay(db, user["id"])
    for id in (RUNNING, MADE, FAILED):
        request(db, id, user["id"], key_id)
    finish(db, MADE, v.complete, stored=STORED)
    finish(db, FAILED, v.fail, problem=v.ProviderFailed())
    return user["id"]


def pay(db, user_id):
    """A pack of 30 credits, which is bought and paid back; 10 of it twice over, under two names."""
    v.insert(db, "checkouts", id="chk_1", user_id=user_id, product="pack", units=1, created_at=1_000)
    pack = v.Pack(id="pack", name="Pack", cents=100, currency="USD", credits=30, open_to="all")
    shop = v.Shop(v.Catalogue(credits=RULES, models=[], packs=[pack]), "next_cycle", False)
    order = {"id": "ord_1", "type": "onetime", "amount_paid": 300, "product": "pack"}
    sale = {"id": "ch_1", "request_id": "chk_1", "order": order, "status": "completed"}
    back = {"status": "succeeded", "order": order, "refund_amount": 100}
    told = [("checkout.completed", sale), ("refund.created", back | {"id": "ref_1"}),
            ("refund.created", back | {"id": "ref_2", "refund_amount": 200})]
    for n, (type, entity) in enumerate(told):
        body = v.as_json({"id": f"evt_{n}", "eventType": type, "object": entity})
        v.hear_event(db, body=body, row=v.read_event(body.encode(), now=1_000), shop=shop, now=1_000)


def request(db, id, user_id, key_id=None):
    db.execute("BEGIN")
    act = functools.partial(v.request_video, id=id, user_id=user_id, api_key_id=key_id, order=ORDER,
                            max_running=3, catalog_version="v1", timeout=60_000, now=2_000)
    v.once_only(db, act=act, user_id=user_id, key=id, fingerprint="request", now=2_000)
    db.execute("COMMIT")


def finish(db, id, how, **what):
    """Take a video from its order to its end."""
    def job():
        return v.one(db, v.Job, "FROM videos WHERE id = :id", id=id)

    v.step_video(db, job(), submitted_at=3_000, due_at=9_000, now=3_000)
    v.step_video(db, job(), status="GENERATING", ref="ref", due_at=4_000, now=3_000)
    v.hear_provider(db, job=job(), snapshot=v.Snapshot("running", 50), due_at=5_000, now=4_000)
    v.mark_uploading(db, job=job(), original_url="https://provider.test/x.mp4", until_at=None, now=5_000)
    how(db, job=job(), now=6_000, **what)


def tables(db):
    listed = db.execute("PRAGMA table_list").fetchall()
    return [row[1] for row in listed if row[2] == "table" and not row[1].startswith("sqlite_")]


def lay_open(db):
    """Take away what hinders somebody who tampers with the file."""
    for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")
    db.executescript("PRAGMA ignore_check_constraints = ON; PRAGMA foreign_keys = OFF")
    return db


def test_every_table_is_strict(db):
    strict = {row[1]: row[5] for row in db.execute("PRAGMA table_list")}
    assert [table for table in tables(db) if not strict[table]] == []


def test_every_foreign_key_is_indexed(db):
    for table in tables(db):
        indexes = [row[1] for row in db.execute(f"PRAGMA index_list('{table}')")]
        leading = {db.execute(f"PRAGMA index_info('{index}')").fetchone()[2] for index in indexes}
        keys = [row[3] for row in db.execute(f"PRAGMA foreign_key_list('{table}')")]
        assert [key for key in keys if key not in leading] == [], table


def test_the_file_says_whose_it_is_and_how_new(db):
    newest = max(int(file.stem) for file in (v.HERE / "tests" / "schemas").glob("*.sql")) + 1
    assert db.execute("PRAGMA user_version").fetchone() == (newest,)
    assert db.execute("PRAGMA application_id").fetchone()[0].to_bytes(4) == b"VFLY"


def test_every_time_is_named_at_and_every_at_is_a_time(db):
    for table in tables(db):
        kinds = {row[1]: row[2] for row in db.execute(f"PRAGMA table_info('{table}')")}
        assert {kinds[name] for name in kinds if name.endswith("_at")} <= {"INTEGER"}, table


def test_the_books_of_an_ordinary_day_are_right(books):
    assert v.audit(books)["faults"] == []
    assert books.execute("PRAGMA foreign_key_check").fetchall() == []
    counters = "SELECT sum(initial), sum(remaining), sum(frozen), sum(used) FROM credit_packages"
    assert books.execute(counters).fetchone() == (140, 70, 20, 20)


def a_day(db, user_id):
    """What the program asks the database all day, beside what made the books."""
    request(db, NEW, user_id)
    for cursor in (None, base64.b64encode(v.as_json("f" * 36).encode()).decode()):
        v.list_videos(db, user_id=user_id, cursor=cursor, limit=20, status=None)
    v.list_videos(db, user_id=user_id, cursor=None, limit=20, status="FAILED")
    v.get_video(db, user_id=user_id, id=MADE)
    v.receipt(db, user_id=user_id, id=MADE)
    v.history(db, user_id=user_id, cursor=None, limit=20)
    v.list_packages(db, user_id=user_id, cursor=None, limit=20)
    v.balance(db, user_id=user_id, now=7_000)
    v.list_events(db, user_id=user_id, after=0, limit=100)
    v.find_principal(db, secret="session", now=7_000)
    v.list_keys(db, user_id=user_id)
    v.begin_sign_in(db, email="ada@example.com", account="account:a", address="address:b", now=7_000)
    v.due_jobs(db, now=7_000, busy=["x"], limit=20)
    v.hear_callback(db, id=RUNNING, now=7_000)
    v.expire(db, now=10**13)
    v.retry_video(db, user_id=user_id, api_key_id=None, id=FAILED, max_running=9,
                  catalog_version="v1", now=7_000)
    v.cancel_video(db, user_id=user_id, id=RUNNING, now=7_000)
    v.delete_video(db, user_id=user_id, id=MADE, now=7_000)
    v.value(db, v.LAST_EVENT)
    v.report(db, name="users", filters={}, cursor=None, limit=100)


def test_nothing_that_is_asked_all_day_scans_a_table(db):
    asked = set()
    db.set_trace_callback(asked.add)
    a_day(db, fill(db))
    db.set_trace_callback(None)
    assert len(asked) > 60
    for sql in asked:
        if sql.startswith("--"):  # what SQLite itself asks to answer another
            continue
        plan = [row[3] for row in db.execute("EXPLAIN QUERY PLAN " + sql)]
        newest = sql.rstrip().endswith("FROM credit_transactions ORDER BY id DESC LIMIT 1")  # reads one row
        small = {"json_each", "pragma_table_info"} | {
            line.split()[1] for line in plan if line.startswith("CO-ROUTINE")}
        scans = [line for line in plan if line.startswith("SCAN") and line.split()[1] not in small]
        assert newest or scans == [], (sql, plan)


def test_the_program_never_replaces_a_row():
    """REPLACE deletes without telling the triggers that forbid it."""
    assert re.findall(r"OR REPLACE|REPLACE INTO", (v.HERE / "videofly.py").read_text()) == []


def row(kind, trans_type, credits, *, id="max(id) + 1", package=2, hold="NULL", balance=0, hash="hash"):
    """A further row of the journal; of package 2 remain 70 credits."""
    return f"""INSERT INTO credit_transactions
               SELECT {id}, user_id, {package}, {hold}, '{kind}', '{trans_type}', {credits}, {balance}, '', 0,
                      {hash} FROM credit_transactions"""


def package(trans_type, ref, initial, expires_at="NULL", until_at="NULL"):
    return f"""INSERT INTO credit_packages (user_id, trans_type, source_ref, initial, created_at, expires_at,
                                            spendable_until_at)
               SELECT id, '{trans_type}', '{ref}', {initial}, 0, {expires_at}, {until_at} FROM users"""


def hold(video_id, attempt, credits):
    return f"""INSERT INTO credit_holds (video_id, attempt, credits, catalog_version, created_at)
               VALUES ('{video_id}', {attempt}, {credits}, 'v1', 0)"""


def video(prompt="p", user="user_id", duration=5, credits=20, due_at=1):
    return f"""INSERT INTO videos (id, user_id, model, provider, prompt, duration, aspect_ratio, quality,
                                   seed, images, credits, due_at, deadline_at, created_at, changed_at)
               SELECT '{NEW}', {user}, model, provider, '{prompt}', {duration}, '1:1', '480p',
                      1, '[]', {credits}, {due_at}, 1, 1, 1 FROM videos LIMIT 1"""


def user(id, email, created_at=0):
    return f"INSERT INTO users (id, email, created_at) VALUES ('{id}', '{email}', {created_at})"


def change(status, sets):
    return f"UPDATE videos SET {sets} WHERE status = '{status}'"


def change_hold(state, sets):
    return f"UPDATE credit_holds SET {sets} WHERE state = '{state}'"


@pytest.mark.parametrize(("statement", "why"), [
    # credits
    (row("expire", "EXPIRED", 71), "remaining >= 0"),
    (row("grant", "ORDER_PAY", 100), "conservation"),
    (row("settle", "VIDEO_CONSUME", 21, hold=1), "frozen    >= 0"),
    (row("freeze", "VIDEO_CONSUME", 1), "CASE kind"),
    (row("grant", "ORDER_PAY", 1, hold=1), "CASE kind"),
    (row("gift", "ORDER_PAY", 1), "CASE kind"),
    (row("deduct", "CHARITY", 1), "CASE kind"),
    (row("grant", "REFUND", 1), "CASE kind"),
    (row("freeze", "REFUND", 1, hold=1), "CASE kind"),
    (row("settle", "REFUND", 1, hold=1), "CASE kind"),
    (row("release", "VIDEO_CONSUME", 1, hold=1), "CASE kind"),
    (row("expire", "REFUND", 1), "CASE kind"),
    (row("deduct", "VIDEO_CONSUME", 1), "CASE kind"),
    (row("refund", "SYSTEM_ADJUST", 1), "CASE kind"),
    (row("deduct", "SYSTEM_ADJUST", 0), "credits > 0"),
    (row("deduct", "SYSTEM_ADJUST", -5), "credits > 0"),
    (row("deduct", "SYSTEM_ADJUST", 1.5), "cannot store REAL"),
    (row("deduct", "SYSTEM_ADJUST", 1, balance=-1), "balance_after >= 0"),
    (row("deduct", "SYSTEM_ADJUST", 1, hash="'none'"), "length(hash) = 64"),
    (row("deduct", "SYSTEM_ADJUST", 1, package=99), "FOREIGN KEY"),
    (row("deduct", "SYSTEM_ADJUST", 1, id="max(id) + 2"), "the_journal_has_no_gaps"),
    ("REPLACE INTO credit_transactions SELECT * FROM credit_transactions", "the_journal_has_no_gaps"),
    ("UPDATE credit_transactions SET note = 'mine'", "the_journal_is_append_only"),
    ("DELETE FROM credit_transactions WHERE id = 1", "the_journal_is_append_only"),
    (package("ORDER_PAY", "order-1", 100), "UNIQUE"),
    (package("ORDER_PAY", "order-2", 0), "initial BETWEEN"),
    (package("ORDER_PAY", "order-2", 0.5), "cannot store REAL"),
    (package("VIDEO_CONSUME", "order-2", 1), "trans_type = 'NEW_USER'"),
    (package("ORDER_PAY", "order-2", 1, expires_at=5), "expires_at IS NULL"),
    (package("ORDER_PAY", "order-2", 1, expires_at=5, until_at=4), "spendable_until_at >= expires_at"),
    ("UPDATE credit_packages SET remaining = remaining + 1 WHERE id = 2", "conservation"),
    ("UPDATE credit_packages SET remaining = -1, used = used + 71 WHERE id = 2", "remaining >= 0"),
    ("DELETE FROM credit_packages", "FOREIGN KEY"),
    # holds
    (hold(RUNNING, 2, 20), "video_has_an_open_hold"),
    (hold(FAILED, 1, 20), "UNIQUE"),
    (hold(FAILED, 2, 0), "credits > 0"),
    (hold("nowhere", 1, 20), "FOREIGN KEY"),
    (change_hold("settled", "state = 'frozen', resolved_at = NULL"), "hold_already_ended"),
    (change_hold("released", "state = 'settled'"), "hold_already_ended"),
    (change_hold("settled", "credits = 1"), "hold_already_ended"),
    (change_hold("frozen", "state = 'settled'"), "resolved_at IS NULL"),
    (change_hold("frozen", "state = 'lost', resolved_at = 1"), "state = 'frozen'"),
    ("DELETE FROM credit_holds WHERE state = 'released'", "FOREIGN KEY"),
    # videos
    (change("COMPLETED", "status = 'PENDING', finished_at = NULL, due_at = 1"), "video_already_finished"),
    (change("COMPLETED", "status = 'FAILED', error_code = 'E5001'"), "video_already_finished"),
    (change("FAILED", "status = 'COMPLETED', error_code = NULL"), "video_already_finished"),
    (change("FAILED", "status = 'UPLOADING', finished_at = NULL"), "video_already_finished"),
    (change("COMPLETED", "finished_at = NULL, due_at = 1"), "finished_at IS NOT NULL"),
    (change("PENDING", "due_at = NULL"), "due_at IS NOT NULL"),
    (change("PENDING", "status = 'GENERATING'"), "ref IS NOT NULL"),
    (change("PENDING", "ref = 'r'"), "submitted_at IS NOT NULL"),
    (change("PENDING", "status = 'UPLOADING'"), "original_url IS NOT NULL"),
    (change("PENDING", "status = 'COMPLETED', finished_at = 1"), "storage_key IS NOT NULL"),
    (change("COMPLETED", "storage_key = NULL"), "storage_key IS NOT NULL"),
    (change("PENDING", "status = 'FAILED', finished_at = 1"), "error_code IS NOT NULL"),
    (change("COMPLETED", "error_code = 'E5001'"), "error_code IS NOT NULL"),
    (change("PENDING", "deleted_at = 1"), "deleted_at IS NULL"),
    (change("PENDING", "status = 'DONE'"), "status = 'PENDING'"),
    (change("PENDING", "progress = 101"), "progress BETWEEN"),
    (change("PENDING", "credits = 19.9"), "cannot store REAL"),
    (change("PENDING", "images = 'a.png'"), "json_valid"),
    (video(prompt=""), "length(prompt)"),
    (video(duration=0), "duration > 0"),
    (video(credits=0), "credits > 0"),
    (video(due_at="NULL"), "due_at IS NOT NULL"),
    (video(user="'usr_nobody'"), "FOREIGN KEY"),
    ("DELETE FROM videos WHERE status = 'COMPLETED'", "FOREIGN KEY"),
    # people
    (user("usr_b", "ADA@example.com"), "UNIQUE"),
    (user("usr_b", "nobody"), "email LIKE"),
    (user("usr_b", "@example.com"), "email LIKE"),
    (user("usr_b", "b@" + "b" * 253), "length(email)"),
    (user("b", "b@example.com"), "id GLOB"),
    (user("usr_b", "b@example.com", "'soon'"), "cannot store TEXT"),
    ("UPDATE users SET is_admin = 2", "is_admin IN"),
    ("UPDATE payment_events SET credits = 0", "credits > 0"),
    ("UPDATE payment_events SET back = -1", "back >= 0"),
    ("UPDATE payment_events SET credits = 9, user_id = NULL", "credits IS NULL OR"),
    ("UPDATE payment_events SET refund_id = 'ref_1', back = 1", "refund_id"),
    ("UPDATE credit_clawbacks SET credits = 0", "credits > 0"),
    ("UPDATE checkouts SET units = 0", "units > 0"),
    ("DELETE FROM users", "FOREIGN KEY"),
    ("UPDATE sessions SET expires_at = created_at", "expires_at > created_at"),
    ("UPDATE sessions SET digest = 'in the clear'", "length(digest) = 64"),
    ("UPDATE api_keys SET digest = 'vf_in_the_clear'", "length(digest) = 64"),
    ("UPDATE api_keys SET credit_limit = 0", "credit_limit > 0"),
    ("UPDATE idempotency_keys SET key = ''", "length(key)"),
    ("UPDATE idempotency_keys SET answer = 'yes'", "json_valid"),
    ("UPDATE events SET type = 'weather'", "type GLOB"),
    ("UPDATE events SET data = 'rain'", "json_valid"),
    ("UPDATE uploads SET media_type = 'text/html'", "media_type GLOB"),
    ("UPDATE uploads SET key = '../secret'", "key GLOB"),
])
def test_the_schema_refuses(books, statement, why):
    with pytest.raises(sqlite3.IntegrityError, match=re.escape(why)):
        books.execute(statement)
    assert v.audit(books)["faults"] == []


PACKAGE_2, HOLD_1 = "package 2 does not add up", "hold 1 does not add up"


def change_package(sets):
    return f"UPDATE credit_packages SET {sets} WHERE id = 2"


def change_row(id, sets):
    return f"UPDATE credit_transactions SET {sets} WHERE id = {id}"


@pytest.mark.parametrize(("tampering", "found"), [
    (change_package("remaining = remaining + 1, initial = initial + 1"), PACKAGE_2),
    (change_package("remaining = remaining + 1, used = used - 1"), PACKAGE_2),
    (change_package("frozen = frozen - 1, used = used + 1"), PACKAGE_2),
    (change_package("frozen = frozen + 1, remaining = remaining - 1"), PACKAGE_2),
    (change_package("expired = expired + 1, used = used - 1"), PACKAGE_2),
    (change_package("refunded = refunded + 1, used = used - 1"), PACKAGE_2),
    (change_package("used = used + 1"), PACKAGE_2),
    ("UPDATE credit_holds SET credits = credits - 1 WHERE id = 1", HOLD_1),
    ("UPDATE credit_holds SET state = 'settled', resolved_at = 1 WHERE id = 1", HOLD_1),
    ("UPDATE credit_holds SET state = 'released', resolved_at = 1 WHERE id = 1", HOLD_1),
    ("UPDATE credit_holds SET state = 'released' WHERE id = 2", "hold 2 does not add up"),
    ("UPDATE credit_holds SET state = 'frozen' WHERE id = 3", "hold 3 does not add up"),
    (f"UPDATE videos SET status = 'COMPLETED' WHERE id = '{RUNNING}'", f"video {RUNNING} does not add up"),
    (f"UPDATE videos SET status = 'FAILED' WHERE id = '{RUNNING}'", f"video {RUNNING} does not add up"),
    (f"UPDATE videos SET status = 'PENDING' WHERE id = '{MADE}'", f"video {MADE} does not add up"),
    (f"UPDATE videos SET status = 'COMPLETED' WHERE id = '{FAILED}'", f"video {FAILED} does not add up"),
    (f"UPDATE videos SET attempt = 2 WHERE id = '{MADE}'", f"video {MADE} does not add up"),
    (f"DELETE FROM credit_holds WHERE video_id = '{MADE}'", f"video {MADE} does not add up"),
    ("DELETE FROM credit_packages WHERE id = 2", "does not add up"),
    ("UPDATE uploads SET user_id = 'usr_gone'", "reference from uploads to users does not add up"),
])
def test_the_auditor_finds_counters_that_were_changed(books, tampering, found):
    lay_open(books).execute(tampering)
    faults = v.audit(books)["faults"]
    assert [fault for fault in faults if found in fault], faults


@pytest.mark.parametrize(("tampering", "found"), [
    (change_row(2, "note = 'three films'"), "transaction 2 was changed"),
    (change_row(2, "credits = 200"), "transaction 2 was changed"),
    (change_row(1, "created_at = 0"), "transaction 1 was changed"),
    (change_row(2, "user_id = 'usr_mallory'"), "transaction 2 was changed"),
    (change_row(3, "hash = upper(hash)"), "transaction 3 was changed"),
    (change_row(2, "balance_after = 9999"), "says that 9999 credits remained, and it was 110"),
    ("DELETE FROM credit_transactions WHERE id = 3", "transaction 3 is missing"),
    ("DELETE FROM credit_transactions WHERE id = 1", "transaction 1 is missing"),
    ("DELETE FROM credit_transactions WHERE id = 8", "does not add up"),  # the last
    (row("grant", "ORDER_PAY", 50, balance=120), "was changed"),
    ("UPDATE credit_transactions SET id = CASE id WHEN 3 THEN -4 ELSE -3 END WHERE id IN (3, 4); "
     "UPDATE credit_transactions SET id = -id WHERE id < 0", "transaction 3 was changed"),
])
def test_the_chain_of_hashes_finds_a_journal_that_was_changed(books, tampering, found):
    lay_open(books).executescript(tampering)
    proof = v.audit(books)
    assert not proof["valid"]
    assert [fault for fault in proof["faults"] if found in fault], proof["faults"]


def test_a_row_that_was_changed_with_its_hash_breaks_the_next(books):
    lay_open(books).execute(change_row(2, "note = 'three films'"))
    *row, _ = books.execute("SELECT * FROM credit_transactions WHERE id = 2").fetchone()
    (before,) = books.execute("SELECT hash FROM credit_transactions WHERE id = 1").fetchone()
    books.execute(change_row(2, "hash = ?"), [v.chain(before, tuple(row))])
    assert v.audit(books)["faults"] == ["transaction 3 was changed after it was written"]


def test_people_find_tampering_with_their_own_part(books):
    (user_id,) = books.execute("SELECT id FROM users").fetchone()
    assert v.proof(books, user_id=user_id)["valid"]
    lay_open(books).execute(change_row(2, "note = 'three films'"))
    assert v.proof(books, user_id=user_id)["faults"] == ["transaction 2 was changed after it was written"]
