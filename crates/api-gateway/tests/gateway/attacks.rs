//! What a client may do to the process that no client should: it's told so, or its connection ends, and others are served.

use crate::{
    app::Answer,
    process::Process,
    raw::{Client, Raw, allow_connections},
};
use serde_json::json;
use std::{fs, net::Ipv4Addr, thread};
use test_support::{TestDatabase, eventually, sql};

/// For tests of limits by address: by default they don't hold on this machine. These addresses are in no network.
const LIMITED: (&str, &str) = ("api_gateway.unlimited_addresses", r#""192.0.2.0/24""#);

/// Longer than any test takes: what must not be met where another limit is looked at.
const LONG: &str = "600000";

/// A gateway, and a user with a feed.
struct Gateway {
    process: Process,
    db: TestDatabase,
}

impl Gateway {
    fn start(settings: &[(&str, &str)]) -> Self {
        allow_connections();
        let db = TestDatabase::new();
        db.execute(
            r#"INSERT INTO "user" (login, channel, email)
               VALUES ('ann', 'email', 'ann@example.com'), ('bob', 'email', 'bob@example.com')"#,
        );
        db.execute(
            "INSERT INTO subscription (author_id, follower_id, since_tweet_id, after_tweet_id) VALUES (1, 2, 0, 0)",
        );
        db.execute("INSERT INTO tweet (author_id, text) SELECT 1, repeat('x', 140) FROM generate_series(1, 100)");
        db.execute("INSERT INTO feed_entry (reader_id, tweet_id) SELECT 2, id FROM tweet");
        let variables: Vec<_> = settings
            .iter()
            .map(|(key, value)| (format!("MURMURATION__{}", key.to_uppercase().replace('.', "__")), *value))
            .collect();
        let variables: Vec<_> = variables.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        Self { process: Process::start_with(&db, &variables), db }
    }

    fn connect(&self) -> Raw {
        Raw::connect(self.process.address())
    }

    fn client(&self, client: Client) -> Raw {
        client.connect(self.process.address())
    }

    /// Asks on a connection of its own.
    fn ask(&self, request: impl AsRef<[u8]>) -> Answer {
        let mut raw = self.connect();
        raw.send(request);
        raw.answer().expect("an answer")
    }

    /// It answers others as if nothing had been.
    #[track_caller]
    fn assert_serves(&self) {
        assert_eq!(self.ask(get("/health/live")).status, 200);
        let feed = self.ask(get("/api/v2/feed/2?limit=20"));
        assert_eq!((feed.status, feed.json()["tweets"].as_array().map(Vec::len)), (200, Some(20)), "{feed:?}");
    }

    /// The connections that the process has open.
    fn connections(&self) -> usize {
        let port = format!(":{:04X}", self.process.address().port());
        let table = fs::read_to_string("/proc/net/tcp").unwrap();
        let rows = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
        // One that the process has closed has no inode any more, whatever the kernel still does with it.
        rows.filter(|row| row[1].ends_with(&port) && row[3] == "01" && row[9] != "0").count()
    }

    fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }

    /// Holds an author's lock, as whoever posts or follows does, until the connection is dropped or says otherwise.
    fn hold_author(&self, author: i64) -> storage::Connection {
        let mut lock = self.db.database().connection().unwrap();
        sql::execute(&mut lock, "BEGIN").unwrap();
        sql::execute(&mut lock, &format!("SELECT pg_advisory_xact_lock({author})")).unwrap();
        lock
    }

    /// Sessions of the gateway's that wait for a lock.
    fn waiting(&self) -> i64 {
        self.db.count(
            "SELECT count(*) AS n FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock'",
        )
    }
}

fn release(mut lock: storage::Connection) {
    sql::execute(&mut lock, "ROLLBACK").unwrap();
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
}

fn post(path: &str, body: &str) -> String {
    post_with(path, "", body)
}

/// With more header lines.
fn post_with(path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    )
}

fn tweet(author: i64) -> String {
    json!({"userId": author, "text": "hello", "async": true}).to_string()
}

/// Whether a refusal has the form of one, and is no failure of the gateway's.
fn is_refusal(answer: &Answer) -> bool {
    let status = answer.status;
    ((400..500).contains(&status) || status == 503)
        && answer.header("content-type") == "application/problem+json"
        && answer.json()["status"] == status
        && (status == 503) != answer.header("retry-after").is_empty()
}

#[track_caller]
fn assert_refusal(answer: &Answer, what: &str) {
    assert!(is_refusal(answer), "{what}: {answer:?}");
}

#[test]
fn half_a_head_ends_on_a_fresh_connection_and_on_one_that_was_used() {
    let gateway = Gateway::start(&[("api_gateway.head_timeout_ms", "500")]);
    let half = "GET /health/live HTTP/1.1\r\nHost: localhost\r\nX-Slow: ";
    for (what, before, more) in [
        ("fresh", false, ""),
        ("fresh, byte by byte", false, "x"),
        ("used", true, ""),
        ("used, byte by byte", true, "x"),
    ] {
        let mut raw = gateway.connect();
        if before {
            raw.send(get("/health/live"));
            assert_eq!(raw.answer().unwrap().status, 200);
        }
        raw.send(half);
        let answered = eventually("the connection ends", || {
            raw.send(more);
            (!raw.peek().is_empty() || raw.has_ended()).then(|| raw.answer())
        });
        let answer = answered.unwrap_or_else(|| panic!("{what}: no answer"));
        assert_eq!(answer.status, 408, "{what}");
        assert_refusal(&answer, what);
        assert!(raw.answer().is_none(), "{what}: nothing more comes");
    }
    gateway.assert_serves();
}

#[test]
fn a_connection_without_a_request_is_closed() {
    let gateway = Gateway::start(&[("api_gateway.idle_timeout_ms", "500"), ("api_gateway.head_timeout_ms", LONG)]);
    let mut fresh = gateway.connect();
    let mut used = gateway.connect();
    used.send(get("/health/live"));
    assert_eq!(used.answer().unwrap().status, 200);
    assert!(fresh.answer().is_none());
    assert!(used.answer().is_none());
    gateway.assert_serves();
}

#[test]
fn half_a_body_is_408_whatever_it_is_of() {
    let gateway = Gateway::start(&[("api_gateway.request_timeout_ms", "500"), ("api_gateway.write_timeout_ms", LONG)]);
    let json = "application/json";
    for (path, content_type) in [
        ("/api/v1/post-tweet", json),
        ("/api/v1/event", json),
        ("/api/v1/message", json),
        ("/api/v1/user", "application/x-www-form-urlencoded"),
        ("/api/v1/update-user-avatar-link/1", "multipart/form-data; boundary=XX"),
    ] {
        for (framing, begun) in
            [("Content-Length: 1000", " ".to_owned()), ("Transfer-Encoding: chunked", "1\r\n \r\n".to_owned())]
        {
            let mut raw = gateway.connect();
            raw.send(format!(
                "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n{framing}\r\n\r\n{begun}"
            ));
            let answer = raw.answer().unwrap_or_else(|| panic!("{path} {framing}: no answer"));
            assert_eq!(answer.status, 408, "{path} {framing}");
            assert_refusal(&answer, path);
            assert!(raw.answer().is_none(), "{path} {framing}: the rest of the body is no request");
        }
    }
    gateway.assert_serves();
}

#[test]
fn an_answer_that_nobody_reads_ends() {
    let gateway = Gateway::start(&[
        ("api_gateway.write_timeout_ms", "500"),
        ("api_gateway.idle_timeout_ms", LONG),
        ("api_gateway.head_timeout_ms", LONG),
    ]);
    // More than what all buffers of the kernel's take: 2,000 answers of some 20 KB.
    let requests = get("/api/v1/get-feed/2?count=100").repeat(2000);
    let mut deaf: Vec<_> = (0..10)
        .map(|_| {
            let mut raw = gateway.client(Client { receive_buffer: Some(4096), ..Client::default() });
            raw.push(requests.as_bytes());
            raw
        })
        .collect();
    assert!(deaf.iter().all(Raw::has_received), "the first answers come");
    eventually("the gateway ends what nobody reads", || (gateway.connections() == 0).then_some(()));
    for raw in &mut deaf {
        for answer in raw.answers() {
            assert_eq!(answer.status, 200);
        }
    }
    gateway.assert_serves();
}

#[test]
fn one_who_reads_slowly_gets_all_of_it() {
    let gateway = Gateway::start(&[("api_gateway.write_timeout_ms", "2000")]);
    let mut raw = gateway.client(Client { receive_buffer: Some(4096), ..Client::default() });
    let path = "/api/v1/get-feed/2?count=100";
    raw.send(get(path).repeat(100));
    for _ in 0..100 {
        assert_eq!(raw.answer().expect("all are answered").json()["tweets"].as_array().unwrap().len(), 100);
    }
}

/// What is sent, how it's called, and the statuses that may come of it, one for each answer; 0 stands for the connection's end
/// without an answer. What comes after these must be refusals.
struct Case {
    what: &'static str,
    sent: Vec<u8>,
    first: &'static [u16],
}

fn case(what: &'static str, sent: impl Into<Vec<u8>>, first: &'static [u16]) -> Case {
    Case { what, sent: sent.into(), first }
}

fn no_http() -> Vec<Case> {
    let live = "GET /health/live HTTP/1.1\r\nHost: localhost\r\n";
    let tweet = "POST /api/v1/post-tweet HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    let body = tweet_body();
    let length = body.len();
    let chunked = format!("{tweet}Transfer-Encoding: chunked\r\n\r\n");
    let head = |lines: &str| format!("{tweet}{lines}\r\n\r\n{body}");
    vec![
        case("10,000 headers", format!("{live}{}\r\n", "X-Y: z\r\n".repeat(10_000)), &[400, 431]),
        case("a header of a megabyte", format!("{live}X-Y: {}\r\n\r\n", "z".repeat(1 << 20)), &[431]),
        case("a header's name of a megabyte", format!("{live}{}: z\r\n\r\n", "z".repeat(1 << 20)), &[431]),
        case("a head that never ends", format!("{live}X-Y: {}", "z".repeat(1 << 20)), &[431]),
        case("a path of 5 KB", get(&format!("/{}", "x".repeat(5000))), &[414]),
        case("a query of 5 KB", get(&format!("/api/v2/feed/2?{}", "x".repeat(5000))), &[414]),
        case("a path of 100 KB", get(&format!("/{}", "x".repeat(100_000))), &[414, 431]),
        case("a query of 100 KB", get(&format!("/health/live?{}", "x".repeat(100_000))), &[414, 431]),
        case("a method of 100 KB", format!("{} / HTTP/1.1\r\n\r\n", "X".repeat(100_000)), &[400, 431]),
        case("no HTTP at all", vec![0xff; 1000], &[400]),
        case("a lot that is no HTTP", vec![b'\0'; 1 << 20], &[400, 431]),
        case("empty lines", "\r\n".repeat(100_000), &[400, 431, 0]),
        case("lines of nothing but LF", "\n".repeat(100_000), &[400, 431, 0]),
        case("HTTP/0.9", "GET /health/live\r\n", &[400]),
        case("HTTP/2's preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[400, 0]),
        case("HTTP/3.7", "GET /health/live HTTP/3.7\r\nHost: localhost\r\n\r\n", &[400]),
        case("TLS", [&b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..], &[7; 506]].concat(), &[400]),
        case("no host", "GET /health/live HTTP/1.1\r\n\r\n", &[400]),
        case("two hosts", format!("{live}Host: evil.example\r\n\r\n"), &[400]),
        case("a NUL in the path", get("/health/live\0"), &[400]),
        case("a NUL in a header", format!("{live}X-Y: a\0b\r\n\r\n"), &[400]),
        case("a NUL in a header's name", format!("{live}X\0Y: z\r\n\r\n"), &[400]),
        case("a NUL in the method", "G\0ET /health/live HTTP/1.1\r\n\r\n", &[400]),
        case("a blank before the colon", format!("{live}X-Y : z\r\n\r\n"), &[400]),
        case("a folded header", format!("{live}X-Y: a\r\n b\r\n\r\n"), &[400]),
        case("a header without a colon", format!("{live}X-Y\r\n\r\n"), &[400]),
        case("a lower-case method", "get /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n", &[400, 405]),
        case("a method that is none", "G@T /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n", &[400]),
        case("a method of one's own", "BREW /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n", &[405]),
        case("CONNECT", "CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", &[400, 404, 405]),
        case("OPTIONS *", "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", &[400, 404, 405]),
        case("a path without a slash", get("health/live"), &[400, 404]),
        case("a path that leaves the root", get("/../../etc/passwd"), &[400, 404]),
        case(
            "both a length and chunks",
            head(&format!("Content-Length: {length}\r\nTransfer-Encoding: chunked")),
            &[400],
        ),
        case(
            "both, the other way around",
            head(&format!("Transfer-Encoding: chunked\r\nContent-Length: {length}")),
            &[400],
        ),
        case("two lengths", head(&format!("Content-Length: {length}\r\nContent-Length: 5")), &[400]),
        case("a list of lengths", head(&format!("Content-Length: {length}, {length}")), &[400]),
        case("a negative length", head("Content-Length: -1"), &[400]),
        case("a length with a sign", head(&format!("Content-Length: +{length}")), &[400]),
        case("a length in hex", head("Content-Length: 0x10"), &[400]),
        case("an endless length", head("Content-Length: 99999999999999999999999"), &[400, 413]),
        case("the longest length", head("Content-Length: 18446744073709551615"), &[400, 413]),
        case("an encoding that isn't known", head("Transfer-Encoding: gzip"), &[400]),
        case("an encoding that isn't quite known", head("Transfer-Encoding: xchunked"), &[400]),
        case("chunks, and then more", head("Transfer-Encoding: chunked, gzip"), &[400]),
        case("chunks in HTTP/1.0", chunked.replace("HTTP/1.1", "HTTP/1.0") + "5\r\nhello\r\n0\r\n\r\n", &[400]),
        case("a chunk's size that is none", format!("{chunked}zz\r\nhello\r\n0\r\n\r\n"), &[400]),
        case("no chunk's size", format!("{chunked}\r\nhello\r\n0\r\n\r\n"), &[400]),
        case("a negative chunk", format!("{chunked}-1\r\nhello\r\n0\r\n\r\n"), &[400]),
        case("an endless chunk", format!("{chunked}{}\r\nhello", "f".repeat(40)), &[400, 413]),
        case("the largest chunk", format!("{chunked}ffffffffffffffff\r\nhello"), &[400, 413]),
        case("a chunk that is longer than it says", format!("{chunked}1\r\nhello\r\n0\r\n\r\n"), &[400]),
        case(
            "a chunk's extension of a megabyte",
            format!("{chunked}5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(1 << 20)),
            &[400, 413, 431],
        ),
        case("a megabyte of chunks of one byte", chunked.clone() + &"1\r\n \r\n".repeat(200_000), &[413]),
        case(
            "a trailer of a megabyte",
            format!("{chunked}0\r\nX-Y: {}\r\n\r\n", "z".repeat(1 << 20)),
            &[400, 413, 431],
        ),
        case("chunks without an end", format!("{chunked}5\r\nhello\r\n"), &[400]),
        case("a length and no body", head("Content-Length: 1000"), &[400]),
        case(
            "an expectation that isn't known",
            format!("{tweet}Expect: wonders\r\nContent-Length: {length}\r\n\r\n{body}"),
            &[200, 400],
        ),
    ]
}

fn tweet_body() -> String {
    tweet(1)
}

#[test]
fn what_is_no_http_or_too_much_of_it_is_refused_and_ends() {
    let gateway = Gateway::start(&[]);
    let tweets = || gateway.db.count("SELECT count(*) AS n FROM tweet");
    let before = tweets();
    let mut wrong = Vec::new();
    for Case { what, sent, first } in no_http() {
        let mut raw = gateway.connect();
        raw.send(&sent);
        raw.finish();
        let answers = raw.answers();
        let status = answers.first().map_or(0, |answer| answer.status);
        // What isn't taken as a body isn't taken as the next request, either.
        let refused =
            answers.iter().enumerate().all(|(at, answer)| at == 0 && answer.status < 300 || is_refusal(answer));
        if !first.contains(&status) || !refused {
            let heads: Vec<_> = answers.iter().map(|answer| (answer.status, answer.header("content-type"))).collect();
            wrong.push(format!("{what}: {heads:?} instead of one of {first:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(tweets() <= before + 1, "only the one whose expectation nobody knows may have been taken");
    gateway.assert_serves();
}

#[test]
fn what_is_unusual_and_still_http_is_served() {
    let gateway = Gateway::start(&[]);
    let body = tweet_body();
    let length = body.len();
    let live = get("/health/live");
    let mut wrong = Vec::new();
    for (what, sent, statuses) in [
        ("an absolute URI", get("http://localhost/health/live"), vec![200]),
        (
            "a body on a GET",
            live.replace("\r\n\r\n", &format!("\r\nContent-Length: {}\r\n\r\n{live}", live.len())) + &live,
            vec![200, 200],
        ),
        ("an empty line before the request", format!("\r\n{live}"), vec![200]),
        ("HTTP/1.0", "GET /health/live HTTP/1.0\r\n\r\n".into(), vec![200]),
        (
            "chunks with extensions",
            format!(
                "POST /api/v1/post-tweet HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Transfer-Encoding: chunked\r\n\r\n{length:X};name=value\r\n{body}\r\n0\r\n\r\n{live}"
            ),
            vec![200, 200],
        ),
    ] {
        let mut raw = gateway.connect();
        raw.send(&sent);
        raw.finish();
        let got: Vec<_> = raw.answers().iter().map(|answer| answer.status).collect();
        if got != statuses {
            wrong.push(format!("{what}: {got:?} instead of {statuses:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    gateway.assert_serves();
}

#[test]
fn a_connection_that_is_to_close_does_after_that_answer() {
    let gateway = Gateway::start(&[]);
    for (path, status) in [("/health/live", 200), ("/api/v2/feed/2", 200), ("/nowhere", 404)] {
        let request = get(path).replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
        let mut raw = gateway.connect();
        raw.send(&request);
        let statuses: Vec<_> = raw.answers().iter().map(|answer| answer.status).collect();
        assert_eq!(statuses, [status], "{path}");
    }
}

#[test]
fn what_comes_after_connection_close_isnt_taken() {
    let gateway = Gateway::start(&[]);
    let tweets = || gateway.db.count("SELECT count(*) AS n FROM tweet");
    let before = tweets();
    let request = get("/health/live").replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
    let mut raw = gateway.connect();
    raw.send(request + &post("/api/v1/post-tweet", &tweet_body()));
    let answers = raw.answers();
    assert_eq!(answers.first().map(|answer| answer.status), Some(200));
    assert!(answers.iter().skip(1).all(is_refusal), "RFC 9112, section 9.6: {answers:?}");
    assert_eq!(tweets(), before);
}

#[test]
fn pipelined_requests_are_answered_in_order_behind_a_slow_one() {
    let gateway = Gateway::start(&[
        ("api_gateway.request_timeout_ms", LONG),
        ("api_gateway.long_request_timeout_ms", LONG),
        ("database.lock_timeout_ms", "500000"),
        ("database.statement_timeout_ms", LONG),
        ("database.call_timeout_ms", LONG),
    ]);
    let lock = gateway.hold_author(1);
    let named = |request: &str, name: usize| request.replacen("\r\n", &format!("\r\nX-Correlation-Id: {name}\r\n"), 1);
    let mut raw = gateway.connect();
    raw.send(named(&post("/api/v1/post-tweet", &tweet(1)), 0));
    eventually("the first one waits", || (gateway.waiting() == 1).then_some(()));
    // As many as are taken: the gateway may stop reading, and need keep none of them in hand.
    let flood: String = (1..=20_000).map(|name| named(&get("/health/live"), name)).collect();
    let before = gateway.resident_bytes();
    let sent = raw.push(flood.as_bytes());
    gateway.assert_serves();
    let grown = gateway.resident_bytes().saturating_sub(before);
    assert!(grown < 30_000_000, "{grown} bytes for a flood of {sent}");
    release(lock);
    let whole = flood[..sent].matches("\r\n\r\n").count();
    for name in 0..=whole {
        let answer = raw.answer().unwrap_or_else(|| panic!("no answer to request {name} of {whole}"));
        assert_eq!((answer.status, answer.header("x-correlation-id")), (200, &*name.to_string()));
    }
    gateway.assert_serves();
}

#[test]
fn a_thousand_idle_connections_keep_nobody_from_being_served() {
    let gateway = Gateway::start(&[]);
    let mut idle: Vec<_> = (0..1000)
        .map(|number| {
            let mut raw = gateway.connect();
            if number % 2 == 0 {
                raw.send(get("/health/live"));
                assert_eq!(raw.answer().unwrap().status, 200);
            }
            raw
        })
        .collect();
    gateway.assert_serves();
    drop(idle.split_off(500));
    gateway.assert_serves();
    drop(idle);
    eventually("none is left", || (gateway.connections() == 0).then_some(()));
}

#[test]
fn at_the_limit_of_connections_the_one_that_has_been_idle_longest_makes_room() {
    let gateway = Gateway::start(&[("api_gateway.connections", "20"), ("api_gateway.idle_timeout_ms", LONG)]);
    let used = || {
        let mut raw = gateway.connect();
        raw.send(get("/health/live"));
        assert_eq!(raw.answer().unwrap().status, 200);
        raw
    };
    let elsewhere = Client { address: Ipv4Addr::new(127, 0, 0, 2), ..Client::default() };
    let mut idle: Vec<_> = (0..20).map(|_| used()).collect();
    let mut new = gateway.client(elsewhere);
    new.send(get("/health/live"));
    assert_eq!(new.answer().expect("there's room").status, 200);
    assert!(idle[0].answer().is_none(), "the first one has been idle longest");
    for raw in &mut idle[1..] {
        raw.send(get("/health/live"));
        assert_eq!(raw.answer().expect("it was no longer idle").status, 200);
    }
}

#[test]
fn a_connection_too_many_is_refused_where_none_is_idle() {
    let gateway = Gateway::start(&[("api_gateway.connections", "10"), ("api_gateway.request_timeout_ms", "60000")]);
    let busy: Vec<_> = (0..10)
        .map(|_| {
            let mut raw = gateway.connect();
            raw.send("POST /api/v1/post-tweet HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n");
            raw
        })
        .collect();
    eventually("all are there", || (gateway.connections() == 10).then_some(()));
    let elsewhere = Client { address: Ipv4Addr::new(127, 0, 0, 2), ..Client::default() };
    // What has been sent may not have been looked at yet; then one of them still counts as idle.
    eventually("one too many is refused", || {
        let mut raw = gateway.client(elsewhere);
        raw.send(get("/health/live"));
        let answer = raw.answer()?;
        (answer.status == 503).then(|| {
            assert_refusal(&answer, "one too many");
            assert!(raw.answer().is_none());
        })
    });
    drop(busy);
    eventually("there's room again", || {
        let mut raw = gateway.client(elsewhere);
        raw.send(get("/health/live"));
        (raw.answer()?.status == 200).then_some(())
    });
    gateway.assert_serves();
}

#[test]
fn one_address_has_no_more_connections_than_it_may() {
    let gateway = Gateway::start(&[LIMITED, ("api_gateway.connections_per_address", "5")]);
    let requests = "POST /api/v1/post-tweet HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n";
    let mut taken: Vec<_> = (0..5)
        .map(|_| {
            let mut raw = gateway.connect();
            raw.send(requests);
            raw
        })
        .collect();
    eventually("all are there", || (gateway.connections() == 5).then_some(()));
    let mut sixth = gateway.connect();
    sixth.send(get("/health/live"));
    if let Some(answer) = sixth.answer() {
        assert_refusal(&answer, "the sixth connection");
        assert!(sixth.answer().is_none());
    }
    let mut other = gateway.client(Client { address: Ipv4Addr::new(127, 0, 0, 2), ..Client::default() });
    other.send(get("/health/live"));
    assert_eq!(other.answer().expect("this is another address").status, 200);
    drop(taken.pop());
    eventually("there's room again", || {
        let mut raw = gateway.connect();
        raw.send(get("/health/live"));
        (raw.answer()?.status == 200).then_some(())
    });
}

#[test]
fn an_address_that_asks_for_too_much_is_told_when_it_may_again() {
    let gateway = Gateway::start(&[
        LIMITED,
        ("api_gateway.reads_per_s", "3"),
        ("api_gateway.writes_per_s", "3"),
        ("api_gateway.bulk_writes_per_s", "3"),
        ("api_gateway.sign_ups_per_minute", "3"),
    ]);
    let event = json!({"accountId": "a", "payload": 1}).to_string();
    let user = json!({"login": "cid", "email": "cid@example.com"}).to_string();
    for (what, request) in [
        ("read", get("/api/v2/feed/2")),
        ("write", post("/api/v1/post-tweet", &tweet_body())),
        ("bulk", post("/api/v1/event", &event)),
        ("sign-up", post("/api/v1/user", &user)),
    ] {
        // What comes slowly enough is never too much: so all of these at once.
        let mut raw = gateway.connect();
        raw.send(request.repeat(30));
        let answers: Vec<_> = (0..30).map(|_| raw.answer().expect("an answer")).collect();
        let (refused, served): (Vec<_>, Vec<_>) = answers.into_iter().partition(|answer| answer.status == 429);
        assert!(!refused.is_empty() && served.len() >= 3, "{what}: {refused:?} {served:?}");
        for answer in &served {
            assert!(answer.header("ratelimit").starts_with(&format!("\"{what}\";r=")), "{what}: {answer:?}");
            assert!(answer.header("ratelimit-policy").starts_with(&format!("\"{what}\";q=3;w=")), "{what}: {answer:?}");
        }
        for answer in &refused {
            assert!(answer.complaints().is_empty(), "{what}");
            assert!(answer.header("retry-after").parse::<u64>().is_ok_and(|seconds| seconds > 0), "{what}: {answer:?}");
            assert!(answer.header("ratelimit").starts_with(&format!("\"{what}\";r=0")), "{what}: {answer:?}");
        }
        let mut other = gateway.client(Client { address: Ipv4Addr::new(127, 0, 0, 2), ..Client::default() });
        other.send(&request);
        assert!(other.answer().expect("an answer").status != 429, "{what}: this is another address");
    }
    for _ in 0..30 {
        assert_eq!(gateway.ask(get("/health/live")).status, 200, "health is for everybody");
    }
}

#[test]
fn slow_bodies_are_held_to_the_budget() {
    const BODY: usize = 15_000_000;
    let gateway =
        Gateway::start(&[("api_gateway.body_budget_bytes", "20000000"), ("api_gateway.request_timeout_ms", "60000")]);
    let before = gateway.resident_bytes();
    let head = format!(
        "POST /api/v1/event HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {BODY}\r\n\r\n"
    );
    let part = vec![b' '; 3_000_000];
    let mut slow: Vec<_> = (0..20)
        .map(|_| {
            let mut raw = gateway.connect();
            raw.send(&head);
            raw.send(&part);
            raw
        })
        .collect();
    // Together they have sent three times as much as is taken.
    let refused = eventually("some are refused", || {
        let refused = slow.iter_mut().filter_map(|raw| (!raw.peek().is_empty()).then(|| raw.answer())).flatten();
        let refused: Vec<_> = refused.collect();
        (!refused.is_empty()).then_some(refused)
    });
    for answer in refused {
        assert_eq!(answer.status, 503);
        assert_refusal(&answer, "beyond the budget");
    }
    let grown = gateway.resident_bytes().saturating_sub(before);
    assert!(grown < 50_000_000, "{grown} bytes");
    gateway.assert_serves();
    drop(slow);
    let event = post("/api/v1/event", &json!({"accountId": "a", "payload": 1}).to_string());
    eventually("there's room for others again", || {
        let answer = gateway.ask(&event);
        (answer.status == 202).then_some(())
    });
}

#[test]
fn thirty_sign_ups_leave_no_memory_behind() {
    let gateway = Gateway::start(&[("api_gateway.request_timeout_ms", "60000")]);
    gateway.assert_serves();
    let sign_up = |number: usize| {
        let login = format!("user{number}");
        let user =
            json!({"login": login, "email": format!("{login}@example.com"), "password": format!("7u%Xq {login}")});
        gateway.ask(post("/api/v2/user", &user.to_string()))
    };
    // What the first one needs, others use again.
    assert_eq!(sign_up(0).status, 201);
    let before = gateway.resident_bytes();
    thread::scope(|scope| {
        let sign_up = &sign_up;
        let sign_ups: Vec<_> = (1..=30).map(|number| scope.spawn(move || sign_up(number))).collect();
        for answer in sign_ups.into_iter().map(|sign_up| sign_up.join().unwrap()) {
            assert_eq!(answer.status, 201, "{answer:?}");
        }
    });
    let grown = gateway.resident_bytes().saturating_sub(before);
    assert!(grown < 40_000_000, "{grown} bytes");
    gateway.assert_serves();
}

#[test]
fn an_author_whose_lock_is_held_keeps_nobody_else_waiting() {
    let gateway = Gateway::start(&[
        ("api_gateway.request_timeout_ms", LONG),
        ("api_gateway.long_request_timeout_ms", LONG),
        ("database.lock_timeout_ms", "500000"),
        ("database.statement_timeout_ms", LONG),
        ("database.call_timeout_ms", LONG),
    ]);
    let lock = gateway.hold_author(1);
    let mut posts: Vec<_> = (0..20)
        .map(|_| {
            let mut raw = gateway.connect();
            raw.send(post("/api/v1/post-tweet", &tweet(1)));
            raw
        })
        .collect();
    eventually("the author's posts wait", || (gateway.waiting() >= 1).then_some(()));
    for _ in 0..50 {
        gateway.assert_serves();
        assert_eq!(gateway.ask(post("/api/v1/post-tweet", &tweet(2))).status, 200, "another author's");
    }
    release(lock);
    for raw in &mut posts {
        let answer = raw.answer().expect("an answer");
        if answer.status != 200 {
            assert_eq!(answer.status, 503);
            assert_refusal(&answer, "one of many posts of an author");
        }
    }
    gateway.assert_serves();
}

#[test]
fn clients_that_leave_amid_a_body_or_an_answer_leave_nothing_behind() {
    let gateway = Gateway::start(&[("api_gateway.request_timeout_ms", "60000")]);
    let half = "POST /api/v1/event HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n[";
    let feed = get("/api/v1/get-feed/2?count=100");
    for _ in 0..50 {
        let mut raw = gateway.connect();
        raw.send(half);
        let mut raw = gateway.connect();
        raw.send(half);
        raw.finish();
        let mut raw = gateway.connect();
        raw.send(&feed);
        let mut raw = gateway.connect();
        raw.send(feed.repeat(20));
        eventually("the answer has begun", || (!raw.peek().is_empty()).then_some(()));
        // What hasn't been read makes this a reset.
    }
    eventually("none is left", || (gateway.connections() == 0).then_some(()));
    assert_eq!(gateway.db.count("SELECT count(*) AS n FROM stream_event"), 0);
    gateway.assert_serves();
}

#[test]
fn a_body_that_is_too_large_isnt_asked_for() {
    let gateway = Gateway::start(&[]);
    let ask = |length: usize, path: &str| {
        let mut raw = gateway.connect();
        raw.send(format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n"
        ));
        let answer = raw.answer().expect("an answer");
        (raw, answer)
    };
    for (path, length) in [("/api/v1/post-tweet", 70_000), ("/api/v1/event", 17_000_000), ("/api/v1/message", 600_000)]
    {
        let (_, answer) = ask(length, path);
        assert_eq!(answer.status, 413, "{path}");
        assert_refusal(&answer, path);
    }
    let body = tweet_body();
    let (mut raw, answer) = ask(body.len(), "/api/v1/post-tweet");
    assert_eq!(answer.status, 100);
    raw.send(&body);
    assert_eq!(raw.answer().unwrap().status, 200);
    gateway.assert_serves();
}

#[test]
fn a_body_without_a_content_type_is_415() {
    let gateway = Gateway::start(&[]);
    let without = |request: String| request.replace("Content-Type: application/json\r\n", "");
    for (path, body) in [
        ("/api/v1/post-tweet", tweet_body()),
        ("/api/v1/event", json!({"accountId": "a", "payload": 1}).to_string()),
        ("/api/v1/message", json!({"text": "hello"}).to_string()),
        ("/api/v1/user", json!({"login": "cid", "email": "cid@example.com"}).to_string()),
    ] {
        let answer = gateway.ask(without(post(path, &body)));
        assert_eq!(answer.status, 415, "{path}");
        assert_refusal(&answer, path);
        // What a page elsewhere may send without asking first.
        let plain = post(path, &body).replace("application/json", "text/plain");
        assert_eq!(gateway.ask(plain).status, 415, "{path}");
    }
    assert_eq!(gateway.db.count("SELECT count(*) AS n FROM tweet"), 100);
    let subscribe = without(post("/api/v1/create-subscription/2/1", ""));
    assert_eq!(gateway.ask(subscribe).status, 201, "where there's no body, none is asked for");
}

#[test]
fn other_hosts_than_those_that_are_allowed_are_421() {
    let gateway = Gateway::start(&[("api_gateway.hosts", r#""example.org", "www.example.org""#)]);
    let ask = |host: &str| gateway.ask(get("/api/v2/feed/2").replace("localhost", host));
    // Nobody can have a name of his own lead to an address, or to `localhost`.
    for host in
        ["example.org", "EXAMPLE.org", "www.example.org", "example.org:7777", "localhost", "127.0.0.1:7777", "[::1]"]
    {
        assert_eq!(ask(host).status, 200, "{host}");
    }
    for host in [
        "evil.example",
        "example.org.evil.example",
        "localhost.evil.example",
        "evil.example:80",
        "example.org@evil.example",
    ] {
        let answer = ask(host);
        assert!([400, 421].contains(&answer.status), "{host}: {answer:?}");
        assert_refusal(&answer, host);
    }
    let absolute = get("http://evil.example/api/v2/feed/2").replace("localhost", "example.org");
    assert_eq!(gateway.ask(absolute).status, 421, "of the two, the URI's counts");
}

#[test]
fn what_another_site_sends_changes_nothing() {
    let gateway = Gateway::start(&[("api_gateway.origins", r#""https://example.org""#)]);
    let post = |headers: &str| gateway.ask(post_with("/api/v1/post-tweet", headers, &tweet_body())).status;
    for good in [
        "",
        "Sec-Fetch-Site: same-origin\r\n",
        "Sec-Fetch-Site: none\r\n",
        "Origin: https://example.org\r\nSec-Fetch-Site: cross-site\r\n",
        "Origin: https://example.org\r\n",
        "Origin: http://localhost\r\n",
    ] {
        assert_eq!(post(good), 200, "{good}");
    }
    let before = gateway.db.count("SELECT count(*) AS n FROM tweet");
    for bad in [
        "Sec-Fetch-Site: cross-site\r\n",
        "Sec-Fetch-Site: same-site\r\n",
        "Origin: https://evil.example\r\n",
        "Origin: https://evil.example\r\nSec-Fetch-Site: cross-site\r\n",
        "Origin: http://example.org\r\n",
        "Origin: https://example.org.evil.example\r\n",
        "Origin: null\r\n",
    ] {
        let answer = gateway.ask(post_with("/api/v1/post-tweet", bad, &tweet_body()));
        assert_eq!(answer.status, 403, "{bad}");
        assert_refusal(&answer, bad);
    }
    assert_eq!(gateway.db.count("SELECT count(*) AS n FROM tweet"), before);
    let read = get("/api/v2/feed/2")
        .replace("\r\n\r\n", "\r\nOrigin: https://evil.example\r\nSec-Fetch-Site: cross-site\r\n\r\n");
    assert_eq!(gateway.ask(read).status, 200, "it changes nothing");
}
