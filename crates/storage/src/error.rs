use diesel::result::{DatabaseErrorKind, Error as Diesel};
use domain::Failure;

/// What the server says of SQLSTATE 40P01 and 55P03. diesel has no kinds for them and hides the code, so the texts have to
/// be English, which every session is checked for.
pub(crate) const DEADLOCK: &str = "deadlock detected";
pub(crate) const LOCK_TIMEOUT: &str = "canceling statement due to lock timeout";

/// Why a query didn't do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database is away, or went away during the call: whether a commit took place is unknown.
    #[error("the database is not available")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Another transaction came first: the same again may pass. [`crate::Database::transaction`] tries that.
    #[error("another transaction was first")]
    Contention(#[source] Diesel),
    /// Another transaction has held what this needs for longer than it may wait: nothing of this one took place, and the
    /// same again may pass.
    #[error("another transaction held a lock for too long")]
    Locked(#[source] Diesel),
    /// The statement ran past its time limit: nothing of the transaction took place.
    #[error("the statement took too long")]
    TooSlow(#[source] Diesel),
    /// There is no such row; says of what kind.
    #[error("unknown {0}")]
    NotFound(&'static str),
    /// The value is somebody else's already; says which field.
    #[error("the {0} is taken")]
    Taken(&'static str),
    /// The row isn't in the state that this needs; says why.
    #[error("{0}")]
    Conflict(&'static str),
    /// Anything else that the database refused.
    #[error("the query failed")]
    Query(#[source] Diesel),
}

/// Whether the connection is lost. A statement can't even be sent once that is known.
pub(crate) fn is_lost(error: &Diesel) -> bool {
    use DatabaseErrorKind::{ClosedConnection, UnableToSendCommand};
    matches!(error, Diesel::DatabaseError(ClosedConnection | UnableToSendCommand, _) | Diesel::BrokenTransactionManager)
}

impl From<Diesel> for Error {
    fn from(error: Diesel) -> Self {
        match error {
            error if is_lost(&error) => Self::Unavailable(error.into()),
            // What the commit has met counts, not that nothing could be undone after it.
            Diesel::RollbackErrorOnCommit { commit_error, .. } => (*commit_error).into(),
            Diesel::DatabaseError(DatabaseErrorKind::SerializationFailure, _) => Self::Contention(error),
            Diesel::DatabaseError(DatabaseErrorKind::Unknown, ref info) if info.message() == DEADLOCK => {
                Self::Contention(error)
            }
            // The latter with NOWAIT.
            Diesel::DatabaseError(DatabaseErrorKind::Unknown, ref info)
                if info.message() == LOCK_TIMEOUT || info.message().starts_with("could not obtain lock on ") =>
            {
                Self::Locked(error)
            }
            // SQLSTATE 57014.
            Diesel::DatabaseError(DatabaseErrorKind::Unknown, ref info)
                if info.message() == "canceling statement due to statement timeout" =>
            {
                Self::TooSlow(error)
            }
            _ => Self::Query(error),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Unavailable(_) => Self::Unavailable(error.into()),
            Error::NotFound(_) | Error::Taken(_) | Error::Conflict(_) => Self::Permanent(error.into()),
            Error::Locked(_) => Self::Busy(error.into()),
            Error::Contention(_) | Error::TooSlow(_) | Error::Query(_) => Self::Transient(error.into()),
        }
    }
}
