//! Each wire message has a golden file: a change of shape breaks a test before it breaks a client.

use chrono::DateTime;
use domain::{
    ImportId, TweetId, UserId,
    log::{LogMessage, MessageId, proof::Epoch},
    message::*,
    stream::{ACCOUNT_EVENT, AccountEvent, AccountId, Payload, StreamEvent as _},
    topology::{Retention, Topology},
    values::{Channel, Login, TweetText},
};
use serde::{Serialize, de::DeserializeOwned};
use std::{fmt::Debug, fs, path::PathBuf, time::Duration};

fn tweet() -> Tweet {
    Tweet {
        id: TweetId(7),
        author: Login::parse("ann").unwrap(),
        author_id: UserId(3),
        text: TweetText::parse(&"longer than an SMS ".repeat(4)).unwrap(),
        created_at: DateTime::from_timestamp(1_700_000_000, 0).unwrap(),
    }
}

fn range() -> FollowerRange {
    FollowerRange { after: UserId(1000), upto: UserId(2000) }
}

fn golden<M: Serialize + DeserializeOwned + PartialEq + Debug>(name: &str, message: &M) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text = serde_json::to_string_pretty(message).unwrap() + "\n";
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &text).unwrap();
    }
    let expected = fs::read_to_string(&path).expect("the golden file; UPDATE_GOLDEN=1 writes it");
    assert_eq!(text, expected, "{name}: UPDATE_GOLDEN=1 accepts the new shape");
    assert_eq!(&serde_json::from_str::<M>(&expected).unwrap(), message);
}

#[test]
fn wire_messages_keep_their_shapes() {
    let import =
        AddFollowers { user_id: UserId(3), follower_login: "fan".into(), count: 5, import_id: Some(ImportId(9)) };
    golden("add_followers.json", &import);
    golden("add_followers.foreign.json", &AddFollowers { import_id: None, ..import });
    golden("publish_tweet.json", &PublishTweet(tweet()));
    golden("update_feed.json", &UpdateFeed { tweet: tweet(), follower_id: UserId(4) });
    golden("update_feed.chunk.json", &UpdateFeedChunk { tweet: tweet(), followers: range() });
    golden("send_notification.json", &SendNotification { user_id: UserId(4), text: "hello".into() });
    let event = AccountEvent {
        account_id: AccountId::parse("17").unwrap(),
        seq: 3,
        payload: Payload::parse(r#"{"amount":-12.50}"#).unwrap(),
        generated_at: DateTime::from_timestamp_micros(1_700_000_000_123_456).unwrap(),
    };
    golden("account_event.json", &event);
    let envelope = event.envelope(ACCOUNT_EVENT, 5);
    assert_eq!((&*envelope.exchange, &*envelope.routing_key), ("account_event", "s005"));
    assert_eq!((envelope.kind.as_deref(), &*envelope.message_id), (Some("account_event"), "account_event/17/3"));
    let message = LogMessage {
        text: "hello".into(),
        key: Some("order-17".into()),
        accepted_at: DateTime::from_timestamp_micros(1_700_000_000_123_456),
        run: Some(40),
    };
    golden("message.json", &message);
    let epoch = Epoch::registered("0123456789ab".into(), b"fedcba9876543210").unwrap();
    let envelope = LogMessage { run: None, ..message.clone() }.envelope(
        &MessageId { log: "a1b2c3d4e5f6", partition: 7, seq: 42 },
        40,
        &epoch,
    );
    assert_eq!((&*envelope.exchange, &*envelope.routing_key), ("message", "p07"));
    assert_eq!((envelope.kind.as_deref(), &*envelope.message_id), (Some("message"), "a1b2c3d4e5f6/07/42"));
    assert_eq!(serde_json::from_slice::<LogMessage>(&envelope.body).unwrap(), message);
    assert_eq!(Some(envelope.created_at), message.accepted_at);
    // Readers of another version check the same proof.
    let body = String::from_utf8(envelope.body).unwrap();
    assert!(body.ends_with(r#","run":40,"proof":"0123456789abyDaK13F96X_t3CWB4amxUQ"}"#), "{body}");
    golden("message.foreign.json", &LogMessage { key: None, accepted_at: None, run: None, ..message });
    for channel in Channel::ALL {
        golden(
            &format!("send_notification.chunk.{}.json", channel.as_str()),
            &SendNotificationChunk::of(&tweet(), range(), channel),
        );
    }
}

fn foreign<M: DeserializeOwned>(name: &str) -> M {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/foreign").join(name);
    serde_json::from_str(&fs::read_to_string(path).expect("the file")).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn other_programs_ways_of_writing_are_read() {
    let hello = Tweet { text: TweetText::parse("hello").unwrap(), ..tweet() };
    let seconds = hello.created_at;
    let micros = DateTime::from_timestamp_micros(1_700_000_000_654_321).unwrap();
    let import = AddFollowers { user_id: UserId(3), follower_login: "fan".into(), count: 5, import_id: None };
    assert_eq!(foreign::<AddFollowers>("add_followers.json"), import);
    assert_eq!(foreign::<PublishTweet>("publish_tweet.json"), PublishTweet(hello.clone()));
    let update = UpdateFeed { tweet: Tweet { created_at: micros, ..hello.clone() }, follower_id: UserId(4) };
    assert_eq!(foreign::<UpdateFeed>("update_feed.json"), update);
    let chunk = UpdateFeedChunk { tweet: hello, followers: range() };
    assert_eq!(foreign::<UpdateFeedChunk>("update_feed.chunk.json"), chunk);
    let notification = SendNotification { user_id: UserId(4), text: "hello".into() };
    assert_eq!(foreign::<SendNotification>("send_notification.json"), notification);
    let chunk = SendNotificationChunk::of(&chunk.tweet, range(), Channel::Email);
    assert_eq!(foreign::<SendNotificationChunk>("send_notification.chunk.json"), chunk);
    assert_eq!(foreign::<AccountEvent>("account_event.json").generated_at, seconds);
    assert_eq!(foreign::<LogMessage>("message.json").accepted_at, Some(seconds));
}

#[test]
fn a_time_is_written_in_whole_seconds_whatever_form_it_was_read_in() {
    let update = serde_json::to_value(foreign::<UpdateFeed>("update_feed.json")).unwrap();
    assert_eq!(update["createdAt"], "2023-11-14 22:13:20");
}

#[test]
fn a_range_that_ends_before_it_begins_is_refused_when_decoded() {
    for (after, upto, reason) in [
        (5, 4, "after must be at most upto"),
        (-1, 4, "after must be at least 0"),
        (i64::MAX, i64::MIN, "after must be at most upto"),
    ] {
        let mut json = serde_json::to_value(UpdateFeedChunk { tweet: tweet(), followers: range() }).unwrap();
        (json["after"], json["upto"]) = (after.into(), upto.into());
        let error = serde_json::from_value::<UpdateFeedChunk>(json.clone()).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
        json["tweetId"] = 7.into();
        assert!(serde_json::from_value::<SendNotificationChunk>(json).is_err());
    }
}

#[test]
fn a_message_with_a_text_too_long_is_refused_when_decoded() {
    let mut json = serde_json::to_value(PublishTweet(tweet())).unwrap();
    json["text"] = "x".repeat(141).into();
    let error = serde_json::from_value::<PublishTweet>(json).unwrap_err().to_string();
    assert!(error.contains("at most 140"), "{error}");
}

#[test]
fn the_documented_topology_is_the_declared_one() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/topology.md");
    let delays = [1, 10, 60, 600].map(Duration::from_secs);
    // As `config/default.toml` has it.
    let retention = Retention { max_bytes: 10_737_418_240, max_age_s: 604_800, segment_bytes: 67_108_864 };
    let text = format!(
        "# Topology\n\nWritten by a test of the crate `domain` from the data that the services declare \
         (`UPDATE_GOLDEN=1 cargo test -p domain`).\nEvery queue but the streams is a durable quorum queue that refuses what \
         it can't hold (`reject-publish`) instead of dropping it.\n\n{}\n\
         A message that failed waits for its next attempt in the queue of its delay, under the name of the queue that it failed in as\n\
         routing key. From there it goes to the queue `return`, which every worker consumes, and is brought back.\n\
         [Why](decisions/0010-retries-and-other-arguments.md).\n",
        Topology::fleet(&delays)
            .and(Topology::stream(ACCOUNT_EVENT, 16))
            .and(Topology::log(4, retention))
            .to_markdown()
    );
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &text).unwrap();
    }
    assert_eq!(fs::read_to_string(&path).expect("docs/topology.md"), text, "UPDATE_GOLDEN=1 rewrites it");
}
