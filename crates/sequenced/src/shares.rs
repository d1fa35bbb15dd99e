//! A process's share of the shards.

use crate::{Handler, engine::Engine, lanes::Owned};
use chrono::{DateTime, Utc};
use domain::stream::{shard_queue, shard_resource};
use leases::Leases;
use std::{
    collections::{BTreeMap, BTreeSet},
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

/// What is known of the shards.
#[derive(Default)]
struct Shards {
    layout: Option<Layout>,
    until: Option<Instant>,
    /// When shards were taken from processes that had likely died.
    took_over: BTreeMap<i32, DateTime<Utc>>,
    /// Leases that are handed over as soon as nothing is under way there.
    leaving: BTreeSet<String>,
    /// The queues consumed.
    consumed: Vec<String>,
}

impl<H: Handler> Engine<H> {
    /// Keeps this process's share of the shards, until it's time to stop; then hands them over one by one, as soon as
    /// their events are through.
    pub(crate) fn share(&self, mut leases: Leases, database: &Database, queues: &Queues, interval: Duration) {
        let mut shards = Shards::default();
        let mut away = self.worker.backoff();
        while !self.stop.is_requested() {
            match self.share_once(&mut leases, &mut shards, database, queues) {
                Ok(()) => _ = away.reset(),
                Err(error) => {
                    if away.failed().1 {
                        let error = anyhow::Error::new(error);
                        log::warn!("can't renew the leases on shards, their events rest meanwhile: {error:#}");
                    }
                }
            }
            let next = Instant::now() + interval;
            while !shards.leaving.is_empty() && Instant::now() < next && !self.stop.is_requested() {
                self.hand_over(&mut leases, &mut shards.leaving);
                self.stop.wait(HANDOVER);
            }
            self.stop.wait(next.saturating_duration_since(Instant::now()));
        }

        shards.leaving = leases.held().clone();
        self.own(&shards, BTreeMap::new());
        let mut renewed = Instant::now();
        // While the database is away nothing can be handed over; the leases run out by themselves.
        let _ = leases.retire();
        loop {
            self.hand_over(&mut leases, &mut shards.leaving);
            if self.lanes().busy().is_empty() {
                break;
            }
            if renewed.elapsed() >= interval {
                let _ = leases.keep();
                renewed = Instant::now();
            }
            thread::sleep(HANDOVER);
        }
        if let Err(error) = leases.leave() {
            log::warn!("the leases on shards run out by themselves: {:#}", anyhow::Error::new(error));
        }
    }

    fn share_once(
        &self,
        leases: &mut Leases,
        shards: &mut Shards,
        database: &Database,
        queues: &Queues,
    ) -> storage::Result<()> {
        let layout = streams::layout(&mut *database.connection()?, self.stream)?;
        let resources: Vec<String> =
            (0..layout.shards.max(layout.queues)).map(|shard| shard_resource(self.stream, shard)).collect();
        let round = leases.round(&resources)?;
        let (gained, lost) = (!round.gained.is_empty(), !round.lost.is_empty());
        let taken_over: Vec<_> = round
            .gained
            .iter()
            .filter_map(|claimed| Some((self.shard(&claimed.resource)?, claimed.taken_over_at?)))
            .collect();
        let divided = shards.layout.is_some_and(|before| before.shards != layout.shards);
        if divided {
            // Whoever died may have had any key of what is a shard now.
            let latest = shards.took_over.values().max().copied();
            shards.took_over =
                latest.into_iter().flat_map(|at| (0..layout.shards).map(move |shard| (shard, at))).collect();
        }
        for claimed in &round.gained {
            if let Some(shard) = self.shard(&claimed.resource) {
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
            leases.held().difference(&shards.leaving).filter_map(|resource| self.shard(resource)).collect();
        let own = held
            .iter()
            .filter(|shard| **shard < layout.shards)
            .map(|shard| (*shard, shards.took_over.get(shard).copied()))
            .collect();
        self.own(shards, own);
        let names: Vec<String> = held.iter().map(|shard| shard_queue(self.stream, *shard)).collect();
        if names != shards.consumed {
            queues.set(names.clone());
            shards.consumed = names;
        }
        if gained || divided {
            self.sweep.give();
        }
        if gained || lost || divided || leaving > 0 {
            emit(ShardsChanged {
                stream: self.stream,
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
    fn own(&self, shards: &Shards, own: BTreeMap<i32, Option<DateTime<Utc>>>) {
        let count = shards.layout.map_or(0, |layout| layout.shards);
        let actions = self.lanes().own(Owned { shards: count, own, until: shards.until });
        self.act(actions);
    }

    /// Gives back those of the leases on whose shards nothing is under way any more.
    fn hand_over(&self, leases: &mut Leases, leaving: &mut BTreeSet<String>) {
        let busy = self.lanes().busy();
        let free: Vec<String> = leaving
            .iter()
            .filter(|resource| self.shard(resource).is_none_or(|shard| !busy.contains(&shard)))
            .cloned()
            .collect();
        if !free.is_empty() && leases.release(&free).is_ok() {
            free.iter().for_each(|resource| _ = leaving.remove(resource));
        }
    }

    fn shard(&self, resource: &str) -> Option<i32> {
        resource.strip_prefix(self.stream)?.strip_prefix('/')?.parse().ok()
    }
}
