//! The loop: collect, decode, handle, publish, await the confirms, acknowledge.

use crate::{
    BatchHandler, Consuming, Item, Outgoing, Queues, Received, Settings, Step,
    handler::{decode, in_hand},
    needs::Needs,
    policy::{self, Course},
};
use anyhow::anyhow;
use broker::{Batch, Consumer, PublishError, Publisher, Reason, Session};
use chrono::Utc;
use domain::{AttemptLedger, Envelope, Failure, Suspect};
use process::{Backoff, Pulse, Stop, catch};
use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};
use telemetry::{
    BatchHandled, BatchReceived, DatabaseAvailable, DatabaseUnavailable, MessageDeadLettered, MessageHandled,
    MessageRetried, MessagesSuspected, WorkerStarted, WorkerStopped, emit,
};
use uuid::Uuid;

/// How long to wait for the first message of a batch before looking whether to stop.
const IDLE: Duration = Duration::from_millis(250);

/// How long to leave out a queue that isn't as it must be, or doesn't answer, before looking at it again.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How long saying goodbye to the broker may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// The batch in hand is dropped: it's time to stop, or its session is lost. The broker hands it out again.
struct Interrupted;

type Uninterrupted<T> = Result<T, Interrupted>;

/// A redelivered message as the ledger knows it: its queue and its id.
type SuspectId = (Arc<str>, String);

/// What the loops of a process share.
pub(crate) struct Shared<'a, F> {
    pub(crate) queues: &'a Queues,
    pub(crate) settings: &'a Settings,
    pub(crate) delays: &'a [Duration],
    pub(crate) consuming: &'a Consuming,
    pub(crate) service: &'static str,
    pub(crate) broker: &'a broker::Settings,
    pub(crate) needs: &'a Needs,
    pub(crate) ledger: &'a dyn AttemptLedger,
    pub(crate) database: &'a (dyn Fn() -> Result<(), Failure> + Send + Sync),
    pub(crate) make: &'a F,
    pub(crate) stop: Stop,
    /// After how long without a message to end.
    pub(crate) until_idle: Option<Duration>,
    /// Written by the loop whose message may be about to kill the process, read by the others: so that such a death
    /// is put down to that message alone.
    pub(crate) quarantine: &'a RwLock<()>,
}

fn stopped(handled: &mut BTreeMap<Arc<str>, u64>, queues: &[String]) {
    for queue in queues {
        emit(WorkerStopped { queue, handled: handled.remove(queue.as_str()).unwrap_or_default() });
    }
}

/// One consumer with its handler, its publisher and its thread.
pub(crate) struct Loop<'a, H, F> {
    shared: &'a Shared<'a, F>,
    handler: H,
    consumer: Consumer,
    publisher: Publisher,
    pulse: Arc<Pulse>,
    step: Step,
    database: Backoff,
    /// When the batch in hand was complete.
    batch_began: Instant,
    handled: BTreeMap<Arc<str>, u64>,
}

impl<'a, H: BatchHandler, F: Fn() -> H> Loop<'a, H, F> {
    pub(crate) fn new(shared: &'a Shared<'a, F>, consumer: Consumer, publisher: Publisher, pulse: Arc<Pulse>) -> Self {
        Self {
            handler: (shared.make)(),
            consumer,
            publisher,
            step: Step::new(pulse.clone(), shared.stop.clone()),
            pulse,
            database: shared.settings.backoff(),
            batch_began: Instant::now(),
            handled: BTreeMap::new(),
            shared,
        }
    }

    /// Works until it's time to stop, then gives back what isn't acknowledged.
    pub(crate) fn run(mut self) -> Result<(), broker::Error> {
        while let Err(failure) = (self.shared.database)() {
            if self.database_is_away(failure.error()).is_err() {
                return Ok(());
            }
        }
        self.database_answered();
        let (mut queues, mut version) = (self.shared.queues.names(), 0);
        self.consumer.consume_from(queues.clone());
        self.started(&queues);
        let result = self.consume(&mut queues, &mut version);
        let deadline = Instant::now() + GOODBYE;
        self.consumer.close(deadline);
        self.publisher.close(deadline);
        stopped(&mut self.handled, &queues);
        result
    }

    fn started(&self, queues: &[String]) {
        for queue in queues {
            emit(WorkerStarted { queue, prefetch: self.shared.consuming.prefetch.into() });
        }
    }

    /// Consumes from now on what it's told to.
    fn follow(&mut self, queues: &mut Vec<String>, names: Vec<String>) {
        let without = |all: &[String], some: &[String]| {
            all.iter().filter(|name| !some.contains(name)).cloned().collect::<Vec<_>>()
        };
        let (gone, new) = (without(queues, &names), without(&names, queues));
        self.consumer.consume_from(names.clone());
        stopped(&mut self.handled, &gone);
        self.started(&new);
        *queues = names;
    }

    fn consume(&mut self, queues: &mut Vec<String>, version: &mut u64) -> Result<(), broker::Error> {
        let Consuming { batch: max, linger_ms, .. } = *self.shared.consuming;
        let linger = Duration::from_millis(linger_ms);
        let mut refused = self.shared.settings.backoff();
        let (mut idle_since, mut epoch) = (Instant::now(), 0);
        let mut looked_at = Instant::now();
        while !self.shared.stop.is_requested() {
            self.pulse.beat();
            if let Some(names) = self.shared.queues.changed_since(version) {
                self.follow(queues, names);
            }
            if looked_at.elapsed() >= LOOK_AGAIN {
                self.take_back_in();
                looked_at = Instant::now();
            }
            match self.consumer.next_batch(max, linger, IDLE) {
                Ok(batch) if batch.deliveries.is_empty() => {
                    // While it connected, nothing could come: that time doesn't count.
                    if batch.epoch != epoch {
                        (idle_since, epoch) = (Instant::now(), batch.epoch);
                    }
                    let idle = self.shared.until_idle.is_some_and(|limit| idle_since.elapsed() >= limit);
                    if idle && self.consumer.connected() {
                        break;
                    }
                }
                Ok(batch) => {
                    refused.reset();
                    // An interrupted batch is handed out again: nothing else is to be done about it.
                    let (Ok(()) | Err(Interrupted)) = self.batch(batch);
                    idle_since = Instant::now();
                }
                Err(error @ broker::Error::Url(_)) => return Err(error),
                Err(error) => {
                    let (delay, say) = refused.failed();
                    if say {
                        log::error!("can't consume until the broker is fixed: {error}");
                    }
                    self.shared.stop.wait(delay);
                }
            }
        }
        Ok(())
    }

    /// Consumes queues again that were left out and have been put right, or answer again.
    fn take_back_in(&mut self) {
        let Shared { needs, broker, service, .. } = *self.shared;
        let before = self.consumer.left_out();
        if before.is_empty() {
            return;
        }
        needs.left_out().ask_again(broker, service);
        let looked = Session::open(broker, service).and_then(|mut session| {
            needs.declare(&mut session)?;
            session.close(Instant::now() + GOODBYE);
            Ok(())
        });
        if looked.is_ok() && before.iter().any(|queue| !needs.leaves_out(queue)) {
            self.consumer.consume_from(self.shared.queues.names());
        }
    }

    fn batch(&mut self, batch: Batch) -> Uninterrupted<()> {
        self.batch_began = Instant::now();
        let mut received: Vec<_> = batch.into_iter().map(Received::from).collect();
        for (queue, messages) in by_queue(&received) {
            emit(BatchReceived { queue: &queue, messages });
        }
        self.count_deaths(&mut received)?;
        let (alone, together): (Vec<_>, Vec<_>) = received.into_iter().partition(|received| received.deaths > 0);
        if !together.is_empty() {
            let quarantine = self.shared.quarantine;
            let _others_may_work = quarantine.read().unwrap_or_else(PoisonError::into_inner);
            self.attempt(together)?;
        }
        for (queue, messages) in by_queue(&alone) {
            emit(MessagesSuspected { queue: &queue, messages });
        }
        alone.into_iter().try_for_each(|received| self.suspect(received))
    }

    /// Handles one message that was in hand when a process died, while nothing else is being handled here.
    fn suspect(&mut self, received: Received) -> Uninterrupted<()> {
        let attempts = received.attempts();
        if policy::is_last(attempts, self.shared.delays) {
            let failure = Failure::Permanent(anyhow!("its worker died while handling it ({} times)", received.deaths));
            return self.set_aside(vec![Failed { received, failure, attempts }]);
        }
        self.pulse.rest();
        let quarantine = self.shared.quarantine;
        let _nobody_else_works = quarantine.write().unwrap_or_else(PoisonError::into_inner);
        self.pulse.beat();
        if self.shared.stop.is_requested() {
            return Err(Interrupted);
        }
        self.attempt(vec![received])
    }

    /// Begins an attempt on record for those that were redelivered, then decodes and handles all.
    fn attempt(&mut self, received: Vec<Received>) -> Uninterrupted<()> {
        let suspects = suspects(&received);
        let known: BTreeMap<_, _> = received.iter().map(|received| (suspect_id(received), received.deaths)).collect();
        self.record(&suspects, |ledger, suspects| {
            let deaths = |suspect: &Suspect<'_>| known.get(&(suspect.queue.into(), suspect.message_id.into()));
            let with_deaths = suspects.iter().map(|suspect| (*suspect, deaths(suspect).copied().unwrap_or(0)));
            ledger.begin(&with_deaths.collect::<Vec<_>>())
        })?;
        let result = self.decode(received).and_then(|items| self.handle(items));
        if result.is_err() && !suspects.is_empty() {
            // Nobody died: the next attempt need not be alone. If the database can't be told, it will be, at no harm.
            let _ = self.shared.ledger.clear(&borrowed(&suspects));
        }
        result
    }

    /// Decodes each by itself, and sets aside those that can't be.
    fn decode(&mut self, received: Vec<Received>) -> Uninterrupted<Vec<Item<H::Message>>> {
        let mut items = Vec::with_capacity(received.len());
        let mut undecodable = Vec::new();
        self.pulse.begin(in_hand(&received));
        for received in received {
            let error = match catch(|| decode(&self.handler, &received)) {
                Ok(Ok(message)) => {
                    items.push(Item { message, received });
                    continue;
                }
                Ok(Err(error)) => error,
                Err(panic) => anyhow!("decoding {panic}"),
            };
            undecodable.push(Failed::once_more(received, Failure::Permanent(error)));
        }
        self.pulse.end();
        self.set_aside(undecodable)?;
        Ok(items)
    }

    /// Handles, publishes and acknowledges; upon failure follows the policy.
    fn handle(&mut self, mut items: Vec<Item<H::Message>>) -> Uninterrupted<()> {
        while !items.is_empty() {
            let failure = match self.give_effect(&items)? {
                Ok(()) => return self.settle_handled(items),
                Err(failure) => failure,
            };
            let first = &items[0].received;
            match policy::course(
                &failure,
                items.len(),
                &first.queue,
                first.attempts().saturating_add(1),
                self.shared.delays,
            ) {
                Course::Wait => self.wait_for_database(failure.error())?,
                Course::Divide => {
                    log::info!("a batch of {} failed; trying its halves: {:#}", items.len(), failure.error());
                    let right = items.split_off(items.len() / 2);
                    self.handle(items)?;
                    items = right;
                }
                Course::Retry(_) | Course::DeadLetter => {
                    let received = items.into_iter().map(|item| item.received);
                    return self.set_aside(received.zip([failure]).map(|(r, f)| Failed::once_more(r, f)).collect());
                }
            }
        }
        Ok(())
    }

    /// Commits the effects, then publishes what follows from them and awaits the confirms.
    fn give_effect(&mut self, items: &[Item<H::Message>]) -> Uninterrupted<Result<(), Failure>> {
        if !self.consumer.connected() {
            return Err(Interrupted);
        }
        let mut out = Outgoing::default();
        self.pulse.begin(in_hand(items.iter().map(|item| &item.received)));
        let result = catch(|| self.handler.handle(items, &mut out, &self.step));
        self.pulse.end();
        let result = result.unwrap_or_else(|panic| {
            self.handler = (self.shared.make)();
            Err(Failure::Transient(anyhow!("handling {panic}")))
        });
        if let Err(failure) = result {
            return Ok(Err(failure));
        }
        self.database_answered();
        self.publish(out.into_envelopes(), |_, reason| {
            Err(match reason {
                Reason::Invalid(_) => Failure::permanent(reason),
                Reason::Returned { .. } | Reason::Nacked => Failure::Transient(reason.into()),
            })
        })
    }

    /// Publishes until everything is confirmed. What the broker will never take as it is goes to `refused`, which gives
    /// something to publish instead, or gives up.
    fn publish(
        &mut self,
        mut envelopes: Vec<Envelope>,
        refused: impl Fn(Envelope, Reason) -> Result<Envelope, Failure>,
    ) -> Uninterrupted<Result<(), Failure>> {
        let mut backoff = self.shared.settings.backoff();
        let mut declared = false;
        while !envelopes.is_empty() {
            self.pulse.beat();
            let deadline = Instant::now() + Duration::from_millis(self.shared.broker.confirm_timeout_ms);
            let Err(error) = self.publisher.publish_all(&envelopes, deadline) else { break };
            let why = match &error {
                PublishError::Unavailable { source, .. } => format!("{error}: {source}"),
                PublishError::Refused { .. } => error.to_string(),
            };
            // What it should have reached may have been deleted since it was declared.
            let is_lost = |(_, reason): &(usize, Reason)| matches!(reason, Reason::Returned { .. });
            let gone = matches!(&error, PublishError::Refused { refused } if refused.iter().any(is_lost));
            let now_declared = gone && !mem::replace(&mut declared, true);
            if gone {
                self.declare()?;
            }
            let again = match error {
                PublishError::Unavailable { unconfirmed, .. } => {
                    unconfirmed.into_iter().map(|index| Ok(envelopes[index].clone())).collect()
                }
                PublishError::Refused { refused: all } => all
                    .into_iter()
                    .map(|(index, reason)| match reason {
                        Reason::Nacked => Ok(envelopes[index].clone()),
                        Reason::Returned { .. } if now_declared => Ok(envelopes[index].clone()),
                        reason => refused(envelopes[index].clone(), reason),
                    })
                    .collect(),
            };
            envelopes = match again {
                Ok(envelopes) => envelopes,
                Err(failure) => return Ok(Err(failure)),
            };
            let (delay, say) = backoff.failed();
            if say {
                log::warn!("publishing again until the broker confirms it: {why}");
            }
            if self.shared.stop.wait(delay) || !self.consumer.connected() {
                return Err(Interrupted);
            }
        }
        Ok(Ok(()))
    }

    /// Declares again what messages are sent on to.
    fn declare(&mut self) -> Uninterrupted<()> {
        let Shared { needs, broker, service, .. } = *self.shared;
        let mut backoff = self.shared.settings.backoff();
        loop {
            self.pulse.beat();
            let declared = Session::open(broker, service).and_then(|mut session| {
                needs.declare(&mut session)?;
                session.close(Instant::now() + GOODBYE);
                Ok(())
            });
            let Err(error) = declared else { break };
            let (delay, say) = backoff.failed();
            if say {
                log::error!("can't forward messages until the broker is fixed: {error}");
            }
            needs.note_onward((!error.is_lost()).then(|| error.to_string()));
            if self.shared.stop.wait(delay) || !self.consumer.connected() {
                return Err(Interrupted);
            }
        }
        needs.note_onward(None);
        Ok(())
    }

    /// Sends messages that failed on to a retry queue or to the dead letters, and acknowledges them.
    fn set_aside(&mut self, failed: Vec<Failed>) -> Uninterrupted<()> {
        if failed.is_empty() {
            return Ok(());
        }
        let courses: Vec<_> = failed.iter().map(|failed| failed.course(self.shared.delays)).collect();
        let envelopes = failed.iter().zip(&courses).map(|(failed, course)| failed.onward(*course)).collect();
        let published = self.publish(envelopes, |envelope, reason| match reason {
            Reason::Invalid(why) => Ok(policy::cut(envelope, &why)),
            // What it should have reached is declared again.
            Reason::Returned { .. } | Reason::Nacked => Ok(envelope),
        })?;
        debug_assert!(published.is_ok(), "whatever is refused is replaced");
        for (failed, course) in failed.iter().zip(courses) {
            failed.tell(course);
        }
        self.settle(failed.into_iter().map(|failed| failed.received).collect())
    }

    fn settle_handled(&mut self, items: Vec<Item<H::Message>>) -> Uninterrupted<()> {
        let received: Vec<_> = items.into_iter().map(|item| item.received).collect();
        let now = Utc::now();
        let mut oldest = BTreeMap::new();
        for received in &received {
            let published_at = received.published_at.unwrap_or(now);
            oldest.entry(received.queue.clone()).and_modify(|at| *at = published_at.min(*at)).or_insert(published_at);
            emit(MessageHandled {
                queue: &received.queue,
                message_id: received.message_id.as_deref(),
                correlation_id: received.correlation_id.as_deref(),
            });
        }
        let counts = by_queue(&received);
        self.settle(received)?;
        for (queue, messages) in counts {
            let lag = oldest.get(&queue).map(|at| (now - at).to_std().unwrap_or_default());
            emit(BatchHandled { queue: &queue, messages, duration: self.batch_began.elapsed(), lag });
            *self.handled.entry(queue).or_default() += messages;
        }
        Ok(())
    }

    /// Forgets the attempts, then acknowledges: what is acknowledged can't be forgotten any more.
    fn settle(&mut self, received: Vec<Received>) -> Uninterrupted<()> {
        self.record(&suspects(&received), |ledger, suspects| ledger.clear(suspects))?;
        let acked = self.consumer.ack(received.into_iter().filter_map(|received| received.ticket));
        if acked.stale > 0 {
            log::info!("{} messages will be redelivered: the connection was lost before the ack", acked.stale);
        }
        Ok(())
    }

    /// Asks the ledger how many processes each redelivered message has been in hand of when they died.
    fn count_deaths(&mut self, received: &mut [Received]) -> Uninterrupted<()> {
        let suspects: Vec<_> = received.iter().filter(|received| received.redelivered).map(suspect_id).collect();
        if !suspects.is_empty() {
            let counts = self.ask_ledger(&suspects, |ledger, suspects| ledger.counts(suspects))?;
            for (received, count) in received.iter_mut().filter(|received| received.redelivered).zip(counts) {
                received.deaths = count;
            }
        }
        Ok(())
    }

    fn record(
        &mut self,
        suspects: &[SuspectId],
        call: impl Fn(&dyn AttemptLedger, &[Suspect<'_>]) -> Result<(), Failure>,
    ) -> Uninterrupted<()> {
        if suspects.is_empty() { Ok(()) } else { self.ask_ledger(suspects, call) }
    }

    /// Asks until there's an answer.
    fn ask_ledger<T>(
        &mut self,
        suspects: &[SuspectId],
        call: impl Fn(&dyn AttemptLedger, &[Suspect<'_>]) -> Result<T, Failure>,
    ) -> Uninterrupted<T> {
        let suspects = borrowed(suspects);
        loop {
            self.pulse.beat();
            match call(self.shared.ledger, &suspects) {
                Ok(answer) => {
                    self.database_answered();
                    return Ok(answer);
                }
                Err(failure) => self.wait_for_database(failure.error())?,
            }
        }
    }

    /// Waits a while, keeping the batch as long as its session lives.
    fn wait_for_database(&mut self, error: &anyhow::Error) -> Uninterrupted<()> {
        self.database_is_away(error)?;
        if self.consumer.connected() { Ok(()) } else { Err(Interrupted) }
    }

    fn database_is_away(&mut self, error: &anyhow::Error) -> Uninterrupted<()> {
        if self.shared.stop.is_requested() {
            return Err(Interrupted);
        }
        let (delay, say) = self.database.failed();
        if say {
            emit(DatabaseUnavailable { error: &format_args!("{error:#}"), retry_in: Some(delay) });
        }
        self.pulse.beat();
        if self.shared.stop.wait(delay) { Err(Interrupted) } else { Ok(()) }
    }

    fn database_answered(&mut self) {
        if let Some(after) = self.database.reset() {
            emit(DatabaseAvailable { after });
        }
    }
}

/// A message whose handling has failed.
struct Failed {
    received: Received,
    failure: Failure,
    /// Attempts that have failed, this one included if it was one.
    attempts: u32,
}

impl Failed {
    fn once_more(received: Received, failure: Failure) -> Self {
        let attempts = received.attempts().saturating_add(policy::counts(&failure).into());
        Self { attempts, received, failure }
    }

    fn course(&self, delays: &[Duration]) -> Course {
        policy::course(&self.failure, 1, &self.received.queue, self.attempts, delays)
    }

    fn onward(&self, course: Course) -> Envelope {
        match course {
            Course::Retry(delay) => policy::retry(&self.received, self.attempts, delay),
            _ => policy::dead_letter(&self.received, self.attempts, self.failure.error(), Utc::now()),
        }
    }

    fn tell(&self, course: Course) {
        let Received { queue, message_id, correlation_id, .. } = &self.received;
        let (message_id, correlation_id) = (message_id.as_deref(), correlation_id.as_deref());
        let (attempts, error) = (self.attempts, &policy::reason(self.failure.error()));
        match course {
            Course::Retry(delay) => {
                emit(MessageRetried { queue, message_id, correlation_id, attempt: attempts, delay, error });
            }
            _ => emit(MessageDeadLettered { queue, message_id, correlation_id, attempts, error }),
        }
    }
}

fn by_queue(received: &[Received]) -> BTreeMap<Arc<str>, u64> {
    let mut counts = BTreeMap::new();
    for received in received {
        *counts.entry(received.queue.clone()).or_default() += 1;
    }
    counts
}

/// What the ledger knows a message by: its digest, behind its id if it has one. Other programs may give the same id to
/// messages of which one kills and the other doesn't.
fn suspect_id(received: &Received) -> SuspectId {
    let text = [received.queue.as_bytes(), b"\0", &received.body].concat();
    let digest = Uuid::new_v5(&Uuid::NAMESPACE_OID, &text);
    let id = received.message_id.as_ref().map_or_else(|| digest.to_string(), |id| format!("{id} {digest}"));
    (received.queue.clone(), id)
}

/// The redelivered ones, each once: the same message may be in a batch twice.
fn suspects(received: &[Received]) -> Vec<SuspectId> {
    let redelivered = received.iter().filter(|received| received.redelivered);
    redelivered.map(suspect_id).collect::<BTreeSet<_>>().into_iter().collect()
}

fn borrowed(suspects: &[SuspectId]) -> Vec<Suspect<'_>> {
    suspects.iter().map(|(queue, id)| Suspect { queue, message_id: id }).collect()
}
