DROP TABLE skipped_message;
DROP TABLE message;
DROP TABLE consumer_offset;
DROP TABLE message_outbox;
DROP TABLE message_partition;
DROP TABLE message_log;
