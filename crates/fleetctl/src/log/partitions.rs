use super::stream::{Stream, figure, look_at_all, write_blindness};
use crate::{Outcome, context::Context, output};
use domain::log::partition_queue;
use serde::Serialize;
use std::io::Write;
use storage::partitions::{self, Partition};

/// Show the log's partitions: what each one's stream holds, and what is on its way there
///
/// MESSAGES is estimated from the offsets, some of which the broker uses for itself. SEQUENCE is that of the
/// newest message that the relay has taken to publish it, WAITING is how many were accepted and aren't known to be in the
/// stream.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log partitions
  fleetctl log partitions --json | jq '[.partitions[].waiting] | add'")]
pub(crate) struct Args {
    /// As a JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    partition: i32,
    stream: String,
    /// Whether the stream is there; null where the broker can't tell, and so are the next three.
    declared: Option<bool>,
    first_offset: Option<i64>,
    newest_offset: Option<i64>,
    about_messages: Option<i64>,
    newest_sequence: i64,
    waiting: i64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    partitions: Vec<Shown>,
    /// Why nothing is known of the streams.
    streams_out_of_sight: Option<String>,
}

pub(crate) fn run(args: &Args, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let partitions = partitions::list(&mut *context.database()?.connection()?)?;
    let (streams, blind) = look_at_all(context, &partitions.iter().map(|row| row.partition).collect::<Vec<_>>());
    let shown = partitions.into_iter().zip(streams).map(|(Partition { partition, seq, waiting }, stream)| Shown {
        partition,
        stream: partition_queue(partition),
        declared: stream.map(|stream| stream != Stream::Missing),
        first_offset: stream.and_then(Stream::first),
        newest_offset: stream.and_then(Stream::newest),
        about_messages: stream.map(|stream| stream.messages(None)),
        newest_sequence: seq,
        waiting,
    });
    let report = Report { partitions: shown.collect(), streams_out_of_sight: blind };
    match args.json {
        true => output::json(out, &report)?,
        false => report.write_text(out)?,
    }
    Ok(Outcome::Done)
}

impl Report {
    fn write_text(&self, out: &mut dyn Write) -> anyhow::Result<()> {
        write_blindness(self.streams_out_of_sight.as_deref());
        let row = |shown: &Shown| {
            vec![
                shown.partition.to_string(),
                shown.stream.clone(),
                figure(shown.declared, shown.first_offset),
                figure(shown.declared, shown.newest_offset),
                figure(shown.declared, shown.about_messages.filter(|_| shown.declared == Some(true))),
                shown.newest_sequence.to_string(),
                shown.waiting.to_string(),
            ]
        };
        let header = ["PARTITION", "STREAM", "FIRST", "NEWEST", "MESSAGES (ABOUT)", "SEQUENCE", "WAITING"];
        output::table(out, &header, &self.partitions.iter().map(row).collect::<Vec<_>>())?;
        Ok(())
    }
}
