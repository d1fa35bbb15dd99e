//! Visits every state that a protocol can get into, breadth first, so that what it finds is shortest.

use std::{
    collections::HashMap,
    fmt::{self, Debug},
    hash::{BuildHasherDefault, Hash, Hasher},
};

/// A protocol of a bounded number of states.
pub(crate) trait Protocol {
    type State: Copy + Eq + Hash;
    type Action: Copy + Debug;
    type Violation: Debug;

    fn start(&self) -> Self::State;

    /// Hands over everything that can happen in this state, with what comes of it.
    fn steps(&self, state: &Self::State, step: impl FnMut(Self::Action, Result<Self::State, Self::Violation>));

    /// Whether somebody is sure to do this sooner or later. The work has to get done by such actions alone.
    fn is_due(&self, action: Self::Action) -> bool;

    /// Whether all work is done.
    fn is_done(&self, state: &Self::State) -> bool;
}

/// What all states have shown.
pub(crate) struct Explored<P: Protocol> {
    pub(crate) states: usize,
    pub(crate) steps: usize,
    pub(crate) finding: Option<Finding<P>>,
}

/// What is wrong with a protocol, and how to get there.
pub(crate) struct Finding<P: Protocol> {
    /// `None`: nothing was violated, but after these actions what is left of the work doesn't get done, even if nothing else goes wrong.
    pub(crate) violation: Option<P::Violation>,
    pub(crate) trace: Vec<P::Action>,
}

impl<P: Protocol> Debug for Finding<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.violation {
            Some(violation) => write!(f, "{violation:?} after {:?}", self.trace),
            None => write!(f, "no way to the end after {:?}", self.trace),
        }
    }
}

/// Follows every action from every state until there is no new one, or a violation.
pub(crate) fn explore<P: Protocol>(protocol: &P) -> Explored<P> {
    let start = protocol.start();
    let mut ids = HashMap::<P::State, u32, BuildHasherDefault<Quick>>::default();
    ids.insert(start, 0);
    // By id: whence each state was reached first, and by what.
    let mut origins: Vec<Option<(u32, P::Action)>> = vec![None];
    let mut queue = vec![start];
    // Steps that are sure to be taken, from and to.
    let mut due: Vec<(u32, u32)> = Vec::new();
    let (mut steps, mut finding) = (0, None);
    let mut from = 0;
    while let (Some(state), None) = (queue.get(from).copied(), &finding) {
        let id = from as u32;
        protocol.steps(&state, |action, next| {
            steps += 1;
            match next {
                Ok(next) => {
                    let new = origins.len() as u32;
                    let to = *ids.entry(next).or_insert(new);
                    if to == new {
                        origins.push(Some((id, action)));
                        queue.push(next);
                    }
                    if protocol.is_due(action) {
                        due.push((id, to));
                    }
                }
                Err(violation) if finding.is_none() => {
                    let mut trace = trace(&origins, id);
                    trace.push(action);
                    finding = Some(Finding { violation: Some(violation), trace });
                }
                Err(_) => {}
            }
        });
        from += 1;
    }
    if finding.is_none() {
        let done = (0..).zip(&queue).filter(|(_, state)| protocol.is_done(state)).map(|(id, _)| id).collect();
        let stuck = first_outside(queue.len(), &due, done);
        finding = stuck.map(|id| Finding { violation: None, trace: trace(&origins, id) });
    }
    Explored { states: queue.len(), steps, finding }
}

/// The actions that lead to a state.
fn trace<A: Copy>(origins: &[Option<(u32, A)>], mut id: u32) -> Vec<A> {
    let mut actions = Vec::new();
    while let Some((from, action)) = origins[id as usize] {
        actions.push(action);
        id = from;
    }
    actions.reverse();
    actions
}

/// The first state from which no steps lead to one that is `done`.
fn first_outside(states: usize, steps: &[(u32, u32)], mut done: Vec<u32>) -> Option<u32> {
    // The steps' origins, sorted by where they lead: those of state n are between starts[n] and starts[n + 1].
    let mut starts = vec![0; states + 1];
    steps.iter().for_each(|(_, to)| starts[*to as usize + 1] += 1);
    for state in 0..states {
        starts[state + 1] += starts[state];
    }
    let (mut origins, mut ends) = (vec![0; steps.len()], starts.clone());
    for (from, to) in steps {
        origins[ends[*to as usize]] = *from;
        ends[*to as usize] += 1;
    }
    let mut reached = vec![false; states];
    done.iter().for_each(|state| reached[*state as usize] = true);
    while let Some(to) = done.pop() {
        for from in &origins[starts[to as usize]..starts[to as usize + 1]] {
            if !std::mem::replace(&mut reached[*from as usize], true) {
                done.push(*from);
            }
        }
    }
    reached.iter().position(|reached| !reached).map(|state| state as u32)
}

/// One multiplication for each field: the standard library's hasher takes most of the time in a build without
/// optimisation.
#[derive(Default)]
struct Quick(u64);

impl Hasher for Quick {
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u8(*byte));
    }

    fn finish(&self) -> u64 {
        // The table takes the bucket from the lowest bits, which have seen the least.
        self.0.rotate_left(26)
    }
}
