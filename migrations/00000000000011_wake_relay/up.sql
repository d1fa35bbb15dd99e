-- A relay that has nothing to do sleeps: it holds the table's advisory lock alone, and is called by whoever inserts. Nobody
-- calls one that is awake, because a commit that notifies waits for others that do.
--
-- Before the statement, so that the transaction has its number before its rows have theirs: from that the relay knows below
-- which row nothing can come any more.
CREATE FUNCTION wake_relay() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_current_xact_id();
    -- Held to the commit: until then no relay falls asleep.
    IF NOT pg_try_advisory_xact_lock_shared(TG_ARGV[0]::bigint) THEN
        PERFORM pg_notify(TG_TABLE_NAME, '');
    END IF;
    RETURN NULL;
END $$;

-- The keys are those of storage::locks.
CREATE TRIGGER wake_relay BEFORE INSERT ON outbox FOR EACH STATEMENT EXECUTE FUNCTION wake_relay('-3');
CREATE TRIGGER wake_relay BEFORE INSERT ON message_outbox FOR EACH STATEMENT EXECUTE FUNCTION wake_relay('-4');
