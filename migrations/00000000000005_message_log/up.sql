-- The message log: messages on their way to the partitions' streams, and what the consumer groups have recorded of them.

-- What tells the messages of this log from others'. One row.
CREATE TABLE message_log (
    one_row boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    token   text NOT NULL DEFAULT left(replace(gen_random_uuid()::text, '-', ''), 12)
);
INSERT INTO message_log DEFAULT VALUES;

-- The partitions: 0 up to their number. The row is what the relays lock to publish the partition's messages one after
-- another.
CREATE TABLE message_partition (
    partition integer PRIMARY KEY CHECK (partition BETWEEN 0 AND 99),
    -- The newest sequence that was given to a message.
    seq       bigint NOT NULL DEFAULT 0 CHECK (seq >= 0),
    -- Rows of message_outbox that have the newest sequences, in that order: committed before they're published, so that
    -- whoever publishes them again gives each the same.
    taken     bigint[] NOT NULL DEFAULT '{}'
) WITH (fillfactor = 10);
INSERT INTO message_partition (partition) SELECT generate_series(0, 3);

-- Messages that were accepted and wait for the relay. Rows live for milliseconds.
CREATE TABLE message_outbox (
    partition      integer NOT NULL,
    id             bigint NOT NULL,
    text           text NOT NULL,
    key            text,
    correlation_id text,
    accepted_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (partition, id)
);
CREATE SEQUENCE message_outbox_id AS bigint OWNED BY message_outbox.id;

-- How far each group has come: moved by compare-and-set, in the transaction that records the messages.
CREATE TABLE consumer_offset (
    "group"         text COLLATE "C" NOT NULL,
    partition       integer NOT NULL,
    next_offset     bigint NOT NULL CHECK (next_offset >= 0),
    -- Whether the group was put here and hasn't read on from here yet.
    placed          boolean NOT NULL DEFAULT true,
    -- The newest sequence recorded.
    seq             bigint,
    -- The id of the message before next_offset, where that was read: the stream is still the same if it's still there.
    last_message_id text,
    -- Messages that weren't recorded, and why: no message of the log; had been recorded; confirmed and lost by the broker.
    skipped         bigint NOT NULL DEFAULT 0,
    repeated        bigint NOT NULL DEFAULT 0,
    missing         bigint NOT NULL DEFAULT 0,
    moved_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY ("group", partition)
) WITH (fillfactor = 50);

-- What a group has recorded.
CREATE TABLE message (
    "group"     text COLLATE "C" NOT NULL,
    partition   integer NOT NULL,
    "offset"    bigint NOT NULL,
    -- Its place among the partition's messages that came in over HTTP; null for another program's.
    seq         bigint,
    message_id  text,
    key         text,
    text        text NOT NULL,
    accepted_at timestamptz,
    recorded_by text NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY ("group", partition, "offset")
);
-- Another program's message that comes twice is told by its id.
CREATE UNIQUE INDEX message_foreign ON message ("group", partition, message_id) WHERE seq IS NULL;

-- What stood in a stream and was no message of the log.
CREATE TABLE skipped_message (
    "group"    text COLLATE "C" NOT NULL,
    partition  integer NOT NULL,
    "offset"   bigint NOT NULL,
    message_id text,
    reason     text NOT NULL,
    -- The first 64 KiB.
    body       bytea NOT NULL,
    skipped_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY ("group", partition, "offset")
);
