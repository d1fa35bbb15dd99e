//! What becomes of the messages of a batch: a function of them and of how far the group has come.

use broker::Delivery;
use domain::{
    envelope::header,
    log::{Arrival, LogMessage, MESSAGE, MessageId, Watermark},
};
use std::collections::BTreeSet;
use storage::consumer_offsets::{Passed, Position};

/// What a batch comes to.
#[derive(Debug, Default)]
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
    let mut watermark = Watermark::new(position.seq);
    let mut intake = Intake { position: position.clone(), ..Intake::default() };
    for delivery in deliveries {
        let Some(offset) = delivery.offset.filter(|offset| *offset >= intake.position.next_offset) else { continue };
        intake.position.next_offset = offset + 1;
        let own = delivery.message_id.as_deref().and_then(MessageId::parse);
        let seq = own.filter(|id| id.log == log && id.partition == partition).map(|id| id.seq);
        if let Some(seq) = seq {
            // Somebody who copies messages may have left the header out.
            let run = delivery.headers.get(header::RUN).and_then(|run| run.parse().ok()).unwrap_or(seq);
            match watermark.meet(seq, run) {
                Arrival::Next { missing } => intake.passed.missing += missing,
                Arrival::Again | Arrival::Early => {
                    intake.passed.repeated += 1;
                    intake.position.last_message_id = delivery.message_id;
                    continue;
                }
            }
        }
        intake.position.last_message_id.clone_from(&delivery.message_id);
        match decode(&delivery) {
            Ok(message) => intake.taken.push(Taken { offset, seq, message_id: delivery.message_id, message }),
            Err(reason) => {
                // An id that the database can't hold is none to it.
                let message_id = delivery.message_id.filter(|id| !id.contains('\0'));
                intake.skipped.push(Skipped { offset, message_id, reason, body: delivery.body });
            }
        }
    }
    intake.passed.skipped = intake.skipped.len().try_into().unwrap_or(i64::MAX);
    intake.position.seq = watermark.seq();
    intake
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

/// The message, or why it's none, in words that quote nothing of it.
fn decode(delivery: &Delivery) -> Result<LogMessage, String> {
    if delivery.kind.as_deref().is_some_and(|kind| kind != MESSAGE) {
        return Err("its type is another".into());
    }
    if delivery.message_id.as_deref().is_some_and(|id| id.contains('\0')) {
        return Err("its message id contains the NUL character".into());
    }
    let message: LogMessage = serde_json::from_slice(&delivery.body).map_err(|error| {
        let what = if error.is_data() { "its body isn't {text, key?}" } else { "its body is no JSON" };
        format!("{what}: line {}, column {}", error.line(), error.column())
    })?;
    message.check().map_err(|invalid| invalid.0)?;
    Ok(message)
}
