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
