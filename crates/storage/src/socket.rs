//! A second handle to the TCP socket that libpq opens and keeps to itself.

use std::{
    collections::HashSet,
    fs,
    net::TcpStream,
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// The inodes of this process's open sockets, with their descriptors.
fn open_sockets() -> Vec<(String, RawFd)> {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else { return Vec::new() };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let target = fs::read_link(entry.path()).ok()?.to_str()?.to_owned();
            let fd = entry.file_name().to_str()?.parse().ok()?;
            target.starts_with("socket:").then_some((target, fd))
        })
        .collect()
}

/// The sockets that were open at one moment.
pub(crate) struct Before(HashSet<String>);

impl Before {
    pub(crate) fn now() -> Self {
        Self(open_sockets().into_iter().map(|(inode, _)| inode).collect())
    }

    /// A handle to the TCP socket that was opened since and is connected to `port`. The caller sees to it that nobody
    /// else connects to that port in the meantime. `None` where there is none: a Unix-domain socket, or no `/proc`.
    pub(crate) fn opened_since(&self, port: u16) -> Option<TcpStream> {
        open_sockets()
            .into_iter()
            .filter(|(inode, _)| !self.0.contains(inode))
            .filter_map(|(_, fd)| duplicate(fd))
            .find(|stream| stream.peer_addr().is_ok_and(|peer| peer.port() == port))
    }
}

/// Another handle to the socket behind `fd`; `None` if it was closed meanwhile.
#[allow(unsafe_code)]
fn duplicate(fd: RawFd) -> Option<TcpStream> {
    // SAFETY: fcntl takes any number as a descriptor and answers -1 where there is no such one open; what it returns
    // otherwise is new and nobody else's.
    let owned = unsafe {
        let new = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0);
        (new >= 0).then(|| OwnedFd::from_raw_fd(new))
    };
    owned.map(TcpStream::from)
}
