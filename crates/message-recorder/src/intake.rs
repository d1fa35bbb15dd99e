//! What becomes of the messages of a batch: a function of them and of how far the group has come.

use broker::Delivery;
use domain::log::{Arrival, LogMessage, Watermark, proof::Trust, telling_id};
use std::{borrow::Cow, collections::BTreeSet};
use storage::consumer_offsets::{Passed, Position};

/// What a batch comes to.
#[derive(Debug)]
pub(crate) struct Intake<'a> {
    /// To be recorded, in the order of the offsets.
    pub(crate) taken: Vec<Taken<'a>>,
    /// To be set aside.
    pub(crate) skipped: Vec<Skipped<'a>>,
    /// How many were neither.
    pub(crate) passed: Passed,
    /// The sequences that count as missing, from one to another each.
    pub(crate) gaps: Vec<(i64, i64)>,
    /// Where the group is afterwards.
    pub(crate) position: Position,
}

/// A message to be recorded.
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    pub(crate) offset: i64,
    pub(crate) seq: Option<i64>,
    pub(crate) message_id: Option<&'a str>,
    pub(crate) message: LogMessage,
}

/// Something that is not to be recorded.
#[derive(Debug)]
pub(crate) struct Skipped<'a> {
    pub(crate) offset: i64,
    pub(crate) message_id: Option<&'a str>,
    /// In words that quote nothing of it.
    pub(crate) reason: String,
    /// What more there's to say about it, in words that may.
    pub(crate) detail: Option<String>,
    pub(crate) body: &'a [u8],
}

impl Skipped<'_> {
    /// Whether the database has refused it.
    pub(crate) fn is_refused(&self) -> bool {
        self.detail.is_some()
    }

    /// The reason, with what more there's to say.
    pub(crate) fn full_reason(&self) -> Cow<'_, str> {
        match &self.detail {
            Some(detail) => format!("{}: {detail}", self.reason).into(),
            None => (&*self.reason).into(),
        }
    }
}

/// Sorts what has come of a partition. What the database has refused isn't taken, for the reason that it gave.
pub(crate) fn sort<'a>(
    trust: &Trust,
    position: &Position,
    deliveries: &'a [Delivery],
    refusal: Option<&str>,
) -> Intake<'a> {
    let newest = position.seq.unwrap_or(0);
    let mut watermark = if position.placed { Watermark::beginning(newest) } else { Watermark::after(newest) };
    let (mut taken, mut skipped) = (Vec::new(), Vec::new());
    let (mut passed, mut gaps) = (Passed::default(), Vec::new());
    let mut next_offset = position.next_offset;
    let mut last = None;
    for delivery in deliveries {
        let Some(offset) = delivery.offset.filter(|offset| *offset >= next_offset) else { continue };
        next_offset = offset + 1;
        last = Some(delivery);
        let message_id = telling_id(delivery.message_id.as_deref());
        let seq = trust.sequence(message_id, &delivery.body, watermark.newest()).map(|own| own.seq);
        let decoded = decode(delivery);
        if let Some(seq) = seq {
            let run = decoded.as_ref().ok().and_then(|message| message.run);
            match watermark.meet(seq, run.unwrap_or(seq)) {
                Arrival::Next { missing: 0 } => {}
                Arrival::Next { missing } => {
                    passed.missing += missing;
                    gaps.push((seq - missing, seq - 1));
                }
                Arrival::Again | Arrival::Early => {
                    passed.repeated += 1;
                    continue;
                }
            }
        }
        let mut skip = |reason, detail| {
            skipped.push(Skipped { offset, message_id, reason, detail, body: &delivery.body });
        };
        match (decoded, refusal) {
            (Err(reason), _) => skip(reason, None),
            (Ok(_), Some(refusal)) => skip("the database refuses it".into(), Some(refusal.into())),
            (Ok(message), None) => taken.push(Taken { offset, seq, message_id, message }),
        }
    }
    passed.skipped = skipped.len().try_into().unwrap_or(i64::MAX);
    let last_message_id = match last {
        Some(last) => telling_id(last.message_id.as_deref()).map(ToOwned::to_owned),
        None => position.last_message_id.clone(),
    };
    let seq = Some(watermark.newest()).filter(|newest| *newest > 0);
    let position = Position { next_offset, placed: !watermark.follows(), seq, last_message_id };
    Intake { taken, skipped, passed, gaps, position }
}

impl Intake<'_> {
    /// The ids by which another program's messages can be told.
    pub(crate) fn foreign_ids(&self) -> Vec<&str> {
        self.taken.iter().filter(|taken| taken.seq.is_none()).filter_map(|taken| taken.message_id).collect()
    }

    /// Passes over other programs' messages whose ids were recorded before, or come twice.
    pub(crate) fn pass_over(&mut self, mut recorded: BTreeSet<String>) {
        let before = self.taken.len();
        self.taken.retain(|taken| match (&taken.seq, &taken.message_id) {
            (None, Some(id)) => recorded.insert((*id).to_owned()),
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
