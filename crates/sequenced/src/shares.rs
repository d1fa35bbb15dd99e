//! A process's share of the shards.

use crate::{engine::Engine, lanes::Owned, signal::Signal};
use chrono::{DateTime, Utc};
use domain::stream::{shard_queue, shard_resource};
use leases::Leases;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use storage::{
    Database,
    streams::{self, Layout},
};
use telemetry::{ShardsChanged, emit};
use worker::Queues;

/// How often a stopping process looks whether shards can be handed over.
const HANDOVER: Duration = Duration::from_millis(20);

/// Keeps this process's share of the shards.
pub(crate) struct Sharer<D> {
    pub(crate) engine: Arc<Engine<D>>,
    pub(crate) leases: Leases,
    /// For what the leases need.
    pub(crate) database: Database,
    /// To be those of the shards that it has.
    pub(crate) queues: Queues,
    pub(crate) settings: worker::Settings,
    /// Given when there are other shards to be swept.
    pub(crate) sweep: Arc<Signal>,
    pub(crate) shards: Shards,
}

/// What is known of the shards.
#[derive(Default)]
pub(crate) struct Shards {
    layout: Option<Layout>,
    until: Option<Instant>,
    /// When shards were taken from processes that had likely died.
    took_over: BTreeMap<i32, DateTime<Utc>>,
    /// Leases that are handed over as soon as nothing is under way there.
    leaving: BTreeSet<String>,
    /// The queues consumed.
    consumed: Vec<String>,
}

impl<D> Sharer<D> {
    /// Keeps the share until it's time to stop; then hands the shards over one by one, as soon as their events are through.
    pub(crate) fn run(mut self, interval: Duration) {
        let mut away = self.settings.backoff();
        while !self.engine.stop.is_requested() {
            match self.round() {
                Ok(()) => _ = away.reset(),
                Err(error) => {
                    if away.failed().1 {
                        let error = anyhow::Error::new(error);
                        log::warn!("can't renew the leases on shards; their events pause: {error:#}");
                    }
                }
            }
            let next = Instant::now() + interval;
            while !self.shards.leaving.is_empty() && Instant::now() < next && !self.engine.stop.is_requested() {
                self.hand_over();
                self.engine.stop.wait(HANDOVER);
            }
            self.engine.stop.wait(next.saturating_duration_since(Instant::now()));
        }

        self.shards.leaving = self.leases.held().clone();
        self.own(BTreeMap::new());
        let mut renewed = Instant::now();
        // While the database is away nothing can be handed over; the leases run out by themselves.
        let _ = self.leases.retire();
        loop {
            self.hand_over();
            if self.engine.lanes.lock().busy().is_empty() {
                break;
            }
            if renewed.elapsed() >= interval {
                let _ = self.leases.keep();
                renewed = Instant::now();
            }
            thread::sleep(HANDOVER);
        }
        if let Err(error) = self.leases.leave() {
            log::warn!("could not release the leases on shards, which will expire: {:#}", anyhow::Error::new(error));
        }
    }

    fn round(&mut self) -> storage::Result<()> {
        let (stream, shards) = (self.engine.stream, &mut self.shards);
        let shard = |resource: &str| shard_of(stream, resource);
        let layout = streams::layout(&mut *self.database.connection()?, stream)?;
        let resources: Vec<String> =
            (0..layout.shards.max(layout.queues)).map(|shard| shard_resource(stream, shard)).collect();
        let round = self.leases.round(&resources)?;
        let (gained, lost) = (!round.gained.is_empty(), !round.lost.is_empty());
        let taken_over: Vec<_> = round
            .gained
            .iter()
            .filter_map(|claimed| Some((shard(&claimed.resource)?, claimed.taken_over_at?)))
            .collect();
        let divided = shards.layout.is_some_and(|before| before.shards != layout.shards);
        if divided {
            // Whoever died may have had any key of what is a shard now.
            let latest = shards.took_over.values().max().copied();
            shards.took_over =
                latest.into_iter().flat_map(|at| (0..layout.shards).map(move |shard| (shard, at))).collect();
        }
        for claimed in &round.gained {
            if let Some(shard) = shard(&claimed.resource) {
                shards.took_over.remove(&shard);
            }
        }
        shards.took_over.extend(taken_over.iter().copied());
        let surplus: BTreeSet<String> = round.surplus.into_iter().collect();
        let leaving = surplus.difference(&shards.leaving).count();
        shards.leaving = surplus;
        shards.until = Some(round.until);
        shards.layout = Some(layout);

        let held: BTreeSet<i32> =
            self.leases.held().difference(&shards.leaving).filter_map(|resource| shard(resource)).collect();
        let own = held
            .iter()
            .filter(|shard| **shard < layout.shards)
            .map(|shard| (*shard, shards.took_over.get(shard).copied()))
            .collect();
        self.own(own);
        let names: Vec<String> = held.iter().map(|shard| shard_queue(stream, *shard)).collect();
        if names != self.shards.consumed {
            self.queues.set(names.clone());
            self.shards.consumed = names;
        }
        if gained || divided {
            self.sweep.give();
        }
        if gained || lost || divided || leaving > 0 {
            emit(ShardsChanged {
                stream,
                held: held.len() as u64,
                taken: (round.gained.len() - taken_over.len()) as u64,
                taken_over: taken_over.len() as u64,
                given_up: (round.lost.len() + leaving) as u64,
                members: round.members as u64,
            });
        }
        Ok(())
    }

    /// Tells the lanes what is this process's own.
    fn own(&self, own: BTreeMap<i32, Option<DateTime<Utc>>>) {
        let count = self.shards.layout.map_or(0, |layout| layout.shards);
        self.engine.change(|lanes| lanes.own(Owned { shards: count, own, until: self.shards.until }));
    }

    /// Gives back those of the leases on whose shards nothing is under way any more.
    fn hand_over(&mut self) {
        let (stream, leaving) = (self.engine.stream, &mut self.shards.leaving);
        let busy = self.engine.lanes.lock().busy();
        let free: Vec<String> = leaving
            .iter()
            .filter(|resource| shard_of(stream, resource).is_none_or(|shard| !busy.contains(&shard)))
            .cloned()
            .collect();
        if !free.is_empty() && self.leases.release(&free).is_ok() {
            free.iter().for_each(|resource| _ = leaving.remove(resource));
        }
    }
}

/// The shard of the stream by whose name this is leased.
fn shard_of(stream: &str, resource: &str) -> Option<i32> {
    resource.strip_prefix(stream)?.strip_prefix('/')?.parse().ok()
}
