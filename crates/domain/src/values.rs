//! Values that are valid by construction: parsed once at the edge, trusted afterwards.
//!
//! `parse` trims surrounding blanks. Lengths are counted in characters (Unicode scalar values), as Postgres counts them.
//! The errors say what is wrong in words for a client, and never repeat the value.
//!
//! Logins and tweets are parsed in two ways: `parse` takes whatever rows and other programs' messages hold, `parse_new` what a
//! user may choose or write today. The former is never to be stricter than the latter was at any time.

use email_address::{EmailAddress, Options};
use icu_properties::{
    CodePointMapData, CodePointSetData,
    props::{DefaultIgnorableCodePoint, GeneralCategory, Script},
};
use serde::{Deserialize, Serialize};
use std::fmt;
use unicode_normalization::{UnicodeNormalization as _, char::is_combining_mark};
use unicode_security::{GeneralSecurityProfile as _, RestrictionLevel, RestrictionLevelDetection as _, skeleton};
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

/// Whether a reader sees anything of the character, be it joined to others.
fn is_visible(c: char) -> bool {
    /// Characters that show nothing, though Unicode doesn't call them ignorable: the braille pattern without a dot, and the
    /// controls of interlinear annotations.
    const BLANK: [char; 4] = ['\u{2800}', '\u{fff9}', '\u{fffa}', '\u{fffb}'];
    let is_ignorable = || CodePointSetData::new::<DefaultIgnorableCodePoint>().contains(c);
    !c.is_whitespace() && !c.is_control() && !BLANK.contains(&c) && !is_ignorable()
}

/// A text without what has no effect around it: blanks, and characters of no width that only keep words apart or together.
/// What joins characters (in emoji, in Persian) and what picks their form stays.
///
/// # Errors
/// When it's empty, or nothing of it can be seen.
pub fn visible(text: &str) -> Result<&str, Invalid> {
    let text = text.trim_matches(|c: char| c.is_whitespace() || ['\u{200b}', '\u{2060}', '\u{feff}'].contains(&c));
    match text.chars().any(is_visible) {
        true => Ok(text),
        false if text.is_empty() => Err(Invalid("must not be empty".into())),
        false => Err(Invalid("must contain a visible character".into())),
    }
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
    /// A user's login: 1 to 32 characters, no blanks and no control characters. One that is chosen now is held to more.
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
    /// A login that somebody may have.
    ///
    /// # Errors
    /// When it's empty, too long, or holds blanks or control characters.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let text = bounded(text, LOGIN_MAX)?;
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(Invalid("must not contain whitespace or control characters".into()));
        }
        Ok(Self(text.into()))
    }

    /// How the login is written where it's chosen now; `None` where that is the same.
    pub fn composed(&self) -> Option<Self> {
        let composed: String = self.0.nfc().collect();
        (composed != self.0).then_some(Self(composed))
    }

    /// A login that is chosen now, in Unicode's normalization form C, so that what looks the same is the same.
    ///
    /// It's made of the characters that Unicode Technical Standard 39 allows in identifiers, and of `+`. The colon is left
    /// out: HTTP's Basic authentication ends a login with it (RFC 7617). Scripts are mixed no further than the standard's
    /// level "highly restrictive" allows, digits not at all, and a login in another script than Latin must not look like one
    /// in ASCII as a whole.
    ///
    /// # Errors
    /// When it breaks one of these rules.
    pub fn parse_new(text: &str) -> Result<Self, Invalid> {
        /// More characters than the longest login has in any form.
        const UNCOMPOSED_MAX: usize = 8 * LOGIN_MAX;
        let text = text.trim();
        bounded(text, UNCOMPOSED_MAX).map_err(|_| Invalid(format!("must be 1 to {LOGIN_MAX} characters long")))?;
        let Self(login) = Self::parse(&text.nfc().collect::<String>())?;
        if !login.chars().all(|c| c == '+' || (c != ':' && c.identifier_allowed() && is_visible(c))) {
            return Err(Invalid("may hold letters, digits and . _ - + ' only".into()));
        }
        if login.starts_with(is_combining_mark) {
            return Err(Invalid("must not start with a combining mark".into()));
        }
        if !login.replace('+', "").check_restriction_level(RestrictionLevel::HighlyRestrictive) || mixes_digits(&login)
        {
            return Err(Invalid("must not mix letters or digits of several scripts".into()));
        }
        if !login.is_ascii() && !login.chars().any(is_latin) && skeleton(&login).all(|c| c.is_ascii()) {
            return Err(Invalid("must not look like Latin letters or digits in another script".into()));
        }
        Ok(Self(login))
    }
}

fn is_latin(c: char) -> bool {
    CodePointMapData::<Script>::new().get(c) == Script::Latin
}

/// Whether there are decimal digits of several kinds. Those of a kind follow one another, ten of them.
fn mixes_digits(text: &str) -> bool {
    let category = CodePointMapData::<GeneralCategory>::new();
    let digits = || text.chars().filter(|c| category.get(*c) == GeneralCategory::DecimalNumber).map(u32::from);
    digits().min().zip(digits().max()).is_some_and(|(min, max)| max - min >= 10)
}

impl Email {
    /// An address as RFC 5321 has them, quoted local parts and international ones (RFC 6531) included, at a domain with a name
    /// that can be looked up. Whether mail arrives there, only sending can tell.
    ///
    /// # Errors
    /// When it's empty, too long or not of that form.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let text = bounded(text, EMAIL_MAX)?;
        if is_mailbox(text) {
            Ok(Self(text.into()))
        } else {
            Err(Invalid("must be an e-mail address, such as ann@example.com".into()))
        }
    }
}

fn is_mailbox(text: &str) -> bool {
    let options = Options::default().with_required_tld().without_display_text().without_domain_literal();
    // A quoted local part may hold blanks; what can't be seen there is meant for somebody else's parser.
    let is_clean = text.len() <= EMAIL_MAX && text.chars().all(|c| c == ' ' || is_visible(c));
    is_clean
        && EmailAddress::parse_with_options(text, options).is_ok_and(|address| {
            let domain = idna::domain_to_ascii_strict(address.domain());
            // A name whose last label is a number would be taken for an IP address.
            let last = |domain: &str| {
                domain.rsplit('.').next().is_some_and(|label| !label.bytes().all(|b| b.is_ascii_digit()))
            };
            domain.is_ok_and(|domain| last(&domain))
        })
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
    /// A text that a tweet may have.
    ///
    /// # Errors
    /// When it's empty or too long.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        Ok(Self(bounded(text, TWEET_MAX)?.into()))
    }

    /// A text that is posted now: something of it can be seen.
    ///
    /// # Errors
    /// When it's empty, too long, or shows nothing.
    pub fn parse_new(text: &str) -> Result<Self, Invalid> {
        Self::parse(visible(text)?)
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

    /// The same for logins that are chosen now: see [`Login::parse_new`].
    ///
    /// # Errors
    /// As [`Self::new`], and when the logins couldn't be chosen one by one.
    pub fn parse_new(prefix: &str, count: i64, limit: u32) -> Result<Self, (&'static str, Invalid)> {
        let plan = Self::new(prefix, count, limit)?;
        let first = Login::parse_new(&plan.login(0)).map_err(|invalid| ("prefix", invalid))?;
        let prefix = first.as_str().strip_suffix("_0").expect("nothing composes with a low line or a digit");
        Ok(Self { prefix: prefix.into(), ..plan })
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
        for good in ["+14155550123", "+999123456789012"] {
            assert!(Phone::parse(good).is_ok(), "{good}");
        }
        for bad in ["14155550123", "+0123", "+1", "+1 415", "+1234567890123456", "+٤١٢"] {
            assert!(Phone::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_login_that_is_chosen_has_the_characters_of_identifiers_and_those_that_users_have() {
        for good in [
            "ann",
            "a.b_c-d",
            "1st",
            "_",
            ".",
            "..",
            "-x-",
            "o'hara",
            "ann+1",
            "Ann",
            "zoë",
            "Jürgen",
            "yıldız",
            "ñandú",
            "анна",
            "Владимир",
            "γιάννης",
            "محمد",
            "علي_2",
            "דוד",
            "नेहा",
            "สมชาย",
            "李小龙",
            "ユーザー",
            "田中さん",
            "김철수",
            "fan_0",
            "李bruce",
            "٣٤٥",
        ] {
            assert_eq!(Login::parse_new(good).as_ref().map(Login::as_str), Ok(good));
        }
        let mut wrong: Vec<String> = [
            "a@b",
            "a:b",
            "a/b",
            "a%b",
            "a<b",
            "a>b",
            "a\"b",
            "a\\b",
            "a,b",
            "a;b",
            "a`b",
            "a|b",
            "a&b",
            "a=b",
            "a?b",
            "a#b",
            "😀",
            "a\u{fffd}",
            "ａｎｎ",
            "𝒶nn",
            "ﬁn",
            "\u{e000}",
            "\u{301}ann",
            "ann\u{2044}x",
            "a\u{a0}b",
        ]
        .map(String::from)
        .into();
        // What can't be seen, alone and within.
        for hidden in [
            '\u{200b}',
            '\u{200c}',
            '\u{200d}',
            '\u{2060}',
            '\u{feff}',
            '\u{ad}',
            '\u{34f}',
            '\u{61c}',
            '\u{115f}',
            '\u{1160}',
            '\u{3164}',
            '\u{ffa0}',
            '\u{202a}',
            '\u{202e}',
            '\u{2066}',
            '\u{2069}',
            '\u{200e}',
            '\u{200f}',
            '\u{fe0f}',
            '\u{e0001}',
            '\u{e0061}',
            '\u{2800}',
            '\u{180e}',
            '\u{17b4}',
        ] {
            wrong.extend([hidden.to_string(), format!("an{hidden}n"), format!("ann{hidden}"), format!("{hidden}ann")]);
        }
        for bad in &wrong {
            assert!(Login::parse_new(bad).is_err(), "{}", bad.escape_unicode());
        }
    }

    #[test]
    fn a_login_that_is_chosen_does_not_pass_for_another_by_its_script() {
        for bad in [
            "аnn",
            "аdmin",
            "pаypаl",
            "αnn",
            "annа_1",
            "адmин",
            "аре",
            "ѕсоре",
            "Вор",
            "ορο",
            "٣3",
            "a৪",
            "1৪",
            "१1",
            "аре_0",
            "ԁо",
        ] {
            assert!(Login::parse_new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn logins_that_unicode_calls_the_same_are_one() {
        let composed = Login::parse_new("zo\u{eb}").unwrap();
        assert_eq!(Login::parse_new("zoe\u{308}").unwrap(), composed);
        assert_eq!(Login::parse_new("\u{1100}\u{1161}").unwrap().as_str(), "\u{ac00}");
        assert_eq!(
            Login::parse_new(&"u\u{308}".repeat(32)).unwrap().as_str(),
            "ü".repeat(32),
            "it's counted as it's kept"
        );
        assert!(Login::parse_new(&"ü".repeat(33)).is_err());
        assert!(Login::parse_new(&format!("a{}", "\u{301}".repeat(1_000_000))).is_err());
        assert_eq!(ImportPlan::parse_new("zoe\u{308}", 2, 10).unwrap().login(1), "zo\u{eb}_1");
        for bad in ["", " ", "a\u{200b}", "аре", "a@b", "<s>", "٣"] {
            assert_eq!(ImportPlan::parse_new(bad, 2, 10).unwrap_err().0, "prefix", "{bad:?}");
        }
    }

    #[test]
    fn what_somebody_has_already_stays_a_login_and_what_was_posted_a_tweet() {
        for old in ["\u{200b}", "a\u{202e}b", "аnn", "zoe\u{308}", "a@b", "a/b%", "😀", "\u{feff}x"] {
            assert_eq!(Login::parse(old).unwrap().as_str(), old);
            assert_eq!(TweetText::parse(old).unwrap().as_str(), old);
            assert_eq!(serde_json::from_value::<Login>(serde_json::json!(old)).unwrap().as_str(), old);
        }
    }

    #[test]
    fn a_text_shows_something() {
        for bad in [
            "",
            " ",
            "\u{200b}",
            "\u{feff}",
            "\u{200d}\u{200c}",
            "\u{3164}",
            "\u{2800}",
            " \u{ad} \u{2060}",
            "\u{e0001}\u{e0061}",
            "\u{fe0f}",
            "\u{202e}\u{202c}",
            "\u{180e}",
            "\u{2028}",
            "\u{7}",
            "\u{115f}\u{1160}",
        ] {
            assert!(TweetText::parse_new(bad).is_err(), "{}", bad.escape_unicode());
        }
        for good in CLUSTERS.into_iter().chain([
            "می\u{200c}خواهم",
            "क्\u{200d}ष",
            "☺\u{fe0f}",
            ".",
            "\u{301}",
            "a\u{200b}b",
            "한",
        ]) {
            assert_eq!(TweetText::parse_new(good).unwrap().as_str(), good);
        }
        assert_eq!(TweetText::parse_new("\u{feff} hello\u{200b}\u{a0}\n").unwrap().as_str(), "hello");
    }

    #[test]
    fn an_address_is_one_that_a_mail_server_takes() {
        let long_domain = format!("a@{}.com", vec!["b".repeat(60); 4].join("."));
        assert_eq!(long_domain.len(), 249);
        for good in [
            "a@b.cd",
            "a.b+c@d-e.fg",
            "o'hara@example.com",
            "a/b=c@example.com",
            "\"a b\"@example.com",
            "\"a@b\"@example.com",
            "\"a\\\"b\"@example.com",
            "ann@müller.de",
            "ann@xn--mller-kva.de",
            "ann@例え.jp",
            "ann@президент.рф",
            "zoë@example.com",
            "a@1.example.com",
            "a@b.c2",
            " a@b.cd ",
            &format!("{}@b.cd", "a".repeat(64)),
            &long_domain,
        ] {
            assert!(Email::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "a",
            "@b.cd",
            "a@",
            "a@b",
            "a@.cd",
            "a@b.",
            "a@b..cd",
            "a@@b.cd",
            "a b@c.de",
            "<a@b.cd>",
            "Ann <a@b.cd>",
            "a,b@c.de",
            "a@b.cd,c@d.ef",
            "a@b.cd;c@d.ef",
            "mailto:a@b.cd",
            ".a@b.cd",
            "a.@b.cd",
            "a..b@c.de",
            "a@-b.cd",
            "a@b-.cd",
            "a@b_c.de",
            "a@[127.0.0.1]",
            "a@127.0.0.1",
            "a@b.123",
            "a@b.cd?subject=x",
            "a@b.cd/x",
            "a@b!c.de",
            "a@b.cd\nBcc: x@y.zz",
            "\"a\nb\"@c.de",
            "\"a\tb\"@c.de",
            "\"a\"b\"@c.de",
            "\"\"@c.de",
            "\"a@b.cd",
            "a\u{200b}b@c.de",
            "a\u{202e}b@c.de",
            "\"a\u{a0}b\"@c.de",
            "a@b\u{ad}c.de",
            "a@xn--a.de",
            "a@b\u{2024}.de",
            "(x)a@b.cd",
            "a\\b@c.de",
            &format!("{}@b.cd", "a".repeat(65)),
            &format!("{}@b.cd", "é".repeat(33)),
            &format!("a@{}.cd", "b".repeat(64)),
            &format!("a@{}.com", vec!["b".repeat(60); 4].join(".") + ".bbbb.b"),
        ] {
            assert!(Email::parse(bad).is_err(), "{bad}");
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
