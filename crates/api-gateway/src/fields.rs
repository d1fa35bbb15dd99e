//! A request's fields, from wherever they come, read so that every error is found and told at once.

use crate::error::{Error, FieldError};
use actix_web::{HttpRequest, web::Bytes};
use domain::values::{Contact, Email, Invalid, Phone};
use serde_json::value::RawValue;
use std::ops::RangeInclusive;

/// A field's value as it arrived.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// In a JSON body: its type counts. As it was written, so that numbers are exact, and that what nobody reads costs nothing.
    Json(Box<RawValue>),
    /// In a path, a query or a form: all of them are text.
    Text(String),
    /// As an uploaded file, or in an encoding that isn't UTF-8.
    File(Bytes),
}

impl Value {
    fn is_null(&self) -> bool {
        matches!(self, Self::Json(json) if json.get() == "null")
    }
}

/// There are more fields than are taken.
pub(crate) struct TooMany;

/// A percent-encoded value. One that isn't UTF-8 is no text: a character in place of what can't be read would be another value.
fn decoded(encoded: &[u8]) -> Value {
    String::from_utf8(percent_encoding::percent_decode(encoded).collect())
        .map_or_else(|error| Value::File(error.into_bytes().into()), Value::Text)
}

/// The names and values of a query or of a form that is written like one.
pub(crate) fn pairs(encoded: &[u8]) -> impl Iterator<Item = (String, Value)> {
    encoded.split(|byte| *byte == b'&').filter(|pair| !pair.is_empty()).map(|pair| {
        let pair: Vec<u8> = pair.iter().map(|byte| if *byte == b'+' { b' ' } else { *byte }).collect();
        let (name, value) = match pair.iter().position(|byte| *byte == b'=') {
            Some(at) => (&pair[..at], &pair[at + 1..]),
            None => (&pair[..], &[][..]),
        };
        (percent_encoding::percent_decode(name).decode_utf8_lossy().into_owned(), decoded(value))
    })
}

/// The most fields in a request's path and query, and in its body.
const FIELDS_MAX: usize = 64;
/// The most errors in an answer.
const ERRORS_MAX: usize = 20;

/// The fields of a request that haven't been read yet, and what was wrong with those that have.
#[derive(Default)]
pub(crate) struct Fields {
    unread: Vec<(String, Value)>,
    /// How many came, whatever became of them.
    count: usize,
    errors: Vec<FieldError>,
    /// Whether there are more errors than are told.
    more: bool,
}

impl Fields {
    /// The parameters of a request's path and query.
    pub(crate) fn parameters(req: &HttpRequest) -> Self {
        let mut fields = Self::path(req);
        let _ = pairs(req.query_string().as_bytes()).try_for_each(|(name, value)| fields.add(name, value));
        fields
    }

    /// The parameters of a request's path.
    pub(crate) fn path(req: &HttpRequest) -> Self {
        let mut fields = Self::default();
        // The router has put a character in place of what isn't UTF-8.
        let is_utf8 = percent_encoding::percent_decode_str(req.uri().path()).decode_utf8().is_ok();
        for (name, value) in req.match_info().iter() {
            let value = match !is_utf8 && value.contains(char::REPLACEMENT_CHARACTER) {
                true => Value::File(Bytes::new()),
                false => decoded(value.as_bytes()),
            };
            let _ = fields.add(name.into(), value);
        }
        fields
    }

    /// Adds the fields of a path that haven't been read.
    pub(crate) fn add_all(&mut self, path: Self) {
        for (name, value) in path.unread {
            self.insert(name, value);
        }
    }

    /// Adds a field. One that is there already is an error: which of them counts would be a guess.
    ///
    /// # Errors
    /// When it's one too many, which the answer tells: nothing of what follows needs to be read.
    pub(crate) fn add(&mut self, name: String, value: Value) -> Result<(), TooMany> {
        self.pass(&name)?;
        self.insert(name, value);
        Ok(())
    }

    /// Counts a field without adding it.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub(crate) fn pass(&mut self, name: &str) -> Result<(), TooMany> {
        self.count += 1;
        if self.count > FIELDS_MAX {
            self.errors.clear();
            self.refuse(name, format!("is one too many: a request may have {FIELDS_MAX} fields"));
            return Err(TooMany);
        }
        Ok(())
    }

    fn insert(&mut self, name: String, value: Value) {
        if self.unread.iter().any(|(known, _)| *known == name) {
            self.refuse(&name, "is given more than once");
        } else {
            self.unread.push((name, value));
        }
    }

    /// Notes what is wrong with a field.
    pub(crate) fn refuse(&mut self, name: &str, detail: impl Into<String>) {
        // Names may come from the client, and go back in the answer.
        const NAME_MAX: usize = 64;
        if self.errors.len() < ERRORS_MAX {
            let field = name.chars().take(NAME_MAX).collect();
            self.errors.push(FieldError { field, detail: detail.into() });
        } else {
            self.more = true;
        }
    }

    /// Whether there were more fields than are taken.
    pub(crate) fn is_too_many(&self) -> bool {
        self.count > FIELDS_MAX
    }

    /// Whether more is wrong than is told.
    pub(crate) fn has_more_errors(&self) -> bool {
        self.more
    }

    /// Whether the field is given and hasn't been read yet.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.unread.iter().any(|(known, value)| known == name && !value.is_null())
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        let at = self.unread.iter().position(|(known, _)| known == name)?;
        Some(self.unread.swap_remove(at).1).filter(|value| !value.is_null())
    }

    /// The field, if it's given; `None` also stands for one that is wrong, which [`Self::finish`] tells.
    pub(crate) fn optional<T>(&mut self, name: &str, parse: impl FnOnce(Value) -> Result<T, Invalid>) -> Option<T> {
        parse(self.take(name)?).map_err(|invalid| self.refuse(name, invalid.0)).ok()
    }

    /// The field; `None` stands for one that is wrong or missing, which [`Self::finish`] tells.
    pub(crate) fn required<T>(&mut self, name: &str, parse: impl FnOnce(Value) -> Result<T, Invalid>) -> Option<T> {
        let value = self.take(name);
        if value.is_none() {
            self.refuse(name, "is required");
        }
        parse(value?).map_err(|invalid| self.refuse(name, invalid.0)).ok()
    }

    /// Exactly one of the fields `email` and `phone`.
    pub(crate) fn contact(&mut self) -> Option<Contact> {
        let given = (self.has("email"), self.has("phone"));
        let detail = match given {
            (true, true) => "must not be given together with",
            (false, false) => "is required without",
            _ => {
                let email = self.optional("email", text(Email::parse)).map(Contact::Email);
                let phone = self.optional("phone", text(Phone::parse)).map(Contact::Phone);
                return email.or(phone);
            }
        };
        for (name, other) in [("email", "phone"), ("phone", "email")] {
            self.take(name);
            self.refuse(name, format!("{detail} {other}"));
        }
        None
    }

    /// The values that were required, once everything has been read.
    ///
    /// # Errors
    /// Every field that is wrong, missing or unknown.
    pub(crate) fn finish<R: Required>(mut self, required: R) -> Result<R::Values, Error> {
        for (name, _) in std::mem::take(&mut self.unread) {
            self.refuse(&name, "is not a recognised field");
        }
        match required.values() {
            Some(values) if self.errors.is_empty() => Ok(values),
            _ => Err(Error::InvalidFields { errors: self.errors, more: self.more }),
        }
    }
}

/// Values of fields of which each is there.
pub(crate) trait Required {
    /// The values.
    type Values;
    /// All of them, or none.
    fn values(self) -> Option<Self::Values>;
}

macro_rules! required {
    ($($name:ident)+) => {
        impl<$($name),+> Required for ($(Option<$name>,)+) {
            type Values = ($($name,)+);

            #[allow(non_snake_case)]
            fn values(self) -> Option<Self::Values> {
                let ($($name,)+) = self;
                Some(($($name?,)+))
            }
        }
    };
}
required!(A);
required!(A B);
required!(A B C);

impl Required for () {
    type Values = ();

    fn values(self) -> Option<()> {
        Some(())
    }
}

fn invalid<T>(detail: impl Into<String>) -> Result<T, Invalid> {
    Err(Invalid(detail.into()))
}

/// A text that `parse` accepts.
pub(crate) fn text<T>(parse: impl FnOnce(&str) -> Result<T, Invalid>) -> impl FnOnce(Value) -> Result<T, Invalid> {
    move |value| match value {
        Value::Text(text) => parse(&text),
        Value::Json(json) => parse(&string(&json)?),
        Value::File(_) => invalid("must be a string in UTF-8"),
    }
}

/// A string of JSON. An escape that stands for half a character (a lone surrogate) makes it none: see RFC 8259, section 8.2.
pub(crate) fn string(json: &RawValue) -> Result<String, Invalid> {
    match json.get().starts_with('"') {
        true => serde_json::from_str(json.get())
            .map_err(|_| Invalid("must be a string of whole characters: it has an unpaired surrogate".into())),
        false => invalid("must be a string"),
    }
}

/// The whole number that a number of JSON is, however it's written (`25`, `25.0`, `2.5e1`), without losing a digit of it;
/// `None` where it's another value or has more than 20 digits.
fn integer(json: &RawValue) -> Option<i128> {
    const DIGITS_MAX: usize = 20;
    let (sign, number) = match json.get().strip_prefix('-') {
        Some(number) => (-1, number),
        None => (1, json.get()),
    };
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    if !whole.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    // Of digits that are nothing but zeros, no exponent makes anything else.
    let digits = format!("{whole}{fraction}");
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        return Some(0);
    }
    // What the point leaves of the number's end, moved by the exponent.
    let zeros =
        (digits.len() - significant.len()) as i128 - fraction.len() as i128 + exponent.parse::<i64>().ok()? as i128;
    let significant = significant.trim_start_matches('0');
    let zeros =
        usize::try_from(zeros).ok().filter(|zeros| *zeros <= DIGITS_MAX && zeros + significant.len() <= DIGITS_MAX)?;
    format!("{significant}{}", "0".repeat(zeros)).parse::<i128>().ok().map(|number| sign * number)
}

/// Any whole number that 64 bits hold.
pub(crate) fn whole(value: Value) -> Result<i64, Invalid> {
    let number = match value {
        Value::Text(text) => text.trim().parse().ok(),
        Value::Json(json) => integer(&json).and_then(|number| number.try_into().ok()),
        Value::File(_) => None,
    };
    number.ok_or_else(|| Invalid("must be a whole number".into()))
}

/// A whole number in the range.
pub(crate) fn between(range: RangeInclusive<i64>) -> impl FnOnce(Value) -> Result<i64, Invalid> {
    move |value| match whole(value)? {
        number if range.contains(&number) => Ok(number),
        _ => invalid(format!("must be between {} and {}", range.start(), range.end())),
    }
}

/// An id: a positive whole number.
pub(crate) fn id<T: From<i64>>(value: Value) -> Result<T, Invalid> {
    match whole(value) {
        Ok(id @ 1..) => Ok(id.into()),
        _ => invalid("must be a positive whole number"),
    }
}

/// A truth value of JSON.
pub(crate) fn truth(value: Value) -> Result<bool, Invalid> {
    let truth = match value {
        Value::Json(json) => json.get().parse().ok(),
        Value::Text(_) | Value::File(_) => None,
    };
    truth.ok_or_else(|| Invalid("must be true or false".into()))
}

/// A flag: `true`, `false`, `1` or `0`, as JSON or as text.
pub(crate) fn flag(value: Value) -> Result<bool, Invalid> {
    let text = match value {
        Value::Text(text) => text,
        Value::Json(json) => match integer(&json) {
            Some(number) => number.to_string(),
            None => string(&json).unwrap_or_else(|_| json.get().into()),
        },
        Value::File(_) => String::new(),
    };
    match text.trim() {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => invalid("must be true, false, 1 or 0"),
    }
}

/// Which part of a list is asked for: by the fields `page`, from 0, and `perPage`. Returns offset and length.
pub(crate) fn page(fields: &mut Fields) -> (i64, i64) {
    const PAGE_MAX: i64 = 1_000_000;
    let page = fields.optional("page", between(0..=PAGE_MAX)).unwrap_or(0);
    let per_page = fields.optional("perPage", between(1..=LIST_MAX)).unwrap_or(LIST_DEFAULT);
    (page * per_page, per_page)
}

/// The longest list in an answer.
pub(crate) const LIST_MAX: i64 = 100;
/// The length of a list where the client doesn't say.
pub(crate) const LIST_DEFAULT: i64 = 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> Value {
        Value::Json(RawValue::from_string(text.into()).unwrap())
    }

    fn told(fields: Fields) -> Vec<String> {
        match fields.finish(()) {
            Err(Error::InvalidFields { errors, .. }) => {
                errors.into_iter().map(|error| format!("{} {}", error.field, error.detail)).collect()
            }
            Err(other) => panic!("{other}"),
            Ok(()) => Vec::new(),
        }
    }

    #[test]
    fn every_error_is_told_at_once() {
        let mut fields = Fields::default();
        for (name, value) in [("count", json(r#""5""#)), ("async", json("2")), ("extra", json("null"))] {
            assert!(fields.add(name.into(), value).is_ok());
        }
        fields.required("count", whole);
        fields.optional("async", flag);
        fields.required::<i64>("userId", id);
        assert_eq!(
            told(fields),
            [
                "count must be a whole number",
                "async must be true, false, 1 or 0",
                "userId is required",
                "extra is not a recognised field"
            ]
        );
    }

    #[test]
    fn flags_and_numbers_come_as_json_and_as_text() {
        for yes in ["true", "1", "1.0", r#""1""#, r#""true""#, r#""\u0031""#] {
            assert!(flag(json(yes)).unwrap(), "{yes}");
        }
        for no in ["0", "false", " 0 "] {
            assert!(!flag(Value::Text(no.into())).unwrap());
        }
        for bad in ["2", r#""yes""#, "[1]", "1.5", "{}", r#""\ud800""#] {
            assert!(flag(json(bad)).is_err(), "{bad}");
        }
        assert_eq!(whole(Value::Text(" 7 ".into())).unwrap(), 7);
        for bad in [r#""7""#, "7.5", "1e30", "true", "[7]", "9223372036854775808"] {
            assert!(whole(json(bad)).is_err(), "{bad}");
        }
        for bad in ["", "7.0", "99999999999999999999", "0x7"] {
            assert!(whole(Value::Text(bad.into())).is_err(), "{bad}");
        }
        assert!(id::<i64>(Value::Text("0".into())).is_err());
    }

    #[test]
    fn a_field_given_twice_is_refused() {
        let mut fields = Fields::default();
        for id in ["1", "2"] {
            assert!(fields.add("id".into(), Value::Text(id.into())).is_ok());
        }
        fields.required::<i64>("id", id);
        assert_eq!(told(fields), ["id is given more than once"]);
    }

    #[test]
    fn a_number_of_json_is_whole_if_its_value_is_and_no_digit_is_lost() {
        for (text, number) in [
            ("25", 25),
            ("25.0", 25),
            ("2.5e1", 25),
            ("2.5E+1", 25),
            ("250e-1", 25),
            ("0.25e2", 25),
            ("-25.00", -25),
            ("0", 0),
            ("-0", 0),
            ("-0.0", 0),
            ("0e999999999999999999", 0),
            ("0.000e-5", 0),
            ("9007199254740993", 9_007_199_254_740_993),
            ("9007199254740993.0", 9_007_199_254_740_993),
            ("9007199254740.993e3", 9_007_199_254_740_993),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
            ("922337203685477580.7e1", i64::MAX),
        ] {
            assert_eq!(whole(json(text)).unwrap(), number, "{text}");
        }
        for bad in [
            "25.5",
            "2.55e1",
            "25e-1",
            "1e19",
            "1e999999999999999999",
            "1e99999999999999999999",
            "1e-999999999999999999",
            "9223372036854775807.5",
            "922337203685477580.75e1",
            "-9223372036854775809",
            "null",
            "{}",
            "\"25\"",
        ] {
            assert!(whole(json(bad)).is_err(), "{bad}");
        }
        assert_eq!(integer(&RawValue::from_string("18446744073709551615.0".into()).unwrap()), Some(u64::MAX.into()));
    }

    #[test]
    fn no_more_fields_are_taken_than_are_allowed_and_no_more_errors_told() {
        let mut fields = Fields::default();
        let given = (0..100).take_while(|n| fields.add(format!("f{n}"), Value::Text("x".into())).is_ok()).count();
        assert_eq!(given, FIELDS_MAX);
        let Err(error) = fields.finish(()) else { panic!("none of them is known") };
        let text = error.to_string();
        assert!(text.starts_with("f64 is one too many") && text.ends_with("; and more"), "{text}");
        let Error::InvalidFields { errors, more } = error else { panic!("{error}") };
        assert!(errors.len() == ERRORS_MAX && more, "{errors:?}");
    }
}
