//! The benchmarks' program; see the library.

fn main() {
    bench::main()
}
