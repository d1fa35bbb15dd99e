//! The processes of an experiment. However the lab ends, none of them outlives it.

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    env,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How long a process may take to end that was asked to.
const GRACE: Duration = Duration::from_secs(5);

struct Process {
    name: String,
    child: Child,
    program: PathBuf,
    arguments: Vec<String>,
    variables: Vec<(&'static str, String)>,
}

/// The processes by name.
pub(crate) struct Children {
    folder: PathBuf,
    logs: PathBuf,
    variables: Vec<(&'static str, String)>,
    processes: Vec<Process>,
}

impl Children {
    /// None yet. Their logs go to a folder, a file each.
    pub(crate) fn new(logs: &Path, variables: Vec<(&'static str, String)>) -> anyhow::Result<Self> {
        fs::create_dir_all(logs).with_context(|| format!("can't make the folder {}", logs.display()))?;
        let own = env::current_exe().context("can't tell where this program is")?;
        let folder = own.parent().context("this program is in no folder")?.to_owned();
        Ok(Self { folder, logs: logs.to_owned(), variables, processes: Vec::new() })
    }

    /// Starts a program of this build: one that lies beside this one.
    pub(crate) fn start(
        &mut self,
        name: &str,
        program: &str,
        arguments: Vec<String>,
        variables: &[(&'static str, String)],
    ) -> anyhow::Result<()> {
        let path = self.folder.join(program);
        ensure!(path.exists(), "{} isn't there: build the workspace's binaries first", path.display());
        let variables = self.variables.iter().chain(variables).cloned().collect();
        let _ = fs::remove_file(self.log_path(name));
        self.spawn(name.to_owned(), path, arguments, variables)
    }

    fn spawn(
        &mut self,
        name: String,
        program: PathBuf,
        arguments: Vec<String>,
        variables: Vec<(&'static str, String)>,
    ) -> anyhow::Result<()> {
        let log =
            File::options().append(true).create(true).open(self.log_path(&name)).context("can't open a log file")?;
        let child = Command::new("setpriv")
            // Not one that can be put off: it may be frozen when the lab crashes.
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&program)
            .args(&arguments)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .env("MURMURATION__HEALTH__PORT", "0")
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("can't share a log file")?)
            .stderr(log)
            // Ctrl-C at a terminal is for the lab, which then ends them.
            .process_group(0)
            .spawn()
            .with_context(|| format!("can't start {name}"))?;
        self.processes.push(Process { name, child, program, arguments, variables });
        Ok(())
    }

    fn log_path(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// The end of what a process has written.
    fn log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.log_path(name)).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    /// Takes out those that have ended.
    pub(crate) fn ended(&mut self) -> anyhow::Result<Vec<(String, ExitStatus)>> {
        let mut ended = Vec::new();
        let mut index = 0;
        while index < self.processes.len() {
            match self.processes[index].child.try_wait().context("can't look after a process")? {
                Some(status) => ended.push((self.processes.remove(index).name, status)),
                None => index += 1,
            }
        }
        Ok(ended)
    }

    /// # Errors
    /// When one has ended that nobody asked to.
    pub(crate) fn all_run(&mut self) -> anyhow::Result<()> {
        match self.ended()?.first() {
            Some((name, status)) => bail!("{name} has ended ({status}):\n{}", self.log(name)),
            None => Ok(()),
        }
    }

    /// Starts again those that have ended with one of these statuses, as a supervisor does, and answers how many.
    ///
    /// # Errors
    /// When one has ended otherwise.
    pub(crate) fn restart_ended(&mut self, statuses: &[i32]) -> anyhow::Result<u64> {
        let mut again = Vec::new();
        let mut index = 0;
        while index < self.processes.len() {
            let Some(status) = self.processes[index].child.try_wait().context("can't look after a process")? else {
                index += 1;
                continue;
            };
            let process = self.processes.remove(index);
            let expected = status.code().is_some_and(|code| statuses.contains(&code));
            ensure!(expected, "{} has ended ({status}):\n{}", process.name, self.log(&process.name));
            again.push(process);
        }
        let count = again.len() as u64;
        for Process { name, program, arguments, variables, .. } in again {
            self.spawn(name, program, arguments, variables)?;
        }
        Ok(count)
    }

    /// Sends a signal.
    pub(crate) fn signal(&mut self, name: &str, signal: Signal) -> anyhow::Result<()> {
        let process = self.processes.iter().find(|process| process.name == name);
        let process = process.with_context(|| format!("{name} doesn't run"))?;
        let pid = i32::try_from(process.child.id()).ok().and_then(Pid::from_raw).context("an impossible pid")?;
        kill_process(pid, signal).context("can't send a signal")
    }

    /// Ends a process as `kill -9` does.
    pub(crate) fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let index = self.processes.iter().position(|process| process.name == name);
        let mut process = self.processes.remove(index.with_context(|| format!("{name} doesn't run"))?);
        process.child.kill().context("can't kill a process")?;
        process.child.wait().context("can't reap a process")?;
        Ok(())
    }

    /// Asks all to end, and kills those that don't in time.
    pub(crate) fn stop(&mut self) {
        let names: Vec<_> = self.processes.iter().map(|process| process.name.clone()).collect();
        for name in &names {
            // A frozen process heeds no request to stop.
            let _ = self.signal(name, Signal::CONT);
            let _ = self.signal(name, Signal::TERM);
        }
        let end = Instant::now() + GRACE;
        for mut process in self.processes.drain(..) {
            while process.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < end {
                thread::sleep(Duration::from_millis(5));
            }
            // It has ended, or does now.
            let _ = process.child.kill();
            let _ = process.child.wait();
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.stop();
    }
}
