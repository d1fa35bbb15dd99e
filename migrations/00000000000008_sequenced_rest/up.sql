-- The sweep of sequenced streams passes over what can't go on for long: events of parked keys, and of keys that wait for
-- long. No row is rewritten; the index is made anew from what waits.

-- Whether the sweep may pass it over. If so, the key's cursor has parked_at or retry_at, and whoever takes that away sets
-- this to false, in the same transaction.
ALTER TABLE stream_event ADD COLUMN rests boolean NOT NULL DEFAULT false;
DROP INDEX stream_event_pending;
CREATE INDEX stream_event_pending ON stream_event (stream, rests, key, seq) INCLUDE (key_hash) WHERE processed_at IS NULL;

-- Keys whose time for a retry has come, or will.
CREATE INDEX stream_cursor_retry ON stream_cursor (stream, retry_at, key) WHERE retry_at IS NOT NULL;
