-- Who is notified follows from ids, which grow under the author's lock, and from no clock.
--
-- A column with a constant default rewrites no table. Only the rows of those who followed when the author had posted
-- already are changed: by the old rule, since that is what they were notified by.

ALTER TABLE subscription
    -- The author's newest tweet, deleted or not, when this began: of the later ones the follower is notified.
    ADD COLUMN after_tweet_id bigint NOT NULL DEFAULT 0;
ALTER TABLE former_subscription
    ADD COLUMN after_tweet_id bigint NOT NULL DEFAULT 0,
    -- The author's newest tweet when this ended.
    ADD COLUMN upto_tweet_id bigint NOT NULL DEFAULT 0;

-- One descent of an index for each subscription, however many tweets its author has.
CREATE TEMPORARY TABLE newest_by_time ON COMMIT DROP AS
    SELECT author_id, created_at, max(id) OVER (PARTITION BY author_id ORDER BY created_at, id) AS tweet_id FROM tweet;
CREATE INDEX ON newest_by_time (author_id, created_at, tweet_id);
ANALYZE newest_by_time;

UPDATE subscription s
SET after_tweet_id = (SELECT n.tweet_id FROM newest_by_time n
                      WHERE n.author_id = s.author_id AND n.created_at < s.created_at
                      ORDER BY n.created_at DESC, n.tweet_id DESC LIMIT 1)
FROM (SELECT author_id, min(created_at) AS posted_at FROM newest_by_time GROUP BY author_id) oldest
WHERE oldest.author_id = s.author_id AND oldest.posted_at < s.created_at;

UPDATE former_subscription s
SET after_tweet_id = coalesce((SELECT n.tweet_id FROM newest_by_time n
                               WHERE n.author_id = s.author_id AND n.created_at < s.created_at
                               ORDER BY n.created_at DESC, n.tweet_id DESC LIMIT 1), 0),
    upto_tweet_id = (SELECT n.tweet_id FROM newest_by_time n
                     WHERE n.author_id = s.author_id AND n.created_at <= s.ended_at
                     ORDER BY n.created_at DESC, n.tweet_id DESC LIMIT 1)
FROM (SELECT author_id, min(created_at) AS posted_at FROM newest_by_time GROUP BY author_id) oldest
WHERE oldest.author_id = s.author_id AND oldest.posted_at <= s.ended_at;

-- Whoever inserts has to say it: a process of the version before can't add a follower who would be told of everything.
ALTER TABLE subscription ALTER COLUMN after_tweet_id DROP DEFAULT;
ALTER TABLE former_subscription ALTER COLUMN after_tweet_id DROP DEFAULT, ALTER COLUMN upto_tweet_id DROP DEFAULT;

-- What nobody sees any more in feeds: of a deleted tweet (author and tweet), of one who has left (author and follower), of a
-- deleted author (author alone); and the subscriptions of a deleted reader (follower alone), which end one by one.
ALTER TABLE feed_garbage
    DROP CONSTRAINT feed_garbage_check,
    ALTER COLUMN author_id DROP NOT NULL,
    ADD CHECK (num_nonnulls(author_id, follower_id) > 0 AND num_nonnulls(tweet_id, follower_id) < 2),
    -- How far it's swept: all followers below this one, and this one's tweets up to that.
    ADD COLUMN swept_follower_id bigint NOT NULL DEFAULT 0,
    ADD COLUMN swept_tweet_id bigint NOT NULL DEFAULT 0,
    -- How often it was begun without getting on.
    ADD COLUMN attempts integer NOT NULL DEFAULT 0;

-- Of those who are deleted already nothing was swept.
INSERT INTO feed_garbage (author_id, follower_id, due_at)
    SELECT piece.author_id, piece.follower_id, clock_timestamp()
    FROM "user" u CROSS JOIN LATERAL (VALUES (u.id, NULL), (NULL, u.id)) piece (author_id, follower_id)
    WHERE u.deleted_at IS NOT NULL;

-- Who let `fleetctl verify --repair` mend what, and how far it is.
CREATE TABLE feed_repair (
    id                    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    started_by            text NOT NULL,
    started_at            timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at            timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at           timestamptz,
    phase                 text NOT NULL DEFAULT 'missing' CHECK (phase IN ('missing', 'feeds', 'email', 'phone', 'over')),
    -- The key of the last row that this phase has looked at.
    after_id              bigint NOT NULL DEFAULT 0,
    after_key             text NOT NULL DEFAULT '',
    feed_rows_written     bigint NOT NULL DEFAULT 0,
    notifications_written bigint NOT NULL DEFAULT 0,
    feed_rows_removed     bigint NOT NULL DEFAULT 0,
    notifications_removed bigint NOT NULL DEFAULT 0
);
-- One at a time.
CREATE UNIQUE INDEX feed_repair_open ON feed_repair ((true)) WHERE finished_at IS NULL;
