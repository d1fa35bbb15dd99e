#![doc = include_str!("../README.md")]

use argon2::{
    Argon2,
    password_hash::{self, PasswordHasher as _},
};
use domain::values::Invalid;

/// Shortest password, in characters.
pub const MIN: usize = 8;
/// Longest password, in characters.
pub const MAX: usize = 128;

/// A password as it was chosen: every character counts, blanks too. Never shown.
pub struct Password(String);

impl Password {
    /// # Errors
    /// When it's too short or too long.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        match text.chars().count() {
            MIN..=MAX => Ok(Self(text.into())),
            _ => Err(Invalid(format!("must be {MIN} to {MAX} characters long"))),
        }
    }

    /// The argon2id hash in PHC form, with the crate's defaults: OWASP's first choice, 19 MiB and 2 passes. Slow
    /// by design: some 20 ms of a core.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn hash(&self) -> password_hash::Result<String> {
        Ok(Argon2::default().hash_password(self.0.as_bytes())?.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use argon2::password_hash::{PasswordVerifier as _, phc::PasswordHash};

    #[test]
    fn a_hash_is_argon2id_and_verifies_its_password_alone() {
        let hash = Password::parse("correct horse").unwrap().hash().unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        let hash = PasswordHash::new(&hash).unwrap();
        assert!(Argon2::default().verify_password(b"correct horse", &hash).is_ok());
        assert!(Argon2::default().verify_password(b"correct horse ", &hash).is_err());
    }
}
