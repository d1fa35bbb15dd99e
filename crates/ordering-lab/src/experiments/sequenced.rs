//! The same load through a sequenced stream, while consumers come, are killed and freeze, and the stream is divided anew.

use crate::{
    balances,
    consume::{Consumer, Strategy},
    lab::{GRACE, Lab},
    load::Message,
    names,
    report::{Errors, Report},
    tables,
};
use anyhow::{bail, ensure};
use domain::{
    stream::{AccountId, Payload},
    topology::Topology,
};
use rustix::process::Signal;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};
use storage::{leases, streams, streams::Layout};

/// How the stream is divided at first.
const SHARDS: i32 = 4;

/// How long anything may take that happens meanwhile.
const LIMIT: Duration = Duration::from_secs(60);

/// What happens while a part of the load is being worked off.
#[derive(Clone, Copy)]
enum Trouble {
    Add,
    Kill,
    Freeze,
    Reshard(i32),
}

/// One for each part of the load.
const TROUBLES: [Trouble; 5] = [Trouble::Add, Trouble::Kill, Trouble::Freeze, Trouble::Reshard(8), Trouble::Reshard(3)];

pub(super) fn run(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    lab.be_guest()?;
    let layout = Layout { shards: SHARDS, queues: SHARDS };
    lab.database.transaction(|conn| tables::make_stream(conn, names::STREAM, layout))?;
    broker::declare(&mut lab.session, &Topology::stream(names::STREAM, SHARDS))?;
    lab.children.start("outbox-relay", "outbox-relay", Vec::new(), &[])?;
    for id in 1..=2 {
        start(lab, id)?;
    }
    await_members(lab, 2)?;

    let messages = lab.messages();
    let mut published = 0;
    for (part, trouble) in TROUBLES.into_iter().enumerate() {
        let part = part_of(&messages, lab.options.messages as usize, part);
        append(lab, &part)?;
        published += part.len() as u64;
        // So that some events are in hand, and others wait.
        let waiting = if part.is_empty() { 0 } else { await_first(lab, published - part.len() as u64)? };
        let what = make(lab, trouble, published)?;
        report.saw(format!("{what} while {waiting} events were under way"));
        lab.await_effects("consuming", published)?;
    }
    lab.children.all_run()?;

    let counts = lab.counts()?;
    let errors = Errors::of(&counts);
    report.published = published;
    report.effects = lab.effects()? as i64;
    report.errors = Some(errors);
    let waiting = tables::waiting(&mut *lab.database.connection()?, names::STREAM)?;
    let deliveries = balances::deliveries(&mut *lab.database.connection()?, &lab.users())?;
    let mut last = BTreeMap::new();
    let moves = deliveries
        .iter()
        .filter(|seen| last.insert(seen.user_id, seen.consumer_id).is_some_and(|id| id != seen.consumer_id));
    let moves = moves.count();
    report.saw(format!(
        "{} of {published} messages took effect, by {} consumers; users passed from one to another {moves} times, and each \
         time their balance was as the message before had left it",
        report.effects,
        counts.len()
    ));
    report.figure("moves", moves as f64);
    let expected: BTreeSet<_> = totals(&messages).into_iter().collect();
    let values: BTreeSet<_> = balances::values(&mut *lab.database.connection()?, &lab.users())?.into_iter().collect();
    report.expect(errors == Errors::NONE, "the stream let a message overtake another");
    report.expect(report.effects == published as i64 && waiting == 0, "not every message took effect once");
    report.expect(values == expected, "the balances aren't what was produced");
    report.expect(moves > 0, "no user has passed from one consumer to another: nothing was put to the test");
    Ok(report)
}

/// What each user's balance is to be.
fn totals(messages: &[Message]) -> BTreeMap<i64, i64> {
    messages.iter().map(|message| (message.user_id, message.expected_value)).collect()
}

/// A fifth of each user's messages, user by user.
fn part_of(messages: &[Message], each: usize, part: usize) -> Vec<Message> {
    let of = |index: usize| index % each * TROUBLES.len() / each;
    messages.iter().enumerate().filter(|(index, _)| of(*index) == part).map(|(_, message)| message.clone()).collect()
}

fn start(lab: &mut Lab, id: u32) -> anyhow::Result<()> {
    let consumer = Consumer { queue: None, ..lab.consumer(Strategy::Sequenced, id, "") };
    lab.start(&consumer)
}

/// Appends the messages as a producer does, and leaves the rest to the relay.
fn append(lab: &Lab, messages: &[Message]) -> anyhow::Result<()> {
    let event = |message: &Message| {
        let key = AccountId::parse(&message.user_id.to_string()).expect("a number is an account id");
        let payload = serde_json::to_string(message).expect("numbers and times can be written as JSON");
        (key, Payload::parse(payload).expect("it's JSON"))
    };
    let events: Vec<_> = messages.iter().map(event).collect();
    lab.database.transaction(|conn| streams::append(conn, names::STREAM, &events, None))?;
    Ok(())
}

/// Awaits the first effect beyond so many, and returns how many events are still to take effect.
fn await_first(lab: &mut Lab, beyond: u64) -> anyhow::Result<i64> {
    let end = Instant::now() + LIMIT;
    while lab.effects()? <= beyond {
        lab.children.all_run()?;
        ensure!(Instant::now() < end, "no event has taken effect within {LIMIT:?}");
        lab.interrupt.sleep(Duration::from_millis(1))?;
    }
    Ok(tables::waiting(&mut *lab.database.connection()?, names::STREAM)?)
}

/// Awaits that so many consumers share the stream.
fn await_members(lab: &mut Lab, count: usize) -> anyhow::Result<()> {
    let end = Instant::now() + LIMIT;
    while leases::members(&mut *lab.database.connection()?, crate::SERVICE)?.len() != count {
        lab.children.all_run()?;
        ensure!(Instant::now() < end, "there aren't {count} consumers after {LIMIT:?}");
        lab.interrupt.sleep(Duration::from_millis(10))?;
    }
    Ok(())
}

/// Makes trouble, and sees it through; says what it was.
fn make(lab: &mut Lab, trouble: Trouble, published: u64) -> anyhow::Result<String> {
    Ok(match trouble {
        Trouble::Add => {
            for id in 3..=4 {
                start(lab, id)?;
            }
            await_members(lab, 4)?;
            "two consumers were added".into()
        }
        Trouble::Kill => {
            lab.children.kill("consumer-1")?;
            lab.await_effects("consuming after a kill", published)?;
            await_members(lab, 3)?;
            "one was killed".into()
        }
        Trouble::Freeze => {
            let since = Instant::now();
            lab.children.signal("consumer-2", Signal::STOP)?;
            lab.await_effects("consuming while one is frozen", published)?;
            // The others know that it's gone.
            await_members(lab, 2)?;
            // It goes on with what it had in hand, which is through.
            let frozen = since.elapsed();
            lab.children.signal("consumer-2", Signal::CONT)?;
            await_members(lab, 3)?;
            format!("one was frozen for {frozen:.1?}, until its leases had run out, and went on")
        }
        Trouble::Reshard(shards) => {
            let arguments = ["reshard", "--stream", names::STREAM, "--shards", &shards.to_string()].map(str::to_owned);
            lab.children.start("fleetctl", "fleetctl", arguments.into(), &[])?;
            let end = Instant::now() + LIMIT;
            loop {
                match lab.children.ended()?.first() {
                    Some((name, status)) if name == "fleetctl" && status.success() => {
                        lab.children.wait_end("fleetctl", GRACE)?;
                        break;
                    }
                    Some((name, status)) => bail!("{name} has ended: {status}"),
                    None => {}
                }
                ensure!(Instant::now() < end, "resharding takes longer than {LIMIT:?}");
                lab.interrupt.sleep(Duration::from_millis(10))?;
            }
            format!("the stream was divided into {shards} shards")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load;

    #[test]
    fn the_parts_are_the_whole_load_in_order() {
        for each in [1, 3, 10, 11] {
            let messages = load::messages(1, 0..4, each, 1);
            let mut parts: Vec<_> =
                (0..TROUBLES.len()).flat_map(|part| part_of(&messages, each as usize, part)).collect();
            let times = |user, messages: &[Message]| {
                let own = messages.iter().filter(|message| message.user_id == user);
                own.map(|message| message.processed_at).collect::<Vec<_>>()
            };
            for user in 0..4 {
                assert_eq!(times(user, &parts), times(user, &messages), "{each} messages");
            }
            parts.sort_by_key(|message| (message.user_id, message.processed_at));
            assert_eq!(parts, messages);
        }
    }
}
