use std::{thread, time::Instant};

use telemetry::{BrokerBlocked, BrokerConnected, BrokerLost, BrokerUnblocked, emit};

use crate::{Error, Link, Session, Settings, backoff::Backoff};

type Hook = Box<dyn FnMut(&mut Session) -> Result<(), Error> + Send>;

/// Opens the sessions of a publisher or consumer, one after another, and tells telemetry.
pub(crate) struct Connector {
    pub(crate) settings: Settings,
    name: String,
    purpose: &'static str,
    hook: Option<Hook>,
    link: Link,
    /// Whether the broker was found to accept no messages.
    blocked: bool,
    /// Whether there has been a session.
    again: bool,
    backoff: Backoff,
    /// When to try again, after a failure.
    retry_at: Option<Instant>,
}

impl Connector {
    pub(crate) fn new(settings: &Settings, name: &str, purpose: &'static str) -> Self {
        Self {
            settings: settings.clone(),
            name: name.into(),
            purpose,
            hook: None,
            link: Link::default(),
            blocked: false,
            again: false,
            backoff: Backoff::new(),
            retry_at: None,
        }
    }

    pub(crate) fn on_connect(&mut self, hook: impl FnMut(&mut Session) -> Result<(), Error> + Send + 'static) {
        self.hook = Some(Box::new(hook));
    }

    pub(crate) fn link(&self) -> &Link {
        &self.link
    }

    /// Waits until it's time to connect. False if `until` comes first.
    pub(crate) fn wait(&self, until: Instant) -> bool {
        let Some(retry_at) = self.retry_at else { return true };
        thread::sleep(retry_at.min(until).saturating_duration_since(Instant::now()));
        retry_at <= until
    }

    /// Opens a session, runs the hook, and sets up what the session is for.
    pub(crate) fn connect<T>(
        &mut self,
        set_up: impl FnOnce(&mut Session) -> Result<T, Error>,
    ) -> Result<(Session, T), Error> {
        let mut session = Session::open(&self.settings, &self.name)?;
        match self.prepare(&mut session).and_then(|()| set_up(&mut session)) {
            Ok(made) => {
                emit(BrokerConnected { purpose: self.purpose, again: self.again });
                self.again = true;
                self.link.watch(Some(session.alarm().clone()));
                self.link.set_connected(true);
                self.link.set_held_up(None);
                Ok((session, made))
            }
            Err(error) => Err(session.post_mortem(error)),
        }
    }

    /// Runs the hook.
    pub(crate) fn prepare(&mut self, session: &mut Session) -> Result<(), Error> {
        self.hook.as_mut().map_or(Ok(()), |hook| hook(session))
    }

    /// Notes that the session has done its work for a while: the next failure is a new one.
    pub(crate) fn steady(&mut self) {
        self.backoff.reset();
    }

    /// Notes that there's no session, and sets the time of the next attempt.
    pub(crate) fn lost(&mut self, error: &Error) {
        let wait = self.backoff.wait();
        self.retry_at = Some(Instant::now() + wait);
        emit(BrokerLost { purpose: self.purpose, error: &error.chain(), retry_in: wait });
        self.link.set_connected(false);
        self.link.set_blocked(false);
        self.link.watch(None);
        self.blocked = false;
        self.link.set_held_up((!error.is_lost()).then(|| error.chain()));
    }

    /// Notes whether the broker accepts messages. True if that has changed.
    pub(crate) fn blocked(&mut self, reason: Option<&str>) -> bool {
        let changed = self.blocked != reason.is_some();
        if changed {
            self.blocked = reason.is_some();
            match reason {
                Some(reason) => emit(BrokerBlocked { reason }),
                None => emit(BrokerUnblocked),
            }
            self.link.set_blocked(reason.is_some());
        }
        changed
    }
}

impl Drop for Connector {
    fn drop(&mut self) {
        self.link.set_connected(false);
        self.link.set_blocked(false);
        self.link.watch(None);
    }
}
