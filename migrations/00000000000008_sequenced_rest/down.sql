DROP INDEX stream_cursor_retry;
DROP INDEX stream_event_pending;
ALTER TABLE stream_event DROP COLUMN rests;
CREATE INDEX stream_event_pending ON stream_event (stream, key, seq) INCLUDE (key_hash) WHERE processed_at IS NULL;
