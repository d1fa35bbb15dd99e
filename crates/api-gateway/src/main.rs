//! The service's process; see the library.

fn main() {
    api_gateway::PROGRAM.main()
}
