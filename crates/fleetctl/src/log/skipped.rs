use super::ensure_known;
use crate::{
    Outcome,
    context::Context,
    output::{self, Body, hex, short, time, visible},
};
use chrono::{DateTime, Utc};
use domain::log::Group;
use serde::Serialize;
use std::io::Write;
use storage::messages::{self, Skipped};

/// Show what a group has found in the streams that was no message, the newest first
///
/// Bodies may hold personal data. The first 64 KiB of each are kept.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log skipped --group recorder
  fleetctl log skipped --group recorder --limit 1 --json | jq -r .[0].body")]
pub(crate) struct Args {
    /// The group
    #[arg(long)]
    group: Group,
    /// How many at most
    #[arg(long, default_value_t = 50, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=1000))]
    limit: i64,
    /// As a JSON array, with `body`, or `bodyHex` where it isn't UTF-8, in full
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown<'a> {
    partition: i32,
    offset: i64,
    message_id: Option<&'a str>,
    skipped_at: DateTime<Utc>,
    reason: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    body: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    body_hex: Option<String>,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let mut conn = context.database()?.connection()?;
    ensure_known(&mut conn, &args.group)?;
    let skipped = messages::skipped(&mut conn, &args.group, args.limit)?;
    if args.json {
        output::json(out, &skipped.iter().map(shown).collect::<Vec<_>>())?;
        return Ok(Outcome::Done);
    }
    let row = |skipped: &Skipped| {
        vec![
            skipped.partition.to_string(),
            skipped.offset.to_string(),
            time(skipped.skipped_at),
            short(skipped.message_id.as_deref().unwrap_or("-"), 40),
            short(&skipped.reason, 60),
            start(&skipped.body),
        ]
    };
    let rows: Vec<_> = skipped.iter().map(row).collect();
    output::table(out, &["PARTITION", "OFFSET", "SKIPPED (UTC)", "MESSAGE ID", "REASON", "BODY"], &rows)?;
    Ok(Outcome::Done)
}

fn shown(skipped: &Skipped) -> Shown<'_> {
    let text = std::str::from_utf8(&skipped.body).ok();
    Shown {
        partition: skipped.partition,
        offset: skipped.offset,
        message_id: skipped.message_id.as_deref(),
        skipped_at: skipped.skipped_at,
        reason: &skipped.reason,
        body: text,
        body_hex: text.is_none().then(|| hex(&skipped.body, "")),
    }
}

/// How a body begins.
fn start(body: &[u8]) -> String {
    const WIDTH: usize = 40;
    let start = match Body::of(body, 4 * WIDTH) {
        Body::Text(text) => visible(text),
        Body::Binary(bytes) => hex(bytes, " "),
    };
    short(&start, WIDTH)
}
