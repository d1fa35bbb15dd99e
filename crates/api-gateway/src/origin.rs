//! Which names the gateway answers to, and which pages may have a browser write.
//!
//! A browser sends what any page asks it to, to any address that the page can name, those of an internal network among them. Two
//! things tell: `Host`, whose name a page's owner may have pointed here (DNS rebinding), and `Origin` or `Sec-Fetch-Site`, by
//! which a browser says where a request comes from (Fetch Standard, Fetch Metadata Request Headers).

use crate::{error::Error, settings::HttpSettings};
use actix_web::{
    HttpRequest,
    http::{
        Method,
        header::{HOST, HeaderName, ORIGIN},
    },
};
use std::net::IpAddr;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// # Errors
/// [`Error::WrongHost`] and [`Error::CrossSite`].
pub(crate) fn check(req: &HttpRequest, http: &HttpSettings) -> Result<(), Error> {
    let text = |name: HeaderName| match req.headers().get(name) {
        Some(value) => value.to_str().map(Some).map_err(|_| ()),
        None => Ok(None),
    };
    // An absolute URI counts before the header (RFC 9112, section 3.2.2).
    let absolute = req.uri().authority().map(actix_web::http::uri::Authority::as_str);
    let host = match absolute {
        Some(authority) => authority,
        None => text(HOST).map_err(|()| Error::WrongHost)?.unwrap_or_default(),
    };
    if !is_ours(host, &http.hosts) {
        return Err(Error::WrongHost);
    }
    if matches!(*req.method(), Method::GET | Method::HEAD | Method::OPTIONS) {
        return Ok(());
    }
    let site = text(SEC_FETCH_SITE).map_err(|()| Error::CrossSite)?;
    match text(ORIGIN).map_err(|()| Error::CrossSite)? {
        Some(origin) if http.origins.iter().any(|known| known == origin) => Ok(()),
        Some(origin) if origin.split_once("://").is_some_and(|(_, from)| from.eq_ignore_ascii_case(host)) => Ok(()),
        None if site.is_none_or(|site| matches!(site, "same-origin" | "none")) => Ok(()),
        _ => Err(Error::CrossSite),
    }
}

/// Addresses are nobody else's to point here, and neither is `localhost`. Programs of HTTP/1.0 name no host.
fn is_ours(host: &str, names: &[String]) -> bool {
    if host.is_empty() || names.iter().any(|name| name == "*") {
        return true;
    }
    let (name, port) = match host.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, port),
        _ => (host, ""),
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(&name);
    let is_known = name == "localhost" || name.ends_with(".localhost") || names.contains(&name);
    port.bytes().all(|byte| byte.is_ascii_digit()) && (is_known || address.parse::<IpAddr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_localhost_and_named_hosts_are_ours() {
        let names = ["gateway".to_owned(), "feeds.example.org".to_owned()];
        for host in [
            "",
            "127.0.0.1",
            "192.0.2.1:7777",
            "[::1]:7777",
            "[::1]",
            "localhost",
            "LOCALHOST:1",
            "a.localhost",
            "gateway:7777",
            "Feeds.Example.ORG.",
        ] {
            assert!(is_ours(host, &names), "{host}");
        }
        for host in [
            "evil.example",
            "gateway.evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "gateway:x",
            "[::1",
            ":",
        ] {
            assert!(!is_ours(host, &names), "{host}");
        }
        assert!(is_ours("evil.example", &["*".to_owned()]));
    }
}
