use crate::{
    Outcome,
    context::Context,
    output::{self, Body, hex, hex_dump, short, time, visible, visible_lines},
    progress::Progress,
};
use clap::ValueEnum;
use serde_json::json;
use std::io::Write;
use storage::{
    Error, PgConnection,
    dead_letters::{self, DeadLetter},
};

/// Messages that were set aside: list, replay or drop them
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    List(List),
    Show(Show),
    Replay(Replay),
    Drop(Discard),
}

/// List them, the newest first
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl dead-letters list
  fleetctl dead-letters list --state all --queue update_feed.00 --limit 200
  fleetctl dead-letters list --json | jq -r .[].id")]
pub(crate) struct List {
    /// Only those in this state
    #[arg(long, value_enum, default_value_t = State::Waiting)]
    state: State,
    /// Only those that died in this queue; an empty name is for those that the relay couldn't publish
    #[arg(long)]
    queue: Option<String>,
    /// How many at most
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    limit: i64,
    /// Only those with ids below this one: the next page
    #[arg(long, value_name = "ID", default_value_t = i64::MAX, hide_default_value = true)]
    before: i64,
    /// As a JSON array, without the bodies
    #[arg(long)]
    json: bool,
}

/// Show one with everything that is known of it, its body included
///
/// Bodies may hold personal data. One that isn't UTF-8 is shown as a hex dump.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl dead-letters show 17
  fleetctl dead-letters show 17 --json --max-body 1000000 | jq -r .body")]
pub(crate) struct Show {
    id: i64,
    /// Show at most this many bytes of the body
    #[arg(long, default_value_t = 4096, value_name = "BYTES")]
    max_body: usize,
    /// As a JSON object, with `body`, or `bodyHex` where it isn't UTF-8
    #[arg(long)]
    json: bool,
}

/// Send them again, each only to the queue that it died in, with its attempts counted from zero
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl dead-letters replay 17 18
  fleetctl dead-letters replay --all --queue send_notification.email")]
pub(crate) struct Replay {
    #[command(flatten)]
    which: Which,
}

/// Give them up; their rows stay, marked as dropped
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl dead-letters drop 17 18
  fleetctl dead-letters drop --all --queue update_feed.00 --yes")]
pub(crate) struct Discard {
    #[command(flatten)]
    which: Which,
    /// Don't ask for confirmation
    #[arg(long, required_if_eq("all", "true"))]
    yes: bool,
}

#[derive(clap::Args)]
struct Which {
    /// These
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<i64>,
    /// All that are waiting now, the oldest first
    #[arg(long)]
    all: bool,
    /// With --all: only those that died in this queue
    #[arg(long, conflicts_with = "ids")]
    queue: Option<String>,
    /// Who does it, for the record
    #[arg(long, env = "USER", default_value = "unknown", hide_env_values = true, value_name = "NAME")]
    by: String,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum State {
    Waiting,
    Replayed,
    Dropped,
    All,
}

impl State {
    /// As the table has it.
    fn column(self) -> Option<&'static str> {
        match self {
            Self::Waiting => Some("waiting"),
            Self::Replayed => Some("replayed"),
            Self::Dropped => Some("dropped"),
            Self::All => None,
        }
    }
}

pub(crate) fn run(command: Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    match command {
        Command::List(args) => list(&args, context, out),
        Command::Show(args) => show(&args, context, out),
        Command::Replay(args) => settle(&args.which, "replayed", dead_letters::replay, context, out),
        Command::Drop(args) => settle(&args.which, "dropped", dead_letters::discard, context, out),
    }
}

fn list(args: &List, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut conn = context.database()?.connection()?;
    let letters = dead_letters::list(&mut conn, args.state.column(), args.queue.as_deref(), args.before, args.limit)?;
    if args.json {
        output::json(out, &letters.iter().map(head_json).collect::<Vec<_>>())?;
        return Ok(Outcome::Done);
    }
    let rows: Vec<_> = letters
        .iter()
        .map(|letter| {
            vec![
                letter.id.to_string(),
                time(letter.failed_at),
                letter.state.clone(),
                if letter.queue.is_empty() { "(outbox)".into() } else { visible(&letter.queue) },
                visible(letter.kind.as_deref().unwrap_or("-")),
                letter.attempts.to_string(),
                short(&letter.error, 100),
            ]
        })
        .collect();
    output::table(out, &["ID", "FAILED (UTC)", "STATE", "QUEUE", "TYPE", "ATTEMPTS", "REASON"], &rows)?;
    match letters.last() {
        Some(last) if letters.len() as i64 == args.limit => writeln!(out, "for more: --before {}", last.id)?,
        _ => {}
    }
    Ok(Outcome::Done)
}

fn head_json(letter: &DeadLetter) -> serde_json::Value {
    json!({
        "id": letter.id,
        "queue": letter.queue,
        "messageId": letter.message_id,
        "type": letter.kind,
        "correlationId": letter.correlation_id,
        "exchange": letter.exchange,
        "routingKey": letter.routing_key,
        "headers": letter.headers,
        "error": letter.error,
        "attempts": letter.attempts,
        "failedAt": letter.failed_at,
        "state": letter.state,
        "settledAt": letter.settled_at,
        "settledBy": letter.settled_by,
        "bodyBytes": letter.body.len(),
    })
}

fn show(args: &Show, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let letter = dead_letters::get(&mut *context.database()?.connection()?, args.id)?;
    let body = Body::of(&letter.body, args.max_body);
    if args.json {
        let mut json = head_json(&letter);
        match body {
            Body::Text(text) => json["body"] = text.into(),
            Body::Binary(bytes) => json["bodyHex"] = hex(bytes, "").into(),
        }
        output::json(out, &json)?;
        return Ok(Outcome::Done);
    }
    let text = |text: &Option<String>| visible(text.as_deref().unwrap_or("-"));
    let mut fields = vec![
        ("id", letter.id.to_string()),
        ("state", letter.state.clone()),
        ("reason", visible(&letter.error)),
        ("attempts", letter.attempts.to_string()),
        ("failed (UTC)", time(letter.failed_at)),
        ("queue", visible(&letter.queue)),
        ("exchange", visible(&letter.exchange)),
        ("routing key", visible(&letter.routing_key)),
        ("type", text(&letter.kind)),
        ("message id", text(&letter.message_id)),
        ("correlation id", text(&letter.correlation_id)),
    ];
    if let Some(at) = letter.settled_at {
        fields.push(("settled (UTC)", format!("{} by {}", time(at), text(&letter.settled_by))));
    }
    for (name, value) in letter.headers.as_object().into_iter().flatten() {
        fields.push(("header", format!("{} = {}", visible(name), visible(value.as_str().unwrap_or_default()))));
    }
    for (name, value) in fields {
        writeln!(out, "{:16}{value}", format!("{name}:"))?;
    }
    let total = letter.body.len();
    let cut = if body.len() < total { format!(", the first {}", body.len()) } else { String::new() };
    match body {
        Body::Text(text) => writeln!(out, "\nbody ({total} bytes{cut}):\n{}", visible_lines(text))?,
        Body::Binary(bytes) => write!(out, "\nbody ({total} bytes{cut}, not UTF-8):\n{}", hex_dump(bytes))?,
    }
    Ok(Outcome::Done)
}

/// Replays or drops, some in each transaction. One that was settled before, or isn't there, is told and holds up no
/// other.
fn settle(
    which: &Which,
    verb: &str,
    action: fn(&mut PgConnection, i64, &str) -> Result<(), Error>,
    context: &Context,
    out: &mut dyn Write,
) -> anyhow::Result<Outcome> {
    let database = context.database()?;
    let ids = match which.all {
        // Those of now: a replayed message that dies again comes back under a new id.
        true => dead_letters::waiting_ids(&mut *database.connection()?, which.queue.as_deref())?,
        false => which.ids.clone(),
    };
    let progress = Progress::new(verb, ids.len() as u64);
    let mut refused = Vec::new();
    for ids in ids.chunks(50) {
        let results = database.transaction(|conn| {
            ids.iter()
                .map(|id| match action(conn, *id, &which.by) {
                    Ok(()) => Ok(None),
                    Err(error @ (Error::NotFound(_) | Error::Conflict(_))) => Ok(Some((*id, error))),
                    Err(error) => Err(error),
                })
                .collect::<Result<Vec<_>, _>>()
        })?;
        refused.extend(results.into_iter().flatten());
        progress.advance(ids.len() as u64);
    }
    drop(progress);
    for (id, error) in &refused {
        eprintln!("fleetctl: dead letter {id}: {error}");
    }
    writeln!(out, "{} {verb}", ids.len() - refused.len())?;
    Ok(if refused.is_empty() { Outcome::Done } else { Outcome::Incomplete })
}
