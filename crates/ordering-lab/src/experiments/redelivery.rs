//! A consumer that ends between its effect and the acknowledgement: the message comes again, and so does the effect, unless
//! that is idempotent.

use crate::{
    consume::{Consumer, FAILED, Strategy},
    lab::{GRACE, Lab},
    load::Fault,
    report::{Errors, Report},
};
use anyhow::ensure;
use domain::topology::ExchangeKind;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use std::{collections::BTreeSet, time::Duration};

/// How often the consumer ends.
const CRASHES: usize = 5;

/// How a part ended.
struct Part {
    effects: u64,
    repeated: i64,
    restarts: u64,
    errors: Errors,
}

pub(super) fn run(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    let published = lab.messages().len() as u64;
    let plain = part(lab, false)?;
    let doubled = plain.effects.saturating_sub(published);
    report.saw(format!(
        "a consumer that ended {} times between effect and acknowledgement: {} effects of {published} messages, {doubled} \
         doubled; {} order errors, {} value errors",
        plain.restarts, plain.effects, plain.errors.order, plain.errors.value
    ));
    lab.clean()?;
    lab.forget_users()?;
    let idempotent = part(lab, true)?;
    report.saw(format!(
        "the same with an idempotent effect: ended {} times, {} effects of {published} messages, {} came again and changed \
         nothing; {} order errors, {} value errors",
        idempotent.restarts,
        idempotent.effects,
        idempotent.repeated,
        idempotent.errors.order,
        idempotent.errors.value
    ));
    report.published = 2 * published;
    report.effects = (plain.effects + idempotent.effects) as i64;
    report.errors = Some(plain.errors);
    report.figure("doubled", doubled as f64);
    report.figure("doubled_idempotent", idempotent.effects.saturating_sub(published) as f64);
    report.figure("repeated_idempotent", idempotent.repeated as f64);
    report.expect(doubled > 0 && plain.errors.order > 0, "no effect was doubled");
    report.expect(
        idempotent.effects == published && idempotent.errors == Errors::NONE && idempotent.repeated > 0,
        "the idempotent effect took place more than once, or wasn't tried",
    );
    Ok(report)
}

fn part(lab: &mut Lab, idempotent: bool) -> anyhow::Result<Part> {
    let queue = lab.queues(1, 1);
    lab.declare(ExchangeKind::Fanout, &queue)?;
    lab.bind(&queue)?;
    let messages = lab.messages();
    let mut random = SmallRng::seed_from_u64(lab.options.seed);
    let crashes: BTreeSet<usize> = (0..CRASHES).map(|_| random.random_range(0..messages.len())).collect();
    lab.start(&Consumer { idempotent, ..lab.consumer(Strategy::Competing, 1, &queue[0]) })?;
    lab.await_consumers(&queue, 1)?;
    lab.publish(&messages, |index| crashes.contains(&index).then_some(Fault::AfterEffect))?;

    let doing = if idempotent { "consuming, idempotently" } else { "consuming" };
    let mut restarts = 0;
    let patience = Duration::from_secs(60);
    // The last message's effect may be one that comes again, so the queue has to be empty as well.
    loop {
        let reached = lab.watch(doing, messages.len() as u64, patience, |children| {
            restarts += children.restart_ended_with(&[FAILED])?;
            Ok(())
        })?;
        ensure!(reached, "no message has taken effect for {patience:?}");
        restarts += lab.children.restart_ended_with(&[FAILED])?;
        let counts = lab.counts()?;
        let handled: i64 = counts.iter().map(|counted| counted.applied + counted.repeated).sum();
        if handled as u64 >= (messages.len() + crashes.len()) as u64 {
            break;
        }
        lab.interrupt.sleep(Duration::from_millis(10))?;
    }
    let counts = lab.counts()?;
    let part = Part {
        effects: lab.effects()?,
        repeated: counts.iter().map(|counted| counted.repeated).sum(),
        restarts,
        errors: Errors::of(&counts),
    };
    lab.children.stop_all(GRACE);
    Ok(part)
}
