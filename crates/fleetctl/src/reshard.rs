use crate::{Outcome, context::Context, interrupt::Interrupt, progress::Progress};
use anyhow::{Context as _, bail};
use broker::{QueueDepth, Session};
use domain::{
    stream::{SHARDS_MAX, shard_queue, shard_routing_key},
    topology::{Binding, Topology},
};
use std::{
    io::Write,
    ops::ControlFlow,
    time::{Duration, Instant},
};
use storage::{
    PgConnection, leases, resharding,
    streams::{self, Layout},
};

/// Change how many shards a stream has, while it runs
///
/// Events go on being accepted and applied meanwhile, in order: shards only say which process and which queue a key has
/// just now. Taking shards away empties their queues first, for which processes that work on the stream have to run.
/// Stopped half-way, by Ctrl-C or otherwise, the same command goes on from there, and so does one with another number;
/// with the present number it finishes what was left.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl reshard account_event --shards 32
  fleetctl shards show account_event")]
pub(crate) struct Args {
    /// The stream
    stream: String,
    /// How many shards it's to have, 1 to 256
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=i64::from(SHARDS_MAX)))]
    shards: i32,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    let database = context.patient_database()?;
    let session = Session::open(&context.broker()?, "fleetctl")?;
    let mut conn = database.connection()?;
    streams::layout(&mut conn, &args.stream)?;
    let result = resharding::alone(&mut conn, &args.stream, |conn| {
        Resharding { stream: &args.stream, shards: args.shards, conn, session, interrupt, out }.run()
    })?;
    let Some(result) = result else {
        bail!("{} is being resharded by somebody else just now", args.stream);
    };
    result.context("not finished; the same command goes on from here")
}

const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A signal has come.
struct Interrupted;

/// What a step ends with.
type Step<T> = anyhow::Result<ControlFlow<Interrupted, T>>;

/// Goes on with what a step answers, unless a signal has come.
macro_rules! step {
    ($step:expr) => {
        match $step? {
            ControlFlow::Continue(value) => value,
            ControlFlow::Break(Interrupted) => return Ok(ControlFlow::Break(Interrupted)),
        }
    };
}

struct Resharding<'a> {
    stream: &'a str,
    /// How many there are to be.
    shards: i32,
    /// Holds the lock: everything is done by this connection, and nothing any more if it's lost.
    conn: &'a mut PgConnection,
    session: Session,
    interrupt: Interrupt,
    out: &'a mut dyn Write,
}

impl Resharding<'_> {
    fn run(mut self) -> anyhow::Result<Outcome> {
        match self.reshard()? {
            ControlFlow::Continue(()) => Ok(Outcome::Done),
            ControlFlow::Break(Interrupted) => {
                self.say("interrupted; the same command goes on from here")?;
                Ok(Outcome::Interrupted)
            }
        }
    }

    fn reshard(&mut self) -> Step<()> {
        let before = streams::layout(self.conn, self.stream)?;
        self.say(&format!("{} in {}, to be {}", shards(before.shards), queues(before.queues), self.shards))?;
        let count = before.queues.max(self.shards);
        // A queue's lease has a row as long as the queue may be there, whatever becomes of this process.
        leases::announce(self.conn, &names(&(0..count).map(|shard| self.resource(shard)).collect::<Vec<_>>()))?;
        // The queues are there before anything is routed to them.
        broker::declare(&mut self.session, &Topology::stream(self.stream, count))?;
        self.say(&format!("{} declared and bound", queues(count)))?;
        step!(self.divide(count));
        let old = self.old()?;
        if !self.depths(&old)?.is_empty() {
            step!(self.await_relayed(&old));
            self.unbind(&old)?;
            loop {
                step!(self.await_empty(&old));
                // From now on processes let go of them, and whoever connects declares them no more.
                step!(self.divide(self.shards));
                step!(self.await_released(&old));
                // What a process had in hand without having acknowledged it is back in its queue.
                if self.depths(&old)?.iter().all(|queue| queue.messages == 0) {
                    break;
                }
                self.say("messages have come back into them")?;
            }
            let names: Vec<_> = old.iter().map(|shard| shard_queue(self.stream, *shard)).collect();
            broker::delete_queues(&mut self.session, &names)?;
            self.say(&format!("{} deleted", queues(old.len() as i32)))?;
        }
        step!(self.divide(self.shards));
        leases::remove(self.conn, &names(&self.resources(&old)))?;
        self.say(&format!("{} in {}", shards(self.shards), queues(self.shards)))?;
        Ok(ControlFlow::Continue(()))
    }

    /// Routes by the new shards from now on, and keeps so many queues.
    fn divide(&mut self, queues: i32) -> Step<()> {
        /// So long at most does everybody else wait who wants to append.
        const PAUSE: Duration = Duration::from_millis(500);
        let layout = Layout { shards: self.shards, queues };
        if streams::layout(self.conn, self.stream)? == layout {
            return Ok(ControlFlow::Continue(()));
        }
        let what = "waiting until those are done who have begun to accept events";
        step!(self.wait(what, 2 * PAUSE, |this| {
            let divided = resharding::divide_within(this.conn, this.stream, layout, PAUSE)?;
            Ok(if divided { None } else { Some("some aren't yet".into()) })
        }));
        self.say(&format!("events go by {} from now on; queues that are worked on: {queues}", shards(self.shards)))?;
        Ok(ControlFlow::Continue(()))
    }

    fn resource(&self, shard: i32) -> String {
        domain::stream::shard_resource(self.stream, shard)
    }

    fn resources(&self, shards: &[i32]) -> Vec<String> {
        shards.iter().map(|shard| self.resource(*shard)).collect()
    }

    /// The shards that there aren't to be, and whose queues may be there.
    fn old(&mut self) -> anyhow::Result<Vec<i32>> {
        let beyond: Vec<i32> = (self.shards..SHARDS_MAX).collect();
        let leases = leases::list(self.conn, &names(&self.resources(&beyond)))?;
        let announced = |shard: &i32| leases.iter().any(|lease| lease.resource == self.resource(*shard));
        Ok(beyond.into_iter().filter(announced).collect())
    }

    /// How full the queues of these shards are, as far as they are there.
    fn depths(&mut self, shards: &[i32]) -> anyhow::Result<Vec<QueueDepth>> {
        let queues: Vec<_> = shards.iter().map(|shard| shard_queue(self.stream, *shard)).collect();
        Ok(broker::existing(&mut self.session, &queues)?)
    }

    fn await_relayed(&mut self, old: &[i32]) -> Step<()> {
        let keys: Vec<_> = old.iter().map(|shard| shard_routing_key(*shard)).collect();
        let names: Vec<_> = old.iter().map(|shard| shard_queue(self.stream, *shard)).collect();
        step!(self.wait("waiting until the relay has brought all messages to the old queues", POLL_INTERVAL, |this| {
            let left = resharding::unrelayed(this.conn, this.stream, &keys, &names)?;
            Ok((left > 0).then(|| format!("{left} are left")))
        }));
        self.say("no message is on its way to the old queues")?;
        Ok(ControlFlow::Continue(()))
    }

    fn unbind(&mut self, old: &[i32]) -> anyhow::Result<()> {
        let binding = |shard: &i32| Binding {
            exchange: self.stream.into(),
            queue: shard_queue(self.stream, *shard),
            routing_key: shard_routing_key(*shard),
        };
        let bindings: Vec<_> = old.iter().map(binding).collect();
        broker::unbind(&mut self.session, &bindings)?;
        let names: Vec<_> = bindings.into_iter().map(|binding| binding.queue).collect();
        self.say(&format!("{} unbound: {}", queues(old.len() as i32), names.join(" ")))
    }

    fn await_empty(&mut self, old: &[i32]) -> Step<()> {
        // Processes work on as many queues as the row says.
        let full = self.depths(old)?.into_iter().filter(|queue| queue.messages > 0);
        let full: Vec<_> = full.map(|queue| queue.name).collect();
        let last = old.iter().rfind(|shard| full.contains(&shard_queue(self.stream, **shard)));
        if let Some(last) = last
            && streams::layout(self.conn, self.stream)?.queues <= *last
        {
            step!(self.divide(last + 1));
        }
        step!(self.wait("waiting until processes have emptied the old queues", POLL_INTERVAL, |this| {
            let depths = this.depths(old)?;
            let full: Vec<_> = depths.into_iter().filter(|queue| queue.messages > 0).collect();
            let messages: u64 = full.iter().map(|queue| u64::from(queue.messages)).sum();
            let hint =
                if full.iter().any(|queue| queue.consumers == 0) { "; nobody works on some of them" } else { "" };
            Ok((!full.is_empty()).then(|| format!("{messages} messages in {}{hint}", queues(full.len() as i32))))
        }));
        self.say("they are empty")?;
        Ok(ControlFlow::Continue(()))
    }

    fn await_released(&mut self, old: &[i32]) -> Step<()> {
        let resources = self.resources(old);
        step!(self.wait("waiting until processes have let go of the old queues", POLL_INTERVAL, |this| {
            let leases = leases::list(this.conn, &names(&resources))?;
            let live = leases.into_iter().filter(|lease| !lease.expired);
            if let Some((holder, resource)) = live.filter_map(|lease| Some((lease.holder?, lease.resource))).next() {
                return Ok(Some(format!("{holder} holds {resource}")));
            }
            let consumed = this.depths(old)?.into_iter().find(|queue| queue.consumers > 0);
            Ok(consumed.map(|queue| format!("{} is still being consumed", queue.name)))
        }));
        self.say("nobody works on them any more")?;
        Ok(ControlFlow::Continue(()))
    }

    /// Waits until `look` finds nothing left to be waited for.
    fn wait(
        &mut self,
        what: &str,
        interval: Duration,
        mut look: impl FnMut(&mut Self) -> anyhow::Result<Option<String>>,
    ) -> Step<()> {
        let mut progress = None;
        while let Some(left) = look(self)? {
            progress.get_or_insert_with(|| Progress::waiting(what)).say(&left);
            self.interrupt.sleep_until(Instant::now() + interval);
            if self.interrupt.is_set() {
                return Ok(ControlFlow::Break(Interrupted));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn say(&mut self, what: &str) -> anyhow::Result<()> {
        writeln!(self.out, "{}: {what}", self.stream)?;
        // Steps may take long: whoever reads a pipe sees each when it's done.
        self.out.flush()?;
        Ok(())
    }
}

fn names(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

fn shards(count: i32) -> String {
    format!("{count} shard{}", if count == 1 { "" } else { "s" })
}

fn queues(count: i32) -> String {
    format!("{count} queue{}", if count == 1 { "" } else { "s" })
}
