//! Awaiting conditions.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Awaits that `probe` answers something, for a minute: a bound against hanging, generous enough for a busy machine.
///
/// # Panics
/// When it didn't; says what was awaited.
#[track_caller]
pub fn eventually<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    eventually_within(Duration::from_secs(60), what, probe)
}

/// Awaits that `probe` answers something within `limit`.
///
/// # Panics
/// When it didn't; says what was awaited.
#[track_caller]
pub fn eventually_within<T>(limit: Duration, what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(Instant::now() < end, "timed out after {limit:?}: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}
