-- Text keys are compared byte by byte: whether two are equal, and where an index has them, must not depend on a library of
-- the system, whose sorting changes from version to version.
--
-- No table is rewritten, and what takes longest is no part of this transaction where there is a fleet at work: `fleetctl
-- migrate` has made the indexes of the notifications before, CONCURRENTLY. An index that covers some rows only can't be
-- handed over in that way: those of messages and users are made anew here, users last, so that they're locked most briefly.

ALTER TABLE message ALTER COLUMN message_id TYPE text COLLATE "C";

CREATE UNIQUE INDEX IF NOT EXISTS email_notification_c
    ON email_notification (user_id, source COLLATE "C", source_id COLLATE "C");
ALTER TABLE email_notification
    DROP CONSTRAINT email_notification_pkey,
    ALTER COLUMN source TYPE text COLLATE "C",
    ALTER COLUMN source_id TYPE text COLLATE "C";
ALTER TABLE email_notification ADD CONSTRAINT email_notification_pkey PRIMARY KEY USING INDEX email_notification_c;

CREATE UNIQUE INDEX IF NOT EXISTS sms_notification_c
    ON sms_notification (user_id, source COLLATE "C", source_id COLLATE "C");
ALTER TABLE sms_notification
    DROP CONSTRAINT sms_notification_pkey,
    ALTER COLUMN source TYPE text COLLATE "C",
    ALTER COLUMN source_id TYPE text COLLATE "C";
ALTER TABLE sms_notification ADD CONSTRAINT sms_notification_pkey PRIMARY KEY USING INDEX sms_notification_c;

ALTER TABLE follower_import ALTER COLUMN request_key TYPE text COLLATE "C";
ALTER TABLE attempt ALTER COLUMN queue TYPE text COLLATE "C", ALTER COLUMN message_id TYPE text COLLATE "C";
ALTER TABLE dead_letter ALTER COLUMN dedup_key TYPE text COLLATE "C";
ALTER TABLE lease ALTER COLUMN resource TYPE text COLLATE "C";
ALTER TABLE member ALTER COLUMN service TYPE text COLLATE "C", ALTER COLUMN holder TYPE text COLLATE "C";

ALTER TABLE "user" ALTER COLUMN login TYPE text COLLATE "C";
