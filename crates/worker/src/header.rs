//! Names of the headers that the worker adds to messages that it sends on; see also [`domain::envelope::header`].

/// The exchange that a retried or dead-lettered message was published to in the first place.
pub const ORIGINAL_EXCHANGE: &str = "x-original-exchange";
/// The routing key that it was published with in the first place.
pub const ORIGINAL_ROUTING_KEY: &str = "x-original-routing-key";
/// The queue whose worker dead-lettered the message.
pub const DIED_IN: &str = "x-died-in";
