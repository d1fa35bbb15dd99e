//! See the library.

fn main() {
    fleetctl::main()
}
