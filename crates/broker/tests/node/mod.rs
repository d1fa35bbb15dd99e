//! A RabbitMQ node of the tests' own, which they may freeze, starve and kill.

use std::{
    fmt::Write as _,
    io::Write as _,
    ops::{Deref, DerefMut},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use broker::Settings;
use test_support::{PrivateRabbitmq, broker_settings};

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
    let mut node =
        NODE.get_or_init(|| Mutex::new(Node(PrivateRabbitmq::new()))).lock().unwrap_or_else(PoisonError::into_inner);
    node.start();
    node
}

pub(crate) struct Node(PrivateRabbitmq);

impl Deref for Node {
    type Target = PrivateRabbitmq;

    fn deref(&self) -> &PrivateRabbitmq {
        &self.0
    }
}

impl DerefMut for Node {
    fn deref_mut(&mut self) -> &mut PrivateRabbitmq {
        &mut self.0
    }
}

impl Node {
    /// The patient ones of a test, with a small window.
    pub(crate) fn settings(&self) -> Settings {
        Settings { window_messages: 64, ..broker_settings(&self.url()) }
    }

    /// How many messages a queue has that aren't acknowledged, as it knows itself at this moment.
    pub(crate) fn left_in(&self, queue: &str) -> u32 {
        let left = self.eval(&format!(
            "{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)), \
             {{ok, {{_, Left}}, _}} = ra:local_query(amqqueue:get_pid(Queue), fun rabbit_fifo:query_messages_total/1), Left"
        ));
        left.parse().unwrap()
    }

    /// Makes it short of memory, so that it blocks whoever publishes.
    pub(crate) fn starve(&self) -> Starved<'_> {
        self.eval("vm_memory_monitor:set_vm_memory_high_watermark(0.0001)");
        Starved { node: self }
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
