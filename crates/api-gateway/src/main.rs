//! The service's process; see the library.

fn main() {
    settings::main(
        "api-gateway",
        "Answers the fleet's HTTP: users, subscriptions, tweets, feeds, follower imports, account events, the message log.",
        api_gateway::run,
    )
}
