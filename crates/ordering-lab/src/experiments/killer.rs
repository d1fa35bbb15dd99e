//! One message that never ends: it holds up its queue, then one consumer for ever, until there's a limit to the time and to the
//! attempts.

use crate::{
    consume::{EX_TEMPFAIL, Strategy},
    lab::{GRACE, Lab},
    load::{self, Fault},
    report::Report,
};
use anyhow::ensure;
use domain::topology::ExchangeKind;
use std::time::Duration;
use storage::dead_letters::{self, DeadLetter};

pub(super) fn run(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    let queue = lab.queues(1, 1);
    lab.be_guest()?;
    lab.declare(ExchangeKind::Fanout, &queue)?;
    lab.bind(&queue)?;

    // One consumer: nothing moves.
    let (first, second) = load::halves(lab.messages(), lab.options.messages);
    let others = first.len() as u64 - 1;
    lab.start(&lab.consumer(Strategy::Competing, 1, &queue[0]))?;
    lab.await_consumers(&queue, 1)?;
    lab.publish(&first, |index| (index == 0).then_some(Fault::Hang))?;
    lab.progress.step("watching the queue stand still", 1);
    while lab.ready(&queue)? != others {
        lab.interrupt.sleep(Duration::from_millis(10))?;
    }
    let still = Duration::from_millis(500) + 2 * lab.options.work.longest();
    lab.interrupt.sleep(still)?;
    let (stood, moved) = (waiting(lab, &queue)?, lab.effects()?);
    report.saw(format!("one consumer: {stood} messages waited behind the one that never ends, and {moved} of them took effect in {still:?}"));
    report.expect(stood == others && moved == 0, "the queue moved on behind a message that never ends");

    // Two: the second one goes on.
    lab.start(&lab.consumer(Strategy::Competing, 2, &queue[0]))?;
    lab.await_effects("going round the message", others)?;
    report.saw(format!("two consumers: the other one handled the {others} messages behind it"));
    lab.children.stop_all(GRACE);

    // With the fleet's loop: a limit of time, attempts on record, a dead letter.
    lab.children.start("dead-letter-recorder", "dead-letter-recorder", Vec::new(), &[])?;
    // Long enough for the others' commits on a busy machine.
    let limit = Duration::from_secs(1) + 2 * lab.options.work.longest();
    let consumer = lab.consumer(Strategy::Worker, 3, &queue[0]);
    let limit_ms = limit.as_millis().to_string();
    let variables = [("MURMURATION__WORKER__TIME_LIMIT_MS", &*limit_ms)];
    lab.children.start(consumer.name(), crate::SERVICE, consumer.arguments(), &variables)?;
    lab.publish(&second, |_| None)?;
    let all = others + second.len() as u64;
    let mut deaths = 0;
    let patience = Duration::from_secs(60) + 10 * limit;
    let reached = lab.watch("waiting for the time limit and the dead letter", all, patience, |children| {
        deaths += children.restart_ended_with(&[EX_TEMPFAIL])?;
        Ok(())
    })?;
    ensure!(reached, "the messages behind the one that never ends took no effect within {patience:?}");
    let letter = loop {
        deaths += lab.children.restart_ended_with(&[EX_TEMPFAIL])?;
        if let Some(letter) = dead_letter(lab, &queue[0])? {
            break letter;
        }
        lab.interrupt.sleep(Duration::from_millis(10))?;
    };
    report.saw(format!(
        "the fleet's worker with a time limit of {limit:?}: it ended {deaths} times, the message was set aside after {} \
         attempts (\"{}\"), and the other {all} took effect",
        letter.attempts, letter.error
    ));
    report.expect(deaths > 0, "no process ended at its time limit");
    report.expect(lab.ready(&queue)? == 0, "messages are left in the queue");
    report.published = (first.len() + second.len()) as u64;
    report.effects = lab.effects()? as i64;
    report.figure("stood_still", stood as f64);
    report.figure("deaths", deaths as f64);
    report.figure("attempts", f64::from(letter.attempts));
    Ok(report)
}

/// How many messages wait behind what the queue's consumer has.
fn waiting(lab: &mut Lab, queue: &[String]) -> anyhow::Result<u64> {
    loop {
        let depths = lab.depths(queue)?;
        // RabbitMQ answers with no message and no consumer where the queue keeps it waiting for too long.
        if depths.iter().all(|depth| depth.consumers > 0) {
            return Ok(depths.iter().map(|depth| u64::from(depth.messages)).sum());
        }
        lab.interrupt.sleep(Duration::from_millis(10))?;
    }
}

fn dead_letter(lab: &Lab, queue: &str) -> anyhow::Result<Option<DeadLetter>> {
    let mut conn = lab.database.connection()?;
    Ok(dead_letters::list(&mut conn, None, Some(queue), i64::MAX, 1)?.pop())
}
