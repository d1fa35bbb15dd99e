//! What was seen, as text, as a table and as JSON.

use crate::balances::Counted;
use crate::experiment::Experiment;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::{self, Write},
    time::Duration,
};

/// Errors, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Errors {
    pub(crate) order: i64,
    pub(crate) value: i64,
    pub(crate) consumer: i64,
}

impl Errors {
    pub(crate) const NONE: Self = Self { order: 0, value: 0, consumer: 0 };

    /// Those of some consumers.
    pub(crate) fn of<'a>(counted: impl IntoIterator<Item = &'a Counted>) -> Self {
        counted.into_iter().fold(Self::NONE, |errors, counted| Self {
            order: errors.order + counted.order_errors,
            value: errors.value + counted.value_errors,
            consumer: errors.consumer + counted.consumer_errors,
        })
    }
}

/// Whether what was seen is what was to be seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict", content = "because")]
pub(crate) enum Verdict {
    AsExpected,
    /// The lab's own claim doesn't hold.
    NotAsExpected(String),
    /// This version of the broker does otherwise, which is a result too.
    OtherwiseOnThisBroker(String),
    Skipped(String),
}

/// What an experiment has shown.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) experiment: Experiment,
    pub(crate) seed: u64,
    /// Messages produced.
    pub(crate) published: u64,
    /// Effects that they had.
    pub(crate) effects: i64,
    /// `None` where the experiment isn't about them.
    pub(crate) errors: Option<Errors>,
    pub(crate) took_ms: u64,
    #[serde(flatten)]
    pub(crate) verdict: Verdict,
    /// What the broker did that one may not have thought of.
    pub(crate) anomalies: Vec<String>,
    /// What was seen, in sentences.
    pub(crate) seen: Vec<String>,
    /// The numbers in them.
    pub(crate) figures: BTreeMap<&'static str, f64>,
}

impl Report {
    pub(crate) fn new(experiment: Experiment, seed: u64) -> Self {
        Self {
            experiment,
            seed,
            published: 0,
            effects: 0,
            errors: None,
            took_ms: 0,
            verdict: Verdict::AsExpected,
            anomalies: Vec::new(),
            seen: Vec::new(),
            figures: BTreeMap::new(),
        }
    }

    pub(crate) fn saw(&mut self, what: impl Into<String>) {
        self.seen.push(what.into());
    }

    pub(crate) fn anomaly(&mut self, what: impl Into<String>) {
        self.anomalies.push(what.into());
    }

    pub(crate) fn figure(&mut self, name: &'static str, value: f64) {
        self.figures.insert(name, value);
    }

    /// What must hold, whatever the broker's version; the first thing that doesn't is the verdict.
    pub(crate) fn expect(&mut self, holds: bool, otherwise: impl Into<String>) {
        if !holds && !self.failed() {
            self.verdict = Verdict::NotAsExpected(otherwise.into());
        }
    }

    /// What is expected of the broker, whose version may do otherwise.
    pub(crate) fn expect_of_broker(&mut self, holds: bool, otherwise: impl Into<String>) {
        if !holds && self.verdict == Verdict::AsExpected {
            self.verdict = Verdict::OtherwiseOnThisBroker(otherwise.into());
        }
    }

    /// Whether the lab's own claim doesn't hold.
    pub(crate) fn failed(&self) -> bool {
        matches!(self.verdict, Verdict::NotAsExpected(_))
    }

    fn verdict(&self) -> String {
        match &self.verdict {
            Verdict::AsExpected => "as expected".into(),
            Verdict::NotAsExpected(because) => format!("NOT as expected: {because}"),
            Verdict::OtherwiseOnThisBroker(because) => {
                format!("not as expected on this broker, because {because}")
            }
            Verdict::Skipped(because) => format!("skipped: {because}"),
        }
    }

    /// What it saw, line by line.
    pub(crate) fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        let seconds = Duration::from_millis(self.took_ms).as_secs_f64();
        writeln!(out, "{} (seed {}, {seconds:.1} s)", self.experiment, self.seed)?;
        for line in &self.seen {
            writeln!(out, "  {line}")?;
        }
        if let Some(Errors { order, value, consumer }) = self.errors {
            writeln!(out, "  errors: {order} of order, {value} of value, {consumer} of consumer")?;
        }
        for line in &self.anomalies {
            writeln!(out, "  the broker: {line}")?;
        }
        writeln!(out, "  {}", self.verdict())
    }
}

/// One line for each experiment.
pub(crate) fn table(out: &mut dyn Write, reports: &[Report]) -> io::Result<()> {
    let rows: Vec<[String; 7]> = reports
        .iter()
        .map(|report| {
            let count =
                |of: fn(&Errors) -> i64| report.errors.as_ref().map_or("-".into(), |errors| of(errors).to_string());
            let verdict = match report.verdict {
                Verdict::AsExpected => "as expected",
                Verdict::NotAsExpected(_) => "NOT as expected",
                Verdict::OtherwiseOnThisBroker(_) => "otherwise on this broker",
                Verdict::Skipped(_) => "skipped",
            };
            let anomalies = match report.anomalies.join("; ") {
                none if none.is_empty() => "-".into(),
                some => some,
            };
            [
                report.experiment.to_string(),
                count(|errors| errors.order),
                count(|errors| errors.value),
                count(|errors| errors.consumer),
                format!("{:.1} s", Duration::from_millis(report.took_ms).as_secs_f64()),
                verdict.into(),
                anomalies,
            ]
        })
        .collect();
    let header = ["experiment", "order", "value", "consumer", "time", "verdict", "broker anomalies"].map(str::to_owned);
    let width =
        |column: usize| rows.iter().chain([&header]).map(|row| row[column].chars().count()).max().unwrap_or_default();
    for row in [&header].into_iter().chain(&rows) {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = if column + 1 == row.len() { 0 } else { width(column) };
            // Numbers to the right, so that they can be compared.
            if (1..=4).contains(&column) { format!("{cell:>width$}") } else { format!("{cell:width$}") }
        });
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  "))?;
    }
    Ok(())
}
