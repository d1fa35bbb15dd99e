//! A fleet of real processes of its own, for benchmarks and for tests that kill and freeze them.

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    collections::{BTreeMap, HashSet},
    env, fs,
    fs::File,
    iter,
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Every service of the fleet, in the order in which they're started.
pub const SERVICES: [&str; 10] = [
    "api-gateway",
    "outbox-relay",
    "dead-letter-recorder",
    "follower-importer",
    "feed-fanout",
    "feed-updater",
    "email-notifier",
    "sms-notifier",
    "event-processor",
    "message-recorder",
];

/// Which process of a fleet: the service's name and a number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(pub &'static str, pub u32);

struct Process {
    child: Child,
    settings: Vec<(String, String)>,
}

impl Process {
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
    fn memory(&self, name: &Name, field: &str) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).and_then(|number| number.parse::<u64>().ok());
        Ok(kib.with_context(|| format!("{} {} has ended, or the kernel tells no memory", name.0, name.1))? * 1024)
    }
}

/// Processes that end with this value, and at the latest with the thread that started them, however that ends.
pub struct Fleet {
    binaries: PathBuf,
    logs: PathBuf,
    settings: Vec<(String, String)>,
    gateway_port: u16,
    _reserved: UdpSocket,
    processes: BTreeMap<Name, Process>,
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

/// A port that is free at this moment, below those that the kernel takes for outgoing connections: so it'll still be
/// free when a killed process starts again. Nobody else who looks for one likewise takes it as long as the socket holds
/// it for UDP.
fn free_port() -> anyhow::Result<(u16, UdpSocket)> {
    let mut random = iter::repeat_with(|| rand::random_range(20_000..30_000)).take(1000);
    let free = |port: u16| {
        let reserved = UdpSocket::bind(("127.0.0.1", port)).ok()?;
        TcpListener::bind(("127.0.0.1", port)).ok()?;
        Some((port, reserved))
    };
    random.find_map(free).context("no port is free")
}

impl Fleet {
    /// No process yet. Their logs go to a folder, a file each.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub fn new(database_url: &str, amqp_url: &str, logs: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(logs).with_context(|| format!("can't make the folder {}", logs.display()))?;
        let (gateway_port, reserved) = free_port()?;
        let settings = [
            ("MURMURATION__DATABASE__URL", database_url.to_owned()),
            ("MURMURATION__BROKER__URL", amqp_url.to_owned()),
            ("MURMURATION__API_GATEWAY__PORT", gateway_port.to_string()),
        ];
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(5)))
            .http_status_as_error(false)
            .build();
        Ok(Self {
            binaries: binaries()?,
            logs: logs.to_owned(),
            settings: settings.map(|(name, value)| (name.to_owned(), value)).into(),
            gateway_port,
            _reserved: reserved,
            processes: BTreeMap::new(),
            agent: agent.into(),
        })
    }

    /// A setting for every process that is started from now on.
    pub fn set(&mut self, variable: &str, value: &str) {
        self.settings.retain(|(name, _)| name != variable);
        self.settings.push((variable.into(), value.into()));
    }

    /// The gateway's address.
    pub fn gateway_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.gateway_port)
    }

    /// Starts one more process of a service.
    ///
    /// # Errors
    /// When its binary isn't there.
    pub fn start(&mut self, service: &'static str, settings: &[(&str, &str)]) -> anyhow::Result<Name> {
        let number = self.processes.keys().filter(|name| name.0 == service).map(|name| name.1 + 1).max().unwrap_or(0);
        let name = Name(service, number);
        let mut all = self.settings.clone();
        all.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        self.spawn(name.clone(), all)?;
        Ok(name)
    }

    fn spawn(&mut self, name: Name, settings: Vec<(String, String)>) -> anyhow::Result<()> {
        let binary = self.binaries.join(name.0);
        ensure!(binary.exists(), "{} isn't there: build the workspace's binaries first", binary.display());
        let log =
            File::options().append(true).create(true).open(self.log_path(&name)).context("can't open a log file")?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "--"])
            .arg(binary)
            .envs(settings.iter().map(|(name, value)| (name, value)))
            // Whichever is free at that moment.
            .env("MURMURATION__HEALTH__PORT", "0")
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("can't share a log file")?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("can't start {}", name.0))?;
        self.processes.insert(name, Process { child, settings });
        Ok(())
    }

    /// Starts one process of each service.
    ///
    /// # Errors
    /// When a binary isn't there.
    pub fn start_all(&mut self) -> anyhow::Result<()> {
        SERVICES.into_iter().try_for_each(|service| self.start(service, &[]).map(drop))
    }

    /// The processes, running or not.
    pub fn names(&self) -> Vec<Name> {
        self.processes.keys().cloned().collect()
    }

    /// Awaits that every process says that it's ready.
    ///
    /// # Errors
    /// When one isn't in time, or has ended.
    pub fn wait_ready(&mut self, limit: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + limit;
        for name in self.names() {
            while self.health(&name, "/health/ready")?.is_none_or(|(status, _)| status != 200) {
                if let Some(status) = self.process(&name)?.child.try_wait().context("can't look after a process")? {
                    bail!("{} {} has ended: {status}; see its log in {}", name.0, name.1, self.logs.display());
                }
                let logs = self.logs.display();
                let late = Instant::now() > end;
                ensure!(!late, "{} {} isn't ready after {limit:?}; see its log in {logs}", name.0, name.1);
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// What a process answers to a health check: the status, and the text. `None` where nobody answers.
    ///
    /// # Errors
    /// When there's no such process.
    pub fn health(&mut self, name: &Name, path: &str) -> anyhow::Result<Option<(u16, String)>> {
        let Some(port) = self.process(name)?.port() else { return Ok(None) };
        let answer = self.agent.get(format!("http://127.0.0.1:{port}{path}")).call().ok();
        Ok(answer.and_then(|mut answer| Some((answer.status().as_u16(), answer.body_mut().read_to_string().ok()?))))
    }

    /// What a process has logged, over all its lives.
    ///
    /// # Errors
    /// When it has never been started.
    pub fn log(&self, name: &Name) -> anyhow::Result<String> {
        let path = self.log_path(name);
        fs::read_to_string(&path).with_context(|| format!("can't read {}", path.display()))
    }

    fn log_path(&self, Name(service, number): &Name) -> PathBuf {
        self.logs.join(format!("{service}-{number}.log"))
    }

    fn process(&mut self, name: &Name) -> anyhow::Result<&mut Process> {
        self.processes.get_mut(name).with_context(|| format!("there is no {} {}", name.0, name.1))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When there's no such process.
    pub fn signal(&mut self, name: &Name, signal: Signal) -> anyhow::Result<()> {
        let process = self.process(name)?;
        if process.child.try_wait().context("can't look after a process")?.is_none() {
            let pid = i32::try_from(process.child.id()).ok().and_then(Pid::from_raw).context("an impossible pid")?;
            kill_process(pid, signal).context("can't send a signal")?;
        }
        Ok(())
    }

    /// Kills a process as `kill -9` does, and starts it again.
    ///
    /// # Errors
    /// When there's no such process.
    pub fn kill_and_restart(&mut self, name: &Name) -> anyhow::Result<()> {
        let process = self.process(name)?;
        process.child.kill().context("can't kill a process")?;
        process.child.wait().context("can't reap a process")?;
        let settings = process.settings.clone();
        self.spawn(name.clone(), settings)
    }

    /// Starts again those that have ended, as a supervisor does; answers which, and how they had ended.
    ///
    /// # Errors
    /// When a binary isn't there.
    pub fn restart_ended(&mut self) -> anyhow::Result<Vec<(Name, ExitStatus)>> {
        let mut ended = Vec::new();
        for (name, process) in &mut self.processes {
            if let Some(status) = process.child.try_wait().context("can't look after a process")? {
                ended.push((name.clone(), status));
            }
        }
        for (name, _) in &ended {
            let settings = self.process(name)?.settings.clone();
            self.spawn(name.clone(), settings)?;
        }
        Ok(ended)
    }

    /// Asks a process to stop, as a supervisor does, and awaits that it has.
    ///
    /// # Errors
    /// When it doesn't in time; it's killed then.
    pub fn stop(&mut self, name: &Name, limit: Duration) -> anyhow::Result<ExitStatus> {
        self.signal(name, Signal::TERM)?;
        self.wait_end(name, limit)
    }

    /// Awaits that a process ends that was asked to, and forgets it.
    ///
    /// # Errors
    /// When it doesn't in time; it's killed then.
    pub fn wait_end(&mut self, name: &Name, limit: Duration) -> anyhow::Result<ExitStatus> {
        let Some(mut process) = self.processes.remove(name) else { bail!("there is no {} {}", name.0, name.1) };
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = process.child.try_wait().context("can't look after a process")? {
                return Ok(status);
            }
            if Instant::now() > end {
                process.child.kill().context("can't kill a process")?;
                process.child.wait().context("can't reap a process")?;
                bail!("{} {} hadn't stopped after {limit:?}", name.0, name.1);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops every process of a service.
    ///
    /// # Errors
    /// When one doesn't stop in time.
    pub fn stop_service(&mut self, service: &str) -> anyhow::Result<()> {
        let names: Vec<Name> = self.names().into_iter().filter(|name| name.0 == service).collect();
        names.iter().try_for_each(|name| self.stop(name, Duration::from_secs(30)).map(drop))
    }

    /// The resident memory of each process, in bytes.
    ///
    /// # Errors
    /// When a process has ended, or there is no `/proc`.
    pub fn resident_bytes(&self) -> anyhow::Result<Vec<(Name, u64)>> {
        let resident = |(name, process): (&Name, &Process)| Ok((name.clone(), process.memory(name, "VmRSS:")?));
        self.processes.iter().map(resident).collect()
    }

    /// The most resident memory that a process has had so far, in bytes.
    ///
    /// # Errors
    /// When there's no such process, it has ended, or there is no `/proc`.
    pub fn peak_resident_bytes(&self, name: &Name) -> anyhow::Result<u64> {
        let process = self.processes.get(name).with_context(|| format!("there is no {} {}", name.0, name.1))?;
        process.memory(name, "VmHWM:")
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        let names = self.names();
        for name in &names {
            // A frozen process heeds no request to stop.
            let _ = self.signal(name, Signal::CONT);
            let _ = self.signal(name, Signal::TERM);
        }
        for name in &names {
            if let Err(error) = self.stop(name, Duration::from_secs(10)) {
                log::warn!("{error:#}");
            }
        }
    }
}
