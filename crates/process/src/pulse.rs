//! Signs of life of a loop, and the watchdog that ends the process when a step of handling overruns its limit.

use std::{
    io, process,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// What sysexits.h calls a temporary failure: start me again.
const EX_TEMPFAIL: i32 = 75;

/// How much later than due a loop may show itself before it counts as stuck.
const MARGIN: Duration = Duration::from_secs(30);

/// The time since this process's first use of the clock, never 0.
fn now_ms() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    ms(START.get_or_init(Instant::now).elapsed()) + 1
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).min(u64::MAX / 4)
}

/// Whose time runs, for the log.
#[derive(Clone, Default)]
pub struct InHand {
    /// The queue that it came from.
    pub queue: Arc<str>,
    /// The message, if it's one alone.
    pub message_id: Option<String>,
    /// The request that it follows from.
    pub correlation_id: Option<String>,
}

/// The signs of life of one loop.
pub struct Pulse {
    limit: Duration,
    /// When the step of handling in hand is over its limit; 0 while there is none.
    step_ends_ms: AtomicU64,
    /// When the loop as a whole counts as stuck.
    due_ms: AtomicU64,
    in_hand: Mutex<InHand>,
}

impl Pulse {
    /// Of a loop whose steps take no longer than `limit`.
    pub fn new(limit: Duration) -> Self {
        let pulse =
            Self { limit, step_ends_ms: AtomicU64::new(0), due_ms: AtomicU64::new(0), in_hand: Mutex::default() };
        pulse.beat();
        pulse
    }

    /// The loop moves.
    pub fn beat(&self) {
        self.due_ms.store(now_ms() + ms(self.limit) + ms(MARGIN), Ordering::Relaxed);
    }

    /// The loop waits for something that has its own limit, however long.
    pub fn rest(&self) {
        self.due_ms.store(u64::MAX, Ordering::Relaxed);
    }

    /// Handling begins of this.
    pub fn begin(&self, in_hand: InHand) {
        *self.in_hand.lock().unwrap_or_else(PoisonError::into_inner) = in_hand;
        self.begin_step();
    }

    /// The next step of handling begins.
    pub fn begin_step(&self) {
        self.step_ends_ms.store(now_ms() + ms(self.limit), Ordering::Relaxed);
        self.beat();
    }

    /// Handling is over.
    pub fn end(&self) {
        self.step_ends_ms.store(0, Ordering::Relaxed);
        self.beat();
    }

    /// Whether the loop has moved in the time of its limit and 30 s more, or may rest.
    pub fn is_alive(&self) -> bool {
        now_ms() <= self.due_ms.load(Ordering::Relaxed)
    }

    fn end_process_if_overrun(&self) {
        let ends = self.step_ends_ms.load(Ordering::Relaxed);
        if ends == 0 || now_ms() <= ends {
            return;
        }
        let in_hand = self.in_hand.lock().unwrap_or_else(PoisonError::into_inner).clone();
        telemetry::emit(telemetry::TimeLimitExceeded {
            queue: &in_hand.queue,
            message_id: in_hand.message_id.as_deref(),
            correlation_id: in_hand.correlation_id.as_deref(),
            limit: self.limit,
        });
        process::exit(EX_TEMPFAIL);
    }
}

/// Ends the process as soon as a step overruns its limit: a thread can't be ended alone, and what was in hand comes
/// again as redelivered. Goes on until every pulse is gone.
///
/// # Errors
/// When no thread can be started.
pub fn guard(pulses: &[Arc<Pulse>]) -> io::Result<()> {
    let pulses: Vec<_> = pulses.iter().map(Arc::downgrade).collect();
    let watch = move || {
        loop {
            let alive: Vec<_> = pulses.iter().filter_map(Weak::upgrade).collect();
            if alive.is_empty() {
                return;
            }
            alive.iter().for_each(|pulse| pulse.end_process_if_overrun());
            drop(alive);
            thread::sleep(Duration::from_millis(100));
        }
    };
    thread::Builder::new().name("watchdog".into()).spawn(watch).map(drop)
}
