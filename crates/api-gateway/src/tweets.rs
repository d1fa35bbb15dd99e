//! Tweets: posting, listing, deleting.

use crate::{
    access::CorrelationId,
    body::Json,
    error::Error,
    fields::{self, Fields, text},
    gateway::Gateway,
    shares::Subject,
};
use actix_web::{HttpRequest, HttpResponse, web};
use chrono::{DateTime, Utc};
use domain::{
    TweetId, UserId,
    message::{FollowerRange, Message as _, PublishTweet, SendNotificationChunk},
    values::{Channel, TweetText},
    wire_time,
};
use serde::Serialize;
use serde_json::json;
use storage::{feeds, notifications, outbox, tweets};

/// A tweet in an answer.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Tweet {
    id: TweetId,
    author: String,
    text: String,
    #[serde(with = "wire_time")]
    created_at: DateTime<Utc>,
}

impl From<tweets::Shown> for Tweet {
    fn from(tweet: tweets::Shown) -> Self {
        let tweets::Shown { id, author, text, created_at } = tweet;
        Self { id, author, text, created_at }
    }
}

/// All followers there can be.
const EVERYBODY: FollowerRange = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };

pub(crate) async fn post(
    gateway: web::Data<Gateway>,
    correlation_id: CorrelationId,
    Json(mut fields): Json,
) -> Result<HttpResponse, Error> {
    let author = fields.required("userId", fields::id::<UserId>);
    let text = fields.required("text", text(TweetText::parse_new));
    let by_workers = fields.optional("async", fields::flag).unwrap_or(false);
    let (author, text) = fields.finish((author, text))?;
    let id = if by_workers {
        let post = move |conn: &mut _| {
            let tweet = tweets::post(conn, author, &text)?;
            let id = tweet.id;
            let message = PublishTweet(tweet).envelope().correlated(Some(correlation_id.as_str()));
            outbox::push(conn, &[message])?;
            Ok(id)
        };
        gateway.write(&[Subject::User(author)], gateway.soon(), post).await?
    } else {
        let post = move |conn: &mut _| {
            let tweet = tweets::post(conn, author, &text)?;
            feeds::write(conn, &[(tweet.id, EVERYBODY)])?;
            for channel in Channel::ALL {
                notifications::record_chunks(conn, channel, &[&SendNotificationChunk::of(&tweet, EVERYBODY, channel)])?;
            }
            Ok(tweet.id)
        };
        gateway.write(&[Subject::Rows, Subject::User(author)], gateway.later(), post).await?
    };
    Ok(HttpResponse::Ok().json(json!({"success": true, "id": id})))
}

pub(crate) async fn list(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let (offset, limit) = fields::page(&mut fields);
    fields.finish(())?;
    let tweets = gateway.read(move |conn| tweets::page(conn, offset, limit)).await?;
    Ok(HttpResponse::Ok().json(json!({"tweets": tweets.into_iter().map(Tweet::from).collect::<Vec<_>>()})))
}

pub(crate) async fn delete(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let id = fields.required("id", fields::id::<TweetId>);
    let (id,) = fields.finish((id,))?;
    gateway.write(&[Subject::Tweet(id)], gateway.soon(), move |conn| tweets::delete(conn, id)).await?;
    Ok(HttpResponse::Ok().json(json!({"success": true})))
}
