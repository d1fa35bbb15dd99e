//! Signs of life of a loop, and the watchdog that ends the process when a step of handling overruns its limit.

use std::{
    process,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// What sysexits.h calls a temporary failure: start me again.
pub(crate) const EX_TEMPFAIL: i32 = 75;

/// How much later than due a loop may show itself before it counts as stuck.
const MARGIN: Duration = Duration::from_secs(30);

/// The time since this process's first use of the clock, never 0.
fn now_ms() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    ms(START.get_or_init(Instant::now).elapsed()) + 1
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX / 4)
}

/// When one loop has to show itself next.
pub(crate) struct Pulse {
    limit: Duration,
    /// When the step of handling in hand is over its limit; 0 while there is none.
    step_ends_ms: AtomicU64,
    /// When the loop as a whole counts as stuck.
    due_ms: AtomicU64,
}

impl Pulse {
    pub(crate) fn new(limit: Duration) -> Self {
        let pulse = Self { limit, step_ends_ms: AtomicU64::new(0), due_ms: AtomicU64::new(0) };
        pulse.beat();
        pulse
    }

    /// The loop moves.
    pub(crate) fn beat(&self) {
        self.due_ms.store(now_ms() + ms(self.limit) + ms(MARGIN), Ordering::Relaxed);
    }

    /// The loop waits for something that has its own limit, however long.
    pub(crate) fn rest(&self) {
        self.due_ms.store(u64::MAX, Ordering::Relaxed);
    }

    /// A step of handling begins, or the next one.
    pub(crate) fn begin_step(&self) {
        self.step_ends_ms.store(now_ms() + ms(self.limit), Ordering::Relaxed);
        self.beat();
    }

    /// The step is over.
    pub(crate) fn end_step(&self) {
        self.step_ends_ms.store(0, Ordering::Relaxed);
        self.beat();
    }

    /// Whether the loop moves or may rest.
    pub(crate) fn is_alive(&self) -> bool {
        now_ms() <= self.due_ms.load(Ordering::Relaxed)
    }

    fn is_overrun(&self) -> bool {
        let ends = self.step_ends_ms.load(Ordering::Relaxed);
        ends != 0 && ends < now_ms()
    }
}

/// Ends the process as soon as a step overruns its limit: a thread can't be ended alone, and the message's attempt is
/// on record once it's redelivered. Runs until every pulse is gone.
pub(crate) fn guard(pulses: &[Arc<Pulse>]) -> std::io::Result<()> {
    let pulses: Vec<_> = pulses.iter().map(Arc::downgrade).collect();
    let watch = move || {
        loop {
            let alive: Vec<_> = pulses.iter().filter_map(std::sync::Weak::upgrade).collect();
            if alive.is_empty() {
                return;
            }
            for pulse in alive {
                if pulse.is_overrun() {
                    log::error!("a step ran past its limit of {:?}: ending the process", pulse.limit);
                    process::exit(EX_TEMPFAIL);
                }
            }
            thread::sleep(Duration::from_millis(100));
        }
    };
    thread::Builder::new().name("watchdog".into()).spawn(watch).map(drop)
}
