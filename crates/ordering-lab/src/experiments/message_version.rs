//! Consumers are added while messages wait, and the new ones turn newer messages away until the old ones are through with the
//! older ones: what that costs, and what it still gets wrong.

use crate::balances::{self, Counted};
use crate::{
    consume::Strategy,
    lab::{Children, GRACE, Lab},
    load,
    report::{Errors, Report},
};
use domain::topology::{ExchangeKind, Expiry};
use std::{collections::BTreeMap, time::Duration};

/// Further deliveries after which RabbitMQ 4 drops a message from a quorum queue, unless told otherwise.
const USUAL_LIMIT: i32 = 20;

/// How a part ended.
struct Part {
    published: u64,
    effects: u64,
    turned_away: i64,
    errors: Errors,
    /// All messages took effect.
    through: bool,
    /// Messages that are nowhere any more.
    lost: u64,
}

pub(super) fn run(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);

    let patient = part(lab, None, false)?;
    report.saw(format!(
        "no limit of deliveries: {} of {} messages took effect, and {} deliveries were turned away ({} a message); \
         errors: {} of order, {} of value, {} of consumer",
        patient.effects,
        patient.published,
        patient.turned_away,
        rate(&patient),
        patient.errors.order,
        patient.errors.value,
        patient.errors.consumer
    ));
    if !patient.through {
        report.anomaly("livelock even so: an old consumer got no newer message");
    }
    let limited = part(lab, Some(USUAL_LIMIT), false)?;
    report.saw(format!(
        "a limit of {USUAL_LIMIT} deliveries, RabbitMQ 4's own: {} of {} messages took effect, {} are lost, {} wait",
        limited.effects,
        limited.published,
        limited.lost,
        limited.published - limited.effects - limited.lost
    ));
    if limited.lost > 0 {
        report.anomaly(format!("{} messages lost at the delivery limit", limited.lost));
    }
    let starved = part(lab, None, true)?;
    report.saw(format!(
        "consumer 1 gets no newer message: {} of {} took effect, then none for {:?}, while {} deliveries were turned away",
        starved.effects,
        starved.published,
        lab.patience(),
        starved.turned_away
    ));
    if !starved.through {
        report.anomaly("livelock: a consumer that gets no newer message never raises its version");
    }

    report.published = patient.published + limited.published + starved.published;
    report.effects = (patient.effects + limited.effects + starved.effects) as i64;
    report.errors = Some(patient.errors);
    report.figure("turned_away", patient.turned_away as f64);
    report.figure("lost_at_delivery_limit", limited.lost as f64);
    report.figure("turned_away_in_livelock", starved.turned_away as f64);
    report.expect(
        patient.errors.order == 0 && patient.errors.value == 0,
        "messages were out of order, though newer ones were turned away",
    );
    report.expect(patient.turned_away > 0, "no message was turned away");
    report.expect(!starved.through, "the messages went through, though an old consumer never came to the new version");
    report.expect_of_broker(
        limited.lost > 0,
        "it doesn't count messages that were given back as delivered, or the old consumers were done at once",
    );
    Ok(report)
}

fn rate(part: &Part) -> String {
    format!("{:.1}", part.turned_away as f64 / part.published.max(1) as f64)
}

/// One load: a half of it, then as many consumers more, then the other half. If the first consumer is to `starve`, its users
/// get the first half alone.
fn part(lab: &mut Lab, limit: Option<i32>, starve: bool) -> anyhow::Result<Part> {
    lab.clean()?;
    lab.forget_users()?;
    let consumers = lab.options.consumers;
    let (old, new) = (lab.queues(1, consumers), lab.queues(consumers + 1, consumers));
    let all = [old.clone(), new.clone()].concat();
    lab.declare(ExchangeKind::ConsistentHash, &old)?;
    lab.declare_with(ExchangeKind::ConsistentHash, &new, &limit.map_or(Expiry::Never, Expiry::LoseAfter))?;
    lab.bind(&old)?;
    lab.start_each(Strategy::MessageVersion, 1, &all)?;

    let (first, mut second) = load::halves(lab.messages(), lab.options.messages);
    lab.publish(&first, |_| None)?;
    if starve {
        // Which users are the first consumer's shows when it has had their messages.
        lab.await_effects("consuming the first half", first.len() as u64)?;
        let deliveries = balances::deliveries(&mut *lab.database.connection()?, &lab.users())?;
        let owners: BTreeMap<i64, i32> = deliveries.iter().map(|seen| (seen.user_id, seen.consumer_id)).collect();
        second.retain(|message| owners.get(&message.user_id) != Some(&1));
    }
    lab.bind(&new)?;
    lab.publish(&second, |_| None)?;
    let published = (first.len() + second.len()) as u64;
    let doing = match (limit, starve) {
        (_, true) => "waiting in a livelock",
        (Some(_), _) => "consuming with a delivery limit",
        (None, _) => "consuming",
    };
    let patience = lab.patience();
    let through = lab.watch(doing, published, patience, Children::all_run)?;
    let effects = lab.effects()?;
    let counts = lab.counts()?;
    lab.children.stop_all(GRACE);
    // Whoever had a message in hand has given it back by now, or it's gone.
    let left = settled(lab, &all)?;
    Ok(Part {
        published,
        effects,
        turned_away: counts.iter().map(|counted: &Counted| counted.turned_away).sum(),
        errors: Errors::of(&counts),
        through,
        lost: (published - effects).saturating_sub(left),
    })
}

/// How many messages are in the queues once nobody consumes them any more.
fn settled(lab: &mut Lab, queues: &[String]) -> anyhow::Result<u64> {
    while lab.depths(queues)?.iter().any(|queue| queue.consumers > 0) {
        lab.interrupt.sleep(Duration::from_millis(10))?;
    }
    lab.ready(queues)
}
