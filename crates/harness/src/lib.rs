#![doc = include_str!("../README.md")]

mod fleet;
mod postgres;
mod private;
mod processes;
mod proxy;
mod rabbitmq;
mod wait;

pub use fleet::{Fleet, Name, services};
pub use postgres::PrivatePostgres;
pub use private::{Folder, Frozen, Server, as_user, free_ports, signal};
pub use processes::{Processes, binaries};
pub use proxy::{Action, Direction, Held, Proxy, Trap, after};
pub use rabbitmq::PrivateRabbitmq;
pub use wait::{eventually, eventually_within};
