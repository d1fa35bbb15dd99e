//! Whether a partition's stream still has what the group is to read next.
//!
//! The broker takes an offset that it doesn't have for another one, and says nothing. So reading begins one message
//! early, with the last that was read: if that is there, nothing between it and the next is missing.

use broker::{Delivery, StreamOffset, Survey};
use domain::log::{proof::Trust, telling_id};
use storage::consumer_offsets::Position;

/// Why a group can't go on with a partition by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    /// Retention was faster than the group.
    #[error("the messages from offset {next} on were removed by retention; the first that is left is {first}")]
    Trimmed {
        /// What the group was to read next.
        next: i64,
        /// The first that is left.
        first: i64,
    },
    /// The broker has lost messages, or all of them.
    #[error("the group's next offset is {next}, but the stream ends {}", End(*.newest))]
    Cut {
        /// What the group was to read next.
        next: i64,
        /// The newest that there is.
        newest: Option<i64>,
    },
    /// The broker has lost all, and has new ones.
    #[error("the message before offset {next} isn't the one that was read there: the stream was made anew")]
    Replaced {
        /// What the group was to read next.
        next: i64,
    },
}

struct End(Option<i64>);

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(newest) => write!(f, "with {newest}"),
            None => f.write_str("before its first message"),
        }
    }
}

/// Whether the message before the next one is known.
pub(crate) fn is_anchored(position: &Position) -> bool {
    position.next_offset > 0 && (!position.placed || position.last_message_id.is_some())
}

/// Where to begin reading.
pub(crate) fn start(position: &Position) -> StreamOffset {
    StreamOffset::At(position.next_offset - i64::from(is_anchored(position)))
}

/// Checks the first message that comes after beginning at [`start`] of a position that is anchored.
pub(crate) fn check(trust: &Trust, position: &Position, first: &Delivery) -> Result<(), Trouble> {
    let next = position.next_offset;
    let id = telling_id(first.message_id.as_deref());
    let is_last = || id == telling_id(position.last_message_id.as_deref());
    let newest = position.seq.unwrap_or(0);
    let follows = !position.placed
        && trust.sequence(id, &first.body, newest).is_some_and(|own| newest > 0 && own.seq == newest + 1);
    match first.offset {
        Some(offset) if offset == next - 1 && is_last() => Ok(()),
        // The last one read was the last of what retention has removed. The broker uses some offsets for itself.
        Some(offset) if offset == next || (offset > next && follows) => Ok(()),
        Some(offset) if offset > next => Err(Trouble::Trimmed { next, first: offset }),
        _ => Err(Trouble::Replaced { next }),
    }
}

/// Looks at both ends of the stream: whether the next message may be there, or be still to come.
pub(crate) fn look(survey: &mut Survey, stream: &str, position: &Position) -> Result<Option<Trouble>, broker::Error> {
    let next = position.next_offset;
    if let Some(first) = survey.first(stream)?.filter(|first| *first > next) {
        return Ok(Some(Trouble::Trimmed { next, first }));
    }
    // Every stream has a beginning.
    let newest = if next > 0 { survey.newest(stream)? } else { None };
    Ok((newest.map_or(0, |newest| newest + 1) < next).then_some(Trouble::Cut { next, newest }))
}
