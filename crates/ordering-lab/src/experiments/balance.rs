//! How evenly a consistent-hash exchange spreads keys, and whether the bindings' weights make it more even.

use crate::{lab::Lab, load, names, produce::MAX_OFFSET, report::Report};
use domain::topology::ExchangeKind;
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use std::time::{Duration, Instant};

const QUEUES: u32 = 10;
/// Keys, one message each.
const KEYS: u32 = 5000;
const WEIGHTS: [&str; 2] = ["1", "20"];

/// What is expected of keys that are thrown by lot: the standard deviation of a share, relative to its mean.
fn by_chance() -> f64 {
    (f64::from(QUEUES - 1) / f64::from(KEYS)).sqrt()
}

fn variation(counts: &[u32]) -> f64 {
    let mean = counts.iter().map(|count| f64::from(*count)).sum::<f64>() / counts.len() as f64;
    let squares = counts.iter().map(|count| (f64::from(*count) - mean).powi(2)).sum::<f64>();
    (squares / counts.len() as f64).sqrt() / mean
}

pub(super) fn run(lab: &mut Lab) -> anyhow::Result<Report> {
    let mut report = Report::new(lab.experiment, lab.options.seed);
    let queues = lab.queues(1, QUEUES);
    // Nobody has a balance by these: any users will do.
    let first = SmallRng::seed_from_u64(lab.options.seed).random_range(0..MAX_OFFSET);
    let users = first..first + i64::from(KEYS);
    let messages = load::messages(lab.options.seed, users, 1, 1);
    lab.progress.step("publishing", 2 * u64::from(KEYS));
    let mut variations = Vec::new();
    for (round, weight) in WEIGHTS.into_iter().enumerate() {
        lab.clean()?;
        lab.declare(ExchangeKind::ConsistentHash, &queues)?;
        broker::declare(&mut lab.session, &names::bindings(lab.experiment, &queues, weight))?;
        for chunk in messages.chunks(500) {
            lab.publish(chunk, |_| None)?;
        }
        lab.progress.reached((round as u64 + 1) * u64::from(KEYS));
        let end = Instant::now() + Duration::from_secs(60);
        let (counts, all) = loop {
            let counts: Vec<u32> = lab.depths(&queues)?.into_iter().map(|depth| depth.messages).collect();
            let all: u32 = counts.iter().sum();
            if all >= KEYS || Instant::now() >= end {
                break (counts, all);
            }
            lab.interrupt.sleep(Duration::from_millis(10))?;
        };
        report.expect(all == KEYS, format!("{all} of {KEYS} messages are in the queues"));
        let shares: Vec<_> =
            counts.iter().map(|count| format!("{:.1}", 100.0 * f64::from(*count) / f64::from(KEYS))).collect();
        let cv = variation(&counts);
        report.saw(format!(
            "weight {weight}: {} % of {KEYS} keys in each of {QUEUES} queues, coefficient of variation {:.1} %",
            shares.join(" "),
            100.0 * cv
        ));
        variations.push(cv);
    }
    let (one, twenty, chance) = (variations[0], variations[1], by_chance());
    report.published = 2 * u64::from(KEYS);
    report.figure("variation_weight_1", one);
    report.figure("variation_weight_20", twenty);
    report.figure("variation_by_chance", chance);
    // The coefficient itself varies by about a quarter with ten queues.
    let even = one < 2.0 * chance;
    report.saw(format!(
        "keys thrown by lot would vary by {:.1} %: {}",
        100.0 * chance,
        match (even, twenty < one / 2.0) {
            (true, _) => "weight 1 is as even as that, so a higher weight can't help",
            (false, true) => "weight 1 is worse than that, and a higher weight helps",
            (false, false) => "weight 1 is worse than that, and a higher weight doesn't help",
        }
    ));
    report.expect_of_broker(even || twenty < one / 2.0, "the keys aren't spread evenly, whatever the weights");
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_shares_dont_vary_and_uneven_ones_do() {
        assert_eq!(variation(&[5, 5, 5]), 0.0);
        assert!((variation(&[2, 4, 4, 4, 5, 5, 7, 9]) - 0.4).abs() < 1e-9);
    }
}
