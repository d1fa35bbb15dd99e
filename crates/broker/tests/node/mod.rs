//! A RabbitMQ node of the tests' own, which they may freeze, starve and kill.

use std::{
    env,
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader, Write as _},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use broker::{Session, Settings};

const SERVER: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";
const NAME: &str = "broker-test@localhost";

/// The one node of this test run, for one test at a time: whoever has it holds on to it.
pub(crate) fn node() -> MutexGuard<'static, Node> {
    static NODE: OnceLock<Mutex<Node>> = OnceLock::new();
    // Shown if the test fails.
    let _ = env_logger::builder()
        .is_test(true)
        .filter_level(log::LevelFilter::Info)
        .format(|out, record| {
            struct Pairs(String);
            impl<'a> log::kv::VisitSource<'a> for Pairs {
                fn visit_pair(
                    &mut self,
                    key: log::kv::Key<'a>,
                    value: log::kv::Value<'a>,
                ) -> Result<(), log::kv::Error> {
                    write!(self.0, " {key}={value}").map_err(Into::into)
                }
            }
            let mut pairs = Pairs(String::new());
            let _ = record.key_values().visit(&mut pairs);
            writeln!(out, "{} {}{}", out.timestamp_millis(), record.args(), pairs.0)
        })
        .try_init();
    // What a failed test leaves behind, the guards of `freeze` and `starve` clear away.
    let mut node = NODE.get_or_init(|| Mutex::new(Node::new())).lock().unwrap_or_else(PoisonError::into_inner);
    node.start();
    node
}

pub(crate) struct Node {
    folder: PathBuf,
    amqp_port: u16,
    dist_port: u16,
    epmd_port: u16,
    server: Option<Supervised>,
    _epmd: Supervised,
}

impl Node {
    fn new() -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("rabbitmq-{}", std::process::id()));
        fs::create_dir_all(folder.join("conf.d")).unwrap();
        let [amqp_port, dist_port, epmd_port] = free_ports();
        fs::write(
            folder.join("rabbitmq.conf"),
            format!(
                "listeners.tcp.1 = 127.0.0.1:{amqp_port}\ndisk_free_limit.absolute = 50MB\nlog.file.level = info\n"
            ),
        )
        .unwrap();
        fs::write(folder.join("enabled_plugins"), "[rabbitmq_consistent_hash_exchange].").unwrap();
        let mut epmd = Command::new("epmd");
        epmd.args(["-port", &epmd_port.to_string(), "-address", "127.0.0.1"]);
        let epmd = Supervised::start(&epmd, &folder, "until rm -rf \"$FOLDER\"; do sleep 0.1; done");
        Self { folder, amqp_port, dist_port, epmd_port, server: None, _epmd: epmd }
    }

    /// Settings that notice trouble soon.
    pub(crate) fn settings(&self) -> Settings {
        Settings {
            url: format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.amqp_port).into(),
            connect_timeout_ms: 3000,
            heartbeat_s: 2,
            confirm_timeout_ms: 5000,
            window_messages: 64,
            window_bytes: 1 << 20,
        }
    }

    /// Starts the node if it doesn't run, and waits until it answers.
    pub(crate) fn start(&mut self) {
        if self.server.is_none() {
            self.server = Some(Supervised::start(&self.command(), &self.folder, ""));
        }
        eventually(Duration::from_secs(60), "the node answers", || Session::open(&self.settings(), "waiting").ok());
    }

    /// Ends it as a power failure would.
    pub(crate) fn kill(&mut self) {
        drop(self.server.take());
    }

    /// Stops its process, which keeps its connections.
    pub(crate) fn freeze(&self) -> Frozen {
        let pid = self.server.as_ref().expect("the node runs").pid.clone();
        signal("STOP", &pid);
        Frozen { pid }
    }

    /// Makes it short of memory, so that it blocks whoever publishes.
    pub(crate) fn starve(&self) -> Starved<'_> {
        self.eval("vm_memory_monitor:set_vm_memory_high_watermark(0.0001)");
        Starved { node: self }
    }

    /// Runs Erlang in the node, and returns what comes of it. `rabbitmqctl` does the same in seconds.
    pub(crate) fn eval(&self, expression: &str) -> String {
        let cookie = fs::read_to_string(self.folder.join(".erlang.cookie")).unwrap();
        let mut call = Command::new("erl_call")
            .args(["-sname", NAME, "-c", cookie.trim(), "-e"])
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        call.stdin.take().unwrap().write_all(format!("{expression}.\n").as_bytes()).unwrap();
        let output = call.wait_with_output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        let result = printed.strip_prefix("{ok, ").and_then(|rest| rest.strip_suffix('}'));
        result.unwrap_or_else(|| panic!("{expression}: {printed}")).into()
    }

    /// The distribution's script, told to keep to this node's folder and ports.
    fn command(&self) -> Command {
        let mut command = Command::new(SERVER);
        let path = |name: &str| self.folder.join(name).into_os_string();
        command
            .env("HOME", &self.folder)
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .env("RABBITMQ_NODENAME", NAME)
            .env("RABBITMQ_DIST_PORT", self.dist_port.to_string())
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+S 2:2 +sbwt none -kernel inet_dist_use_interface {127,0,0,1}")
            .env("RABBITMQ_MNESIA_BASE", path("data"))
            .env("RABBITMQ_LOG_BASE", path("log"))
            .env("RABBITMQ_PID_FILE", path("pid"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", path("enabled_plugins"))
            .env("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf"))
            .env("RABBITMQ_CONFIG_FILES", path("conf.d"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", path("advanced.config"))
            // Nothing of a node of the system's.
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            // So that the script becomes the node, whose process id is then known.
            .env("RUNNING_UNDER_SYSTEMD", "1");
        command
    }
}

/// While it lives, the node is stopped.
#[must_use]
pub(crate) struct Frozen {
    pid: String,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        signal("CONT", &self.pid);
    }
}

/// While it lives, the node is short of memory.
#[must_use]
pub(crate) struct Starved<'a> {
    node: &'a Node,
}

impl Drop for Starved<'_> {
    fn drop(&mut self) {
        self.node.eval("vm_memory_monitor:set_vm_memory_high_watermark(0.4)");
    }
}

/// A process that is killed when this is dropped, or when the test run ends in whatever way: a shell waits for the end
/// of its own input, which is a pipe from here.
struct Supervised {
    shell: Child,
    pid: String,
}

impl Supervised {
    fn start(command: &Command, folder: &Path, afterwards: &str) -> Self {
        // A limited number of descriptors, since Erlang makes room for every one that it is allowed.
        let script = format!(
            "ulimit -n 4096; \"$@\" </dev/null >>\"$FOLDER/output\" 2>&1 & child=$!; echo $child; \
             read -r _; kill -KILL $child; wait $child; {afterwards}"
        );
        let mut shell = Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(command.get_program())
            .args(command.get_args())
            .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .env("FOLDER", folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut pid = String::new();
        BufReader::new(shell.stdout.take().unwrap()).read_line(&mut pid).unwrap();
        Self { shell, pid: pid.trim().into() }
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        self.shell.wait().unwrap();
    }
}

fn signal(name: &str, pid: &str) {
    let status = Command::new("kill").args(["-s", name, pid]).status().unwrap();
    assert!(status.success(), "kill -s {name} {pid}");
}

/// Ports that nobody has at this moment.
fn free_ports<const N: usize>() -> [u16; N] {
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// Waits until there's something.
#[track_caller]
pub(crate) fn eventually<T>(limit: Duration, what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        thread::sleep(Duration::from_millis(50));
    }
}
