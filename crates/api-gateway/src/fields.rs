//! A request's fields, from wherever they come, read so that every error is found and told at once.

use crate::error::{Error, FieldError};
use actix_web::{HttpRequest, web::Bytes};
use domain::values::{Contact, Email, Invalid, Phone};
use std::ops::RangeInclusive;

/// A field's value as it arrived.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    /// In a JSON body: its type counts.
    Json(serde_json::Value),
    /// In a path, a query or a form: all of them are text.
    Text(String),
    /// As an uploaded file, or in an encoding that isn't UTF-8.
    File(Bytes),
}

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

/// The fields of a request that haven't been read yet, and what was wrong with those that have.
#[derive(Default)]
pub(crate) struct Fields {
    unread: Vec<(String, Value)>,
    errors: Vec<FieldError>,
}

impl Fields {
    /// The parameters of a request's path and query.
    pub(crate) fn parameters(req: &HttpRequest) -> Self {
        let mut fields = Self::default();
        for (name, value) in pairs(req.query_string().as_bytes()) {
            fields.add(name, value);
        }
        fields.add_path(req);
        fields
    }

    /// Adds the parameters of the path.
    pub(crate) fn add_path(&mut self, req: &HttpRequest) {
        for (name, value) in req.match_info().iter() {
            self.add(name.into(), decoded(value.as_bytes()));
        }
    }

    /// Adds a field. One that is there already is an error: which of them counts would be a guess.
    pub(crate) fn add(&mut self, name: String, value: Value) {
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
        let field = name.chars().take(NAME_MAX).collect();
        self.errors.push(FieldError { field, detail: detail.into() });
    }

    /// How much is wrong so far.
    pub(crate) fn complaints(&self) -> usize {
        self.errors.len()
    }

    /// Whether the field is given and hasn't been read yet.
    pub(crate) fn has(&self, name: &str) -> bool {
        let is_null = |value: &Value| matches!(value, Value::Json(serde_json::Value::Null));
        self.unread.iter().any(|(known, value)| known == name && !is_null(value))
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        let at = self.unread.iter().position(|(known, _)| known == name)?;
        match self.unread.swap_remove(at).1 {
            Value::Json(serde_json::Value::Null) => None,
            value => Some(value),
        }
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
            _ => Err(Error::InvalidFields(self.errors)),
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
        Value::Text(text) | Value::Json(serde_json::Value::String(text)) => parse(&text),
        Value::Json(_) => invalid("must be a string"),
        Value::File(_) => invalid("must be a string in UTF-8"),
    }
}

/// Any whole number that 64 bits hold.
pub(crate) fn whole(value: Value) -> Result<i64, Invalid> {
    let number = match value {
        Value::Text(text) => text.trim().parse().ok(),
        Value::Json(number) => number.as_i64(),
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
        Value::Json(json) => json.as_bool(),
        Value::Text(_) | Value::File(_) => None,
    };
    truth.ok_or_else(|| Invalid("must be true or false".into()))
}

/// A flag: `true`, `false`, `1` or `0`, as JSON or as text.
pub(crate) fn flag(value: Value) -> Result<bool, Invalid> {
    let text = match value {
        Value::Json(serde_json::Value::String(text)) | Value::Text(text) => text,
        Value::Json(json) => json.to_string(),
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
    use serde_json::json;

    fn told(fields: Fields) -> Vec<String> {
        match fields.finish(()) {
            Err(Error::InvalidFields(errors)) => {
                errors.into_iter().map(|error| format!("{} {}", error.field, error.detail)).collect()
            }
            Err(other) => panic!("{other}"),
            Ok(()) => Vec::new(),
        }
    }

    #[test]
    fn every_error_is_told_at_once() {
        let mut fields = Fields::default();
        fields.add("count".into(), Value::Json(json!("5")));
        fields.add("async".into(), Value::Json(json!(2)));
        fields.add("extra".into(), Value::Json(json!(null)));
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
        for yes in [json!(true), json!(1), json!("1"), json!("true")] {
            assert!(flag(Value::Json(yes)).unwrap());
        }
        for no in ["0", "false", " 0 "] {
            assert!(!flag(Value::Text(no.into())).unwrap());
        }
        for bad in [json!(2), json!("yes"), json!([1]), json!(1.5), json!({})] {
            assert!(flag(Value::Json(bad)).is_err());
        }
        assert_eq!(whole(Value::Text(" 7 ".into())).unwrap(), 7);
        for bad in [json!("7"), json!(7.0), json!(1e30), json!(true), json!([7])] {
            assert!(whole(Value::Json(bad)).is_err());
        }
        for bad in ["", "7.0", "99999999999999999999", "0x7"] {
            assert!(whole(Value::Text(bad.into())).is_err(), "{bad}");
        }
        assert!(id::<i64>(Value::Text("0".into())).is_err());
    }

    #[test]
    fn a_field_given_twice_is_refused() {
        let mut fields = Fields::default();
        fields.add("id".into(), Value::Text("1".into()));
        fields.add("id".into(), Value::Text("2".into()));
        fields.required::<i64>("id", id);
        assert_eq!(told(fields), ["id is given more than once"]);
    }
}
