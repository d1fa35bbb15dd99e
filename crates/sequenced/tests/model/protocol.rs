//! The protocol of sequenced streams as a state machine: producers, relay, broker, workers, leases, operator.
//!
//! Everything that a transaction does is one step, and everything that a process does between two transactions may be
//! overtaken by anything else. Where the program is free to choose (which key a sweep takes up, when a lease is renewed)
//! the model does everything that it might.

use crate::explorer::Protocol;

pub(crate) const KEYS: usize = 2;
pub(crate) const WORKERS: usize = 2;
const PRODUCERS: usize = 2;
/// Most events of a key.
const EVENTS: usize = 3;
/// Most shards.
const SHARDS: usize = 2;

/// How large the case is.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    /// How many numbers of each key producers take at most.
    pub(crate) events: [u8; KEYS],
    /// How many of the operator's changes each key sees at most.
    pub(crate) changes: u8,
    /// Shards before and after the division is changed.
    pub(crate) shards: (u8, u8),
    /// Whether a gap in the numbers is a violation by itself. If not, what comes of it shows.
    pub(crate) gaps: bool,
    pub(crate) guards: Guards,
}

/// What keeps order. The controls take one away.
#[derive(Clone, Copy)]
pub(crate) struct Guards {
    /// An event takes effect only if the cursor is at the one before.
    pub(crate) cursor: bool,
    /// ... and only if no operator has changed what is next since it was loaded.
    pub(crate) revision: bool,
    /// The effect is part of the transaction that moves the cursor.
    pub(crate) one_transaction: bool,
    /// Numbers come from a row that stays locked to the end of the transaction; otherwise from a sequence.
    pub(crate) locked_head: bool,
    /// Keys with events that wait are looked for.
    pub(crate) sweep: bool,
    /// Whoever has a key go on that was parked, or waited for a retry, ends the rest of its events.
    pub(crate) rouse: bool,
    /// A worker takes up keys of the shards alone that it has, or believes to have, a lease on.
    pub(crate) leases: bool,
}

pub(crate) const ALL_GUARDS: Guards = Guards {
    cursor: true,
    revision: true,
    one_transaction: true,
    locked_head: true,
    sweep: true,
    rouse: true,
    leases: true,
};

/// What must never happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    /// A number is committed that isn't one more than the one committed before it.
    Gap,
    /// An event takes effect that has done so, or was skipped, before.
    Doubled,
    /// An event takes effect before one that comes first.
    Disorder,
    /// What takes effect isn't what the event's row says.
    Stale,
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// A producer takes the next number of a key, in the transaction that it has open or begins.
    Take {
        producer: usize,
        key: usize,
    },
    Commit {
        producer: usize,
    },
    RollBack {
        producer: usize,
    },
    /// The relay publishes what is in the outbox, and deletes it.
    Publish {
        key: usize,
        queue: usize,
    },
    /// It dies before it deletes it.
    PublishAndDie {
        key: usize,
        queue: usize,
    },
    /// The broker loses a message,
    Lose {
        key: usize,
        queue: usize,
    },
    /// or puts it into another queue.
    Misroute {
        key: usize,
        queue: usize,
    },
    Receive {
        worker: usize,
        key: usize,
        queue: usize,
    },
    /// The broker will deliver it once more.
    ReceiveDoubled {
        worker: usize,
        key: usize,
        queue: usize,
    },
    Sweep {
        worker: usize,
        key: usize,
    },
    /// A sweep has the events of a key rest that is parked or waits: sweeps pass them over from then on.
    Rest {
        key: usize,
    },
    /// A lane reads what is next.
    Load {
        worker: usize,
        key: usize,
    },
    /// It has handled that, and commits.
    Apply {
        worker: usize,
        key: usize,
    },
    /// Its effect takes place outside the transaction. A control's.
    Effect {
        worker: usize,
        key: usize,
    },
    /// It has failed, and nothing is noted of it.
    Fail {
        worker: usize,
        key: usize,
    },
    /// It has failed, and the event is due again some time later.
    Wait {
        worker: usize,
        key: usize,
    },
    /// It has failed as often as it may, and parks the key.
    Park {
        worker: usize,
        key: usize,
    },
    /// A process dies, and its successor begins with nothing.
    Crash {
        worker: usize,
    },
    Claim {
        worker: usize,
        shard: usize,
    },
    /// A lease isn't renewed in time. Its holder goes on believing in it.
    RunOut {
        shard: usize,
    },
    /// A worker renews its leases, and learns which are left.
    Renew {
        worker: usize,
    },
    /// A worker reads how the stream is divided.
    Learn {
        worker: usize,
    },
    Divide,
    Retry {
        key: usize,
    },
    Skip {
        key: usize,
    },
    Replace {
        key: usize,
    },
}

/// The tables' rows of a key, and its messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The newest number that is committed.
    head: u8,
    /// The newest number that was taken from the sequence that stands in for the locked head in a control.
    sequence: u8,
    /// The committed events: 0 where there is none, otherwise which payload it is.
    events: [u8; EVENTS],
    cursor: u8,
    revision: u8,
    parked: bool,
    /// Whether its next event waits for another attempt. Its time may have come at any moment.
    waits: bool,
    /// Which of its events rest.
    rests: [bool; EVENTS],
    /// What has taken effect, or was skipped: this and everything before it. That this one number can say it is the
    /// invariant.
    settled: u8,
    /// Outbox rows for each shard. Messages of a key say nothing but its name: so they're all alike, and as the broker
    /// may double any, one stands for many.
    outbox: [bool; SHARDS],
    queues: [bool; SHARDS],
}

impl Key {
    fn next(&self) -> Option<Event> {
        let payload = *self.events.get(usize::from(self.cursor))?;
        let event = Event { seq: self.cursor + 1, revision: self.revision, payload };
        (payload > 0 && !self.parked).then_some(event)
    }

    /// Whether a sweep takes it up: its time has come, or one of its events waits that doesn't rest.
    fn is_found(&self) -> bool {
        let mut pending = usize::from(self.cursor)..usize::from(self.head);
        !self.parked && !pending.is_empty() && (self.waits || pending.any(|event| !self.rests[event]))
    }

    /// It's neither parked nor does it wait any more.
    fn go_on(&mut self, guards: Guards) {
        if guards.rouse {
            self.rests = Default::default();
        }
        (self.parked, self.waits) = (false, false);
    }

    fn take_effect(&mut self, event: Event) -> Result<(), Violation> {
        if event.seq <= self.settled {
            return Err(Violation::Doubled);
        }
        if event.seq > self.settled + 1 {
            return Err(Violation::Disorder);
        }
        if event.payload != self.events[usize::from(event.seq) - 1] {
            return Err(Violation::Stale);
        }
        self.settled = event.seq;
        Ok(())
    }
}

/// An event as a lane has loaded it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Event {
    seq: u8,
    revision: u8,
    payload: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
enum Lane {
    #[default]
    Idle,
    /// Something may be next.
    Woken,
    /// The event is being handled, or has been.
    Loaded(Event),
    /// It has taken effect, and the cursor hasn't moved yet. A control's.
    Effected(Event),
}

/// What a process remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Worker {
    /// How it believes the stream to be divided.
    shards: u8,
    /// The leases that it believes to have.
    held: [bool; SHARDS],
    lanes: [Lane; KEYS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    keys: [Key; KEYS],
    /// The numbers that open transactions have taken: 0 for none.
    open: [[u8; KEYS]; PRODUCERS],
    shards: u8,
    /// Who has a lease: `None` if nobody has, or it has run out.
    leases: [Option<u8>; SHARDS],
    workers: [Worker; WORKERS],
}

/// The shard of a key: its number serves as its hash.
fn shard(key: usize, shards: u8) -> usize {
    key % usize::from(shards)
}

impl Protocol for Case {
    type State = State;
    type Action = Action;
    type Violation = Violation;

    fn start(&self) -> State {
        State {
            keys: Default::default(),
            open: Default::default(),
            shards: self.shards.0,
            leases: Default::default(),
            workers: [Worker { shards: self.shards.0, ..Worker::default() }; WORKERS],
        }
    }

    fn steps(&self, state: &State, mut step: impl FnMut(Action, Result<State, Violation>)) {
        self.producers(state, &mut step);
        self.messages(state, &mut step);
        self.lanes(state, &mut step);
        self.rest(state, &mut step);
        self.leases(state, &mut step);
        self.operator(state, &mut step);
    }

    /// Neither faults nor new events; and an operator who looks after a parked key at all may always just retry.
    fn is_due(&self, action: Action) -> bool {
        use Action::*;
        matches!(
            action,
            Commit { .. }
                | Publish { .. }
                | Receive { .. }
                | Sweep { .. }
                | Load { .. }
                | Apply { .. }
                | Claim { .. }
                | Renew { .. }
                | Learn { .. }
                | Retry { .. }
        )
    }

    fn is_done(&self, state: &State) -> bool {
        state.keys.iter().all(|key| key.settled == key.head)
    }
}

impl Case {
    fn producers(&self, state: &State, step: &mut impl FnMut(Action, Result<State, Violation>)) {
        for (producer, taken) in state.open.iter().enumerate() {
            for key in 0..KEYS {
                let Key { head, sequence, .. } = state.keys[key];
                let newest = if self.guards.locked_head { head } else { sequence };
                // Keys are taken in their order, and one whose row is locked has to be waited for.
                let waits = self.guards.locked_head && state.open.iter().any(|taken| taken[key] > 0);
                if newest < self.events[key] && taken[key..].iter().all(|seq| *seq == 0) && !waits {
                    let mut next = *state;
                    next.open[producer][key] = newest + 1;
                    if !self.guards.locked_head {
                        next.keys[key].sequence += 1;
                    }
                    step(Action::Take { producer, key }, Ok(next));
                }
            }
            if taken.iter().any(|seq| *seq > 0) {
                step(Action::Commit { producer }, self.commit(*state, producer));
                let mut next = *state;
                next.open[producer] = Default::default();
                step(Action::RollBack { producer }, Ok(next));
            }
        }
        // Waits for open transactions, and keeps new ones from beginning meanwhile.
        if state.shards != self.shards.1 && state.open.iter().flatten().all(|seq| *seq == 0) {
            step(Action::Divide, Ok(State { shards: self.shards.1, ..*state }));
        }
    }

    fn commit(&self, mut state: State, producer: usize) -> Result<State, Violation> {
        for (key, seq) in std::mem::take(&mut state.open[producer]).into_iter().enumerate().filter(|(_, seq)| *seq > 0)
        {
            let row = &mut state.keys[key];
            if seq != row.head + 1 && self.gaps {
                return Err(Violation::Gap);
            }
            row.head = row.head.max(seq);
            row.events[usize::from(seq) - 1] = 1;
            row.outbox[shard(key, state.shards)] = true;
        }
        Ok(state)
    }

    fn messages(&self, state: &State, step: &mut impl FnMut(Action, Result<State, Violation>)) {
        let queues = self.shards.0.max(self.shards.1);
        for (key, queue) in (0..KEYS).flat_map(|key| (0..usize::from(queues)).map(move |queue| (key, queue))) {
            if state.keys[key].outbox[queue] {
                let mut next = *state;
                next.keys[key].queues[queue] = true;
                step(Action::PublishAndDie { key, queue }, Ok(next));
                next.keys[key].outbox[queue] = false;
                step(Action::Publish { key, queue }, Ok(next));
            }
            if state.keys[key].queues[queue] {
                let mut next = *state;
                next.keys[key].queues[queue] = false;
                step(Action::Lose { key, queue }, Ok(next));
                if queues > 1 {
                    let mut next = next;
                    next.keys[key].queues[1 - queue] = true;
                    step(Action::Misroute { key, queue }, Ok(next));
                }
                for worker in 0..WORKERS {
                    if self.guards.leases && !state.workers[worker].held[queue] {
                        continue;
                    }
                    let mut next = next;
                    // Acknowledged, also where nothing follows.
                    if self.is_own(&state.workers[worker], key) && state.workers[worker].lanes[key] == Lane::Idle {
                        next.workers[worker].lanes[key] = Lane::Woken;
                    }
                    step(Action::Receive { worker, key, queue }, Ok(next));
                    next.keys[key].queues[queue] = true;
                    step(Action::ReceiveDoubled { worker, key, queue }, Ok(next));
                }
            }
        }
    }

    fn lanes(&self, state: &State, step: &mut impl FnMut(Action, Result<State, Violation>)) {
        for (worker, key) in (0..WORKERS).flat_map(|worker| (0..KEYS).map(move |key| (worker, key))) {
            let own = self.is_own(&state.workers[worker], key);
            let row = state.keys[key];
            let to = |lane: Lane| {
                let mut next = *state;
                next.workers[worker].lanes[key] = lane;
                next
            };
            match state.workers[worker].lanes[key] {
                Lane::Idle => {
                    if self.guards.sweep && own && row.is_found() {
                        step(Action::Sweep { worker, key }, Ok(to(Lane::Woken)));
                    }
                }
                Lane::Woken => {
                    let next = row.next().filter(|_| own).map_or(Lane::Idle, Lane::Loaded);
                    step(Action::Load { worker, key }, Ok(to(next)));
                }
                Lane::Loaded(event) => {
                    step(Action::Fail { worker, key }, Ok(to(Lane::Idle)));
                    let current = self.is_current(&row, event);
                    // One that others have failed at meanwhile, until its key was parked, isn't noted.
                    if current && !row.waits && !row.parked {
                        let mut next = to(Lane::Idle);
                        next.keys[key].waits = true;
                        step(Action::Wait { worker, key }, Ok(next));
                    }
                    if current && row.revision < self.changes {
                        let mut next = to(Lane::Idle);
                        (next.keys[key].parked, next.keys[key].waits) = (true, false);
                        step(Action::Park { worker, key }, Ok(next));
                    }
                    if self.guards.one_transaction {
                        let mut next = to(Lane::Woken);
                        let row = &mut next.keys[key];
                        let effect = if current { row.take_effect(event) } else { Ok(()) };
                        self.advance(row, current, event);
                        step(Action::Apply { worker, key }, effect.map(|()| next));
                    } else {
                        let mut next = to(Lane::Effected(event));
                        let effect = next.keys[key].take_effect(event);
                        step(Action::Effect { worker, key }, effect.map(|()| next));
                    }
                }
                Lane::Effected(event) => {
                    let mut next = to(Lane::Woken);
                    self.advance(&mut next.keys[key], self.is_current(&row, event), event);
                    step(Action::Apply { worker, key }, Ok(next));
                }
            }
        }
    }

    fn advance(&self, row: &mut Key, current: bool, event: Event) {
        if current {
            row.cursor = event.seq;
            row.go_on(self.guards);
        }
    }

    fn rest(&self, state: &State, step: &mut impl FnMut(Action, Result<State, Violation>)) {
        for key in (0..KEYS).filter(|key| state.keys[*key].parked || state.keys[*key].waits) {
            let mut next = *state;
            let Key { cursor, head, ref mut rests, .. } = next.keys[key];
            rests[usize::from(cursor)..usize::from(head)].fill(true);
            if next != *state {
                step(Action::Rest { key }, Ok(next));
            }
        }
    }

    /// Whether the worker believes to have the lease on the key's shard.
    fn is_own(&self, worker: &Worker, key: usize) -> bool {
        !self.guards.leases || worker.held[shard(key, worker.shards)]
    }

    /// What a lane's transaction compares.
    fn is_current(&self, row: &Key, event: Event) -> bool {
        (row.cursor + 1 == event.seq || !self.guards.cursor)
            && (row.revision == event.revision || !self.guards.revision)
    }

    fn leases(&self, state: &State, step: &mut impl FnMut(Action, Result<State, Violation>)) {
        for worker in 0..WORKERS {
            let name = worker as u8;
            let mut next = *state;
            next.workers[worker] = Worker { shards: state.shards, ..Worker::default() };
            // That its leases have to run out first only delays what comes.
            next.leases.iter_mut().filter(|holder| **holder == Some(name)).for_each(|holder| *holder = None);
            if next != *state {
                step(Action::Crash { worker }, Ok(next));
            }
            if state.workers[worker].shards != state.shards {
                let mut next = *state;
                next.workers[worker].shards = state.shards;
                step(Action::Learn { worker }, Ok(next));
            }
            if !self.guards.leases {
                continue;
            }
            // Queues that are being given up are drained under leases of their own.
            let known = usize::from(state.workers[worker].shards.max(self.shards.0));
            for shard in (0..known).filter(|shard| state.leases[*shard].is_none()) {
                let mut next = *state;
                next.leases[shard] = Some(name);
                next.workers[worker].held[shard] = true;
                step(Action::Claim { worker, shard }, Ok(next));
            }
            let held = state.leases.map(|holder| holder == Some(name));
            if held != state.workers[worker].held {
                let mut next = *state;
                next.workers[worker].held = held;
                step(Action::Renew { worker }, Ok(next));
            }
        }
        for shard in (0..SHARDS).filter(|shard| state.leases[*shard].is_some()) {
            let mut next = *state;
            next.leases[shard] = None;
            step(Action::RunOut { shard }, Ok(next));
        }
    }

    fn operator(&self, state: &State, step: &mut impl FnMut(Action, Result<State, Violation>)) {
        for key in (0..KEYS).filter(|key| state.keys[*key].parked) {
            let mut next = *state;
            let row = &mut next.keys[key];
            row.go_on(self.guards);
            row.revision += 1;
            step(Action::Retry { key }, Ok(next));
            let mut replaced = next;
            let row = &mut replaced.keys[key];
            row.events[usize::from(row.cursor)] += 1;
            step(Action::Replace { key }, Ok(replaced));
            let mut skipped = next;
            let row = &mut skipped.keys[key];
            row.cursor += 1;
            row.settled = row.cursor;
            step(Action::Skip { key }, Ok(skipped));
        }
    }
}
