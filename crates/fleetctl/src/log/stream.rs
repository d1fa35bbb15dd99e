//! What partitions' streams hold.

use crate::context::Context;
use anyhow::{Context as _, bail};
use broker::{Error, Settings, Survey};
use domain::log::partition_queue;
use std::thread;

/// Connections that look at streams at once: a stream takes up to a second.
const SIDE_BY_SIDE: usize = 4;

/// A partition's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    /// It isn't declared.
    Missing,
    /// No message has come yet.
    Empty,
    /// The offsets of the first message that is left, and of the newest.
    Holds { first: i64, newest: i64 },
}

impl Stream {
    pub(super) fn look(survey: &mut Survey, partition: i32) -> Result<Self, Error> {
        let stream = partition_queue(partition);
        let first = match survey.first(&stream) {
            Err(Error::MissingQueue { .. }) => return Ok(Self::Missing),
            first => first?,
        };
        let Some(first) = first else { return Ok(Self::Empty) };
        // One that was deleted in between has nothing.
        Ok(survey.newest(&stream)?.map_or(Self::Empty, |newest| Self::Holds { first, newest }))
    }

    pub(super) fn first(self) -> Option<i64> {
        match self {
            Self::Holds { first, .. } => Some(first),
            Self::Missing | Self::Empty => None,
        }
    }

    pub(super) fn newest(self) -> Option<i64> {
        match self {
            Self::Holds { newest, .. } => Some(newest),
            Self::Missing | Self::Empty => None,
        }
    }

    /// The offset of the message that comes next; about, as the broker may use it for itself.
    pub(super) fn next(self) -> i64 {
        self.newest().map_or(0, |newest| newest + 1)
    }

    /// About how many messages there are from this offset on, or altogether.
    pub(super) fn messages(self, from: Option<i64>) -> i64 {
        let Self::Holds { first, newest } = self else { return 0 };
        (newest + 1 - from.unwrap_or(first).max(first)).max(0)
    }

    pub(super) fn ensure_declared(self, partition: i32) -> anyhow::Result<()> {
        match self {
            Self::Missing => bail!(
                "there is no stream `{}`; declare it with `fleetctl topology declare`",
                partition_queue(partition)
            ),
            Self::Empty | Self::Holds { .. } => Ok(()),
        }
    }

    /// Whether there's a message of this offset, as far as its ends tell.
    pub(super) fn ensure_holds(self, partition: i32, offset: i64) -> anyhow::Result<()> {
        self.ensure_declared(partition)?;
        match self {
            Self::Holds { first, newest } if offset < first => bail!(
                "partition {partition} no longer has offset {offset}: retention removed it; the first is {first}, the newest \
                 {newest}"
            ),
            Self::Holds { first, newest } if offset > newest => {
                bail!("partition {partition} has no offset {offset} yet; the first is {first}, the newest {newest}")
            }
            Self::Holds { .. } => Ok(()),
            Self::Missing | Self::Empty => bail!("partition {partition} has no offset {offset}: it's empty"),
        }
    }
}

/// Looks at these partitions by `look`, some of them side by side; answers in their order.
pub(super) fn survey<T: Send>(
    broker: &Settings,
    partitions: &[i32],
    look: impl Fn(&mut Survey, i32) -> Result<T, Error> + Sync,
) -> anyhow::Result<Vec<T>> {
    let look_at = |partitions: &[i32]| {
        let mut survey = Survey::open(broker, "fleetctl")?;
        partitions.iter().map(|partition| look(&mut survey, *partition)).collect()
    };
    let found: Result<Vec<Vec<T>>, Error> = thread::scope(|scope| {
        let share = partitions.len().div_ceil(SIDE_BY_SIDE).max(1);
        let looking: Vec<_> = partitions.chunks(share).map(|chunk| scope.spawn(|| look_at(chunk))).collect();
        looking.into_iter().map(|thread| thread.join().expect("looking doesn't panic")).collect()
    });
    Ok(found.context("looking at the streams")?.into_iter().flatten().collect())
}

/// What the partitions' streams hold; where the broker can't tell, nothing of each, and why.
pub(super) fn look_at_all(context: &Context, partitions: &[i32]) -> (Vec<Option<Stream>>, Option<String>) {
    let broker = context.broker_if_set().and_then(|broker| broker.context("no address is given (--amqp-url)"));
    match broker.and_then(|broker| survey(&broker, partitions, Stream::look)) {
        Ok(streams) => (streams.into_iter().map(Some).collect(), None),
        Err(error) => (vec![None; partitions.len()], Some(format!("{error:#}"))),
    }
}

/// A figure of a stream, or why there's none.
pub(super) fn figure(declared: Option<bool>, figure: Option<i64>) -> String {
    match (declared, figure) {
        (_, Some(figure)) => figure.to_string(),
        (Some(true), None) => "-".into(),
        (Some(false), None) => "no stream".into(),
        (None, None) => "?".into(),
    }
}

/// Tells why the streams are out of sight, if they are.
pub(super) fn write_blindness(blind: Option<&str>) {
    if let Some(reason) = blind {
        eprintln!("fleetctl: can't tell what the streams hold: {reason}");
    }
}

#[cfg(test)]
mod tests {
    use super::Stream::{self, Empty, Holds, Missing};

    const HOLDS: Stream = Holds { first: 10, newest: 19 };

    #[test]
    fn what_is_left_to_read_is_counted_from_the_first_that_is_left() {
        assert_eq!(
            [None, Some(3), Some(10), Some(15), Some(20), Some(30)].map(|from| HOLDS.messages(from)),
            [10, 10, 10, 5, 0, 0]
        );
        assert_eq!((Missing.messages(None), Empty.messages(Some(5)), Empty.next(), HOLDS.next()), (0, 0, 0, 20));
    }

    #[test]
    fn an_offset_that_isnt_there_is_told_with_those_that_are() {
        let refusal = |stream: Stream, offset| stream.ensure_holds(3, offset).unwrap_err().to_string();
        assert!(HOLDS.ensure_holds(3, 10).is_ok() && HOLDS.ensure_holds(3, 19).is_ok());
        assert!(refusal(HOLDS, 9).ends_with("retention removed it; the first is 10, the newest 19"));
        assert!(refusal(HOLDS, 20).ends_with("no offset 20 yet; the first is 10, the newest 19"));
        assert!(refusal(Empty, 0).ends_with("it's empty"));
        assert!(refusal(Missing, 0).contains("`message.p03`"));
    }
}
