use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};

use crate::{Consumer, Error, Session, Settings, StreamOffset, depths};

/// How long the broker may take to send the first message of a stream that has some.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same for a stream that has none, as far as the broker's lagging count tells.
const GLANCE: Duration = Duration::from_millis(500);
/// The broker sends a chunk without a pause: after this one, it was the newest message.
const PAUSE: Duration = Duration::from_millis(500);
/// Where messages keep coming without a pause, the newest one is a matter of when one looks.
const LONG_ENOUGH: Duration = Duration::from_secs(2);
/// Messages that the broker sends ahead.
const PREFETCH: u16 = 1000;

/// Finds places in streams, by reading there: the broker can't be asked.
pub struct Survey {
    session: Session,
    consumer: Consumer,
}

impl Survey {
    /// Connects, under a name that the broker's tools show.
    ///
    /// # Errors
    /// As for [`Session::open`].
    pub fn open(settings: &Settings, name: &str) -> Result<Self, Error> {
        Ok(Self {
            session: Session::open(settings, name)?,
            consumer: Consumer::new(settings, name, Vec::new(), PREFETCH),
        })
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
        let wait = self.patience(stream)?;
        self.consumer.read_from(stream, StreamOffset::First);
        self.read(1, wait)
    }

    /// The offset of the newest message; `None` if the stream is empty.
    ///
    /// # Errors
    /// [`Error::MissingQueue`], or one that [is lost](Error::is_lost).
    pub fn newest(&mut self, stream: &str) -> Result<Option<i64>, Error> {
        let wait = self.patience(stream)?;
        self.consumer.read_from(stream, StreamOffset::Last);
        let mut newest = self.read(PREFETCH.into(), wait)?;
        let until = Instant::now() + LONG_ENOUGH;
        while newest.is_some()
            && Instant::now() < until
            && let Some(offset) = self.read(PREFETCH.into(), PAUSE)?
        {
            newest = Some(offset);
        }
        Ok(newest)
    }

    /// The offset of the first message that was stored at that time or later, as exactly as the broker tells: to the second,
    /// and to the messages that were stored with it. `None` if there's none.
    ///
    /// # Errors
    /// [`Error::MissingQueue`], or one that [is lost](Error::is_lost).
    pub fn since(&mut self, stream: &str, time: DateTime<Utc>) -> Result<Option<i64>, Error> {
        let wait = self.patience(stream)?;
        self.consumer.read_from(stream, StreamOffset::Since(time));
        self.read(1, wait)
    }

    /// How long to wait for the first message.
    fn patience(&mut self, stream: &str) -> Result<Duration, Error> {
        let depths = depths(&mut self.session, &[stream.to_owned()])?;
        Ok(if depths.iter().any(|depth| depth.messages > 0) { PATIENCE } else { GLANCE })
    }

    /// The offset of the first message that comes, if `max` is one, else of the last of some.
    fn read(&mut self, max: usize, wait: Duration) -> Result<Option<i64>, Error> {
        let batch = self.consumer.next_batch(max, Duration::ZERO, wait)?;
        let offset = batch.deliveries.last().and_then(|delivery| delivery.offset);
        if offset.is_none() && !self.consumer.connected() {
            return Err(Error::lost("reading a stream", "the connection was lost"));
        }
        Ok(offset)
    }
}
