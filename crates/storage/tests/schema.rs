//! Diesel's own tool, which `make lint` installs, beside the schema that the code is compiled against.

use std::{env, fs, path::Path, process::Command};
use test_support::TestDatabase;

/// With `UPDATE_GOLDEN=1` it writes the file first.
#[test]
#[ignore = "make lint runs it, with the tool"]
fn the_schema_is_what_the_migrations_make() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let db = TestDatabase::new();
    let diesel = Command::new(root.join(".local/tools/bin/diesel"))
        .args(["print-schema", "--database-url", db.url()])
        .current_dir(&root)
        .output()
        .expect("the tool is there: make lint");
    assert!(diesel.status.success(), "{}", String::from_utf8_lossy(&diesel.stderr));
    let printed = String::from_utf8(diesel.stdout).unwrap();
    let file = root.join("crates/storage/src/schema.rs");
    if env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&file, &printed).unwrap();
    }
    let written = fs::read_to_string(&file).unwrap();
    assert!(
        printed == written,
        "crates/storage/src/schema.rs isn't what the migrations make: UPDATE_GOLDEN=1 make lint"
    );
}
