//! Names of the headers that the worker adds to messages that it sends on; see also [`domain::envelope::header`].

pub use domain::envelope::header::{ORIGINAL_EXCHANGE, ORIGINAL_ROUTING_KEY};

/// The queue whose worker dead-lettered the message.
pub const DIED_IN: &str = "x-died-in";
/// Which setting aside it is: each has an id of its own, though it may be of the same message as another.
pub const SET_ASIDE: &str = "x-set-aside";
/// The message id of a dead letter as it was published, where that can't be used.
pub const ORIGINAL_MESSAGE_ID: &str = "x-original-message-id";
