-- A database of version 1, with the books of an ordinary day (test_schema.fill).  The triggers come after the rows.

PRAGMA application_id = 0x56464C59;
PRAGMA user_version   = 1;
CREATE TABLE users (
    id             TEXT    NOT NULL PRIMARY KEY CHECK (id GLOB 'usr_*'),
    email          TEXT    NOT NULL COLLATE NOCASE UNIQUE CHECK (email LIKE '%_@_%' AND length(email) <= 254),
    password_hash  TEXT,
    is_admin       INTEGER NOT NULL DEFAULT 0 CHECK (is_admin IN (0, 1)),
    plan           TEXT,
    debt           INTEGER NOT NULL DEFAULT 0 CHECK (debt >= 0),
    created_at     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX users_admins ON users (created_at) WHERE is_admin = 1;

CREATE VIEW accounts AS SELECT *, password_hash IS NOT NULL AS has_password FROM users;
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
    expires_at       INTEGER,
    spendable_until_at  INTEGER,
    CONSTRAINT conservation CHECK (remaining + frozen + used + expired + refunded IN (0, initial)),
    CHECK ((expires_at IS NULL) = (spendable_until_at IS NULL) AND spendable_until_at >= expires_at)
) STRICT;
CREATE UNIQUE INDEX credit_packages_once  ON credit_packages (trans_type, source_ref);
CREATE INDEX credit_packages_by_user      ON credit_packages (user_id, id);
CREATE INDEX credit_packages_to_expire    ON credit_packages (spendable_until_at) WHERE remaining > 0 AND frozen = 0;
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
CREATE INDEX credit_transactions_by_hold     ON credit_transactions (hold_id, kind, id) WHERE hold_id IS NOT NULL;
CREATE VIEW movements AS
    SELECT t.id, t.user_id, t.trans_type, t.balance_after, t.note, t.created_at, h.video_id AS video_uuid,
           iif(t.kind = 'freeze', h.state, NULL) AS state,
           coalesce(h.credits, t.credits) * iif(t.kind IN ('grant', 'release'), 1, -1) AS credits
    FROM credit_transactions t LEFT JOIN credit_holds h ON h.id = t.hold_id
    WHERE t.kind <> 'settle'
      AND (t.hold_id IS NULL OR t.id = (
          SELECT max(id) FROM credit_transactions WHERE hold_id = t.hold_id AND kind = t.kind));
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
CREATE INDEX videos_due       ON videos (due_at) WHERE due_at IS NOT NULL;
CREATE VIEW shown_videos AS
    SELECT *, id AS video_uuid, credits AS credits_used, cancelled_at AS cancel_requested_at,
           iif(error_code IS NULL, NULL, json_object('code', error_code, 'message', error_message)) AS error,
           storage_key AS video_url, poster_key AS poster_url
    FROM videos;
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
CREATE TABLE events (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id     TEXT    NOT NULL REFERENCES users(id),
    type        TEXT    NOT NULL CHECK (type GLOB 'video.*' OR type GLOB 'credits.*'),
    data        TEXT    NOT NULL CHECK (json_valid(data)),
    created_at  INTEGER NOT NULL
) STRICT;

CREATE INDEX events_by_user ON events (user_id, id);
CREATE VIEW discrepancies AS
    SELECT 'package' AS what, p.id AS id, p.user_id AS user_id FROM credit_packages p
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
       <> CASE v.status WHEN 'COMPLETED' THEN 'settled' WHEN 'FAILED' THEN 'released' ELSE 'frozen' END;

INSERT INTO "api_keys" VALUES('key_f8a46e46f8a4173aeb66','usr_8ea0421e77803118082b','b3639c698e803ca466b791356df342cb557a1adefaca55ec9dceaa5213dbfbd1','API key','8fc8',500,1000,NULL,NULL,NULL);
INSERT INTO "credit_holds" VALUES(1,'running00000000000000000000000000000',1,'key_f8a46e46f8a4173aeb66',20,'v1','frozen',2000,NULL);
INSERT INTO "credit_holds" VALUES(2,'made00000000000000000000000000000000',1,'key_f8a46e46f8a4173aeb66',20,'v1','settled',2000,6000);
INSERT INTO "credit_holds" VALUES(3,'failed000000000000000000000000000000',1,'key_f8a46e46f8a4173aeb66',20,'v1','released',2000,6000);
INSERT INTO "credit_packages" VALUES(1,'usr_8ea0421e77803118082b','NEW_USER','usr_8ea0421e77803118082b',10,0,10,0,0,0,1000,2592001000,2592001000);
INSERT INTO "credit_packages" VALUES(2,'usr_8ea0421e77803118082b','ORDER_PAY','order-1',100,70,10,20,0,0,1000,NULL,NULL);
INSERT INTO "credit_transactions" VALUES(1,'usr_8ea0421e77803118082b',1,NULL,'grant','NEW_USER',10,10,'Welcome gift',1000,'f3fef7ca45b55bc1bb7afa0da1e9cab76b1586f5ddc7d2b0f9cb6bce2e88212d');
INSERT INTO "credit_transactions" VALUES(2,'usr_8ea0421e77803118082b',2,NULL,'grant','ORDER_PAY',100,110,'two films',1000,'673afce49fe62f6b84dfec77fa8530874588dcd1662c98efdf6045e51ed426aa');
INSERT INTO "credit_transactions" VALUES(3,'usr_8ea0421e77803118082b',1,1,'freeze','VIDEO_CONSUME',10,100,'',2000,'2d11c641ab16c19453767023d9d5936973ddf98977455b9e020875b66bb6a773');
INSERT INTO "credit_transactions" VALUES(4,'usr_8ea0421e77803118082b',2,1,'freeze','VIDEO_CONSUME',10,90,'',2000,'bfe7f1e556105d910c8715841327ca4a4ecbb2bd7d2ad354773f7f0425534e90');
INSERT INTO "credit_transactions" VALUES(5,'usr_8ea0421e77803118082b',2,2,'freeze','VIDEO_CONSUME',20,70,'',2000,'bc5eb6770fed5ca58189c629004d55943067b03a826292e16a83201227001280');
INSERT INTO "credit_transactions" VALUES(6,'usr_8ea0421e77803118082b',2,3,'freeze','VIDEO_CONSUME',20,50,'',2000,'6a338a2bfe0a3128421819d9ffdadbfa005726a131190ff48c8a4a0ec3199f1d');
INSERT INTO "credit_transactions" VALUES(7,'usr_8ea0421e77803118082b',2,2,'settle','VIDEO_CONSUME',20,50,'',6000,'ccaa63c172b451b46df702f9c1fe4fef88fc40b2489475f82f7f4271d45b348e');
INSERT INTO "credit_transactions" VALUES(8,'usr_8ea0421e77803118082b',2,3,'release','REFUND',20,70,'',6000,'0605001a59cf13fdeadd3bfb5c6d273c9a0f124cd1ffeaae99f1d706a0349c20');
INSERT INTO "events" VALUES(1,'usr_8ea0421e77803118082b','credits.granted','{"credits":10,"transType":"NEW_USER"}',1000);
INSERT INTO "events" VALUES(2,'usr_8ea0421e77803118082b','credits.granted','{"credits":100,"transType":"ORDER_PAY"}',1000);
INSERT INTO "events" VALUES(3,'usr_8ea0421e77803118082b','video.pending','{"videoUuid":"running00000000000000000000000000000","status":"PENDING","progress":0}',2000);
INSERT INTO "events" VALUES(4,'usr_8ea0421e77803118082b','video.pending','{"videoUuid":"made00000000000000000000000000000000","status":"PENDING","progress":0}',2000);
INSERT INTO "events" VALUES(5,'usr_8ea0421e77803118082b','video.pending','{"videoUuid":"failed000000000000000000000000000000","status":"PENDING","progress":0}',2000);
INSERT INTO "events" VALUES(6,'usr_8ea0421e77803118082b','video.generating','{"videoUuid":"made00000000000000000000000000000000","status":"GENERATING","progress":0}',3000);
INSERT INTO "events" VALUES(7,'usr_8ea0421e77803118082b','video.generating','{"videoUuid":"made00000000000000000000000000000000","status":"GENERATING","progress":50}',4000);
INSERT INTO "events" VALUES(8,'usr_8ea0421e77803118082b','video.uploading','{"videoUuid":"made00000000000000000000000000000000","status":"UPLOADING","progress":100}',5000);
INSERT INTO "events" VALUES(9,'usr_8ea0421e77803118082b','video.completed','{"videoUuid":"made00000000000000000000000000000000","status":"COMPLETED","progress":100}',6000);
INSERT INTO "events" VALUES(10,'usr_8ea0421e77803118082b','video.generating','{"videoUuid":"failed000000000000000000000000000000","status":"GENERATING","progress":0}',3000);
INSERT INTO "events" VALUES(11,'usr_8ea0421e77803118082b','video.generating','{"videoUuid":"failed000000000000000000000000000000","status":"GENERATING","progress":50}',4000);
INSERT INTO "events" VALUES(12,'usr_8ea0421e77803118082b','video.uploading','{"videoUuid":"failed000000000000000000000000000000","status":"UPLOADING","progress":100}',5000);
INSERT INTO "events" VALUES(13,'usr_8ea0421e77803118082b','video.failed','{"videoUuid":"failed000000000000000000000000000000","status":"FAILED","progress":100}',6000);
INSERT INTO "idempotency_keys" VALUES('usr_8ea0421e77803118082b','failed000000000000000000000000000000','request','{"videoUuid":"failed000000000000000000000000000000","status":"PENDING","model":"told","prompt":"a fox","negativePrompt":"","duration":5,"aspectRatio":"16:9","quality":"480p","seed":1,"creditsUsed":20,"progress":0,"createdAt":"1970-01-01T00:00:02Z","finishedAt":null,"width":null,"height":null,"durationMs":null,"sizeBytes":null,"error":null,"cancelRequestedAt":null,"videoUrl":null,"posterUrl":null}',2000);
INSERT INTO "idempotency_keys" VALUES('usr_8ea0421e77803118082b','made00000000000000000000000000000000','request','{"videoUuid":"made00000000000000000000000000000000","status":"PENDING","model":"told","prompt":"a fox","negativePrompt":"","duration":5,"aspectRatio":"16:9","quality":"480p","seed":1,"creditsUsed":20,"progress":0,"createdAt":"1970-01-01T00:00:02Z","finishedAt":null,"width":null,"height":null,"durationMs":null,"sizeBytes":null,"error":null,"cancelRequestedAt":null,"videoUrl":null,"posterUrl":null}',2000);
INSERT INTO "idempotency_keys" VALUES('usr_8ea0421e77803118082b','running00000000000000000000000000000','request','{"videoUuid":"running00000000000000000000000000000","status":"PENDING","model":"told","prompt":"a fox","negativePrompt":"","duration":5,"aspectRatio":"16:9","quality":"480p","seed":1,"creditsUsed":20,"progress":0,"createdAt":"1970-01-01T00:00:02Z","finishedAt":null,"width":null,"height":null,"durationMs":null,"sizeBytes":null,"error":null,"cancelRequestedAt":null,"videoUrl":null,"posterUrl":null}',2000);
INSERT INTO "provider_jobs" VALUES(1,'made00000000000000000000000000000000','scripted',3000,3000,6000,'ref','running',NULL,NULL);
INSERT INTO "provider_jobs" VALUES(2,'failed000000000000000000000000000000','scripted',3000,3000,6000,'ref','running',NULL,'The provider could not make the video.');
INSERT INTO "sessions" VALUES('3f3af1ecebbd1410ab417ec0d27bbfcb5d340e177ae159b59fc8626c2dfd9175','usr_8ea0421e77803118082b',1000,2592001000);
INSERT INTO "uploads" VALUES('uploads/a.png','usr_8ea0421e77803118082b','image/png',1,1000);
INSERT INTO "users" VALUES('usr_8ea0421e77803118082b','ada@example.com',NULL,1,NULL,0,1000);
INSERT INTO "videos" VALUES('failed000000000000000000000000000000','usr_8ea0421e77803118082b','told','scripted','a fox','',5,'16:9','480p',1,'["uploads/a.png"]',20,'FAILED',1,0,100,NULL,62000,3000,NULL,0,NULL,'ref','https://provider.test/x.mp4',NULL,NULL,NULL,NULL,NULL,NULL,NULL,'E5001','The provider could not make the video.',2000,6000,6000,NULL);
INSERT INTO "videos" VALUES('made00000000000000000000000000000000','usr_8ea0421e77803118082b','told','scripted','a fox','',5,'16:9','480p',1,'["uploads/a.png"]',20,'COMPLETED',1,0,100,NULL,62000,3000,NULL,0,NULL,'ref','https://provider.test/x.mp4',NULL,'videos/x.mp4','videos/x.jpg',64,48,500,1000,NULL,NULL,2000,6000,6000,NULL);
INSERT INTO "videos" VALUES('running00000000000000000000000000000','usr_8ea0421e77803118082b','told','scripted','a fox','',5,'16:9','480p',1,'["uploads/a.png"]',20,'PENDING',1,0,0,2000,62000,NULL,NULL,0,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,NULL,2000,2000,NULL,NULL);

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
