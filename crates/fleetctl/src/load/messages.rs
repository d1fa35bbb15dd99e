use super::{
    label,
    posting::{Found, Options, Request},
};
use crate::{Outcome, context::Context, duration, interrupt::Interrupt, output::pace, progress::Progress};
use anyhow::ensure;
use domain::log::{Group, TEXT_MAX};
use std::{
    io::Write,
    time::{Duration, Instant},
};
use storage::{Database, consumer_offsets, message_audit, partitions};

/// Leaves room for the longest number.
const SIZE_MAX: usize = TEXT_MAX - " #99999".len() + " #0".len();

/// Post messages to the log through the gateway, in bulk
///
/// Their texts are <LABEL>/<REQUEST>...... #<NUMBER>: a label that no run has had before, the request's place in this run, and
/// the message's in its request.
///
/// What the gateway can't answer for (503, or a lost connection) is posted again, unless the database says that it was
/// accepted. Messages leave the database for their streams within milliseconds, and are found again when a group has recorded
/// them: where none has read all that was published since, nobody can tell, and the run ends with 1, as it does when
/// messages were accepted twice.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl load messages --count 1000000
  fleetctl load messages --count 60000 --rate 1000 --group recorder --wait 5m
  fleetctl load messages --count 100000 --key-count 50 --batch 100
  fleetctl load messages --count 1000 --batch 1 --partitions 2")]
pub(crate) struct Args {
    /// How many messages
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: u64,
    /// How long each text is at least, in bytes, its number included
    #[arg(long, default_value_t = 100, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=SIZE_MAX as i64))]
    size: u32,
    /// How many messages a request makes
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    batch: u64,
    /// How many keys, key-0, key-1, …: a request's messages have one, and the requests take turns
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    key_count: Option<u64>,
    /// All of them to this partition
    #[arg(long, value_name = "N", conflicts_with = "partitions")]
    partition: Option<u64>,
    /// Request number i to partition i % N; else a message goes to its key's, or to each in turn
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    partitions: Option<u64>,
    /// Then wait, up to this long, until --group has recorded all of them, and tell how long it took; exit with 1 if it hasn't
    #[arg(long, value_name = "DURATION", value_parser = duration::parse, requires = "group")]
    wait: Option<Duration>,
    /// The group to wait for
    #[arg(long, requires = "wait")]
    group: Option<Group>,
    #[command(flatten)]
    options: Options,
}

pub(crate) fn run(
    args: &Args,
    context: &Context,
    interrupt: &Interrupt,
    out: &mut dyn Write,
) -> anyhow::Result<Outcome> {
    let options = &args.options;
    // One for each connection may look at once what has become of its request.
    let database = context.database_with(|settings| settings.pool_size = options.connections)?;
    let texts = Texts { label: label(), size: args.size as usize };
    let newest = {
        let mut conn = database.connection()?;
        if let Some(group) = &args.group {
            ensure!(consumer_offsets::exists(&mut conn, group)?, "--group {group}: unknown group");
        }
        let partitions = partitions::list(&mut conn)?.into_iter();
        partitions.map(|partition| (partition.partition, partition.seq)).collect::<Vec<_>>()
    };
    let look = |request: &Request| {
        let text = texts.first(request.index);
        let found = message_audit::times_accepted(&mut *database.connection()?, &text, &newest)?;
        Ok(Found { times: found.times.unsigned_abs(), is_all: found.is_complete })
    };
    let url = format!("{}/api/v1/message", context.gateway(options.gateway.as_deref()));
    let delivery = options.delivery(url, interrupt, look);
    writeln!(out, "texts: {}*", texts.prefix())?;
    // While it runs is when one likes to look for them.
    out.flush()?;
    let posting = options.posting(args.count, args.batch, interrupt);
    let posted = posting.run("messages", |agent, request| {
        let body = serde_json::json!({
            "text": texts.text(request.index),
            "count": request.size(),
            "key": args.key_count.map(|keys| format!("key-{}", request.index % keys)),
            "partition": args.partition.or(args.partitions.map(|partitions| request.index % partitions)),
        });
        delivery.post(agent, request, &body.to_string())
    });
    let left = posted.tell("messages", args.count, out)?;
    let all_recorded = match args.group.as_ref().zip(args.wait) {
        Some((group, wait)) => {
            let (database, deadline) = (context.patient_database()?, Instant::now() + wait);
            await_recorded(&database, group, &texts.prefix(), posted.accepted, deadline, interrupt, out)?
        }
        None => true,
    };
    let none_doubled = delivery.doubles()?.tell(out)?;
    Ok(match left {
        _ if interrupt.is_set() => Outcome::Interrupted,
        0 if none_doubled && all_recorded => Outcome::Done,
        _ => Outcome::Incomplete,
    })
}

/// Waits until the group has recorded so many, or the deadline has passed, tells how it went, and returns whether it has.
fn await_recorded(
    database: &Database,
    group: &Group,
    prefix: &str,
    count: u64,
    deadline: Instant,
    interrupt: &Interrupt,
    out: &mut dyn Write,
) -> anyhow::Result<bool> {
    const POLL_INTERVAL: Duration = Duration::from_millis(250);
    /// Looking goes over all that the group has recorded, and mustn't be most of what the database does.
    const REST: u32 = 4;
    let progress = Progress::new("recorded", count);
    let mut seen = 0;
    let recorded = loop {
        let asked = Instant::now();
        let recorded = message_audit::recorded(&mut *database.connection()?, group, prefix)?;
        let now = recorded.messages.unsigned_abs();
        progress.advance(now.saturating_sub(seen));
        seen = now;
        if seen >= count || interrupt.is_set() || asked >= deadline {
            break recorded;
        }
        interrupt.sleep_until(Instant::now() + POLL_INTERVAL.max(asked.elapsed() * REST));
    };
    drop(progress);
    let took = recorded.first_accepted_at.zip(recorded.last_recorded_at).map(|(first, last)| last - first);
    let took = took.and_then(|took| took.to_std().ok()).unwrap_or_default();
    writeln!(out, "recorded: {seen} of {count}; since the first was accepted {}", pace(seen, took))?;
    Ok(seen >= count)
}

/// What is posted.
struct Texts {
    /// Of this run alone: so its messages can be told from all others.
    label: String,
    size: usize,
}

impl Texts {
    /// What all texts start with.
    fn prefix(&self) -> String {
        format!("{}/", self.label)
    }

    /// The text of request number `index`, to which the gateway adds numbers.
    fn text(&self, index: u64) -> String {
        let length = self.size.saturating_sub(" #0".len());
        format!("{:.<length$}", format!("{}{index}", self.prefix()))
    }

    /// The first message's.
    fn first(&self, index: u64) -> String {
        format!("{} #0", self.text(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_of_the_length_asked_for_and_each_is_another() {
        let texts = |size| Texts { label: "rabc123".into(), size };
        assert_eq!(texts(20).first(17), "rabc123/17....... #0");
        assert_eq!(texts(1).first(17), "rabc123/17 #0");
        assert_eq!(format!("{} #99999", texts(SIZE_MAX).text(u64::MAX)).len(), TEXT_MAX);
        assert_ne!(texts(20).text(1), texts(20).text(11));
    }
}
