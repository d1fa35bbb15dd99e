use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use amiquip::{AmqpProperties, AmqpValue, Confirm, FieldTable, Publish, Return};
use chrono::Utc;
use crossbeam_channel::{Receiver, Select, TryRecvError};
use domain::{Envelope, envelope::header};

use crate::{
    Error, Link, Session, Settings,
    confirms::{Sent, Unconfirmed},
    connector::Connector,
    link::REFUSED_FOR_LONG,
    session::Channel,
};

const PUBLISHING: &str = "publishing";
/// AMQP's names and keys.
const LONGEST_STRING: usize = 255;
/// All headers go into one frame, whose size the broker limits (128 KiB unless it's set otherwise).
const LARGEST_HEADERS: usize = 64 * 1024;
const PERSISTENT: u8 = 2;
/// How long closing a channel may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long a queue may confirm nothing, while others do, before that is tried on another connection.
const SILENT_FOR_LONG: Duration = Duration::from_secs(60);

/// Why messages weren't all confirmed.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// The broker confirmed all but these, or these were never sent because they can't be.
    #[error("messages refused: {}, the first of them because {}", refused.len(), refused[0].1)]
    Refused {
        /// Indexes into the published slice, ascending, and why. Never empty.
        refused: Vec<(usize, Reason)>,
    },
    /// The deadline passed first. Nothing is known about the messages that weren't confirmed: they may have arrived.
    #[error("messages not confirmed: {}", unconfirmed.len())]
    Unavailable {
        /// Indexes into the published slice, ascending. All the others are confirmed.
        unconfirmed: Vec<usize>,
        /// What kept them from being confirmed.
        source: Error,
    },
}

/// Why a message was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// It reaches no queue.
    #[error("it can't be routed: {code} {text}")]
    Returned {
        /// AMQP's reply code: 312 if no queue is bound for its key, 404 if there's no such exchange.
        code: u16,
        /// What the broker says.
        text: String,
    },
    /// A queue didn't take it, usually because it's full: may be tried again.
    #[error("the queue didn't take it")]
    Nacked,
    /// It can't be sent at all.
    #[error("{0}")]
    Invalid(String),
}

/// Publishes persistent messages and waits for the broker's confirms, on a connection of its own that it opens when
/// it's needed and again when it's lost.
pub struct Publisher {
    connector: Connector,
    /// Whether it's for streams, so that each routing key has a channel of its own.
    streams: bool,
    live: Option<Live>,
    /// Counts the calls of [`Publisher::publish_all`].
    call: u64,
}

impl Publisher {
    /// A publisher; connects with the first messages. The broker's tools show its connection under `name`.
    #[must_use]
    pub fn new(settings: &Settings, name: &str) -> Self {
        Self { connector: Connector::new(settings, name, "publish"), streams: false, live: None, call: 0 }
    }

    /// Gives the messages of each routing key a channel of their own, for streams that have a routing key each. When a
    /// stream's writer was started anew, RabbitMQ 3 sends it the unconfirmed messages once more, with their numbers in the
    /// channel in place of those in the stream; then it takes later messages for ones that it has, and confirms them
    /// unwritten. In a channel for one stream alone the numbers are the same.
    ///
    /// And adds no property of its own: they are a good part of what reading a stream costs the broker.
    #[must_use]
    pub fn for_stream_queues(mut self) -> Self {
        self.streams = true;
        self
    }

    /// What to do on every new connection before publishing, such as declaring the topology: a broker may come back empty.
    #[must_use]
    pub fn on_connect(mut self, hook: impl FnMut(&mut Session) -> Result<(), Error> + Send + 'static) -> Self {
        self.connector.on_connect(hook);
        self
    }

    /// The state of the connection, for other threads.
    #[must_use]
    pub fn link(&self) -> Link {
        self.connector.link().clone()
    }

    /// Publishes all in order, as many at a time as the window allows, and returns when each is confirmed. After a
    /// lost connection those that weren't confirmed are published again in order, until `deadline`; so some may
    /// arrive twice. The last attempt to connect may outlast the deadline by `connect_timeout_ms`.
    ///
    /// # Errors
    /// [`PublishError::Refused`] if all others are confirmed; [`PublishError::Unavailable`] if that can't be said.
    pub fn publish_all(&mut self, envelopes: &[Envelope], deadline: Instant) -> Result<(), PublishError> {
        self.publish(envelopes, deadline, true)
    }

    /// The same on one connection alone: when that is lost, the caller decides what to publish again, and as what. For
    /// messages that say which others were sent before them.
    ///
    /// # Errors
    /// As for [`Publisher::publish_all`].
    pub fn publish_once(&mut self, envelopes: &[Envelope], deadline: Instant) -> Result<(), PublishError> {
        self.publish(envelopes, deadline, false)
    }

    fn publish(&mut self, envelopes: &[Envelope], deadline: Instant, again: bool) -> Result<(), PublishError> {
        self.call += 1;
        let mut progress = Progress::new(self.call, envelopes, self.connector.settings.window_bytes);
        while !progress.is_settled() {
            let error = match self.attempt(&mut progress, deadline) {
                Ok(()) => break,
                Err(Stop::Deadline(source)) => return Err(progress.unavailable(source)),
                Err(Stop::Failed(error)) => error,
            };
            if progress.refuse_culprits(&error) && (again || progress.is_settled()) {
                continue;
            }
            self.connector.lost(&error);
            if !again || !error.is_lost() || !self.connector.wait(deadline) {
                return Err(progress.unavailable(error));
            }
        }
        progress.into_result()
    }

    /// Publishes on one connection what isn't settled.
    fn attempt(&mut self, progress: &mut Progress<'_>, deadline: Instant) -> Result<(), Stop> {
        let mut live = match self.live.take() {
            Some(live) => live,
            None => Live::open(&mut self.connector, self.streams).map_err(Stop::Failed)?,
        };
        match live.publish(progress, &mut self.connector, deadline) {
            Err(Stop::Failed(error)) => Err(Stop::Failed(live.post_mortem(error))),
            // When the deadline passes and nothing was confirmed, what was sent stays in the window: it's with the broker, or
            // behind a broker that is blocked, and another connection would only send it once more.
            other => {
                self.live = Some(live);
                other
            }
        }
    }

    /// Says goodbye to the broker, until `deadline`. Dropping it cuts the connection instead.
    pub fn close(self, deadline: Instant) {
        if let Some(Live { lanes, session, .. }) = self.live {
            lanes.into_values().for_each(|lane| lane.channel.close(deadline));
            session.close(deadline);
        }
    }
}

/// Why publishing on a connection ended early.
enum Stop {
    /// The connection is still good.
    Deadline(Error),
    /// It isn't.
    Failed(Error),
}

/// An open connection.
struct Live {
    streams: bool,
    /// By routing key, if each has one of its own.
    lanes: HashMap<String, Lane>,
    /// Since when no confirm has come though one is due.
    waiting_since: Instant,
    /// Since when a queue has confirmed nothing though others have.
    silent_since: Option<Instant>,
    session: Session,
}

/// A channel in confirm mode.
struct Lane {
    channel: Channel,
    confirms: Receiver<Confirm>,
    returns: Receiver<Return>,
    unconfirmed: Unconfirmed,
    /// Whether no more confirms can come.
    ended: bool,
    /// Whether a message was returned: the channel has counted it.
    returned: bool,
    /// When to open another in its place, because a queue refuses messages. RabbitMQ keeps for each channel whether a quorum
    /// queue takes any, and may miss that it does again.
    renew_at: Option<Instant>,
}

impl Live {
    fn open(connector: &mut Connector, streams: bool) -> Result<Self, Error> {
        let (session, ()) = connector.connect(|_| Ok(()))?;
        Ok(Self { streams, lanes: HashMap::new(), waiting_since: Instant::now(), silent_since: None, session })
    }

    fn post_mortem(self, error: Error) -> Error {
        // The channels go first, as they do with the connection up.
        drop(self.lanes);
        self.session.post_mortem(error)
    }

    fn publish(
        &mut self,
        progress: &mut Progress<'_>,
        connector: &mut Connector,
        deadline: Instant,
    ) -> Result<(), Stop> {
        let started = Instant::now();
        let confirm_timeout = Duration::from_millis(connector.settings.confirm_timeout_ms);
        let link = connector.link().clone();
        let alarm = self.session.alarm().clone();
        let _waiting = alarm.waiting();
        self.close_spent(&link)?;
        progress.next = 0;
        loop {
            let blocked = self.session.blocked_for();
            // No confirm is due from a broker that is blocked, or was until now.
            if connector.blocked(blocked.as_deref()) || blocked.is_some() {
                self.waiting_since = Instant::now();
            }
            if blocked.is_none() {
                self.fill_window(progress, &connector.settings)?;
            }

            let mut confirmed = false;
            for lane in self.lanes.values_mut() {
                confirmed |= lane.take_confirms(progress, &link);
            }
            if confirmed {
                connector.steady();
                self.waiting_since = Instant::now();
            }
            if progress.is_settled() {
                return Ok(());
            }
            if let Some(lane) = self.lanes.values().find(|lane| lane.ended) {
                return Err(Stop::Failed(lane.channel.failure(PUBLISHING)));
            }

            let now = Instant::now();
            if now >= deadline {
                if blocked.is_none() {
                    self.give_up_silent(progress, &link, started);
                }
                return Err(Stop::Deadline(match blocked {
                    Some(reason) => Error::Blocked(reason),
                    None => Error::TimedOut { doing: PUBLISHING, after: now - started },
                }));
            }
            // There's room again. If nothing was left to be confirmed, nothing would ever come.
            if confirmed {
                continue;
            }
            if now - self.waiting_since >= confirm_timeout {
                return Err(Stop::Failed(Error::TimedOut { doing: PUBLISHING, after: confirm_timeout }));
            }
            let mut select = Select::new();
            self.lanes.values().for_each(|lane| _ = select.recv(&lane.confirms));
            select.recv(alarm.notifications());
            // Either way the next round finds out.
            let _ = select.ready_deadline(deadline.min(self.waiting_since + confirm_timeout));
        }
    }

    /// Closes channels that are no good any more; others are opened when they're needed.
    fn close_spent(&mut self, link: &Link) -> Result<(), Stop> {
        if !link.has_refusals() {
            self.silent_since = None;
            self.lanes.values_mut().for_each(|lane| lane.renew_at = None);
        }
        if self.silent_since.is_some() || self.lanes.values().any(Lane::is_due) {
            link.tell_refusals();
        }
        // A channel may be stuck with such a queue, even in its goodbye: another connection it is.
        if let Some(after) = self.silent_since.map(|since| since.elapsed()).filter(|after| *after >= SILENT_FOR_LONG) {
            return Err(Stop::Failed(Error::TimedOut { doing: "waiting for a queue's confirms", after }));
        }
        // Where streams are published to, a channel counts another way than its stream from a returned message on.
        let miscounts = |lane: &Lane| self.streams && lane.returned;
        // A broker that is blocked doesn't answer a goodbye.
        let is_refused = |lane: &Lane| lane.is_due() && !self.session.is_blocked();
        let spent = self.lanes.extract_if(|_, lane| miscounts(lane) || is_refused(lane));
        spent.for_each(|(_, lane)| lane.channel.close(Instant::now() + GOODBYE));
        Ok(())
    }

    /// At the deadline of a call that began then, gives up what isn't confirmed, if others' messages were, or if their
    /// destinations are known for it: the connection is good, and the window is for the others.
    fn give_up_silent(&mut self, progress: &Progress<'_>, link: &Link, started: Instant) {
        let confirmed = progress.statuses.iter().any(|status| matches!(status, Status::Confirmed));
        for lane in self.lanes.values_mut() {
            let silent = lane.unconfirmed.give_up(|sent| {
                sent.call == progress.call && (confirmed || link.is_refused(&progress.envelopes[sent.index]))
            });
            for sent in silent {
                link.refuse(&progress.envelopes[sent.index], started);
                self.silent_since.get_or_insert(started);
            }
        }
    }

    fn fill_window(&mut self, progress: &mut Progress<'_>, settings: &Settings) -> Result<(), Stop> {
        let unconfirmed = || self.lanes.values().map(|lane| &lane.unconfirmed);
        let mut messages: usize = unconfirmed().map(Unconfirmed::len).sum();
        let mut window_bytes: usize = unconfirmed().map(Unconfirmed::bytes).sum();
        while let Some(index) = progress.next_open() {
            let envelope = &progress.envelopes[index];
            let bytes = envelope.body.len();
            let room = messages < settings.window_messages && window_bytes + bytes <= settings.window_bytes;
            if messages == 0 {
                self.waiting_since = Instant::now();
            } else if !room {
                break;
            }
            let publish = Publish {
                body: &envelope.body,
                routing_key: envelope.routing_key.clone(),
                mandatory: true,
                immediate: false,
                properties: properties(envelope, self.streams),
            };
            let lane = self.lane(envelope).map_err(Stop::Failed)?;
            lane.channel
                .call(PUBLISHING, |raw| raw.basic_publish(&envelope.exchange, publish))
                .map_err(Stop::Failed)?;
            lane.unconfirmed.push(Sent { call: progress.call, index, bytes, returned: None });
            messages += 1;
            window_bytes += bytes;
            progress.next = index + 1;
        }
        Ok(())
    }

    /// The channel for a message.
    fn lane(&mut self, envelope: &Envelope) -> Result<&mut Lane, Error> {
        let key = if self.streams { &*envelope.routing_key } else { "" };
        if !self.lanes.contains_key(key) {
            let lane = Lane::open(&mut self.session)?;
            self.lanes.insert(key.to_owned(), lane);
        }
        Ok(self.lanes.get_mut(key).expect("it's there, or has been made"))
    }
}

impl Lane {
    fn open(session: &mut Session) -> Result<Self, Error> {
        let channel = session.channel()?;
        let (confirms, returns) = channel.call("asking for confirms", |raw| {
            raw.enable_publisher_confirms()?;
            Ok((raw.listen_for_publisher_confirms()?, raw.listen_for_returns()?))
        })?;
        Ok(Self {
            channel,
            confirms,
            returns,
            unconfirmed: Unconfirmed::default(),
            ended: false,
            returned: false,
            renew_at: None,
        })
    }

    /// Whether it's time to open another in its place.
    fn is_due(&self) -> bool {
        self.renew_at.is_some_and(|at| at <= Instant::now())
    }

    /// Takes the confirms that have come, and returns whether there were any.
    fn take_confirms(&mut self, progress: &mut Progress<'_>, link: &Link) -> bool {
        let mut any = false;
        loop {
            let confirm = match self.confirms.try_recv() {
                Ok(confirm) => confirm,
                Err(error) => {
                    self.ended = error == TryRecvError::Disconnected;
                    return any;
                }
            };
            any = true;
            // The broker returns a message before it confirms it, so its return is here by now.
            for returned in self.returns.try_iter() {
                self.returned = true;
                self.unconfirmed.return_first(returned.reply_code, returned.reply_text.clone(), |sent| {
                    sent.call == progress.call && is_same(&progress.envelopes[sent.index], &returned)
                });
            }
            let (confirmed, payload) = match confirm {
                Confirm::Ack(payload) => (true, payload),
                Confirm::Nack(payload) => (false, payload),
            };
            for sent in self.unconfirmed.settle(payload.delivery_tag, payload.multiple) {
                if sent.call == progress.call {
                    let envelope = &progress.envelopes[sent.index];
                    let status = match sent.returned {
                        Some((code, text)) => Status::Refused(Reason::Returned { code, text }),
                        None if confirmed => {
                            link.accept(envelope);
                            Status::Confirmed
                        }
                        None => {
                            let now = Instant::now();
                            link.refuse(envelope, now);
                            self.renew_at.get_or_insert(now + REFUSED_FOR_LONG);
                            Status::Refused(Reason::Nacked)
                        }
                    };
                    progress.settle(sent.index, status);
                }
            }
        }
    }
}

/// How far a call has come.
struct Progress<'a> {
    call: u64,
    envelopes: &'a [Envelope],
    statuses: Vec<Status>,
    /// How many are open.
    open: usize,
    /// The first that hasn't been sent on the present connection.
    next: usize,
}

#[derive(Clone)]
enum Status {
    Open,
    Confirmed,
    Refused(Reason),
}

impl<'a> Progress<'a> {
    fn new(call: u64, envelopes: &'a [Envelope], largest_body: usize) -> Self {
        let mut progress =
            Self { call, envelopes, statuses: vec![Status::Open; envelopes.len()], open: envelopes.len(), next: 0 };
        for (index, envelope) in envelopes.iter().enumerate() {
            if let Err(why) = validate(envelope, largest_body) {
                progress.settle(index, Status::Refused(Reason::Invalid(why)));
            }
        }
        progress
    }

    fn is_settled(&self) -> bool {
        self.open == 0
    }

    fn is_open(&self, index: usize) -> bool {
        matches!(self.statuses[index], Status::Open)
    }

    /// The next message to be sent.
    fn next_open(&self) -> Option<usize> {
        (self.next..self.statuses.len()).find(|&index| self.is_open(index))
    }

    fn settle(&mut self, index: usize, status: Status) {
        self.statuses[index] = status;
        self.open -= 1;
    }

    /// If the broker closed the channel over an exchange that isn't there or may not be used, refuses the messages to
    /// that exchange: else they would stop the others for ever.
    fn refuse_culprits(&mut self, error: &Error) -> bool {
        const CODES: [u16; 2] = [403, 404];
        let Error::Refused { code, text, .. } = error else { return false };
        let exchange = text.split_once("exchange '").and_then(|(_, rest)| rest.split_once('\''));
        let (true, Some((exchange, _))) = (CODES.contains(code), exchange) else { return false };
        let before = self.open;
        for (index, envelope) in self.envelopes.iter().enumerate() {
            if self.is_open(index) && envelope.exchange == exchange {
                self.settle(index, Status::Refused(Reason::Returned { code: *code, text: text.clone() }));
            }
        }
        self.open < before
    }

    fn unavailable(&self, source: Error) -> PublishError {
        let unconfirmed = self.statuses.iter().enumerate();
        let unconfirmed = unconfirmed.filter(|(_, status)| !matches!(status, Status::Confirmed));
        PublishError::Unavailable { unconfirmed: unconfirmed.map(|(index, _)| index).collect(), source }
    }

    fn into_result(self) -> Result<(), PublishError> {
        let refused: Vec<_> = self
            .statuses
            .into_iter()
            .enumerate()
            .filter_map(|(index, status)| match status {
                Status::Refused(reason) => Some((index, reason)),
                Status::Confirmed | Status::Open => None,
            })
            .collect();
        if refused.is_empty() { Ok(()) } else { Err(PublishError::Refused { refused }) }
    }
}

/// Whether the broker would take it for what it is. A string that is too long closes the connection.
fn validate(envelope: &Envelope, largest_body: usize) -> Result<(), String> {
    let strings = [
        ("exchange", Some(&envelope.exchange)),
        ("routing key", Some(&envelope.routing_key)),
        ("type", envelope.kind.as_ref()),
        ("message id", Some(&envelope.message_id)),
        ("correlation id", envelope.correlation_id.as_ref()),
    ];
    let headers = envelope.headers.keys().map(|name| ("header's name", Some(name)));
    for (what, string) in strings.into_iter().chain(headers) {
        let bytes = string.map_or(0, String::len);
        if bytes > LONGEST_STRING {
            return Err(format!("its {what} has {bytes} bytes, more than {LONGEST_STRING}"));
        }
    }
    let headers: usize = envelope.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    if headers > LARGEST_HEADERS {
        return Err(format!("its headers have {headers} bytes, more than {LARGEST_HEADERS}"));
    }
    let body = envelope.body.len();
    if body > largest_body {
        return Err(format!("its body has {body} bytes, more than broker.window_bytes = {largest_body}"));
    }
    Ok(())
}

/// The envelope's, and beside it what every message of the fleet has that goes to a queue.
fn properties(envelope: &Envelope, to_stream: bool) -> AmqpProperties {
    let mut headers: FieldTable =
        envelope.headers.iter().map(|(name, value)| (name.clone(), AmqpValue::LongString(value.clone()))).collect();
    if !to_stream {
        let now_ms = Utc::now().timestamp_millis().to_string();
        headers.insert(header::PUBLISHED_AT_MS.into(), AmqpValue::LongString(now_ms));
    }
    let mut properties = AmqpProperties::default().with_message_id(envelope.message_id.clone());
    if !to_stream {
        properties = properties
            .with_content_type("application/json".into())
            .with_delivery_mode(PERSISTENT)
            .with_timestamp(envelope.created_at.timestamp().try_into().unwrap_or_default());
    }
    if !headers.is_empty() {
        properties = properties.with_headers(headers);
    }
    if let Some(kind) = &envelope.kind {
        properties = properties.with_type_(kind.clone());
    }
    if let Some(correlation_id) = &envelope.correlation_id {
        properties = properties.with_correlation_id(correlation_id.clone());
    }
    properties
}

fn is_same(envelope: &Envelope, returned: &Return) -> bool {
    returned.properties.message_id().as_ref() == Some(&envelope.message_id)
        && returned.exchange == envelope.exchange
        && returned.routing_key == envelope.routing_key
}
