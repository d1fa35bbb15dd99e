//! This notifier's own part; what both have in common is tested in `notifier`.

use domain::{
    UserId,
    message::{FollowerRange, SendNotificationChunk},
    topology::queue,
    values::Channel,
};
use test_support::TestDatabase;
use worker::{Received, testing};

#[test]
fn followers_with_an_address_are_told_in_at_most_140_characters() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    db.follow(author, &[db.user("ann", Channel::Email), db.user("bob", Channel::Phone)]);
    let tweet = db.post(author, &"x".repeat(140));
    let everybody = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };
    let chunk = SendNotificationChunk::of(&tweet, everybody, Channel::Email).envelope(Channel::Email);
    let handled = testing::handle(
        &mut email_notifier::handler(db.database().clone()),
        [Received::of(queue::SEND_NOTIFICATION_EMAIL, chunk)],
    );
    assert!(handled.is_done(), "{handled:?}");
    let told =
        "SELECT count(*) AS n FROM email_notification WHERE email = 'ann@example.com' AND char_length(text) = 140";
    assert_eq!(db.count(told), 1);
    assert_eq!(db.count("SELECT (SELECT count(*) FROM email_notification) + count(*) AS n FROM sms_notification"), 1);
}
