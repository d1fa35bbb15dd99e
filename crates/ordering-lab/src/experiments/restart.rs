//! Whether a consistent-hash exchange sends keys to the same queues after a restart of the broker, which makes its mapping
//! anew: from bindings in whatever order it finds them.

use crate::{
    lab::Lab,
    load, produce,
    report::{Report, Verdict},
};
use anyhow::{anyhow, ensure};
use broker::{Consumer, Publisher, Session};
use domain::topology::{Binding, Exchange, ExchangeKind, Expiry, Queue, Topology};
use harness::PrivateRabbitmq;
use rand::{SeedableRng as _, rngs::SmallRng, seq::SliceRandom as _};
use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

const QUEUES: u32 = 10;
const KEYS: u32 = 2000;

/// How long messages may take to come.
const LIMIT: Duration = Duration::from_secs(60);

pub(super) fn run(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    if !PrivateRabbitmq::is_installed() {
        report.verdict = Verdict::Skipped("RabbitMQ's package isn't installed here, so no node can be started".into());
        report.saw("nothing: it takes a broker node of its own");
        return Ok(report);
    }
    lab.progress.step("starting a node", 4);
    let mut node = PrivateRabbitmq::new();
    node.try_start().map_err(|why| anyhow!(why))?;
    lab.interrupt.check()?;

    let mut shuffled: Vec<u32> = (1..=QUEUES).collect();
    shuffled.shuffle(&mut SmallRng::seed_from_u64(lab.options.seed));
    if shuffled.is_sorted() {
        shuffled.reverse();
    }
    let sides = [
        ("in order", bound("lab.restart.sorted", (1..=QUEUES).collect())),
        ("out of order", bound("lab.restart.shuffled", shuffled)),
    ];
    let mut before = Vec::new();
    for (index, (_, topology)) in sides.iter().enumerate() {
        before.push(map(lab, &node, topology)?);
        lab.progress.reached(index as u64 + 1);
    }
    lab.progress.step("restarting the node", 4);
    node.stop();
    node.try_start().map_err(|why| anyhow!(why))?;
    let mut moved = Vec::new();
    for (index, ((order, topology), before)) in sides.iter().zip(&before).enumerate() {
        let after = map(lab, &node, topology)?;
        lab.progress.reached(index as u64 + 3);
        let count = before.iter().filter(|(key, queue)| after.get(*key) != Some(*queue)).count();
        let share = count as f64 / f64::from(KEYS);
        report.saw(format!("queues bound {order}: {:.1} % of {KEYS} keys moved", 100.0 * share));
        moved.push(share);
    }
    report.published = 4 * u64::from(KEYS);
    report.figure("moved_in_order", moved[0]);
    report.figure("moved_out_of_order", moved[1]);
    for (share, order) in moved.iter().zip(["in order", "out of order"]) {
        if *share > 0.0 {
            report.anomaly(format!("{:.0} % of the keys moved, queues bound {order}", 100.0 * share));
        }
    }
    report.expect_of_broker(moved[0] == 0.0, "keys moved though the queues were bound in order");
    report.expect_of_broker(moved[1] > 0.0, "no key moved though the queues were bound out of order");
    Ok(report)
}

/// An exchange with queues that are bound in this order.
fn bound(exchange: &str, order: Vec<u32>) -> Topology {
    let name = |number: u32| format!("{exchange}.{number:02}");
    Topology {
        exchanges: vec![Exchange { name: exchange.into(), kind: ExchangeKind::ConsistentHash }],
        queues: (1..=QUEUES).map(|number| Queue { name: name(number), expiry: Expiry::Never }).collect(),
        bindings: order
            .into_iter()
            .map(|number| Binding { exchange: exchange.into(), queue: name(number), routing_key: "1".into() })
            .collect(),
    }
}

/// Which queue each key goes to: declares what isn't there, publishes a message for each key, and takes them out.
fn map(lab: &Lab, node: &PrivateRabbitmq, topology: &Topology) -> anyhow::Result<BTreeMap<String, Arc<str>>> {
    let mut settings = lab.settings.broker.clone();
    settings.url = node.url().into();
    broker::declare(&mut Session::open(&settings, crate::SERVICE)?, topology)?;
    let users = lab.options.offset..lab.options.offset + i64::from(KEYS);
    let exchange = &topology.exchanges[0].name;
    let messages = load::messages(lab.options.seed, users, 1, 1);
    let envelopes: Vec<_> = messages.iter().map(|message| load::envelope(exchange, message, None)).collect();
    produce::publish(&mut Publisher::new(&settings, crate::SERVICE), &envelopes)?;

    let queues = topology.queues.iter().map(|queue| queue.name.clone()).collect();
    let mut consumer = Consumer::new(&settings, crate::SERVICE, queues, 500);
    let mut mapped = BTreeMap::new();
    let end = Instant::now() + LIMIT;
    while mapped.len() < envelopes.len() {
        lab.interrupt.check()?;
        ensure!(Instant::now() < end, "{} of {} messages came within {LIMIT:?}", mapped.len(), envelopes.len());
        let batch = consumer.next_batch(500, Duration::ZERO, Duration::from_millis(200))?;
        for delivery in &batch.deliveries {
            mapped.insert(delivery.routing_key.clone(), delivery.queue.clone());
        }
        consumer.ack(batch);
    }
    consumer.close(Instant::now() + Duration::from_secs(5));
    Ok(mapped)
}
