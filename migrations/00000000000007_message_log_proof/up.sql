-- The message log's sequences: who gave them, and in which life of the database.

-- What each relay's process proves its messages with. Whoever can't read this table can't make such a proof, and whoever
-- runs on a copy of the database has registered in the copy alone.
CREATE TABLE message_epoch (
    epoch         text COLLATE "C" PRIMARY KEY,
    key           bytea NOT NULL,
    registered_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Sequences that no message has or will get: see message_partition_goes_on.
CREATE TABLE message_unused (
    partition integer NOT NULL,
    first_seq bigint NOT NULL,
    last_seq  bigint NOT NULL CHECK (last_seq >= first_seq),
    PRIMARY KEY (partition, first_seq)
);

-- How many of these sequences are unused.
CREATE FUNCTION message_unused_among(of_partition integer, lowest bigint, highest bigint) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(least(last_seq, highest) - greatest(first_seq, lowest) + 1), 0)::bigint FROM message_unused
    WHERE partition = of_partition AND first_seq <= highest AND last_seq >= lowest
$$;

-- What changes when the database becomes another one: its system's identifier and its timeline. A replica that is promoted and
-- a backup that is recovered begin a new timeline; a dump that is read into another server is in another system. Null where
-- this role may not know.
CREATE FUNCTION message_lineage() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT system_identifier FROM pg_control_system()) || '/'
           || left(pg_walfile_name(pg_current_wal_lsn()), 8);
EXCEPTION WHEN insufficient_privilege OR undefined_function OR feature_not_supported THEN
    RETURN NULL;
END $$;

ALTER TABLE message_partition
    -- Up to which sequence messages are trusted without a proof: those of relays that made none. Null until the first relay
    -- that does has registered.
    ADD COLUMN unproven_upto bigint DEFAULT 0,
    -- The database's when the newest sequence was given.
    ADD COLUMN lineage       text DEFAULT message_lineage();
UPDATE message_partition SET unproven_upto = NULL WHERE EXISTS (SELECT FROM message_partition WHERE seq > 0);

-- A database that has become another one may lack sequences that it gave before: they're in the streams, and readers would take
-- the next messages for repetitions. So the sequence goes on with the time in microseconds, which is above all of them: no
-- partition gets a million messages a second. (A clock that is far behind still leaves a billion.)
CREATE FUNCTION message_partition_goes_on() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    lineage_now text := message_lineage();
    unused_upto bigint;
BEGIN
    IF lineage_now <> OLD.lineage OR lineage_now IS NOT NULL AND OLD.lineage IS NULL THEN
        unused_upto := greatest(OLD.seq + 1000000000, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint);
        INSERT INTO message_unused (partition, first_seq, last_seq) VALUES (OLD.partition, OLD.seq + 1, unused_upto);
        NEW.seq := unused_upto + NEW.seq - OLD.seq;
        NEW.lineage := lineage_now;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER message_partition_goes_on BEFORE UPDATE OF seq ON message_partition
    FOR EACH ROW WHEN (NEW.seq > OLD.seq) EXECUTE FUNCTION message_partition_goes_on();
