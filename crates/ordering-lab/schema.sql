-- The ordering lab's own tables: what its consumers change, and what they saw while doing so. Run at each start.

CREATE TABLE IF NOT EXISTS user_balance (
    user_id      bigint PRIMARY KEY,
    value        bigint NOT NULL,
    -- The consumer that made the row.
    consumer_id  integer NOT NULL,
    -- The time that the last message said.
    processed_at timestamptz NOT NULL,
    -- Messages that took effect.
    effects      bigint NOT NULL
);

-- A row each time that a consumer had a message in hand, in the order of the commits for each user and each consumer.
CREATE TABLE IF NOT EXISTS balance_delivery (
    id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    consumer_id    integer NOT NULL,
    user_id        bigint NOT NULL,
    -- The time that the message says.
    processed_at   timestamptz NOT NULL,
    version        integer NOT NULL,
    outcome        text NOT NULL CHECK (outcome IN ('applied', 'repeated', 'turned_away', 'failed')),
    order_error    boolean NOT NULL,
    value_error    boolean NOT NULL,
    consumer_error boolean NOT NULL
);
CREATE INDEX IF NOT EXISTS balance_delivery_user ON balance_delivery (user_id, id);
