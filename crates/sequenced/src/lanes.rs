//! Which keys are in hand, and what is to be done about each: decisions alone, without threads, clocks or database.
//!
//! Each key in hand has a lane. It goes round `Loading -> Waiting -> Working -> Recording` for as long as the key has a
//! next event, and ends when there is none. A key that's heard of while it has a lane is *poked*: its lane looks once more
//! before it ends, so nothing that was committed meanwhile is missed.

use crate::Event;
use chrono::{DateTime, Utc};
use domain::stream::{key_hash, shard};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    mem,
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

/// Suspects of having killed a process, by how often they were there when one died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Suspicion {
    /// Perhaps there once, unrecorded: side by side.
    Crowd,
    /// There once: some of them side by side, so that a few dozen deaths at the most find one in a thousand lanes.
    Group,
    /// There again, or once more would be too often: alone among suspects, so that nobody else is parked for a death that
    /// it causes.
    Alone,
}

impl Suspicion {
    /// Of an event that is parked after `limit` attempts.
    fn of(event: &Event, limit: u32) -> Self {
        let last = event.attempts.saturating_add(event.deaths).saturating_add(1) >= limit;
        match event.deaths {
            2.. => Self::Alone,
            _ if last => Self::Alone,
            1 => Self::Group,
            0 => Self::Crowd,
        }
    }
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
    /// Attempts after which a key is parked.
    attempts: u32,
    ids: u64,
    /// Suspects that wait for their turn.
    held_back: Vec<Task>,
    /// A key was turned away since the last look.
    full: bool,
    /// There are events that processes have died of, or may have. Then nothing that was accepted before goes unrecorded:
    /// it might be another one, and have a suspect parked that is alone.
    wary: bool,
}

impl Lanes {
    pub(crate) fn new(limit: usize, attempts: u32) -> Self {
        let owned = Owned::default();
        Self { lanes: HashMap::new(), owned, limit, attempts, ids: 0, held_back: Vec::new(), full: false, wary: false }
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

    /// Takes keys in hand that have no lane yet, and answers them: they are to be loaded. Others are poked, turned away
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
                let attempts = event.attempts.saturating_add(event.deaths);
                let task = Task { lane: lane.id, event, on_record: suspect };
                if task.event.deaths > 0 && attempts >= self.attempts {
                    lane.phase = Phase::Recording;
                    actions.park.push(Task { on_record: false, ..task });
                } else if suspect {
                    self.held_back.push(task);
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

    /// Lets suspects go whose turn it is. Those that have to be alone come first: while one of them is at large or waits
    /// for others to end, nobody else goes.
    fn release(&mut self, actions: &mut Actions) {
        if self.held_back.is_empty() {
            return;
        }
        let (lanes, owned) = (&self.lanes, &self.owned);
        let gone: Vec<Task> =
            self.held_back.extract_if(.., |task| owned.shard(key_hash(&task.event.key)).is_none()).collect();
        let at_large = |suspicion| lanes.values().filter(|lane| lane.suspicion == Some(suspicion)).count();
        let [mut crowd, mut group, mut alone] = [Suspicion::Crowd, Suspicion::Group, Suspicion::Alone].map(at_large);
        let (limit, group_limit) = (self.attempts, (self.limit >> 5).max(1));
        let suspicion = |task: &Task| Suspicion::of(&task.event, limit);
        self.held_back.sort_by_key(|task| Reverse((suspicion(task), task.event.deaths)));
        let has_its_turn = |task: &mut Task| match suspicion(task) {
            Suspicion::Alone => mem::replace(&mut alone, 1) + group + crowd == 0,
            _ if alone > 0 => false,
            Suspicion::Group if group >= group_limit => false,
            Suspicion::Group => {
                group += 1;
                true
            }
            Suspicion::Crowd => {
                crowd += 1;
                true
            }
        };
        let going: Vec<Task> = self.held_back.extract_if(.., has_its_turn).collect();
        for task in gone {
            self.end(&task);
        }
        for task in going {
            let suspicion = Suspicion::of(&task.event, limit);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::slice;
    use storage::streams::Next;

    /// Two suspects who were there once run side by side.
    const LIMIT: usize = 64;
    const ATTEMPTS: u32 = 4;

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(second, 0).expect("a time")
    }

    /// A key whose events up to `head` were accepted at second 10; those up to `cursor` have taken effect.
    fn state(key: &str, cursor: i64, head: i64) -> State {
        let next = Next { seq: cursor + 1, payload: "1".into(), generated_at: at(10), ahead: false };
        State {
            key: key.into(),
            head,
            cursor,
            revision: 0,
            attempts: 0,
            deaths: 0,
            parked: false,
            wait: Duration::ZERO,
            next: (cursor < head).then_some(next),
        }
    }

    /// The first of a key's events was in hand of processes that died, so often.
    fn survivor(key: &str, deaths: u32) -> State {
        State { deaths, ..state(key, 0, 1) }
    }

    fn owned(shards: i32, own: impl IntoIterator<Item = i32>, took_over: Option<DateTime<Utc>>) -> Owned {
        let until = Some(Instant::now() + Duration::from_secs(3600));
        Owned { shards, own: own.into_iter().map(|shard| (shard, took_over)).collect(), until }
    }

    /// Of a process that has the only shard.
    fn lanes() -> Lanes {
        let mut lanes = Lanes::new(LIMIT, ATTEMPTS);
        lanes.own(owned(1, [0], None));
        lanes
    }

    /// The same after taking it over, at second 20.
    fn lanes_taken_over() -> Lanes {
        let mut lanes = Lanes::new(LIMIT, ATTEMPTS);
        lanes.own(owned(1, [0], Some(at(20))));
        lanes
    }

    fn names(tasks: &[Task]) -> Vec<String> {
        tasks.iter().map(|task| format!("{}/{}", task.event.key, task.event.seq)).collect()
    }

    /// Takes keys in hand that stand so.
    fn take(lanes: &mut Lanes, states: impl IntoIterator<Item = State>) -> Actions {
        let states: Vec<_> = states.into_iter().collect();
        let reserved = lanes.reserve(states.iter().map(|state| state.key.as_str()));
        assert_eq!(reserved.len(), states.len(), "each has a lane of its own");
        lanes.loaded(states)
    }

    /// A thread takes the tasks up, and works.
    fn work(lanes: &mut Lanes, tasks: &[Task]) {
        for task in tasks {
            assert!(lanes.start(task, Instant::now()), "{task:?}");
            lanes.worked(task);
        }
    }

    /// They are recorded, and nothing else waits.
    fn apply(lanes: &mut Lanes, tasks: &[Task]) -> Actions {
        let recorded: Vec<_> =
            tasks.iter().map(|task| (task.clone(), state(&task.event.key, task.event.seq, task.event.seq))).collect();
        lanes.applied(recorded)
    }

    /// An event in hand, and if it's on record, the deaths before.
    fn place(key: &str, seq: i64, revision: i32, deaths: Option<u32>) -> Place {
        let (on_record, deaths) = (deaths.is_some(), deaths.unwrap_or(0));
        Place { key: key.into(), seq, revision, attempts: 0, deaths, on_record }
    }

    #[track_caller]
    fn assert_nothing(actions: &Actions) {
        let Actions { start, begin, park, reload } = actions;
        assert!(start.is_empty() && begin.is_empty() && park.is_empty() && reload.is_empty(), "{actions:?}");
    }

    #[test]
    fn a_key_has_one_event_at_a_time_in_hand() {
        let mut lanes = lanes();
        assert_eq!(lanes.reserve(["a", "a", "b"]), ["a".into(), "b".into()]);
        assert!(lanes.reserve(["b", "a"]).is_empty(), "while they are loaded");
        let first = lanes.loaded([state("a", 0, 3), state("b", 7, 8)]).start;
        assert_eq!(names(&first), ["a/1", "b/8"]);
        assert!(lanes.reserve(["a"]).is_empty(), "while it waits for a thread");
        assert_nothing(&lanes.loaded([state("a", 0, 3)]));
        work(&mut lanes, &first);
        assert!(lanes.reserve(["a"]).is_empty(), "while it's recorded");
        let second = lanes.applied([(first[0].clone(), state("a", 1, 3))]).start;
        assert_eq!(names(&second), ["a/2"]);
        assert!(!second[0].on_record);
    }

    #[test]
    fn a_lane_whose_key_was_heard_of_meanwhile_looks_again_before_it_ends() {
        let through = || state("a", 1, 1);

        // While it was loaded, before anybody knew whether there's anything.
        let mut lanes = lanes();
        lanes.reserve(["a"]);
        lanes.reserve(["a"]);
        let again = lanes.loaded([through()]);
        assert_eq!(again.reload, ["a".into()]);
        let found = lanes.loaded([state("a", 1, 2)]).start;
        assert_eq!(names(&found), ["a/2"]);

        // While its event was worked on, or recorded.
        assert!(lanes.start(&found[0], Instant::now()));
        lanes.reserve(["a"]);
        lanes.worked(&found[0]);
        assert_eq!(lanes.applied([(found[0].clone(), state("a", 2, 2))]).reload, ["a".into()]);
        // Once is enough.
        assert_nothing(&lanes.loaded([state("a", 2, 2)]));
        assert_eq!(lanes.reserve(["a"]), ["a".into()], "it has ended");

        // An event that was found with it makes up for what came before.
        lanes.reserve(["a"]);
        let found = lanes.loaded([state("a", 2, 3)]).start;
        work(&mut lanes, &found);
        assert_nothing(&lanes.applied([(found[0].clone(), state("a", 3, 3))]));
        assert_eq!(lanes.reserve(["a"]), ["a".into()], "it has ended");
    }

    #[test]
    fn a_key_that_is_parked_or_waits_for_its_retry_has_no_lane() {
        for resting in [
            State { parked: true, ..state("a", 0, 1) },
            State { wait: Duration::from_millis(1), attempts: 1, ..state("a", 0, 1) },
            state("a", 0, 0),
        ] {
            let mut lanes = lanes();
            assert_nothing(&take(&mut lanes, [resting]));
            assert_eq!(lanes.reserve(["a"]), ["a".into()]);
        }
    }

    #[test]
    fn a_key_that_has_failed_or_could_not_be_loaded_has_no_lane() {
        let mut lanes = lanes();
        let failed = take(&mut lanes, [state("a", 0, 2)]).start;
        work(&mut lanes, &failed);
        assert_nothing(&lanes.failed(&failed));
        let reserved = lanes.reserve(["a", "b"]);
        assert_eq!(reserved, ["a".into(), "b".into()]);
        lanes.forget(&reserved);
        assert_eq!(lanes.reserve(["a", "b"]), reserved);
    }

    #[test]
    fn only_keys_of_the_shards_that_are_its_own_are_taken() {
        let keys: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        let of = |shards: &[i32]| -> Vec<Arc<str>> {
            let mine = keys.iter().filter(|key| shards.contains(&shard(key_hash(key), 4)));
            mine.map(|key| key.as_str().into()).collect()
        };
        let mut lanes = Lanes::new(LIMIT, ATTEMPTS);
        let all = || keys.iter().map(String::as_str);
        assert!(lanes.reserve(all()).is_empty(), "nothing is known of the shards yet");
        lanes.own(owned(4, [0, 2], None));
        assert_eq!(lanes.reserve(all()), of(&[0, 2]));
        lanes.own(owned(4, [0, 3], None));
        assert_eq!(lanes.reserve(all()), of(&[3]));
    }

    #[test]
    fn a_lane_whose_shard_is_lost_finishes_what_it_works_on_and_ends() {
        let mut lanes = lanes();
        lanes.reserve(["loading"]);
        let tasks = take(&mut lanes, [state("waiting", 0, 1), state("working", 0, 2)]).start;
        let (waiting, working) = (&tasks[0], &tasks[1]);
        assert!(lanes.start(working, Instant::now()));
        lanes.reserve(["working"]);
        lanes.own(owned(1, [], None));
        assert_nothing(&lanes.loaded([state("loading", 0, 1)]));
        assert!(!lanes.start(waiting, Instant::now()));
        lanes.worked(working);
        assert_nothing(&lanes.applied([(working.clone(), state("working", 1, 2))]));
        assert_eq!(lanes.free(), 4 * LIMIT, "none is left");
    }

    #[test]
    fn nothing_starts_once_the_leases_may_have_run_out() {
        let mut lanes = lanes();
        let now = Instant::now();
        lanes.own(Owned { until: Some(now + Duration::from_secs(2)), ..owned(1, [0], None) });
        let tasks = take(&mut lanes, [state("a", 0, 1), state("b", 0, 1)]).start;
        assert!(lanes.start(&tasks[0], now + Duration::from_millis(1999)));
        assert!(!lanes.start(&tasks[1], now + Duration::from_secs(2)));
        assert_eq!(lanes.reserve(["b"]), ["b".into()], "its lane has ended");
    }

    #[test]
    fn a_task_of_a_lane_that_has_ended_is_not_started() {
        let mut lanes = lanes();
        let old = take(&mut lanes, [state("a", 0, 1)]).start;
        lanes.failed(&old);
        assert!(!lanes.start(&old[0], Instant::now()), "there's no lane");
        let new = take(&mut lanes, [state("a", 0, 1)]).start;
        assert!(!lanes.start(&old[0], Instant::now()), "there's another one");
        lanes.worked(&old[0]);
        assert_nothing(&lanes.applied([(old[0].clone(), state("a", 1, 2))]));
        lanes.failed(&old);
        assert!(lanes.start(&new[0], Instant::now()), "which the old task leaves alone");
        assert!(!lanes.start(&new[0], Instant::now()), "once");
    }

    #[test]
    fn four_times_as_many_keys_are_in_hand_as_work_and_those_turned_away_are_remembered() {
        let mut lanes = Lanes::new(2, ATTEMPTS);
        lanes.own(owned(1, [0], None));
        let keys: Vec<String> = (0..9).map(|n| format!("k{n}")).collect();
        let reserved = lanes.reserve(keys[..8].iter().map(String::as_str));
        assert_eq!((reserved.len(), lanes.free()), (8, 0));
        lanes.forget(&reserved[..4]);
        assert!(!lanes.is_hungry(), "nobody was turned away");
        lanes.reserve(keys.iter().map(String::as_str));
        assert!(!lanes.is_hungry(), "there's no room");
        lanes.forget(&reserved[..3]);
        assert!(!lanes.is_hungry(), "there's little room");
        lanes.forget(&reserved[3..4]);
        assert!(lanes.is_hungry());
        lanes.sweeping();
        assert!(!lanes.is_hungry(), "the sweep finds them");
        let more = lanes.reserve(keys.iter().map(String::as_str).take(8));
        lanes.sweeping();
        assert!(!lanes.has_room(), "it would have had more");
        lanes.forget(&more);
        assert!(lanes.has_room() && lanes.is_hungry());
    }

    #[test]
    fn what_was_next_when_a_shard_was_taken_over_is_begun_on_record() {
        let mut lanes = lanes_taken_over();
        let later = Next { seq: 1, payload: "1".into(), generated_at: at(21), ahead: false };
        let taken = take(&mut lanes, [state("before", 0, 3), State { next: Some(later), ..state("later", 0, 1) }]);
        assert_eq!((names(&taken.begin), names(&taken.start)), (vec!["before/1".into()], vec!["later/1".into()]));
        assert!(taken.begin[0].on_record && !taken.start[0].on_record);
        // Its process has survived the first one, which was all that the other had in hand.
        work(&mut lanes, &taken.begin);
        let next = lanes.applied([(taken.begin[0].clone(), state("before", 1, 3))]);
        assert_eq!((names(&next.begin).len(), names(&next.start)), (0, vec!["before/2".into()]));
        assert!(!next.start[0].on_record);
    }

    #[test]
    fn what_was_accepted_before_the_clock_was_set_back_is_begun_on_record_too() {
        let accepted_at = |generated_at, ahead| {
            let next = Next { generated_at, ahead, ..state("", 0, 1).next.expect("an event") };
            State { next: Some(next), ..state("a", 0, 1) }
        };
        for (state, on_record) in [(accepted_at(at(30), false), false), (accepted_at(at(30), true), true)] {
            let actions = take(&mut lanes_taken_over(), [state]);
            assert_eq!((actions.start.len(), actions.begin.len()), if on_record { (0, 1) } else { (1, 0) });
        }
    }

    #[test]
    fn where_processes_have_died_on_record_a_whole_backlog_is_on_record() {
        let mut lanes = lanes_taken_over();
        let crowd = take(&mut lanes, [state("a", 0, 3), state("b", 0, 3)]).begin;
        work(&mut lanes, &crowd);
        let alone = take(&mut lanes, [survivor("twice", 2)]);
        assert_nothing(&alone);
        let next = |task: &Task| (task.clone(), state(&task.event.key, 1, 3));
        assert_nothing(&lanes.applied([next(&crowd[0])]));
        let alone = lanes.applied([next(&crowd[1])]);
        assert_eq!((names(&alone.begin), alone.start.len()), (vec!["twice/1".into()], 0), "it isn't put at risk");
        work(&mut lanes, &alone.begin);
        let mut others = names(&apply(&mut lanes, &alone.begin).begin);
        others.sort();
        assert_eq!(others, ["a/2", "b/2"]);
    }

    #[test]
    fn of_those_that_were_there_once_some_go_side_by_side() {
        let mut lanes = lanes();
        let keys = ["a", "b", "c", "d", "e"];
        let first = take(&mut lanes, keys.map(|key| survivor(key, 1)));
        assert!(first.start.is_empty());
        assert_eq!(first.begin.len(), LIMIT >> 5);
        assert!(first.begin.iter().all(|task| task.on_record));
        let innocent = take(&mut lanes, [state("innocent", 0, 1)]).start;
        assert_eq!(names(&innocent), ["innocent/1"], "others needn't wait for them");
        let mut through = names(&first.begin);
        let mut at_large = first.begin;
        while !at_large.is_empty() {
            work(&mut lanes, &at_large[..1]);
            let one = at_large.remove(0);
            let next = if through.len().is_multiple_of(2) { apply(&mut lanes, &[one]) } else { lanes.failed(&[one]) };
            assert!(next.begin.len() <= 1, "one comes for one that's through");
            through.extend(names(&next.begin));
            at_large.extend(next.begin);
        }
        through.sort();
        assert_eq!(through, keys.map(|key| format!("{key}/1")));
    }

    #[test]
    fn those_that_were_there_again_go_first_and_alone() {
        let mut lanes = lanes();
        // Whoever is at large already can't be called back.
        let early = take(&mut lanes, [survivor("early", 1)]).begin;
        assert_eq!(names(&early), ["early/1"]);
        let deaths = [("once", 1), ("thrice", 3), ("twice", 2), ("also once", 1)];
        assert_nothing(&take(&mut lanes, deaths.map(|(key, deaths)| survivor(key, deaths))));
        let mut at_large = early;
        let mut order = Vec::new();
        while !at_large.is_empty() {
            work(&mut lanes, &at_large);
            let next = apply(&mut lanes, &at_large).begin;
            order.push(names(&next));
            at_large = next;
        }
        assert_eq!(order[..2], [["thrice/1"], ["twice/1"]]);
        assert_eq!(order[2].len(), 2, "the others, side by side");
    }

    #[test]
    fn whoever_would_be_parked_for_one_more_death_is_alone() {
        // A few retries only, or failures before: as many deaths as others survive are too many here.
        for (attempts, deaths) in [(0, 3), (1, 2), (2, 1), (3, 0)] {
            let last = |key| State { attempts, ..survivor(key, deaths) };
            let mut lanes = lanes_taken_over();
            let crowd = take(&mut lanes, [state("a", 0, 1), state("b", 0, 1)]).begin;
            assert_eq!(crowd.len(), 2, "they may be there once");
            assert_nothing(&take(&mut lanes, [last("last"), last("also last"), survivor("once", 1), state("c", 0, 1)]));
            work(&mut lanes, &crowd);
            let mut alone = apply(&mut lanes, &crowd).begin;
            for _ in 0..2 {
                let [one] = &alone[..] else { panic!("{alone:?}, {attempts}, {deaths}") };
                assert!(one.event.key.ends_with("last"));
                let one = one.clone();
                work(&mut lanes, slice::from_ref(&one));
                alone = lanes.failed([&one]).begin;
            }
            let mut others = names(&alone);
            others.sort();
            assert_eq!(others, ["c/1", "once/1"]);
        }
    }

    #[test]
    fn an_event_whose_processes_have_died_as_often_as_it_may_fail_is_parked() {
        for (attempts, deaths, parked) in [
            (0, 4, true),
            (1, 3, true),
            (3, 1, true),
            (0, 3, false),
            (2, 1, false),
            // By settings that allowed more: its next failure parks it, for a reason of its own.
            (5, 0, false),
        ] {
            let mut lanes = lanes();
            let taken = take(&mut lanes, [State { attempts, ..survivor("a", deaths) }]);
            let (parking, others) = (names(&taken.park), taken.begin.len() + taken.start.len());
            assert_eq!((parking.len(), others), if parked { (1, 0) } else { (0, 1) }, "{attempts}, {deaths}");
            if parked {
                assert!(lanes.busy().contains(&0), "until that's recorded");
                lanes.failed(&taken.park);
                assert_eq!(lanes.free(), 4 * LIMIT);
            }
        }
    }

    #[test]
    fn suspects_of_a_shard_that_is_lost_are_left_to_others() {
        let mut lanes = lanes();
        let begun = take(&mut lanes, ["a", "b", "c", "d"].map(|key| survivor(key, 2))).begin;
        assert_eq!(begun.len(), 1);
        assert_nothing(&lanes.own(owned(1, [], None)));
        assert_eq!(lanes.free(), 4 * LIMIT - 1, "only that which was at large is left");
        assert!(!lanes.start(&begun[0], Instant::now()));
        assert_eq!(lanes.free(), 4 * LIMIT);
        lanes.own(owned(1, [0], None));
        assert_eq!(take(&mut lanes, [survivor("b", 2)]).begin.len(), 1, "nobody is at large any more");
    }

    #[test]
    fn a_shard_is_busy_while_its_events_are_begun_worked_on_or_recorded() {
        let mut lanes = Lanes::new(LIMIT, ATTEMPTS);
        lanes.own(owned(1000, 0..1000, None));
        let of = |key| shard(key_hash(key), 1000);
        lanes.reserve(["loading"]);
        take(&mut lanes, [state("waiting", 0, 1)]);
        let tasks = take(&mut lanes, [state("working", 0, 1), state("recording", 0, 1)]).start;
        assert!(lanes.start(&tasks[0], Instant::now()));
        work(&mut lanes, &tasks[1..]);
        take(&mut lanes, [survivor("beginning", 1)]);
        assert_eq!(lanes.busy(), ["working", "recording", "beginning"].map(of).into());
        // Whoever has them now waits for them.
        lanes.own(owned(1000, [], None));
        assert_eq!(lanes.busy(), ["working", "recording", "beginning"].map(of).into());
        lanes.worked(&tasks[0]);
        apply(&mut lanes, &tasks);
        assert_eq!(lanes.busy(), [of("beginning")].into());
    }

    #[test]
    fn work_is_overdue_when_it_has_taken_longer_than_its_limit() {
        let mut lanes = lanes();
        let (limit, now) = (Duration::from_secs(60), Instant::now());
        let replaced = State { revision: 2, ..state("a", 4, 5) };
        let tasks = take(&mut lanes, [replaced, state("b", 0, 1)]).start;
        assert!(lanes.start(&tasks[0], now));
        assert_eq!(lanes.overdue(limit, now + limit), []);
        let late = now + limit + Duration::from_millis(1);
        assert_eq!(lanes.overdue(limit, late), [place("a", 5, 2, None)]);
        lanes.worked(&tasks[0]);
        assert_eq!(lanes.overdue(limit, late), [], "recording it isn't work, nor is waiting for a thread");
    }

    #[test]
    fn those_on_record_are_known_for_the_case_that_another_one_ends_the_process() {
        let mut lanes = lanes_taken_over();
        let later = Next { seq: 1, payload: "1".into(), generated_at: at(21), ahead: false };
        let taken = take(
            &mut lanes,
            [state("before", 0, 1), State { next: Some(later), ..state("later", 0, 1) }, survivor("twice", 2)],
        );
        work(&mut lanes, &taken.start);
        assert_eq!(lanes.on_record(), [place("twice", 1, 0, Some(2))], "the other suspect waits");
        work(&mut lanes, &taken.begin);
        assert_eq!(lanes.on_record(), [place("twice", 1, 0, Some(2))]);
        let next = apply(&mut lanes, &taken.begin).begin;
        assert_eq!(lanes.on_record(), [place("before", 1, 0, Some(0))], "its turn has come");
        lanes.failed(&next);
        assert_eq!(lanes.on_record(), []);
    }
}
