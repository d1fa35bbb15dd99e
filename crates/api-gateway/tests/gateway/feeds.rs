//! Who sees which tweet.

use crate::app::{App, has_form, ids, keys};
use serde_json::{Value, json};
use std::{collections::BTreeSet, thread};
use ureq::http::Method;

#[test]
fn a_feed_holds_the_newest_tweets_the_oldest_of_them_first() {
    let app = App::start();
    let (author, reader) = (app.user("author"), app.user("reader"));
    assert_eq!(app.get(&format!("/api/v1/get-feed/{reader}")).ok(), json!({"tweets": []}));
    app.follow(author, reader);
    let posted: Vec<_> = (0..25).map(|i| app.tweet(author, &format!("tweet {i}"))).collect();
    let feed = app.get(&format!("/api/v1/get-feed/{reader}")).ok();
    assert_eq!(ids(&feed["tweets"]), posted[5..]);
    let feed = app.get(&format!("/api/v1/get-feed/{reader}?count=3")).ok();
    assert_eq!(ids(&feed["tweets"]), posted[22..]);
    let tweet = &feed["tweets"][2];
    assert_eq!(keys(tweet), ["author", "createdAt", "id", "text"]);
    assert_eq!((&tweet["author"], &tweet["text"]), (&json!("author"), &json!("tweet 24")));
    assert!(has_form(&tweet["createdAt"], "0000-00-00 00:00:00"));
}

#[test]
fn pages_of_a_feed_lead_from_one_to_the_next_and_end() {
    let app = App::start();
    let (author, reader) = (app.user("author"), app.user("reader"));
    app.follow(author, reader);
    let mut posted: Vec<_> = (0..6).map(|i| app.tweet(author, &format!("tweet {i}"))).collect();
    posted.reverse();

    let (mut seen, mut sizes, mut path) = (Vec::new(), Vec::new(), Some(format!("/api/v2/feed/{reader}?limit=2")));
    while let Some(next) = path.take() {
        let answer = app.get(&next);
        let page = answer.json();
        seen.extend(ids(&page["tweets"]));
        sizes.push(page["tweets"].as_array().unwrap().len());
        assert!(page["tweets"][0]["createdAt"].as_str().unwrap().ends_with('Z'), "{page}");
        // A tweet that arrives meanwhile moves nothing.
        app.tweet(author, "meanwhile");
        path = match &page["nextCursor"] {
            Value::Null => {
                assert_eq!(answer.header("link"), "");
                None
            }
            cursor => {
                let next = format!("/api/v2/feed/{reader}?limit=2&cursor={}", cursor.as_str().unwrap());
                assert_eq!(answer.header("link"), format!("<{next}>; rel=\"next\""));
                Some(next)
            }
        };
    }
    assert_eq!((seen, sizes), (posted, vec![2, 2, 2]));
}

#[test]
fn following_fills_in_exactly_the_hundred_newest_tweets() {
    let app = App::start();
    let (author, early, late) = (app.user("author"), app.user("early"), app.user("late"));
    app.follow(author, early);
    let posted: Vec<_> = (0..105).map(|i| app.tweet(author, &format!("tweet {i}"))).collect();
    app.follow(author, late);
    app.follow(author, late);
    assert_eq!(app.db.count("SELECT count(*) AS n FROM subscription"), 2);
    assert_eq!(app.feed(late), posted[5..]);
    assert_eq!(app.db.count(&format!("SELECT count(*) AS n FROM feed_entry WHERE reader_id = {late}")), 100);
    let newest = app.tweet(author, "newest");
    assert_eq!(app.feed(late).last(), Some(&newest));
    // What is older than the subscription shows is filled in for nobody and notifies nobody.
    assert_eq!(app.db.count(&format!("SELECT count(*) AS n FROM email_notification WHERE user_id = {late}")), 1);
    app.assert_audit_is_clean();
}

#[test]
fn leaving_takes_an_authors_tweets_out_of_the_feed_and_following_again_brings_them_back() {
    let app = App::start();
    let (author, other, reader) = (app.user("author"), app.user("other"), app.user("reader"));
    app.follow(author, reader);
    app.follow(other, reader);
    let (left, kept) = (app.tweet(author, "left"), app.tweet(other, "kept"));
    let path = format!("/api/v1/subscription/{author}/{reader}");
    assert_eq!(app.delete(&path).status, 200);
    assert_eq!(app.feed(reader), [kept]);
    assert_eq!(app.delete(&path).status, 404);
    let missed = app.tweet(author, "missed");
    assert_eq!(app.feed(reader), [kept]);
    app.follow(author, reader);
    assert_eq!(app.feed(reader), [left, kept, missed]);
    app.assert_audit_is_clean();
}

#[test]
fn deleting_a_tweet_or_its_author_takes_it_out_of_every_feed() {
    let app = App::start();
    let (author, other, reader) = (app.user("author"), app.user("other"), app.user("reader"));
    app.follow(author, reader);
    app.follow(other, reader);
    let (deleted, orphaned, kept) = (app.tweet(author, "1"), app.tweet(other, "2"), app.tweet(author, "3"));
    assert_eq!(app.delete(&format!("/api/v1/tweet/{deleted}")).status, 200);
    assert_eq!(app.delete(&format!("/api/v1/tweet/{deleted}")).status, 404);
    assert_eq!(app.feed(reader), [orphaned, kept]);
    app.delete(&format!("/api/v1/user/{other}")).ok();
    assert_eq!(app.feed(reader), [kept]);
    app.delete(&format!("/api/v1/user/{reader}")).ok();
    assert_eq!(app.get(&format!("/api/v1/get-feed/{reader}")).status, 404);
}

#[test]
fn nobody_misses_a_tweet_while_following_leaving_and_posting_go_on_at_once() {
    let app = App::start_with(|settings| {
        settings.api_gateway.workers = 2;
        settings.api_gateway.blocking_threads = 12;
    });
    let authors = [app.user("author0"), app.user("author1")];
    let readers: Vec<_> = (0..4)
        .map(|i| if i % 2 == 0 { app.user(&format!("reader{i}")) } else { app.phone_user(&format!("reader{i}")) })
        .collect();
    let app = &app;
    thread::scope(|scope| {
        for author in authors {
            for _ in 0..2 {
                scope.spawn(move || {
                    for _ in 0..15 {
                        app.tweet(author, "meanwhile");
                    }
                });
            }
        }
        for &reader in &readers {
            scope.spawn(move || {
                for round in 0..6 {
                    for author in authors {
                        app.follow(author, reader);
                        if round < 5 {
                            let path = format!("/api/v1/subscription/{author}/{reader}");
                            assert_eq!(app.send(Method::DELETE, &path, &[], None).status, 200);
                        }
                    }
                }
            });
        }
    });
    let posted: BTreeSet<_> = ids(&app.get("/api/v1/get-tweet?perPage=100").ok()["tweets"]).into_iter().collect();
    assert_eq!(posted.len(), 60);
    for reader in readers {
        assert_eq!(app.feed(reader).into_iter().collect::<BTreeSet<_>>(), posted);
    }
    app.assert_audit_is_clean();
}
