//! What servers of one's own are made of: processes, folders and ports that don't outlive the program that wanted them.

use crate::eventually;
use rustix::process::{Pid, Signal, geteuid, kill_process};
use std::{
    collections::HashMap,
    env, fs,
    io::{BufRead as _, BufReader},
    net::{TcpListener, UdpSocket},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
};
use uuid::Uuid;

/// A port that nobody has at this moment, below those that the kernel takes for outgoing connections: so it will still be
/// free when a killed server starts again. As long as the socket holds it for UDP, no other caller gets it, in whichever
/// process, and a server may have it for TCP.
pub(crate) fn reserve_port() -> (u16, UdpSocket) {
    let random = || u16::try_from(20_000 + Uuid::new_v4().as_u128() % 10_000).expect("it's below 30,000");
    let free = |_| {
        let port = random();
        let reserved = UdpSocket::bind(("127.0.0.1", port)).ok()?;
        TcpListener::bind(("127.0.0.1", port)).ok()?;
        Some((port, reserved))
    };
    (0..1000).find_map(free).expect("some port is free")
}

/// Such ports, until this program ends.
///
/// # Panics
/// When none is free.
pub fn free_ports<const N: usize>() -> [u16; N] {
    static RESERVED: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());
    [(); N].map(|()| {
        let (port, reserved) = reserve_port();
        RESERVED.lock().unwrap_or_else(PoisonError::into_inner).push(reserved);
        port
    })
}

/// As whom servers run that refuse to be root's.
pub fn as_user(user: &str, program: impl AsRef<Path>) -> Command {
    if !geteuid().is_root() {
        return Command::new(program.as_ref());
    }
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={user}"), &format!("--regid={user}"), "--init-groups", "--"]).arg(program.as_ref());
    command
}

/// A shell that does something at the latest when this program ends, in whatever way: it waits for the end of its own
/// input, which is a pipe from here.
struct Afterwards(Child);

impl Afterwards {
    /// The script finds the command's words in `$@`, and the folder in `$FOLDER`.
    fn run(script: &str, words: &Command, folder: &Path) -> Self {
        // When this program ends with a server frozen, the kernel hangs up on the server's process group.
        let script = format!("trap '' HUP; {script}");
        let shell = Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(words.get_program())
            .args(words.get_args())
            .envs(words.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env("FOLDER", folder)
            .current_dir("/")
            // Whoever interrupts this program at a terminal doesn't interrupt this.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("there's a shell");
        Self(shell)
    }
}

impl Drop for Afterwards {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// A folder of its own in the system's one for such, where any user can reach it.
pub struct Folder {
    path: PathBuf,
    _removed: Afterwards,
}

impl Folder {
    /// An empty one, whose name says `what` it's for.
    ///
    /// # Panics
    /// When it can't be made.
    pub fn new(what: &str) -> Self {
        let path = env::temp_dir().join(format!("murmuration-{what}-{}", Uuid::new_v4().simple()));
        fs::create_dir(&path).expect("the temporary folder can be written to");
        // A server that is ending may still write.
        let script = "read -r _; for _ in $(seq 50); do rm -rf \"$FOLDER\" && break; sleep 0.2; done";
        Self { _removed: Afterwards::run(script, &Command::new("true"), &path), path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The end of what the server has written to its standard streams.
    pub fn output(&self) -> String {
        let text = fs::read_to_string(self.path.join("output")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// A server's process, which ends with this value.
pub struct Server {
    pid: Pid,
    _ended: Afterwards,
}

impl Server {
    /// Runs the command. `end` are the signals that end it, as words for `kill`.
    ///
    /// # Panics
    /// When there's no shell.
    pub fn start(command: &Command, folder: &Folder, end: &[&str]) -> Self {
        // Erlang makes room for every descriptor that it's allowed.
        let script = format!(
            "ulimit -n 4096; \"$@\" </dev/null >>\"$FOLDER/output\" 2>&1 & child=$!; echo $child; read -r _; {}wait $child",
            end.iter().map(|signal| format!("kill -{signal} $child; ")).collect::<String>()
        );
        let mut ended = Afterwards::run(&script, command, &folder.path);
        let mut line = String::new();
        let out = ended.0.stdout.take().expect("it's piped");
        BufReader::new(out).read_line(&mut line).expect("the shell says the server's process id");
        let pid = line.trim().parse().ok().and_then(Pid::from_raw).expect("a process id");
        Self { pid, _ended: ended }
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Whether it hasn't ended.
    pub fn runs(&self) -> bool {
        processes().contains_key(&self.pid)
    }

    /// The server's process and all that it has started, and so on.
    pub fn family(&self) -> Vec<Pid> {
        let parents = processes();
        let mut family = vec![self.pid];
        let mut looked_at = 0;
        while let Some(parent) = family.get(looked_at).copied() {
            family.extend(parents.iter().filter(|(_, of)| **of == Some(parent)).map(|(pid, _)| *pid));
            looked_at += 1;
        }
        family
    }

    /// Stops the server's processes, which keep their connections.
    pub fn freeze(&self) -> Frozen {
        // From here on the first one starts no others.
        signal(self.pid, Signal::STOP);
        let family = self.family();
        family[1..].iter().for_each(|pid| signal(*pid, Signal::STOP));
        Frozen(family)
    }

    /// Ends the server's processes as a power failure does.
    ///
    /// # Panics
    /// When they don't end.
    pub fn kill(self) {
        signal(self.pid, Signal::STOP);
        let family = self.family();
        family.iter().rev().for_each(|pid| signal(*pid, Signal::KILL));
        let ended = || (!processes().keys().any(|pid| family.contains(pid))).then_some(());
        eventually("the server's processes end", ended);
    }
}

/// Sends a signal. One that is gone by itself needs none.
pub fn signal(pid: Pid, signal: Signal) {
    let _ = kill_process(pid, signal);
}

/// Every process that hasn't ended, with its parent.
fn processes() -> HashMap<Pid, Option<Pid>> {
    let entries = fs::read_dir("/proc").expect("there's a /proc").flatten();
    let process = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name before the last parenthesis may hold anything.
        let (_, rest) = stat.rsplit_once(')')?;
        let mut fields = rest.split_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        (!["Z", "X"].contains(&state)).then_some((Pid::from_raw(pid)?, Pid::from_raw(parent)))
    };
    entries.filter_map(process).collect()
}

/// While it lives, a server is stopped.
#[must_use]
pub struct Frozen(Vec<Pid>);

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.iter().for_each(|pid| signal(*pid, Signal::CONT));
    }
}
