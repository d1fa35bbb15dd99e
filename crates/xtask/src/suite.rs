//! The test binaries of the workspace, side by side. They wait more than they compute: for servers that they start or kill,
//! and for time limits.

use anyhow::{Context as _, ensure};
use serde_json::Value;
use std::{
    env, fmt,
    io::{self, Read as _, Seek as _, Write as _},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Instant,
};

/// These load the machine with whole fleets and kill their servers: one of them at a time, the longest first.
const HEAVY: [&str; 2] = ["crates/fleetctl/tests/fleet/main.rs", "crates/message-recorder/tests/recorder/main.rs"];

/// Of all others, these take a minute and more, and are begun first.
const LONG: [&str; 5] = [
    "crates/fleetctl/tests/fleetctl/main.rs",
    "crates/sequenced/tests/model/main.rs",
    "crates/ordering-lab/tests/lab/main.rs",
    "crates/broker/tests/broker.rs",
    "crates/worker/tests/worker/main.rs",
];

/// A bound against hanging, as `timeout` has it: several times what the longest binary takes by itself.
const LIMIT: &str = "30m";

/// One test binary, or all doc tests.
struct Job {
    /// What Cargo announces it by.
    title: String,
    /// The options of `cargo test` that run it alone.
    options: String,
    /// Of its `main`, below the root.
    source: String,
    command: Command,
}

struct Outcome {
    output: String,
    status: ExitStatus,
}

#[derive(Default)]
struct Totals {
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Tests by their names, and binaries that ended without saying which of their tests failed.
    failures: Vec<String>,
}

/// Builds the tests of the packages that these options of `cargo test` choose, and runs them. Prints each binary's output when
/// it has ended, and returns whether all passed.
pub(crate) fn run(options: &[String]) -> anyhow::Result<bool> {
    let begin = Instant::now();
    let mut jobs = build(options)?;
    jobs.push(doc_tests(options));
    jobs.sort_by_key(|job| HEAVY.iter().chain(&LONG).position(|first| job.source == *first).unwrap_or(usize::MAX));

    let jobs = Mutex::new(jobs);
    let totals = Mutex::new(Totals::default());
    // One thread begins with the heavy ones; the others, one for each core, take none of them.
    let work = &|any: bool| {
        let next = || {
            let mut jobs = lock(&jobs);
            let at = jobs.iter().position(|job| any || !HEAVY.contains(&&*job.source))?;
            Some(jobs.remove(at))
        };
        while let Some(mut job) = next() {
            let outcome = job.run()?;
            let mut totals = lock(&totals);
            totals.add(&job, &outcome);
            outcome.print(&job)?;
        }
        anyhow::Ok(())
    };
    let threads = 1 + thread::available_parallelism()?.get();
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|number| scope.spawn(move || work(number == 0))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("it has no panics"))
    })?;

    let totals = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    writeln!(io::stdout(), "{totals}; finished in {:.2}s", begin.elapsed().as_secs_f64())?;
    Ok(totals.failures.is_empty())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn build(options: &[String]) -> anyhow::Result<Vec<Job>> {
    let output = Command::new("cargo")
        .args(["test", "--no-run", "--message-format=json-render-diagnostics"])
        .args(options)
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(output.status.success(), "the tests can't be built");
    let messages = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    messages.filter_map(|message| message.map(|message| Job::of(&message)).transpose()).map(|job| Ok(job?)).collect()
}

fn doc_tests(options: &[String]) -> Job {
    let mut command = bounded("cargo");
    command.args(["test", "--doc", "--no-fail-fast"]).args(options);
    Job { title: "doc tests".into(), options: "--doc".into(), source: String::new(), command }
}

fn bounded(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--foreground", "--verbose", "--signal=KILL", LIMIT, program]);
    command
}

impl Job {
    /// The test binary that one of Cargo's messages says it has built.
    fn of(message: &Value) -> Option<Self> {
        let executable = message["executable"].as_str().filter(|_| message["profile"]["test"] == true)?;
        let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
        let root = env::current_dir().ok()?;
        let below = |path| Path::new(path).strip_prefix(&root).unwrap_or(Path::new(path)).display().to_string();
        let source = below(message["target"]["src_path"].as_str()?);
        let kind = message["target"]["kind"][0].as_str()?;
        let target = match kind {
            "lib" => "--lib".to_owned(),
            _ => format!("--{kind} {}", message["target"]["name"].as_str()?),
        };
        let title = format!("{}{source} ({})", if kind == "test" { "" } else { "unittests " }, below(executable));
        let mut command = bounded(executable);
        command.current_dir(folder).env("CARGO_MANIFEST_DIR", folder);
        Some(Self { title, options: format!("-p {} {target}", folder.file_name()?.display()), source, command })
    }

    fn run(&mut self) -> anyhow::Result<Outcome> {
        // No pipe, which a process that outlives the binary would keep open.
        let mut file = tempfile::tempfile()?;
        let command = self.command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file.try_clone()?);
        let status = command.status().with_context(|| format!("cannot run {}", self.title))?;
        let mut output = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut output)?;
        Ok(Outcome { output: String::from_utf8_lossy(&output).into_owned(), status })
    }
}

impl Totals {
    fn add(&mut self, job: &Job, outcome: &Outcome) {
        for line in outcome.output.lines().filter(|line| line.starts_with("test result: ")) {
            let words: Vec<_> = line.split([' ', ';']).collect();
            for pair in words.windows(2) {
                let count = pair[0].parse::<u64>().unwrap_or(0);
                match pair[1] {
                    "passed" => self.passed += count,
                    "failed" => self.failed += count,
                    "ignored" => self.ignored += count,
                    _ => {}
                }
            }
        }
        if !outcome.status.success() {
            let named: Vec<_> = outcome.failures().map(|test| format!("{} {test}", job.options)).collect();
            if named.is_empty() {
                self.failed += 1;
                self.failures.push(format!("{}: {}", job.options, outcome.status));
            }
            self.failures.extend(named);
        }
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, ignored, failures } = self;
        for failure in failures {
            writeln!(f, "failed: cargo test {failure}")?;
        }
        let verdict = if failures.is_empty() { "ok" } else { "FAILED" };
        write!(f, "test result: {verdict}. {passed} passed; {failed} failed; {ignored} ignored")
    }
}

impl Outcome {
    /// libtest's lists of those that failed, at the end of its output.
    fn failures(&self) -> impl Iterator<Item = &str> {
        let lists = self.output.split("\nfailures:\n").skip(1);
        lists.flat_map(|list| list.lines().map_while(|line| line.strip_prefix("    ")))
    }

    fn print(&self, job: &Job) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "     Running {}\n{}", job.title, self.output)?;
        if !self.status.success() {
            writeln!(out, "error: test failed ({}), to rerun pass `{}`\n", self.status, job.options)?;
        }
        Ok(out.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_named_are_there() {
        let missing: Vec<_> =
            HEAVY.iter().chain(&LONG).filter(|path| !Path::new("../..").join(path).exists()).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
