use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// What is known about a publisher's or consumer's connection, for health checks and metrics on other threads.
#[derive(Clone, Debug, Default)]
pub struct Link(Arc<State>);

#[derive(Debug, Default)]
struct State {
    connected: AtomicBool,
    blocked: AtomicBool,
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
    }

    pub(crate) fn set_connected(&self, connected: bool) {
        self.0.connected.store(connected, Ordering::Relaxed);
    }

    pub(crate) fn set_blocked(&self, blocked: bool) {
        self.0.blocked.store(blocked, Ordering::Relaxed);
    }
}
