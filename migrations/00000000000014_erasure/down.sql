DROP INDEX follower_import_author;
DROP INDEX dead_letter_users;
DROP INDEX tweet_deleted;
DROP FUNCTION users_in_message;
DROP FUNCTION erase_user;
-- The constraint of before, for whoever is still there and for whoever was deleted lately. Those who were erased have no address
-- any more, and there is none to give back.
UPDATE "user" SET email = CASE channel WHEN 'email' THEN '' END, phone = CASE channel WHEN 'phone' THEN '' END
    WHERE email IS NULL AND phone IS NULL;
ALTER TABLE "user"
    DROP CONSTRAINT user_contact,
    ADD CONSTRAINT user_check CHECK (
        (channel = 'email' AND email IS NOT NULL AND phone IS NULL)
        OR (channel = 'phone' AND phone IS NOT NULL AND email IS NULL));
ALTER TABLE "user" DROP COLUMN erase_at, DROP COLUMN erased_at;
