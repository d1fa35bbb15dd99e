use super::{
    chosen,
    message::{Message, Reader},
    stream::{self, Stream},
};
use crate::{Outcome, context::Context, interrupt::Interrupt, output};
use anyhow::Context as _;
use std::{
    io::{self, Write as _},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{RecvTimeoutError, sync_channel},
    },
    thread,
    time::Duration,
};
use storage::partitions;

/// Follow the messages that come, a line each: partition and offset, time, message id, key and text
///
/// Runs until Ctrl-C (exit status 130), until N messages, or until its output is closed; through lost connections too, without
/// leaving anything out. No group's offset is moved. Partitions added meanwhile aren't followed. Texts may hold personal data.
#[derive(clap::Args)]
#[command(after_long_help = "\
Examples:
  fleetctl log tail
  fleetctl log tail --partition 0 --count 1 --json | jq -r .text")]
pub(crate) struct Args {
    /// Only this one
    #[arg(long, value_name = "P")]
    partition: Option<i32>,
    /// End after so many
    #[arg(long, value_name = "N", value_parser = count)]
    count: Option<usize>,
    /// Don't cut texts
    #[arg(long)]
    full: bool,
    /// As a JSON object on each line, with texts in full
    #[arg(long)]
    json: bool,
}

fn count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| "must be 1 or more".into())
}

/// How often it's looked whether to end.
const GLANCE: Duration = Duration::from_millis(100);

pub(crate) fn run(args: &Args, context: &Context) -> anyhow::Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    let database = context.database()?;
    let mut conn = database.connection()?;
    let partitions = chosen(&mut conn, args.partition)?;
    let log = partitions::token(&mut conn)?;
    drop(conn);
    let broker = context.broker()?;
    // Places rather than "what comes next": whoever is late, or connects again, misses nothing.
    let streams = stream::survey(&broker, &partitions, Stream::look)?;
    let mut readers = Vec::new();
    for (partition, stream) in partitions.iter().zip(&streams) {
        stream.ensure_declared(*partition)?;
        readers.push(Reader::new(&database, &broker, &log, *partition, stream.next()));
    }
    let ends: Vec<_> = readers.iter().zip(&partitions).map(|(reader, p)| format!("{p}/{}", reader.next)).collect();
    eprintln!("fleetctl: following from {}", ends.join(" "));

    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (sender, messages) = sync_channel(4);
        for mut reader in readers {
            let (sender, over) = (sender.clone(), &over);
            scope.spawn(move || {
                while !over.load(Ordering::Acquire) {
                    let read = reader.read(64, GLANCE);
                    let failed = read.is_err();
                    // Nobody receives any more when it's over.
                    if matches!(&read, Ok(messages) if messages.is_empty()) {
                        continue;
                    }
                    if sender.send(read).is_err() || failed {
                        return;
                    }
                }
            });
        }
        let mut left = args.count.unwrap_or(usize::MAX);
        let outcome = loop {
            if interrupt.is_set() {
                break Ok(Outcome::Interrupted);
            }
            match messages.recv_timeout(GLANCE) {
                Ok(Ok(mut messages)) => {
                    messages.truncate(left);
                    left -= messages.len();
                    match write(&messages, args) {
                        Ok(()) => {}
                        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break Ok(Outcome::Done),
                        Err(error) => break Err(error).context("can't write the output"),
                    }
                }
                Ok(Err(error)) => break Err(error.context("reading a stream")),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if left == 0 {
                break Ok(Outcome::Done);
            }
        };
        over.store(true, Ordering::Release);
        outcome
    })
}

/// Writes them to the standard output itself, to learn whether anybody still reads.
fn write(messages: &[Message], args: &Args) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for message in messages {
        match args.json {
            true => output::json_line(&mut out, message)?,
            false => writeln!(out, "{}", message.line(args.full))?,
        }
    }
    out.flush()
}
