//! The proof that a message of the log is a relay's own. Without it, nobody trusts the sequence in its id.
//!
//! Each process that publishes registers an epoch with a random key in the database, and each of its messages carries the
//! epoch and a SipHash-2-4 of 128 bits (Aumasson and Bernstein, 2012) of its id and body under that key. Whoever can only read the streams can't make one, and a copy of
//! the database, whose ids look alike, has other epochs. What a stranger can do is to publish a relay's message once more:
//! that has been here.
//!
//! The proof is the body's last field, `,"proof":"<epoch><digest>"}`, always as long: it's found without reading the JSON,
//! and what is before it is what was proved.

use super::MessageId;
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use siphasher::sip128::{Hasher128 as _, SipHasher24};
use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    hash::Hasher as _,
};
use uuid::Uuid;

const BEFORE: &[u8] = br#","proof":""#;
const BEHIND: &[u8] = br#""}"#;
/// The length of an epoch's name.
const EPOCH: usize = 12;
/// The length of its key.
const KEY: usize = 16;
/// The length of a digest of 16 bytes, in base64.
const DIGEST: usize = 22;

/// What a process proves its messages with.
#[derive(Clone, PartialEq, Eq)]
pub struct Epoch {
    name: String,
    key: [u8; KEY],
}

impl Epoch {
    /// A new one.
    pub fn random() -> Self {
        let name = Uuid::new_v4().simple().to_string()[..EPOCH].into();
        Self { name, key: Uuid::new_v4().into_bytes() }
    }

    /// One that was registered; `None` if that's no key.
    pub fn registered(name: String, key: &[u8]) -> Option<Self> {
        Some(Self { name, key: key.try_into().ok()? })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its secret.
    pub fn key(&self) -> &[u8] {
        &self.key
    }
}

// The key stays out of logs.
impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Epoch({})", self.name)
    }
}

impl Epoch {
    fn digest(&self, id: &str, proved: &[u8]) -> u128 {
        let mut digest = SipHasher24::new_with_key(&self.key);
        digest.write_u64(id.len() as u64);
        digest.write(id.as_bytes());
        digest.write(proved);
        digest.finish128().as_u128()
    }

    /// Appends the proof to a body, which is a JSON object with at least one field.
    pub(super) fn prove(&self, id: &str, body: &mut Vec<u8>) {
        body.pop();
        let digest = BASE64_URL_SAFE_NO_PAD.encode(self.digest(id, body).to_le_bytes());
        for part in [BEFORE, self.name.as_bytes(), digest.as_bytes(), BEHIND] {
            body.extend_from_slice(part);
        }
    }

    fn holds(&self, id: &str, claim: &Claim<'_>) -> bool {
        // The decoder wants a little more room than the 16 bytes need.
        let mut decoded = [0; 18];
        let length = BASE64_URL_SAFE_NO_PAD.decode_slice(claim.digest, &mut decoded);
        length == Ok(16) && decoded[..16] == self.digest(id, claim.proved).to_le_bytes()
    }
}

/// A proof that a body claims to have.
struct Claim<'a> {
    epoch: &'a str,
    digest: &'a [u8],
    proved: &'a [u8],
}

impl<'a> Claim<'a> {
    fn of(body: &'a [u8]) -> Option<Self> {
        let rest = body.strip_suffix(BEHIND)?;
        let (rest, digest) = rest.split_at_checked(rest.len().checked_sub(DIGEST)?)?;
        let (rest, epoch) = rest.split_at_checked(rest.len().checked_sub(EPOCH)?)?;
        Some(Self { epoch: std::str::from_utf8(epoch).ok()?, digest, proved: rest.strip_suffix(BEFORE)? })
    }
}

/// What a reader of a partition trusts.
#[derive(Clone, Debug)]
pub struct Trust {
    log: String,
    partition: i32,
    epochs: HashMap<String, Epoch>,
    unproven_upto: Option<i64>,
}

/// A sequence that is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trusted {
    /// The sequence.
    pub seq: i64,
    /// Whether it's proved. Else the message was published before there were proofs.
    pub proven: bool,
}

impl Trust {
    /// Of a reader of this partition of the log whose ids begin like this. It knows no epoch yet.
    pub fn new(log: &str, partition: i32) -> Self {
        Self { log: log.into(), partition, epochs: HashMap::new(), unproven_upto: Some(0) }
    }

    /// Trusts messages without a proof up to this sequence, all of them if it's `None`: those of relays that made none.
    pub fn trust_unproven(&mut self, upto: Option<i64>) {
        self.unproven_upto = upto;
    }

    /// Trusts an epoch.
    pub fn trust(&mut self, epoch: &Epoch) {
        self.epochs.insert(epoch.name.clone(), epoch.clone());
    }

    /// Whether it trusts any epoch.
    pub fn knows_any(&self) -> bool {
        !self.epochs.is_empty()
    }

    fn own(&self, id: &str) -> Option<i64> {
        let id = MessageId::parse(id)?;
        (id.log == self.log && id.partition == self.partition).then_some(id.seq)
    }

    /// The epochs of messages, given by id and body, that aren't known: to be looked up.
    pub fn unknown<'a>(&self, messages: impl IntoIterator<Item = (Option<&'a str>, &'a [u8])>) -> BTreeSet<&'a str> {
        let unknown = |(id, body): (Option<&str>, &'a [u8])| {
            let epoch = Claim::of(body)?.epoch;
            (!self.epochs.contains_key(epoch) && self.own(id?).is_some()).then_some(epoch)
        };
        messages.into_iter().filter_map(unknown).collect()
    }

    /// The sequence of a message, if it's the log's own, for a reader that has come to the sequence `newest`. Of another
    /// program's message, whatever its id looks like, it's `None`.
    pub fn sequence(&self, id: Option<&str>, body: &[u8], newest: i64) -> Option<Trusted> {
        let id = id?;
        let seq = self.own(id)?;
        let proven = Claim::of(body)
            .is_some_and(|claim| self.epochs.get(claim.epoch).is_some_and(|epoch| epoch.holds(id, &claim)));
        // Those without a proof are before all that have one.
        let is_old = || self.unproven_upto.is_none_or(|upto| seq <= upto && newest <= upto);
        (proven || is_old()).then_some(Trusted { seq, proven })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::LogMessage;

    const ID: MessageId<'_> = MessageId { log: "ab12", partition: 3, seq: 17 };

    fn body(epoch: &Epoch, text: &str) -> Vec<u8> {
        let message = LogMessage { text: text.into(), key: None, accepted_at: None, run: None };
        message.envelope(&ID, 15, epoch).body
    }

    fn trust(epochs: &[&Epoch]) -> Trust {
        let mut trust = Trust::new("ab12", 3);
        epochs.iter().for_each(|epoch| trust.trust(epoch));
        trust
    }

    #[test]
    fn a_proof_holds_for_its_message_and_for_no_other() {
        let (epoch, other) = (Epoch::random(), Epoch::random());
        let (id, body) = (ID.to_string(), body(&epoch, "text"));
        let decoded = LogMessage::decode(None, &body).unwrap();
        assert_eq!((decoded.text.as_str(), decoded.run), ("text", Some(15)));
        let trust = trust(&[&epoch, &other]);
        assert_eq!(trust.sequence(Some(&id), &body, 0), Some(Trusted { seq: 17, proven: true }));
        // Of another sequence, in another partition, in another log.
        for id in ["ab12/03/18", "ab12/04/17", "ab13/03/17", "else"] {
            assert_eq!(trust.sequence(Some(id), &body, 0), None, "{id}");
        }
        // Each byte counts: the text, the run, the epoch, the digest.
        for at in 0..body.len() {
            let mut changed = body.clone();
            changed[at] ^= 1;
            assert_eq!(trust.sequence(Some(&id), &changed, 0), None, "{at}: {}", String::from_utf8_lossy(&changed));
        }
        assert_eq!(trust.sequence(Some(&id), &body[1..], 0), None);
        // Under a known epoch's name, with another key.
        let stolen = Epoch { name: epoch.name.clone(), key: other.key };
        assert_eq!(trust.sequence(Some(&id), &super::tests::body(&stolen, "text"), 0), None);
    }

    #[test]
    fn an_epoch_that_is_not_known_is_looked_up_and_proves_nothing_until_then() {
        let epoch = Epoch::random();
        let (id, body) = (ID.to_string(), body(&epoch, "text"));
        let mut trust = trust(&[]);
        assert_eq!(trust.sequence(Some(&id), &body, 0), None);
        let messages =
            [(Some(&*id), &body[..]), (Some("else"), &body[..]), (None, &body[..]), (Some(&*id), br#"{"text":"a"}"#)];
        assert_eq!(trust.unknown(messages), BTreeSet::from([epoch.name()]));
        trust.trust(&Epoch::registered(epoch.name().into(), epoch.key()).unwrap());
        assert_eq!(trust.unknown(messages), BTreeSet::new());
        assert!(trust.sequence(Some(&id), &body, 0).is_some());
    }

    #[test]
    fn messages_without_a_proof_are_trusted_as_far_as_relays_made_none() {
        let body = br#"{"text":"a","run":17}"#;
        let id = ID.to_string();
        let mut trust = trust(&[]);
        let mut trusted = |upto: Option<i64>, newest: i64| {
            trust.trust_unproven(upto);
            trust.sequence(Some(&id), body, newest)
        };
        let old = Some(Trusted { seq: 17, proven: false });
        assert_eq!((trusted(Some(16), 0), trusted(Some(17), 16), trusted(None, 1000)), (None, old, old));
        assert_eq!(trusted(Some(17), 18), None, "what has a proof comes behind what has none");
    }

    #[test]
    fn no_log_holds_a_key() {
        let epoch = Epoch::registered("0123456789ab".into(), b"secret.secret.se").unwrap();
        assert_eq!(format!("{epoch:?}"), "Epoch(0123456789ab)");
        assert_eq!(Epoch::registered("0123456789ab".into(), b"secret"), None);
    }
}
