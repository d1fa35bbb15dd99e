//! Taking away what an earlier version has left.

use super::Counts;
use crate::{Outcome, context::Context, interrupt::Interrupt, progress::Progress};
use anyhow::Context as _;
use broker::Session;
use domain::topology::earlier_retry_name;
use std::{
    io::Write,
    time::{Duration, Instant},
};

/// So long a queue has to be empty: the broker counts every five seconds.
const EMPTY_FOR: Duration = Duration::from_secs(12);

const POLL: Duration = Duration::from_millis(500);

/// Deletes the queues that failed messages waited in, each when it's empty.
pub(crate) fn run(context: &Context, counts: &Counts, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    let mut session = Session::open(&context.broker()?, "fleetctl")?;
    for delay in context.retry_delays()? {
        let name = earlier_retry_name(delay);
        let names = [name.clone()];
        // By this exchange alone messages come to it.
        broker::delete_exchanges(&mut session, &names)?;
        if counts.of(&name)?.is_none() {
            continue;
        }
        if !await_empty(counts, &interrupt, &name)? {
            writeln!(out, "interrupted; run the same command again to continue")?;
            return Ok(Outcome::Interrupted);
        }
        broker::delete_queues(&mut session, &names)?;
        writeln!(out, "`{name}` was empty and is deleted")?;
        out.flush()?;
    }
    writeln!(out, "nothing is left of an earlier version")?;
    Ok(Outcome::Done)
}

/// Waits until a queue has been empty for a while, also of what is on its way elsewhere. False if a signal came first.
pub(super) fn await_empty(counts: &Counts, interrupt: &Interrupt, queue: &str) -> anyhow::Result<bool> {
    let mut progress = None;
    let mut empty_since = None;
    loop {
        let count = counts.of(queue)?.with_context(|| format!("`{queue}` has vanished"))?;
        if count.is_classic {
            return Ok(true);
        }
        if count.messages == Some(0) {
            if empty_since.get_or_insert_with(Instant::now).elapsed() >= EMPTY_FOR {
                return Ok(true);
            }
        } else {
            empty_since = None;
            let what = format!("waiting for `{queue}` to be empty");
            let left = count.messages.map_or("not counted yet".into(), |messages| format!("{messages} messages"));
            let overdue = match count.overdue {
                Some(overdue @ 1..) => {
                    format!(", {overdue} of which don't arrive where they go: is that queue gone, or full?")
                }
                _ => String::new(),
            };
            progress.get_or_insert_with(|| Progress::waiting(&what)).say(&format!("{left}{overdue}"));
        }
        interrupt.sleep_until(Instant::now() + POLL);
        if interrupt.is_set() {
            return Ok(false);
        }
    }
}
