//! A queue for each consumer, and an exchange that sends a user's messages always to the same one, until a queue is added.

use crate::balances::Counted;
use crate::{
    consume::Strategy,
    lab::Lab,
    load::{self, Message},
    report::{Errors, Report},
};
use domain::topology::ExchangeKind;

/// Nobody is added: each user's messages stay in one queue, which one consumer works off.
pub(super) fn consistent_hash(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    let queues = lab.queues(1, lab.options.consumers);
    lab.declare(ExchangeKind::ConsistentHash, &queues)?;
    lab.bind(&queues)?;
    lab.start_each(Strategy::ConsistentHash, 1, &queues)?;
    let messages = lab.messages();
    lab.publish(&messages, |_| None)?;
    lab.await_effects("consuming", messages.len() as u64)?;

    let counts = lab.counts()?;
    report.saw(format!("{} messages through {} queues: {}", messages.len(), queues.len(), shares(&counts)));
    conclude(lab, &mut report, messages.len(), &counts)?;
    report
        .expect(report.errors == Some(Errors::NONE), "one queue and one consumer for each user should keep the order");
    Ok(report)
}

/// As many consumers more, whose queues are bound while messages wait: their users' older messages are elsewhere.
pub(super) fn add_consumers(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    let (old, new, (first, second)) = prepare(lab)?;
    lab.publish(&first, |_| None)?;
    lab.bind(&new)?;
    let waiting = lab.ready(&old)?;
    lab.publish(&second, |_| None)?;
    let all = first.len() + second.len();
    lab.await_effects("consuming", all as u64)?;

    let counts = lab.counts()?;
    report.saw(format!(
        "{} of {} messages were waiting when {} queues were bound, then came {} more: {}",
        waiting,
        first.len(),
        new.len(),
        second.len(),
        shares(&counts)
    ));
    report.figure("waiting_when_bound", waiting as f64);
    conclude(lab, &mut report, all, &counts)?;
    let Errors { order, value, consumer } = report.errors.unwrap_or_default();
    report.expect(order > 0, "no message was out of order");
    report.expect(value > 0, "every balance was the expected one");
    report.expect(consumer > 0 || lab.options.tolerate_new, "no consumer has met another one's row");
    Ok(report)
}

/// The same when the queues are empty: users move to other consumers, which find everything as it should be.
pub(super) fn drain_first(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    let (old, new, (first, second)) = prepare(lab)?;
    lab.publish(&first, |_| None)?;
    lab.await_effects("draining", first.len() as u64)?;
    let waiting = lab.ready(&old)?;
    lab.bind(&new)?;
    lab.publish(&second, |_| None)?;
    let all = first.len() + second.len();
    lab.await_effects("consuming", all as u64)?;

    let counts = lab.counts()?;
    conclude(lab, &mut report, all, &counts)?;
    let Errors { order, value, consumer } = report.errors.unwrap_or_default();
    let by_the_first = Errors::of(of_the_first(&counts, lab.options.consumers)).consumer;
    report.saw(format!(
        "{} messages, then {} more when the queues were empty and {} more were bound: {}",
        first.len(),
        second.len(),
        new.len(),
        shares(&counts)
    ));
    report.saw(format!("with --tolerate-new, {by_the_first} of the consumer errors count"));
    report.figure("consumer_errors_tolerating_new", by_the_first as f64);
    report.expect(waiting == 0, "the queues weren't empty");
    report.expect(order == 0 && value == 0, "messages overtook others, though the queues were empty");
    report.expect(consumer > 0 || lab.options.tolerate_new, "no user has moved");
    report.expect_of_broker(by_the_first == 0, "users moved among the queues that were there before");
    Ok(report)
}

/// The two halves of each user's messages.
type Halves = (Vec<Message>, Vec<Message>);

/// Twice as many consumers as asked for, the queues of the first half of them bound: so that binding the others takes no
/// time.
fn prepare(lab: &mut Lab) -> anyhow::Result<(Vec<String>, Vec<String>, Halves)> {
    let consumers = lab.options.consumers;
    let (old, new) = (lab.queues(1, consumers), lab.queues(consumers + 1, consumers));
    let all = [old.clone(), new.clone()].concat();
    lab.declare(ExchangeKind::ConsistentHash, &all)?;
    lab.bind(&old)?;
    lab.start_each(Strategy::ConsistentHash, 1, &all)?;
    let halves = load::halves(lab.messages(), lab.options.messages);
    Ok((old, new, halves))
}

fn conclude(lab: &Lab, report: &mut Report, published: usize, counts: &[Counted]) -> anyhow::Result<()> {
    report.published = published as u64;
    report.effects = lab.effects()? as i64;
    report.errors = Some(Errors::of(counts));
    Ok(())
}

/// The counts of the consumers that were there first.
fn of_the_first(counts: &[Counted], consumers: u32) -> impl Iterator<Item = &Counted> {
    counts.iter().filter(move |counted| u32::try_from(counted.consumer_id).is_ok_and(|id| id <= consumers))
}

/// How many messages each consumer has had.
fn shares(counts: &[Counted]) -> String {
    let shares: Vec<_> = counts.iter().map(|counted| format!("{}: {}", counted.consumer_id, counted.applied)).collect();
    format!("by consumer {}", shares.join(", "))
}
