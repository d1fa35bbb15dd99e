//! Which keys are in hand, and what is to be done about each: decisions alone, without threads, clocks or database.
//!
//! Each key in hand has a lane. It goes round `Loading -> Waiting -> Working -> Recording` for as long as the key has a
//! next event, and ends when there is none. A key that's heard of while it has a lane is *poked*: its lane looks once more
//! before it ends, so nothing that was committed meanwhile is missed.

mod suspects;
#[cfg(test)]
mod tests;

use self::suspects::{Suspects, Suspicion};
use crate::Event;
use chrono::{DateTime, Utc};
use domain::stream::{key_hash, shard};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};
use storage::streams::{Attempt, Position, State};

/// An event that has its turn in a lane.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    /// The lane; another one of the same key has another number.
    pub(crate) lane: u64,
    pub(crate) event: Event,
    /// Whether the attempt is on record, for the case that the process dies of it.
    pub(crate) on_record: bool,
}

impl Task {
    /// The attempts at the event, this one included if it's on record.
    pub(crate) fn attempt(&self) -> Attempt<'_> {
        let attempt = self.event.attempt();
        Attempt { deaths: attempt.deaths.saturating_add(u32::from(self.on_record)), ..attempt }
    }
}

/// An event in hand: its key and its place, and the attempts at it when it was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) key: Arc<str>,
    pub(crate) seq: i64,
    revision: i32,
    attempts: u32,
    deaths: u32,
    /// Whether this attempt is on record, or about to be.
    on_record: bool,
}

impl Place {
    /// The attempts at the event, this one included if it's on record.
    pub(crate) fn attempt(&self) -> Attempt<'_> {
        let Self { key, seq, revision, attempts, deaths, on_record } = self;
        let position = Position { key, seq: *seq, revision: *revision };
        Attempt { position, attempts: *attempts, deaths: deaths.saturating_add(u32::from(*on_record)) }
    }

    /// How many attempts have ended before this one, however.
    pub(crate) fn tried(&self) -> u32 {
        self.attempts.saturating_add(self.deaths)
    }
}

/// What follows from a change of the lanes.
#[derive(Debug, Default)]
pub(crate) struct Actions {
    /// To be worked on.
    pub(crate) start: Vec<Task>,
    /// To be put on record, and then worked on.
    pub(crate) begin: Vec<Task>,
    /// To be parked: their processes have died too often.
    pub(crate) park: Vec<Task>,
    /// To be loaded again.
    pub(crate) reload: Vec<Arc<str>>,
}

/// What this process may work on.
#[derive(Clone, Debug, Default)]
pub(crate) struct Owned {
    /// Shards of the stream, 0 while it isn't known.
    pub(crate) shards: i32,
    /// Its own, each with the time of a takeover from a process that has likely died: what was next then may have
    /// killed it.
    pub(crate) own: BTreeMap<i32, Option<DateTime<Utc>>>,
    /// Until when that is certain; the leases run out then.
    pub(crate) until: Option<Instant>,
}

impl Actions {
    pub(crate) fn append(&mut self, other: Self) {
        self.start.extend(other.start);
        self.begin.extend(other.begin);
        self.park.extend(other.park);
        self.reload.extend(other.reload);
    }
}

impl Owned {
    fn shard(&self, hash: i32) -> Option<i32> {
        (self.shards > 0).then(|| shard(hash, self.shards)).filter(|shard| self.own.contains_key(shard))
    }

    fn took_over_at(&self, hash: i32) -> Option<DateTime<Utc>> {
        self.shard(hash).and_then(|shard| self.own[&shard])
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Its next event is being read.
    Loading,
    /// Its next event waits for a thread, or for its turn among the suspects.
    Waiting,
    /// Its event is being put on record.
    Beginning,
    /// Its event is being worked on since then.
    Working(Instant),
    /// What became of it is being recorded.
    Recording,
}

#[derive(Debug)]
struct Lane {
    id: u64,
    hash: i32,
    phase: Phase,
    poked: bool,
    /// Whether an event has taken effect in it: what its process died of isn't ahead, then.
    proven: bool,
    /// While it counts among the suspects at large.
    suspicion: Option<Suspicion>,
    /// Which event it is at, by which revision, and how many attempts at it had failed, and how many processes died.
    at: (i64, i32, u32, u32),
    /// The key's newest event when that was read.
    head: i64,
}

/// The lanes of a process.
#[derive(Debug)]
pub(crate) struct Lanes {
    lanes: HashMap<Arc<str>, Lane>,
    owned: Owned,
    /// Lanes that work side by side.
    limit: usize,
    ids: u64,
    suspects: Suspects,
    /// A key was turned away since the last look.
    full: bool,
    /// There are events that processes have died of, or may have. Then nothing that was accepted before goes unrecorded:
    /// it might be another one, and have a suspect parked that is alone.
    wary: bool,
}

impl Lanes {
    pub(crate) fn new(limit: usize, attempts: u32) -> Self {
        let (owned, suspects) = (Owned::default(), Suspects::new(limit, attempts));
        Self { lanes: HashMap::new(), owned, limit, ids: 0, suspects, full: false, wary: false }
    }

    /// How many keys are in hand at most: enough for every lane to find its next one waiting.
    fn room(&self) -> usize {
        4 * self.limit
    }

    /// How many more keys can be taken in hand.
    pub(crate) fn free(&self) -> usize {
        self.room().saturating_sub(self.lanes.len())
    }

    /// Whether there's room for more keys. If not, whoever wants to bring some is remembered as turned away.
    pub(crate) fn has_room(&mut self) -> bool {
        let room = self.free() > 0;
        self.full |= !room;
        room
    }

    /// Whether keys were turned away, and there's room for them now.
    pub(crate) fn is_hungry(&self) -> bool {
        self.full && self.lanes.len() <= self.room() / 2
    }

    /// What this process may work on.
    pub(crate) fn owned(&self) -> &Owned {
        &self.owned
    }

    /// A sweep begins: it will find what was turned away.
    pub(crate) fn sweeping(&mut self) {
        self.full = false;
    }

    /// Takes keys in hand that have no lane yet, and returns them: they are to be loaded. Others are poked, turned away
    /// for lack of room, or none of this process's business.
    pub(crate) fn reserve<'a>(&mut self, keys: impl IntoIterator<Item = &'a str>) -> Vec<Arc<str>> {
        let mut reserved = Vec::new();
        for key in keys {
            let hash = key_hash(key);
            if let Some(lane) = self.lanes.get_mut(key) {
                lane.poked = true;
            } else if self.owned.shard(hash).is_none() {
            } else if self.free() == 0 {
                self.full = true;
            } else {
                let key: Arc<str> = key.into();
                self.ids += 1;
                let lane = Lane {
                    id: self.ids,
                    hash,
                    phase: Phase::Loading,
                    poked: false,
                    proven: false,
                    suspicion: None,
                    at: (0, 0, 0, 0),
                    head: 0,
                };
                self.lanes.insert(key.clone(), lane);
                reserved.push(key);
            }
        }
        reserved
    }

    /// The keys couldn't be loaded; the sweep will find them.
    pub(crate) fn forget(&mut self, keys: &[Arc<str>]) {
        for key in keys {
            if self.lanes.get(key).is_some_and(|lane| lane.phase == Phase::Loading) {
                self.lanes.remove(key);
            }
        }
    }

    /// The keys were loaded.
    pub(crate) fn loaded(&mut self, states: impl IntoIterator<Item = State>) -> Actions {
        let mut actions = Actions::default();
        for state in states {
            if self.lanes.get(state.key.as_str()).is_some_and(|lane| lane.phase == Phase::Loading) {
                self.go_on(state, &mut actions);
            }
        }
        self.release(&mut actions);
        actions
    }

    /// The lane of a key that stands so takes what is next, or ends.
    fn go_on(&mut self, state: State, actions: &mut Actions) {
        let key: Arc<str> = state.key.as_str().into();
        let Some(lane) = self.lanes.get_mut(&key) else { return };
        let mine = self.owned.shard(lane.hash).is_some();
        lane.head = state.head;
        let ahead = state.next.as_ref().is_some_and(|next| next.ahead);
        match Event::next(state).filter(|_| mine) {
            Some(event) => {
                // What is committed by now is seen.
                lane.poked = false;
                lane.phase = Phase::Waiting;
                lane.at = (event.seq, event.revision, event.attempts, event.deaths);
                self.wary |= event.deaths > 0;
                let took_over_at = self.owned.took_over_at(lane.hash).filter(|_| self.wary || !lane.proven);
                // One that was accepted later by the clock than it's now may have been there all the same.
                let suspect = event.deaths > 0 || took_over_at.is_some_and(|at| event.generated_at < at || ahead);
                let task = Task { lane: lane.id, event, on_record: suspect };
                if self.suspects.is_convicted(&task.event) {
                    lane.phase = Phase::Recording;
                    actions.park.push(Task { on_record: false, ..task });
                } else if suspect {
                    self.suspects.hold_back(task);
                } else {
                    actions.start.push(task);
                }
            }
            None if mine && lane.poked => {
                lane.poked = false;
                lane.phase = Phase::Loading;
                actions.reload.push(key);
            }
            None => _ = self.lanes.remove(&key),
        }
    }

    /// Lets suspects go whose turn it is.
    fn release(&mut self, actions: &mut Actions) {
        if self.suspects.is_empty() {
            return;
        }
        let owned = &self.owned;
        for task in self.suspects.take_gone(|task| owned.shard(key_hash(&task.event.key)).is_some()) {
            self.end(&task);
        }
        let at_large = self.lanes.values().filter_map(|lane| lane.suspicion);
        for (task, suspicion) in self.suspects.release(at_large) {
            if let Some(lane) = self.lane(&task) {
                lane.suspicion = Some(suspicion);
                lane.phase = Phase::Beginning;
                actions.begin.push(task);
            }
        }
    }

    fn lane(&mut self, task: &Task) -> Option<&mut Lane> {
        self.lanes.get_mut(&task.event.key).filter(|lane| lane.id == task.lane)
    }

    fn end(&mut self, task: &Task) {
        if self.lane(task).is_some() {
            self.lanes.remove(&task.event.key);
        }
    }

    /// A thread takes the task up; false if it isn't to be done here any more.
    pub(crate) fn start(&mut self, task: &Task, now: Instant) -> bool {
        let certain = self.owned.until.is_some_and(|until| now < until);
        let mine = certain && self.owned.shard(key_hash(&task.event.key)).is_some();
        let Some(lane) = self.lane(task) else { return false };
        if mine && matches!(lane.phase, Phase::Waiting | Phase::Beginning) {
            lane.phase = Phase::Working(now);
            return true;
        }
        self.end(task);
        false
    }

    /// The work is over: what became of it is to be recorded.
    pub(crate) fn worked(&mut self, task: &Task) {
        if let Some(lane) = self.lane(task) {
            lane.phase = Phase::Recording;
        }
    }

    /// It's recorded that the event has taken effect, here or elsewhere, and how the key stands now.
    pub(crate) fn applied(&mut self, recorded: impl IntoIterator<Item = (Task, State)>) -> Actions {
        let mut actions = Actions::default();
        for (task, state) in recorded {
            if let Some(lane) = self.lane(&task) {
                lane.suspicion = None;
                lane.proven = true;
                self.go_on(state, &mut actions);
            }
        }
        self.release(&mut actions);
        actions
    }

    /// Whether there is more to be read for the key when the task is done. What is committed later is told by a message.
    pub(crate) fn expects_more(&self, task: &Task) -> bool {
        self.lanes.get(&task.event.key).is_some_and(|lane| lane.poked || lane.head > task.event.seq)
    }

    /// It's recorded that the events have taken effect, which were the last of their keys: unless those were poked since.
    pub(crate) fn finished(&mut self, tasks: impl IntoIterator<Item = Task>) -> Actions {
        let mut actions = Actions::default();
        for task in tasks {
            match self.lane(&task) {
                Some(lane) if lane.poked => {
                    (lane.poked, lane.proven, lane.suspicion, lane.phase) = (false, true, None, Phase::Loading);
                    actions.reload.push(task.event.key);
                }
                _ => self.end(&task),
            }
        }
        self.release(&mut actions);
        actions
    }

    /// It's recorded that the event has failed: the sweep finds it when its time has come.
    pub(crate) fn failed<'a>(&mut self, tasks: impl IntoIterator<Item = &'a Task>) -> Actions {
        let mut actions = Actions::default();
        tasks.into_iter().for_each(|task| self.end(task));
        self.release(&mut actions);
        actions
    }

    /// Whether the event is of one of this process's shards.
    pub(crate) fn is_own(&self, task: &Task) -> bool {
        self.owned.shard(key_hash(&task.event.key)).is_some()
    }

    /// What this process may work on from now on. Lanes of other keys finish what they are working on, and end.
    pub(crate) fn own(&mut self, owned: Owned) -> Actions {
        self.owned = owned;
        let mut actions = Actions::default();
        self.release(&mut actions);
        actions
    }

    /// Shards with lanes whose work is under way or being recorded, by the present number of shards.
    pub(crate) fn busy(&self) -> BTreeSet<i32> {
        let busy = |phase| matches!(phase, Phase::Beginning | Phase::Working(_) | Phase::Recording);
        let lanes = self.lanes.values().filter(|lane| self.owned.shards > 0 && busy(lane.phase));
        lanes.map(|lane| shard(lane.hash, self.owned.shards)).collect()
    }

    /// Events that have been worked on for longer than `limit`.
    pub(crate) fn overdue(&self, limit: Duration, now: Instant) -> Vec<Place> {
        self.positions(|lane| match lane.phase {
            Phase::Working(since) => now.saturating_duration_since(since) > limit,
            _ => false,
        })
    }

    /// Events whose attempts are on record, or about to be.
    pub(crate) fn on_record(&self) -> Vec<Place> {
        self.positions(|lane| lane.suspicion.is_some())
    }

    fn positions(&self, of: impl Fn(&Lane) -> bool) -> Vec<Place> {
        let lanes = self.lanes.iter().filter(|(_, lane)| of(lane));
        let place = |(key, lane): (&Arc<str>, &Lane)| {
            let (seq, revision, attempts, deaths) = lane.at;
            Place { key: key.clone(), seq, revision, attempts, deaths, on_record: lane.suspicion.is_some() }
        };
        lanes.map(place).collect()
    }
}
