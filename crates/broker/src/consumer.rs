use std::{
    collections::{BTreeSet, VecDeque},
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use amiquip::{AmqpValue, ConsumerMessage, ConsumerOptions, FieldTable};
use chrono::{DateTime, Utc};
use crossbeam_channel::{Receiver, Select, TryRecvError};

use crate::{
    Delivery, Error, Link, Session, Settings, Ticket,
    connector::Connector,
    delivery,
    session::Channel,
    topology::{self, explain_missing},
    unsettled::Unsettled,
};

const CONSUMING: &str = "consuming";
/// How often to look for more while a batch fills. Waking up for each message that comes would cost more than they do.
const LOOKS: u32 = 8;

/// Deliveries that came in one go, in the order in which the broker sent them. Empty if none came in time.
#[derive(Debug, Default)]
pub struct Batch {
    /// The deliveries.
    pub deliveries: Vec<Delivery>,
    /// Which of the consumer's connections, or of its turns to other queues, they came by: a count.
    pub epoch: u64,
}

/// Where to begin in a stream. The broker takes an offset or a time that it doesn't have for the nearest one that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamOffset {
    /// At the first message that there is.
    First,
    /// At the beginning of the newest chunk, a run of messages that were stored together.
    Last,
    /// After the newest message.
    Next,
    /// At this offset.
    At(i64),
    /// At the first chunk that was stored then or later, to the second.
    Since(DateTime<Utc>),
}

impl StreamOffset {
    fn arguments(self) -> FieldTable {
        let text = |text: &str| AmqpValue::LongString(text.into());
        let value = match self {
            Self::First => text("first"),
            Self::Last => text("last"),
            Self::Next => text("next"),
            Self::At(offset) => AmqpValue::LongLongInt(offset),
            Self::Since(time) => AmqpValue::Timestamp(time.timestamp().try_into().unwrap_or_default()),
        };
        [(delivery::OFFSET.to_owned(), value)].into_iter().collect()
    }
}

impl IntoIterator for Batch {
    type Item = Delivery;
    type IntoIter = std::vec::IntoIter<Delivery>;

    fn into_iter(self) -> Self::IntoIter {
        self.deliveries.into_iter()
    }
}

/// What became of acknowledgements, or of deliveries given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Acked {
    /// Deliveries for which it was sent.
    pub sent: usize,
    /// Deliveries of a connection that is lost: the broker will hand them out again.
    pub stale: usize,
}

/// What is consumed.
struct From {
    queues: Vec<Arc<str>>,
    /// For a stream: where to begin.
    start: Option<StreamOffset>,
    prefetch: u16,
    /// Of the queues, those that aren't consumed for now.
    left_out: Option<LeftOut>,
}

/// Queues that consumers leave out whenever they connect: those that are wrong, says whoever keeps the list, and those that were
/// silent when they were to be consumed. A queue without a leader is, and would keep a consumer from all its others.
#[derive(Clone, Debug, Default)]
pub struct LeftOut(Arc<Mutex<OutOfOrder>>);

#[derive(Debug, Default)]
struct OutOfOrder {
    wrong: BTreeSet<String>,
    silent: VecDeque<String>,
}

impl LeftOut {
    /// Sets those that are wrong.
    pub fn set_wrong(&self, queues: BTreeSet<String>) {
        self.list().wrong = queues;
    }

    /// Those that were silent.
    #[must_use]
    pub fn silent(&self) -> Vec<String> {
        self.list().silent.iter().cloned().collect()
    }

    /// Asks the one that was asked longest ago whether it answers now, and takes it from the list if it does. See
    /// [`ask`](topology::ask): on a connection of its own, and no longer than a second beside opening that.
    pub fn ask_again(&self, settings: &Settings, name: &str) {
        const LIMIT_MS: u64 = 1000;
        let Some(queue) = self.list().silent.front().cloned() else { return };
        let settings = Settings { confirm_timeout_ms: settings.confirm_timeout_ms.min(LIMIT_MS), ..settings.clone() };
        let asked = Session::open(&settings, name).and_then(|mut session| topology::ask(&mut session, &queue));
        let mut list = self.list();
        list.silent.retain(|silent| *silent != queue);
        if asked.is_err() {
            list.silent.push_back(queue);
        }
    }

    fn was_silent(&self, queue: &str) {
        let mut list = self.list();
        if !list.silent.iter().any(|silent| silent == queue) {
            list.silent.push_back(queue.into());
        }
    }

    fn contains(&self, queue: &str) -> bool {
        let OutOfOrder { wrong, silent } = &*self.list();
        wrong.contains(queue) || silent.iter().any(|silent| silent == queue)
    }

    fn list(&self) -> MutexGuard<'_, OutOfOrder> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes deliveries from one or several queues, or from a stream, on a connection of its own that it opens when it's needed and again
/// when it's lost.
pub struct Consumer {
    connector: Connector,
    from: From,
    live: Option<Live>,
    /// Counts the connections: a delivery tag means another message on the next one.
    epoch: u64,
}

impl Consumer {
    /// A consumer of these queues; connects with the first [`Consumer::next_batch`]. The broker sends up to `prefetch`
    /// messages of each queue ahead; at least twice as many as are taken in a batch keep it busy. The broker's tools
    /// show its connection under `name`.
    #[must_use]
    pub fn new(settings: &Settings, name: &str, queues: Vec<String>, prefetch: u16) -> Self {
        let queues = queues.into_iter().map(Into::into).collect();
        // To the broker, 0 is no limit.
        let from = From { queues, start: None, prefetch: prefetch.max(1), left_out: None };
        Self { connector: Connector::new(settings, name, "consume"), from, live: None, epoch: 0 }
    }

    /// A reader of a stream, which keeps its messages. Nothing of it is to be acknowledged: what is handed out makes room
    /// for as much to be sent ahead.
    #[must_use]
    pub fn of_stream_queue(settings: &Settings, name: &str, stream: &str, prefetch: u16, start: StreamOffset) -> Self {
        let mut consumer = Self::new(settings, name, vec![stream.into()], prefetch);
        consumer.from.start = Some(start);
        consumer
    }

    /// What to do on every new connection before consuming, such as declaring the topology: a broker may come back empty.
    #[must_use]
    pub fn on_connect(mut self, hook: impl FnMut(&mut Session) -> Result<(), Error> + Send + 'static) -> Self {
        self.connector.on_connect(hook);
        self
    }

    /// Leaves queues out, whatever is in here when the hook has run, and notes here those that are silent. Without it, a silent
    /// queue is tried again and again, and keeps it from the others.
    #[must_use]
    pub fn leaving_out(mut self, left_out: LeftOut) -> Self {
        self.from.left_out = Some(left_out);
        self
    }

    /// The queues that it leaves out on the present connection.
    #[must_use]
    pub fn left_out(&self) -> Vec<String> {
        let Some(live) = &self.live else { return Vec::new() };
        let is_consumed = |queue: &Arc<str>| live.sources.iter().any(|source| source.queue == *queue);
        self.from.queues.iter().filter(|queue| !is_consumed(queue)).map(ToString::to_string).collect()
    }

    /// Whether there is a connection that isn't known to be lost.
    #[must_use]
    pub fn connected(&self) -> bool {
        self.live.is_some()
    }

    /// The state of the connection, for other threads.
    #[must_use]
    pub fn link(&self) -> Link {
        self.connector.link().clone()
    }

    /// Waits up to `idle` for a delivery, then takes what comes until there are `max` or `linger` has passed. While
    /// the broker is away, tries to open a new connection, less and less often, and returns empty batches. Where it opens
    /// one, `idle` begins anew with it, so it may take twice as long, and `connect_timeout_ms` more, plus the hook's calls.
    ///
    /// # Errors
    /// Only what doesn't pass by itself: those that [are lost](Error::is_lost) are reported to telemetry and tried again.
    pub fn next_batch(&mut self, max: usize, linger: Duration, idle: Duration) -> Result<Batch, Error> {
        let mut idle_until = Instant::now() + idle;
        let mut live = match self.live.take() {
            Some(live) => live,
            None if !self.connector.wait(idle_until) => return Ok(Batch::default()),
            None => {
                self.epoch += 1;
                match Live::open(&mut self.connector, &self.from, self.epoch) {
                    Ok(live) => {
                        // A broker that is slow to connect to isn't one that has nothing.
                        idle_until = Instant::now() + idle;
                        live
                    }
                    Err(error) => return self.lost(error),
                }
            }
        };
        match live.collect(max, linger, idle_until) {
            Ok(deliveries) => {
                self.connector.steady();
                self.live = Some(live);
                Ok(Batch { deliveries, epoch: self.epoch })
            }
            // What has been collected already comes again, and couldn't be acknowledged.
            Err(error) => {
                let error = live.post_mortem(error).passing();
                self.lost(error)
            }
        }
    }

    /// Acknowledges a batch, or some deliveries or tickets of one or several batches, in any order. Those of a lost
    /// connection are skipped.
    pub fn ack(&mut self, deliveries: impl IntoIterator<Item = impl Into<Ticket>>) -> Acked {
        self.settle(deliveries, Live::ack)
    }

    /// Gives deliveries back to their queue, which hands them out again: to whomever, and not necessarily in their old
    /// place. Counts as a delivery. The fleet's services send a message on to wait instead.
    pub fn give_back(&mut self, deliveries: impl IntoIterator<Item = impl Into<Ticket>>) -> Acked {
        self.settle(deliveries, Live::give_back)
    }

    fn settle(
        &mut self,
        deliveries: impl IntoIterator<Item = impl Into<Ticket>>,
        settle: fn(&mut Live, Vec<u64>) -> Result<usize, Error>,
    ) -> Acked {
        let tickets: Vec<Ticket> = deliveries.into_iter().map(Into::into).collect();
        let all = tickets.len();
        let tags = tickets.into_iter().filter(|ticket| ticket.epoch == self.epoch).map(|ticket| ticket.tag).collect();
        let sent = match self.live.as_mut().map(|live| settle(live, tags)) {
            Some(Ok(sent)) => sent,
            // The next batch finds out what has become of the connection.
            Some(Err(_)) | None => 0,
        };
        Acked { sent, stale: all - sent }
    }

    /// Consumes these queues from now on, on the same connection, whose hook runs again first. What isn't acknowledged yet
    /// goes back, in order, and the tickets of it are stale.
    pub fn consume_from(&mut self, queues: Vec<String>) {
        self.from.queues = queues.into_iter().map(Into::into).collect();
        self.reopen();
    }

    /// Reads this stream from there on, on the same connection, whose hook runs again first.
    pub fn read_from(&mut self, stream: &str, start: StreamOffset) {
        self.from.start = Some(start);
        self.consume_from(vec![stream.into()]);
    }

    /// Where the next connection is to begin with the stream, whenever this one is lost.
    pub fn resume_at(&mut self, start: StreamOffset) {
        self.from.start = Some(start);
    }

    fn reopen(&mut self) {
        let Some(live) = self.live.take() else { return };
        self.epoch += 1;
        match live.reopen(&mut self.connector, &self.from, self.epoch) {
            Ok(live) => self.live = Some(live),
            // The next batch opens a new connection, and finds out whether that mends it.
            Err(error) => self.connector.lost(&error),
        }
    }

    /// Gives back what isn't acknowledged, in order, and says goodbye to the broker, until `deadline`. Dropping it
    /// cuts the connection instead.
    pub fn close(self, deadline: Instant) {
        if let Some(live) = self.live {
            live.close(deadline);
        }
    }

    fn lost(&mut self, error: Error) -> Result<Batch, Error> {
        self.connector.lost(&error);
        if error.is_lost() { Ok(Batch::default()) } else { Err(error) }
    }
}

/// An open connection with a channel that consumes.
struct Live {
    channel: Channel,
    sources: Vec<Source>,
    /// Whether what is read stays where it is.
    of_stream: bool,
    /// Of what was taken from a stream and not acknowledged, the last.
    last_of_stream: Option<amiquip::Delivery>,
    unsettled: Unsettled<amiquip::Delivery>,
    epoch: u64,
    /// The tag of the delivery that was handed out last.
    last_tag: u64,
    session: Session,
}

/// What comes from one queue.
pub(crate) struct Source {
    queue: Arc<str>,
    pub(crate) messages: Receiver<ConsumerMessage>,
    /// The next delivery, if it has been taken out already.
    pub(crate) head: Option<amiquip::Delivery>,
}

impl Live {
    fn open(connector: &mut Connector, from: &From, epoch: u64) -> Result<Self, Error> {
        let (session, (channel, sources)) = connector.connect(|session| Self::consume(session, from))?;
        Ok(Self::new(session, channel, sources, from, epoch))
    }

    fn new(session: Session, channel: Channel, sources: Vec<Source>, from: &From, epoch: u64) -> Self {
        let of_stream = from.start.is_some();
        Self {
            channel,
            sources,
            of_stream,
            last_of_stream: None,
            unsettled: Unsettled::default(),
            epoch,
            last_tag: 0,
            session,
        }
    }

    fn consume(session: &mut Session, from: &From) -> Result<(Channel, Vec<Source>), Error> {
        let channel = session.channel()?;
        channel.call("limiting what the broker sends ahead", |raw| raw.qos(0, from.prefetch, false))?;
        let left_out = |queue: &str| from.left_out.as_ref().is_some_and(|left_out| left_out.contains(queue));
        let open = |queue| {
            Source::open(&channel, queue, from.start).inspect_err(|error| {
                if let (Error::TimedOut { .. }, Some(left_out)) = (error, &from.left_out) {
                    left_out.was_silent(queue);
                }
            })
        };
        let sources = from.queues.iter().filter(|queue| !left_out(queue)).map(open).collect::<Result<_, _>>()?;
        Ok((channel, sources))
    }

    /// The same connection with another channel that consumes these queues.
    fn reopen(self, connector: &mut Connector, from: &From, epoch: u64) -> Result<Self, Error> {
        let Self { channel, sources, mut session, .. } = self;
        channel.close(Instant::now() + Duration::from_millis(connector.settings.confirm_timeout_ms));
        sources.into_iter().for_each(Source::drain);
        match connector.prepare(&mut session).and_then(|()| Self::consume(&mut session, from)) {
            Ok((channel, sources)) => Ok(Self::new(session, channel, sources, from, epoch)),
            Err(error) => Err(session.post_mortem(error)),
        }
    }

    fn close(self, deadline: Instant) {
        self.channel.close(deadline);
        self.session.close(deadline);
        self.sources.into_iter().for_each(Source::drain);
    }

    fn post_mortem(self, error: Error) -> Error {
        drop(self.channel);
        let error = self.session.post_mortem(error);
        self.sources.into_iter().for_each(Source::drain);
        error
    }

    fn collect(&mut self, max: usize, linger: Duration, idle_until: Instant) -> Result<Vec<Delivery>, Error> {
        // What a lost connection has left behind comes again.
        if !self.session.is_alive() {
            return Err(self.channel.failure(CONSUMING));
        }
        let mut deliveries = Vec::new();
        let mut linger_until = None;
        loop {
            self.pull(&mut deliveries, max)?;
            if deliveries.len() >= max {
                break;
            }
            if deliveries.is_empty() {
                let mut select = Select::new();
                for source in &self.sources {
                    select.recv(&source.messages);
                }
                if select.ready_deadline(idle_until).is_err() {
                    break;
                }
            } else {
                let until = *linger_until.get_or_insert_with(|| Instant::now() + linger);
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                thread::sleep(left.min(linger / LOOKS));
            }
        }
        // Of a stream: the last one's acknowledgement is for all. One for each few that come would have the broker send each few
        // by themselves.
        if let Some(last) = self.last_of_stream.take() {
            self.channel.call("acknowledging", |raw| last.ack_multiple(raw))?;
        }
        Ok(deliveries)
    }

    /// Takes what has come, in the order of the tags.
    fn pull(&mut self, deliveries: &mut Vec<Delivery>, max: usize) -> Result<(), Error> {
        if self.of_stream {
            return self.pull_stream(deliveries, max);
        }
        while deliveries.len() < max {
            // Nothing is ahead of the next tag, so the other queues needn't be asked.
            let next_tag = self.last_tag + 1;
            let mut lowest = self.lowest();
            if lowest.is_none_or(|(tag, _)| tag != next_tag) {
                self.refill()?;
                lowest = self.lowest();
            }
            if lowest.is_some_and(|(tag, _)| tag != next_tag) {
                // A lower one has come to a queue since that was asked; none can any more.
                self.refill()?;
                lowest = self.lowest();
            }
            let Some((tag, index)) = lowest else { return Ok(()) };
            let source = &mut self.sources[index];
            let Some(mut delivery) = source.head.take() else { return Ok(()) };
            deliveries.push(Delivery::take(&mut delivery, &source.queue, self.epoch));
            self.unsettled.insert(tag, delivery);
            self.last_tag = tag;
        }
        Ok(())
    }

    fn pull_stream(&mut self, deliveries: &mut Vec<Delivery>, max: usize) -> Result<(), Error> {
        for source in &mut self.sources {
            while deliveries.len() < max {
                source.refill(&self.channel)?;
                let Some(mut delivery) = source.head.take() else { break };
                deliveries.push(Delivery::take(&mut delivery, &source.queue, self.epoch));
                self.last_of_stream = Some(delivery);
            }
        }
        Ok(())
    }

    /// The lowest tag among the queues' next deliveries, and its queue's index.
    fn lowest(&self) -> Option<(u64, usize)> {
        let heads = self.sources.iter().enumerate();
        heads.filter_map(|(index, source)| Some((source.head.as_ref()?.delivery_tag(), index))).min()
    }

    fn refill(&mut self) -> Result<(), Error> {
        for source in &mut self.sources {
            source.refill(&self.channel)?;
        }
        Ok(())
    }

    fn give_back(&mut self, tags: Vec<u64>) -> Result<usize, Error> {
        let deliveries = self.unsettled.take(tags);
        let count = deliveries.len();
        self.channel.call("giving messages back", |raw| {
            deliveries.into_iter().try_for_each(|delivery| delivery.nack(raw, true))
        })?;
        Ok(count)
    }

    fn ack(&mut self, tags: Vec<u64>) -> Result<usize, Error> {
        let acks = self.unsettled.settle(tags);
        self.channel.call("acknowledging", |raw| {
            acks.all_up_to.map_or(Ok(()), |delivery| delivery.ack_multiple(raw))?;
            acks.single.into_iter().try_for_each(|delivery| delivery.ack(raw))
        })?;
        Ok(acks.count)
    }
}

impl Source {
    pub(crate) fn open(channel: &Channel, queue: &Arc<str>, start: Option<StreamOffset>) -> Result<Self, Error> {
        let messages = channel
            .call("starting to consume", |raw| {
                let arguments = start.map(StreamOffset::arguments).unwrap_or_default();
                let consumer = raw.basic_consume(&**queue, ConsumerOptions { arguments, ..Default::default() })?;
                let messages = consumer.receiver().clone();
                // Its drop would cancel it, which races the client's thread and can kill the connection: closing the
                // channel ends it instead. This leaks its tag, and what `drain` leaves of its queue.
                mem::forget(consumer);
                Ok(messages)
            })
            .map_err(|error| explain_missing(error, queue))?;
        Ok(Self { queue: Arc::clone(queue), messages, head: None })
    }

    /// Takes out the next delivery, if there's one.
    pub(crate) fn refill(&mut self, channel: &Channel) -> Result<(), Error> {
        if self.head.is_none() {
            match self.messages.try_recv() {
                Ok(ConsumerMessage::Delivery(delivery)) => self.head = Some(delivery),
                Ok(ConsumerMessage::ServerClosedChannel(error) | ConsumerMessage::ServerClosedConnection(error)) => {
                    return Err(Error::from_client(CONSUMING, error));
                }
                // The queue was deleted, or its leader has moved.
                Ok(ConsumerMessage::ServerCancelled) => {
                    return Err(Error::lost(CONSUMING, format!("the broker stopped delivering from `{}`", self.queue)));
                }
                Ok(
                    ConsumerMessage::ClientCancelled
                    | ConsumerMessage::ClientClosedChannel
                    | ConsumerMessage::ClientClosedConnection,
                )
                | Err(TryRecvError::Disconnected) => return Err(channel.failure(CONSUMING)),
                Err(TryRecvError::Empty) => {}
            }
        }
        Ok(())
    }

    /// Frees the deliveries that nobody takes any more: the forgotten consumer keeps their queue. Only when the
    /// connection has ended, so that no more come.
    pub(crate) fn drain(self) {
        self.messages.try_iter().for_each(drop);
    }
}
