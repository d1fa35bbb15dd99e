//! What a consumer has been sent ahead comes to another one when it fails, after what that one has been sent ahead.

use crate::balances::{self, Delivered};
use crate::{
    consume::{Consumer, FAILED, Strategy},
    lab::{GRACE, Lab},
    load::{Fault, Message},
    report::{Errors, Report},
};
use anyhow::ensure;
use domain::topology::ExchangeKind;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

const PREFETCH: u16 = 30;

pub(super) fn run(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    let queue = lab.queues(1, 1);
    lab.declare(ExchangeKind::Fanout, &queue)?;
    lab.bind(&queue)?;
    let messages = lab.messages();
    // Early enough that both have all of their prefetch when one comes to it.
    let poison = SmallRng::seed_from_u64(lab.options.seed).random_range(8..16).min(messages.len() - 1);
    for id in 1..=2 {
        lab.start(&Consumer { prefetch: PREFETCH, ..lab.consumer(Strategy::Competing, id, &queue[0]) })?;
    }
    lab.await_consumers(&queue, 2)?;
    lab.publish(&messages, |index| (index == poison).then_some(Fault::Fail))?;
    lab.progress.step("waiting until both have failed", 2);
    let failed = await_failures(lab)?;
    ensure!(failed.len() == 2, "only {} of 2 consumers failed", failed.len());

    let index: BTreeMap<_, _> = messages.iter().enumerate().map(|(index, message)| (key(message), index)).collect();
    let deliveries = balances::deliveries(&mut *lab.database.connection()?, &lab.users())?;
    let order = |id: i32| -> Vec<usize> {
        let own = deliveries.iter().filter(|seen| seen.consumer_id == id);
        own.filter_map(|seen| index.get(&(seen.user_id, seen.processed_at)).copied()).collect()
    };
    let failures: Vec<&Delivered> = deliveries.iter().filter(|seen| seen.outcome == "failed").collect();
    let at: Vec<usize> =
        failures.iter().filter_map(|seen| index.get(&(seen.user_id, seen.processed_at)).copied()).collect();
    let mut longest = 0;
    let mut jumps = 0;
    for id in 1..=2 {
        for pair in order(id).windows(2) {
            if pair[1] < pair[0] {
                jumps += 1;
                longest = longest.max(pair[0] - pair[1]);
            }
        }
    }
    report.saw(format!(
        "consumer {} failed at message {} of {}, and what it had been sent ahead went to consumer {}",
        failures.first().map_or(0, |seen| seen.consumer_id),
        poison + 1,
        messages.len(),
        failures.get(1).map_or(0, |seen| seen.consumer_id),
    ));
    report.saw(format!(
        "that one went back by up to {longest} messages ({jumps} jumps), and failed at message {}",
        at.last().map_or(0, |at| at + 1)
    ));
    report.expect(at == [poison, poison], "the two consumers didn't fail at the same message");
    report.expect(jumps > 0, "no consumer's messages went back");

    // The program is mended, and works off what is left.
    let third = Consumer { prefetch: PREFETCH, ignore_faults: true, ..lab.consumer(Strategy::Competing, 3, &queue[0]) };
    lab.start(&third)?;
    lab.await_effects("working off the rest", messages.len() as u64)?;
    let errors = Errors::of(&lab.counts()?);
    report.saw(format!(
        "a consumer that doesn't fail there worked off the rest, with {} order errors in all",
        errors.order
    ));
    report.expect(errors.order > 0, "no message was out of order in the end");
    report.published = messages.len() as u64;
    report.effects = lab.effects()? as i64;
    report.errors = Some(errors);
    report.figure("jumps", jumps as f64);
    report.figure("longest_jump", longest as f64);
    Ok(report)
}

fn key(message: &Message) -> (i64, chrono::DateTime<chrono::Utc>) {
    (message.user_id, message.processed_at)
}

/// Waits until both consumers have ended, as those do that fail.
fn await_failures(lab: &mut Lab) -> anyhow::Result<Vec<String>> {
    let limit = Duration::from_secs(60) + 100 * lab.options.work.longest();
    let end = Instant::now() + limit;
    let mut failed = Vec::new();
    while failed.len() < 2 && Instant::now() < end {
        for (name, status) in lab.children.ended()? {
            ensure!(status.code() == Some(FAILED), "{name} has ended: {status}");
            lab.children.wait_end(&*name, GRACE)?;
            failed.push(name);
        }
        lab.progress.reached(failed.len() as u64);
        lab.interrupt.sleep(Duration::from_millis(10))?;
    }
    Ok(failed)
}
