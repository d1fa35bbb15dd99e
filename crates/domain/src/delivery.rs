//! The contracts between the worker loop, which knows no table, and the database, which knows no broker.

use std::fmt;

/// Why handling failed, by what is to be done about it.
///
/// A bare `?` on an [`anyhow::Error`] is [`Failure::Transient`]; errors that know better (the database's) convert
/// by themselves.
pub enum Failure {
    /// May pass: try again, after a delay, a bounded number of times.
    Transient(anyhow::Error),
    /// Will never pass: set the message aside at once.
    Permanent(anyhow::Error),
    /// Something that everything needs is away: no attempt was made, wait for it.
    Unavailable(anyhow::Error),
    /// Somebody else holds what just this needs: nobody's failed attempt, try again until it's free.
    Busy(anyhow::Error),
}

impl Failure {
    /// A failure that no repetition mends, with its reason.
    pub fn permanent(reason: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::Permanent(anyhow::Error::msg(reason))
    }

    /// The error inside.
    pub fn error(&self) -> &anyhow::Error {
        match self {
            Self::Transient(error) | Self::Permanent(error) | Self::Unavailable(error) | Self::Busy(error) => error,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Transient(error)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Transient(_) => "Transient",
            Self::Permanent(_) => "Permanent",
            Self::Unavailable(_) => "Unavailable",
            Self::Busy(_) => "Busy",
        };
        write!(f, "{kind}({:?})", self.error())
    }
}

/// A delivery that the broker has handed out before: whoever had it may have died of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Suspect<'a> {
    /// The queue that it was delivered from.
    pub queue: &'a str,
    /// Its message id, or whatever stands for one.
    pub message_id: &'a str,
}

/// Counts the attempts at redelivered messages where a crash can't undo it: in the database, committed before the
/// attempt begins. The broker's own count can't tell the message that kills its worker from those that were
/// prefetched beside it.
pub trait AttemptLedger: Send + Sync {
    /// The attempts on record for each suspect, in the same order; 0 where there are none.
    ///
    /// # Errors
    /// [`Failure::Unavailable`] while the database is away.
    fn counts(&self, suspects: &[Suspect<'_>]) -> Result<Vec<u32>, Failure>;

    /// Commits an attempt for each suspect, beyond those that are known of it: the same again, because no answer came, counts
    /// once.
    ///
    /// # Errors
    /// [`Failure::Unavailable`] while the database is away.
    fn begin(&self, suspects: &[(Suspect<'_>, u32)]) -> Result<(), Failure>;

    /// Forgets the suspects: they are settled.
    ///
    /// # Errors
    /// [`Failure::Unavailable`] while the database is away.
    fn clear(&self, suspects: &[Suspect<'_>]) -> Result<(), Failure>;
}
