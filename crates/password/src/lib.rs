#![doc = include_str!("../README.md")]

use argon2::{
    Argon2, Block, Params, Version,
    password_hash::{
        self,
        phc::{Output, ParamsString, PasswordHash, Salt},
        try_generate_salt,
    },
};
use domain::values::Invalid;
use zxcvbn::zxcvbn;

/// Shortest password, in characters.
pub const MIN: usize = 6;
/// Longest password, in characters.
pub const MAX: usize = 128;

/// The 19 MiB that hashing takes, to be used again: given back after each hash, they stay with every thread that has ever hashed
/// (glibc keeps an arena for each).
#[derive(Default)]
pub struct Memory(Vec<Block>);

/// A password as it was chosen: every character counts, blanks too. Never shown.
pub struct Password(String);

impl Password {
    /// A password chosen by somebody of whom others know these values, such as the login.
    ///
    /// As NIST SP 800-63B has it, nothing is asked of its characters, but it must not be what attackers try first. That is
    /// told by how many guesses zxcvbn expects: it knows 30,000 passwords and as many words and names by their rank, patterns
    /// such as `qwerty`, `aaaaaa` and `123456`, and sees through capitals and digits in place of letters. It takes 0.1 ms,
    /// and at worst as long as the hash.
    ///
    /// # Errors
    /// When it's too short, too long, or among the first guesses.
    pub fn parse(text: &str, known: &[&str]) -> Result<Self, Invalid> {
        /// Where fewer tries are enough, a limit on their rate hardly helps.
        const GUESSES_MIN: u64 = 10_000;
        /// The longest, in characters, whose guesses are estimated: that takes the cube of the length, and what is tried first
        /// is shorter.
        const ESTIMATED_MAX: usize = 24;
        let length = text.chars().count();
        if !(MIN..=MAX).contains(&length) {
            return Err(Invalid(format!("must be {MIN} to {MAX} characters long")));
        }
        // Of an address, the part that may be the login elsewhere, too.
        let known: Vec<_> = known.iter().flat_map(|value| [value, value.split('@').next().unwrap_or(value)]).collect();
        let is_known = || known.iter().any(|value| value.to_lowercase() == text.to_lowercase());
        if is_known() || length <= ESTIMATED_MAX && zxcvbn(text, &known).guesses() < GUESSES_MIN {
            return Err(Invalid(
                "is too easy to guess: it is a common password or pattern, or made of the login or the address; take a \
                 longer one, for example a few words that have nothing to do with one another"
                    .into(),
            ));
        }
        Ok(Self(text.into()))
    }

    /// The argon2id hash in PHC form, with the crate's defaults: OWASP's first choice, 19 MiB and 2 passes. Slow
    /// by design: some 20 ms of a core.
    ///
    /// # Errors
    /// When the system has no randomness to give.
    pub fn hash(&self, memory: &mut Memory) -> password_hash::Result<String> {
        let argon2 = Argon2::default();
        let params = argon2.params();
        let salt = Salt::new(&try_generate_salt().map_err(|_| password_hash::Error::Crypto)?)?;
        memory.0.resize(params.block_count(), Block::default());
        let mut hash = [0; Params::DEFAULT_OUTPUT_LEN];
        argon2.hash_password_into_with_memory(self.0.as_bytes(), &salt, &mut hash, &mut memory.0)?;
        let hash = PasswordHash {
            algorithm: argon2::ARGON2ID_IDENT,
            version: Some(Version::default().into()),
            params: ParamsString::try_from(params)?,
            salt: Some(salt),
            hash: Some(Output::new(&hash)?),
        };
        Ok(hash.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use argon2::password_hash::PasswordVerifier as _;

    #[test]
    fn a_hash_is_argon2id_and_verifies_its_password_alone() {
        let mut memory = Memory::default();
        let first = Password::parse("correct horse", &[]).unwrap().hash(&mut memory).unwrap();
        // What the memory holds of the first doesn't matter to the second.
        let hash = Password::parse("correct horse", &[]).unwrap().hash(&mut memory).unwrap();
        assert_ne!(first, hash);
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        let hash = PasswordHash::new(&hash).unwrap();
        assert!(Argon2::default().verify_password(b"correct horse", &hash).is_ok());
        assert!(Argon2::default().verify_password(b"correct horse ", &hash).is_err());
    }

    #[test]
    fn what_is_guessed_first_is_refused_and_what_is_long_enough_costs_no_estimate() {
        let parse = |text: &str| Password::parse(text, &["annabella", "anna.smith@example.com"]);
        for bad in
            ["123456", "Passw0rd", "iloveyou", "aaaaaa", "abcdef", "allebanna", "anna.smith", "ANNA.SMITH@example.com"]
        {
            assert!(parse(bad).is_err_and(|invalid| invalid.0.starts_with("is too easy to guess")), "{bad}");
        }
        for good in ["kV7#qz", "wqz8xk", "correct horse", "žluťoučký kůň", &"4@8({[<369+!1|0$5%2".repeat(6)] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["kV7#q", &"kV7#qz".repeat(22)] {
            assert!(parse(bad).is_err_and(|invalid| invalid.0 == "must be 6 to 128 characters long"), "{bad}");
        }
    }
}
