#![doc = include_str!("../README.md")]

mod private;
mod proxy;
mod rabbitmq;
mod wait;

pub use private::{Folder, Frozen, Server, as_user, free_ports, signal};
pub use proxy::{Action, Direction, Held, Proxy, Trap, after};
pub use rabbitmq::PrivateRabbitmq;
pub use wait::{eventually, eventually_within};
