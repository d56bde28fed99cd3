-- A database of version 3, with the books of an ordinary day (test_schema.fill).  The triggers come after the rows.

PRAGMA application_id = 0x56464C59;
PRAGMA user_version   = 3;
CREATE TABLE users (
    id             TEXT    NOT NULL PRIMARY KEY CHECK (id GLOB 'usr_*'),
    email          TEXT    NOT NULL COLLATE NOCASE UNIQUE CHECK (email LIKE '%_@_%' AND length(email) <= 254),
    password_hash  TEXT,
    is_admin       INTEGER NOT NULL DEFAULT 0 CHECK (is_admin IN (0, 1)),
    created_at     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX users_admins ON users (created_at) WHERE is_admin = 1;
CREATE VIEW accounts AS
    SELECT *, password_hash IS NOT NULL AS has_password,
           (SELECT plan FROM subscriptions WHERE user_id = users.id AND is_running ORDER BY occurred_at DESC LIMIT 1) AS plan,
           EXISTS (SELECT 1 FROM payment_events WHERE user_id = users.id AND type = 'dispute.created') AS is_disputed,
           (SELECT count(*) FROM videos WHERE user_id = users.id AND finished_at IS NOT NULL AND deleted_at IS NULL
                                              AND archive_at IS NOT NULL) AS archiving_soon
    FROM users;
CREATE TABLE sessions (
    digest      TEXT    NOT NULL PRIMARY KEY CHECK (length(digest) = 64),
    user_id     TEXT    NOT NULL REFERENCES users(id),
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL CHECK (expires_at > created_at)
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_by_user ON sessions (user_id);
CREATE INDEX sessions_by_end  ON sessions (expires_at);
CREATE TABLE api_keys (
    id            TEXT    NOT NULL PRIMARY KEY CHECK (id GLOB 'key_*'),
    user_id       TEXT    NOT NULL REFERENCES users(id),
    digest        TEXT    NOT NULL UNIQUE CHECK (length(digest) = 64),
    name          TEXT    NOT NULL CHECK (length(name) BETWEEN 1 AND 100),
    hint          TEXT    NOT NULL,
    credit_limit  INTEGER          CHECK (credit_limit > 0),
    created_at    INTEGER NOT NULL,
    expires_at    INTEGER,
    last_used_at  INTEGER,
    revoked_at    INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX api_keys_by_user ON api_keys (user_id, created_at);
CREATE VIEW principals AS
    SELECT s.digest, s.user_id, u.is_admin = 1 AS is_admin, CAST(NULL AS TEXT) AS api_key_id,
           s.expires_at AS until_at, CAST(NULL AS INTEGER) AS last_used_at
    FROM sessions s JOIN users u ON u.id = s.user_id
    UNION ALL
    SELECT k.digest, k.user_id, u.is_admin = 1 AND k.credit_limit IS NULL AND k.expires_at IS NULL, k.id,
           k.expires_at, k.last_used_at
    FROM api_keys k JOIN users u ON u.id = k.user_id WHERE k.revoked_at IS NULL;
CREATE TABLE invites (
    digest      TEXT    NOT NULL PRIMARY KEY CHECK (length(digest) = 64),
    created_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE sign_in_failures (
    id          INTEGER NOT NULL PRIMARY KEY,
    subject     TEXT    NOT NULL,
    failed_at   INTEGER NOT NULL
) STRICT;
CREATE INDEX sign_in_failures_by_subject  ON sign_in_failures (subject, failed_at);
CREATE INDEX sign_in_failures_by_age      ON sign_in_failures (failed_at);
CREATE VIEW sign_in_waits AS
    SELECT subject, max(failed_at) + min(1000 << min(count(*) - free, 20), 900000) AS until_at
    FROM (SELECT *, iif(subject GLOB 'account:*', 5, 20) AS free FROM sign_in_failures)
    GROUP BY subject HAVING count(*) >= free;
CREATE TABLE credit_packages (
    id               INTEGER NOT NULL PRIMARY KEY,
    user_id          TEXT    NOT NULL REFERENCES users(id),
    trans_type       TEXT    NOT NULL CHECK (trans_type IN ('NEW_USER', 'ORDER_PAY', 'SUBSCRIPTION', 'SYSTEM_ADJUST')),
    source_ref       TEXT    NOT NULL,
    initial          INTEGER NOT NULL CHECK (initial BETWEEN 1 AND 1000000000),
    remaining        INTEGER NOT NULL DEFAULT 0 CHECK (remaining >= 0),
    frozen           INTEGER NOT NULL DEFAULT 0 CHECK (frozen    >= 0),
    used             INTEGER NOT NULL DEFAULT 0 CHECK (used      >= 0),
    expired          INTEGER NOT NULL DEFAULT 0 CHECK (expired   >= 0),
    refunded         INTEGER NOT NULL DEFAULT 0 CHECK (refunded  >= 0),
    created_at       INTEGER NOT NULL,
    entitlement      TEXT,
    expires_at       INTEGER,
    spendable_until_at  INTEGER,
    warned_at        INTEGER,
    CONSTRAINT conservation CHECK (remaining + frozen + used + expired + refunded IN (0, initial)),
    CHECK ((expires_at IS NULL) = (spendable_until_at IS NULL) AND spendable_until_at >= expires_at)
) STRICT;
CREATE VIEW shown_packages AS SELECT *, spendable_until_at AS spendable_until FROM credit_packages;
CREATE UNIQUE INDEX credit_packages_once  ON credit_packages (trans_type, source_ref);
CREATE INDEX credit_packages_by_user      ON credit_packages (user_id, id);
CREATE INDEX credit_packages_bought       ON credit_packages (entitlement, initial) WHERE entitlement IS NOT NULL;
CREATE INDEX credit_packages_to_expire    ON credit_packages (spendable_until_at) WHERE remaining > 0 AND frozen = 0;
CREATE INDEX credit_packages_to_warn_of   ON credit_packages (expires_at) WHERE remaining > 0 AND warned_at IS NULL;
CREATE TABLE credit_holds (
    id               INTEGER NOT NULL PRIMARY KEY,
    video_id         TEXT    NOT NULL REFERENCES videos(id) DEFERRABLE INITIALLY DEFERRED,
    attempt          INTEGER NOT NULL CHECK (attempt > 0),
    api_key_id       TEXT             REFERENCES api_keys(id),
    credits          INTEGER NOT NULL CHECK (credits > 0),
    catalog_version  TEXT    NOT NULL,
    state            TEXT    NOT NULL DEFAULT 'frozen' CHECK (state IN ('frozen', 'settled', 'released')),
    created_at       INTEGER NOT NULL,
    resolved_at      INTEGER,
    UNIQUE (video_id, attempt),
    CHECK ((state = 'frozen') = (resolved_at IS NULL))
) STRICT;
CREATE INDEX credit_holds_by_key ON credit_holds (api_key_id, state, credits) WHERE api_key_id IS NOT NULL;
CREATE VIEW limited_keys AS
    SELECT k.id, k.credit_limit - (SELECT coalesce(sum(h.credits), 0) FROM credit_holds h
                                   WHERE h.api_key_id = k.id AND h.state <> 'released') AS credits_left
    FROM api_keys k WHERE k.credit_limit IS NOT NULL;
CREATE TABLE credit_transactions (
    id             INTEGER NOT NULL PRIMARY KEY,
    user_id        TEXT    NOT NULL REFERENCES users(id),
    package_id     INTEGER NOT NULL REFERENCES credit_packages(id),
    hold_id        INTEGER          REFERENCES credit_holds(id),
    kind           TEXT    NOT NULL CHECK (kind IN ('grant', 'freeze', 'settle', 'release', 'expire', 'deduct', 'refund')),
    trans_type     TEXT    NOT NULL CHECK (trans_type IN ('NEW_USER', 'ORDER_PAY', 'SUBSCRIPTION', 'VIDEO_CONSUME',
                                                          'REFUND', 'EXPIRED', 'SYSTEM_ADJUST')),
    credits        INTEGER NOT NULL CHECK (credits > 0),
    balance_after  INTEGER NOT NULL CHECK (balance_after >= 0),
    note           TEXT    NOT NULL DEFAULT '',
    created_at     INTEGER NOT NULL,
    hash           TEXT    NOT NULL CHECK (length(hash) = 64),
    CHECK ((kind IN ('freeze', 'settle', 'release')) = (hold_id IS NOT NULL))
) STRICT;
CREATE INDEX credit_transactions_by_user     ON credit_transactions (user_id, id);
CREATE INDEX credit_transactions_by_package  ON credit_transactions (package_id);
CREATE INDEX credit_transactions_refunds     ON credit_transactions (user_id, credits) WHERE kind = 'refund';
CREATE INDEX credit_transactions_by_hold     ON credit_transactions (hold_id, kind, id) WHERE hold_id IS NOT NULL;
CREATE VIEW journal AS
    SELECT (SELECT hash FROM credit_transactions WHERE id = t.id - 1) AS hash_before, t.* FROM credit_transactions t;
CREATE VIEW movements AS
    SELECT t.id, t.user_id, t.trans_type, t.balance_after, t.note, t.created_at, h.video_id AS video_uuid,
           iif(t.kind = 'freeze', h.state, NULL) AS state,
           coalesce(h.credits, t.credits) * iif(t.kind IN ('grant', 'release'), 1, -1) AS credits
    FROM credit_transactions t LEFT JOIN credit_holds h ON h.id = t.hold_id
    WHERE t.kind <> 'settle'
      AND (t.hold_id IS NULL OR t.id = (
          SELECT max(id) FROM credit_transactions WHERE hold_id = t.hold_id AND kind = t.kind));
CREATE VIEW video_transactions AS
    SELECT t.*, h.video_id, h.state, h.created_at AS held_at
    FROM credit_transactions t JOIN credit_holds h ON h.id = t.hold_id;
CREATE VIEW shown_holds AS
    SELECT h.*, (SELECT json_group_array(json_object('packageId', t.package_id, 'credits', t.credits,
                        'expiresAt', strftime('%Y-%m-%dT%H:%M:%SZ', p.expires_at / 1000, 'unixepoch')))
                 FROM credit_transactions t JOIN credit_packages p ON p.id = t.package_id
                 WHERE t.hold_id = h.id AND t.kind = 'freeze') AS draws
    FROM credit_holds h;
CREATE TABLE uploads (
    key         TEXT    NOT NULL PRIMARY KEY CHECK (key GLOB 'uploads/*'),
    user_id     TEXT    NOT NULL REFERENCES users(id),
    media_type  TEXT    NOT NULL CHECK (media_type GLOB 'image/*'),
    size_bytes  INTEGER NOT NULL CHECK (size_bytes > 0),
    created_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX uploads_by_user ON uploads (user_id);
CREATE TABLE videos (
    id               TEXT    NOT NULL PRIMARY KEY CHECK (length(id) = 36),
    user_id          TEXT    NOT NULL REFERENCES users(id),
    model            TEXT    NOT NULL,
    provider         TEXT    NOT NULL,
    prompt           TEXT    NOT NULL CHECK (length(prompt) BETWEEN 1 AND 4000),
    negative_prompt  TEXT    NOT NULL DEFAULT '',
    duration         INTEGER NOT NULL CHECK (duration > 0),
    aspect_ratio     TEXT    NOT NULL,
    quality          TEXT    NOT NULL,
    seed             INTEGER NOT NULL,
    images           TEXT    NOT NULL CHECK (json_valid(images)),
    credits          INTEGER NOT NULL CHECK (credits > 0),
    moderation_id    TEXT,
    status           TEXT    NOT NULL DEFAULT 'PENDING'
                     CHECK (status IN ('PENDING', 'GENERATING', 'UPLOADING', 'COMPLETED', 'FAILED')),
    attempt          INTEGER NOT NULL DEFAULT 1 CHECK (attempt > 0),
    tries            INTEGER NOT NULL DEFAULT 0,
    progress         INTEGER NOT NULL DEFAULT 0 CHECK (progress BETWEEN 0 AND 100),
    due_at           INTEGER,
    deadline_at      INTEGER NOT NULL,
    submitted_at     INTEGER,
    cancelled_at     INTEGER,
    missed           INTEGER NOT NULL DEFAULT 0,
    missed_at        INTEGER,
    ref              TEXT,
    original_url     TEXT,
    original_until_at  INTEGER,
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
    archive_at       INTEGER,
    deleted_at       INTEGER,
    CHECK (ref IS NULL OR submitted_at IS NOT NULL),
    CHECK (status <> 'GENERATING' OR ref IS NOT NULL),
    CHECK (status <> 'UPLOADING'  OR original_url IS NOT NULL),
    CHECK (status <> 'COMPLETED'  OR deleted_at IS NOT NULL OR storage_key IS NOT NULL),
    CHECK ((status IN ('COMPLETED', 'FAILED')) = (finished_at IS NOT NULL)),
    CHECK ((status = 'FAILED') = (error_code IS NOT NULL)),
    CHECK (deleted_at IS NULL OR finished_at IS NOT NULL),
    CHECK (finished_at IS NOT NULL OR due_at IS NOT NULL)
) STRICT, WITHOUT ROWID;
CREATE INDEX videos_running   ON videos (user_id, id) WHERE finished_at IS NULL;
CREATE INDEX videos_finished  ON videos (user_id, id) WHERE finished_at IS NOT NULL AND deleted_at IS NULL;
CREATE INDEX videos_kept      ON videos (status, finished_at) WHERE finished_at IS NOT NULL AND deleted_at IS NULL;
CREATE INDEX videos_due       ON videos (due_at) WHERE due_at IS NOT NULL;
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
CREATE VIEW media AS
    SELECT storage_key AS key, deleted_at IS NULL AS is_wanted FROM videos WHERE storage_key IS NOT NULL
    UNION ALL SELECT poster_key, deleted_at IS NULL FROM videos WHERE poster_key IS NOT NULL
    UNION ALL SELECT key, 1 FROM uploads;
CREATE VIEW stuck_holds AS
    SELECT h.video_id, v.status FROM credit_holds h JOIN videos v ON v.id = h.video_id
    WHERE h.state = 'frozen' AND v.finished_at IS NOT NULL;
CREATE VIEW listed_videos AS
    SELECT * FROM shown_videos WHERE finished_at IS NULL
    UNION ALL
    SELECT * FROM shown_videos WHERE finished_at IS NOT NULL AND deleted_at IS NULL;
CREATE TABLE provider_jobs (
    id           INTEGER NOT NULL PRIMARY KEY,
    video_id     TEXT    NOT NULL REFERENCES videos(id),
    provider     TEXT    NOT NULL,
    began_at     INTEGER NOT NULL,
    taken_at     INTEGER,
    ended_at     INTEGER,
    ref          TEXT,
    state        TEXT    NOT NULL DEFAULT 'unknown' CHECK (state IN ('unknown', 'taken', 'queued', 'running', 'succeeded',
                         'failed', 'canceled', 'missing', 'refused', 'away')),
    cost         REAL,
    error        TEXT
) STRICT;
CREATE INDEX provider_jobs_by_video ON provider_jobs (video_id, id);
CREATE VIEW shown_provider_jobs AS
    SELECT *, video_id AS video_uuid, iif(json_valid(ref), ref ->> 'id', ref) AS provider_id FROM provider_jobs;
CREATE TABLE idempotency_keys (
    user_id      TEXT    NOT NULL REFERENCES users(id),
    key          TEXT    NOT NULL CHECK (length(key) BETWEEN 1 AND 255),
    fingerprint  TEXT    NOT NULL,
    answer       TEXT    NOT NULL CHECK (json_valid(answer)),
    created_at   INTEGER NOT NULL,
    PRIMARY KEY (user_id, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
CREATE TABLE checkouts (
    id           TEXT    NOT NULL PRIMARY KEY CHECK (id GLOB 'chk_*'),
    user_id      TEXT    NOT NULL REFERENCES users(id),
    product      TEXT    NOT NULL,
    units        INTEGER NOT NULL CHECK (units > 0),
    checkout_id  TEXT    UNIQUE,
    url          TEXT,
    created_at   INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX checkouts_by_user ON checkouts (user_id);
CREATE TABLE payment_events (
    id               INTEGER NOT NULL PRIMARY KEY,
    delivery_key     TEXT    NOT NULL UNIQUE,
    body             TEXT,
    received_at      INTEGER NOT NULL,
    type             TEXT    NOT NULL,
    mode             TEXT,
    occurred_at      INTEGER NOT NULL,
    standing         TEXT,
    is_sale          INTEGER NOT NULL CHECK (is_sale IN (0, 1)),
    request_id       TEXT,
    checkout_id      TEXT,
    order_id         TEXT,
    transaction_id   TEXT,
    subscription_id  TEXT,
    customer_id      TEXT,
    reference        TEXT,
    product_id       TEXT,
    units            INTEGER NOT NULL CHECK (units > 0),
    period_start_at  INTEGER,
    period_end_at    INTEGER,
    currency         TEXT,
    price            INTEGER CHECK (price >= 0),
    paid             INTEGER CHECK (paid >= 0),
    back_told        INTEGER CHECK (back_told >= 0),
    back_total       INTEGER CHECK (back_total >= 0),
    refund_id        TEXT,
    payment          TEXT,
    back             INTEGER CHECK (back >= 0),
    user_id          TEXT             REFERENCES users(id),
    product          TEXT,
    credits          INTEGER CHECK (credits > 0),
    promised         INTEGER CHECK (promised > 0),
    entitlement      TEXT,
    state            TEXT    NOT NULL DEFAULT 'attention' CHECK (state IN ('applied', 'attention', 'ignored')),
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
CREATE VIEW payment_names AS
    SELECT e.id AS event_id, key AS rank, value AS name FROM payment_events e, json_each(json_array(
        iif(subscription_id IS NULL, 'order:' || order_id, NULL),
        iif(subscription_id IS NULL, 'checkout:' || checkout_id, NULL),
        'tran:' || transaction_id,
        iif(is_sale OR back_told > 0, 'period:' || subscription_id || ':' || period_start_at, NULL),
        iif(is_sale, 'event:' || delivery_key, NULL)))
    WHERE value IS NOT NULL AND (is_sale OR e.type NOT GLOB 'subscription.*');
CREATE VIEW open_checkouts AS
    SELECT * FROM checkouts c
    WHERE checkout_id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM payment_events WHERE request_id = c.id);
CREATE VIEW payment_owners AS
    SELECT e.id AS event_id, o.user_id FROM payment_events e JOIN payment_events o USING (subscription_id)
        WHERE o.user_id IS NOT NULL
    UNION ALL SELECT e.id, o.user_id FROM payment_events e JOIN payment_events o USING (payment)
        WHERE o.user_id IS NOT NULL;
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
CREATE VIEW payment_events_waiting AS
    SELECT e.id AS event_id, w.id AS waiting_id FROM payment_events e JOIN payment_events w
        ON w.payment = e.payment OR w.subscription_id = e.subscription_id OR w.customer_id = e.customer_id
    WHERE w.state = 'attention';
CREATE VIEW payments AS
    SELECT *, credits - iif(paid > 0, (2 * credits * min(back, paid) + paid) / (2 * paid), 0) AS credits_left
    FROM (SELECT min(id) AS id, user_id, entitlement, payment, max(product) AS product, max(subscription_id) AS subscription_id,
                 max(credits) AS credits, max(promised) AS promised, max(currency) AS currency,
                 max(iif(credits IS NULL, NULL, period_end_at)) AS period_end_at,
                 coalesce(max(paid), max(price)) AS paid,
                 max(coalesce(max(back_total), 0), coalesce(sum(back), 0)) AS back, min(occurred_at) AS bought_at,
                 max(order_id) AS order_id, max(transaction_id) AS transaction_id, max(customer_id) AS customer_id
          FROM payment_events WHERE entitlement IS NOT NULL GROUP BY user_id, entitlement, payment);
CREATE TABLE credit_clawbacks (
    id           INTEGER NOT NULL PRIMARY KEY,
    user_id      TEXT    NOT NULL REFERENCES users(id),
    entitlement  TEXT    NOT NULL,
    event_id     INTEGER NOT NULL REFERENCES payment_events(id),
    credits      INTEGER NOT NULL CHECK (credits > 0),
    created_at   INTEGER NOT NULL
) STRICT;
CREATE INDEX credit_clawbacks_by_user         ON credit_clawbacks (user_id, credits);
CREATE INDEX credit_clawbacks_by_entitlement  ON credit_clawbacks (entitlement, credits);
CREATE INDEX credit_clawbacks_by_event        ON credit_clawbacks (event_id);
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
CREATE TABLE clock (
    id    INTEGER NOT NULL PRIMARY KEY,
    now   INTEGER NOT NULL,
    kept  INTEGER NOT NULL
) STRICT;
CREATE TABLE jobs (
    name             TEXT    NOT NULL PRIMARY KEY,
    due_at           INTEGER NOT NULL,
    leased_until_at  INTEGER NOT NULL DEFAULT 0,
    began_at         INTEGER,
    succeeded_at     INTEGER,
    runs             INTEGER NOT NULL DEFAULT 0,
    result           TEXT    NOT NULL DEFAULT '{}' CHECK (json_valid(result))
) STRICT, WITHOUT ROWID;
CREATE VIEW job_health AS
    SELECT name, coalesce(succeeded_at, began_at, due_at) AS well_at,
           coalesce(result ->> '$.error', result ->> '$.faults[0]', result ->> '$.missing[0]') AS trouble
    FROM jobs;
CREATE VIEW vital_jobs AS
    SELECT 'last ' || name AS what, iif(trouble IS NULL, well_at, 0) AS well_at,
           coalesce(trouble, datetime(well_at / 1000, 'unixepoch') || '+00:00') AS detail
    FROM job_health WHERE name IN ('audit', 'backup');
CREATE TABLE events (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id     TEXT    NOT NULL REFERENCES users(id),
    type        TEXT    NOT NULL CHECK (type GLOB 'video.*' OR type GLOB 'credits.*'),
    data        TEXT    NOT NULL CHECK (json_valid(data)),
    created_at  INTEGER NOT NULL
) STRICT;
CREATE INDEX events_by_user ON events (user_id, id);
CREATE INDEX events_by_age ON events (created_at);
CREATE VIEW report_inbox AS
    SELECT e.id, e.delivery_key AS event_id, e.type, e.mode, e.state, e.effect, u.email, e.payment, e.subscription_id,
           e.product_id, e.product, e.credits, e.paid, e.back, e.received_at, e.occurred_at, e.body
    FROM payment_events e LEFT JOIN users u ON u.id = e.user_id;
CREATE VIEW report_orders AS
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
           (SELECT count(*) FROM videos WHERE user_id = a.id) AS videos
    FROM accounts a;
CREATE VIEW report_models AS
    SELECT v.model, count(*) AS videos, sum(v.status = 'COMPLETED') AS completed, sum(v.status = 'FAILED') AS failed,
           sum(iif(v.status = 'COMPLETED', v.credits, 0)) AS credits_charged,
           (SELECT sum(cost) FROM provider_jobs j JOIN videos o ON o.id = j.video_id WHERE o.model = v.model) AS cost
    FROM videos v GROUP BY v.model;
CREATE VIEW report_failures AS
    SELECT max(id) AS id, provider, state, error, count(*) AS times, max(began_at) AS last_at
    FROM provider_jobs WHERE state IN ('failed', 'refused', 'away', 'missing', 'unknown') GROUP BY provider, state, error;
CREATE VIEW report_unearned AS
    SELECT month || ' ' || trans_type AS id, month, trans_type, sum(remaining + frozen) AS credits, count(*) AS packages
    FROM (SELECT *, coalesce(strftime('%Y-%m', expires_at / 1000, 'unixepoch'), 'never') AS month FROM credit_packages)
    WHERE remaining + frozen > 0 GROUP BY 1;
CREATE VIEW report_debts AS
    SELECT d.user_id, u.email, d.credits, d.since_at FROM debts d JOIN users u ON u.id = d.user_id;
CREATE VIEW report_provider_jobs AS
    SELECT id, video_uuid, provider, provider_id, state, cost, began_at, taken_at, ended_at, error
    FROM shown_provider_jobs;
CREATE VIEW table_rows AS
    SELECT 'users' AS name, count(*) AS number FROM users
    UNION ALL SELECT 'credit_packages', count(*) FROM credit_packages
    UNION ALL SELECT 'credit_holds', count(*) FROM credit_holds
    UNION ALL SELECT 'credit_transactions', count(*) FROM credit_transactions
    UNION ALL SELECT 'videos', count(*) FROM videos
    UNION ALL SELECT 'payment_events', count(*) FROM payment_events;
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
INSERT INTO "api_keys" VALUES('key_d482ed0b08610fd6d7bb','usr_562de3ac4e7e3f057879','ebdb526728c002141ce130a4fd4b4a387786ea29580b5f56383ff26b161858ad','API key','d95a',500,1000,NULL,NULL,NULL);
INSERT INTO "checkouts" VALUES('chk_1','usr_562de3ac4e7e3f057879','pack',1,NULL,NULL,1000);
INSERT INTO "clock" VALUES(1,1500,7776000000);
INSERT INTO "credit_clawbacks" VALUES(1,'usr_562de3ac4e7e3f057879','order:ord_1',2,10,1000);
INSERT INTO "credit_clawbacks" VALUES(2,'usr_562de3ac4e7e3f057879','order:ord_1',3,20,1000);
INSERT INTO "credit_holds" VALUES(1,'running00000000000000000000000000000',1,'key_d482ed0b08610fd6d7bb',20,'v1','frozen',2000,NULL);
INSERT INTO "credit_holds" VALUES(2,'made00000000000000000000000000000000',1,'key_d482ed0b08610fd6d7bb',20,'v1','settled',2000,6000);
INSERT INTO "credit_holds" VALUES(3,'failed000000000000000000000000000000',1,'key_d482ed0b08610fd6d7bb',20,'v1','released',2000,6000);
INSERT INTO "credit_packages" VALUES(1,'usr_562de3ac4e7e3f057879','NEW_USER','usr_562de3ac4e7e3f057879',10,0,10,0,0,0,1000,NULL,2592001000,2592001000,NULL);
INSERT INTO "credit_packages" VALUES(2,'usr_562de3ac4e7e3f057879','ORDER_PAY','order-1',100,70,10,20,0,0,1000,NULL,NULL,NULL,NULL);
INSERT INTO "credit_packages" VALUES(3,'usr_562de3ac4e7e3f057879','ORDER_PAY','order:ord_1',30,0,0,0,0,30,1000,'order:ord_1',31536001000,31536001000,NULL);
INSERT INTO "credit_transactions" VALUES(1,'usr_562de3ac4e7e3f057879',1,NULL,'grant','NEW_USER',10,10,'Welcome gift',1000,'66e2b8756c313784b0cfb6b540ae6f95398a8f5a6050a2a88895041f2a2481cf');
INSERT INTO "credit_transactions" VALUES(2,'usr_562de3ac4e7e3f057879',2,NULL,'grant','ORDER_PAY',100,110,'two films',1000,'1d063830f5f1239d1df2c22c651c43e5a80707b6fc8df7421cdee93366fd55ea');
INSERT INTO "credit_transactions" VALUES(3,'usr_562de3ac4e7e3f057879',3,NULL,'grant','ORDER_PAY',30,140,'pack',1000,'264f37e7c6107ad25d8e2692b6a4c72bfe9d0b262ba85ace56355f9a8833c22d');
INSERT INTO "credit_transactions" VALUES(4,'usr_562de3ac4e7e3f057879',3,NULL,'refund','REFUND',10,130,'Payment refunded',1000,'15549a35a24c61729c136a05ca5f0c052bf38f40e475d779b2ad95b65690eca3');
INSERT INTO "credit_transactions" VALUES(5,'usr_562de3ac4e7e3f057879',3,NULL,'refund','REFUND',20,110,'Payment refunded',1000,'629b7cd3c36aecb796abc7c199ae17bb33ccfbef78c0d854a2098d687566024c');
INSERT INTO "credit_transactions" VALUES(6,'usr_562de3ac4e7e3f057879',1,1,'freeze','VIDEO_CONSUME',10,100,'',2000,'75c7e217e22870f4778fde035af63318d56410141b94c3111b7fb045f4cba94a');
INSERT INTO "credit_transactions" VALUES(7,'usr_562de3ac4e7e3f057879',2,1,'freeze','VIDEO_CONSUME',10,90,'',2000,'e5ea220cf1d81636438c0886087ad80c17bd831925d8341012cd4dd0c93f1552');
INSERT INTO "credit_transactions" VALUES(8,'usr_562de3ac4e7e3f057879',2,2,'freeze','VIDEO_CONSUME',20,70,'',2000,'02c0b4e94d4f048861c837ed954a2224cda937cdb45067a28cb8b4d59ed9f064');
INSERT INTO "credit_transactions" VALUES(9,'usr_562de3ac4e7e3f057879',2,3,'freeze','VIDEO_CONSUME',20,50,'',2000,'bc151fd45a83e30073b527c114cb574287c357268a82a3b1ae729a18520cda94');
INSERT INTO "credit_transactions" VALUES(10,'usr_562de3ac4e7e3f057879',2,2,'settle','VIDEO_CONSUME',20,50,'',6000,'d77c0d4cdc3c238ccd3c32653499dd53c407baf9238ff33748242a9a57555e6c');
INSERT INTO "credit_transactions" VALUES(11,'usr_562de3ac4e7e3f057879',2,3,'release','REFUND',20,70,'',6000,'8a1ac55ff98c8067265c7bbae2919e26b638aeaeb3774a7d41212bc581f78fbb');
INSERT INTO "events" VALUES(1,'usr_562de3ac4e7e3f057879','credits.granted','{"credits":10,"transType":"NEW_USER"}',1000);
INSERT INTO "events" VALUES(2,'usr_562de3ac4e7e3f057879','credits.granted','{"credits":100,"transType":"ORDER_PAY"}',1000);
INSERT INTO "events" VALUES(3,'usr_562de3ac4e7e3f057879','credits.granted','{"credits":30,"transType":"ORDER_PAY"}',1000);
INSERT INTO "events" VALUES(4,'usr_562de3ac4e7e3f057879','credits.refunded','{"credits":10,"transType":"REFUND"}',1000);
INSERT INTO "events" VALUES(5,'usr_562de3ac4e7e3f057879','credits.refunded','{"credits":20,"transType":"REFUND"}',1000);
INSERT INTO "events" VALUES(6,'usr_562de3ac4e7e3f057879','video.pending','{"videoUuid":"running00000000000000000000000000000","status":"PENDING","progress":0}',2000);
INSERT INTO "events" VALUES(7,'usr_562de3ac4e7e3f057879','video.pending','{"videoUuid":"made00000000000000000000000000000000","status":"PENDING","progress":0}',2000);
INSERT INTO "events" VALUES(8,'usr_562de3ac4e7e3f057879','video.pending','{"videoUuid":"failed000000000000000000000000000000","status":"PENDING","progress":0}',2000);
INSERT INTO "events" VALUES(9,'usr_562de3ac4e7e3f057879','video.generating','{"videoUuid":"made00000000000000000000000000000000","status":"GENERATING","progress":0}',3000);
INSERT INTO "events" VALUES(10,'usr_562de3ac4e7e3f057879','video.generating','{"videoUuid":"made00000000000000000000000000000000","status":"GENERATING","progress":50}',4000);
INSERT INTO "events" VALUES(11,'usr_562de3ac4e7e3f057879','video.uploading','{"videoUuid":"made00000000000000000000000000000000","status":"UPLOADING","progress":100}',5000);
INSERT INTO "events" VALUES(12,'usr_562de3ac4e7e3f057879','video.completed','{"videoUuid":"made00000000000000000000000000000000","status":"COMPLETED","progress":100}',6000);
INSERT INTO "events" VALUES(13,'usr_562de3ac4e7e3f057879','video.generating','{"videoUuid":"failed000000000000000000000000000000","status":"GENERATING","progress":0}',3000);
INSERT INTO "events" VALUES(14,'usr_562de3ac4e7e3f057879','video.generating','{"videoUuid":"failed000000000000000000000000000000","status":"GENERATING","progress":50}',4000);
INSERT INTO "events" VALUES(15,'usr_562de3ac4e7e3f057879','video.uploading','{"videoUuid":"failed000000000000000000000000000000","status":"UPLOADING","progress":100}',5000);
INSERT INTO "events" VALUES(16,'usr_562de3ac4e7e3f057879','video.failed','{"videoUuid":"failed000000000000000000000000000000","status":"FAILED","progress":100}',6000);
INSERT INTO "idempotency_keys" VALUES('usr_562de3ac4e7e3f057879','failed000000000000000000000000000000','request','{"videoUuid":"failed000000000000000000000000000000","status":"PENDING","model":"told","prompt":"a fox","negativePrompt":"","duration":5,"aspectRatio":"16:9","quality":"480p","seed":1,"creditsUsed":20,"progress":0,"createdAt":"1970-01-01T00:00:02Z","finishedAt":null,"width":null,"height":null,"durationMs":null,"sizeBytes":null,"error":null,"cancelRequestedAt":null,"videoUrl":null,"posterUrl":null}',2000);
INSERT INTO "idempotency_keys" VALUES('usr_562de3ac4e7e3f057879','made00000000000000000000000000000000','request','{"videoUuid":"made00000000000000000000000000000000","status":"PENDING","model":"told","prompt":"a fox","negativePrompt":"","duration":5,"aspectRatio":"16:9","quality":"480p","seed":1,"creditsUsed":20,"progress":0,"createdAt":"1970-01-01T00:00:02Z","finishedAt":null,"width":null,"height":null,"durationMs":null,"sizeBytes":null,"error":null,"cancelRequestedAt":null,"videoUrl":null,"posterUrl":null}',2000);
INSERT INTO "idempotency_keys" VALUES('usr_562de3ac4e7e3f057879','running00000000000000000000000000000','request','{"videoUuid":"running00000000000000000000000000000","status":"PENDING","model":"told","prompt":"a fox","negativePrompt":"","duration":5,"aspectRatio":"16:9","quality":"480p","seed":1,"creditsUsed":20,"progress":0,"createdAt":"1970-01-01T00:00:02Z","finishedAt":null,"width":null,"height":null,"durationMs":null,"sizeBytes":null,"error":null,"cancelRequestedAt":null,"videoUrl":null,"posterUrl":null}',2000);
INSERT INTO "jobs" VALUES('backup',9000,0,NULL,NULL,0,'{}');
INSERT INTO "payment_events" VALUES(1,'evt_0','{"id":"evt_0","eventType":"checkout.completed","object":{"id":"ch_1","request_id":"chk_1","order":{"id":"ord_1","type":"onetime","amount_paid":300,"product":"pack"},"status":"completed"}}',1000,'checkout.completed',NULL,1000,NULL,1,'chk_1','ch_1','ord_1',NULL,NULL,NULL,NULL,'pack',1,NULL,NULL,NULL,NULL,300,NULL,NULL,NULL,'order:ord_1',NULL,'usr_562de3ac4e7e3f057879','pack',30,NULL,'order:ord_1','applied','30 credits granted.');
INSERT INTO "payment_events" VALUES(2,'evt_1','{"id":"evt_1","eventType":"refund.created","object":{"status":"succeeded","order":{"id":"ord_1","type":"onetime","amount_paid":300,"product":"pack"},"refund_amount":100,"id":"ref_1"}}',1000,'refund.created',NULL,1000,NULL,0,NULL,NULL,'ord_1',NULL,NULL,NULL,NULL,'pack',1,NULL,NULL,NULL,NULL,300,100,NULL,'ref_1','order:ord_1',100,'usr_562de3ac4e7e3f057879','pack',NULL,NULL,'order:ord_1','applied','10 credits to be taken back: 10 were there, 0 are owed.');
INSERT INTO "payment_events" VALUES(3,'evt_2','{"id":"evt_2","eventType":"refund.created","object":{"status":"succeeded","order":{"id":"ord_1","type":"onetime","amount_paid":300,"product":"pack"},"refund_amount":200,"id":"ref_2"}}',1000,'refund.created',NULL,1000,NULL,0,NULL,NULL,'ord_1',NULL,NULL,NULL,NULL,'pack',1,NULL,NULL,NULL,NULL,300,200,NULL,'ref_2','order:ord_1',200,'usr_562de3ac4e7e3f057879','pack',NULL,NULL,'order:ord_1','applied','20 credits to be taken back: 20 were there, 0 are owed.');
INSERT INTO "provider_jobs" VALUES(1,'made00000000000000000000000000000000','scripted',3000,3000,6000,'ref','running',NULL,NULL);
INSERT INTO "provider_jobs" VALUES(2,'failed000000000000000000000000000000','scripted',3000,3000,6000,'ref','running',NULL,'The provider could not make the video.');
INSERT INTO "sessions" VALUES('3f3af1ecebbd1410ab417ec0d27bbfcb5d340e177ae159b59fc8626c2dfd9175','usr_562de3ac4e7e3f057879',1000,2592001000);
INSERT INTO "uploads" VALUES('uploads/a.png','usr_562de3ac4e7e3f057879','image/png',1,1000);
INSERT INTO "users" VALUES('usr_562de3ac4e7e3f057879','ada@example.com',NULL,1,1000);
INSERT INTO "videos" VALUES('failed000000000000000000000000000000','usr_562de3ac4e7e3f057879','told','scripted','a fox','',5,'16:9','480p',1,'["uploads/a.png"]',20,NULL,'FAILED',1,0,100,NULL,62000,3000,NULL,0,NULL,'ref','https://provider.test/x.mp4',NULL,NULL,NULL,NULL,NULL,NULL,NULL,'E5001','The provider could not make the video.',2000,6000,6000,NULL,NULL);
INSERT INTO "videos" VALUES('made00000000000000000000000000000000','usr_562de3ac4e7e3f057879','told','scripted','a fox','',5,'16:9','480p',1,'["uploads/a.png"]',20,NULL,'COMPLETED',1,0,100,NULL,62000,3000,NULL,0,NULL,'ref','https://provider.test/x.mp4',NULL,'videos/x.mp4','videos/x.jpg',64,48,500,1000,NULL,NULL,2000,6000,6000,NULL,NULL);
INSERT INTO "videos" VALUES('running00000000000000000000000000000','usr_562de3ac4e7e3f057879','told','scripted','a fox','',5,'16:9','480p',1,'["uploads/a.png"]',20,NULL,'PENDING',1,0,0,2000,62000,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,2000,2000,NULL,NULL,NULL);
CREATE TRIGGER users_sign_out AFTER UPDATE OF password_hash ON users BEGIN
    DELETE FROM sessions WHERE user_id = NEW.id;
END;
CREATE TRIGGER credit_holds_one_at_a_time BEFORE INSERT ON credit_holds
WHEN EXISTS (SELECT 1 FROM credit_holds WHERE video_id = NEW.video_id AND state = 'frozen') BEGIN
    SELECT RAISE(ABORT, 'video_has_an_open_hold');
END;
CREATE TRIGGER credit_holds_end_once BEFORE UPDATE ON credit_holds WHEN OLD.state <> 'frozen' BEGIN
    SELECT RAISE(ABORT, 'hold_already_ended');
END;
CREATE TRIGGER transactions_apply AFTER INSERT ON credit_transactions BEGIN
    UPDATE credit_packages SET
        remaining = remaining + CASE WHEN NEW.kind IN ('grant', 'release') THEN NEW.credits
                                     WHEN NEW.kind IN ('freeze', 'expire', 'deduct', 'refund') THEN -NEW.credits ELSE 0 END,
        frozen    = frozen    + CASE WHEN NEW.kind = 'freeze' THEN NEW.credits
                                     WHEN NEW.kind IN ('settle', 'release') THEN -NEW.credits ELSE 0 END,
        used      = used      + CASE WHEN NEW.kind IN ('settle', 'deduct') THEN NEW.credits ELSE 0 END,
        expired   = expired   + CASE WHEN NEW.kind = 'expire' THEN NEW.credits ELSE 0 END,
        refunded  = refunded  + CASE WHEN NEW.kind = 'refund' THEN NEW.credits ELSE 0 END
    WHERE id = NEW.package_id AND user_id = NEW.user_id;
END;
CREATE TRIGGER transactions_one_by_one BEFORE INSERT ON credit_transactions
WHEN NEW.id IS NOT (SELECT coalesce(max(id), 0) + 1 FROM credit_transactions) BEGIN
    SELECT RAISE(ABORT, 'the_journal_has_no_gaps');
END;
CREATE TRIGGER transactions_no_update BEFORE UPDATE ON credit_transactions BEGIN
    SELECT RAISE(ABORT, 'the_journal_is_append_only');
END;
CREATE TRIGGER transactions_no_delete BEFORE DELETE ON credit_transactions BEGIN
    SELECT RAISE(ABORT, 'the_journal_is_append_only');
END;
CREATE TRIGGER provider_jobs_begin AFTER UPDATE OF submitted_at ON videos
WHEN NEW.submitted_at IS NOT NULL AND OLD.submitted_at IS NULL BEGIN
    INSERT INTO provider_jobs (video_id, provider, began_at) VALUES (NEW.id, NEW.provider, NEW.submitted_at);
END;
CREATE TRIGGER provider_jobs_taken AFTER UPDATE OF ref ON videos WHEN NEW.ref IS NOT OLD.ref BEGIN
    UPDATE provider_jobs SET ref = NEW.ref, taken_at = NEW.changed_at, state = 'taken'
    WHERE id = (SELECT max(id) FROM provider_jobs WHERE video_id = NEW.id);
    UPDATE videos SET due_at = NEW.changed_at WHERE id = NEW.id AND cancelled_at IS NOT NULL;
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
CREATE TRIGGER payment_events_heard AFTER INSERT ON payment_events BEGIN
    UPDATE payment_events SET payment = coalesce(
        (SELECT payment FROM payment_events WHERE payment IN (SELECT name FROM payment_names WHERE event_id = NEW.id)
            OR transaction_id = NEW.transaction_id AND payment IS NOT NULL ORDER BY id LIMIT 1),
        (SELECT name FROM payment_names WHERE event_id = NEW.id ORDER BY rank LIMIT 1))
    WHERE id = NEW.id AND EXISTS (SELECT 1 FROM payment_names WHERE event_id = NEW.id);
    UPDATE payment_events SET back = back_told
    WHERE id = NEW.id AND NOT EXISTS (SELECT 1 FROM payment_events WHERE refund_id = NEW.refund_id AND back IS NOT NULL);
END;
CREATE TRIGGER payment_events_agree AFTER UPDATE OF entitlement ON payment_events BEGIN
    UPDATE payment_events SET user_id = coalesce(user_id, NEW.user_id),
                              entitlement = iif(payment = NEW.payment, NEW.entitlement, entitlement)
    WHERE payment = NEW.payment AND NEW.entitlement IS NOT NULL
       OR subscription_id = NEW.subscription_id AND user_id IS NULL;
END;
CREATE TRIGGER clock_forgets AFTER INSERT ON clock BEGIN
    DELETE FROM clock WHERE id <> NEW.id;
    DELETE FROM sessions WHERE expires_at <= NEW.now;
    DELETE FROM sign_in_failures WHERE failed_at <= NEW.now - 86400000;
    DELETE FROM idempotency_keys WHERE created_at <= NEW.now - 604800000;
    DELETE FROM events WHERE created_at <= NEW.now - 604800000 AND id < (SELECT max(id) FROM events);
    UPDATE payment_events SET body = NULL WHERE id IN (
        SELECT id FROM payment_events WHERE body IS NOT NULL AND received_at <= NEW.now - 7776000000 LIMIT 500);
END;
CREATE TRIGGER clock_warns AFTER INSERT ON clock BEGIN
    UPDATE credit_packages SET warned_at = NEW.now WHERE id IN (
        SELECT id FROM credit_packages WHERE remaining > 0 AND warned_at IS NULL
        AND expires_at BETWEEN NEW.now AND NEW.now + 604800000 LIMIT 500);
    UPDATE videos SET archive_at = max(finished_at + NEW.kept, NEW.now + min(604800000, NEW.kept)), changed_at = NEW.now WHERE id IN (
        SELECT id FROM videos WHERE finished_at IS NOT NULL AND finished_at <= NEW.now + 604800000 - NEW.kept
        AND deleted_at IS NULL AND archive_at IS NULL AND status = 'COMPLETED' LIMIT 500);
END;
CREATE TRIGGER clock_wakes AFTER INSERT ON clock BEGIN
    UPDATE videos SET due_at = NEW.now, deadline_at = min(deadline_at, NEW.now + 86400000), changed_at = NEW.now
    WHERE finished_at IS NULL AND due_at > NEW.now + 86400000;
END;
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
WHEN NEW.kind IN ('grant', 'expire', 'deduct', 'refund') BEGIN
    INSERT INTO events (user_id, type, data, created_at)
    VALUES (NEW.user_id, 'credits.' || rtrim(NEW.kind, 'e') || 'ed',
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
