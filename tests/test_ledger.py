"""The ledger against a model: any sequence of calls, and every counter checked after each.

The model is written from DESIGN.md section 4 and knows nothing of SQL: people have packages, a hold is a list
of (package, credits), a history is a list of lines.  Its time is counted in hours."""

import functools
import operator
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

import videofly as v

PEOPLE = ["usr_ada", "usr_bob"]
KEYS = {"key_free": None, "key_tight": 15}  # and what each may ever spend; both are Ada's
ORDERING = [("usr_ada", None), ("usr_ada", "key_free"), ("usr_ada", "key_tight"), ("usr_bob", None)]
LIVES = st.none() | st.integers(1, 30)  # hours that a package lasts
AMOUNTS = st.sampled_from([3, 5, 10, 20, 50])
GIFTS = st.lists(st.tuples(st.sampled_from(PEOPLE), AMOUNTS, LIVES), min_size=2, max_size=5)
PRICES = st.lists(st.integers(1, 9), min_size=1, max_size=3)
START = 1_800_000_000_000
RUNNING_MAX = 6
ENDED = ("COMPLETED", "FAILED")


def problem_of(outcome):
    """What kind of exception a transaction came to."""
    return type(outcome) if isinstance(outcome, BaseException) else None


@dataclass(eq=False)
class Package:
    owner: str
    initial: int
    date: int | None  # the hour when it ends
    left: int
    until: int | None  # the hour until which it can be spent from: its date, or a day after credits came back
    frozen: int = 0
    used: int = 0
    expired: int = 0

    def can_be_spent(self, now):
        return self.until is None or self.until > now


@dataclass
class Hold:
    parts: list  # (package, credits)
    credits: int
    key: str | None
    at: int  # the hour when it froze them
    state: str = "frozen"


@dataclass
class Video:
    owner: str
    id: str
    credits: int
    hold: Hold
    once: str
    answer: bytes
    status: str = "PENDING"
    attempt: int = 1
    made: bool = False
    cancelled: bool = False
    deleted: bool = False


@dataclass
class Model:
    now: int = 0
    packages: list = field(default_factory=list)
    sources: set = field(default_factory=set)
    holds: list = field(default_factory=list)
    videos: dict = field(default_factory=dict)
    lines: dict = field(default_factory=lambda: {who: [] for who in PEOPLE})

    def of(self, who):
        return [package for package in self.packages if package.owner == who]

    def available(self, who):
        return sum(package.left for package in self.of(who) if package.can_be_spent(self.now))

    def running(self, who):
        return sum(video.owner == who and video.status not in ENDED for video in self.videos.values())

    def write_line(self, who, what, credits, hold=None):
        remained = self.lines[who][-1][2] if self.lines[who] else 0
        self.lines[who].append((what, credits, remained + credits, hold))

    def grant(self, who, credits, source, date):
        if source in self.sources:
            return False
        self.sources.add(source)
        self.packages.append(Package(who, credits, date, credits, date))
        self.write_line(who, "SYSTEM_ADJUST", credits)
        return True

    def take(self, who, credits):
        """Those that end first, and of those that end together the older: (package, credits)."""
        parts = []
        for package in sorted(self.of(who), key=lambda package: (package.until is None, package.until)):
            taken = min(package.left, credits) if package.can_be_spent(self.now) else 0
            if taken:
                package.left -= taken
                credits -= taken
                parts.append((package, taken))
        assert credits == 0
        return parts

    def refusal(self, who, credits, key):
        """Why so many credits cannot be frozen, or None."""
        if self.running(who) >= RUNNING_MAX:
            return v.TooManyRunning
        if self.available(who) < credits:
            return v.InsufficientCredits
        limit = KEYS.get(key)
        spent = sum(hold.credits for hold in self.holds if hold.key == key and hold.state != "released")
        return v.KeyLimitReached if limit is not None and spent + credits > limit else None

    def freeze(self, who, credits, key):
        hold = Hold(self.take(who, credits), credits, key, self.now)
        for package, taken in hold.parts:
            package.frozen += taken
        self.holds.append(hold)
        self.write_line(who, "VIDEO_CONSUME", -credits, hold)
        return hold

    def settle(self, hold):
        hold.state = "settled"
        for package, taken in hold.parts:
            package.frozen -= taken
            package.used += taken

    def release(self, who, hold):
        """Credits go back to where they were.  Past its date, a package takes them for a day: those that were
        frozen before the date, and any whose day is over.  What could not be spent there is lost first."""
        hold.state = "released"
        late = [package for package, _ in hold.parts if not package.can_be_spent(self.now)]
        for package in late:
            self.lose(package)
        for package, taken in hold.parts:
            package.frozen -= taken
            package.left += taken
            past = package.date is not None and package.date <= self.now
            if past and (hold.at < package.date or package in late):
                package.until = self.now + 24
        self.write_line(who, "REFUND", hold.credits, hold)

    def lose(self, package):
        lost, package.left = package.left, 0
        package.expired += lost
        if lost:
            self.write_line(package.owner, "EXPIRED", -lost)

    def expire(self, limit):
        due = [package for package in self.packages
               if package.left and not package.frozen and not package.can_be_spent(self.now)]
        for package in sorted(due, key=lambda package: (package.until, self.packages.index(package)))[:limit]:
            self.lose(package)
        return min(len(due), limit)

    def deduct(self, who, credits):
        for package, taken in self.take(who, credits):
            package.used += taken
            self.write_line(who, "SYSTEM_ADJUST", -taken)

    def end(self, video, status):
        video.status = status
        if status == "COMPLETED":
            self.settle(video.hold)
        else:
            self.release(video.owner, video.hold)


def at(hour):
    return None if hour is None else START + hour * v.HOUR


class Ledger(RuleBasedStateMachine):
    jobs = Bundle("jobs")  # as the worker once read them, so many are out of date

    @initialize(target=jobs, gifts=GIFTS, prices=PRICES)
    def open(self, gifts, prices):
        self.db, self.model, self.n = v.connect(":memory:"), Model(), 0
        v.migrate(self.db)
        for who in PEOPLE:
            v.run(self.db, "INSERT INTO users (id, email, created_at) VALUES (:id, :id || '@b.c', 0)", id=who)
        for key, limit in KEYS.items():
            v.run(self.db, """
                INSERT INTO api_keys (id, user_id, digest, name, hint, credit_limit, created_at)
                VALUES (:id, 'usr_ada', printf('%-64s', :id), 'k', 'k', :limit, 0)
            """, id=key, limit=limit)
        for ref, (who, credits, life) in enumerate(gifts):
            self.grant(who, credits, ref, life)
        return self.order_together("usr_ada", None, prices)

    def teardown(self):
        if hasattr(self, "db"):
            self.db.close()

    @property
    def now(self):
        return at(self.model.now)

    def do(self, fn, refusal=None, **words):
        """The result of one transaction, which must end as the model says."""
        [result], _ = v.commit(self.db, [functools.partial(fn, now=self.now, **words)])
        assert problem_of(result) is refusal, result
        return result

    def job(self, id):
        return v.one(self.db, v.Job, "FROM videos WHERE id = :id", id=id)

    # --- what happens to credits

    @rule(who=st.sampled_from(PEOPLE), credits=AMOUNTS, ref=st.integers(0, 30), life=LIVES)
    def give(self, who, credits, ref, life):
        self.grant(who, credits, ref, life)

    def grant(self, who, credits, ref, life):
        date = None if life is None else self.model.now + life
        given = self.do(v.grant, user_id=who, credits=credits, trans_type="SYSTEM_ADJUST",
                        source_ref=str(ref), note="", expires_at=at(date))
        assert given == self.model.grant(who, credits, ref, date)

    @rule(who=st.sampled_from(PEOPLE), credits=st.integers(1, 9))
    def deduct(self, who, credits):
        short = self.model.available(who) < credits
        self.do(v.deduct, v.InsufficientCredits if short else None, user_id=who, credits=credits, note="")
        if not short:
            self.model.deduct(who, credits)

    @rule(hours=st.integers(1, 13) | st.sampled_from([24, 25]), limit=st.sampled_from([0, 1, 500]))
    def pass_time(self, hours, limit):
        """And take what has expired, from so many packages."""
        self.model.now += hours
        assert self.do(v.expire, limit=limit).get("expiredPackages", 0) == self.model.expire(limit)

    # --- what happens to videos

    @rule(target=jobs, by=st.sampled_from(ORDERING), prices=PRICES)
    def order(self, by, prices):
        return self.order_together(*by, prices)

    def order_together(self, who, key, prices):
        """As many orders as there are prices, which share a commit."""
        acts, once = [], []
        for credits in prices:
            self.n += 1
            once.append(f"once {self.n}")
            acts.append(self.order_act(who, f"{self.n:036}", credits, key, once[-1]))
        outcomes, _ = v.commit(self.db, acts)
        taken = []
        for credits, once_, act, answer in zip(prices, once, acts, outcomes, strict=True):
            assert problem_of(answer) is self.model.refusal(who, credits, key), answer
            if not problem_of(answer):
                id = act.keywords["act"].keywords["id"]
                hold = self.model.freeze(who, credits, key)
                self.model.videos[id] = Video(who, id, credits, hold, once_, answer)
                taken.append(self.job(id))
        return multiple(*taken)

    def order_act(self, who, id, credits, key, once):
        order = v.Order("told", "scripted", "a fox", "", 5, "16:9", "480p", 1, [], credits)
        act = functools.partial(v.request_video, id=id, user_id=who, api_key_id=key, order=order,
                                max_running=RUNNING_MAX, catalog_version="v1", timeout=v.HOUR, now=self.now)
        return functools.partial(v.once_only, act=act, user_id=who, key=once, fingerprint="", now=self.now)

    def is_current(self, job):
        video = self.model.videos[job.id]
        return (video.status, video.attempt, video.deleted) == (job.status, job.attempt, False)

    @rule(target=jobs, job=jobs)
    def make(self, job):
        self.do(v.mark_uploading, job=job, original_url="https://provider.test/x", until_at=None)
        if not self.is_current(job):
            return multiple()
        self.model.videos[job.id].status, self.model.videos[job.id].made = "UPLOADING", True
        return self.job(job.id)

    @rule(job=jobs, how=st.sampled_from(["complete", "fail", "cancel", "delete"]))
    def end(self, job, how):
        getattr(self, how)(job, self.model.videos[job.id])

    def complete(self, job, video):
        current = self.is_current(job)
        done = (video.status, video.attempt, video.deleted) == ("COMPLETED", job.attempt, False)
        media = {"width": 64, "height": 48, "duration_ms": 500, "size_bytes": 1000}
        stored = v.stored_keys(job.id, job.attempt) | media
        assert self.do(v.complete, job=job, stored=stored) == (current or done)
        if current:
            self.model.end(video, "COMPLETED")

    def fail(self, job, video):
        current = self.is_current(job)
        self.do(v.fail, job=job, problem=v.ProviderFailed())
        if current:
            self.model.end(video, "FAILED")

    def cancel(self, job, video):
        ended = video.status in ENDED
        late = v.AlreadyFinished if video.status != "PENDING" and not video.cancelled else None
        refusal = v.VideoNotFound if video.deleted else late
        self.do(v.cancel_video, refusal, user_id=video.owner, id=video.id)
        if not ended and not late:
            self.model.end(video, "FAILED")
            video.cancelled = True

    def delete(self, job, video):
        running = v.StillRunning if video.status == "UPLOADING" else None
        refusal = v.VideoNotFound if video.deleted else running
        self.do(v.delete_video, refusal, user_id=video.owner, id=video.id)
        if running:
            return
        if video.status not in ENDED:
            self.model.end(video, "FAILED")
        video.deleted = True

    @rule(target=jobs, job=jobs, tight=st.booleans())
    def retry(self, job, tight):
        video = self.model.videos[job.id]
        key = "key_tight" if tight and video.owner == "usr_ada" else None
        possible = video.status == "FAILED" and video.made
        refusal = (v.VideoNotFound if video.deleted else v.RetryNotAvailable if not possible
                   else self.model.refusal(video.owner, video.credits, key))
        self.do(v.retry_video, refusal, user_id=video.owner, api_key_id=key, id=video.id,
                max_running=RUNNING_MAX, catalog_version="v2")
        if refusal:
            return multiple()
        video.hold = self.model.freeze(video.owner, video.credits, key)
        video.status, video.attempt, video.cancelled = "UPLOADING", video.attempt + 1, False
        return self.job(video.id)

    @rule(job=jobs, kind=st.sampled_from(["settle", "release"]))
    def again(self, job, kind):
        """The same order again is the same video.  What has ended does not end again, nor the other way."""
        video = self.model.videos[job.id]
        act = self.order_act(video.owner, "x" * 36, 1, None, video.once)
        assert v.commit(self.db, [act])[0] == [video.answer]
        if video.hold.state != "frozen":
            assert self.do(v.end_hold, kind=kind, video_id=job.id) is False

    # --- what is always true

    @invariant()
    def every_counter_is_the_models(self):
        counters = self.db.execute("""
            SELECT user_id, initial, remaining, frozen, used, expired, refunded, spendable_until_at
            FROM credit_packages ORDER BY id
        """).fetchall()
        assert counters == [
            (p.owner, p.initial, p.left, p.frozen, p.used, p.expired, 0, at(p.until))
            for p in self.model.packages]
        assert all(0 <= counter <= row[1] for row in counters for counter in row[2:7])

    @invariant()
    def every_balance_is_the_models(self):
        for who in PEOPLE:
            packages, now = self.model.of(who), self.model.now
            soon = [p.left for p in packages if p.until is not None and now < p.until <= now + 7 * 24]
            assert v.balance(self.db, user_id=who, now=self.now) == {
                "totalCredits": sum(p.initial for p in packages), "debt": 0, "plan": None,
                "usedCredits": sum(p.used for p in packages), "expiringSoon": sum(soon),
                "frozenCredits": sum(p.frozen for p in packages),
                "availableCredits": self.model.available(who)}

    @invariant()
    def every_history_is_the_models(self):
        for who in PEOPLE:
            found = v.history(self.db, user_id=who, cursor=None, limit=10_000)["transactions"][::-1]
            shown = operator.itemgetter("transType", "credits", "balanceAfter", "state")
            assert list(map(shown, found)) == [
                (what, credits, after, hold.state if what == "VIDEO_CONSUME" else None)
                for what, credits, after, hold in self.model.lines[who]]
            remained = 0
            for line in found:
                remained += line["credits"]
                assert line["balanceAfter"] == remained

    @invariant()
    def videos_are_as_the_model_says(self):
        """What was refused left nothing behind."""
        assert self.db.execute("SELECT id, status, attempt FROM videos ORDER BY id").fetchall() == sorted(
            (video.id, video.status, video.attempt) for video in self.model.videos.values())
        assert v.value(self.db, "SELECT count(*) FROM idempotency_keys") == len(self.model.videos)
        assert v.value(self.db, "SELECT count(*) FROM credit_holds") == len(self.model.holds)

    @invariant()
    def the_auditor_is_content(self):
        assert self.db.execute("SELECT * FROM discrepancies").fetchall() == []
        assert v.audit(self.db)["faults"] == []
        for who in PEOPLE:
            assert v.proof(self.db, user_id=who)["faults"] == []


# The same examples each time, so that what fails here fails everywhere; the blob repeats a failure by itself.
Ledger.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, database=None, print_blob=True,
    phases=[Phase.generate, Phase.shrink], suppress_health_check=[HealthCheck.too_slow])
TestLedger = Ledger.TestCase
