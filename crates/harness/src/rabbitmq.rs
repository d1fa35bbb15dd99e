use crate::{
    eventually, eventually_within,
    private::{Folder, Frozen, Server, free_ports, signal},
};
use rustix::process::Signal;
use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const NAME: &str = "murmuration-test@localhost";

/// The distribution's script.
const SCRIPT: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

/// A RabbitMQ node of one's own, to be killed and frozen. Gone with the value, with its data.
pub struct PrivateRabbitmq {
    server: Option<Server>,
    /// Erlang's port mapper, a process beside the node.
    _epmd: Server,
    folder: Folder,
    amqp_port: u16,
    management_port: u16,
    dist_port: u16,
    epmd_port: u16,
}

impl PrivateRabbitmq {
    /// Whether RabbitMQ's package is installed.
    pub fn is_installed() -> bool {
        Path::new(SCRIPT).exists()
    }

    /// An empty node, which doesn't run yet.
    ///
    /// # Panics
    /// When RabbitMQ isn't installed.
    #[expect(clippy::new_without_default, reason = "making a server is no default")]
    pub fn new() -> Self {
        let folder = Folder::new("rabbitmq");
        let [amqp_port, management_port, dist_port, epmd_port] = free_ports();
        let settings = format!(
            "listeners.tcp.1 = 127.0.0.1:{amqp_port}\nmanagement.tcp.ip = 127.0.0.1\n\
             management.tcp.port = {management_port}\ndisk_free_limit.absolute = 50MB\nlog.file.level = info\n"
        );
        for (name, text) in [
            ("rabbitmq.conf", settings.as_str()),
            ("enabled_plugins", "[rabbitmq_consistent_hash_exchange,rabbitmq_management]."),
        ] {
            fs::write(folder.path().join(name), text).expect("the folder can be written to");
        }
        fs::create_dir(folder.path().join("conf.d")).expect("the folder can be written to");
        let mut epmd = Command::new("epmd");
        epmd.args(["-port", &epmd_port.to_string(), "-address", "127.0.0.1"]);
        let epmd = Server::start(&epmd, &folder, &["KILL"]);
        // A node that finds none starts one of its own, which would outlive it.
        eventually("Erlang's port mapper answers", || TcpStream::connect(("127.0.0.1", epmd_port)).ok());
        Self { server: None, _epmd: epmd, folder, amqp_port, management_port, dist_port, epmd_port }
    }

    /// Its URL, for the vhost that every node has.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.amqp_port)
    }

    /// The URL of its management API.
    pub fn management_url(&self) -> String {
        format!("http://guest:guest@127.0.0.1:{}", self.management_port)
    }

    /// Starts it if it doesn't run, and awaits that it answers.
    ///
    /// # Panics
    /// When it doesn't.
    pub fn start(&mut self) {
        self.try_start().unwrap_or_else(|why| panic!("{why}"));
    }

    /// As [`PrivateRabbitmq::start`], for whoever can do without.
    ///
    /// # Errors
    /// When it doesn't answer; says what it has written.
    pub fn try_start(&mut self) -> Result<(), String> {
        const LIMIT: Duration = Duration::from_secs(120);
        let end = Instant::now() + LIMIT;
        if self.server.is_none() {
            self.server = Some(Server::start(&self.command(), &self.folder, &["KILL"]));
        }
        while !self.greets() {
            if !self.server.as_ref().is_some_and(Server::runs) {
                return Err(format!("the private RabbitMQ has ended:\n{}", self.folder.output()));
            }
            if Instant::now() > end {
                return Err(format!("the private RabbitMQ doesn't answer after {LIMIT:?}:\n{}", self.folder.output()));
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Whether it begins a handshake: its port opens when everything else has started.
    fn greets(&self) -> bool {
        const METHOD_FRAME: u8 = 1;
        let Ok(mut socket) = TcpStream::connect(("127.0.0.1", self.amqp_port)) else { return false };
        let mut first = [0];
        let asked = socket
            .set_read_timeout(Some(Duration::from_secs(5)))
            .and_then(|()| socket.write_all(b"AMQP\0\0\x09\x01"))
            .and_then(|()| socket.read_exact(&mut first));
        asked.is_ok() && first == [METHOD_FRAME]
    }

    /// Has it write down now what it would half a second later: where the files of new queues and streams are. Killed before, it
    /// loses them.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn write_down(&self) {
        self.eval("[dets:sync(Name) || Name <- [ra_directory_reverse, ra_coordination_directory_reverse]]");
    }

    /// Ends it as a power failure does. Nothing happens if it doesn't run.
    pub fn kill(&mut self) {
        if let Some(server) = self.server.take() {
            server.kill();
        }
    }

    /// Ends it as an operator does.
    ///
    /// # Panics
    /// When it doesn't end.
    pub fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            signal(server.pid(), Signal::TERM);
            eventually_within(Duration::from_secs(120), "the private RabbitMQ ends", || (!server.runs()).then_some(()));
        }
    }

    /// Stops its processes, which keep their connections.
    ///
    /// # Panics
    /// When it doesn't run.
    pub fn freeze(&self) -> Frozen {
        self.server.as_ref().expect("the private RabbitMQ runs").freeze()
    }

    /// Runs Erlang in the node, and returns what comes of it. `rabbitmqctl` does the same in seconds.
    ///
    /// # Panics
    /// When it fails.
    pub fn eval(&self, expression: &str) -> String {
        let cookie = fs::read_to_string(self.folder.path().join(".erlang.cookie")).expect("the node has a cookie");
        let mut call = Command::new("erl_call")
            .args(["-sname", NAME, "-c", cookie.trim(), "-e"])
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("erl_call is installed with Erlang");
        let mut input = call.stdin.take().expect("it's piped");
        input.write_all(format!("{expression}.\n").as_bytes()).expect("it reads");
        drop(input);
        let output = call.wait_with_output().expect("it ends");
        let printed = String::from_utf8(output.stdout).expect("it prints UTF-8");
        let result = printed.strip_prefix("{ok, ").and_then(|rest| rest.strip_suffix('}'));
        result.unwrap_or_else(|| panic!("{expression}: {printed}")).into()
    }

    /// The distribution's script, told to keep to this node's folder and ports.
    fn command(&self) -> Command {
        let mut command = Command::new(SCRIPT);
        let path = |name: &str| self.folder.path().join(name);
        command
            // Where Erlang keeps its cookie.
            .env("HOME", self.folder.path())
            .env("ERL_EPMD_PORT", self.epmd_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("ERL_CRASH_DUMP_SECONDS", "0")
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
