//! Who a client is, and how much it may ask for.
//!
//! A client is an address: that of the connection or, behind a proxy that the settings name, the one that the proxy tells. IPv6
//! counts by networks of 64 bits, of which one client may have any address.

use crate::{error::Error, settings::HttpSettings};
use actix_web::http::{
    Method,
    header::{HeaderMap, HeaderName, HeaderValue},
};
use governor::{
    Quota, RateLimiter,
    clock::{Clock as _, DefaultClock},
    middleware::{StateInformationMiddleware, StateSnapshot},
    state::keyed::HashMapStateStore,
};
use ipnet::IpNet;
use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Requests of a kind that count together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Group {
    Read,
    Write,
    /// One request of which makes many rows.
    Bulk,
    /// Making a user: with a password it's some 20 ms of a core.
    SignUp,
}

impl Group {
    fn of(method: &Method, path: &str) -> Self {
        const BULK: [&str; 3] = ["/api/v1/add-followers", "/api/v1/event", "/api/v1/message"];
        match path {
            _ if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) => Self::Read,
            "/api/v1/user" | "/api/v2/user" if *method == Method::POST => Self::SignUp,
            _ if BULK.iter().any(|bulk| path.starts_with(bulk)) => Self::Bulk,
            _ => Self::Write,
        }
    }
}

/// A token bucket for each address.
struct Buckets {
    name: &'static str,
    policy: HeaderValue,
    limiter: RateLimiter<IpAddr, HashMapStateStore<IpAddr>, DefaultClock, StateInformationMiddleware>,
    asked: AtomicU32,
}

impl Buckets {
    /// `None` where there's no limit.
    fn new(name: &'static str, count: u32, per: Duration) -> Option<Self> {
        let burst = NonZeroU32::new(count)?;
        let quota = Quota::with_period(per / count)?.allow_burst(burst);
        let policy = format!("\"{name}\";q={count};w={}", per.as_secs());
        Some(Self {
            name,
            policy: HeaderValue::try_from(policy).ok()?,
            limiter: RateLimiter::hashmap(quota).with_middleware(),
            asked: AtomicU32::new(0),
        })
    }

    fn take(&self, address: IpAddr) -> Result<Allowance<'_>, Error> {
        const FORGET_EVERY: u32 = 4096;
        // Full buckets are as good as none.
        if self.asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(FORGET_EVERY) {
            self.limiter.retain_recent();
        }
        match self.limiter.check_key(&address) {
            Ok(left) => Ok(Allowance { buckets: self, left }),
            Err(until) => {
                let wait = until.wait_time_from(DefaultClock::default().now());
                Err(Error::TooManyRequests { name: self.name, wait })
            }
        }
    }
}

/// What a client has left after a request.
pub(crate) struct Allowance<'a> {
    buckets: &'a Buckets,
    left: StateSnapshot,
}

impl Allowance<'_> {
    /// Tells it, as draft-ietf-httpapi-ratelimit-headers-10 has it.
    pub(crate) fn tell(&self, headers: &mut HeaderMap) {
        let left = format!("\"{}\";r={}", self.buckets.name, self.left.remaining_burst_capacity());
        headers.insert(RATE_LIMIT_POLICY, self.buckets.policy.clone());
        if let Ok(left) = HeaderValue::try_from(left) {
            headers.insert(RATE_LIMIT, left);
        }
    }
}

/// Tells a client that has nothing left when it may ask again.
pub(crate) fn tell_none(headers: &mut HeaderMap, name: &str, wait: Duration) {
    if let Ok(none) = HeaderValue::try_from(format!("\"{name}\";r=0;t={}", whole_seconds(wait))) {
        headers.insert(RATE_LIMIT, none);
    }
}

/// Rounded up.
pub(crate) fn whole_seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

/// What clients are told by and held to.
pub(crate) struct Clients {
    proxies: Vec<IpNet>,
    exempt: Vec<IpNet>,
    reads: Option<Buckets>,
    writes: Option<Buckets>,
    bulks: Option<Buckets>,
    sign_ups: Option<Buckets>,
}

impl Clients {
    pub(crate) fn of(http: &HttpSettings) -> Self {
        const SECOND: Duration = Duration::from_secs(1);
        const MINUTE: Duration = Duration::from_secs(60);
        Self {
            proxies: http.trusted_proxies.clone(),
            exempt: http.unlimited_addresses.clone(),
            reads: Buckets::new("read", http.reads_per_s, SECOND),
            writes: Buckets::new("write", http.writes_per_s, SECOND),
            bulks: Buckets::new("bulk", http.bulk_writes_per_s, SECOND),
            sign_ups: Buckets::new("sign-up", http.sign_ups_per_minute, MINUTE),
        }
    }

    /// Whether connections from this address are counted: behind a proxy's are many clients.
    pub(crate) fn is_counted(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        ![&self.exempt, &self.proxies].iter().any(|nets| contains(nets, address))
    }

    /// The client's address: the last one on the way here that isn't a proxy's of ours.
    fn address(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let peer = peer.to_canonical();
        if !contains(&self.proxies, peer) {
            return peer;
        }
        let told: Vec<&str> = headers
            .get_all(FORWARDED_FOR)
            .filter_map(|value| value.to_str().ok())
            .flat_map(|list| list.split(','))
            .collect();
        let mut nearest = peer;
        for address in told.iter().rev() {
            // What comes before something that can't be read may be anybody's invention.
            let Ok(address) = address.trim().parse::<IpAddr>() else { break };
            nearest = address.to_canonical();
            if !contains(&self.proxies, nearest) {
                break;
            }
        }
        nearest
    }

    /// Counts a request. `None` where there's no limit.
    ///
    /// # Errors
    /// [`Error::TooManyRequests`].
    pub(crate) fn count(
        &self,
        method: &Method,
        path: &str,
        peer: IpAddr,
        headers: &HeaderMap,
    ) -> Result<Option<Allowance<'_>>, Error> {
        let address = self.address(peer, headers);
        let buckets = match Group::of(method, path) {
            Group::Read => &self.reads,
            Group::Write => &self.writes,
            Group::Bulk => &self.bulks,
            Group::SignUp => &self.sign_ups,
        };
        match buckets {
            Some(buckets) if !path.starts_with("/health/") && !contains(&self.exempt, address) => {
                buckets.take(network(address)).map(Some)
            }
            _ => Ok(None),
        }
    }
}

fn contains(nets: &[IpNet], address: IpAddr) -> bool {
    nets.iter().any(|net| net.contains(&address))
}

fn network(address: IpAddr) -> IpAddr {
    const HOST: u128 = u64::MAX as u128;
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => Ipv6Addr::from(u128::from(address) & !HOST).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(proxies: &[&str]) -> Clients {
        let proxies = proxies.iter().map(|net| net.parse().unwrap()).collect();
        Clients {
            proxies,
            exempt: vec!["127.0.0.0/8".parse().unwrap()],
            reads: Buckets::new("read", 2, Duration::from_secs(3600)),
            writes: None,
            bulks: None,
            sign_ups: None,
        }
    }

    #[test]
    fn a_client_behind_a_proxy_is_whom_the_proxy_names() {
        let clients = clients(&["10.0.0.0/8", "::1/128"]);
        for (peer, forwarded, expected) in [
            ("192.0.2.1", &["198.51.100.7"][..], "192.0.2.1"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", &["203.0.113.9, 198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", &["203.0.113.9", "198.51.100.7, 10.0.0.2"], "198.51.100.7"),
            ("10.0.0.1", &["203.0.113.9, x, 10.0.0.2"], "10.0.0.2"),
            ("::1", &["::ffff:198.51.100.7"], "198.51.100.7"),
            ("::ffff:10.0.0.1", &["2001:db8::1"], "2001:db8::1"),
        ] {
            let mut headers = HeaderMap::new();
            for value in forwarded {
                headers.append(FORWARDED_FOR, HeaderValue::from_static(value));
            }
            let address = clients.address(peer.parse().unwrap(), &headers);
            assert_eq!(address, expected.parse::<IpAddr>().unwrap(), "{peer} {forwarded:?}");
        }
    }

    #[test]
    fn a_bucket_is_an_address_or_a_network_and_empties() {
        let clients = clients(&[]);
        let ask = |peer: &str| {
            clients
                .count(&Method::GET, "/api/v1/get-tweet", peer.parse().unwrap(), &HeaderMap::new())
                .map(|left| left.is_some())
        };
        for peer in ["192.0.2.1", "192.0.2.1", "2001:db8::1", "2001:db8::2"] {
            assert!(ask(peer).unwrap());
        }
        for peer in ["192.0.2.1", "2001:db8::3"] {
            let Err(Error::TooManyRequests { name: "read", wait }) = ask(peer) else { panic!("{peer} isn't refused") };
            assert!(wait > Duration::from_secs(60), "{wait:?}");
        }
        for (peer, limited) in [("192.0.2.2", true), ("2001:db8:0:1::1", true), ("127.0.0.1", false)] {
            assert_eq!(ask(peer).unwrap(), limited, "{peer}");
        }
    }

    #[test]
    fn requests_count_by_what_they_cost() {
        for (method, path, group) in [
            (Method::GET, "/api/v2/feed/1", Group::Read),
            (Method::HEAD, "/api/v1/event", Group::Read),
            (Method::POST, "/api/v1/post-tweet", Group::Write),
            (Method::POST, "/api/v2/user", Group::SignUp),
            (Method::PATCH, "/api/v1/user", Group::Write),
            (Method::POST, "/api/v1/add-followers/7", Group::Bulk),
            (Method::POST, "/api/v1/message", Group::Bulk),
        ] {
            assert_eq!(Group::of(&method, path), group, "{method} {path}");
        }
    }
}
