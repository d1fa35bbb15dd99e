DROP TABLE account_effect;
DROP TABLE member;
DROP TABLE lease;
DROP TABLE stream_change;
DROP TABLE stream_cursor;
DROP TABLE stream_event;
DROP TABLE stream_head;
DROP TABLE stream;
