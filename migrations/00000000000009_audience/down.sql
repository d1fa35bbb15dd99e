DROP TABLE feed_repair;
DELETE FROM feed_garbage WHERE num_nonnulls(tweet_id, follower_id) <> 1 OR author_id IS NULL;
ALTER TABLE feed_garbage
    DROP CONSTRAINT feed_garbage_check,
    ALTER COLUMN author_id SET NOT NULL,
    ADD CHECK ((tweet_id IS NULL) <> (follower_id IS NULL)),
    DROP COLUMN swept_follower_id,
    DROP COLUMN swept_tweet_id,
    DROP COLUMN attempts;
ALTER TABLE former_subscription DROP COLUMN after_tweet_id, DROP COLUMN upto_tweet_id;
ALTER TABLE subscription DROP COLUMN after_tweet_id;
