//! How far an experiment is, on the standard error stream: a bar on a terminal, else a line every few seconds.

use indicatif::{ProgressBar, ProgressStyle};
use std::{
    io::{self, IsTerminal as _},
    time::{Duration, Instant},
};

const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// One experiment's.
pub(crate) struct Progress {
    bar: ProgressBar,
    name: String,
    doing: String,
    last_line: Instant,
    drawn: bool,
}

impl Progress {
    pub(crate) fn new(name: &str) -> Self {
        let drawn = io::stderr().is_terminal();
        let bar = if drawn { ProgressBar::new(1) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}").expect("the template is valid");
        let mut progress = Self {
            bar: bar.with_style(style),
            name: name.into(),
            doing: String::new(),
            last_line: Instant::now(),
            drawn,
        };
        progress.step("preparing", 1);
        progress
    }

    /// What is being done now, and of how many pieces it is.
    pub(crate) fn step(&mut self, doing: &str, total: u64) {
        self.doing = doing.into();
        self.bar.set_message(format!("{}: {doing}", self.name));
        self.bar.set_length(total);
        self.reached(0);
    }

    /// How many pieces are done.
    pub(crate) fn reached(&mut self, count: u64) {
        self.bar.set_position(count);
        if !self.drawn && self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            eprintln!("{}: {}, {count} of {}", self.name, self.doing, self.bar.length().unwrap_or(0));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
