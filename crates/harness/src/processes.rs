//! Processes of this build's programs. None of them outlives the program that started them, however that ends.

use crate::signal;
use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal};
use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashSet},
    env,
    fmt::Display,
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How often to look whether a process has ended.
const POLL: Duration = Duration::from_millis(5);

struct Process {
    child: Child,
    program: String,
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
}

/// Processes, each under a name of its own.
pub struct Processes<N> {
    binaries: PathBuf,
    logs: PathBuf,
    variables: Vec<(String, String)>,
    processes: BTreeMap<N, Process>,
    agent: ureq::Agent,
}

/// The folder of this build's binaries: where this executable is, or, for a test, the folder above.
///
/// # Errors
/// When this process doesn't know where it came from.
pub fn binaries() -> anyhow::Result<PathBuf> {
    let own = env::current_exe().context("can't tell where this program is")?;
    let folder = own.parent().context("this program is in no folder")?;
    Ok(if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder }.to_owned())
}

impl Process {
    fn pid(&self) -> anyhow::Result<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("an impossible pid")
    }

    fn status(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        self.child.try_wait().context("can't look after a process")
    }

    fn kill(&mut self) -> anyhow::Result<ExitStatus> {
        self.child.kill().context("can't kill a process")?;
        self.child.wait().context("can't reap a process")
    }

    /// Where it answers health checks: the one port that it listens on. `None` if there's none yet.
    fn port(&self) -> Option<u16> {
        const LISTENING: &str = "0A";
        let files = fs::read_dir(format!("/proc/{}/fd", self.child.id())).ok()?.flatten();
        let targets: HashSet<_> = files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
        let sockets = fs::read_to_string(format!("/proc/{}/net/tcp", self.child.id())).ok()?;
        sockets.lines().skip(1).find_map(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let [_, local, _, state, _, _, _, _, _, inode, ..] = fields[..] else { return None };
            let own = state == LISTENING && targets.contains(Path::new(&format!("socket:[{inode}]")));
            own.then(|| u16::from_str_radix(local.rsplit(':').next()?, 16).ok()).flatten()
        })
    }

    /// What the kernel says of its memory, in bytes.
    fn memory(&self, field: &str) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
    }
}

impl<N: Clone + Display + Ord> Processes<N> {
    /// None yet. Their logs go to a folder, a file each; those of an earlier run are removed.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub fn new(logs: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(logs).with_context(|| format!("can't make the folder {}", logs.display()))?;
        for entry in fs::read_dir(logs).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                let _ = fs::remove_file(entry.path());
            }
        }
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(5)))
            .http_status_as_error(false)
            .build();
        Ok(Self {
            binaries: binaries()?,
            logs: logs.to_owned(),
            // Whichever is free at that moment.
            variables: vec![("MURMURATION__HEALTH__PORT".into(), "0".into())],
            processes: BTreeMap::new(),
            agent: agent.into(),
        })
    }

    /// A variable for every process that is started from now on.
    pub fn set(&mut self, variable: &str, value: &str) {
        self.variables.retain(|(name, _)| name != variable);
        self.variables.push((variable.into(), value.into()));
    }

    /// Starts a program of this build.
    ///
    /// # Errors
    /// When its binary isn't there.
    pub fn start(
        &mut self,
        name: impl Into<N>,
        program: &str,
        arguments: Vec<String>,
        variables: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        let mut all = self.variables.clone();
        all.extend(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self.spawn(name.into(), program.to_owned(), arguments, all)
    }

    fn spawn(
        &mut self,
        name: N,
        program: String,
        arguments: Vec<String>,
        variables: Vec<(String, String)>,
    ) -> anyhow::Result<()> {
        let binary = self.binaries.join(&program);
        ensure!(binary.exists(), "{} isn't there: build the workspace's binaries first", binary.display());
        let log =
            File::options().append(true).create(true).open(self.log_path(&name)).context("can't open a log file")?;
        let child = Command::new("setpriv")
            // Not a signal that can be put off: it may be frozen when this program crashes.
            .args(["--pdeathsig", "KILL", "--"])
            .arg(binary)
            .args(&arguments)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("can't share a log file")?)
            .stderr(log)
            // Ctrl-C at a terminal is for this program, which then ends them.
            .process_group(0)
            .spawn()
            .with_context(|| format!("can't start {name}"))?;
        self.processes.insert(name, Process { child, program, arguments, variables });
        Ok(())
    }

    /// The processes, running or not.
    pub fn names(&self) -> Vec<N> {
        self.processes.keys().cloned().collect()
    }

    fn process<Q: Display + Ord + ?Sized>(&self, name: &Q) -> anyhow::Result<&Process>
    where
        N: Borrow<Q>,
    {
        self.processes.get(name).with_context(|| format!("there is no {name}"))
    }

    fn process_mut<Q: Display + Ord + ?Sized>(&mut self, name: &Q) -> anyhow::Result<&mut Process>
    where
        N: Borrow<Q>,
    {
        self.processes.get_mut(name).with_context(|| format!("there is no {name}"))
    }

    /// Where a process writes its log to.
    pub fn log_path(&self, name: &N) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// What a process has logged, over all its lives.
    ///
    /// # Errors
    /// When it has never been started.
    pub fn log(&self, name: &N) -> anyhow::Result<String> {
        let path = self.log_path(name);
        fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))
    }

    /// What a process answers to a health check: the status, and the text. `None` where nobody answers.
    ///
    /// # Errors
    /// When there's no such process.
    pub fn health(&self, name: &N, path: &str) -> anyhow::Result<Option<(u16, String)>> {
        let Some(port) = self.process(name)?.port() else { return Ok(None) };
        let answer = self.agent.get(format!("http://127.0.0.1:{port}{path}")).call().ok();
        Ok(answer.and_then(|mut answer| Some((answer.status().as_u16(), answer.body_mut().read_to_string().ok()?))))
    }

    /// Awaits that every process says that it's ready.
    ///
    /// # Errors
    /// When one isn't in time, or has ended.
    pub fn wait_ready(&mut self, limit: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + limit;
        for name in self.names() {
            while self.health(&name, "/health/ready")?.is_none_or(|(status, _)| status != 200) {
                let log = self.log_path(&name);
                if let Some(status) = self.process_mut(&name)?.status()? {
                    bail!("{name} has ended: {status}; see its log in {}", log.display());
                }
                ensure!(Instant::now() < end, "{name} isn't ready after {limit:?}; see its log in {}", log.display());
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Sends a signal; one that has ended needs none.
    ///
    /// # Errors
    /// When there's no such process.
    pub fn signal<Q: Display + Ord + ?Sized>(&mut self, name: &Q, sent: Signal) -> anyhow::Result<()>
    where
        N: Borrow<Q>,
    {
        let process = self.process_mut(name)?;
        if process.status()?.is_none() {
            signal(process.pid()?, sent);
        }
        Ok(())
    }

    /// Those that have ended, and how.
    ///
    /// # Errors
    /// When the kernel doesn't tell.
    pub fn ended(&mut self) -> anyhow::Result<Vec<(N, ExitStatus)>> {
        let mut ended = Vec::new();
        for (name, process) in &mut self.processes {
            ended.extend(process.status()?.map(|status| (name.clone(), status)));
        }
        Ok(ended)
    }

    /// # Errors
    /// When one has ended that nobody asked to.
    pub fn all_run(&mut self) -> anyhow::Result<()> {
        match self.ended()?.first() {
            Some((name, status)) => bail!("{name} has ended ({status}):\n{}", self.last_lines(name)),
            None => Ok(()),
        }
    }

    /// The end of what a process has written.
    fn last_lines(&self, name: &N) -> String {
        let text = self.log(name).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }

    /// Starts again those that have ended, as a supervisor does, and returns which, and how they had ended.
    ///
    /// # Errors
    /// When a binary isn't there.
    pub fn restart_ended(&mut self) -> anyhow::Result<Vec<(N, ExitStatus)>> {
        let ended = self.ended()?;
        ended.iter().try_for_each(|(name, _)| self.restart(name))?;
        Ok(ended)
    }

    /// The same for those that have ended with one of these statuses; returns how many.
    ///
    /// # Errors
    /// When one has ended otherwise.
    pub fn restart_ended_with(&mut self, statuses: &[i32]) -> anyhow::Result<u64> {
        for (name, status) in self.ended()? {
            let expected = status.code().is_some_and(|code| statuses.contains(&code));
            ensure!(expected, "{name} has ended ({status}):\n{}", self.last_lines(&name));
        }
        Ok(self.restart_ended()?.len() as u64)
    }

    /// Kills a process as `kill -9` does, and starts it again.
    ///
    /// # Errors
    /// When there's no such process.
    pub fn kill_and_restart(&mut self, name: &N) -> anyhow::Result<()> {
        self.process_mut(name)?.kill()?;
        self.restart(name)
    }

    fn restart(&mut self, name: &N) -> anyhow::Result<()> {
        let Process { program, arguments, variables, .. } = self.take(name)?;
        self.spawn(name.clone(), program, arguments, variables)
    }

    fn take<Q: Display + Ord + ?Sized>(&mut self, name: &Q) -> anyhow::Result<Process>
    where
        N: Borrow<Q>,
    {
        self.processes.remove(name).with_context(|| format!("there is no {name}"))
    }

    /// Kills a process as `kill -9` does, and forgets it.
    ///
    /// # Errors
    /// When there's no such process.
    pub fn kill<Q: Display + Ord + ?Sized>(&mut self, name: &Q) -> anyhow::Result<()>
    where
        N: Borrow<Q>,
    {
        self.take(name)?.kill().map(drop)
    }

    /// Asks a process to stop, as a supervisor does, and awaits that it has.
    ///
    /// # Errors
    /// When it doesn't in time; it's killed then.
    pub fn stop(&mut self, name: &N, limit: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(name, Signal::TERM)?;
        self.wait_end(name, limit)
    }

    /// Awaits that a process ends that was asked to, and forgets it.
    ///
    /// # Errors
    /// When it doesn't in time; it's killed then.
    pub fn wait_end<Q: Display + Ord + ?Sized>(&mut self, name: &Q, limit: Duration) -> anyhow::Result<ExitStatus>
    where
        N: Borrow<Q>,
    {
        let mut process = self.take(name)?;
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = process.status()? {
                return Ok(status);
            }
            if Instant::now() > end {
                process.kill()?;
                bail!("{name} hadn't stopped after {limit:?}");
            }
            thread::sleep(POLL);
        }
    }

    /// Asks all to stop, frozen ones too, and kills those that don't in time; returns why each of them was.
    pub fn stop_all(&mut self, limit: Duration) -> Vec<anyhow::Error> {
        let names = self.names();
        for name in &names {
            // A frozen process heeds no request to stop.
            let _ = self.signal(name, Signal::CONT);
            let _ = self.signal(name, Signal::TERM);
        }
        let end = Instant::now() + limit;
        names
            .iter()
            .filter_map(|name| self.wait_end(name, end.saturating_duration_since(Instant::now())).err())
            .collect()
    }

    /// A process's id.
    ///
    /// # Errors
    /// When there's no such process.
    pub fn pid(&self, name: &N) -> anyhow::Result<Pid> {
        self.process(name)?.pid()
    }

    /// The resident memory of each process, in bytes.
    ///
    /// # Errors
    /// When a process has ended, or there is no `/proc`.
    pub fn resident_bytes(&self) -> anyhow::Result<Vec<(N, u64)>> {
        self.names().into_iter().map(|name| Ok((name.clone(), self.memory(&name, "VmRSS:")?))).collect()
    }

    /// The most resident memory that a process has had so far, in bytes.
    ///
    /// # Errors
    /// When there's no such process, it has ended, or there is no `/proc`.
    pub fn peak_resident_bytes(&self, name: &N) -> anyhow::Result<u64> {
        self.memory(name, "VmHWM:")
    }

    fn memory(&self, name: &N, field: &str) -> anyhow::Result<u64> {
        let memory = self.process(name)?.memory(field);
        memory.with_context(|| format!("{name} has ended, or the kernel tells no memory"))
    }
}

impl<N> Drop for Processes<N> {
    fn drop(&mut self) {
        for process in self.processes.values_mut() {
            if process.status().is_ok_and(|status| status.is_none()) {
                let _ = process.kill();
            }
        }
    }
}
