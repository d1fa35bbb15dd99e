// @generated automatically by Diesel CLI.

diesel::table! {
    account_effect (id) {
        id -> Int8,
        account_id -> Text,
        seq -> Int8,
        worker -> Text,
        work_ms -> Int4,
        applied_at -> Timestamptz,
    }
}

diesel::table! {
    attempt (queue, message_id) {
        queue -> Text,
        message_id -> Text,
        attempts -> Int4,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    avatar (user_id) {
        user_id -> Int8,
        content_type -> Text,
        image -> Bytea,
    }
}

diesel::table! {
    consumer_offset (group, partition) {
        group -> Text,
        partition -> Int4,
        next_offset -> Int8,
        placed -> Bool,
        seq -> Nullable<Int8>,
        last_message_id -> Nullable<Text>,
        skipped -> Int8,
        repeated -> Int8,
        missing -> Int8,
        moved_at -> Timestamptz,
    }
}

diesel::table! {
    dead_letter (id) {
        id -> Int8,
        dedup_key -> Text,
        queue -> Text,
        message_id -> Nullable<Text>,
        kind -> Nullable<Text>,
        correlation_id -> Nullable<Text>,
        exchange -> Text,
        routing_key -> Text,
        headers -> Jsonb,
        error -> Text,
        attempts -> Int4,
        body -> Bytea,
        failed_at -> Timestamptz,
        recorded_at -> Timestamptz,
        state -> Text,
        settled_at -> Nullable<Timestamptz>,
        settled_by -> Nullable<Text>,
    }
}

diesel::table! {
    email_notification (user_id, source, source_id) {
        user_id -> Int8,
        source -> Text,
        source_id -> Text,
        email -> Text,
        text -> Text,
        state -> Text,
        attempts -> Int2,
        next_attempt_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    feed_entry (reader_id, tweet_id) {
        reader_id -> Int8,
        tweet_id -> Int8,
    }
}

diesel::table! {
    feed_garbage (id) {
        id -> Int8,
        author_id -> Nullable<Int8>,
        tweet_id -> Nullable<Int8>,
        follower_id -> Nullable<Int8>,
        due_at -> Timestamptz,
        swept_follower_id -> Int8,
        swept_tweet_id -> Int8,
        attempts -> Int4,
    }
}

diesel::table! {
    feed_repair (id) {
        id -> Int8,
        started_by -> Text,
        started_at -> Timestamptz,
        updated_at -> Timestamptz,
        finished_at -> Nullable<Timestamptz>,
        phase -> Text,
        after_id -> Int8,
        after_key -> Text,
        feed_rows_written -> Int8,
        notifications_written -> Int8,
        feed_rows_removed -> Int8,
        notifications_removed -> Int8,
    }
}

diesel::table! {
    follower_import (id) {
        id -> Int8,
        request_key -> Text,
        author_id -> Int8,
        prefix -> Text,
        requested -> Int4,
        next_index -> Int4,
        created -> Int4,
        skipped -> Int4,
        state -> Text,
        error -> Nullable<Text>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
    }
}

diesel::table! {
    former_subscription (author_id, follower_id, created_at) {
        author_id -> Int8,
        follower_id -> Int8,
        since_tweet_id -> Int8,
        created_at -> Timestamptz,
        ended_at -> Timestamptz,
        after_tweet_id -> Int8,
        upto_tweet_id -> Int8,
    }
}

diesel::table! {
    lease (resource) {
        resource -> Text,
        holder -> Nullable<Text>,
        expires_at -> Timestamptz,
    }
}

diesel::table! {
    member (service, holder) {
        service -> Text,
        holder -> Text,
        seen_at -> Timestamptz,
    }
}

diesel::table! {
    message (group, partition, offset) {
        group -> Text,
        partition -> Int4,
        offset -> Int8,
        seq -> Nullable<Int8>,
        message_id -> Nullable<Text>,
        key -> Nullable<Text>,
        text -> Text,
        accepted_at -> Nullable<Timestamptz>,
        recorded_by -> Text,
        recorded_at -> Timestamptz,
    }
}

diesel::table! {
    message_epoch (epoch) {
        epoch -> Text,
        key -> Bytea,
        registered_at -> Timestamptz,
    }
}

diesel::table! {
    message_log (one_row) {
        one_row -> Bool,
        token -> Text,
    }
}

diesel::table! {
    message_outbox (partition, id) {
        partition -> Int4,
        id -> Int8,
        text -> Text,
        key -> Nullable<Text>,
        correlation_id -> Nullable<Text>,
        accepted_at -> Timestamptz,
    }
}

diesel::table! {
    message_partition (partition) {
        partition -> Int4,
        seq -> Int8,
        taken -> Array<Nullable<Int8>>,
        unproven_upto -> Nullable<Int8>,
        lineage -> Nullable<Text>,
    }
}

diesel::table! {
    message_unused (partition, first_seq) {
        partition -> Int4,
        first_seq -> Int8,
        last_seq -> Int8,
    }
}

diesel::table! {
    outbox (id) {
        id -> Int8,
        exchange -> Text,
        routing_key -> Text,
        kind -> Nullable<Text>,
        message_id -> Text,
        correlation_id -> Nullable<Text>,
        headers -> Jsonb,
        body -> Bytea,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    skipped_message (group, partition, offset) {
        group -> Text,
        partition -> Int4,
        offset -> Int8,
        message_id -> Nullable<Text>,
        reason -> Text,
        body -> Bytea,
        skipped_at -> Timestamptz,
    }
}

diesel::table! {
    sms_notification (user_id, source, source_id) {
        user_id -> Int8,
        source -> Text,
        source_id -> Text,
        phone -> Text,
        text -> Text,
        state -> Text,
        attempts -> Int2,
        next_attempt_at -> Nullable<Timestamptz>,
        created_at -> Timestamptz,
    }
}

diesel::table! {
    stream (stream_) {
        #[sql_name = "stream"]
        stream_ -> Text,
        shards -> Int4,
        queues -> Int4,
    }
}

diesel::table! {
    stream_change (id) {
        id -> Int8,
        stream -> Text,
        key -> Text,
        seq -> Int8,
        action -> Text,
        last_error -> Nullable<Text>,
        payload -> Nullable<Json>,
        changed_by -> Text,
        changed_at -> Timestamptz,
    }
}

diesel::table! {
    stream_cursor (stream, key) {
        stream -> Text,
        key -> Text,
        seq -> Int8,
        revision -> Int4,
        attempts -> Int4,
        deaths -> Int4,
        retry_at -> Nullable<Timestamptz>,
        parked_at -> Nullable<Timestamptz>,
        last_error -> Nullable<Text>,
    }
}

diesel::table! {
    stream_event (stream, key, seq) {
        stream -> Text,
        key -> Text,
        seq -> Int8,
        key_hash -> Int4,
        payload -> Json,
        generated_at -> Timestamptz,
        processed_at -> Nullable<Timestamptz>,
        worker -> Nullable<Text>,
        outcome -> Nullable<Text>,
        rests -> Bool,
    }
}

diesel::table! {
    stream_head (stream, key) {
        stream -> Text,
        key -> Text,
        seq -> Int8,
    }
}

diesel::table! {
    subscription (author_id, follower_id) {
        author_id -> Int8,
        follower_id -> Int8,
        since_tweet_id -> Int8,
        created_at -> Timestamptz,
        after_tweet_id -> Int8,
    }
}

diesel::table! {
    tweet (id) {
        id -> Int8,
        author_id -> Int8,
        text -> Text,
        created_at -> Timestamptz,
        deleted_at -> Nullable<Timestamptz>,
    }
}

diesel::table! {
    user (id) {
        id -> Int8,
        login -> Text,
        channel -> Text,
        email -> Nullable<Text>,
        phone -> Nullable<Text>,
        password_hash -> Nullable<Text>,
        age -> Nullable<Int2>,
        is_active -> Bool,
        roles -> Jsonb,
        avatar_link -> Nullable<Text>,
        import_id -> Nullable<Int8>,
        created_at -> Timestamptz,
        updated_at -> Timestamptz,
        deleted_at -> Nullable<Timestamptz>,
        erase_at -> Nullable<Timestamptz>,
        erased_at -> Nullable<Timestamptz>,
    }
}

diesel::joinable!(avatar -> user (user_id));
diesel::joinable!(tweet -> user (author_id));

diesel::allow_tables_to_appear_in_same_query!(
    account_effect,
    attempt,
    avatar,
    consumer_offset,
    dead_letter,
    email_notification,
    feed_entry,
    feed_garbage,
    feed_repair,
    follower_import,
    former_subscription,
    lease,
    member,
    message,
    message_epoch,
    message_log,
    message_outbox,
    message_partition,
    message_unused,
    outbox,
    skipped_message,
    sms_notification,
    stream,
    stream_change,
    stream_cursor,
    stream_event,
    stream_head,
    subscription,
    tweet,
    user,
);
