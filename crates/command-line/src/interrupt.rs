//! Stopping between two steps, so that what was done can be told.

use anyhow::Context as _;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Whether SIGINT or SIGTERM has come; a second one ends the process at once.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

/// The error of whatever was interrupted.
#[derive(Debug)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

impl Interrupt {
    /// From now on the signals only set this.
    ///
    /// # Errors
    /// When they can't be caught.
    pub fn catch() -> anyhow::Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds the flag unset, and sets it.
            flag::register_conditional_shutdown(signal, 128 + signal, interrupt.0.clone())
                .and_then(|_| flag::register(signal, interrupt.0.clone()))
                .context("can't catch SIGINT and SIGTERM")?;
        }
        Ok(interrupt)
    }

    /// Whether one has come.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// # Errors
    /// [`Interrupted`] once a signal has come.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.is_set() { Err(Interrupted.into()) } else { Ok(()) }
    }

    /// Sleeps for as long as that, if no signal comes meanwhile.
    ///
    /// # Errors
    /// [`Interrupted`] once a signal has come.
    pub fn sleep(&self, time: Duration) -> anyhow::Result<()> {
        self.sleep_until(Instant::now() + time);
        self.check()
    }

    /// Sleeps until `time`, or until a signal comes.
    pub fn sleep_until(&self, time: Instant) {
        const GLANCE: Duration = Duration::from_millis(20);
        while !self.is_set() {
            match time.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => thread::sleep(left.min(GLANCE)),
                _ => return,
            }
        }
    }
}
