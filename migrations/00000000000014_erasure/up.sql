-- What is kept of deleted users and tweets comes to an end: storage::erasure takes away what is personal, some days after the deletion.
--
-- No table is rewritten: the columns are null, and the indexes hold what is deleted, dead letters and imports alone.

ALTER TABLE "user"
    -- When the sweep looks at a user whose erasure has begun, or was asked for. Null: not begun, or done.
    ADD COLUMN erase_at  timestamptz,
    -- When this row has lost everything personal.
    ADD COLUMN erased_at timestamptz;

-- A deleted user may be without an address. As it only allows more than the one before, no row has to be looked at; NOT VALID
-- counts for every row that is written.
ALTER TABLE "user"
    DROP CONSTRAINT user_check,
    ADD CONSTRAINT user_contact CHECK (
        (channel = 'email' AND email IS NOT NULL AND phone IS NULL)
        OR (channel = 'phone' AND phone IS NOT NULL AND email IS NULL)
        OR (deleted_at IS NOT NULL AND email IS NULL AND phone IS NULL)) NOT VALID;

-- Deleted users whose erasure hasn't begun, by when it may; those whose turn is at a given time.
CREATE INDEX user_kept ON "user" (deleted_at) WHERE deleted_at IS NOT NULL AND erase_at IS NULL AND erased_at IS NULL;
CREATE INDEX user_erase ON "user" (erase_at) WHERE erase_at IS NOT NULL;

-- Deleted tweets that still have their text.
CREATE INDEX tweet_deleted ON tweet (deleted_at) WHERE deleted_at IS NOT NULL AND text <> '(erased)';

-- Clears the row of a deleted user, and returns whether it was now. It does so by its owner's rights: whoever erases may neither read
-- what is personal, nor change it of anybody who is there.
CREATE FUNCTION erase_user(user_id bigint) RETURNS boolean LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $$
    WITH erased AS (
        UPDATE "user"
        SET login = 'erased_' || id, email = NULL, phone = NULL, password_hash = NULL, age = NULL, roles = '[]', avatar_link = NULL,
            updated_at = now(), erased_at = now()
        WHERE id = user_id AND deleted_at IS NOT NULL AND erased_at IS NULL RETURNING 1)
    SELECT EXISTS (SELECT FROM erased)
$$;
REVOKE ALL ON FUNCTION erase_user FROM PUBLIC;

-- The users that the body of a message names. Null where it isn't JSON, as another program's may not be.
CREATE FUNCTION users_in_message(body bytea) RETURNS bigint[] LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN (SELECT array_agg(value::bigint) FROM jsonb_each_text(convert_from(body, 'UTF8')::jsonb)
            WHERE key IN ('userId', 'authorId', 'followerId') AND value ~ '^[0-9]{1,18}$');
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END $$;
CREATE INDEX dead_letter_users ON dead_letter USING gin (users_in_message(body));

-- An author's imports.
CREATE INDEX follower_import_author ON follower_import (author_id);
