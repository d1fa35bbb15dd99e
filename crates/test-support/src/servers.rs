//! Where the servers are.

use std::{env, fs, path::Path};

/// The value of `name`, from the environment or from the checkout's `.local/env`.
pub(crate) fn variable(name: &str) -> String {
    if let Ok(value) = env::var(name) {
        return value;
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.local/env");
    let text = fs::read_to_string(&path).unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("{name} is neither set nor in .local/env: run `make servers` first"))
        .to_owned()
}
