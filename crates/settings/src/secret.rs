use std::fmt;

use serde::{Deserialize, Deserializer, de};

/// A URL with a password in it. Printing it shows the scheme and the host, and [`SecretUrl::expose`] the whole.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The URL, password and all. Not for logs or errors.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The scheme and the host with its port, if the text is certain to be made so that they hold no secret.
    fn public_part(&self) -> Option<(&str, &str)> {
        let (scheme, rest) = self.0.split_once("://")?;
        let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        // An @ further on is that of a password with a slash in it, of which the authority would be the beginning.
        let host = authority.rsplit('@').next().filter(|_| !tail.contains('@'))?;
        scheme.bytes().all(|byte| byte.is_ascii_alphanumeric()).then_some((scheme, host))
    }
}

impl<T: Into<String>> From<T> for SecretUrl {
    fn from(url: T) -> Self {
        Self(url.into())
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.public_part() {
            Some((scheme, host)) => write!(f, "{scheme}://{host}"),
            None => f.write_str("(secret)"),
        }
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretUrl({self})")
    }
}

impl<'de> Deserialize<'de> for SecretUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let url = String::deserialize(deserializer)?;
        if url.is_empty() {
            return Err(de::Error::custom("must not be empty"));
        }
        Ok(Self(url))
    }
}

#[cfg(test)]
mod tests {
    use super::SecretUrl;

    #[test]
    fn printing_a_url_shows_where_it_leads_and_nothing_else() {
        for (url, shown) in [
            ("postgres://me:pa55@db.example:5432/name?password=pa55", "postgres://db.example:5432"),
            ("amqp://me:pa55@127.0.0.1:5672/%2f", "amqp://127.0.0.1:5672"),
            ("amqp://[::1]:5672", "amqp://[::1]:5672"),
            ("postgres://me:p@55@db/name", "postgres://db"),
            ("postgres://me:pa/55@db/name", "(secret)"),
            ("postgres://me:pa?55@db/name", "(secret)"),
            ("postgres://me:pa#55@db/name", "(secret)"),
            ("me:pa55://x@db/name", "(secret)"),
            ("host=db user=me password=pa55", "(secret)"),
            ("", "(secret)"),
        ] {
            let secret = SecretUrl::from(url);
            assert_eq!(secret.to_string(), shown, "{url}");
            assert_eq!(format!("{secret:?}"), format!("SecretUrl({shown})"), "{url}");
            assert_eq!(secret.expose(), url);
        }
    }
}
