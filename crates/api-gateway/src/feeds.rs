//! Reading home feeds: one query for each request.

use crate::{
    error::Error,
    fields::{self, Fields, LIST_DEFAULT, LIST_MAX, text},
    gateway::Gateway,
    tweets::Tweet,
};
use actix_web::{HttpRequest, HttpResponse, http::header::LINK, web};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use domain::{TweetId, UserId, values::Invalid};
use serde::Serialize;
use storage::{feeds, tweets::Shown};

/// Above every tweet.
const NEWEST: TweetId = TweetId(i64::MAX);

#[derive(Serialize)]
struct Feed {
    tweets: Vec<Tweet>,
}

pub(crate) async fn newest(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let reader = fields.required("id", fields::id::<UserId>);
    let count = fields.optional("count", fields::between(1..=LIST_MAX)).unwrap_or(LIST_DEFAULT);
    let (reader,) = fields.finish((reader,))?;
    let tweets = gateway.read(move |conn| feeds::page(conn, reader, NEWEST, count)).await?;
    Ok(HttpResponse::Ok().json(Feed { tweets: tweets.into_iter().rev().map(Tweet::from).collect() }))
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    tweets: Vec<PageTweet>,
    next_cursor: Option<String>,
}

/// As [`Tweet`], with the time as RFC 3339.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PageTweet {
    id: TweetId,
    author: String,
    text: String,
    created_at: DateTime<Utc>,
}

impl From<Shown> for PageTweet {
    fn from(tweet: Shown) -> Self {
        let Shown { id, author, text, created_at } = tweet;
        Self { id, author, text, created_at }
    }
}

pub(crate) async fn page(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let reader = fields.required("id", fields::id::<UserId>);
    let limit = fields.optional("limit", fields::between(1..=LIST_MAX)).unwrap_or(LIST_DEFAULT);
    let before = fields.optional("cursor", text(tweet_of)).unwrap_or(NEWEST);
    let (reader,) = fields.finish((reader,))?;
    // One more than asked for tells whether there is another page.
    let mut tweets = gateway.read(move |conn| feeds::page(conn, reader, before, limit + 1)).await?;
    let shown = usize::try_from(limit).unwrap_or(usize::MAX);
    let is_last = tweets.len() <= shown;
    tweets.truncate(shown);
    let next_cursor = tweets.last().filter(|_| !is_last).map(|tweet| cursor_after(tweet.id));

    let mut response = HttpResponse::Ok();
    if let Some(cursor) = &next_cursor {
        response.insert_header((LINK, format!("</api/v2/feed/{reader}?limit={limit}&cursor={cursor}>; rel=\"next\"")));
    }
    Ok(response.json(Page { tweets: tweets.into_iter().map(PageTweet::from).collect(), next_cursor }))
}

/// The cursor of the page that follows after this tweet.
fn cursor_after(tweet: TweetId) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(tweet.0.to_be_bytes())
}

fn tweet_of(cursor: &str) -> Result<TweetId, Invalid> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(cursor).ok().and_then(|bytes| bytes.try_into().ok());
    let id = bytes.map(i64::from_be_bytes).filter(|id| *id > 0);
    id.map(TweetId).ok_or_else(|| Invalid("must be the nextCursor of an earlier response".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_names_its_tweet_and_nothing_else_is_one() {
        for id in [1, 255, i64::MAX] {
            assert_eq!(tweet_of(&cursor_after(TweetId(id))).unwrap(), TweetId(id));
        }
        let negative = BASE64_URL_SAFE_NO_PAD.encode((-1_i64).to_be_bytes());
        for bad in ["", "1", "AAAAAAAAAAE=", "AAAAAAAAAAA", "AAAAAAAAAAEA", &negative, "ü"] {
            assert!(tweet_of(bad).is_err(), "{bad}");
        }
    }
}
