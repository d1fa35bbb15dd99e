use super::{
    chosen,
    message::{Message, Reader},
    stream::{self, Stream},
};
use crate::{Outcome, context::Context, output};
use anyhow::ensure;
use std::{
    io::Write,
    time::{Duration, Instant},
};
use storage::partitions;

/// Show messages of a partition's stream, from an offset
///
/// Nothing changes by it: no group's offset is moved. Texts may hold personal data. What is no message of the log, such as
/// another program's, is shown as it is, with what is wrong with it. Some offsets are the broker's own, so fewer messages
/// may be shown than an offset before the end suggests.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log browse --partition 0
  fleetctl log browse --partition 0 --from 1200 --count 5 --full
  fleetctl log browse --partition 0 --from first --json | jq -r .[].text")]
pub(crate) struct Args {
    /// The partition
    #[arg(long, value_name = "P")]
    partition: i32,
    /// Where to begin: an offset; the first message that is left; or so that the newest N are shown
    #[arg(long, value_name = "OFFSET|first|last", default_value = "last", value_parser = From::parse)]
    from: From,
    /// How many at most
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    count: u16,
    /// Where retention has removed OFFSET, begin with the first message that is left
    #[arg(long)]
    or_first: bool,
    /// Don't cut texts
    #[arg(long)]
    full: bool,
    /// As a JSON array, with texts in full
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum From {
    Offset(i64),
    First,
    Last,
}

impl From {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "first" => Ok(Self::First),
            "last" => Ok(Self::Last),
            _ => match text.parse() {
                Ok(offset) if offset >= 0 => Ok(Self::Offset(offset)),
                _ => Err("must be an offset, `first` or `last`".into()),
            },
        }
    }
}

/// How long the broker may take over the next messages.
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let Args { partition, from, count, .. } = *args;
    let database = context.database()?;
    let mut conn = database.connection()?;
    chosen(&mut conn, Some(partition))?;
    let log = partitions::token(&mut conn)?;
    drop(conn);
    let broker = context.broker()?;
    let stream = stream::survey(&broker, &[partition], Stream::look)?[0];
    stream.ensure_declared(partition)?;
    let first = stream.first().unwrap_or(0);
    let start = match from {
        From::First => first,
        From::Last => (stream.next() - i64::from(count)).max(first),
        From::Offset(offset) if offset < first && args.or_first => first,
        From::Offset(offset) => {
            stream.ensure_holds(partition, offset)?;
            offset
        }
    };
    let count = usize::from(count);
    let mut messages = Vec::new();
    let mut reader = Reader::new(&database, &broker, &log, partition, start);
    let mut until = Instant::now() + PATIENCE;
    // What has come since then isn't waited for.
    while reader.next < stream.next() && messages.len() < count {
        let read = reader.read(count - messages.len(), until.saturating_duration_since(Instant::now()))?;
        if !read.is_empty() {
            until = Instant::now() + PATIENCE;
        }
        ensure!(Instant::now() < until, "the broker sends nothing from offset {} onwards", reader.next);
        messages.extend(read);
    }
    if args.json {
        output::json(out, &messages)?;
        return Ok(Outcome::Done);
    }
    let row = |message: &Message| {
        vec![message.offset.to_string(), message.time(), message.id(), message.key(), message.text(args.full)]
    };
    let rows: Vec<_> = messages.iter().map(row).collect();
    output::table(out, &["OFFSET", "TIME (UTC)", "MESSAGE ID", "KEY", "TEXT"], &rows)?;
    if reader.next < stream.next() {
        writeln!(out, "for more: --from {}", reader.next)?;
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::From;

    #[test]
    fn a_place_is_an_offset_or_an_end() {
        assert_eq!([Ok(From::Offset(17)), Ok(From::First), Ok(From::Last)], ["17", "first", "last"].map(From::parse));
        for bad in ["", "-1", "next", "1.5", "9223372036854775808"] {
            assert!(From::parse(bad).is_err(), "{bad}");
        }
    }
}
