//! See the library.

fn main() {
    ordering_lab::main()
}
