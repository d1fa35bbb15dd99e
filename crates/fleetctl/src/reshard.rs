use crate::{Outcome, context::Context, interrupt::Interrupt, progress::Progress, stream::Stream};
use anyhow::{Context as _, bail};
use broker::{Delivery, Publisher, QueueDepth, Session};
use chrono::Utc;
use domain::{
    Envelope,
    stream::{SHARDS_MAX, shard_queue, shard_routing_key},
    topology::{Binding, Topology},
};
use std::{
    collections::HashSet,
    io::Write,
    ops::ControlFlow,
    time::{Duration, Instant},
};
use storage::{
    PgConnection, leases, resharding,
    streams::{self, Layout},
};
use uuid::Uuid;

/// Change how many shards a stream has, while it runs
///
/// Events go on being accepted and applied meanwhile, in order: shards only say which process and which queue a key has
/// just now. Taking shards away moves what is left in their queues to another one. Stopped half-way, by Ctrl-C or otherwise,
/// the same command goes on from there, and so does one with another number; with the present number it finishes what was
/// left, and takes away queues that nobody knows of.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl reshard --shards 32
  fleetctl shards show")]
pub(crate) struct Args {
    #[command(flatten)]
    of: Stream,
    /// How many shards it's to have, 1 to 256
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=i64::from(SHARDS_MAX)))]
    shards: i32,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let Args { of: Stream { stream }, shards } = args;
    let interrupt = Interrupt::catch()?;
    let database = context.patient_database()?;
    let session = Session::open(&context.broker()?, "fleetctl")?;
    let mut conn = database.connection()?;
    streams::layout(&mut conn, stream)?;
    let publisher = Publisher::new(&context.broker()?, "fleetctl");
    let lease_ttl = context.sequenced_lease_ttl()?;
    let result = resharding::alone(&mut conn, stream, |conn| {
        Resharding { stream, shards: *shards, conn, session, publisher, lease_ttl, interrupt, out }.run()
    })?;
    let Some(result) = result else {
        bail!("{stream} is being resharded by another process");
    };
    result.context("not finished; run the same command again to continue")
}

/// How long the broker may take to confirm what is moved.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(60);

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
    /// For what is moved.
    publisher: Publisher,
    /// How long the leases on shards run.
    lease_ttl: Duration,
    interrupt: Interrupt,
    out: &'a mut dyn Write,
}

impl Resharding<'_> {
    fn run(mut self) -> anyhow::Result<Outcome> {
        match self.reshard()? {
            ControlFlow::Continue(()) => Ok(Outcome::Done),
            ControlFlow::Break(Interrupted) => {
                self.say("interrupted; run the same command again to continue")?;
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
        if !old.is_empty() {
            step!(self.await_relayed(&old));
            self.unbind(&old)?;
            // From now on processes let go of them, and whoever connects declares them no more.
            step!(self.divide(self.shards));
            step!(self.await_released(&old));
            step!(self.empty(&old));
            let names: Vec<_> = old.iter().map(|shard| shard_queue(self.stream, *shard)).collect();
            let gone = broker::delete_queues(&mut self.session, &names)?;
            let with = if gone > 0 {
                format!(", with {gone} messages that had just come back into them")
            } else {
                String::new()
            };
            self.say(&format!("{} deleted{with}", queues(old.len() as i32)))?;
        }
        step!(self.divide(self.shards));
        let beyond: Vec<i32> = (self.shards..SHARDS_MAX).collect();
        leases::remove(self.conn, &names(&self.resources(&beyond)))?;
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
        let what = "waiting for transactions that are accepting events";
        step!(self.wait(what, 2 * PAUSE, |this| {
            let divided = resharding::divide_within(this.conn, this.stream, layout, PAUSE)?;
            Ok(if divided { None } else { Some("some are still open".into()) })
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

    /// The shards that there aren't to be, and whose queues are there: the broker is asked for every one that there might be,
    /// as a process that was frozen for long may have declared again what it knew.
    fn old(&mut self) -> anyhow::Result<Vec<i32>> {
        let beyond: Vec<i32> = (self.shards..SHARDS_MAX).collect();
        let there: HashSet<String> = self.looks(&beyond)?.into_iter().map(|queue| queue.name).collect();
        Ok(beyond.into_iter().filter(|shard| there.contains(&shard_queue(self.stream, *shard))).collect())
    }

    /// The queues of these shards that are there, as they look. Where a queue is too busy to answer, it looks empty and
    /// unused: nothing may rest on that.
    fn looks(&mut self, shards: &[i32]) -> anyhow::Result<Vec<QueueDepth>> {
        let queues: Vec<_> = shards.iter().map(|shard| shard_queue(self.stream, *shard)).collect();
        Ok(broker::existing(&mut self.session, &queues)?)
    }

    fn await_relayed(&mut self, old: &[i32]) -> Step<()> {
        let keys: Vec<_> = old.iter().map(|shard| shard_routing_key(*shard)).collect();
        let names: Vec<_> = old.iter().map(|shard| shard_queue(self.stream, *shard)).collect();
        step!(self.wait("waiting for the relay to bring all messages to the old queues", POLL_INTERVAL, |this| {
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

    /// Moves what is in the old queues to one that stays. Messages only wake, so it matters little which; but what isn't an
    /// event's message is set aside there as here.
    fn empty(&mut self, old: &[i32]) -> Step<()> {
        const BATCH: usize = 200;
        let (stream, mut moved) = (self.stream, 0);
        for shard in old {
            let publisher = &mut self.publisher;
            moved += broker::drain(&mut self.session, &shard_queue(stream, *shard), BATCH, |deliveries| {
                let envelopes: Vec<_> = deliveries.into_iter().map(|delivery| redirected(delivery, stream)).collect();
                let deadline = Instant::now() + CONFIRMED_WITHIN;
                publisher.publish_all(&envelopes, deadline).map_err(|error| broker::Error::Lost {
                    doing: "moving messages to another queue",
                    source: error.into(),
                })
            })?;
            if self.interrupt.is_set() {
                return Ok(ControlFlow::Break(Interrupted));
            }
        }
        let to = shard_queue(stream, 0);
        self.say(&match moved {
            0 => "they are empty".into(),
            1 => format!("they are empty: 1 message was moved to {to}"),
            _ => format!("they are empty: {moved} messages were moved to {to}"),
        })?;
        Ok(ControlFlow::Continue(()))
    }

    fn await_released(&mut self, old: &[i32]) -> Step<()> {
        let resources = self.resources(old);
        step!(self.wait("waiting for processes to let go of the old queues", POLL_INTERVAL, |this| {
            // Of a process that has died, if the clock was set back since.
            leases::shorten_leases(this.conn, this.lease_ttl, &names(&resources))?;
            let leases = leases::list(this.conn, &names(&resources))?;
            let live = leases.into_iter().filter(|lease| !lease.expired);
            if let Some((holder, resource)) = live.filter_map(|lease| Some((lease.holder?, lease.resource))).next() {
                return Ok(Some(format!("{holder} holds {resource}")));
            }
            let consumed = this.looks(old)?.into_iter().find(|queue| queue.consumers > 0);
            Ok(consumed.map(|queue| format!("{} is still being consumed", queue.name)))
        }));
        self.say("no process works on them any more")?;
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

/// The message, to the first shard's queue.
fn redirected(delivery: Delivery, stream: &str) -> Envelope {
    Envelope {
        exchange: stream.into(),
        routing_key: shard_routing_key(0),
        kind: delivery.kind,
        // Two without an id may be meant twice.
        message_id: delivery.message_id.unwrap_or_else(|| Uuid::new_v4().to_string()),
        correlation_id: delivery.correlation_id,
        headers: delivery.headers,
        created_at: delivery.timestamp.unwrap_or_else(Utc::now),
        body: delivery.body,
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
