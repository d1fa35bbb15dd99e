use std::{
    mem,
    sync::Arc,
    time::{Duration, Instant},
};

use amiquip::{Auth, Connection, ConnectionOptions, ConnectionTuning};
use mio::net::TcpStream;

use crate::{
    Error, Settings,
    address::Address,
    error::ThreadGone,
    link::Alarm,
    watchdog::Watchdog,
    wire::{Handshake, Wire},
};

/// One connection to the broker. No call on it lasts longer than the settings say, whatever the broker does; dropping
/// it never waits for the broker.
pub struct Session {
    /// Present until the session ends.
    connection: Option<Connection>,
    alarm: Arc<Alarm>,
    watchdog: Arc<Watchdog>,
    limit: Duration,
}

impl Session {
    /// Connects, under a name that the broker's tools show.
    ///
    /// # Errors
    /// [`Error::Url`], [`Error::NoHeartbeat`], or one that [is lost](Error::is_lost).
    pub fn open(settings: &Settings, name: &str) -> Result<Self, Error> {
        const OPENING: &str = "opening the connection";
        let limit = Duration::from_millis(settings.connect_timeout_ms);
        let deadline = Instant::now() + limit;
        let address = Address::parse(&settings.url)?;
        let socket = address.connect(limit)?;

        let lost = |error| Error::lost(OPENING, error);
        let watchdog = Watchdog::start(socket.try_clone().map_err(lost)?).map_err(lost)?;
        // From here on `drop` ends the watchdog.
        let mut session = Self {
            connection: None,
            alarm: Arc::new(Alarm::new(crossbeam_channel::never())),
            watchdog,
            limit: Duration::from_millis(settings.confirm_timeout_ms),
        };

        let left = deadline.saturating_duration_since(Instant::now());
        let handshake = Arc::<Handshake>::default();
        let wire = Wire::new(TcpStream::from_stream(socket).map_err(lost)?, name, Arc::clone(&handshake));
        let options = ConnectionOptions::default()
            .auth(Auth::Plain { username: address.user, password: address.password })
            .virtual_host(address.vhost)
            .heartbeat(settings.heartbeat_s)
            .connection_timeout(Some(left));
        // The window bounds what waits to be written, not the client's own mark, which bounds nothing.
        let tuning = ConnectionTuning::default().mem_channel_bound(256);
        let watchdog = Arc::clone(&session.watchdog);
        let opened = watchdog.bounded(OPENING, left, || Connection::insecure_open_stream(wire, options, tuning));
        let connection = session.connection.insert(opened.map_err(|error| {
            match (handshake.login.get(), handshake.heartbeat_s.get()) {
                // A broker answers a wrong login by cutting the connection, three seconds later.
                (Some(()), None) => Error::lost(
                    OPENING,
                    "the broker didn't answer the login: wrong user or password, or it is starting, stopping or frozen",
                ),
                _ => error,
            }
        })?);
        let notifications = watchdog.bounded(OPENING, left, || connection.listen_for_connection_blocked())?;
        session.alarm = Arc::new(Alarm::new(notifications));
        match handshake.heartbeat_s.get() {
            Some(1..) => Ok(session),
            _ => Err(Error::NoHeartbeat),
        }
    }

    /// Whether the broker accepts no messages on this connection for now, because it lacks memory or disk.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.blocked_for().is_some()
    }

    /// Why the broker accepts no messages, if it doesn't.
    pub(crate) fn blocked_for(&self) -> Option<String> {
        self.alarm.read();
        self.alarm.reason()
    }

    /// Whether the connection isn't known to be lost.
    pub(crate) fn is_alive(&self) -> bool {
        self.alarm.read()
    }

    /// What tells whether the broker accepts messages.
    pub(crate) fn alarm(&self) -> &Arc<Alarm> {
        &self.alarm
    }

    /// Cuts the connection at once. Every call that waits on it returns.
    pub fn abort(&self) {
        self.watchdog.abort();
    }

    /// Says goodbye to the broker, and cuts the connection if that isn't answered by `deadline`.
    pub fn close(mut self, deadline: Instant) {
        if let Some(connection) = self.connection.take() {
            let left = deadline.saturating_duration_since(Instant::now());
            // Whatever happens, the connection has ended.
            let _ = self.watchdog.bounded("closing the connection", left, || connection.close());
        }
    }

    /// Ends a session on which a call has failed, and says why: what the call reports may only be that the client's
    /// thread has gone.
    pub(crate) fn post_mortem(mut self, error: Error) -> Error {
        self.abort();
        let Error::Lost { doing, source } = &error else { return error };
        match self.connection.take().map(Connection::close) {
            Some(Err(cause)) if source.is::<ThreadGone>() => Error::from_client(doing, cause),
            _ => error,
        }
    }

    /// How long a call may take.
    pub(crate) fn limit(&self) -> Duration {
        self.limit
    }

    /// A new channel.
    pub(crate) fn channel(&mut self) -> Result<Channel, Error> {
        const OPENING: &str = "opening a channel";
        let Some(connection) = &mut self.connection else { return Err(Error::lost(OPENING, "the session has ended")) };
        let raw = self.watchdog.bounded(OPENING, self.limit, || connection.open_channel(None))?;
        Ok(Channel { raw: Some(raw), watchdog: Arc::clone(&self.watchdog), limit: self.limit })
    }

    /// Does something on a channel of its own, which a refusal closes.
    pub(crate) fn on_channel<T>(&mut self, work: impl FnOnce(&Channel) -> Result<T, Error>) -> Result<T, Error> {
        let channel = self.channel()?;
        let result = work(&channel);
        channel.close(Instant::now() + self.limit);
        result
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.abort();
        drop(self.connection.take());
        self.watchdog.end();
    }
}

/// A channel whose calls end in time. Dropping it cuts the connection, so that the drop can't wait for the broker.
pub(crate) struct Channel {
    /// Present until the channel ends.
    raw: Option<amiquip::Channel>,
    watchdog: Arc<Watchdog>,
    limit: Duration,
}

impl Channel {
    /// Runs a call, and cuts the connection if it doesn't end in time.
    pub(crate) fn call<T>(
        &self,
        doing: &'static str,
        call: impl FnOnce(&amiquip::Channel) -> amiquip::Result<T>,
    ) -> Result<T, Error> {
        let raw = self.raw.as_ref().expect("only `close` and `drop` take it");
        self.watchdog.bounded(doing, self.limit, || call(raw))
    }

    /// Why the channel has stopped handing out what was listened for.
    pub(crate) fn failure(&self, doing: &'static str) -> Error {
        match self.call(doing, amiquip::Channel::listen_for_returns) {
            Ok(_) => Error::lost(doing, "the channel fell silent"),
            Err(error) => error,
        }
    }

    /// Sends what is left to be sent and closes, or cuts the connection if that isn't over by `deadline`.
    pub(crate) fn close(mut self, deadline: Instant) {
        if let Some(raw) = self.raw.take() {
            let left = deadline.saturating_duration_since(Instant::now());
            // Whatever happens, the channel has ended.
            let _ = self.watchdog.bounded("closing the channel", left, || raw.close());
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if let Some(raw) = mem::take(&mut self.raw) {
            self.watchdog.abort();
            drop(raw);
        }
    }
}
