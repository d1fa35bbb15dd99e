//! Catching the panics of handlers. What a panic says may quote what users wrote, so only where it happened is told,
//! and what it says only if that is a literal.

use std::{
    cell::{Cell, RefCell},
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

thread_local! {
    static CAUGHT_HERE: Cell<bool> = const { Cell::new(false) };
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs `work`; a panic becomes words for it, which repeat nothing but literals.
///
/// # Errors
/// When it panicked: where, and why if that's a literal.
pub fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !CAUGHT_HERE.get() {
                return others(info);
            }
            let place = info.location().map(|place| format!(" at {}:{}", place.file(), place.line()));
            let words = info.payload().downcast_ref::<&'static str>().map(|words| format!(": {words}"));
            LAST.set(format!("panicked{}{}", place.unwrap_or_default(), words.unwrap_or_default()));
        }));
    });
    CAUGHT_HERE.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(work));
    CAUGHT_HERE.set(false);
    result.map_err(|_| LAST.take())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_tells_its_place_and_nothing_of_the_data() {
        let literal = catch(|| panic!("out of chunks")).expect_err("it panicked");
        assert!(literal.starts_with("panicked at ") && literal.ends_with(": out of chunks"), "{literal}");
        let text = String::from("secret");
        let formatted = catch(|| panic!("bad {text}")).expect_err("it panicked");
        assert!(formatted.contains("panics.rs:") && !formatted.contains("secret"), "{formatted}");
        assert_eq!(catch(|| 1), Ok(1));
    }
}
