//! Streams, read from any place: against the shared RabbitMQ, each test in a vhost of its own.

use broker::{Consumer, Error, Publisher, Session, Settings, StreamOffset, Survey};
use chrono::{TimeDelta, Utc};
use domain::{
    Envelope,
    topology::{Expiry, Queue, Retention, Topology},
};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use test_support::{Action, Direction, Proxy, TestVhost, Trap, broker_settings, eventually};

const STREAM: &str = "message.p00";
/// A bound against hanging.
const SOON: Duration = Duration::from_secs(60);
/// How long nothing comes where nothing is to come.
const A_MOMENT: Duration = Duration::from_secs(1);
/// Offsets are without gaps within a segment only.
const RETENTION: Retention = Retention { max_bytes: 1 << 30, max_age_s: 3600, segment_bytes: 1 << 26 };

struct Stage {
    vhost: TestVhost,
    settings: Settings,
    publisher: Publisher,
}

impl Stage {
    fn new() -> Self {
        Self::with(RETENTION)
    }

    fn with(retention: Retention) -> Self {
        let vhost = TestVhost::new();
        let settings = broker_settings(vhost.url());
        let stage = Self { publisher: Publisher::new(&settings, "writing"), settings, vhost };
        stage.declare(retention);
        stage
    }

    fn declare(&self, retention: Retention) {
        let mut session = Session::open(&self.settings, "declaring").unwrap();
        broker::declare(&mut session, &Topology::log(1, retention)).unwrap();
    }

    fn publish(&mut self, count: usize, bytes: usize) {
        let message = |number| Envelope::new("message", "p00", format!("{number:0bytes$}").into_bytes());
        let messages: Vec<_> = (0..count).map(message).collect();
        self.publisher.publish_all(&messages, Instant::now() + SOON).unwrap();
    }

    fn reader(&self, start: StreamOffset) -> Consumer {
        Consumer::of_stream_queue(&self.settings, "reading", STREAM, 100, start)
    }

    fn survey(&self) -> Survey {
        Survey::open(&self.settings, "looking").unwrap()
    }
}

/// The offsets of the next messages, as many as that.
#[track_caller]
fn take(reader: &mut Consumer, count: usize) -> Vec<i64> {
    let mut offsets = Vec::new();
    eventually("the messages come", || {
        let batch = reader.next_batch(count - offsets.len(), Duration::ZERO, A_MOMENT).unwrap();
        offsets.extend(batch.into_iter().map(|delivery| delivery.offset.expect("a stream's deliveries have offsets")));
        (offsets.len() == count).then_some(())
    });
    offsets
}

/// The offset of the next message.
#[track_caller]
fn next(reader: &mut Consumer) -> i64 {
    take(reader, 1)[0]
}

/// Asserts that a reader is there, and that nothing comes to it.
#[track_caller]
fn assert_at_end(reader: &mut Consumer) {
    let batch = reader.next_batch(1, Duration::ZERO, A_MOMENT).unwrap();
    assert!(reader.connected() && batch.deliveries.is_empty(), "{batch:?}");
}

#[test]
fn reading_begins_where_it_is_asked_to_and_goes_on_past_the_prefetch() {
    let mut stage = Stage::new();
    stage.publish(500, 10);
    assert_eq!(next(&mut stage.reader(StreamOffset::First)), 0);
    let mut reader = stage.reader(StreamOffset::At(37));
    for offset in 37..500 {
        assert_eq!(next(&mut reader), offset);
    }
    assert_eq!(next(&mut stage.reader(StreamOffset::At(499))), 499);
    // On one connection, to other places and back.
    reader.read_from(STREAM, StreamOffset::At(5));
    assert_eq!(next(&mut reader), 5);
    reader.read_from(STREAM, StreamOffset::First);
    assert_eq!((next(&mut reader), next(&mut reader)), (0, 1));
}

#[test]
fn whoever_waits_at_the_end_gets_what_comes_and_beyond_it_nothing() {
    let mut stage = Stage::new();
    stage.publish(100, 10);
    let mut readers = [StreamOffset::Next, StreamOffset::At(100), StreamOffset::At(150)].map(|at| stage.reader(at));
    readers.iter_mut().for_each(assert_at_end);
    stage.publish(10, 10);
    let [after, at, beyond] = &mut readers;
    assert_eq!((next(after), next(at)), (100, 100));
    assert_at_end(beyond);
}

#[test]
fn a_lost_connection_is_followed_by_one_that_resumes_where_it_is_told_to() {
    let mut stage = Stage::new();
    stage.publish(10, 10);
    let mut reader = stage.reader(StreamOffset::First);
    assert_eq!(take(&mut reader, 10), (0..10).collect::<Vec<_>>());
    reader.resume_at(StreamOffset::At(7));
    eventually("the broker lists the reader's connection, and closes it", || {
        stage.vhost.close_connections();
        reader.next_batch(10, Duration::ZERO, Duration::ZERO).unwrap();
        (!reader.connected()).then_some(())
    });
    assert_eq!(take(&mut reader, 3), [7, 8, 9]);
}

#[test]
fn a_survey_finds_both_ends_also_when_the_oldest_messages_are_gone() {
    let mut stage = Stage::with(Retention { max_bytes: 1_000_000, segment_bytes: 500_000, ..RETENTION });
    let mut survey = stage.survey();
    assert_eq!((survey.first(STREAM).unwrap(), survey.newest(STREAM).unwrap()), (None, None));
    stage.publish(1500, 10);
    assert_eq!((survey.first(STREAM).unwrap(), survey.newest(STREAM).unwrap()), (Some(0), Some(1499)));
    let mut first = eventually("retention removes the first segment", || {
        stage.publish(100, 2000);
        survey.first(STREAM).unwrap().filter(|first| *first > 0)
    });
    // An offset that is gone stands for the first that is left.
    eventually("a reader begins with the first message that is left", || {
        // It may go on removing.
        first = survey.first(STREAM).unwrap()?.max(first);
        (next(&mut stage.reader(StreamOffset::At(0))) == first).then_some(())
    });
    assert!(survey.newest(STREAM).unwrap().unwrap() > first);
    assert!(matches!(survey.first("message.p07"), Err(Error::MissingQueue { .. })));
}

/// From the broker's next answer on that a reader may begin, nothing arrives on that connection.
fn silence(proxy: &Proxy) -> Trap {
    // The method consume-ok, and its frame's end.
    let begun = |bytes: &[u8]| {
        let at = bytes.windows(4).position(|window| window == [0, 60, 0, 21])?;
        Some(at + bytes[at..].iter().position(|byte| *byte == 0xce)? + 1)
    };
    proxy.trap(Direction::ToClient, begun, Action::Hold)
}

type Look = fn(&mut Survey) -> Result<Option<i64>, Error>;

#[test]
fn silence_is_an_error_and_what_comes_late_is_awaited() {
    let mut stage = Stage::new();
    stage.publish(10, 10);
    let (proxy, url) = Proxy::of(stage.vhost.url());
    let looks: [(Look, i64); 3] = [
        (|survey| survey.first(STREAM), 0),
        (|survey| survey.newest(STREAM), 9),
        (|survey| survey.since(STREAM, Utc::now() - TimeDelta::hours(1)), 0),
    ];
    for (look, there) in looks {
        let settings = Settings { confirm_timeout_ms: 5000, ..broker_settings(&url) };
        let silence = silence(&proxy);
        let found = look(&mut Survey::open(&settings, "looking").unwrap());
        assert!(silence.sprung() && matches!(found, Err(Error::TimedOut { .. })), "{there}: {found:?}");
    }
    for (look, there) in looks {
        let mut survey = Survey::open(&broker_settings(&url), "looking").unwrap();
        let silence = silence(&proxy);
        let found = thread::scope(|scope| {
            let looking = scope.spawn(|| look(&mut survey));
            eventually("the broker has begun to send", || silence.sprung().then_some(()));
            thread::sleep(A_MOMENT);
            drop(silence);
            looking.join().unwrap()
        });
        assert_eq!(found.unwrap(), Some(there));
    }
}

#[test]
fn the_newest_message_is_found_while_more_are_coming() {
    let mut stage = Stage::new();
    let mut survey = stage.survey();
    let mut known = 0;
    for _ in 0..20 {
        stage.publish(3000, 10);
        known += 3000;
        assert_eq!(survey.newest(STREAM).unwrap(), Some(known - 1));
    }
    let stop = AtomicBool::new(false);
    let published = thread::scope(|scope| {
        let publishing = scope.spawn(|| {
            let mut published = known;
            while !stop.load(Ordering::Relaxed) {
                stage.publish(100, 10);
                published += 100;
            }
            published
        });
        let mut before = known - 1;
        for _ in 0..20 {
            let newest = survey.newest(STREAM).unwrap().unwrap();
            assert!(newest >= before, "{newest} after {before}");
            before = newest;
        }
        stop.store(true, Ordering::Relaxed);
        publishing.join().unwrap()
    });
    assert_eq!(survey.newest(STREAM).unwrap(), Some(published - 1));
}

#[test]
fn a_time_stands_for_what_was_stored_since() {
    let mut stage = Stage::new();
    stage.publish(10, 10);
    // The broker counts in whole seconds.
    thread::sleep(Duration::from_millis(2100));
    let between = Utc::now() - TimeDelta::seconds(1);
    stage.publish(10, 10);
    let mut survey = stage.survey();
    assert_eq!(survey.since(STREAM, between + TimeDelta::hours(1)).unwrap(), None);
    let mut since = |time| survey.since(STREAM, time).unwrap();
    assert_eq!(since(between), Some(10));
    assert_eq!(since(between - TimeDelta::hours(1)), Some(0));
}

#[test]
fn a_stream_keeps_its_retention_and_another_kind_of_queue_is_a_conflict() {
    let stage = Stage::new();
    stage.declare(Retention { max_bytes: 2 * RETENTION.max_bytes, ..RETENTION });
    let mut session = Session::open(&stage.settings, "declaring").unwrap();
    let queue = Queue { name: STREAM.into(), expiry: Expiry::Never };
    let quorum = Topology { queues: vec![queue], ..Topology::default() };
    assert!(matches!(broker::declare(&mut session, &quorum), Err(Error::Conflict { .. })));
    let queue = Queue { name: "plain".into(), expiry: Expiry::Never };
    let plain = Topology { queues: vec![queue], ..Topology::default() };
    broker::declare(&mut session, &plain).unwrap();
    let queue = Queue { name: "plain".into(), expiry: Expiry::Retain(RETENTION) };
    let stream = Topology { queues: vec![queue], ..Topology::default() };
    assert!(matches!(broker::declare(&mut session, &stream), Err(Error::Conflict { .. })));
}

#[test]
fn a_publisher_whose_messages_are_all_confirmed_already_sends_the_next_at_once() {
    let stage = Stage::new();
    // A confirm that nobody sends would be waited for this long.
    let settings = Settings { confirm_timeout_ms: 3_600_000, window_messages: 16, ..stage.settings.clone() };
    let mut publisher = Publisher::new(&settings, "writing");
    let messages: Vec<_> = (0..20_000).map(|_| Envelope::new("message", "p00", b"{}".to_vec())).collect();
    assert!(publisher.publish_all(&messages, Instant::now() + 5 * SOON).is_ok());
}
