-- What makes delivery by way of the broker reliable.

-- Messages that follow from a committed change and wait for the relay. Rows live for milliseconds.
CREATE TABLE outbox (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    exchange       text NOT NULL,
    routing_key    text NOT NULL,
    kind           text,
    message_id     text NOT NULL,
    correlation_id text,
    headers        jsonb NOT NULL DEFAULT '{}',
    body           bytea NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Attempts at redelivered messages, committed before the attempt.
CREATE TABLE attempt (
    queue      text NOT NULL,
    message_id text NOT NULL,
    attempts   integer NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (queue, message_id)
);

-- Messages that were set aside, for an operator to replay or drop.
CREATE TABLE dead_letter (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- The same dead letter recorded again is the same row.
    dedup_key      text NOT NULL UNIQUE,
    queue          text NOT NULL,
    message_id     text,
    kind           text,
    correlation_id text,
    -- Where it was published to in the first place.
    exchange       text NOT NULL,
    routing_key    text NOT NULL,
    headers        jsonb NOT NULL DEFAULT '{}',
    error          text NOT NULL,
    attempts       integer NOT NULL,
    body           bytea NOT NULL,
    failed_at      timestamptz NOT NULL,
    recorded_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    state          text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'replayed', 'dropped')),
    settled_at     timestamptz,
    settled_by     text
);
CREATE INDEX dead_letter_waiting ON dead_letter (id) WHERE state = 'waiting';
