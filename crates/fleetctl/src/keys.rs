use crate::{
    Outcome,
    context::Context,
    output::{self, short, time, visible, visible_lines},
    progress::Progress,
    stream::Stream,
};
use anyhow::{Context as _, ensure};
use chrono::{DateTime, Utc};
use domain::{
    stream::{PAYLOAD_MAX, Payload},
    values::whole_clusters,
};
use serde::Serialize;
use serde_json::{json, value::RawValue};
use std::{
    fs,
    io::{self, Read as _, Write},
};
use storage::{
    Error, PgConnection,
    parked::{self, Change, Order, Standing},
};

/// Keys that are parked because an event of theirs failed too often: list, retry or skip them
///
/// The events of a parked key wait, in order; all other keys go on. Whatever is done here takes effect within seconds, in
/// the key's order, and is recorded with who did it and when.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    List(List),
    Show(Show),
    Retry(Retry),
    Skip(Skip),
    Replace(Replace),
}

/// List the keys that are parked, by name
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl keys list
  fleetctl keys list --json | jq -r .[].key")]
pub(crate) struct List {
    #[command(flatten)]
    of: Stream,
    /// How many at most
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    limit: i64,
    /// Only those after this one: the next page
    #[arg(long, value_name = "KEY", default_value = "", hide_default_value = true)]
    after: String,
    /// As a JSON array
    #[arg(long)]
    json: bool,
}

/// Show a key's state, parked or not: its next event, and what operators have done so far
///
/// Payloads may hold personal data.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl keys show r1a2b3c-17
  fleetctl keys show r1a2b3c-17 --json | jq .next.payload")]
pub(crate) struct Show {
    key: String,
    #[command(flatten)]
    of: Stream,
    /// Show at most this many characters of the payload
    #[arg(long, default_value_t = 4096, value_name = "N")]
    max_payload: usize,
    /// As a JSON object, with payloads in full
    #[arg(long)]
    json: bool,
}

/// Try the next event again, with its attempts counted from zero
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl keys retry r1a2b3c-17 r1a2b3c-18
  fleetctl keys retry --all --by olga")]
pub(crate) struct Retry {
    /// These
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    keys: Vec<String>,
    /// All that are parked now
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    of: Stream,
    #[command(flatten)]
    by: By,
    /// Only if this event is next; for one key alone
    #[arg(long, value_name = "N", conflicts_with = "all")]
    seq: Option<i64>,
}

/// Skip the next event, which never takes effect; its row stays, and says who skipped it
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl keys skip r1a2b3c-17
  fleetctl keys skip r1a2b3c-17 --seq 4 --by olga")]
pub(crate) struct Skip {
    #[command(flatten)]
    change: One,
}

/// Replace the payload of the next event, and try that; the old one is kept on record
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl keys replace r1a2b3c-17 --payload '{\"amount\": 100}'
  fleetctl keys replace r1a2b3c-17 --seq 4 --payload @corrected.json
  fleetctl keys show r1a2b3c-17 --json | jq -c '.next.payload | .amount = 100' |
    fleetctl keys replace r1a2b3c-17 --payload @-")]
pub(crate) struct Replace {
    #[command(flatten)]
    change: One,
    /// The payload, any JSON value; @FILE reads it from a file, @- from the standard input
    #[arg(long, value_name = "JSON|@FILE", allow_hyphen_values = true)]
    payload: String,
}

#[derive(clap::Args)]
struct One {
    key: String,
    #[command(flatten)]
    of: Stream,
    #[command(flatten)]
    by: By,
    /// Only if this event is next
    #[arg(long, value_name = "N")]
    seq: Option<i64>,
}

#[derive(clap::Args)]
struct By {
    /// Who does it, for the record
    #[arg(long, env = "USER", default_value = "unknown", hide_env_values = true, value_name = "NAME")]
    by: String,
}

pub(crate) fn run(command: &Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    match command {
        Command::List(args) => list(args, context, out),
        Command::Show(args) => show(args, context, out),
        Command::Retry(args) => retry(args, context, out),
        Command::Skip(args) => change(&args.change, "skipped", context, out, parked::skip),
        Command::Replace(args) => {
            let payload = read_payload(&args.payload)?;
            change(&args.change, "replaced", context, out, |conn, order| parked::replace(conn, order, &payload))
        }
    }
}

fn list(args: &List, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let keys = parked::list(&mut *context.database()?.connection()?, &args.of.stream, &args.after, args.limit)?;
    if args.json {
        let keys = keys.iter().map(|parked| {
            json!({
                "key": parked.key,
                "seq": parked.cursor + 1,
                "attempts": parked.attempts,
                "deaths": parked.deaths,
                "parkedAt": parked.parked_at,
                "lastError": parked.last_error,
            })
        });
        output::json(out, &keys.collect::<Vec<_>>())?;
        return Ok(Outcome::Done);
    }
    let rows: Vec<_> = keys
        .iter()
        .map(|parked| {
            vec![
                visible(&parked.key),
                (parked.cursor + 1).to_string(),
                parked.parked_at.map(time).unwrap_or_default(),
                parked.attempts.to_string(),
                parked.deaths.to_string(),
                short(parked.last_error.as_deref().unwrap_or("-"), 100),
            ]
        })
        .collect();
    output::table(out, &["KEY", "EVENT", "PARKED (UTC)", "ATTEMPTS", "DEATHS", "REASON"], &rows)?;
    match keys.last() {
        Some(last) if keys.len() as i64 == args.limit => writeln!(out, "for more: --after {}", visible(&last.key))?,
        _ => {}
    }
    Ok(Outcome::Done)
}

fn show(args: &Show, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let database = context.database()?;
    let (standing, history) = database.transaction(|conn| {
        let standing = parked::get(conn, &args.of.stream, &args.key)?;
        Ok((standing, parked::history(conn, &args.of.stream, &args.key)?))
    })?;
    match args.json {
        true => show_json(args, &standing, &history, out),
        false => show_text(args, &standing, &history, out),
    }
}

/// Events that wait behind the next one.
fn behind(standing: &Standing) -> i64 {
    (standing.head - standing.cursor - 1).max(0)
}

fn state(standing: &Standing) -> &'static str {
    match standing {
        Standing { parked_at: Some(_), .. } => "parked",
        Standing { payload: None, .. } => "idle",
        Standing { retry_at: Some(_), .. } => "retrying",
        _ => "waiting",
    }
}

/// Payloads as they were sent, to the digit.
fn raw(payload: Option<&str>) -> serde_json::Result<Option<&RawValue>> {
    payload.map(serde_json::from_str).transpose()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NextJson<'a> {
    seq: i64,
    generated_at: Option<DateTime<Utc>>,
    payload: &'a RawValue,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ChangeJson<'a> {
    seq: i64,
    action: &'a str,
    last_error: Option<&'a str>,
    payload: Option<&'a RawValue>,
    changed_by: &'a str,
    changed_at: DateTime<Utc>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct StandingJson<'a> {
    stream: &'a str,
    key: &'a str,
    state: &'a str,
    head: i64,
    cursor: i64,
    revision: i32,
    attempts: i32,
    deaths: i32,
    retry_at: Option<DateTime<Utc>>,
    parked_at: Option<DateTime<Utc>>,
    last_error: Option<&'a str>,
    next: Option<NextJson<'a>>,
    behind: i64,
    history: Vec<ChangeJson<'a>>,
}

fn show_json(args: &Show, standing: &Standing, history: &[Change], out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let next = raw(standing.payload.as_deref())?.map(|payload| NextJson {
        seq: standing.cursor + 1,
        generated_at: standing.generated_at,
        payload,
    });
    let history = history.iter().map(|change| {
        Ok(ChangeJson {
            seq: change.seq,
            action: &change.action,
            last_error: change.last_error.as_deref(),
            payload: raw(change.payload.as_deref())?,
            changed_by: &change.changed_by,
            changed_at: change.changed_at,
        })
    });
    let shown = StandingJson {
        stream: &args.of.stream,
        key: &args.key,
        state: state(standing),
        head: standing.head,
        cursor: standing.cursor,
        revision: standing.revision,
        attempts: standing.attempts,
        deaths: standing.deaths,
        retry_at: standing.retry_at,
        parked_at: standing.parked_at,
        last_error: standing.last_error.as_deref(),
        next,
        behind: behind(standing),
        history: history.collect::<serde_json::Result<_>>()?,
    };
    output::json(out, &shown)?;
    Ok(Outcome::Done)
}

fn show_text(args: &Show, standing: &Standing, history: &[Change], out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let when = |at: Option<DateTime<Utc>>| at.map_or_else(|| "-".into(), time);
    let fields = [
        ("stream", visible(&args.of.stream)),
        ("key", visible(&args.key)),
        ("state", state(standing).into()),
        ("reason", visible(standing.last_error.as_deref().unwrap_or("-"))),
        ("parked (UTC)", when(standing.parked_at)),
        ("retry (UTC)", when(standing.retry_at)),
        ("attempts", standing.attempts.to_string()),
        ("deaths", standing.deaths.to_string()),
        ("accepted", standing.head.to_string()),
        ("settled", standing.cursor.to_string()),
        ("revision", standing.revision.to_string()),
    ];
    for (name, value) in fields {
        writeln!(out, "{:16}{value}", format!("{name}:"))?;
    }
    if let Some(payload) = &standing.payload {
        let shown = whole_clusters(payload, args.max_payload);
        let cut = if shown.len() < payload.len() { format!(", the first {}", shown.len()) } else { String::new() };
        writeln!(
            out,
            "\nevent {}, accepted {} (UTC), with {} behind it; payload ({} bytes{cut}):\n{}",
            standing.cursor + 1,
            when(standing.generated_at),
            behind(standing),
            payload.len(),
            visible_lines(shown)
        )?;
    }
    if !history.is_empty() {
        writeln!(out)?;
        let rows: Vec<_> = history
            .iter()
            .map(|change| {
                vec![
                    time(change.changed_at),
                    change.seq.to_string(),
                    change.action.clone(),
                    visible(&change.changed_by),
                    short(change.last_error.as_deref().unwrap_or("-"), 100),
                ]
            })
            .collect();
        output::table(out, &["CHANGED (UTC)", "EVENT", "ACTION", "BY", "REASON IT WAS PARKED FOR"], &rows)?;
    }
    Ok(Outcome::Done)
}

/// Each in a transaction of its own. One that isn't parked, or isn't there, is told and holds up no other.
fn retry(args: &Retry, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    ensure!(args.seq.is_none() || args.keys.len() == 1, "--seq is for one key alone");
    let database = context.database()?;
    let keys = match args.all {
        true => parked::keys(&mut *database.connection()?, &args.of.stream)?,
        false => args.keys.clone(),
    };
    let progress = Progress::new("retrying", keys.len() as u64);
    let mut refused = Vec::new();
    for key in &keys {
        let order = Order { stream: &args.of.stream, key, seq: args.seq, by: &args.by.by };
        match database.transaction(|conn| parked::retry(conn, &order)) {
            Ok(_) => {}
            Err(error @ (Error::NotFound(_) | Error::Conflict(_))) => refused.push((key, error)),
            Err(error) => return Err(error).with_context(|| format!("retrying {}", visible(key))),
        }
        progress.advance(1);
    }
    drop(progress);
    for (key, error) in &refused {
        eprintln!("fleetctl: key {}: {error}", visible(key));
    }
    writeln!(out, "{} to be retried", keys.len() - refused.len())?;
    Ok(if refused.is_empty() { Outcome::Done } else { Outcome::Incomplete })
}

fn change(
    args: &One,
    done: &str,
    context: &Context,
    out: &mut dyn Write,
    action: impl Fn(&mut PgConnection, &Order<'_>) -> Result<i64, Error>,
) -> anyhow::Result<Outcome> {
    let order = Order { stream: &args.of.stream, key: &args.key, seq: args.seq, by: &args.by.by };
    let seq = context
        .database()?
        .transaction(|conn| action(conn, &order))
        .with_context(|| format!("key {}", visible(&args.key)))?;
    writeln!(out, "event {seq} {done}")?;
    Ok(Outcome::Done)
}

fn read_payload(given: &str) -> anyhow::Result<Payload> {
    let text = match given.strip_prefix('@') {
        None => given.to_owned(),
        Some("-") => {
            let mut text = String::new();
            // No more than it takes to see that it's too long.
            io::stdin().take(PAYLOAD_MAX as u64 + 1024).read_to_string(&mut text).context("can't read the payload")?;
            text
        }
        Some(path) => fs::read_to_string(path).with_context(|| format!("can't read the payload from {path}"))?,
    };
    Payload::parse(text.trim()).map_err(|invalid| anyhow::anyhow!("the payload {invalid}"))
}
