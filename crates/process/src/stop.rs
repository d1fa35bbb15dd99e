//! Stopping when asked to.

use anyhow::Context as _;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    iterator::Signals,
    low_level::signal_name,
};
use std::{
    process,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::Duration,
};

/// A request to stop, shared by all who can make it or heed it.
#[derive(Clone, Default)]
pub struct Stop(Arc<Inner>);

#[derive(Default)]
struct Inner {
    requested: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    /// Not requested yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Requested by SIGTERM or SIGINT. The process then has the time of `grace` to return from its main function; when
    /// that is over it ends all the same, and what was in hand is handed out again. A second signal ends it at once.
    ///
    /// # Errors
    /// When the signals can't be caught.
    pub fn on_signals(grace: Duration) -> anyhow::Result<Self> {
        let stop = Self::new();
        let mut signals = Signals::new([SIGTERM, SIGINT]).context("can't catch SIGTERM and SIGINT")?;
        let requested = stop.clone();
        let watch = move || {
            for signal in signals.forever() {
                let name = signal_name(signal).unwrap_or("a signal");
                if requested.is_requested() {
                    log::warn!("{name} again: exiting immediately");
                    process::exit(128 + signal);
                }
                log::info!("{name}: stopping after the work in hand");
                requested.request();
                thread::spawn(move || {
                    thread::sleep(grace);
                    log::warn!("the work in hand isn't finished after {grace:?}; exiting, it will be redelivered");
                    telemetry::flush();
                    process::exit(0);
                });
            }
        };
        thread::Builder::new().name("signals".into()).spawn(watch).context("can't start a thread")?;
        Ok(stop)
    }

    /// Asks everybody who has this to stop.
    pub fn request(&self) {
        *self.0.requested.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.0.changed.notify_all();
    }

    /// Whether to stop.
    pub fn is_requested(&self) -> bool {
        *self.0.requested.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it's time to stop, but not longer than `limit`; says whether to stop.
    pub fn wait(&self, limit: Duration) -> bool {
        let requested = self.0.requested.lock().unwrap_or_else(PoisonError::into_inner);
        let (requested, _) = self
            .0
            .changed
            .wait_timeout_while(requested, limit, |requested| !*requested)
            .unwrap_or_else(PoisonError::into_inner);
        *requested
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_request_ends_every_wait() {
        let stop = Stop::new();
        assert!(!stop.wait(Duration::ZERO) && !stop.is_requested());
        let waiting = stop.clone();
        let begin = Instant::now();
        let waiter = thread::spawn(move || waiting.wait(Duration::from_secs(60)));
        stop.request();
        assert!(waiter.join().unwrap() && stop.is_requested());
        assert!(begin.elapsed() < Duration::from_secs(30));
    }
}
