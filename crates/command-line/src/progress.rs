//! How far a command is, on the standard error stream: a bar on a terminal, else a line every few seconds.

use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use std::{
    fmt,
    io::{self, IsTerminal as _},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// One piece of work. Threads may share it.
pub struct Progress {
    /// Counts even where it isn't drawn.
    bar: ProgressBar,
    what: String,
    /// When the last line was written; `None` where a bar is drawn.
    last_line: Option<Mutex<Instant>>,
}

impl Progress {
    /// Work of `total` pieces.
    pub fn new(what: &str, total: u64) -> Self {
        Self::start(what, Some(total), "{msg} {wide_bar} {human_pos}/{human_len}  {pace}  {eta}")
    }

    /// Work whose amount nobody knows.
    pub fn waiting(what: &str) -> Self {
        let progress = Self::start(what, None, "{spinner} {msg}");
        progress.bar.enable_steady_tick(Duration::from_millis(200));
        progress
    }

    fn start(what: &str, total: Option<u64>, template: &str) -> Self {
        let drawn = io::stderr().is_terminal();
        let bar = match (drawn, total) {
            (true, Some(total)) => ProgressBar::new(total),
            (true, None) => ProgressBar::new_spinner(),
            (false, _) => ProgressBar::hidden(),
        };
        if let Some(total) = total {
            bar.set_length(total);
        }
        let pace = |state: &ProgressState, text: &mut dyn fmt::Write| {
            // A bar that can't be drawn is no reason to end.
            let _ = write!(text, "{:.0}/s", state.per_sec());
        };
        let style = ProgressStyle::with_template(template).expect("the templates are valid").with_key("pace", pace);
        let bar = bar.with_style(style).with_message(what.to_owned());
        Self { bar, what: what.into(), last_line: (!drawn).then(|| Mutex::new(Instant::now())) }
    }

    /// So many more pieces are done.
    pub fn advance(&self, count: u64) {
        self.bar.inc(count);
        self.tell_position();
    }

    /// So many pieces are done in all.
    pub fn reached(&self, count: u64) {
        self.bar.set_position(count);
        self.tell_position();
    }

    /// What is being done now, from its first piece on, and of how many pieces it is.
    pub fn step(&self, doing: &str, total: u64) {
        self.bar.set_message(format!("{}: {doing}", self.what));
        self.bar.set_length(total);
        self.reached(0);
    }

    /// What is being done, or waited for, now.
    pub fn say(&self, detail: &str) {
        self.bar.set_message(format!("{}: {detail}", self.what));
        self.line(|| self.bar.message());
    }

    fn tell_position(&self) {
        self.line(|| {
            let (doing, count) = (self.bar.message(), self.bar.position());
            match self.bar.length() {
                Some(total) => format!("{doing}: {count} of {total}"),
                None => format!("{doing}: {count}"),
            }
        });
    }

    fn line(&self, text: impl FnOnce() -> String) {
        let Some(last) = &self.last_line else { return };
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() >= LINE_INTERVAL {
            *last = Instant::now();
            eprintln!("{}", text());
        }
    }

    /// Takes the bar away, and returns how many pieces are done and how long that took.
    pub fn finish(self) -> (u64, Duration) {
        (self.bar.position(), self.bar.elapsed())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
