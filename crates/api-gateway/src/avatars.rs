//! Avatars: kept in the database, so that any number of gateways serve them.

use crate::{
    body::{self, Kinds},
    error::Error,
    fields::{self, Fields, Value},
    gateway::Gateway,
    shares::Subject,
    users::User,
};
use actix_web::{
    HttpRequest, HttpResponse,
    http::header::CACHE_CONTROL,
    web::{self, Bytes},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use domain::{UserId, values::Invalid};
use serde_json::json;
use storage::avatars;
use uuid::Uuid;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Png,
    Jpeg,
    Webp,
}

impl Format {
    /// By what the file begins with; a name or a content type could claim anything.
    fn of(image: &[u8]) -> Option<Self> {
        match image {
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::Webp),
            _ => None,
        }
    }

    fn content_type(self) -> &'static str {
        match self {
            Self::Png => "image/png",
            Self::Jpeg => "image/jpeg",
            Self::Webp => "image/webp",
        }
    }

    fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpg",
            Self::Webp => "webp",
        }
    }
}

/// The file name at the end of an avatar's link. It changes with the image, so what it names never changes.
fn file_name(image: &[u8], format: Format) -> String {
    const DIGITS: usize = 16;
    let digest = Uuid::new_v5(&Uuid::NAMESPACE_OID, image).simple().to_string();
    format!("{}.{}", &digest[..DIGITS], format.extension())
}

fn base64(text: &str) -> Option<Bytes> {
    BASE64_STANDARD.decode(text.trim()).ok().map(Bytes::from)
}

/// An uploaded file or, in JSON, its Base64.
fn image(value: Value) -> Result<(Bytes, Format), Invalid> {
    let image = match value {
        Value::File(image) => Some(image),
        Value::Text(text) => base64(&text),
        Value::Json(json) => fields::string(&json).ok().and_then(|text| base64(&text)),
    };
    let image = image.ok_or_else(|| Invalid("must be a file, or its Base64 as a string".into()))?;
    match Format::of(&image) {
        Some(format) => Ok((image, format)),
        None => Err(Invalid("must be a PNG, JPEG or WebP image".into())),
    }
}

pub(crate) async fn put(
    gateway: web::Data<Gateway>,
    req: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Error> {
    let limit = gateway.http.avatar_limit_bytes;
    let path = Fields::path(&req);
    let parse = move |mut fields: Fields| {
        fields.add_all(path);
        let id = fields.required("id", fields::id::<UserId>);
        let image = fields.required("image", image);
        fields.finish((id, image))
    };
    let (id, (image, format)) = body::read_as(&req, payload.into_inner(), Kinds::JsonAndForms, parse).await?;
    if image.len() > limit {
        return Err(Error::TooLarge { what: "image".into(), limit });
    }
    let keep = move |conn: &mut _| {
        let link = format!("/avatar/{id}/{}", file_name(&image, format));
        avatars::put(conn, id, format.content_type(), &image, &link)
    };
    let user = gateway.write(&[Subject::User(id)], gateway.soon(), keep).await?;
    Ok(HttpResponse::Ok().json(json!({"user": User::from(user)})))
}

pub(crate) async fn get(gateway: web::Data<Gateway>, req: HttpRequest) -> Result<HttpResponse, Error> {
    let mut fields = Fields::parameters(&req);
    let id = fields.required("id", fields::id::<UserId>);
    let file = fields.required("file", fields::text(|text| Ok(text.to_owned())));
    let (id, file) = fields.finish((id, file))?;
    let avatar = move |conn: &mut _| {
        let (_, image) = avatars::get(conn, id)?;
        // The link of an earlier image, which somebody may still hold, leads nowhere.
        match Format::of(&image) {
            Some(format) if file_name(&image, format) == file => Ok((format, image)),
            _ => Err(storage::Error::NotFound("avatar")),
        }
    };
    let (format, image) = gateway.read(avatar).await?;
    Ok(HttpResponse::Ok()
        .content_type(format.content_type())
        .insert_header((CACHE_CONTROL, "public, max-age=31536000, immutable"))
        .body(image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_their_first_bytes() {
        assert_eq!(Format::of(b"\x89PNG\r\n\x1a\n..."), Some(Format::Png));
        assert_eq!(Format::of(b"\xff\xd8\xff\xe0..."), Some(Format::Jpeg));
        assert_eq!(Format::of(b"RIFF\x10\0\0\0WEBPVP8 "), Some(Format::Webp));
        for other in [&b""[..], b"GIF89a", b"RIFF\x10\0\0\0WAVE", b"<svg>", b"\x89PNG"] {
            assert_eq!(Format::of(other), None);
        }
    }
}
