//! What was measured, as a table for people and as JSON.

use anyhow::Context as _;
use serde::Serialize;
use std::{fmt::Write as _, fs, path::Path};

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Figure {
    /// What it is.
    pub what: String,
    /// Its number.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
    /// What it must reach, where something is asked for.
    pub asked: Option<&'static str>,
    /// Whether it does.
    pub reached: Option<bool>,
    /// What it was put together from.
    pub detail: String,
}

/// The machine and the servers.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_gib: f64,
    pub kernel: String,
    pub postgres: String,
    pub build: &'static str,
}

impl Machine {
    pub(super) fn this(postgres: String) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib: f64 = memory.trim_end_matches(" kB").parse().unwrap_or(0.0);
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_gib: (kib / 1024.0 / 1024.0 * 10.0).round() / 10.0,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            postgres,
            build: if cfg!(debug_assertions) { "debug" } else { "release" },
        }
    }
}

/// Everything of one run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub benchmark: &'static str,
    pub at: String,
    pub machine: Machine,
    pub figures: Vec<Figure>,
}

/// Four significant digits, or a whole number.
fn number(value: f64) -> String {
    match value.abs() {
        1000.0.. => format!("{value:.0}"),
        100.0.. => format!("{value:.1}"),
        10.0.. => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

impl Report {
    pub(super) fn to_markdown(&self) -> String {
        let Machine { cpu, cores, memory_gib, kernel, postgres, build } = &self.machine;
        let mut text = format!(
            "`make bench BENCH={}`, {}: {cpu}, {cores} cores, {memory_gib} GiB, Linux {kernel}, PostgreSQL {postgres}, \
             {build} build\n\n| what | figure | asked | | from |\n|---|---|---|---|---|\n",
            self.benchmark, self.at
        );
        for Figure { what, value, unit, asked, reached, detail } in &self.figures {
            let mark = match reached {
                Some(true) => "reached",
                Some(false) => "**missed**",
                None => "",
            };
            let value = number(*value);
            let asked = asked.unwrap_or("reported");
            writeln!(text, "| {what} | {value} {unit} | {asked} | {mark} | {detail} |")
                .expect("writing to a string can't fail");
        }
        text
    }

    /// Writes `<benchmark>.md` and `<benchmark>.json`.
    pub(super) fn write(&self, folder: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("can't make the folder {}", folder.display()))?;
        let json = serde_json::to_string_pretty(self).context("can't put the report into JSON")?;
        for (ending, text) in [("md", self.to_markdown()), ("json", json + "\n")] {
            let path = folder.join(format!("{}.{ending}", self.benchmark));
            fs::write(&path, text).with_context(|| format!("can't write {}", path.display()))?;
        }
        Ok(())
    }
}

/// The middle value; of an even number of them the mean of the middle two.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// Median with the smallest and the largest, for a figure's detail.
pub(super) fn spread(values: &[f64]) -> String {
    let min = values.iter().copied().fold(f64::INFINITY, f64::min);
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{} ({}–{})", number(median(values)), number(min), number(max))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
