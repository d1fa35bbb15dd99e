use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use crossbeam_channel::Select;

use crate::{Error, Session, Settings, StreamOffset, consumer::Source, delivery, session::Channel};

const READING: &str = "reading a stream";
/// How long the broker may take to send the first message of a stream that has some.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a stream may take to say where its end is, once the broker has asked it: it does so at once.
const GRACE: Duration = Duration::from_millis(500);
/// Messages that the broker sends ahead.
const PREFETCH: u16 = 1000;

/// Finds places in streams, by reading there: the broker can't be asked.
///
/// That nothing comes proves nothing: the broker or the network may be slow. Every answer rests on something that came:
///
/// - *A message is the newest* if the broker had leave to send more, and has answered a question on the same channel since. It
///   reads the stream as soon as there's leave, and its answers come in order: what there was has come before that answer.
/// - *A stream is empty* if the broker has answered a question on the channel that reads, so it has begun to read; another
///   one half a second later, before which no message came; and that answer says that there is none. The broker's count lags,
///   so it alone proves nothing; but where it says that there are some, they're waited for.
/// - *Nothing has been stored since a time* if another reader on the same channel, which began later and elsewhere, has got a
///   message: whenever the broker reads for one, it reads for both.
///
/// Whatever isn't certain within ten seconds is an error.
pub struct Survey {
    session: Session,
}

impl Survey {
    /// Connects, under a name that the broker's tools show.
    ///
    /// # Errors
    /// As for [`Session::open`].
    pub fn open(settings: &Settings, name: &str) -> Result<Self, Error> {
        Ok(Self { session: Session::open(settings, name)? })
    }

    /// The connection, for whatever is to be done there first.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The offset of the first message that is left; `None` if the stream is empty.
    ///
    /// # Errors
    /// [`Error::MissingQueue`], or one that [is lost](Error::is_lost).
    pub fn first(&mut self, stream: &str) -> Result<Option<i64>, Error> {
        self.look(stream, 1, |look| {
            let reader = look.read(StreamOffset::First)?;
            Ok(look.begin(reader, None)?.map(|(first, _)| first))
        })
    }

    /// The offset of the newest message; `None` if the stream is empty.
    ///
    /// # Errors
    /// [`Error::MissingQueue`], or one that [is lost](Error::is_lost).
    pub fn newest(&mut self, stream: &str) -> Result<Option<i64>, Error> {
        self.look(stream, PREFETCH, |look| {
            let reader = look.read(StreamOffset::Last)?;
            let Some((_, mut newest)) = look.begin(reader, None)? else { return Ok(None) };
            loop {
                look.give_leave(reader)?;
                look.ask()?;
                let Come { ends, count } = look.pull(reader)?;
                newest = ends.map_or(newest, |(_, last)| last);
                // Else there may be more that it had no leave to send.
                if count < PREFETCH.into() {
                    return Ok(Some(newest));
                }
            }
        })
    }

    /// The offset of the first message that was stored at that time or later, as exactly as the broker tells: to the second,
    /// and to the messages that were stored with it. `None` if there's none.
    ///
    /// # Errors
    /// [`Error::MissingQueue`], or one that [is lost](Error::is_lost).
    pub fn since(&mut self, stream: &str, time: DateTime<Utc>) -> Result<Option<i64>, Error> {
        self.look(stream, 1, |look| {
            let reader = look.read(StreamOffset::Since(time))?;
            let witness = look.read(StreamOffset::Last)?;
            Ok(look.begin(reader, Some(witness))?.map(|(first, _)| first))
        })
    }

    fn look<T>(
        &mut self,
        stream: &str,
        prefetch: u16,
        work: impl FnOnce(&mut Look<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let stream = Arc::from(stream);
        let mut readers = Vec::new();
        let found = self.session.on_channel(|channel| {
            channel.call("limiting what the broker sends ahead", |raw| raw.qos(0, prefetch, false))?;
            work(&mut Look { channel, stream, readers: &mut readers })
        });
        readers.into_iter().for_each(|reader: Reader| reader.source.drain());
        found
    }
}

/// Readers of a stream on one channel.
struct Look<'a> {
    channel: &'a Channel,
    stream: Arc<str>,
    readers: &'a mut Vec<Reader>,
}

struct Reader {
    source: Source,
    /// The last message that came and wasn't acknowledged.
    last: Option<amiquip::Delivery>,
}

/// What has come to a reader.
struct Come {
    /// The offsets of the first message and of the last.
    ends: Option<(i64, i64)>,
    count: usize,
}

impl Look<'_> {
    /// Begins to read, and returns the reader's number.
    fn read(&mut self, start: StreamOffset) -> Result<usize, Error> {
        let source = Source::open(self.channel, &self.stream, Some(start))?;
        self.readers.push(Reader { source, last: None });
        Ok(self.readers.len() - 1)
    }

    /// Awaits the broker's answer to a question on the same channel: how many messages the stream has, by its count that lags.
    fn ask(&self) -> Result<u32, Error> {
        let count = self.channel.call("asking about a stream that is read", |raw| {
            Ok(raw.queue_declare_passive(&*self.stream)?.declared_message_count())
        })?;
        Ok(count.unwrap_or_default())
    }

    /// What has come.
    fn pull(&mut self, reader: usize) -> Result<Come, Error> {
        let reader = &mut self.readers[reader];
        let mut come = Come { ends: None, count: 0 };
        loop {
            reader.source.refill(self.channel)?;
            let Some(delivery) = reader.source.head.take() else { return Ok(come) };
            if let Some(offset) = delivery.properties.headers().as_ref().and_then(delivery::offset) {
                come.ends = Some((come.ends.map_or(offset, |(first, _)| first), offset));
            }
            come.count += 1;
            reader.last = Some(delivery);
        }
    }

    /// Gives the broker leave to send as much again as has come.
    fn give_leave(&mut self, reader: usize) -> Result<(), Error> {
        match self.readers[reader].last.take() {
            Some(last) => self.channel.call("acknowledging", |raw| last.ack_multiple(raw)),
            None => Ok(()),
        }
    }

    /// The ends of what comes to a reader first; `None` if it's certain that nothing does. A witness that began later settles it by
    /// getting a message.
    fn begin(&mut self, reader: usize, witness: Option<usize>) -> Result<Option<(i64, i64)>, Error> {
        let until = Instant::now() + PATIENCE;
        self.ask()?;
        loop {
            if let Some(ends) = self.pull(reader)?.ends {
                return Ok(Some(ends));
            }
            self.wait(GRACE);
            let witnessed = match witness {
                Some(witness) => self.pull(witness)?.count > 0,
                None => false,
            };
            let count = self.ask()?;
            if let Some(ends) = self.pull(reader)?.ends {
                return Ok(Some(ends));
            }
            if witnessed || count == 0 {
                return Ok(None);
            }
            if Instant::now() >= until {
                return Err(Error::TimedOut { doing: READING, after: PATIENCE });
            }
        }
    }

    /// Waits until something comes to a reader, or that long.
    fn wait(&self, most: Duration) {
        let mut select = Select::new();
        for reader in &*self.readers {
            select.recv(&reader.source.messages);
        }
        let _ = select.ready_timeout(most);
    }
}
