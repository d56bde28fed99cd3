-- VideoFly: the whole database, on one page.
--
-- Conventions.  Every table is STRICT.  Times are integer milliseconds since the epoch, in columns
-- named *_at, and are always passed in: SQL never reads the clock, so a test owns time.  Credits are
-- whole numbers.  Booleans are 0 and 1.  States are words, listed in a CHECK, one by one: for an IN of three or
-- more SQLite builds a table whenever it is checked.  Secrets (sessions, keys, invitations) are kept only as
-- SHA-256 digests.  Rows are deleted only where the comment says so.
--
-- This is a NEW database at the newest version.  An older file is brought here by comparison with this page
-- (`reshape` in videofly.py); a test holds the two equal.

PRAGMA application_id = 0x56464C59;                     -- 'VFLY', for file(1)
PRAGMA user_version   = 4;

---------------------------------------------------------------------------------------- people --

-- A person who can sign in.  Without a password hash, only with an API key.
CREATE TABLE users (
    id             TEXT    NOT NULL PRIMARY KEY CHECK (id GLOB 'usr_*'),
    email          TEXT    NOT NULL COLLATE NOCASE UNIQUE CHECK (email LIKE '%_@_%' AND length(email) <= 254),
    password_hash  TEXT,                                -- argon2id
    is_admin       INTEGER NOT NULL DEFAULT 0 CHECK (is_admin IN (0, 1)),
    created_at     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX users_admins ON users (created_at) WHERE is_admin = 1;

-- With what payments say of somebody: the plan that runs, and whether a card holder has disputed one; and how many
-- videos of theirs are about to be archived.
CREATE VIEW accounts AS
    SELECT *, password_hash IS NOT NULL AS has_password,
           (SELECT plan FROM subscriptions WHERE user_id = users.id AND is_running ORDER BY occurred_at DESC LIMIT 1) AS plan,
           EXISTS (SELECT 1 FROM payment_events WHERE user_id = users.id AND type = 'dispute.created') AS is_disputed,
           (SELECT count(*) FROM videos WHERE user_id = users.id AND finished_at IS NOT NULL AND deleted_at IS NULL
                                              AND archive_at IS NOT NULL) AS archiving_soon
    FROM users;

-- One signed-in browser.  Made anew at every sign-in; deleted at sign-out, at a password change and past its date.
CREATE TABLE sessions (
    digest      TEXT    NOT NULL PRIMARY KEY CHECK (length(digest) = 64),
    user_id     TEXT    NOT NULL REFERENCES users(id),
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL CHECK (expires_at > created_at)
) STRICT, WITHOUT ROWID;

CREATE INDEX sessions_by_user ON sessions (user_id);
CREATE INDEX sessions_by_end  ON sessions (expires_at);

CREATE TRIGGER users_sign_out AFTER UPDATE OF password_hash ON users BEGIN
    DELETE FROM sessions WHERE user_id = NEW.id;
END;

-- What a program signs in with.  Kept after it was revoked: holds name the key that ordered.
CREATE TABLE api_keys (
    id            TEXT    NOT NULL PRIMARY KEY CHECK (id GLOB 'key_*'),
    user_id       TEXT    NOT NULL REFERENCES users(id),
    digest        TEXT    NOT NULL UNIQUE CHECK (length(digest) = 64),
    name          TEXT    NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    hint          TEXT    NOT NULL,                     -- the last four characters, to tell keys apart
    credit_limit  INTEGER          CHECK (credit_limit > 0),    -- all it may ever spend; NULL: no limit
    created_at    INTEGER NOT NULL,
    expires_at    INTEGER,
    last_used_at  INTEGER,                              -- written at most once a minute
    revoked_at    INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX api_keys_by_user ON api_keys (user_id, created_at);

-- Who may ask with a session or a key, and until when.  A key that may not spend all, or not for ever, makes
-- nobody an administrator.  Columns have one type in both halves: only then is each searched by its own index.
CREATE VIEW principals AS
    SELECT s.digest, s.user_id, u.is_admin = 1 AS is_admin, CAST(NULL AS TEXT) AS api_key_id,
           s.expires_at AS until_at, CAST(NULL AS INTEGER) AS last_used_at
    FROM sessions s JOIN users u ON u.id = s.user_id
    UNION ALL
    SELECT k.digest, k.user_id, u.is_admin = 1 AND k.credit_limit IS NULL AND k.expires_at IS NULL, k.id,
           k.expires_at, k.last_used_at
    FROM api_keys k JOIN users u ON u.id = k.user_id WHERE k.revoked_at IS NULL;

-- Lets one person sign up while sign-up is by invitation.  Deleted when it is used.
CREATE TABLE invites (
    digest      TEXT    NOT NULL PRIMARY KEY CHECK (length(digest) = 64),
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Wrong passwords, each once by its account and once by its address.  Deleted after a day.
CREATE TABLE sign_in_failures (
    id          INTEGER NOT NULL PRIMARY KEY,
    subject     TEXT    NOT NULL,                       -- 'account:' or 'address:' and a digest
    failed_at   INTEGER NOT NULL
) STRICT;

CREATE INDEX sign_in_failures_by_subject  ON sign_in_failures (subject, failed_at);
CREATE INDEX sign_in_failures_by_age      ON sign_in_failures (failed_at);

-- Until when nobody may try again: five wrong passwords of an account are free, twenty of an address; each
-- that follows makes the next attempt wait twice as long, a quarter of an hour at most.
CREATE VIEW sign_in_waits AS
    SELECT subject, max(failed_at) + min(1000 << min(count(*) - free, 20), 900000) AS until_at
    FROM (SELECT *, iif(subject GLOB 'account:*', 5, 20) AS free FROM sign_in_failures)
    GROUP BY subject HAVING count(*) >= free;

---------------------------------------------------------------------------------------- ledger --

-- Credits granted together: a purchase, a period, a gift.  Spending takes from the package that ends
-- first.  The counters partition it: the last CHECK is conservation, the law of this ledger.  They are
-- written by the trigger transactions_apply only.
CREATE TABLE credit_packages (
    id               INTEGER NOT NULL PRIMARY KEY,
    user_id          TEXT    NOT NULL REFERENCES users(id),
    trans_type       TEXT    NOT NULL CHECK (trans_type = 'NEW_USER' OR trans_type = 'ORDER_PAY' OR
                                                     trans_type = 'SUBSCRIPTION' OR trans_type = 'SYSTEM_ADJUST'),
    source_ref       TEXT    NOT NULL,                  -- what was paid for: an order, a period, the user of a gift
    initial          INTEGER NOT NULL CHECK (initial BETWEEN 1 AND 1000000000),
    remaining        INTEGER NOT NULL DEFAULT 0 CHECK (remaining >= 0),
    frozen           INTEGER NOT NULL DEFAULT 0 CHECK (frozen    >= 0),
    used             INTEGER NOT NULL DEFAULT 0 CHECK (used      >= 0),
    expired          INTEGER NOT NULL DEFAULT 0 CHECK (expired   >= 0),
    refunded         INTEGER NOT NULL DEFAULT 0 CHECK (refunded  >= 0),
    created_at       INTEGER NOT NULL,
    entitlement      TEXT,                              -- what a payment bought with it, see there
    expires_at       INTEGER,                           -- its date; NULL: never
    spendable_until_at  INTEGER,                        -- its date, or a day after credits came back to it too late
    warned_at        INTEGER,                           -- when its owner was told that it ends soon
    CONSTRAINT conservation CHECK (remaining + frozen + used + expired + refunded IN (0, initial)),
    CHECK ((expires_at IS NULL) = (spendable_until_at IS NULL) AND spendable_until_at >= expires_at)
) STRICT;

-- With the names that people see.
CREATE VIEW shown_packages AS SELECT *, spendable_until_at AS spendable_until FROM credit_packages;

-- A payment may be announced many times, and grants once.
CREATE UNIQUE INDEX credit_packages_once  ON credit_packages (trans_type, source_ref);
CREATE INDEX credit_packages_by_user      ON credit_packages (user_id, id);
CREATE INDEX credit_packages_bought       ON credit_packages (entitlement, initial) WHERE entitlement IS NOT NULL;
CREATE INDEX credit_packages_to_expire    ON credit_packages (spendable_until_at) WHERE remaining > 0 AND frozen = 0;
CREATE INDEX credit_packages_to_warn_of   ON credit_packages (expires_at) WHERE remaining > 0 AND warned_at IS NULL;

-- What is frozen for one attempt at one video.  Ends once: settled (it was made, the credits are spent)
-- or released (it was not, they go back).  Carries the price as it was when ordered.
CREATE TABLE credit_holds (
    id               INTEGER NOT NULL PRIMARY KEY,
    video_id         TEXT    NOT NULL REFERENCES videos(id) DEFERRABLE INITIALLY DEFERRED,
    attempt          INTEGER NOT NULL CHECK (attempt > 0),
    api_key_id       TEXT             REFERENCES api_keys(id),
    credits          INTEGER NOT NULL CHECK (credits > 0),
    catalog_version  TEXT    NOT NULL,                  -- of the catalogue that gave the price
    state            TEXT    NOT NULL DEFAULT 'frozen' CHECK (state = 'frozen' OR state = 'settled' OR state = 'released'),
    created_at       INTEGER NOT NULL,
    resolved_at      INTEGER,
    UNIQUE (video_id, attempt),
    CHECK ((state = 'frozen') = (resolved_at IS NULL))
) STRICT;

CREATE INDEX credit_holds_by_key ON credit_holds (api_key_id, state, credits) WHERE api_key_id IS NOT NULL;

-- What a key with a limit may still spend.
CREATE VIEW limited_keys AS
    SELECT k.id, k.credit_limit - (SELECT coalesce(sum(h.credits), 0) FROM credit_holds h
                                   WHERE h.api_key_id = k.id AND h.state <> 'released') AS credits_left
    FROM api_keys k WHERE k.credit_limit IS NOT NULL;

CREATE TRIGGER credit_holds_one_at_a_time BEFORE INSERT ON credit_holds
WHEN EXISTS (SELECT 1 FROM credit_holds WHERE video_id = NEW.video_id AND state = 'frozen') BEGIN
    SELECT RAISE(ABORT, 'video_has_an_open_hold');
END;
CREATE TRIGGER credit_holds_end_once BEFORE UPDATE ON credit_holds WHEN OLD.state <> 'frozen' BEGIN
    SELECT RAISE(ABORT, 'hold_already_ended');
END;

-- The journal.  A row moves credits between two counters of one package, so a row cannot be unbalanced.
-- Append-only; packages are its consequence.  Each row's hash covers the row and the hash before it.
CREATE TABLE credit_transactions (
    id             INTEGER NOT NULL PRIMARY KEY,        -- 1, 2, 3, … without a gap
    user_id        TEXT    NOT NULL REFERENCES users(id),
    package_id     INTEGER NOT NULL REFERENCES credit_packages(id),
    hold_id        INTEGER          REFERENCES credit_holds(id),
    kind           TEXT    NOT NULL,
    trans_type     TEXT    NOT NULL,
    credits        INTEGER NOT NULL CHECK (credits > 0),
    balance_after  INTEGER NOT NULL CHECK (balance_after >= 0),     -- all that remains to the user, after this row
    note           TEXT    NOT NULL DEFAULT '',
    created_at     INTEGER NOT NULL,
    hash           TEXT    NOT NULL CHECK (length(hash) = 64),
    CHECK (CASE kind
        WHEN 'grant'   THEN hold_id IS NULL     AND (trans_type = 'NEW_USER' OR trans_type = 'ORDER_PAY' OR
                                                     trans_type = 'SUBSCRIPTION' OR trans_type = 'SYSTEM_ADJUST')
        WHEN 'freeze'  THEN hold_id IS NOT NULL AND trans_type = 'VIDEO_CONSUME'
        WHEN 'settle'  THEN hold_id IS NOT NULL AND trans_type = 'VIDEO_CONSUME'
        WHEN 'release' THEN hold_id IS NOT NULL AND trans_type = 'REFUND'
        WHEN 'expire'  THEN hold_id IS NULL     AND trans_type = 'EXPIRED'
        WHEN 'deduct'  THEN hold_id IS NULL     AND trans_type = 'SYSTEM_ADJUST'
        WHEN 'refund'  THEN hold_id IS NULL     AND trans_type = 'REFUND'
        ELSE 0 END)
) STRICT;

CREATE INDEX credit_transactions_by_user     ON credit_transactions (user_id, id);
CREATE INDEX credit_transactions_by_package  ON credit_transactions (package_id);
CREATE INDEX credit_transactions_refunds     ON credit_transactions (user_id, credits) WHERE kind = 'refund';
CREATE INDEX credit_transactions_by_hold     ON credit_transactions (hold_id, kind, id) WHERE hold_id IS NOT NULL;

-- Each row after the hash that its own builds on.
CREATE VIEW journal AS
    SELECT (SELECT hash FROM credit_transactions WHERE id = t.id - 1) AS hash_before, t.* FROM credit_transactions t;

-- The journal as people understand it.  A hold is one line, from however many packages it drew; its settling
-- is the hold's state and no line, because it changes nothing that remains.
CREATE VIEW movements AS
    SELECT t.id, t.user_id, t.trans_type, t.balance_after, t.note, t.created_at, h.video_id AS video_uuid,
           iif(t.kind = 'freeze', h.state, NULL) AS state,
           coalesce(h.credits, t.credits) * iif(t.kind IN ('grant', 'release'), 1, -1) AS credits
    FROM credit_transactions t LEFT JOIN credit_holds h ON h.id = t.hold_id
    WHERE t.kind <> 'settle'
      AND (t.hold_id IS NULL OR t.id = (
          SELECT max(id) FROM credit_transactions WHERE hold_id = t.hold_id AND kind = t.kind));

-- The rows of the journal that are a video's, with how its hold stands.
CREATE VIEW video_transactions AS
    SELECT t.*, h.video_id, h.state, h.created_at AS held_at
    FROM credit_transactions t JOIN credit_holds h ON h.id = t.hold_id;

-- A hold with what it drew from which package.
CREATE VIEW shown_holds AS
    SELECT h.*, (SELECT json_group_array(json_object('packageId', t.package_id, 'credits', t.credits,
                        'expiresAt', strftime('%Y-%m-%dT%H:%M:%SZ', p.expires_at / 1000, 'unixepoch')))
                 FROM credit_transactions t JOIN credit_packages p ON p.id = t.package_id
                 WHERE t.hold_id = h.id AND t.kind = 'freeze') AS draws
    FROM credit_holds h;

CREATE TRIGGER transactions_apply AFTER INSERT ON credit_transactions BEGIN
    UPDATE credit_packages SET
        remaining = remaining + NEW.credits * CASE NEW.kind WHEN 'grant'  THEN 1 WHEN 'release' THEN  1 WHEN 'settle'  THEN  0 ELSE -1 END,
        frozen    = frozen    + NEW.credits * CASE NEW.kind WHEN 'freeze' THEN 1 WHEN 'settle'  THEN -1 WHEN 'release' THEN -1 ELSE  0 END,
        used      = used      + NEW.credits * CASE NEW.kind WHEN 'settle' THEN 1 WHEN 'deduct'  THEN  1 ELSE 0 END,
        expired   = expired   + NEW.credits * (NEW.kind = 'expire'),
        refunded  = refunded  + NEW.credits * (NEW.kind = 'refund')
    WHERE id = NEW.package_id AND user_id = NEW.user_id;
END;

CREATE TRIGGER transactions_one_by_one BEFORE INSERT ON credit_transactions     -- REPLACE would delete unnoticed
WHEN NEW.id IS NOT (SELECT coalesce(max(id), 0) + 1 FROM credit_transactions) BEGIN
    SELECT RAISE(ABORT, 'the_journal_has_no_gaps');
END;
CREATE TRIGGER transactions_no_update BEFORE UPDATE ON credit_transactions BEGIN
    SELECT RAISE(ABORT, 'the_journal_is_append_only');
END;
CREATE TRIGGER transactions_no_delete BEFORE DELETE ON credit_transactions BEGIN
    SELECT RAISE(ABORT, 'the_journal_is_append_only');
END;

---------------------------------------------------------------------------------------- videos --

-- An image that somebody sent, to be animated.  The bytes are in storage under the key.
CREATE TABLE uploads (
    key         TEXT    NOT NULL PRIMARY KEY CHECK (key GLOB 'uploads/*'),
    user_id     TEXT    NOT NULL REFERENCES users(id),
    media_type  TEXT    NOT NULL CHECK (media_type GLOB 'image/*'),
    size_bytes  INTEGER NOT NULL CHECK (size_bytes > 0),
    created_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX uploads_by_user ON uploads (user_id);

-- One video that was ordered.  PENDING -> GENERATING -> UPLOADING -> COMPLETED, or FAILED from any of the
-- first three; a retry takes FAILED back to UPLOADING with the next attempt number and a new hold.
-- due_at is all the worker knows: when it is not NULL, there is something to do with the video then.
-- Deleted ones lose their files and stay as rows, because the journal speaks of them.
CREATE TABLE videos (
    id               TEXT    NOT NULL PRIMARY KEY CHECK (length(id) = 36),
    user_id          TEXT    NOT NULL REFERENCES users(id),
    model            TEXT    NOT NULL,
    provider         TEXT    NOT NULL,
    prompt           TEXT    NOT NULL CHECK (length(prompt) BETWEEN 1 AND 4000),
    negative_prompt  TEXT    NOT NULL DEFAULT '',
    duration         INTEGER NOT NULL CHECK (duration > 0),         -- seconds
    aspect_ratio     TEXT    NOT NULL,
    quality          TEXT    NOT NULL,
    seed             INTEGER NOT NULL,
    images           TEXT    NOT NULL CHECK (json_valid(images)),   -- keys of uploads
    credits          INTEGER NOT NULL CHECK (credits > 0),          -- its price
    moderation_id    TEXT,                              -- of Creem's verdict on the prompt; the freeze notes it too
    status           TEXT    NOT NULL DEFAULT 'PENDING'
                     CHECK (status = 'PENDING' OR status = 'GENERATING' OR status = 'UPLOADING' OR
                            status = 'COMPLETED' OR status = 'FAILED'),
    attempt          INTEGER NOT NULL DEFAULT 1 CHECK (attempt > 0),
    tries            INTEGER NOT NULL DEFAULT 0,        -- calls made outside in this status, for the back-off
    progress         INTEGER NOT NULL DEFAULT 0 CHECK (progress BETWEEN 0 AND 100),
    due_at           INTEGER,
    deadline_at      INTEGER NOT NULL,                  -- the provider has to be done by then
    submitted_at     INTEGER,                           -- the intent, written before the provider is called
    cancelled_at     INTEGER,                           -- the wish; whether it came in time, the provider says
    missed           INTEGER NOT NULL DEFAULT 0,        -- times that the provider said it knows no such job
    missed_at        INTEGER,                           -- the first of them in a row
    ref              TEXT,                              -- what the provider's fetch needs; without it, a submit is unknown
    original_url     TEXT,                              -- where the provider put the result
    original_until_at  INTEGER,                         -- and how long it stays there
    storage_key      TEXT,
    poster_key       TEXT,
    width            INTEGER,
    height           INTEGER,
    duration_ms      INTEGER,
    size_bytes       INTEGER,
    error_code       TEXT,
    error_message    TEXT,
    created_at       INTEGER NOT NULL,
    changed_at       INTEGER NOT NULL,
    finished_at      INTEGER,
    archive_at       INTEGER,                           -- when it may be archived at the soonest: its owner was told
    deleted_at       INTEGER,
    CHECK (ref IS NULL OR submitted_at IS NOT NULL),
    CHECK (status <> 'GENERATING' OR ref IS NOT NULL),
    CHECK (status <> 'UPLOADING'  OR original_url IS NOT NULL),
    CHECK (status <> 'COMPLETED'  OR deleted_at IS NOT NULL OR storage_key IS NOT NULL),
    CHECK ((status IN ('COMPLETED', 'FAILED')) = (finished_at IS NOT NULL)),
    CHECK ((status = 'FAILED') = (error_code IS NOT NULL)),
    CHECK (deleted_at IS NULL OR finished_at IS NOT NULL),
    CHECK (finished_at IS NOT NULL OR due_at IS NOT NULL)           -- work is never lost
) STRICT, WITHOUT ROWID;

-- Ids begin with the time, so these two list a user's videos; the first also counts those being made.
CREATE INDEX videos_running   ON videos (user_id, finished_at, id) WHERE finished_at IS NULL;     -- all that counting needs
CREATE INDEX videos_finished  ON videos (user_id, id) WHERE finished_at IS NOT NULL AND deleted_at IS NULL;
CREATE INDEX videos_kept      ON videos (status, finished_at) WHERE finished_at IS NOT NULL AND deleted_at IS NULL;
CREATE INDEX videos_due       ON videos (due_at) WHERE due_at IS NOT NULL;

-- With the names that people see; and what it cost and why: each hold, the rows of the journal, the orders to providers.
CREATE VIEW shown_videos AS
    SELECT *, id AS video_uuid, credits AS credits_used, cancelled_at AS cancel_requested_at,
           iif(error_code IS NULL, NULL, json_object('code', error_code, 'message', error_message)) AS error,
           storage_key AS video_url, poster_key AS poster_url,
           (SELECT coalesce(sum(credits), 0) FROM credit_holds WHERE video_id = v.id AND state = 'settled') AS credits_charged,
           (SELECT json_group_array(json_object(
                'attempt', attempt, 'credits', credits, 'state', state, 'catalogVersion', catalog_version,
                'apiKeyId', api_key_id,
                'createdAt', strftime('%Y-%m-%dT%H:%M:%fZ', created_at / 1000.0, 'unixepoch'),
                'resolvedAt', strftime('%Y-%m-%dT%H:%M:%fZ', resolved_at / 1000.0, 'unixepoch'), 'draws', json(draws)))
            FROM (SELECT * FROM shown_holds WHERE video_id = v.id ORDER BY attempt)) AS holds,
           (SELECT json_group_array(json_object(
                'id', id, 'kind', kind, 'packageId', package_id, 'credits', credits,
                'createdAt', strftime('%Y-%m-%dT%H:%M:%fZ', created_at / 1000.0, 'unixepoch'), 'hash', hash))
            FROM (SELECT * FROM video_transactions WHERE video_id = v.id ORDER BY id)) AS transactions,
           (SELECT json_group_array(json_object(
                'id', id, 'videoUuid', video_id, 'provider', provider, 'providerId', provider_id, 'state', state,
                'cost', cost,
                'beganAt', strftime('%Y-%m-%dT%H:%M:%fZ', began_at / 1000.0, 'unixepoch'),
                'takenAt', strftime('%Y-%m-%dT%H:%M:%fZ', taken_at / 1000.0, 'unixepoch'),
                'endedAt', strftime('%Y-%m-%dT%H:%M:%fZ', ended_at / 1000.0, 'unixepoch'), 'error', error))
            FROM (SELECT * FROM shown_provider_jobs WHERE video_id = v.id ORDER BY id)) AS provider_jobs
    FROM videos v;

-- Every file that the database speaks of, and whether somebody still wants it.
CREATE VIEW media AS
    SELECT storage_key AS key, deleted_at IS NULL AS is_wanted FROM videos WHERE storage_key IS NOT NULL
    UNION ALL SELECT poster_key, deleted_at IS NULL FROM videos WHERE poster_key IS NOT NULL
    UNION ALL SELECT key, 1 FROM uploads;

-- Holds of videos that have ended.  A video ends together with its hold, so there is none, or something was broken by hand.
CREATE VIEW stuck_holds AS
    SELECT h.video_id, v.status FROM credit_holds h JOIN videos v ON v.id = h.video_id
    WHERE h.state = 'frozen' AND v.finished_at IS NOT NULL;

-- Those that their owner still has.  In two halves, because each has its index.
CREATE VIEW listed_videos AS
    SELECT * FROM shown_videos WHERE finished_at IS NULL
    UNION ALL
    SELECT * FROM shown_videos WHERE finished_at IS NOT NULL AND deleted_at IS NULL;

-- One order that was given to a provider, and what became of it there.  Written by the triggers below, except
-- why it was refused: that is for whoever was told.  An order without taken_at or ended_at is unknown: it was
-- sent, and no answer came.  What was refused was so for good, and what found the provider away was not.
CREATE TABLE provider_jobs (
    id           INTEGER NOT NULL PRIMARY KEY,
    video_id     TEXT    NOT NULL REFERENCES videos(id),
    provider     TEXT    NOT NULL,
    began_at     INTEGER NOT NULL,
    taken_at     INTEGER,
    ended_at     INTEGER,
    ref          TEXT,
    state        TEXT    NOT NULL DEFAULT 'unknown'
                 CHECK (state = 'unknown' OR state = 'taken' OR state = 'queued' OR state = 'running' OR state = 'succeeded' OR
                        state = 'failed' OR state = 'canceled' OR state = 'missing' OR state = 'refused' OR state = 'away'),
    cost         REAL,                                  -- as the provider told it, in whatever it counts
    error        TEXT
) STRICT;

CREATE INDEX provider_jobs_by_video ON provider_jobs (video_id, id);

CREATE VIEW shown_provider_jobs AS
    SELECT *, video_id AS video_uuid, iif(json_valid(ref), ref ->> 'id', ref) AS provider_id FROM provider_jobs;

CREATE TRIGGER provider_jobs_begin AFTER UPDATE OF submitted_at ON videos
WHEN NEW.submitted_at IS NOT NULL AND OLD.submitted_at IS NULL BEGIN
    INSERT INTO provider_jobs (video_id, provider, began_at) VALUES (NEW.id, NEW.provider, NEW.submitted_at);
END;
CREATE TRIGGER provider_jobs_taken AFTER UPDATE OF ref ON videos WHEN NEW.ref IS NOT OLD.ref BEGIN
    UPDATE provider_jobs SET ref = NEW.ref, taken_at = NEW.changed_at, state = 'taken'
    WHERE id = (SELECT max(id) FROM provider_jobs WHERE video_id = NEW.id);
    UPDATE videos SET due_at = NEW.changed_at WHERE id = NEW.id AND cancelled_at IS NOT NULL;   -- it is told at once
END;
CREATE TRIGGER provider_jobs_end AFTER UPDATE OF finished_at ON videos WHEN NEW.finished_at IS NOT NULL BEGIN
    UPDATE provider_jobs SET ended_at = NEW.finished_at, error = NEW.error_message
    WHERE video_id = NEW.id AND ended_at IS NULL;
END;

CREATE TRIGGER videos_end_once BEFORE UPDATE OF status ON videos
WHEN OLD.finished_at IS NOT NULL AND NEW.status <> OLD.status
     AND NOT (OLD.status = 'FAILED' AND NEW.status = 'UPLOADING' AND NEW.attempt = OLD.attempt + 1) BEGIN
    SELECT RAISE(ABORT, 'video_already_finished');
END;

-- A POST that cost something, and what it was answered: the same key gets the same answer.
-- Deleted after a week.
CREATE TABLE idempotency_keys (
    user_id      TEXT    NOT NULL REFERENCES users(id),
    key          TEXT    NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    fingerprint  TEXT    NOT NULL,                      -- digest of method, path and body
    answer       TEXT    NOT NULL CHECK (json_valid(answer)),
    created_at   INTEGER NOT NULL,
    PRIMARY KEY (user_id, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

-------------------------------------------------------------------------------------- payments --

-- Somebody was sent to pay.  Written before they go, because it says best who they are when they have paid.
CREATE TABLE checkouts (
    id           TEXT    NOT NULL PRIMARY KEY CHECK (id GLOB 'chk_*'),  -- Creem's request_id
    user_id      TEXT    NOT NULL REFERENCES users(id),
    product      TEXT    NOT NULL,                      -- the catalogue's id
    units        INTEGER NOT NULL CHECK (units > 0),
    checkout_id  TEXT    UNIQUE,                        -- Creem's
    url          TEXT,                                  -- where one pays
    created_at   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX checkouts_by_user ON checkouts (user_id);

-- What Creem told, each once, as it came; and the facts in it, as far as it says them.  Events are never counted
-- on to come once, in order, or at all: what they mean together is said by the views below, and the ledger
-- follows those.  Bodies may be forgotten in time, facts never: they keep a payment from being granted twice.
CREATE TABLE payment_events (
    id               INTEGER NOT NULL PRIMARY KEY,
    delivery_key     TEXT    NOT NULL UNIQUE,           -- Creem's id of the event, else a digest of the body
    body             TEXT,
    received_at      INTEGER NOT NULL,
    type             TEXT    NOT NULL,                  -- in Creem's own words, aliases resolved
    mode             TEXT,                              -- prod; else nothing of it is real
    occurred_at      INTEGER NOT NULL,
    standing         TEXT,                              -- of the subscription, from then on
    is_sale          INTEGER NOT NULL CHECK (is_sale IN (0, 1)),    -- that something was paid for
    request_id       TEXT,
    checkout_id      TEXT,
    order_id         TEXT,
    transaction_id   TEXT,
    subscription_id  TEXT,
    customer_id      TEXT,
    reference        TEXT,                              -- who bought it, as we told Creem when we sent them to pay
    product_id       TEXT,                              -- Creem's
    units            INTEGER NOT NULL CHECK (units > 0),
    period_start_at  INTEGER,
    period_end_at    INTEGER,
    currency         TEXT,
    price            INTEGER CHECK (price >= 0),        -- cents, as the next three; what the product costs
    paid             INTEGER CHECK (paid >= 0),         -- with tax
    back_told        INTEGER CHECK (back_told >= 0),    -- by this refund
    back_total       INTEGER CHECK (back_total >= 0),   -- by now
    refund_id        TEXT,
    -- What we made of it:
    payment          TEXT,                              -- which payment it speaks of: 'tran:…', 'order:…', …
    back             INTEGER CHECK (back >= 0),         -- back_told, of what tells of a refund first
    user_id          TEXT             REFERENCES users(id),
    product          TEXT,                              -- the catalogue's id
    credits          INTEGER CHECK (credits > 0),       -- of a sale: what the product gave when it was heard of
    promised         INTEGER CHECK (promised > 0),      -- of a plan's change, where its credits come at once
    entitlement      TEXT,                              -- what a sale is for: the payment, or a subscription's period
    state            TEXT    NOT NULL DEFAULT 'attention' CHECK (state = 'applied' OR state = 'attention' OR state = 'ignored'),
    effect           TEXT    NOT NULL DEFAULT '',
    CHECK (credits IS NULL OR (is_sale AND payment IS NOT NULL AND user_id IS NOT NULL AND entitlement IS NOT NULL))
) STRICT;

CREATE UNIQUE INDEX payment_events_refunds_once    ON payment_events (refund_id) WHERE back IS NOT NULL;
CREATE INDEX payment_events_by_payment       ON payment_events (payment) WHERE payment IS NOT NULL;
CREATE INDEX payment_events_by_transaction   ON payment_events (transaction_id) WHERE transaction_id IS NOT NULL;
CREATE INDEX payment_events_by_subscription  ON payment_events (subscription_id, standing, occurred_at) WHERE subscription_id IS NOT NULL;
CREATE INDEX payment_events_by_customer      ON payment_events (customer_id) WHERE customer_id IS NOT NULL;
CREATE INDEX payment_events_by_user          ON payment_events (user_id, entitlement, payment);
CREATE INDEX payment_events_to_look_at       ON payment_events (id) WHERE state = 'attention';
CREATE INDEX payment_events_to_forget        ON payment_events (received_at) WHERE body IS NOT NULL;

-- By which its payment may be known, the best first.  A change of a subscription speaks of no payment.
CREATE VIEW payment_names AS
    SELECT e.id AS event_id, key AS rank, value AS name FROM payment_events e, json_each(json_array(
        iif(subscription_id IS NULL, 'order:' || order_id, NULL),
        iif(subscription_id IS NULL, 'checkout:' || checkout_id, NULL),
        'tran:' || transaction_id,
        iif(is_sale OR back_told > 0, 'period:' || subscription_id || ':' || period_start_at, NULL),
        iif(is_sale, 'event:' || delivery_key, NULL)))
    WHERE value IS NOT NULL AND (is_sale OR e.type NOT GLOB 'subscription.*');

-- A payment keeps the name by which one of them was known first, and a refund counts once.
CREATE TRIGGER payment_events_heard AFTER INSERT ON payment_events BEGIN
    UPDATE payment_events SET payment = coalesce(
        (SELECT payment FROM payment_events WHERE payment IN (SELECT name FROM payment_names WHERE event_id = NEW.id)
            OR transaction_id = NEW.transaction_id AND payment IS NOT NULL ORDER BY id LIMIT 1),
        (SELECT name FROM payment_names WHERE event_id = NEW.id ORDER BY rank LIMIT 1))
    WHERE id = NEW.id AND EXISTS (SELECT 1 FROM payment_names WHERE event_id = NEW.id);
    UPDATE payment_events SET back = back_told
    WHERE id = NEW.id AND NOT EXISTS (SELECT 1 FROM payment_events WHERE refund_id = NEW.refund_id AND back IS NOT NULL);
END;

-- What became clear of one event is so of the others of the same payment, and whose it is of the same subscription.
CREATE TRIGGER payment_events_agree AFTER UPDATE OF entitlement ON payment_events BEGIN
    UPDATE payment_events SET user_id = coalesce(user_id, NEW.user_id),
                              entitlement = iif(payment = NEW.payment, NEW.entitlement, entitlement)
    WHERE payment = NEW.payment AND NEW.entitlement IS NOT NULL
       OR subscription_id = NEW.subscription_id AND user_id IS NULL;
END;

-- Those that Creem knows of, and of which nothing was heard.
CREATE VIEW open_checkouts AS
    SELECT * FROM checkouts c
    WHERE checkout_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM payment_events WHERE request_id = c.id);

-- Whose the subscription and the payment are of which an event tells.
CREATE VIEW payment_owners AS
    SELECT e.id AS event_id, o.user_id FROM payment_events e JOIN payment_events o USING (subscription_id)
        WHERE o.user_id IS NOT NULL
    UNION ALL SELECT e.id, o.user_id FROM payment_events e JOIN payment_events o USING (payment)
        WHERE o.user_id IS NOT NULL;

-- Each event with what can be said of it by now: whose it is, the sale that its payment is known by, and whether it or
-- another tells how much was paid back.  A subscription and a payment stay whose they were; what is new belongs to
-- whom our own checkout names, then to whom its metadata name, then, if money came, to whom the customer is.
CREATE VIEW known_events AS
    SELECT e.id, e.type, e.mode, e.payment, e.is_sale, e.subscription_id, e.product_id, e.units, e.period_start_at,
           coalesce(
               e.user_id,
               (SELECT user_id FROM payment_events WHERE subscription_id = e.subscription_id AND user_id IS NOT NULL),
               (SELECT user_id FROM payment_events WHERE payment = e.payment AND user_id IS NOT NULL),
               (SELECT user_id FROM checkouts WHERE id = e.request_id),
               (SELECT user_id FROM checkouts WHERE checkout_id = e.checkout_id),
               (SELECT id FROM users WHERE id = e.reference),
               (SELECT user_id FROM payment_events WHERE customer_id = e.customer_id AND user_id IS NOT NULL AND e.is_sale)
           ) AS user_id,
           e.product, e.credits, e.promised, e.entitlement, s.entitlement AS sale, s.credits AS sale_credits,
           coalesce(e.back > 0, 0) OR coalesce(e.back_total > 0, 0) OR EXISTS (
               SELECT 1 FROM payment_events WHERE refund_id = e.refund_id AND back IS NOT NULL) AS tells_amount
    FROM payment_events e LEFT JOIN payment_events s ON s.id = (
        SELECT min(id) FROM payment_events WHERE payment = e.payment AND credits IS NOT NULL);

-- What needs attention and may be solved by what became clear of an event: other news of the same purchase.
CREATE VIEW payment_events_waiting AS
    SELECT e.id AS event_id, w.id AS waiting_id FROM payment_events e JOIN payment_events w
        ON w.payment = e.payment OR w.subscription_id = e.subscription_id OR w.customer_id = e.customer_id
    WHERE w.state = 'attention';

-- Each payment, from all that was told of it, and what is left of its credits after what was paid back: rounded
-- half up, and each refund counted once, whether it is told by itself or in a total.
CREATE VIEW payments AS
    SELECT *, credits - iif(paid > 0, (2 * credits * min(back, paid) + paid) / (2 * paid), 0) AS credits_left
    FROM (SELECT min(id) AS id, user_id, entitlement, payment, max(product) AS product, max(subscription_id) AS subscription_id,
                 max(credits) AS credits, max(promised) AS promised, max(currency) AS currency,
                 max(iif(credits IS NULL, NULL, period_end_at)) AS period_end_at,
                 coalesce(max(paid), max(price)) AS paid,
                 max(coalesce(max(back_total), 0), coalesce(sum(back), 0)) AS back, min(occurred_at) AS bought_at,
                 max(order_id) AS order_id, max(transaction_id) AS transaction_id, max(customer_id) AS customer_id
          FROM payment_events WHERE entitlement IS NOT NULL GROUP BY user_id, entitlement, payment);

-- Credits that were granted for money which was paid back.  They are taken from what the user has, now or when
-- there is something; what could not be taken yet is a debt.
CREATE TABLE credit_clawbacks (
    id           INTEGER NOT NULL PRIMARY KEY,
    user_id      TEXT    NOT NULL REFERENCES users(id),
    entitlement  TEXT    NOT NULL,
    event_id     INTEGER NOT NULL REFERENCES payment_events(id),   -- that told of it
    credits      INTEGER NOT NULL CHECK (credits > 0),
    created_at   INTEGER NOT NULL
) STRICT;

CREATE INDEX credit_clawbacks_by_user         ON credit_clawbacks (user_id, credits);
CREATE INDEX credit_clawbacks_by_entitlement  ON credit_clawbacks (entitlement, credits);
CREATE INDEX credit_clawbacks_by_event        ON credit_clawbacks (event_id);

-- What payments were for: of an order its credits are due; of a subscription's period those of the highest plan that was
-- paid for in it, and, while anything of that is left, what a change to a higher one promised on top.  And what was had.
-- With a window, because with GROUP BY the conditions of whoever asks would not reach the index.
CREATE VIEW entitlements AS
    SELECT DISTINCT user_id, entitlement, max(period_end_at) OVER same AS period_end_at,
           coalesce(max(credits_left) OVER same, 0)
           + iif(max(credits_left) OVER same > 0,
                 max(coalesce(max(promised) OVER same, 0) - max(credits) OVER same, 0), 0) AS due,
           (SELECT coalesce(sum(initial), 0) FROM credit_packages WHERE entitlement = p.entitlement)
           - (SELECT coalesce(sum(credits), 0) FROM credit_clawbacks WHERE entitlement = p.entitlement) AS had,
           (SELECT count(*) FROM credit_packages WHERE entitlement = p.entitlement)
           + (SELECT count(*) FROM credit_clawbacks WHERE entitlement = p.entitlement) AS steps
    FROM payments p WINDOW same AS (PARTITION BY user_id, entitlement);

CREATE VIEW debts AS
    SELECT user_id, min(created_at) AS since_at,
           sum(credits) - (SELECT coalesce(sum(credits), 0) FROM credit_transactions
                           WHERE user_id = c.user_id AND kind = 'refund') AS credits
    FROM credit_clawbacks c GROUP BY user_id HAVING credits > 0;

-- How each subscription stands: as its latest event says, whenever that came; an end is final.  It runs while
-- the running period has not been paid back altogether.
CREATE VIEW subscriptions AS
    SELECT subscription_id AS id, user_id, product AS plan, standing AS status, customer_id, period_start_at, period_end_at,
           occurred_at, mode,
           standing IN ('active', 'trialing', 'scheduled_cancel', 'past_due')
           AND coalesce((SELECT sum(initial) FROM credit_packages WHERE entitlement = e.subscription_id || ':' || e.period_start_at)
                        > (SELECT total(credits) FROM credit_clawbacks
                           WHERE entitlement = e.subscription_id || ':' || e.period_start_at),
                        NOT EXISTS (SELECT 1 FROM payment_events WHERE user_id = e.user_id AND credits IS NOT NULL
                                    AND entitlement = e.subscription_id || ':' || e.period_start_at)) AS is_running
    FROM payment_events e
    WHERE id = (SELECT id FROM payment_events WHERE subscription_id = e.subscription_id AND standing IS NOT NULL
                ORDER BY standing = 'canceled' DESC, occurred_at DESC, standing DESC, period_start_at DESC, id DESC LIMIT 1);

----------------------------------------------------------------------------------------- clock --

-- What time it is, as the program says every few minutes; and then what is late happens, by the triggers on it.
-- Only the last time is kept.
CREATE TABLE clock (
    id    INTEGER NOT NULL PRIMARY KEY,
    now   INTEGER NOT NULL,
    kept  INTEGER NOT NULL                              -- how long completed videos are kept
) STRICT;

CREATE TRIGGER clock_forgets AFTER INSERT ON clock BEGIN
    DELETE FROM clock WHERE id <> NEW.id;
    DELETE FROM sessions WHERE expires_at <= NEW.now;
    DELETE FROM sign_in_failures WHERE failed_at <= NEW.now - 86400000;
    DELETE FROM idempotency_keys WHERE created_at <= NEW.now - 604800000;
    DELETE FROM events WHERE created_at <= NEW.now - 604800000 AND id < (SELECT max(id) FROM events);
    UPDATE payment_events SET body = NULL WHERE id IN (
        SELECT id FROM payment_events WHERE body IS NOT NULL AND received_at <= NEW.now - 7776000000 LIMIT 500);
END;

-- People are told a week before what ends.
CREATE TRIGGER clock_warns AFTER INSERT ON clock BEGIN
    UPDATE credit_packages SET warned_at = NEW.now WHERE id IN (
        SELECT id FROM credit_packages WHERE remaining > 0 AND warned_at IS NULL
        AND expires_at BETWEEN NEW.now AND NEW.now + 604800000 LIMIT 500);
    UPDATE videos SET archive_at = max(finished_at + NEW.kept, NEW.now + min(604800000, NEW.kept)), changed_at = NEW.now WHERE id IN (
        SELECT id FROM videos WHERE finished_at IS NOT NULL AND finished_at <= NEW.now + 604800000 - NEW.kept
        AND deleted_at IS NULL AND archive_at IS NULL AND status = 'COMPLETED' LIMIT 500);
END;

-- A clock that was set back since has put these off too far: nothing waits longer than the longest deadline, a day.
CREATE TRIGGER clock_wakes AFTER INSERT ON clock BEGIN
    UPDATE videos SET due_at = NEW.now, deadline_at = min(deadline_at, NEW.now + 86400000), changed_at = NEW.now
    WHERE finished_at IS NULL AND due_at > NEW.now + 86400000;
END;

------------------------------------------------------------------------------------------ jobs --

-- What is done on a schedule.  When it is due, and who is doing it until when, is kept here, so that a job is
-- made up for after the server was away, and two never do it at once.
CREATE TABLE jobs (
    name             TEXT    NOT NULL PRIMARY KEY,
    due_at           INTEGER NOT NULL,
    leased_until_at  INTEGER NOT NULL DEFAULT 0,
    began_at         INTEGER,
    succeeded_at     INTEGER,
    runs             INTEGER NOT NULL DEFAULT 0,
    result           TEXT    NOT NULL DEFAULT '{}' CHECK (json_valid(result))
) STRICT, WITHOUT ROWID;

-- Since when each has not succeeded, and what was wrong with the last: an error, or a fault or a missing file that it found.
CREATE VIEW job_health AS
    SELECT name, coalesce(succeeded_at, began_at, due_at) AS well_at,
           coalesce(result ->> '$.error', result ->> '$.faults[0]', result ->> '$.missing[0]') AS trouble
    FROM jobs;

-- Those that the server cannot do without; well_at is 0 where there is trouble.
CREATE VIEW vital_jobs AS
    SELECT 'last ' || name AS what, iif(trouble IS NULL, well_at, 0) AS well_at,
           coalesce(trouble, datetime(well_at / 1000, 'unixepoch') || '+00:00') AS detail
    FROM job_health WHERE name IN ('audit', 'backup');

---------------------------------------------------------------------------------------- events --

-- What happened, in one order for everyone who listens; a reader who was away goes on from the last id it
-- saw.  Written by triggers, so that nothing happens untold.  Deleted after a week, but for the newest: so ids
-- are never used again.
CREATE TABLE events (
    id          INTEGER NOT NULL PRIMARY KEY,
    user_id     TEXT    NOT NULL REFERENCES users(id),
    type        TEXT    NOT NULL CHECK (type GLOB 'video.*' OR type GLOB 'credits.*'),
    data        TEXT    NOT NULL CHECK (json_valid(data)),
    created_at  INTEGER NOT NULL
) STRICT;

CREATE INDEX events_by_user ON events (user_id, id);
CREATE INDEX events_by_age ON events (created_at);

CREATE TRIGGER videos_tell_new AFTER INSERT ON videos BEGIN
    INSERT INTO events (user_id, type, data, created_at)
    VALUES (NEW.user_id, 'video.pending',
            json_object('videoUuid', NEW.id, 'status', NEW.status, 'progress', NEW.progress), NEW.changed_at);
END;
CREATE TRIGGER videos_tell_changes AFTER UPDATE OF status, progress, deleted_at ON videos
WHEN (NEW.status, NEW.progress, NEW.deleted_at) IS NOT (OLD.status, OLD.progress, OLD.deleted_at) BEGIN
    INSERT INTO events (user_id, type, data, created_at)
    VALUES (NEW.user_id, 'video.' || iif(NEW.deleted_at IS NULL, lower(NEW.status), 'deleted'),
            json_object('videoUuid', NEW.id, 'status', NEW.status, 'progress', NEW.progress), NEW.changed_at);
END;
CREATE TRIGGER transactions_tell AFTER INSERT ON credit_transactions
WHEN NEW.hold_id IS NULL BEGIN
    INSERT INTO events (user_id, type, data, created_at)
    VALUES (NEW.user_id, 'credits.' || rtrim(NEW.kind, 'e') || 'ed',        -- granted, expired, deducted, refunded
            json_object('credits', NEW.credits, 'transType', NEW.trans_type), NEW.created_at);
END;

CREATE TRIGGER packages_tell_their_end AFTER UPDATE OF warned_at ON credit_packages BEGIN
    INSERT INTO events (user_id, type, data, created_at)
    VALUES (NEW.user_id, 'credits.expiring',
            json_object('packageId', NEW.id, 'credits', NEW.remaining,
                        'expiresAt', strftime('%Y-%m-%dT%H:%M:%SZ', NEW.expires_at / 1000, 'unixepoch')), NEW.warned_at);
END;
CREATE TRIGGER videos_tell_their_end AFTER UPDATE OF archive_at ON videos BEGIN
    INSERT INTO events (user_id, type, data, created_at)
    VALUES (NEW.user_id, 'video.expiring',
            json_object('videoUuid', NEW.id,
                        'archiveAt', strftime('%Y-%m-%dT%H:%M:%SZ', NEW.archive_at / 1000, 'unixepoch')), NEW.changed_at);
END;

--------------------------------------------------------------------------------------- reports --

-- What operators ask: GET /api/v1/admin/reports/NAME, newest first by the first column, as JSON or CSV.

CREATE VIEW report_inbox AS         -- what Creem told, and what followed; state = 'attention' wants somebody to decide
    SELECT e.id, e.delivery_key AS event_id, e.type, e.mode, e.state, e.effect, u.email, e.payment, e.subscription_id,
           e.product_id, e.product, e.credits, e.paid, e.back, e.received_at, e.occurred_at, e.body
    FROM payment_events e LEFT JOIN users u ON u.id = e.user_id;

CREATE VIEW report_orders AS        -- payments; cents
    SELECT p.id, p.payment, u.email, p.product, p.subscription_id, p.credits, p.credits_left, p.paid, p.back, p.currency,
           p.bought_at
    FROM payments p JOIN users u ON u.id = p.user_id WHERE p.credits IS NOT NULL;

CREATE VIEW report_subscriptions AS
    SELECT s.id, u.email, s.plan, s.status, s.is_running, s.customer_id, s.period_start_at, s.period_end_at, s.occurred_at
    FROM subscriptions s LEFT JOIN users u ON u.id = s.user_id;

CREATE VIEW report_users AS
    SELECT a.id, a.email, a.plan, a.is_admin, a.is_disputed, a.created_at,
           (SELECT coalesce(sum(remaining), 0) FROM credit_packages WHERE user_id = a.id) AS credits_remaining,
           (SELECT coalesce(sum(used), 0) FROM credit_packages WHERE user_id = a.id) AS credits_used,
           (SELECT count(*) FROM videos WHERE user_id = a.id AND finished_at IS NULL)       -- not deleted; each has its index
           + (SELECT count(*) FROM videos WHERE user_id = a.id AND finished_at IS NOT NULL AND deleted_at IS NULL) AS videos
    FROM accounts a;

CREATE VIEW report_models AS        -- what was charged, and what providers took for it, in whatever they count
    SELECT v.model, count(*) AS videos, sum(v.status = 'COMPLETED') AS completed, sum(v.status = 'FAILED') AS failed,
           sum(iif(v.status = 'COMPLETED', v.credits, 0)) AS credits_charged,
           (SELECT sum(cost) FROM provider_jobs j JOIN videos o ON o.id = j.video_id WHERE o.model = v.model) AS cost
    FROM videos v GROUP BY v.model;

CREATE VIEW report_failures AS      -- by provider, and how it put it
    SELECT max(id) AS id, provider, state, error, count(*) AS times, max(began_at) AS last_at
    FROM provider_jobs WHERE state IN ('failed', 'refused', 'away', 'missing', 'unknown') GROUP BY provider, state, error;

CREATE VIEW report_unearned AS      -- credits that may still be spent, by the month in which they end
    SELECT month || ' ' || trans_type AS id, month, trans_type, sum(remaining + frozen) AS credits, count(*) AS packages
    FROM (SELECT *, coalesce(strftime('%Y-%m', expires_at / 1000, 'unixepoch'), 'never') AS month FROM credit_packages)
    WHERE remaining + frozen > 0 GROUP BY 1;

CREATE VIEW report_debts AS
    SELECT d.user_id, u.email, d.credits, d.since_at FROM debts d JOIN users u ON u.id = d.user_id;

CREATE VIEW report_provider_jobs AS -- orders to providers; state = 'unknown' was sent, and no answer came
    SELECT id, video_uuid, provider, provider_id, state, cost, began_at, taken_at, ended_at, error
    FROM shown_provider_jobs;

--------------------------------------------------------------------------------------- metrics --

-- Rows of the tables from which nothing is ever deleted: a copy that was made later has no fewer.
CREATE VIEW table_rows AS
    SELECT 'users' AS name, count(*) AS number FROM users
    UNION ALL SELECT 'credit_packages', count(*) FROM credit_packages
    UNION ALL SELECT 'credit_holds', count(*) FROM credit_holds
    UNION ALL SELECT 'credit_transactions', count(*) FROM credit_transactions
    UNION ALL SELECT 'videos', count(*) FROM videos
    UNION ALL SELECT 'payment_events', count(*) FROM payment_events;

-- What Prometheus is told of the database; nothing about anybody in particular.  What ends in _total only grows.
CREATE VIEW metrics AS
    SELECT 'videofly_videos' AS name, 'Videos, deleted ones too' AS help,
           json_object('status', status, 'model', model, 'provider', provider) AS labels, count(*) AS number
    FROM videos GROUP BY status, model, provider
    UNION ALL
    SELECT 'videofly_video_seconds_total', 'Time from order to delivery of completed videos',
           json_object('model', model, 'provider', provider), sum(finished_at - created_at) / 1000.0
    FROM videos WHERE status = 'COMPLETED' GROUP BY model, provider
    UNION ALL
    SELECT 'videofly_provider_jobs', 'Orders given to providers, by what became of them',
           json_object('provider', provider, 'state', state), count(*) FROM provider_jobs GROUP BY provider, state
    UNION ALL
    SELECT 'videofly_provider_seconds_total', 'Time that providers had orders which succeeded',
           json_object('provider', provider), total(ended_at - taken_at) / 1000.0
    FROM provider_jobs WHERE state = 'succeeded' GROUP BY provider
    UNION ALL
    SELECT 'videofly_credits_granted_total', 'Credits granted', json_object('trans_type', trans_type), sum(initial)
    FROM credit_packages GROUP BY trans_type
    UNION ALL
    SELECT 'videofly_credits_' || word || '_total', 'Credits ' || word, '{}', coalesce(sum(credits), 0)
    FROM (SELECT 'used' AS word, used AS credits FROM credit_packages
          UNION ALL SELECT 'expired', expired FROM credit_packages UNION ALL SELECT 'refunded', refunded FROM credit_packages
          UNION ALL SELECT 'released', credits FROM credit_holds WHERE state = 'released'
          UNION ALL SELECT value, 0 FROM json_each('["used", "expired", "refunded", "released"]')) GROUP BY word
    UNION ALL
    SELECT 'videofly_credits_outstanding', 'Credits that may still be spent', '{}', coalesce(sum(remaining + frozen), 0)
    FROM credit_packages
    UNION ALL
    SELECT 'videofly_credits_frozen', 'Credits set aside for videos being made', '{}', coalesce(sum(frozen), 0)
    FROM credit_packages
    UNION ALL
    SELECT 'videofly_credits_owed', 'Credits owed after refunds', '{}', coalesce(sum(credits), 0) FROM debts
    UNION ALL
    SELECT 'videofly_payment_events', 'Webhooks of Creem; attention: wait for an operator', json_object('state', word),
           (SELECT count(*) FROM payment_events WHERE state = word)
    FROM (SELECT value AS word FROM json_each('["applied", "attention", "ignored"]'))
    UNION ALL
    SELECT 'videofly_job_runs_total', 'Runs of each scheduled job', json_object('name', name), runs FROM jobs
    UNION ALL
    SELECT 'videofly_job_failing', 'Whether the last run failed, or found faults', json_object('name', name), trouble IS NOT NULL
    FROM job_health
    UNION ALL
    SELECT 'videofly_job_success_timestamp_seconds', 'When each last succeeded; of backup: the last known to restore',
           json_object('name', name), succeeded_at / 1000.0 FROM jobs WHERE succeeded_at IS NOT NULL
    UNION ALL
    SELECT 'videofly_rows', 'Rows by table', json_object('table', name), number FROM table_rows
    ORDER BY name;

--------------------------------------------------------------------------------------- auditor --

-- Empty in a healthy database.  Recounts, by another path than the trigger's, each package and each hold
-- from the journal, each user's running balance, and what finished and unfinished videos may have open; and
-- looks for rows that refer to what is not there.
CREATE VIEW discrepancies AS
    SELECT 'reference from' AS what, "table" || ' to ' || parent AS id, NULL AS user_id FROM pragma_foreign_key_check
    UNION ALL
    SELECT 'package', p.id, p.user_id FROM credit_packages p
    WHERE p.initial   <> (SELECT total(credits) FROM credit_transactions WHERE package_id = p.id AND kind = 'grant')
       OR p.remaining <> (SELECT total(CASE WHEN kind IN ('grant', 'release') THEN credits
                                            WHEN kind = 'settle' THEN 0 ELSE -credits END)
                          FROM credit_transactions WHERE package_id = p.id)
       OR p.frozen    <> (SELECT total(CASE kind WHEN 'freeze' THEN credits ELSE -credits END) FROM credit_transactions
                          WHERE package_id = p.id AND kind IN ('freeze', 'settle', 'release'))
       OR p.expired   <> (SELECT total(credits) FROM credit_transactions WHERE package_id = p.id AND kind = 'expire')
       OR p.refunded  <> (SELECT total(credits) FROM credit_transactions WHERE package_id = p.id AND kind = 'refund')
       OR p.initial   <> p.remaining + p.frozen + p.used + p.expired + p.refunded
    UNION ALL
    SELECT 'hold', h.id, v.user_id FROM credit_holds h JOIN videos v ON v.id = h.video_id
    WHERE h.credits <> (SELECT total(credits) FROM credit_transactions WHERE hold_id = h.id AND kind = 'freeze')
       OR h.credits * (h.state = 'settled')  <> (SELECT total(credits) FROM credit_transactions
                                                 WHERE hold_id = h.id AND kind = 'settle')
       OR h.credits * (h.state = 'released') <> (SELECT total(credits) FROM credit_transactions
                                                 WHERE hold_id = h.id AND kind = 'release')
    UNION ALL
    SELECT 'balance', u.id, u.id FROM users u
    WHERE (SELECT total(remaining) FROM credit_packages WHERE user_id = u.id)
       <> coalesce((SELECT balance_after FROM credit_transactions WHERE user_id = u.id ORDER BY id DESC LIMIT 1), 0)
    UNION ALL
    SELECT 'video', v.id, v.user_id FROM videos v
    WHERE coalesce((SELECT state FROM credit_holds WHERE video_id = v.id AND attempt = v.attempt), 'none')
       <> CASE v.status WHEN 'COMPLETED' THEN 'settled' WHEN 'FAILED' THEN 'released' ELSE 'frozen' END
    UNION ALL
    SELECT 'payment', entitlement, user_id FROM entitlements WHERE due <> had
    UNION ALL
    SELECT 'refund', t.user_id, t.user_id FROM credit_transactions t WHERE t.kind = 'refund' GROUP BY t.user_id
    HAVING sum(t.credits) > (SELECT total(credits) FROM credit_clawbacks WHERE user_id = t.user_id);
