use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use amiquip::ConnectionBlockedNotification as Notification;
use chrono::{DateTime, SecondsFormat, Utc};
use crossbeam_channel::{Receiver, TryRecvError};
use domain::Envelope;
use telemetry::{DestinationAccepting, DestinationRefusing, emit};

/// How long a destination may refuse before that is more than a full queue's moment.
pub(crate) const REFUSED_FOR_LONG: Duration = Duration::from_secs(1);

/// How often a refusal that goes on is spoken of.
const SAY_EVERY: Duration = Duration::from_secs(30);

/// When nothing was published there for so long, nobody waits for it here.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(60);

/// The most destinations that are kept in mind. A hash exchange has as many as there are keys.
const MOST: usize = 100;

/// The most that a health check names.
const NAMED: usize = 3;

/// Where a message is published to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination {
    /// The exchange; empty for the default one.
    pub exchange: String,
    /// The routing key: of the default exchange, the queue.
    pub routing_key: String,
}

impl Destination {
    /// The message's.
    #[must_use]
    pub fn of(envelope: &Envelope) -> Self {
        Self { exchange: envelope.exchange.clone(), routing_key: envelope.routing_key.clone() }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { exchange, routing_key } = self;
        match &**exchange {
            "" => write!(out, "queue `{routing_key}`"),
            _ => write!(out, "exchange `{exchange}`, routing key `{routing_key}`"),
        }
    }
}

/// What is known about a publisher's or consumer's connection, for health checks and metrics on other threads.
#[derive(Clone, Debug, Default)]
pub struct Link(Arc<State>);

#[derive(Debug, Default)]
struct State {
    connected: AtomicBool,
    /// Whether the broker was found blocked; of a connection that nothing is being published on, the alarm knows better.
    blocked: AtomicBool,
    alarm: Mutex<Option<Arc<Alarm>>>,
    /// Whether there are any refusals. Asked with each confirm.
    refused: AtomicBool,
    refusals: Mutex<HashMap<Destination, Refusal>>,
    held_up: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Refusal {
    since: Instant,
    began: DateTime<Utc>,
    last: Instant,
    said: Option<Instant>,
}

impl Link {
    /// Whether there is a connection that isn't known to be lost.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.0.connected.load(Ordering::Relaxed)
    }

    /// Whether the broker accepts no messages for now, because it lacks memory or disk.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.0.blocked.load(Ordering::Relaxed)
            && lock(&self.0.alarm).as_ref().is_none_or(|alarm| alarm.is_raised_while_idle())
    }

    /// Where messages have been refused for more than a moment, and since when, in their order.
    #[must_use]
    pub fn refused(&self) -> Vec<(Destination, DateTime<Utc>)> {
        let now = Instant::now();
        let refusals = lock(&self.0.refusals);
        let long = refusals
            .iter()
            .filter(|(_, refusal)| refusal.is_long(now) && now.duration_since(refusal.last) < FORGOTTEN_AFTER);
        let mut long: Vec<_> = long.map(|(destination, refusal)| (destination.clone(), refusal.began)).collect();
        long.sort();
        long
    }

    /// What keeps messages from being published, in words for a health check. That there's no connection is no such thing: a
    /// publisher connects when it has something to publish.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        if self.is_blocked() {
            return Some("it has blocked publishing, being short of memory or disk (an alarm)".into());
        }
        let refused = self.refused();
        let name = |(destination, since): &(Destination, DateTime<Utc>)| {
            format!("{destination} takes no messages since {}", since.to_rfc3339_opts(SecondsFormat::Secs, true))
        };
        let mut named: Vec<_> = refused.iter().take(NAMED).map(name).collect();
        if refused.len() > NAMED {
            named.push(format!("and {} more", refused.len() - NAMED));
        }
        (!named.is_empty()).then(|| named.join("; "))
    }

    /// For a health check: whether the broker takes what these publish. That there's no connection is said only where the broker
    /// hasn't blocked it.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn check(connected: bool, publishing: &[Self]) -> Result<(), String> {
        if !connected && !publishing.iter().any(Self::is_blocked) {
            return Err("not connected".into());
        }
        publishing.iter().find_map(Self::trouble).map_or(Ok(()), Err)
    }

    /// What keeps it from being connected, if that stays as it is until somebody changes the settings or the broker.
    #[must_use]
    pub fn held_up(&self) -> Option<String> {
        lock(&self.0.held_up).clone()
    }

    pub(crate) fn set_held_up(&self, why: Option<String>) {
        *lock(&self.0.held_up) = why;
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        self.0.connected.store(connected, Ordering::Relaxed);
    }

    pub(crate) fn set_blocked(&self, blocked: bool) {
        self.0.blocked.store(blocked, Ordering::Relaxed);
    }

    pub(crate) fn watch(&self, alarm: Option<Arc<Alarm>>) {
        *lock(&self.0.alarm) = alarm;
    }

    /// Whether anything is refused.
    pub(crate) fn has_refusals(&self) -> bool {
        self.0.refused.load(Ordering::Relaxed)
    }

    /// Whether the message's destination is one that refuses.
    pub(crate) fn is_refused(&self, envelope: &Envelope) -> bool {
        self.has_refusals() && lock(&self.0.refusals).contains_key(&Destination::of(envelope))
    }

    /// Notes that a queue hasn't taken a message that was published at `since` or later.
    pub(crate) fn refuse(&self, envelope: &Envelope, since: Instant) {
        let now = Instant::now();
        let mut refusals = lock(&self.0.refusals);
        forget(&mut refusals, now);
        let destination = Destination::of(envelope);
        if let Some(refusal) = refusals.get_mut(&destination) {
            refusal.last = now;
        } else if refusals.len() < MOST {
            let began = Utc::now() - now.duration_since(since);
            refusals.insert(destination, Refusal { since, began, last: now, said: None });
            self.0.refused.store(true, Ordering::Relaxed);
        }
    }

    /// Notes that a message was taken.
    pub(crate) fn accept(&self, envelope: &Envelope) {
        if !self.has_refusals() {
            return;
        }
        let mut refusals = lock(&self.0.refusals);
        if let Some(refusal) = refusals.remove(&Destination::of(envelope))
            && refusal.said.is_some()
        {
            let Envelope { exchange, routing_key, .. } = envelope;
            emit(DestinationAccepting { exchange, routing_key, after: refusal.since.elapsed() });
        }
        self.0.refused.store(!refusals.is_empty(), Ordering::Relaxed);
    }

    /// Says what has been refused for long, at first and every 30 s, and forgets what nobody publishes to any more.
    pub(crate) fn tell_refusals(&self) {
        let now = Instant::now();
        let mut refusals = lock(&self.0.refusals);
        forget(&mut refusals, now);
        for (Destination { exchange, routing_key }, refusal) in &mut *refusals {
            if refusal.is_long(now) && refusal.said.is_none_or(|said| now.duration_since(said) >= SAY_EVERY) {
                emit(DestinationRefusing { exchange, routing_key, since: now.duration_since(refusal.since) });
                refusal.said = Some(now);
            }
        }
        self.0.refused.store(!refusals.is_empty(), Ordering::Relaxed);
    }
}

fn forget(refusals: &mut HashMap<Destination, Refusal>, now: Instant) {
    refusals.retain(|_, refusal| now.duration_since(refusal.last) < FORGOTTEN_AFTER);
}

impl Refusal {
    fn is_long(&self, now: Instant) -> bool {
        now.duration_since(self.since) >= REFUSED_FOR_LONG
    }
}

/// What the broker says about its memory and disk on one connection.
#[derive(Debug)]
pub(crate) struct Alarm {
    notifications: Receiver<Notification>,
    reason: Mutex<Option<String>>,
    /// Held by whoever waits for notifications. Others leave them to it, or it wouldn't wake.
    waiting: Mutex<()>,
}

impl Alarm {
    pub(crate) fn new(notifications: Receiver<Notification>) -> Self {
        Self { notifications, reason: Mutex::default(), waiting: Mutex::default() }
    }

    /// Reads what has come, and returns false if nothing more can: the connection has ended.
    pub(crate) fn read(&self) -> bool {
        loop {
            match self.notifications.try_recv() {
                Ok(Notification::Blocked(reason)) => *lock(&self.reason) = Some(reason),
                Ok(Notification::Unblocked) => *lock(&self.reason) = None,
                Err(nothing) => return nothing == TryRecvError::Empty,
            }
        }
    }

    /// Why the broker accepts no messages, as far as notifications were read.
    pub(crate) fn reason(&self) -> Option<String> {
        lock(&self.reason).clone()
    }

    /// Ready when there's something to be read.
    pub(crate) fn notifications(&self) -> &Receiver<Notification> {
        &self.notifications
    }

    /// Keeps others from reading what its holder waits for.
    pub(crate) fn waiting(&self) -> MutexGuard<'_, ()> {
        lock(&self.waiting)
    }

    /// Whether the broker accepts no messages, also if nobody has asked for long.
    fn is_raised_while_idle(&self) -> bool {
        if let Ok(_nobody_waits) = self.waiting.try_lock() {
            self.read();
        }
        lock(&self.reason).is_some()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
