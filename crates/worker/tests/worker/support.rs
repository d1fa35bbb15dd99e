//! A worker whose handler is a closure, and what it takes to watch it.

use broker::{Delivery, Publisher, Session, Ticket};
use domain::{AttemptLedger, Envelope, Failure, Suspect, topology::Topology};
use process::{HealthSettings, Stop};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};
pub(crate) use test_support::broker_settings;
use test_support::eventually;
use worker::{BatchHandler, Consuming, Item, Outgoing, Received, Settings, Step, Worker};

/// Where the tests' messages go: a direct exchange with one queue of the same name.
pub(crate) const QUEUE: &str = "publish_tweet";

/// After this long without a message, nothing is under way any more, unless the broker is slow: longer than all the retries'
/// delays together.
pub(crate) const IDLE: Duration = Duration::from_millis(1500);

/// Two retries, soon.
pub(crate) const DELAYS_MS: [u64; 2] = [100, 200];

/// Attempts in memory: these tests end no process.
#[derive(Default)]
pub(crate) struct MemoryLedger(pub(crate) Mutex<BTreeMap<(String, String), u32>>);

fn key(suspect: &Suspect<'_>) -> (String, String) {
    (suspect.queue.to_owned(), suspect.message_id.to_owned())
}

impl AttemptLedger for MemoryLedger {
    fn counts(&self, suspects: &[Suspect<'_>]) -> Result<Vec<u32>, Failure> {
        let attempts = self.0.lock().unwrap();
        Ok(suspects.iter().map(|suspect| attempts.get(&key(suspect)).copied().unwrap_or(0)).collect())
    }

    fn begin(&self, suspects: &[(Suspect<'_>, u32)]) -> Result<(), Failure> {
        let mut attempts = self.0.lock().unwrap();
        attempts.extend(suspects.iter().map(|(suspect, known)| (key(suspect), known + 1)));
        Ok(())
    }

    fn clear(&self, suspects: &[Suspect<'_>]) -> Result<(), Failure> {
        let mut attempts = self.0.lock().unwrap();
        attempts.retain(|known, _| !suspects.iter().any(|suspect| key(suspect) == *known));
        Ok(())
    }
}

/// A handler of texts.
pub(crate) struct Texts<F>(pub(crate) F);

impl<F> BatchHandler for Texts<F>
where
    F: Fn(&[Item<String>], &mut Outgoing, &Step) -> Result<(), Failure>,
{
    type Message = String;

    fn decode(&self, received: &Received) -> anyhow::Result<String> {
        worker::json(received)
    }

    fn handle(&mut self, batch: &[Item<String>], out: &mut Outgoing, step: &Step) -> Result<(), Failure> {
        self.0(batch, out, step)
    }
}

/// A worker on [`QUEUE`] with batches of 20, whose handler is `handler`.
pub(crate) fn worker<H>(
    url: &str,
    ledger: Arc<dyn AttemptLedger>,
    handler: H,
) -> Worker<impl Fn() -> Texts<H> + Send + Sync + use<H>>
where
    H: Fn(&[Item<String>], &mut Outgoing, &Step) -> Result<(), Failure> + Clone + Send + Sync,
{
    Worker {
        service: "test",
        queues: vec![QUEUE.into()].into(),
        settings: Settings {
            time_limit_ms: 300_000,
            stop_grace_ms: 300_000,
            retry_delays_ms: DELAYS_MS.into(),
            unavailable_backoff_ms: 20,
            unavailable_backoff_max_ms: 100,
        },
        consuming: Consuming { batch: 20, linger_ms: 20, prefetch: 40, concurrency: 1 },
        health: HealthSettings { address: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 0 },
        broker: broker_settings(url),
        ledger,
        database: Arc::new(|| Ok(())),
        handler: move || Texts(handler.clone()),
    }
}

/// Runs the worker while `observe` does, then stops it.
pub(crate) fn while_running<T, H: BatchHandler>(
    worker: Worker<impl Fn() -> H + Send + Sync>,
    observe: impl FnOnce() -> T,
) -> T {
    /// Stops the worker even when `observe` panics: the scope waits for it.
    struct StopAtEnd(Stop);
    impl Drop for StopAtEnd {
        fn drop(&mut self) {
            self.0.request();
        }
    }
    thread::scope(|scope| {
        let stop = StopAtEnd(Stop::new());
        let requested = stop.0.clone();
        let running = scope.spawn(move || worker.run_until(requested));
        let observed = observe();
        drop(stop);
        running.join().expect("no panic").expect("a clean end");
        observed
    })
}

/// Runs one worker after another, each until nothing comes any more, until it's `done`: a slow broker may take longer than
/// [`IDLE`] to bring back what it has.
pub(crate) fn run_until_idle<H: BatchHandler, F: Fn() -> H + Sync>(
    worker: impl Fn() -> Worker<F>,
    done: impl Fn() -> bool,
) {
    eventually("all is settled", || {
        worker().run_until_idle(IDLE).expect("a clean end");
        done().then_some(())
    });
}

/// Declares the topology and publishes these texts, with their own text as message id.
pub(crate) fn publish<'a>(url: &str, texts: impl IntoIterator<Item = &'a str>) {
    let envelopes: Vec<_> = texts
        .into_iter()
        .map(|text| {
            let mut envelope = Envelope::new(QUEUE, QUEUE, format!("{text:?}").into_bytes());
            envelope.message_id = text.to_owned();
            envelope.correlation_id = Some(format!("request of {text}"));
            envelope
        })
        .collect();
    publish_all(url, &envelopes);
}

/// The same for any messages, or for none.
pub(crate) fn publish_all(url: &str, envelopes: &[Envelope]) {
    let mut session = Session::open(&broker_settings(url), "test").expect("a session");
    broker::declare(&mut session, &Topology::fleet(&DELAYS_MS.map(Duration::from_millis))).expect("all declared");
    let mut publisher = Publisher::new(&broker_settings(url), "test");
    publisher.publish_all(envelopes, Instant::now() + Duration::from_secs(20)).expect("all confirmed");
}

/// Messages that are ready in a queue.
pub(crate) fn depth(url: &str, queue: &str) -> u32 {
    let mut session = Session::open(&broker_settings(url), "test").expect("a session");
    broker::depths(&mut session, &[queue.to_owned()]).expect("the queue's depth")[0].messages
}

/// Takes everything out of a queue.
pub(crate) fn drain(url: &str, queue: &str) -> Vec<Received> {
    test_support::drain(&broker_settings(url), &[queue.to_owned()], open)
}

/// Parts a delivery from what acknowledges it.
fn open(delivery: Delivery) -> (Ticket, Received) {
    let mut received = Received::new(&delivery.queue, delivery.body);
    received.exchange = delivery.exchange;
    received.routing_key = delivery.routing_key;
    received.kind = delivery.kind;
    received.message_id = delivery.message_id;
    received.correlation_id = delivery.correlation_id;
    received.headers = delivery.headers;
    (delivery.ticket, received)
}

/// What handlers note, in order.
#[derive(Clone, Default)]
pub(crate) struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    pub(crate) fn add(&self, note: impl Into<String>) {
        self.0.lock().unwrap().push(note.into());
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn sorted(&self) -> Vec<String> {
        let mut all = self.all();
        all.sort();
        all
    }
}
