//! Consumers that share a queue: the broker hands each the next message, and nobody knows who will be done first.

use crate::{
    consume::Strategy,
    lab::Lab,
    report::{Errors, Report},
};
use domain::topology::ExchangeKind;

pub(super) fn run(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    let queue = lab.queues(1, 1);
    lab.declare(ExchangeKind::Fanout, &queue)?;
    lab.bind(&queue)?;
    let consumers = lab.options.consumers;
    for id in 1..=consumers {
        lab.start(&lab.consumer(Strategy::Competing, id, &queue[0]))?;
    }
    lab.await_consumers(&queue, consumers)?;
    let messages = lab.messages();
    lab.publish(&messages, |_| None)?;
    lab.await_effects("consuming", messages.len() as u64)?;

    let errors = Errors::of(&lab.counts()?);
    report.published = messages.len() as u64;
    report.effects = lab.effects()? as i64;
    report.errors = Some(errors);
    report.saw(format!("{} messages through one queue, {consumers} consumers on it", messages.len()));
    if consumers == 1 {
        report.expect(errors == Errors::NONE, "one consumer alone has put messages out of order");
    } else {
        report.expect(errors.order > 0, "no message was out of order");
        report.expect(errors.value > 0, "every balance was the expected one");
    }
    Ok(report)
}
