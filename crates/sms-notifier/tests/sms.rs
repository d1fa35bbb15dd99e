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
fn followers_with_a_number_are_told_in_at_most_60_characters() {
    let db = TestDatabase::new();
    let author = db.user("author", Channel::Email);
    db.follow(author, &[db.user("ann", Channel::Email), db.user("bob", Channel::Phone)]);
    let tweet = db.post(author, &"x".repeat(140));
    let everybody = FollowerRange { after: UserId(0), upto: UserId(i64::MAX) };
    let chunk = SendNotificationChunk::of(&tweet, everybody, Channel::Phone).envelope(Channel::Phone);
    let handled = testing::handle(
        &mut sms_notifier::handler(db.database().clone()),
        [Received::of(queue::SEND_NOTIFICATION_SMS, chunk)],
    );
    assert!(handled.is_done(), "{handled:?}");
    let told = "SELECT count(*) AS n FROM sms_notification WHERE phone = '+14155550123' AND char_length(text) = 60";
    assert_eq!(db.count(told), 1);
    assert_eq!(db.count("SELECT (SELECT count(*) FROM email_notification) + count(*) AS n FROM sms_notification"), 1);
}
