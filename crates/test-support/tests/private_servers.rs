//! Servers of a test's own: what they keep over their bad days, and that they're gone afterwards.

use test_support::{PrivatePostgres, PrivateRabbitmq, TestDatabase, TestVhost, eventually};

/// Whether something listens at the address of a URL.
fn answers(url: &str) -> bool {
    let authority = url.rsplit('@').next().and_then(|rest| rest.split('/').next()).expect("a URL with an address");
    std::net::TcpStream::connect(authority).is_ok()
}

#[test]
fn a_private_postgres_keeps_what_was_committed_over_its_bad_days_and_leaves_nothing_behind() {
    let mut postgres = PrivatePostgres::new();
    postgres.start();
    let url = postgres.url();
    {
        let database = TestDatabase::on(&url);
        database.execute("INSERT INTO feed_entry (reader_id, tweet_id) VALUES (1, 1)");
        let entries = || database.count("SELECT count(*) AS n FROM feed_entry");
        postgres.kill();
        assert!(!answers(&url));
        postgres.start();
        eventually("lost connections have been replaced", || database.database().ping().ok());
        assert_eq!(entries(), 1);
        postgres.stop();
        assert!(!answers(&url));
        postgres.start();
        eventually("lost connections have been replaced", || database.database().ping().ok());
        let hurried = storage::Settings { connect_timeout_ms: 2000, call_timeout_ms: 500, ..database.settings() };
        let hurried = storage::Database::open(&hurried, "test").expect("a usable URL");
        // It may take longer once or twice, but not for ever.
        eventually("it answers soon enough", || hurried.ping().ok());
        let frozen = postgres.freeze();
        assert!(hurried.ping().is_err());
        drop(frozen);
        assert_eq!(entries(), 1);
    }
    let frozen = postgres.freeze();
    drop(postgres);
    drop(frozen);
    assert!(!answers(&url));
}

#[test]
fn a_private_rabbitmq_starts_empty_and_keeps_its_vhosts_over_its_bad_days() {
    let mut rabbitmq = PrivateRabbitmq::new();
    let url = rabbitmq.url();
    assert!(!answers(&url));
    rabbitmq.start();
    {
        let vhost = TestVhost::on(&url, &rabbitmq.management_url());
        rabbitmq.kill();
        assert!(!answers(&url));
        rabbitmq.start();
        rabbitmq.stop();
        assert!(!answers(&url));
        rabbitmq.start();
        assert_eq!(rabbitmq.eval(&format!("rabbit_vhost:exists(<<\"{}\">>)", vhost.name())), "true");
    }
    let frozen = rabbitmq.freeze();
    drop(rabbitmq);
    drop(frozen);
    assert!(!answers(&url));
}
