//! Streams beside each other, each with keys, a name and a wire message of its own.

use crate::support::{Accounts, Running, Stage, random_batches};
use chrono::{DateTime, Utc};
use domain::{
    Failure,
    stream::{Payload, StreamEvent, StreamKey},
    topology::queue,
};
use sequenced::{Event, Handler};
use serde::{Deserialize, Serialize};
use std::{fmt, thread};
use storage::{PgConnection, stream_audit, streams};
use test_support::{eventually, sql};

const SCAN: &str = "parcel_scan";

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Parcel(String);

#[derive(Serialize, Deserialize)]
struct Scan {
    parcel: Parcel,
    number: i64,
    place: Payload,
    at: DateTime<Utc>,
}

impl fmt::Display for Parcel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl StreamKey for Parcel {
    type Event = Scan;

    fn as_str(&self) -> &str {
        &self.0
    }
}

impl StreamEvent for Scan {
    type Key = Parcel;

    fn new(parcel: Parcel, number: i64, place: Payload, at: DateTime<Utc>) -> Self {
        Self { parcel, number, place, at }
    }

    fn key(&self) -> &Parcel {
        &self.parcel
    }

    fn seq(&self) -> i64 {
        self.number
    }
}

/// A row for each scan.
struct Scans;

impl Handler for Scans {
    type Key = Parcel;
    type Done = ();

    fn work(&self, _: &Event) -> Result<(), Failure> {
        Ok(())
    }

    fn apply(&self, conn: &mut PgConnection, _: &str, done: &[(&Event, &())]) -> storage::Result<()> {
        for (Event { key, seq, .. }, ()) in done {
            sql::execute(conn, &format!("INSERT INTO scan (parcel, seq) VALUES ('{key}', {seq})"))?;
        }
        Ok(())
    }
}

#[test]
fn two_streams_with_keys_of_the_same_names_are_each_in_order() {
    let stage = Stage::new();
    let database = stage.database.database();
    stage.database.execute(&format!("INSERT INTO stream (stream, shards, queues) VALUES ('{SCAN}', 4, 4)"));
    stage.database.execute("CREATE TABLE scan (id bigserial PRIMARY KEY, parcel text NOT NULL, seq bigint NOT NULL)");
    let accounts = Accounts::prompt();
    let _relay = stage.relay();
    let running = [
        stage.start(&accounts),
        Running::start(stage.processor_of("parcel-tracker", SCAN, Scans)),
        Running::start(stage.processor_of("parcel-tracker", SCAN, Scans)),
    ];
    let (events, scans) = (random_batches(1, 20, 30), random_batches(2, 20, 30));
    thread::scope(|scope| {
        scope.spawn(|| events.iter().for_each(|batch| stage.database.append_events(batch)));
        for batch in &scans {
            let parse = |(key, place): &(String, String)| (Parcel(key.clone()), Payload::parse(place).expect("JSON"));
            let batch: Vec<_> = batch.iter().map(parse).collect();
            database.transaction(|conn| streams::append(conn, SCAN, &batch, None)).expect("they are accepted");
        }
    });
    stage.await_applied();
    let waiting = || stream_audit::backlog(&mut *database.connection().ok()?, SCAN, "").ok();
    eventually("all scans take effect", || (waiting()?.waiting == 0).then_some(()));
    running.into_iter().for_each(Running::stop);

    stage.assert_in_order(events.iter().flatten().count());
    let (totals, findings) =
        database.transaction(|conn| stream_audit::run(conn, SCAN, "", &[], |_| {})).expect("the audit runs");
    assert!(findings.iter().all(|finding| finding.count == 0), "{findings:?}");
    let scans = scans.iter().flatten().count() as i64;
    assert_eq!((totals.accepted, totals.applied), (scans, scans));
    let in_order = "SELECT count(*) AS n FROM (
                        SELECT seq, row_number() OVER (PARTITION BY parcel ORDER BY id) AS place FROM scan) scan
                    WHERE seq = place";
    assert_eq!(stage.database.count(in_order), scans);
    assert_eq!(stage.database.count("SELECT count(*) AS n FROM scan"), scans);
    assert_eq!(stage.depth(&[queue::DEAD_LETTER.into()]), 0, "every message was understood");
}
