mod events;
mod followers;
mod messages;
mod posting;
mod tweets;
mod users;

use crate::{Outcome, context::Context, interrupt::Interrupt};
use std::io::Write;

/// Make users, followers, tweets, account events and messages of the log by the thousand
///
/// Ctrl-C stops between two steps, and the summary says what was done by then. The same command again makes the users
/// or followers that are missing, and tweets, events and messages once more.
#[derive(clap::Subcommand)]
pub(crate) enum Command {
    Users(users::Args),
    Followers(followers::Args),
    Tweets(tweets::Args),
    Events(events::Args),
    Messages(messages::Args),
}

pub(crate) fn run(command: Command, context: &Context, out: &mut dyn Write) -> anyhow::Result<Outcome> {
    let interrupt = Interrupt::catch()?;
    match command {
        Command::Users(args) => users::run(&args, context, &interrupt, out),
        Command::Followers(args) => followers::run(&args, context, &interrupt, out),
        Command::Tweets(args) => tweets::run(&args, context, &interrupt, out),
        Command::Events(args) => events::run(&args, context, &interrupt, out),
        Command::Messages(args) => messages::run(&args, context, &interrupt, out),
    }
}

/// How many users one transaction makes.
const STEP: u32 = 2000;

/// How a run ended of which this much is left.
fn outcome(left: u64) -> Outcome {
    if left == 0 { Outcome::Done } else { Outcome::Interrupted }
}

/// What nobody else's has: `r` and six letters or digits.
fn label() -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let digit = |_| char::from(DIGITS[rand::random_range(0..DIGITS.len())]);
    "r".chars().chain((0..6).map(digit)).collect()
}
