//! The wire messages: JSON bodies with camelCase keys, told apart by the AMQP `type`.
//!
//! Unknown fields are ignored, so that a newer sender and an older receiver get along.

use crate::{
    Envelope, ImportId, TweetId, UserId,
    topology::exchange,
    values::{Channel, Invalid, Login, TweetText},
    wire_time,
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// A body that one exchange carries under one AMQP `type`.
pub trait Message: Serialize + DeserializeOwned {
    /// The AMQP `type`.
    const TYPE: &'static str;
    /// The exchange that it's published to.
    const EXCHANGE: &'static str;

    /// The routing key that it's published with.
    fn routing_key(&self) -> String;

    /// The message, ready to be published.
    fn envelope(&self) -> Envelope {
        let body = serde_json::to_vec(self).expect("a wire message is plain data, which always has a JSON form");
        let mut envelope = Envelope::new(Self::EXCHANGE, self.routing_key(), body);
        envelope.kind = Some(Self::TYPE.into());
        envelope
    }
}

/// Create users and let them follow one author.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddFollowers {
    /// The author to be followed.
    pub user_id: UserId,
    /// The prefix of the followers' logins.
    pub follower_login: String,
    /// How many.
    pub count: i64,
    /// The import that keeps the progress; absent from other programs' messages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub import_id: Option<ImportId>,
}

impl Message for AddFollowers {
    const TYPE: &'static str = "add_followers";
    const EXCHANGE: &'static str = exchange::ADD_FOLLOWERS;

    fn routing_key(&self) -> String {
        Self::EXCHANGE.into()
    }
}

/// A tweet as it travels. The row in Postgres is the truth; what comes along saves reading it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tweet {
    /// The tweet.
    pub id: TweetId,
    /// Its author's login.
    pub author: Login,
    /// Its author.
    pub author_id: UserId,
    /// Its text.
    pub text: TweetText,
    /// When it was posted; written in whole seconds.
    #[serde(with = "wire_time")]
    pub created_at: DateTime<Utc>,
}

/// A tweet was posted: bring it to its author's followers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PublishTweet(pub Tweet);

impl Message for PublishTweet {
    const TYPE: &'static str = "publish_tweet";
    const EXCHANGE: &'static str = exchange::PUBLISH_TWEET;

    fn routing_key(&self) -> String {
        Self::EXCHANGE.into()
    }
}

/// A half-open range of follower ids: those with `after < id <= upto`. One that ends before it begins isn't read from a
/// message: whoever sent it meant something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Bounds")]
pub struct FollowerRange {
    /// The highest id below the range.
    pub after: UserId,
    /// The highest id of the range.
    pub upto: UserId,
}

#[derive(Deserialize)]
struct Bounds {
    after: UserId,
    upto: UserId,
}

impl TryFrom<Bounds> for FollowerRange {
    type Error = Invalid;

    fn try_from(Bounds { after, upto }: Bounds) -> Result<Self, Invalid> {
        if after < UserId(0) {
            Err(Invalid("after must be at least 0".into()))
        } else if after > upto {
            Err(Invalid("after must be at most upto".into()))
        } else {
            Ok(Self { after, upto })
        }
    }
}

impl FollowerRange {
    /// The range that holds one follower.
    pub fn only(follower: UserId) -> Self {
        Self { after: UserId(follower.0.saturating_sub(1)), upto: follower }
    }
}

/// Put a tweet into one follower's feed: the shape that other programs send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpdateFeed {
    /// The tweet.
    #[serde(flatten)]
    pub tweet: Tweet,
    /// Whose feed.
    pub follower_id: UserId,
}

impl Message for UpdateFeed {
    const TYPE: &'static str = "update_feed";
    const EXCHANGE: &'static str = exchange::UPDATE_FEED;

    fn routing_key(&self) -> String {
        self.follower_id.to_string()
    }
}

/// Put a tweet into the feeds of a range of its author's followers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UpdateFeedChunk {
    /// The tweet.
    #[serde(flatten)]
    pub tweet: Tweet,
    /// Whose feeds.
    #[serde(flatten)]
    pub followers: FollowerRange,
}

impl Message for UpdateFeedChunk {
    const TYPE: &'static str = "update_feed.chunk";
    const EXCHANGE: &'static str = exchange::UPDATE_FEED;

    /// What is hashed only spreads the work, so the range's own start serves as well as its first follower.
    fn routing_key(&self) -> String {
        self.followers.after.to_string()
    }
}

/// Notify one user: the shape that other programs send. The routing key says by which channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SendNotification {
    /// Whom.
    pub user_id: UserId,
    /// The text, as it's to be sent.
    pub text: String,
}

impl SendNotification {
    /// The AMQP `type`.
    pub const TYPE: &'static str = "send_notification";
}

/// Notify the users of one channel among a range of an author's followers of a tweet. The routing key says which
/// channel, and `text` is already cut to what it carries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SendNotificationChunk {
    /// The tweet.
    pub tweet_id: TweetId,
    /// Its author.
    pub author_id: UserId,
    /// The text, as it's to be sent.
    pub text: String,
    /// Whom.
    #[serde(flatten)]
    pub followers: FollowerRange,
}

impl SendNotificationChunk {
    /// The AMQP `type`.
    pub const TYPE: &'static str = "send_notification.chunk";

    /// The notification by `channel` of `tweet` for the followers in the range.
    pub fn of(tweet: &Tweet, followers: FollowerRange, channel: Channel) -> Self {
        let text = match channel {
            Channel::Email => tweet.text.as_str().to_owned(),
            Channel::Phone => tweet.text.for_sms(),
        };
        Self { tweet_id: tweet.id, author_id: tweet.author_id, text, followers }
    }

    /// The message for the notifier of `channel`.
    pub fn envelope(&self, channel: Channel) -> Envelope {
        let body = serde_json::to_vec(self).expect("a wire message is plain data, which always has a JSON form");
        let mut envelope = Envelope::new(exchange::SEND_NOTIFICATION, channel.as_str(), body);
        envelope.kind = Some(Self::TYPE.into());
        envelope
    }
}
