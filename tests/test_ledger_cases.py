"""The rules of credits as a table that an accountant can check.

A row: what a person has, what happens, what the last of it comes to, and the credits after it.  Packages are
"30" (for ever) or "30 for 2h".  What happens:

    order A 10      a video A for 10 credits is ordered; "by key" with an API key that may spend 15 in all
    made A          its provider made it;   done A   it was stored;   failed A   it failed;   retry A
    cancel A, delete A, deduct 5, grant 5 (for 2h), bill 7 10 (payment number 7 gives 10), gift
    wait 2h         time passes;   sweep   what has expired is taken

Credits past their date that no sweep has taken yet are in none of the four columns."""

import functools
import itertools
import re

import pytest

import videofly as v

CASES = """
    # has                happens                                        comes to   avail. frozen used expired

    # An order freezes, a video spends, a failure gives back.
    30                   order A 10                                     ok                   20  10   0   0
    30                   order A 10, done A                             yes                  20   0  10   0
    30                   order A 10, failed A                           ok                   30   0   0   0
    30                   order A 10, cancel A                           ok                   30   0   0   0
    30                   order A 10, delete A                           ok                   30   0   0   0
    30                   order A 10, done A, delete A                   ok                   20   0  10   0
    30                   order A 30                                     ok                    0  30   0   0
    30                   order A 31                                     InsufficientCredits  30   0   0   0
    30                   order A 20, order B 20                         InsufficientCredits  10  20   0   0
    nothing              order A 1                                      InsufficientCredits   0   0   0   0

    # Once is once, whatever is repeated, and whichever comes first.
    30                   order A 10, done A, done A                     yes                  20   0  10   0
    30                   order A 10, failed A, failed A                 ok                   30   0   0   0
    30                   order A 10, failed A, done A                   no                   30   0   0   0
    30                   order A 10, done A, failed A                   ok                   20   0  10   0
    30                   order A 10, cancel A, done A                   no                   30   0   0   0
    30                   order A 10, cancel A, cancel A                 ok                   30   0   0   0
    30                   order A 10, done A, cancel A                   AlreadyFinished      20   0  10   0
    30                   order A 10, failed A, cancel A                 AlreadyFinished      30   0   0   0
    30                   order A 10, done A, settle A                   no                   20   0  10   0
    30                   order A 10, done A, release A                  no                   20   0  10   0
    30                   order A 10, failed A, settle A                 no                   30   0   0   0
    30                   order A 10, delete A, delete A                 VideoNotFound        30   0   0   0

    # What failed after it was made can be had after all, for its price.
    30                   order A 10, made A, failed A, retry A          ok                   20  10   0   0
    30                   order A 10, made A, failed A, retry A, done A  yes                  20   0  10   0
    30                   order A 10, made A, failed A, retry A, failed A ok                   30   0   0   0
    30                   order A 10, made A, failed A, retry A, retry A RetryNotAvailable    20  10   0   0
    30                   order A 10, failed A, retry A                  RetryNotAvailable    30   0   0   0
    30                   order A 10, made A, done A, retry A            RetryNotAvailable    20   0  10   0
    10                   order A 10, made A, failed A, order B 5, retry A InsufficientCredits   5   5   0   0

    # Credits are taken from the package that ends first, and of two that end together from the older.
    10, 10 for 5h        order A 10, wait 5h, sweep                     0                    10  10   0   0
    10, 10 for 5h        order A 5, wait 5h, sweep                      0                    10   5   0   0
    10 for 9h, 10 for 5h order A 10, wait 5h, sweep                     0                    10  10   0   0
    10 for 5h, 10 for 9h order A 15, done A, wait 5h, sweep             0                     5   0  15   0
    10 for 5h, 10 for 5h order A 5, done A, wait 5h, sweep              2                     0   0   5  15
    10 for 5h, 10        order A 20, wait 5h, done A                    yes                   0   0  20   0

    # A package can be spent from until its date.  The sweep takes what remains, but not from under a video.
    10 for 2h            wait 1h, order A 10                            ok                    0  10   0   0
    10 for 2h            wait 2h, order A 10                            InsufficientCredits   0   0   0   0
    10 for 2h            wait 2h, deduct 1                              InsufficientCredits   0   0   0   0
    10 for 2h            wait 1h, sweep                                 0                    10   0   0   0
    10 for 2h            wait 2h, sweep                                 1                     0   0   0  10
    10 for 2h            wait 2h, sweep, sweep                          0                     0   0   0  10
    10 for 2h, 5         wait 2h, sweep                                 1                     5   0   0  10
    10 for 2h            order A 4, wait 2h, sweep                      0                     0   4   0   0
    10 for 2h            order A 4, wait 2h, done A, sweep              1                     0   0   4   6

    # What comes back after the date can be spent for a day.  What lay there unspent does not come back.
    10 for 2h            order A 10, wait 2h, failed A                  ok                   10   0   0   0
    10 for 2h            order A 10, wait 1h, failed A, wait 1h, sweep  1                     0   0   0  10
    10 for 2h            order A 4, wait 2h, failed A                   ok                    4   0   0   6
    10 for 2h            order A 4, wait 2h, failed A, wait 23h, order B 4 ok                    0   4   0   6
    10 for 2h            order A 4, wait 2h, failed A, wait 23h, order B 5 InsufficientCredits   4   0   0   6
    10 for 2h            order A 4, wait 2h, failed A, wait 24h, order B 4 InsufficientCredits   0   0   0   6
    10 for 2h            order A 4, wait 2h, failed A, wait 23h, sweep  0                     4   0   0   6
    10 for 2h            order A 4, wait 2h, failed A, wait 24h, sweep  1                     0   0   0  10
    10 for 2h  order A 4, wait 2h, failed A, order B 4, wait 30h, done B  yes                  0   0   4   6
    10 for 2h  order A 4, wait 2h, failed A, order B 4, wait 30h, failed B, wait 23h, sweep  0   4   0   0   6
    10 for 2h  order A 4, wait 2h, failed A, order B 4, wait 20h, failed B, wait 3h, sweep  0   4   0   0   6
    10 for 2h  order A 4, wait 2h, failed A, order B 4, wait 20h, failed B, wait 4h, sweep  1   0   0   0  10
    10 for 2h  order A 4, order B 6, wait 2h, failed A, wait 9h, failed B  ok                 10   0   0   0
    10 for 2h  order A 4, order B 6, wait 2h, failed A, wait 23h, failed B, wait 23h, sweep  0  10   0   0   0
    10 for 2h  order A 4, order B 6, wait 2h, failed A, wait 24h, failed B  ok                 6   0   0   4
    10 for 2h  order A 4, order B 6, wait 2h, failed A, wait 24h, sweep  0                     0   6   0   0
    10 for 2h, 10 for 3h order A 15, wait 3h, failed A                  ok                   15   0   0   5
    10 for 2h, 10 for 9h order A 15, wait 3h, failed A                  ok                   20   0   0   0
    10 for 2h, 10        order A 15, wait 2h, failed A, wait 24h, sweep 1                    10   0   0  10
    10 for 2h, 5 for 9h  order A 10, wait 2h, failed A, order B 5, done B, wait 7h, sweep  0  10   0   5   0

    # An administrator's decisions.
    30                   deduct 10                                      ok                   20   0  10   0
    30                   deduct 31                                      InsufficientCredits  30   0   0   0
    30                   order A 10, deduct 21                          InsufficientCredits  20  10   0   0
    10, 10 for 2h        deduct 15, wait 2h, sweep                      0                     5   0  15   0
    30                   grant 5                                        yes                  35   0   0   0
    30                   grant 5 for 2h, wait 2h, order A 31            InsufficientCredits  30   0   0   0

    # A payment that is announced twice, or to two people, gives once.
    nothing              bill 7 10                                      yes                  10   0   0   0
    nothing              bill 7 10, bill 7 10                           no                   10   0   0   0
    nothing              bill 7 10, bill 7 99                           no                   10   0   0   0
    nothing              bill 7 10, bill 8 10                           yes                  20   0   0   0
    nothing              bill 7 10, order A 10, done A, bill 7 10       no                    0   0  10   0
    nothing              bill 7 10, other bill 7 10                     no                   10   0   0   0
    nothing              gift                                           yes                  10   0   0   0
    nothing              gift, gift                                     no                   10   0   0   0

    # A key with a limit spends so much in all; what came back does not count.
    30                   order A 15 by key                              ok                   15  15   0   0
    30                   order A 16 by key                              KeyLimitReached      30   0   0   0
    30                   order A 10 by key, order B 6 by key            KeyLimitReached      20  10   0   0
    30                   order A 10 by key, done A, order B 6 by key    KeyLimitReached      20   0  10   0
    30                   order A 10 by key, done A, order B 5 by key    ok                   15   5  10   0
    30                   order A 10 by key, failed A, order B 15 by key ok                   15  15   0   0
    30                   order A 10 by key, order B 6                   ok                   14  16   0   0
    30 order A 10 by key, made A, failed A, order B 10 by key, retry A by key KeyLimitReached 20 10 0 0
"""

ROW = re.compile(r"    (\S.*?) +((?:order|wait|deduct|grant|bill|gift).*?) +(\w+)" + r" +(\d+)" * 4)
ROWS = [ROW.fullmatch(line).groups() for line in CASES.splitlines() if re.match(r"\s+[^\s#]", line)]
START = 1_800_000_000_000


class Ledger:
    """A person's credits, and the verbs of the table."""

    def __init__(self):
        self.db, self.now, self.grants = v.connect(":memory:"), START, 0
        v.migrate(self.db)
        for who in ("usr_me", "usr_other"):
            v.run(self.db, "INSERT INTO users (id, email, created_at) VALUES (:id, :id || '@b.c', 0)", id=who)
        v.run(self.db, """
            INSERT INTO api_keys (id, user_id, digest, name, hint, credit_limit, created_at)
            VALUES ('key_1', 'usr_me', printf('%064d', 1), 'k', 'k', 15, 0)
        """)

    def do(self, fn, **words):
        [result], _ = v.commit(self.db, [functools.partial(fn, now=self.now, **words)])
        match result:
            case bool():
                return "yes" if result else "no"
            case int():
                return str(result)
            case dict() if not result or "expiredPackages" in result:
                return str(result.get("expiredPackages", 0))
            case v.Problem():
                return type(result).__name__
        assert not isinstance(result, BaseException), result
        return "ok"

    def happens(self, event):
        """What one event of the table comes to."""
        match event.split():
            case ["wait", time]:
                self.now += hours(time)
            case ["order", name, credits, *key]:
                return self.order(name, int(credits), key)
            case ["retry", name, *key]:
                return self.do(v.retry_video, user_id="usr_me", api_key_id="key_1" if key else None,
                               id=uuid(name), max_running=99, catalog_version="v1")
            case ["grant", credits, *life]:
                self.grants += 1
                return self.give("usr_me", "SYSTEM_ADJUST", f"grant {self.grants}", credits, life)
            case ["bill", number, credits]:
                return self.give("usr_me", "ORDER_PAY", number, credits)
            case ["other", "bill", number, credits]:
                return self.give("usr_other", "ORDER_PAY", number, credits)
            case ["gift"]:
                return self.give("usr_me", "NEW_USER", "usr_me", "10")
            case ["deduct", credits]:
                return self.do(v.deduct, user_id="usr_me", credits=int(credits), note="")
            case [verb, *name]:
                return getattr(self, verb)(*map(uuid, name))
        return None

    def give(self, who, trans_type, ref, credits, life=()):
        return self.do(v.grant, user_id=who, credits=int(credits), trans_type=trans_type, source_ref=ref,
                       note="", expires_at=self.now + hours(life[-1]) if life else None)

    def order(self, name, credits, key):
        order = v.Order("told", "scripted", "a fox", "", 5, "16:9", "480p", 1, [], credits)
        return self.do(v.request_video, id=uuid(name), user_id="usr_me", api_key_id="key_1" if key else None,
                       order=order, max_running=99, catalog_version="v1", timeout=v.HOUR)

    def job(self, id):
        """The video as a worker sees it that does not know whether it has ended."""
        job = v.one(self.db, v.Job, "FROM videos WHERE id = :id", id=id)
        if job.status in ("COMPLETED", "FAILED"):
            job = v.msgspec.structs.replace(job, status="UPLOADING" if job.original_url else "PENDING")
        return job

    def made(self, id):
        url = "https://provider.test/x"
        return self.do(v.mark_uploading, job=self.job(id), original_url=url, until_at=None)

    def done(self, id):
        job = self.job(id)
        media = {"width": 64, "height": 48, "duration_ms": 500, "size_bytes": 1000}
        stored = v.stored_keys(id, job.attempt) | media
        return self.do(v.complete, job=job, stored=stored)

    def failed(self, id):
        return self.do(v.fail, job=self.job(id), problem=v.ProviderFailed())

    def settle(self, id):
        return self.do(v.end_hold, kind="settle", video_id=id)

    def release(self, id):
        return self.do(v.end_hold, kind="release", video_id=id)

    def cancel(self, id):
        return self.do(v.cancel_video, user_id="usr_me", id=id)

    def delete(self, id):
        return self.do(v.delete_video, user_id="usr_me", id=id)

    def sweep(self):
        return self.do(v.expire)

    def counters(self):
        found = v.balance(self.db, user_id="usr_me", now=self.now)
        expired = v.value(self.db, "SELECT total(expired) FROM credit_packages WHERE user_id = 'usr_me'")
        return found["availableCredits"], found["frozenCredits"], found["usedCredits"], int(expired)


def uuid(name):
    return f"{ord(name):036}"


def hours(text):
    return int(text.removesuffix("h")) * v.HOUR


@pytest.fixture
def ledger():
    ledger = Ledger()
    yield ledger
    ledger.db.close()


@pytest.mark.parametrize(("has", "happens", "comes_to", "counters"), [
    pytest.param(has, happens, comes_to, tuple(map(int, counters)), id=f"{has}: {happens}")
    for has, happens, comes_to, *counters in ROWS])
def test_credits(ledger, has, happens, comes_to, counters):
    for package in has.split(", ") if has != "nothing" else ():
        ledger.happens(f"grant {package}")
    results = [ledger.happens(event) for event in happens.split(", ")]
    assert (results[-1], ledger.counters()) == (comes_to, counters)
    assert ledger.db.execute("SELECT * FROM discrepancies").fetchall() == []
    assert v.audit(ledger.db)["faults"] == []
    history = v.history(ledger.db, user_id="usr_me", cursor=None, limit=100)["transactions"][::-1]
    running = itertools.accumulate(line["credits"] for line in history)
    assert [line["balanceAfter"] for line in history] == list(running)


def test_the_welcome_gift_comes_with_the_account_and_only_with_it(ledger):
    rules = v.CreditRules(gift=10, gift_days=30, plan_days=1, pack_days=1)
    words = {"email": "ada@example.com", "password_hash": None, "is_admin": False, "rules": rules}
    assert [ledger.do(v.add_user, **words), ledger.do(v.add_user, **words)] == ["ok", "EmailTaken"]
    assert ledger.db.execute("SELECT trans_type, initial, expires_at FROM credit_packages").fetchall() == [
        ("NEW_USER", 10, START + 30 * v.DAY)]


def test_a_changed_journal_is_found(ledger):
    for event in ("grant 30", "order A 10", "done A", "grant 5"):
        ledger.happens(event)
    ledger.db.execute("DROP TRIGGER transactions_no_update")
    ledger.db.execute("UPDATE credit_transactions SET note = 'nothing to see' WHERE id = 2")
    assert "transaction 2 was changed after it was written" in v.audit(ledger.db)["faults"]
    assert "transaction 2 was changed after it was written" in v.proof(ledger.db, user_id="usr_me")["faults"]


def test_a_journal_row_cannot_be_recomputed_alone(ledger):
    """Each hash covers the one before it: whoever changes a row has to change all that follow."""
    for event in ("grant 30", "grant 5", "grant 5"):
        ledger.happens(event)
    ledger.db.execute("DROP TRIGGER transactions_no_update")
    *row, _ = ledger.db.execute("SELECT * FROM credit_transactions WHERE id = 2").fetchone()
    row[8] = "nothing to see"
    (before,) = ledger.db.execute("SELECT hash FROM credit_transactions WHERE id = 1").fetchone()
    forged = [row[8], v.chain(before, tuple(row))]
    ledger.db.execute("UPDATE credit_transactions SET note = ?, hash = ? WHERE id = 2", forged)
    assert v.audit(ledger.db)["faults"] == ["transaction 3 was changed after it was written"]


@pytest.mark.parametrize("change", ["UPDATE {} SET credits = 1", "DELETE FROM {}"])
def test_the_journal_is_append_only(ledger, change):
    ledger.happens("grant 30")
    with pytest.raises(v.sqlite3.IntegrityError, match="the_journal_is_append_only"):
        ledger.db.execute(change.format("credit_transactions"))


def test_a_missing_row_is_found(ledger):
    for event in ("grant 30", "grant 5"):
        ledger.happens(event)
    ledger.db.execute("DROP TRIGGER transactions_no_delete")
    ledger.db.execute("DELETE FROM credit_transactions WHERE id = 1")
    assert "transaction 1 is missing" in v.audit(ledger.db)["faults"]


def test_counters_that_were_tampered_with_are_found(ledger):
    ledger.happens("grant 30")
    ledger.db.execute("UPDATE credit_packages SET remaining = 0, used = 30")
    assert v.audit(ledger.db)["faults"] == ["package 1 does not add up", "balance usr_me does not add up"]


def test_a_counter_never_exceeds_what_was_given(ledger):
    ledger.happens("grant 30")
    with pytest.raises(v.sqlite3.IntegrityError, match="conservation"):
        ledger.db.execute("UPDATE credit_packages SET remaining = 31")
