-- Users, follows, tweets, and what is derived from them. Times are UTC (timestamptz); derived rows carry no foreign
-- keys: they are written by the million, and everything that reads them joins the rows they derive from.

CREATE TABLE follower_import (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- The same request again is the same import: the AMQP message's id, or a digest of what was asked for.
    request_key text NOT NULL UNIQUE,
    author_id   bigint NOT NULL,
    prefix      text NOT NULL,
    requested   integer NOT NULL CHECK (requested > 0),
    -- Logins below this index are done.
    next_index  integer NOT NULL DEFAULT 0,
    created     integer NOT NULL DEFAULT 0,
    skipped     integer NOT NULL DEFAULT 0,
    state       text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'running', 'done', 'failed')),
    error       text,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    CHECK (created + skipped = next_index AND next_index <= requested)
);

CREATE TABLE "user" (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    login         text NOT NULL CHECK (char_length(login) BETWEEN 1 AND 32),
    channel       text NOT NULL CHECK (channel IN ('email', 'phone')),
    email         text,
    phone         text,
    password_hash text,
    age           smallint,
    is_active     boolean NOT NULL DEFAULT true,
    roles         jsonb NOT NULL DEFAULT '[]',
    avatar_link   text,
    -- The import that made this user.
    import_id     bigint,
    created_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    deleted_at    timestamptz,
    CHECK ((channel = 'email' AND email IS NOT NULL AND phone IS NULL)
        OR (channel = 'phone' AND phone IS NOT NULL AND email IS NULL))
);
-- A deleted user's login is free again.
CREATE UNIQUE INDEX user_login_key ON "user" (login) WHERE deleted_at IS NULL;

-- Kept here rather than in files, so that any number of gateways serve it.
CREATE TABLE avatar (
    user_id      bigint PRIMARY KEY REFERENCES "user" (id),
    content_type text NOT NULL,
    image        bytea NOT NULL
);

CREATE TABLE subscription (
    author_id      bigint NOT NULL,
    follower_id    bigint NOT NULL,
    -- The oldest tweet that this subscription shows.
    since_tweet_id bigint NOT NULL,
    created_at     timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (author_id, follower_id)
);
CREATE INDEX subscription_follower ON subscription (follower_id, author_id);

-- Subscriptions that have ended: who had to be notified when can still be told.
CREATE TABLE former_subscription (
    author_id      bigint NOT NULL,
    follower_id    bigint NOT NULL,
    since_tweet_id bigint NOT NULL,
    created_at     timestamptz NOT NULL,
    ended_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (author_id, follower_id, created_at)
);

CREATE TABLE tweet (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    author_id  bigint NOT NULL REFERENCES "user" (id),
    text       text NOT NULL CHECK (char_length(text) BETWEEN 1 AND 140),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    deleted_at timestamptz
);
CREATE INDEX tweet_author ON tweet (author_id, id);

CREATE TABLE feed_entry (
    reader_id bigint NOT NULL,
    tweet_id  bigint NOT NULL,
    PRIMARY KEY (reader_id, tweet_id)
);

-- Feed rows that nobody can see any more, to be removed by the sweep: a deleted tweet's (follower_id null), or an
-- author's in the feed of one who no longer follows (tweet_id null).
CREATE TABLE feed_garbage (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    author_id   bigint NOT NULL,
    tweet_id    bigint,
    follower_id bigint,
    due_at      timestamptz NOT NULL,
    CHECK ((tweet_id IS NULL) <> (follower_id IS NULL))
);
CREATE INDEX feed_garbage_due ON feed_garbage (due_at);

-- `source` and `source_id` say what the notification follows from: ('tweet', its id) or ('message', the AMQP id).
CREATE TABLE email_notification (
    user_id         bigint NOT NULL,
    source          text NOT NULL,
    source_id       text NOT NULL,
    email           text NOT NULL,
    text            text NOT NULL,
    state           text NOT NULL DEFAULT 'recorded',
    attempts        smallint NOT NULL DEFAULT 0,
    next_attempt_at timestamptz,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (user_id, source, source_id)
);

CREATE TABLE sms_notification (
    user_id         bigint NOT NULL,
    source          text NOT NULL,
    source_id       text NOT NULL,
    phone           text NOT NULL,
    text            text NOT NULL,
    state           text NOT NULL DEFAULT 'recorded',
    attempts        smallint NOT NULL DEFAULT 0,
    next_attempt_at timestamptz,
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (user_id, source, source_id)
);
