-- Streams of events that take effect strictly in order per key. The rows here are the truth; messages only wake.

-- What routes a stream's messages. Only locality depends on it, never order.
CREATE TABLE stream (
    stream text COLLATE "C" PRIMARY KEY,
    -- A key belongs to the shard hash(key) % shards.
    shards integer NOT NULL CHECK (shards BETWEEN 1 AND 256),
    -- Queues that exist: more than there are shards while a smaller number is being brought about.
    queues integer NOT NULL CHECK (queues >= shards)
);
INSERT INTO stream (stream, shards, queues) VALUES ('account_event', 16, 16);

-- The newest sequence of each key. Its row lock, held to the commit, makes sequences dense and equal to commit order.
CREATE TABLE stream_head (
    stream text COLLATE "C" NOT NULL,
    key    text COLLATE "C" NOT NULL,
    seq    bigint NOT NULL CHECK (seq > 0),
    PRIMARY KEY (stream, key)
) WITH (fillfactor = 70);

CREATE TABLE stream_event (
    stream       text COLLATE "C" NOT NULL,
    key          text COLLATE "C" NOT NULL,
    seq          bigint NOT NULL,
    key_hash     integer NOT NULL CHECK (key_hash >= 0),
    payload      json NOT NULL,
    generated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    processed_at timestamptz,
    -- The process that applied it, or the operator who skipped it.
    worker       text,
    outcome      text CHECK (outcome IN ('applied', 'skipped')),
    PRIMARY KEY (stream, key, seq),
    CHECK ((processed_at IS NULL) = (outcome IS NULL))
);
CREATE INDEX stream_event_pending ON stream_event (stream, key, seq) INCLUDE (key_hash) WHERE processed_at IS NULL;

-- How far each key has come.
CREATE TABLE stream_cursor (
    stream     text COLLATE "C" NOT NULL,
    key        text COLLATE "C" NOT NULL,
    -- The last event that took effect.
    seq        bigint NOT NULL DEFAULT 0,
    -- Goes up whenever an operator changes what is next: whoever read it before that can't move the cursor any more.
    revision   integer NOT NULL DEFAULT 0,
    -- Attempts at the next event that failed.
    attempts   integer NOT NULL DEFAULT 0,
    -- Attempts at it that began on record and haven't ended: their process died, or they are under way.
    deaths     integer NOT NULL DEFAULT 0,
    retry_at   timestamptz,
    parked_at  timestamptz,
    last_error text,
    PRIMARY KEY (stream, key)
) WITH (fillfactor = 70);
CREATE INDEX stream_cursor_parked ON stream_cursor (stream, parked_at) WHERE parked_at IS NOT NULL;

-- What operators did to parked keys.
CREATE TABLE stream_change (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stream     text COLLATE "C" NOT NULL,
    key        text COLLATE "C" NOT NULL,
    seq        bigint NOT NULL,
    action     text NOT NULL CHECK (action IN ('retry', 'skip', 'replace')),
    -- Why the key was parked.
    last_error text,
    -- What `replace` replaced.
    payload    json,
    changed_by text NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX stream_change_key ON stream_change (stream, key, id);

-- Who may work on what, for how long.
CREATE TABLE lease (
    resource   text PRIMARY KEY,
    -- Null: nobody; it was given back.
    holder     text,
    expires_at timestamptz NOT NULL
);

-- Who shares the leases of a service, the holders of none included.
CREATE TABLE member (
    service text NOT NULL,
    holder  text NOT NULL,
    seen_at timestamptz NOT NULL,
    PRIMARY KEY (service, holder)
);

-- The effect of account events: a row each time that one takes effect. Nothing keeps it from holding one twice or out of
-- order except the cursor: that is what `events verify` checks.
CREATE TABLE account_effect (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id text COLLATE "C" NOT NULL,
    seq        bigint NOT NULL,
    worker     text NOT NULL,
    -- How long its handling took by itself.
    work_ms    integer NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
