//! What producers, workers and operators really call, on a real database, in a random order of single steps: under a
//! broker that loses, doubles, delays, reorders and misroutes messages, with producers that roll back, workers that crash
//! or freeze and go on later, and no leases that would keep them apart. Then the faults stop, and every accepted event
//! must have taken effect once, in order. A fleet that lacks one of its guards must be found out.
//!
//! The order of the steps depends on the seed alone.

use chrono::Utc;
use domain::{
    Failure,
    stream::{ACCOUNT_EVENT, AccountEvent, AccountId, Payload, StreamEvent as _, key_hash, shard},
};
use rand::{
    RngExt as _, SeedableRng as _,
    rngs::SmallRng,
    seq::{IndexedRandom as _, IteratorRandom as _},
};
use sequenced::{Event, Handler, apply};
use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::Duration,
};
use storage::{
    Connection, Error, PgConnection,
    account_effects::{self, Effect},
    outbox, parked, stream_audit,
    streams::{self, Change, Failed, Layout},
};
use test_support::{TestDatabase, sql};

const KEYS: [&str; 4] = ["a", "b", "c", "d"];
const STEPS: u32 = 800;

/// What keeps order, and what a control lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// Sequences come from a row that stays locked to the end of the transaction.
    LockedHead,
    /// Only those events have an effect whose cursor has moved.
    Cursor,
    /// A worker keeps to the revision that it loaded.
    Revision,
    /// The effect is part of the transaction that moves the cursor.
    OneTransaction,
    /// Keys with events that wait are looked for.
    Sweep,
    /// A key that goes on rests no more.
    Rouse,
}

/// Payloads are numbers, and so is what the effect holds: it shows which payload took effect.
struct Numbers;

impl Handler for Numbers {
    type Key = AccountId;

    type Done = i32;

    fn work(&self, event: &Event) -> Result<i32, Failure> {
        event.payload.parse().map_err(Failure::permanent)
    }

    fn apply(&self, conn: &mut PgConnection, worker: &str, done: &[(&Event, &i32)]) -> storage::Result<()> {
        let effects: Vec<Effect<'_>> = done
            .iter()
            .map(|(event, number)| Effect { account: &event.key, seq: event.seq, work_ms: **number })
            .collect();
        account_effects::record(conn, worker, &effects)
    }
}

struct Producer {
    conn: Connection,
    /// Keys and numbers of the events that aren't committed yet.
    open: Vec<(&'static str, i32)>,
}

#[derive(Default)]
struct Worker {
    name: String,
    /// How it believes the stream to be divided, and which shards to be its own.
    shards: i32,
    own: Vec<i32>,
    /// The event of each key that it has loaded.
    lanes: BTreeMap<String, Event>,
    /// For how many steps it does nothing, with what it has loaded.
    frozen: u32,
}

impl Worker {
    fn owns(&self, key: &str) -> bool {
        self.own.contains(&shard(key_hash(key), self.shards))
    }
}

/// What happened: a run in which too little did proves nothing.
#[derive(Debug, Default)]
struct Counts {
    accepted: usize,
    rolled_back: usize,
    lost: usize,
    doubled: usize,
    crashed: usize,
    beaten: usize,
    changed: usize,
    divided: usize,
}

/// How many errors there are of each kind.
#[derive(Debug, Default, PartialEq, Eq)]
struct Errors {
    /// Accepted events without an effect.
    missing: i64,
    /// Effects of an event that has one already.
    doubled: i64,
    /// Effects behind one of a later event.
    disordered: i64,
    /// Effects that aren't of what was accepted as the key's event of this number.
    wrong: i64,
    /// What the operator's own check finds.
    audited: u64,
}

struct Fleet<'a> {
    db: &'a TestDatabase,
    lacks: Option<Guard>,
    random: SmallRng,
    producers: [Producer; 2],
    /// The broker's queues, each a shard's: keys in no order.
    queues: Vec<Vec<String>>,
    /// The last is the zombie, which seldom finishes what it has loaded.
    workers: [Worker; 3],
    /// What the events of each key say, in the order in which they were committed; `None` where an operator skipped one.
    accepted: BTreeMap<String, Vec<Option<i32>>>,
    /// The newest number that an event was given to say.
    number: i32,
    counts: &'a mut Counts,
}

const QUEUES: i32 = 8;
const ZOMBIE: usize = 2;

impl<'a> Fleet<'a> {
    fn new(db: &'a TestDatabase, lacks: Option<Guard>, seed: u64, counts: &'a mut Counts) -> Self {
        let producer = || Producer { conn: db.database().connection().unwrap(), open: Vec::new() };
        let worker = |name: &str| Worker { name: name.into(), ..Worker::default() };
        let mut fleet = Self {
            db,
            lacks,
            random: SmallRng::seed_from_u64(seed),
            producers: [producer(), producer()],
            queues: vec![Vec::new(); QUEUES as usize],
            workers: [worker("first"), worker("second"), worker("zombie")],
            accepted: BTreeMap::new(),
            number: 0,
            counts,
        };
        db.execute("TRUNCATE stream_head, stream_event, stream_cursor, stream_change, account_effect, outbox");
        fleet.divide();
        (0..fleet.workers.len()).for_each(|worker| fleet.learn(worker));
        if lacks == Some(Guard::LockedHead) {
            for key in KEYS {
                db.execute(&format!("DROP SEQUENCE IF EXISTS numbers_{key}"));
                db.execute(&format!("CREATE SEQUENCE numbers_{key}"));
                db.execute(&format!("INSERT INTO stream_cursor (stream, key) VALUES ('{ACCOUNT_EVENT}', '{key}')"));
            }
        }
        fleet
    }

    fn transaction<T>(&self, mut work: impl FnMut(&mut PgConnection) -> storage::Result<T>) -> T {
        self.db.database().transaction(&mut work).unwrap()
    }

    fn chance(&mut self, of: u32) -> bool {
        self.random.random_ratio(1, of)
    }

    /// One thing happens.
    fn step(&mut self) {
        self.workers.iter_mut().for_each(|worker| worker.frozen = worker.frozen.saturating_sub(1));
        let worker = self.random.random_range(0..self.workers.len());
        let awake = self.workers[worker].frozen == 0;
        // Without the sweep it's the broker alone that is to be blamed.
        let fails = self.lacks != Some(Guard::Sweep);
        match self.random.random_range(0..100) {
            0..12 => self.append(),
            12..23 => self.end_transaction(),
            23..31 => {
                let dies = self.chance(4);
                self.relay(dies);
            }
            31..35 => self.lose(),
            35..38 => self.misroute(),
            38..52 if awake => self.receive(worker),
            52..62 if awake => _ = self.sweep(worker),
            62..76 if awake && (worker != ZOMBIE || self.chance(4)) => {
                let keys: Vec<String> = self.workers[worker].lanes.keys().cloned().collect();
                let some: Vec<String> = keys.into_iter().filter(|_| !self.chance(3)).collect();
                let dies = fails && self.chance(8);
                self.apply(worker, &some, dies);
            }
            76..84 if awake && fails => self.fail(worker),
            84..92 => self.operate(),
            92..94 if fails => self.crash(worker),
            94..96 => self.workers[worker].frozen = self.random.random_range(1..80),
            96..98 if awake => self.learn(worker),
            98..100 => self.divide(),
            _ => {}
        }
    }

    fn append(&mut self) {
        let Some(producer) = self.producers.iter().position(|producer| producer.open.is_empty()) else { return };
        // Nobody could wait here for a row that the other transaction has locked.
        let locked: BTreeSet<&str> = self.producers[1 - producer].open.iter().map(|(key, _)| *key).collect();
        let waits = |key: &&str| self.lacks != Some(Guard::LockedHead) && locked.contains(key);
        let keys: Vec<&str> = KEYS.into_iter().filter(|key| !waits(key)).collect();
        if keys.is_empty() {
            return;
        }
        let events: Vec<(&str, i32)> = (0..self.random.random_range(1..=4))
            .map(|_| {
                self.number += 1;
                (*keys.choose(&mut self.random).unwrap(), self.number)
            })
            .collect();
        let conn = &mut self.producers[producer].conn;
        sql::execute(conn, "BEGIN").unwrap();
        if self.lacks == Some(Guard::LockedHead) {
            append_by_sequence(conn, &events);
        } else {
            let events: Vec<_> = events
                .iter()
                .map(|(key, number)| (AccountId::parse(key).unwrap(), Payload::parse(number.to_string()).unwrap()))
                .collect();
            streams::append(conn, ACCOUNT_EVENT, &events, None).unwrap();
        }
        self.producers[producer].open = events;
    }

    fn end_transaction(&mut self) {
        let producer = self.random.random_range(0..self.producers.len());
        let commit = !self.chance(4);
        let Producer { conn, open } = &mut self.producers[producer];
        let open = mem::take(open);
        if open.is_empty() {
        } else if commit {
            sql::execute(conn, "COMMIT").unwrap();
            self.counts.accepted += open.len();
            for (key, number) in open {
                self.accepted.entry(key.into()).or_default().push(Some(number));
            }
        } else {
            sql::execute(conn, "ROLLBACK").unwrap();
            self.counts.rolled_back += open.len();
        }
    }

    /// The relay publishes what is in the outbox. If it dies of it, the rows are still there.
    fn relay(&mut self, dies: bool) {
        let rows = self.transaction(|conn| {
            let rows = outbox::take(conn, 20)?;
            if !dies {
                outbox::delete(conn, &rows.iter().map(|row| row.id).collect::<Vec<_>>())?;
            }
            Ok(rows)
        });
        for row in rows {
            let queue: usize = row.envelope.routing_key[1..].parse().unwrap();
            let key = row.envelope.message_id.split('/').nth(1).unwrap();
            self.queues[queue].push(key.into());
        }
    }

    fn lose(&mut self) {
        let all = self.chance(3);
        let Some(queue) = self.queues.iter_mut().filter(|queue| !queue.is_empty()).choose(&mut self.random) else {
            return;
        };
        let lost = if all { mem::take(queue).len() } else { queue.pop().into_iter().count() };
        self.counts.lost += lost;
    }

    /// Some message gets into some other queue.
    fn misroute(&mut self) {
        let to = self.random.random_range(0..self.queues.len());
        let Some(from) = self.queues.iter_mut().filter(|queue| !queue.is_empty()).choose(&mut self.random) else {
            return;
        };
        let at = self.random.random_range(0..from.len());
        let key = from.swap_remove(at);
        self.queues[to].push(key);
    }

    /// The worker takes some message from one of its queues, which the broker may hand out again.
    fn receive(&mut self, worker: usize) {
        let own = self.workers[worker].own.clone();
        let queues = (0..).zip(&mut self.queues).filter(|(shard, queue)| own.contains(shard) && !queue.is_empty());
        let Some((_, queue)) = queues.choose(&mut self.random) else { return };
        let at = self.random.random_range(0..queue.len());
        let key = queue[at].clone();
        if self.random.random_ratio(1, 4) {
            self.counts.doubled += 1;
        } else {
            queue.swap_remove(at);
        }
        self.load(worker, vec![key]);
    }

    fn sweep(&mut self, worker: usize) -> usize {
        if self.lacks == Some(Guard::Sweep) {
            return 0;
        }
        let Worker { shards, own, .. } = &self.workers[worker];
        let (mut keys, mut after) = (Vec::new(), Some(String::new()));
        while let Some(from) = after {
            // Fewer than there are keys: so that it has to go on from page to page.
            let swept = self.transaction(|conn| streams::sweep(conn, ACCOUNT_EVENT, *shards, own, &from, 3));
            self.transaction(|conn| streams::rest(conn, ACCOUNT_EVENT, &swept.resting));
            keys.extend(swept.keys);
            after = swept.after;
        }
        let due = self.transaction(|conn| streams::due(conn, ACCOUNT_EVENT, None, 100));
        keys.extend(due.into_iter().map(|due| due.key));
        self.load(worker, keys)
    }

    /// The worker opens lanes for those of the keys that are its own and have something to do; answers how many.
    fn load(&mut self, worker: usize, mut keys: Vec<String>) -> usize {
        let Worker { lanes, .. } = &self.workers[worker];
        keys.retain(|key| !lanes.contains_key(key) && self.workers[worker].owns(key));
        let names: Vec<&str> = keys.iter().map(String::as_str).collect();
        let states = self.transaction(|conn| streams::load(conn, ACCOUNT_EVENT, &names));
        let events: Vec<Event> = states.into_iter().filter_map(Event::next).collect();
        let opened = events.len();
        self.workers[worker].lanes.extend(events.into_iter().map(|event| (event.key.to_string(), event)));
        opened
    }

    /// The worker's lanes of these keys commit what they have done, together, unless it dies of it; and go on.
    fn apply(&mut self, worker: usize, keys: &[String], dies: bool) {
        const DEAD: Error = Error::Conflict("the process has died");
        let Worker { name, lanes, .. } = &mut self.workers[worker];
        let events: Vec<Event> = keys.iter().filter_map(|key| lanes.remove(key)).collect();
        if events.is_empty() {
            return;
        }
        let name = name.clone();
        let numbers: Vec<i32> = events.iter().map(|event| Numbers.work(event).unwrap()).collect();
        let done: Vec<(&Event, &i32)> = events.iter().zip(&numbers).collect();
        let names: Vec<&str> = keys.iter().map(String::as_str).collect();
        let lacks = self.lacks;
        if lacks == Some(Guard::OneTransaction) {
            self.transaction(|conn| Numbers.apply(conn, &name, &done));
        }
        let applied = self.db.database().transaction(|conn| {
            let positions: Vec<_> = events.iter().map(Event::position).collect();
            let won = match lacks {
                Some(Guard::Cursor) => {
                    let won = streams::advance(conn, ACCOUNT_EVENT, &positions, &name)?;
                    Numbers.apply(conn, &name, &done)?;
                    won
                }
                Some(Guard::OneTransaction) => streams::advance(conn, ACCOUNT_EVENT, &positions, &name)?,
                Some(Guard::Revision) => {
                    let states = streams::load(conn, ACCOUNT_EVENT, &names)?;
                    let now =
                        |key: &str| states.iter().find(|state| state.key == key).map_or(0, |state| state.revision);
                    let forged: Vec<Event> =
                        events.iter().map(|event| Event { revision: now(&event.key), ..event.clone() }).collect();
                    let done: Vec<(&Event, &i32)> = forged.iter().zip(&numbers).collect();
                    apply(conn, ACCOUNT_EVENT, &name, &Numbers, &done)?
                }
                _ => apply(conn, ACCOUNT_EVENT, &name, &Numbers, &done)?,
            };
            if dies { Err(DEAD) } else { Ok((won, streams::load(conn, ACCOUNT_EVENT, &names)?)) }
        });
        match applied {
            Ok((won, states)) => {
                self.counts.beaten += won.iter().filter(|change| **change == Change::Late).count();
                let next = states.into_iter().filter_map(Event::next).map(|event| (event.key.to_string(), event));
                self.workers[worker].lanes.extend(next);
            }
            Err(Error::Conflict(_)) if dies => self.crash(worker),
            Err(error) => panic!("{error:?}"),
        }
    }

    /// An attempt of the worker's fails: it was the last, or will be repeated.
    fn fail(&mut self, worker: usize) {
        let Some(key) = self.workers[worker].lanes.keys().choose(&mut self.random).cloned() else { return };
        let event = self.workers[worker].lanes.remove(&key).unwrap();
        let retry_after = self.chance(3).then_some(Duration::ZERO);
        let failed = Failed { attempt: event.attempt(), error: "told to", retry_after, counts: true };
        self.transaction(|conn| streams::fail(conn, ACCOUNT_EVENT, &[failed]));
    }

    fn crash(&mut self, worker: usize) {
        self.workers[worker].lanes.clear();
        self.counts.crashed += 1;
        self.learn(worker);
    }

    /// An operator does something about a parked key.
    fn operate(&mut self) {
        let parked = self.transaction(|conn| parked::keys(conn, ACCOUNT_EVENT));
        let Some(key) = parked.choose(&mut self.random) else { return };
        let order = parked::Order { stream: ACCOUNT_EVENT, key, seq: None, by: "operator" };
        self.number += 1;
        let number = self.number;
        let (seq, says) = match self.random.random_range(0..4) {
            0 => {
                self.transaction(|conn| parked::retry(conn, &order));
                self.forget_to_rouse(key);
                return;
            }
            1 => (self.transaction(|conn| parked::skip(conn, &order)), None),
            _ => {
                let payload = Payload::parse(number.to_string()).unwrap();
                (self.transaction(|conn| parked::replace(conn, &order, &payload)), Some(number))
            }
        };
        self.counts.changed += 1;
        self.forget_to_rouse(key);
        // The control's sequences leave some out.
        let events = self.accepted.entry(key.clone()).or_default();
        if let Some(event) = events.get_mut(usize::try_from(seq - 1).unwrap()) {
            *event = says;
        }
    }

    /// The control's: a key goes on, but its events rest as before.
    fn forget_to_rouse(&self, key: &str) {
        if self.lacks == Some(Guard::Rouse) {
            self.db
                .execute(&format!("UPDATE stream_event SET rests = true WHERE key = '{key}' AND processed_at IS NULL"));
        }
    }

    /// The worker learns how the stream is divided, and gets other shards: each likely has several owners.
    fn learn(&mut self, worker: usize) {
        self.workers[worker].shards = self.transaction(|conn| streams::layout(conn, ACCOUNT_EVENT)).shards;
        self.workers[worker].own = (0..QUEUES).filter(|_| !self.random.random_ratio(1, 4)).collect();
    }

    /// Divides the stream anew, unless that would have to wait for open transactions.
    fn divide(&mut self) {
        if self.producers.iter().all(|producer| producer.open.is_empty()) {
            let shards = *[2, 3, QUEUES].choose(&mut self.random).unwrap();
            self.transaction(|conn| streams::divide(conn, ACCOUNT_EVENT, Layout { shards, queues: QUEUES }));
            self.counts.divided += 1;
        }
    }

    /// The faults stop, but for one: of the last events the broker loses a whole shard's messages. Then the zombie comes
    /// back.
    fn settle(&mut self) {
        self.finish();
        (0..4).for_each(|_| self.append());
        self.finish_transactions();
        self.relay(false);
        self.queues.iter_mut().max_by_key(|queue| queue.len()).unwrap().clear();
        self.finish();
        let keys: Vec<String> = self.workers[ZOMBIE].lanes.keys().cloned().collect();
        self.apply(ZOMBIE, &keys, false);
    }

    fn finish_transactions(&mut self) {
        while self.producers.iter().any(|producer| !producer.open.is_empty()) {
            self.end_transaction();
        }
    }

    /// Everybody but the zombie does what there is to do.
    fn finish(&mut self) {
        self.finish_transactions();
        let shards = self.transaction(|conn| streams::layout(conn, ACCOUNT_EVENT)).shards;
        loop {
            let retried = self.transaction(|conn| {
                let keys = parked::keys(conn, ACCOUNT_EVENT)?;
                for key in &keys {
                    let order = parked::Order { stream: ACCOUNT_EVENT, key, seq: None, by: "operator" };
                    parked::retry(conn, &order)?;
                }
                Ok(keys)
            });
            retried.iter().for_each(|key| self.forget_to_rouse(key));
            self.relay(false);
            let mut opened = 0;
            for worker in 0..ZOMBIE {
                (self.workers[worker].shards, self.workers[worker].own) = (shards, (0..QUEUES).collect());
                let keys: Vec<String> = self.queues.iter_mut().flat_map(mem::take).collect();
                opened += self.load(worker, keys) + self.sweep(worker);
                while !self.workers[worker].lanes.is_empty() {
                    let keys: Vec<String> = self.workers[worker].lanes.keys().cloned().collect();
                    self.apply(worker, &keys, false);
                }
            }
            if retried.is_empty() && opened == 0 {
                return;
            }
        }
    }

    /// Compares what took effect with what was accepted.
    fn check(&self) -> Errors {
        self.db.execute("DROP TABLE IF EXISTS expected");
        self.db.execute(
            "CREATE TABLE expected (key text COLLATE \"C\", seq bigint, says integer, PRIMARY KEY (key, seq))",
        );
        for (key, events) in &self.accepted {
            for (seq, says) in (1..).zip(events) {
                let says = says.map_or("NULL".into(), |says| says.to_string());
                self.db.execute(&format!("INSERT INTO expected VALUES ('{key}', {seq}, {says})"));
            }
        }
        Errors {
            missing: self.db.count(
                "SELECT count(*) AS n FROM expected x WHERE says IS NOT NULL AND NOT EXISTS (
                     SELECT FROM account_effect e WHERE e.account_id = x.key AND e.seq = x.seq)",
            ),
            doubled: self.db.count("SELECT count(*) - count(DISTINCT (account_id, seq)) AS n FROM account_effect"),
            disordered: self.db.count(
                "SELECT count(*) AS n FROM (
                     SELECT seq < max(seq) OVER (PARTITION BY account_id ORDER BY id) AS late FROM account_effect) e
                 WHERE late",
            ),
            wrong: self.db.count(
                "SELECT count(*) AS n FROM account_effect e LEFT JOIN expected x ON x.key = e.account_id AND x.seq = e.seq
                 WHERE x.says IS DISTINCT FROM e.work_ms",
            ),
            audited: {
                let effects = account_effects::CHECKS;
                let (_, findings) = self.transaction(|conn| stream_audit::run(conn, ACCOUNT_EVENT, "", effects, |_| ()));
                findings.iter().map(|finding| finding.count).sum()
            },
        }
    }
}

/// What `append` must not do: numbers from sequences, which nobody holds to the end of the transaction.
fn append_by_sequence(conn: &mut PgConnection, events: &[(&str, i32)]) {
    let shards = streams::layout(conn, ACCOUNT_EVENT).unwrap().shards;
    for (key, number) in events {
        let hash = key_hash(key);
        sql::execute(
            conn,
            &format!(
                "INSERT INTO stream_event (stream, key, seq, key_hash, payload)
                 VALUES ('{ACCOUNT_EVENT}', '{key}', nextval('numbers_{key}'), {hash}, '{number}')"
            ),
        )
        .unwrap();
        let event = AccountEvent {
            account_id: AccountId::parse(key).unwrap(),
            seq: 1,
            payload: Payload::parse(number.to_string()).unwrap(),
            generated_at: Utc::now(),
        };
        outbox::push(conn, &[event.envelope(ACCOUNT_EVENT, shard(hash, shards))]).unwrap();
    }
}

/// A database for several schedules.
fn database() -> TestDatabase {
    let db = TestDatabase::new();
    // It isn't killed here, and the disk would take most of the time.
    db.execute(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET synchronous_commit = off', current_database()); END $$",
    );
    db
}

/// Runs the schedule of a seed.
fn run(db: &TestDatabase, seed: u64, lacks: Option<Guard>, counts: &mut Counts) -> Errors {
    let mut fleet = Fleet::new(db, lacks, seed, counts);
    (0..STEPS).for_each(|_| fleet.step());
    fleet.settle();
    fleet.check()
}

/// Runs schedules until together they show what is to be seen; `None` if they don't.
fn shows(guard: Guard, is_seen: impl Fn(&Errors) -> bool) -> Option<Errors> {
    let (db, mut all) = (database(), Errors::default());
    let seen = (0..20).any(|seed| {
        let one = run(&db, seed, Some(guard), &mut Counts::default());
        all = Errors {
            missing: all.missing + one.missing,
            doubled: all.doubled + one.doubled,
            disordered: all.disordered + one.disordered,
            wrong: all.wrong + one.wrong,
            audited: all.audited + one.audited,
        };
        is_seen(&all)
    });
    eprintln!("without {guard:?}: {all:?}");
    seen.then_some(all)
}

#[test]
fn every_accepted_event_takes_effect_once_and_in_order() {
    let (db, mut counts) = (database(), Counts::default());
    for seed in 0..15 {
        let errors = run(&db, seed, None, &mut counts);
        assert_eq!(errors, Errors::default(), "seed {seed}");
    }
    eprintln!("{counts:?}");
    let Counts { accepted, rolled_back, lost, doubled, crashed, beaten, changed, divided } = counts;
    assert!(accepted > 1000 && [rolled_back, lost, doubled, crashed, beaten, changed, divided].iter().all(|n| *n > 50));
}

#[test]
fn without_the_locked_head_events_are_missing_and_numbers_are_not_in_the_order_of_commits() {
    shows(Guard::LockedHead, |errors| errors.missing > 0 && errors.wrong > 0 && errors.audited > 0)
        .expect("they are to be seen");
}

#[test]
fn without_heeding_the_cursor_events_take_effect_twice_and_out_of_order() {
    shows(Guard::Cursor, |errors| errors.doubled > 0 && errors.disordered > 0 && errors.audited > 0)
        .expect("they are to be seen");
}

#[test]
fn without_heeding_the_revision_a_payload_takes_effect_that_was_replaced() {
    shows(Guard::Revision, |errors| errors.wrong > 0).expect("they are to be seen");
}

#[test]
fn with_the_effect_outside_the_transaction_events_take_effect_twice() {
    shows(Guard::OneTransaction, |errors| errors.doubled > 0 && errors.audited > 0).expect("they are to be seen");
}

#[test]
fn without_rousing_keys_that_go_on_events_are_missing() {
    let errors = shows(Guard::Rouse, |errors| errors.missing > 0 && errors.audited > 0).expect("they are to be seen");
    assert_eq!((errors.doubled, errors.disordered, errors.wrong), (0, 0, 0), "{errors:?}");
}

#[test]
fn without_the_sweep_events_are_missing_whose_messages_were_lost() {
    let errors = shows(Guard::Sweep, |errors| errors.missing > 0 && errors.audited > 0).expect("they are to be seen");
    assert_eq!((errors.doubled, errors.disordered, errors.wrong), (0, 0, 0), "{errors:?}");
}
