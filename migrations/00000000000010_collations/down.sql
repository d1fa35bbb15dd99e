ALTER TABLE "user" ALTER COLUMN login TYPE text COLLATE "default";

ALTER TABLE member
    ALTER COLUMN service TYPE text COLLATE "default",
    ALTER COLUMN holder TYPE text COLLATE "default";
ALTER TABLE lease ALTER COLUMN resource TYPE text COLLATE "default";
ALTER TABLE dead_letter ALTER COLUMN dedup_key TYPE text COLLATE "default";
ALTER TABLE attempt
    ALTER COLUMN queue TYPE text COLLATE "default",
    ALTER COLUMN message_id TYPE text COLLATE "default";
ALTER TABLE follower_import ALTER COLUMN request_key TYPE text COLLATE "default";

ALTER TABLE sms_notification
    ALTER COLUMN source TYPE text COLLATE "default",
    ALTER COLUMN source_id TYPE text COLLATE "default";
ALTER TABLE email_notification
    ALTER COLUMN source TYPE text COLLATE "default",
    ALTER COLUMN source_id TYPE text COLLATE "default";

ALTER TABLE message ALTER COLUMN message_id TYPE text COLLATE "default";
