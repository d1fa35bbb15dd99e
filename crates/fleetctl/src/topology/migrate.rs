//! Giving a queue or an exchange other arguments.

use super::{Counts, divided, prune::await_empty};
use crate::{Outcome, context::Context, interrupt::Interrupt};
use anyhow::{Context as _, bail};
use broker::{Error, Session, Settings};
use domain::topology::{Binding, Exchange, ExchangeKind, Expiry, Queue, Topology};
use std::{io::Write, time::Duration};

/// So long may nothing come from a queue that is to be deleted.
const QUIET: Duration = Duration::from_secs(1);

/// How often a queue is moved that somebody declares again as it was.
const TRIES: u32 = 5;

pub(crate) struct Migration<'a> {
    session: Session,
    broker: Settings,
    topology: Topology,
    counts: Counts,
    interrupt: Interrupt,
    out: &'a mut dyn Write,
}

impl<'a> Migration<'a> {
    pub(crate) fn new(context: &Context, counts: Counts, out: &'a mut dyn Write) -> anyhow::Result<Self> {
        let broker = context.broker()?;
        Ok(Self {
            session: Session::open(&broker, "fleetctl")?,
            broker,
            topology: context.topology()?.and(divided(context)?),
            counts,
            interrupt: Interrupt::catch()?,
            out,
        })
    }

    /// Gives what is called so the arguments that the fleet wants.
    pub(crate) fn run(mut self, name: &str, discard: bool) -> anyhow::Result<Outcome> {
        let exchange = self.topology.exchanges.iter().find(|exchange| exchange.name == name).cloned();
        let queue = self.topology.queues.iter().find(|queue| queue.name == name).cloned();
        if exchange.is_none() && queue.is_none() {
            bail!("the fleet has no queue or exchange `{name}`; `fleetctl topology show` lists them");
        }
        match queue.as_ref().filter(|queue| !matches!(queue.expiry, Expiry::Retain(_))) {
            Some(queue) => self.await_answer(queue, discard)?,
            None if discard => bail!("--discard is for a queue, and not for one of the message log"),
            None => {}
        }
        if let Some(exchange) = exchange {
            self.exchange(&exchange)?;
        }
        queue.map_or(Ok(Outcome::Done), |queue| self.queue(&queue))
    }

    /// Fails if the queue gives no answer; deletes it instead if it may be discarded.
    fn await_answer(&mut self, queue: &Queue, discard: bool) -> anyhow::Result<()> {
        let name = &queue.name;
        match broker::ask(&mut self.session, name) {
            Err(Error::TimedOut { after, .. }) if discard => {
                self.session = Session::open(&self.broker, "fleetctl")?;
                broker::delete_queues(&mut self.session, std::slice::from_ref(name))?;
                self.say(&format!("queue `{name}` gave no answer in {after:?} and is deleted"))
            }
            Err(Error::TimedOut { after, .. }) => bail!(
                "queue `{name}` gives no answer in {after:?}: it has no leader. Are all RabbitMQ nodes up? If it was \
                 declared in the second before RabbitMQ was killed, it has none for good: `fleetctl topology migrate \
                 {name} --discard` deletes it and declares it anew"
            ),
            Ok(()) if discard => {
                bail!("queue `{name}` answers: nothing is discarded; without --discard its messages are kept")
            }
            Ok(()) | Err(Error::MissingQueue { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn exchange(&mut self, exchange: &Exchange) -> anyhow::Result<()> {
        let wanted = Topology { exchanges: vec![exchange.clone()], ..Topology::default() };
        match broker::declare(&mut self.session, &wanted) {
            Ok(()) => return self.say(&format!("exchange `{}` is declared correctly", exchange.name)),
            Err(Error::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let names = [exchange.name.clone()];
        broker::delete_exchanges(&mut self.session, &names)?;
        broker::declare(&mut self.session, &wanted)?;
        // Those of its queues that are there as they must be.
        let part = self.topology.part(&[], &[exchange.name.as_str()]);
        for refused in broker::declare_each(&mut self.session, &part)? {
            self.say(&format!("not bound: {}", refused.error))?;
        }
        self.say(&format!("exchange `{}` made anew; bindings made by other programs are gone", exchange.name))
    }

    fn queue(&mut self, queue: &Queue) -> anyhow::Result<Outcome> {
        let (name, aside) = (&queue.name, format!("{}.migrating", queue.name));
        let is_aside = !broker::existing(&mut self.session, std::slice::from_ref(&aside))?.is_empty();
        match self.declare(queue) {
            Ok(()) if !is_aside => {
                self.bind(name, name)?;
                self.say(&format!("queue `{name}` is declared correctly"))?;
                return Ok(Outcome::Done);
            }
            Ok(()) => {}
            Err(Error::Conflict { .. }) if matches!(queue.expiry, Expiry::Retain(_)) => bail!(
                "`{name}` must be a stream of the message log and is another kind of queue, so its messages are \
                 none of the log's: delete it with `rabbitmqctl delete_queue {name}`, then run `fleetctl topology \
                 declare`"
            ),
            Err(Error::Conflict { .. }) => {
                if !self.set_aside(queue, &aside)? {
                    return Ok(Outcome::Interrupted);
                }
            }
            Err(error) => return Err(error.into()),
        }
        // From here on messages come to the queue again; those that were set aside follow.
        self.bind(name, name)?;
        self.unbind(name, &aside)?;
        self.lead(&aside, name)?;
        let copies = broker::move_and_delete(&mut self.session, &aside, &aside, QUIET)?;
        broker::delete_exchanges(&mut self.session, &[aside])?;
        self.say(&format!("queue `{name}` is declared correctly, with {copies} messages that were moved"))?;
        Ok(Outcome::Done)
    }

    /// Moves what is in a queue, and comes to it meanwhile, to the queue `aside`, and makes it anew. False if that was interrupted.
    fn set_aside(&mut self, queue: &Queue, aside: &str) -> anyhow::Result<bool> {
        let name = &queue.name;
        for _ in 0..TRIES {
            for depth in broker::existing(&mut self.session, std::slice::from_ref(name))? {
                if depth.consumers > 0 {
                    bail!(
                        "`{name}` has {} consumers, which would declare it again with the old arguments: stop the \
                         processes of the earlier version first",
                        depth.consumers
                    );
                }
            }
            let quorum = Queue { name: aside.into(), expiry: Expiry::Never };
            self.declare(&quorum)?;
            self.bind(name, aside)?;
            self.unbind(name, name)?;
            self.lead(aside, aside)?;
            let mut moved = broker::move_messages(&mut self.session, name, aside, QUIET)?;
            self.say(&format!("{moved} messages of `{name}` moved aside to `{aside}`"))?;
            // What has expired, or was given up, is beyond a consumer's reach until it has arrived where it goes.
            if !await_empty(&self.counts, &self.interrupt, name)? {
                return Ok(false);
            }
            moved = broker::move_and_delete(&mut self.session, name, aside, QUIET)?;
            if moved > 0 {
                self.say(&format!("{moved} more moved aside"))?;
            }
            match self.declare(queue) {
                Err(Error::Conflict { .. }) => {
                    self.say("it was declared again with the old arguments; trying once more")?;
                }
                declared => return Ok(declared.map(|()| true)?),
            }
        }
        bail!("`{name}` keeps being declared with the old arguments: stop the processes of the earlier version first")
    }

    fn declare(&mut self, queue: &Queue) -> Result<(), Error> {
        broker::declare(&mut self.session, &Topology { queues: vec![queue.clone()], ..Topology::default() })
    }

    /// What the queue of this name is bound to, with another queue in its place.
    fn bindings(&self, of: &str, queue: &str) -> Vec<Binding> {
        let bindings = self.topology.bindings.iter().filter(|binding| binding.queue == of);
        bindings.map(|binding| Binding { queue: queue.into(), ..binding.clone() }).collect()
    }

    fn bind(&mut self, of: &str, queue: &str) -> anyhow::Result<()> {
        let bindings = self.bindings(of, queue);
        let is_bound = |exchange: &&Exchange| bindings.iter().any(|binding| binding.exchange == exchange.name);
        let exchanges = self.topology.exchanges.iter().filter(is_bound).cloned().collect();
        Ok(broker::declare(&mut self.session, &Topology { exchanges, bindings, ..Topology::default() })?)
    }

    fn unbind(&mut self, of: &str, queue: &str) -> anyhow::Result<()> {
        let bindings = self.bindings(of, queue);
        Ok(broker::unbind(&mut self.session, &bindings)?)
    }

    /// Makes an exchange that leads to this queue alone, whatever the routing key is.
    fn lead(&mut self, exchange: &str, to: &str) -> anyhow::Result<()> {
        let binding = Binding { exchange: exchange.into(), queue: to.into(), routing_key: String::new() };
        broker::delete_exchanges(&mut self.session, &[exchange.to_owned()])?;
        let topology = Topology {
            exchanges: vec![Exchange { name: exchange.into(), kind: ExchangeKind::Fanout }],
            bindings: vec![binding],
            ..Topology::default()
        };
        broker::declare(&mut self.session, &topology).context("can't redirect messages")
    }

    fn say(&mut self, what: &str) -> anyhow::Result<()> {
        writeln!(self.out, "{what}")?;
        // Steps may take long: whoever reads a pipe sees each when it's done.
        Ok(self.out.flush()?)
    }
}
