//! Values that are valid by construction: parsed once at the edge, trusted afterwards.
//!
//! `parse` trims surrounding blanks. Lengths are counted in characters (Unicode scalar values), as Postgres counts them.
//! The errors say what is wrong in words for a client, and never repeat the value.

use serde::{Deserialize, Serialize};
use std::fmt;
use unicode_segmentation::UnicodeSegmentation as _;
use uuid::Uuid;

/// Why a value was refused, in words for the one who sent it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

/// Longest login, in characters.
pub const LOGIN_MAX: usize = 32;
/// Longest e-mail address, in characters (RFC 5321 leaves no more room in a path).
pub const EMAIL_MAX: usize = 254;
/// Longest phone number, in characters.
pub const PHONE_MAX: usize = 20;
/// Longest tweet, in characters.
pub const TWEET_MAX: usize = 140;
/// Longest text of an e-mail notification, in characters.
pub const EMAIL_TEXT_MAX: usize = 512;
/// Longest text of an SMS notification, in characters.
pub const SMS_TEXT_MAX: usize = 60;

fn bounded(text: &str, max: usize) -> Result<&str, Invalid> {
    let text = text.trim();
    if text.is_empty() {
        return Err(Invalid("must not be empty".into()));
    }
    if text.chars().count() > max {
        return Err(Invalid(format!("must be at most {max} characters long")));
    }
    // Postgres text holds any character but NUL.
    if text.contains('\0') {
        return Err(Invalid("must not contain the NUL character".into()));
    }
    Ok(text)
}

macro_rules! text_value {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name(String);

        impl $name {
            /// The value as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = Invalid;

            fn try_from(text: String) -> Result<Self, Invalid> {
                Self::parse(&text)
            }
        }

        // The content stays out of logs, where `Debug` output tends to end.
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}(…)", stringify!($name))
            }
        }
    };
}

text_value!(
    /// A user's login: 1 to 32 characters, no blanks and no control characters.
    Login
);
text_value!(
    /// An e-mail address of at most 254 characters.
    Email
);
text_value!(
    /// A phone number in E.164 form: `+`, then 2 to 15 digits of which the first isn't 0.
    Phone
);
text_value!(
    /// A tweet's text: 1 to 140 characters.
    TweetText
);

impl Login {
    /// # Errors
    /// When it's empty, too long, or holds blanks or control characters.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let text = bounded(text, LOGIN_MAX)?;
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(Invalid("must not contain whitespace or control characters".into()));
        }
        Ok(Self(text.into()))
    }
}

impl Email {
    /// The checks that every address passes: one `@`, a local part, a domain with neither empty labels nor blanks.
    /// Whether mail arrives there, only sending can tell.
    ///
    /// # Errors
    /// When it's empty, too long or not of that form.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let text = bounded(text, EMAIL_MAX)?;
        let valid = text.split_once('@').is_some_and(|(local, domain)| {
            !local.is_empty()
                && domain.contains('.')
                && domain.split('.').all(|label| !label.is_empty())
                && !domain.contains('@')
                && !text.chars().any(|c| c.is_whitespace() || c.is_control())
        });
        if valid { Ok(Self(text.into())) } else { Err(Invalid("must be an e-mail address".into())) }
    }
}

impl Phone {
    /// # Errors
    /// When it's empty or not in E.164 form.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let text = bounded(text, PHONE_MAX)?;
        let valid = text.strip_prefix('+').is_some_and(|digits| {
            (2..=15).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0')
        });
        if valid {
            Ok(Self(text.into()))
        } else {
            Err(Invalid("must be a phone number in E.164 form, such as +14155550123".into()))
        }
    }
}

impl TweetText {
    /// # Errors
    /// When it's empty or too long.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        Ok(Self(bounded(text, TWEET_MAX)?.into()))
    }

    /// The text as an SMS carries it: at most 60 characters, and no more than one SMS holds, ending in `...` where it was cut,
    /// which is never within what a reader takes for one character (a grapheme cluster, such as a flag, or a letter with its
    /// accents). Three full stops, because the ellipsis character would leave the GSM alphabet.
    pub fn for_sms(&self) -> String {
        const CUT: &str = "...";
        if is_one_sms(&self.0) {
            return self.0.clone();
        }
        let ends = self.0.grapheme_indices(true).map(|(start, cluster)| start + cluster.len());
        let cut = ends.map(|end| format!("{}{CUT}", &self.0[..end])).take_while(|text| is_one_sms(text));
        cut.last().unwrap_or_else(|| CUT.into())
    }
}

/// Whether a text is short enough, and a single SMS: what isn't in the GSM alphabet goes as UTF-16, of which one SMS holds 70
/// units (3GPP TS 23.038); 60 characters of that alphabet are less than the 160 septets, whichever they are.
fn is_one_sms(text: &str) -> bool {
    const UTF16_UNITS: usize = 70;
    text.chars().count() <= SMS_TEXT_MAX && text.encode_utf16().count() <= UTF16_UNITS
}

/// As much of the beginning of `text` as `max` characters hold without cutting a grapheme cluster (Unicode Standard Annex 29).
pub fn whole_clusters(text: &str, max: usize) -> &str {
    let mut characters = 0;
    let end = text.grapheme_indices(true).find_map(|(start, cluster)| {
        characters += cluster.chars().count();
        (characters > max).then_some(start)
    });
    &text[..end.unwrap_or(text.len())]
}

/// Where notifications of a user go: exactly one of the two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contact {
    /// To an e-mail address.
    Email(Email),
    /// To a phone, by SMS.
    Phone(Phone),
}

impl Contact {
    /// The channel that it belongs to.
    pub fn channel(&self) -> Channel {
        match self {
            Self::Email(_) => Channel::Email,
            Self::Phone(_) => Channel::Phone,
        }
    }
}

/// The way by which a user is notified. Its text is the routing key of `send_notification` and the column
/// `user.channel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Channel {
    /// By e-mail.
    Email,
    /// By SMS.
    Phone,
}

impl Channel {
    /// Both, in a fixed order.
    pub const ALL: [Self; 2] = [Self::Email, Self::Phone];

    /// `email` or `phone`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Email => "email",
            Self::Phone => "phone",
        }
    }

    /// Longest notification text, in characters.
    pub fn text_max(self) -> usize {
        match self {
            Self::Email => EMAIL_TEXT_MAX,
            Self::Phone => SMS_TEXT_MAX,
        }
    }

    /// Checks a notification's text, which is kept as it is: nothing is trimmed or cut.
    ///
    /// # Errors
    /// When it's empty or longer than the channel carries.
    pub fn check_text(self, text: &str) -> Result<(), Invalid> {
        bounded(text, usize::MAX)?;
        if text.chars().count() > self.text_max() {
            return Err(Invalid(format!("must be at most {} characters long", self.text_max())));
        }
        Ok(())
    }
}

/// What goes before `_<i>@example.com` in the address of the imported user `<prefix>_<i>`: the prefix itself, if what comes of
/// it is a local part that needs no quotes (RFC 5321, section 4.1.2), else one that is made of the prefix, always the same.
pub fn mailbox_prefix(prefix: &str) -> String {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~".contains(&byte);
    let is_atom = |text: &str| !text.is_empty() && text.bytes().all(allowed);
    if format!("{prefix}_").split('.').all(is_atom) {
        prefix.to_owned()
    } else {
        format!("import-{}", Uuid::new_v5(&Uuid::NAMESPACE_OID, prefix.as_bytes()).simple())
    }
}

/// The logins `<prefix>_0` … `<prefix>_<count - 1>` of a follower import, known to be valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImportPlan {
    prefix: String,
    count: u32,
}

impl ImportPlan {
    /// # Errors
    /// The name of the field (`prefix` or `count`) and why: `count` must be 1 to `limit`, the longest login must fit.
    pub fn new(prefix: &str, count: i64, limit: u32) -> Result<Self, (&'static str, Invalid)> {
        // The progress of an import is kept in columns of 32 bits.
        let limit = limit.min(i32::MAX.unsigned_abs());
        let count = u32::try_from(count)
            .ok()
            .filter(|count| (1..=limit).contains(count))
            .ok_or_else(|| ("count", Invalid(format!("must be between 1 and {limit}"))))?;
        let prefix = Login::parse(prefix).map_err(|invalid| ("prefix", invalid))?;
        let plan = Self { prefix: prefix.into(), count };
        match plan.login(count - 1).chars().count() {
            0..=LOGIN_MAX => Ok(plan),
            _ => Err((
                "prefix",
                Invalid(format!("is too long: the last login would have more than {LOGIN_MAX} characters")),
            )),
        }
    }

    /// How many users are asked for.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// What the logins start with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The login of user number `index`, from 0.
    pub fn login(&self, index: u32) -> String {
        format!("{}_{index}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_are_trimmed_and_bounded() {
        assert_eq!(Login::parse("  ann ").unwrap().as_str(), "ann");
        for bad in ["", "   ", "a b", "a\tb", "a\0b", &"x".repeat(33)] {
            assert!(Login::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Login::parse(&"ü".repeat(32)).is_ok());
    }

    #[test]
    fn contacts_have_the_form_that_they_claim() {
        for good in ["a@b.cd", "a.b+c@d-e.fg"] {
            assert!(Email::parse(good).is_ok(), "{good}");
        }
        for bad in ["a", "@b.cd", "a@b", "a@.cd", "a@b.", "a@@b.cd", "a b@c.de", &format!("{}@b.cd", "a".repeat(250))] {
            assert!(Email::parse(bad).is_err(), "{bad}");
        }
        for good in ["+14155550123", "+999123456789012"] {
            assert!(Phone::parse(good).is_ok(), "{good}");
        }
        for bad in ["14155550123", "+0123", "+1", "+1 415", "+1234567890123456", "+٤١٢"] {
            assert!(Phone::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_long_tweet_is_cut_for_sms() {
        let exact = TweetText::parse(&"ж".repeat(60)).unwrap();
        assert_eq!(exact.for_sms(), "ж".repeat(60));
        let long = TweetText::parse(&"ж".repeat(61)).unwrap();
        assert_eq!(long.for_sms(), format!("{}...", "ж".repeat(57)));
        assert!(TweetText::parse(&"x".repeat(141)).is_err());
    }

    /// Things that a reader takes for one character each, of several scalar values.
    const CLUSTERS: [&str; 9] =
        ["👨‍👩‍👧‍👦", "🇨🇿", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "👍🏽", "❤️", "e\u{301}\u{323}", "각", "\u{1112}\u{1161}\u{11ab}", "क्षि"];

    #[test]
    fn an_sms_is_never_cut_within_what_a_reader_takes_for_one_character() {
        use unicode_segmentation::UnicodeSegmentation as _;
        for cluster in CLUSTERS {
            for lead in 0..TWEET_MAX {
                let text: String =
                    "x".repeat(lead).chars().chain(cluster.repeat(TWEET_MAX).chars()).take(TWEET_MAX).collect();
                let sms = TweetText::parse(&text).unwrap().for_sms();
                assert!(sms.chars().count() <= SMS_TEXT_MAX && sms.encode_utf16().count() <= 70, "{sms}");
                let kept = sms.strip_suffix("...").expect("it was cut");
                let whole: Vec<_> = text.graphemes(true).collect();
                let clusters: Vec<_> = kept.graphemes(true).collect();
                assert_eq!(clusters, whole[..clusters.len()], "{sms}");
                // And no more is cut than must be.
                let more = format!("{kept}{}...", whole[clusters.len()]);
                assert!(more.chars().count() > SMS_TEXT_MAX || more.encode_utf16().count() > 70, "{sms}");
            }
        }
        // One that is longer than an SMS isn't cut either.
        let zalgo = format!("a{}", "\u{301}".repeat(100));
        assert_eq!(TweetText::parse(&zalgo).unwrap().for_sms(), "...");
        assert_eq!(TweetText::parse(&"😀".repeat(60)).unwrap().for_sms(), "😀".repeat(33) + "...", "they'd be two");
        let fits = "🇨🇿".repeat(17);
        assert_eq!(TweetText::parse(&fits).unwrap().for_sms(), fits);
    }

    #[test]
    fn an_import_is_refused_up_front_when_its_last_login_would_not_fit() {
        assert!(ImportPlan::new(&"p".repeat(30), 10, 100).is_ok());
        assert_eq!(ImportPlan::new(&"p".repeat(30), 11, 100).unwrap_err().0, "prefix");
        for count in [0, -1, 101, i64::MAX] {
            assert_eq!(ImportPlan::new("p", count, 100).unwrap_err().0, "count");
        }
        assert_eq!(ImportPlan::new("p", 3, 100).unwrap().login(2), "p_2");
    }

    #[test]
    fn an_imported_users_address_is_the_login_wherever_that_needs_no_quotes() {
        for prefix in ["fan", "a.b", "a.", "o'hara+x", "A-1"] {
            assert_eq!(mailbox_prefix(prefix), prefix);
        }
        for prefix in ["a@b", "\"q", "<s>", ".a", "a..b", "ž", "a,b", "a\\", "(", &"😀".repeat(26)] {
            let mailbox = mailbox_prefix(prefix);
            assert!(mailbox.len() <= 64 - "_2147483647".len(), "a local part has room for 64 bytes: {mailbox}");
            assert_eq!(mailbox, mailbox_prefix(prefix));
            assert_eq!(mailbox_prefix(&mailbox), mailbox, "it needs no quotes");
            assert!(Email::parse(&format!("{mailbox}_0@example.com")).is_ok());
        }
        assert_ne!(mailbox_prefix("a@b"), mailbox_prefix("a@c"));
    }

    #[test]
    fn debug_output_hides_the_content() {
        assert_eq!(format!("{:?}", Contact::Email(Email::parse("a@b.cd").unwrap())), "Email(Email(…))");
    }
}
