//! What becomes of the messages of a batch: a function of them and of how far the group has come.

use broker::Delivery;
use domain::log::{Arrival, LogMessage, MessageId, Watermark};
use std::collections::BTreeSet;
use storage::consumer_offsets::{Passed, Position};

/// What a batch comes to.
#[derive(Debug)]
pub(crate) struct Intake {
    /// To be recorded, in the order of the offsets.
    pub(crate) taken: Vec<Taken>,
    /// To be set aside.
    pub(crate) skipped: Vec<Skipped>,
    /// How many were neither.
    pub(crate) passed: Passed,
    /// Where the group is afterwards.
    pub(crate) position: Position,
}

/// A message to be recorded.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) offset: i64,
    pub(crate) seq: Option<i64>,
    pub(crate) message_id: Option<String>,
    pub(crate) message: LogMessage,
}

/// Something that is no message.
#[derive(Debug)]
pub(crate) struct Skipped {
    pub(crate) offset: i64,
    pub(crate) message_id: Option<String>,
    pub(crate) reason: String,
    pub(crate) body: Vec<u8>,
}

/// Sorts what has come of a partition of the log that ids begin with `log` for.
pub(crate) fn sort(log: &str, partition: i32, position: &Position, deliveries: Vec<Delivery>) -> Intake {
    let newest = position.seq.unwrap_or(0);
    let mut watermark = if position.placed { Watermark::beginning(newest) } else { Watermark::after(newest) };
    let (mut taken, mut skipped, mut passed) = (Vec::new(), Vec::new(), Passed::default());
    let mut position = position.clone();
    for delivery in deliveries {
        // An id that the database can't hold is none to it.
        let storable = |id: &String| !id.contains('\0');
        let Some(offset) = delivery.offset.filter(|offset| *offset >= position.next_offset) else { continue };
        position.next_offset = offset + 1;
        let own = delivery.message_id.as_deref().and_then(MessageId::parse);
        let seq = own.filter(|id| id.log == log && id.partition == partition).map(|id| id.seq);
        let decoded = decode(&delivery);
        position.last_message_id = delivery.message_id.clone().filter(storable);
        if let Some(seq) = seq {
            let run = decoded.as_ref().ok().and_then(|message| message.run);
            match watermark.meet(seq, run.unwrap_or(seq)) {
                Arrival::Next { missing } => passed.missing += missing,
                Arrival::Again | Arrival::Early => {
                    passed.repeated += 1;
                    continue;
                }
            }
        }
        match decoded {
            Ok(message) => taken.push(Taken { offset, seq, message_id: delivery.message_id, message }),
            Err(reason) => {
                let message_id = delivery.message_id.filter(storable);
                skipped.push(Skipped { offset, message_id, reason, body: delivery.body });
            }
        }
    }
    passed.skipped = skipped.len().try_into().unwrap_or(i64::MAX);
    position.seq = Some(watermark.newest()).filter(|newest| *newest > 0);
    position.placed = !watermark.follows();
    Intake { taken, skipped, passed, position }
}

impl Intake {
    /// The ids by which another program's messages can be told.
    pub(crate) fn foreign_ids(&self) -> Vec<&str> {
        self.taken.iter().filter(|taken| taken.seq.is_none()).filter_map(|taken| taken.message_id.as_deref()).collect()
    }

    /// Passes over other programs' messages whose ids were recorded before, or come twice.
    pub(crate) fn pass_over(&mut self, mut recorded: BTreeSet<String>) {
        let before = self.taken.len();
        self.taken.retain(|taken| match (&taken.seq, &taken.message_id) {
            (None, Some(id)) => recorded.insert(id.clone()),
            _ => true,
        });
        self.passed.repeated += i64::try_from(before - self.taken.len()).unwrap_or(i64::MAX);
    }
}

fn decode(delivery: &Delivery) -> Result<LogMessage, String> {
    if delivery.message_id.as_deref().is_some_and(|id| id.contains('\0')) {
        return Err("its message id contains the NUL character".into());
    }
    LogMessage::decode(delivery.kind.as_deref(), &delivery.body).map_err(|invalid| invalid.0)
}
