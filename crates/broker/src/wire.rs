//! The socket as the AMQP client sees it. In passing it does what the client can't be told to:
//!
//! - names the connection (the client offers no way to set client properties),
//! - notes the heartbeat that both sides agree on (the client tells nobody),
//! - makes names in deliveries valid UTF-8: AMQP's may be any bytes, and the client gives up the connection over one that
//!   isn't UTF-8, again and again, because the broker delivers the message again.

use domain::envelope::SUBSTITUTE;
use std::{
    io::{self, Read, Write},
    sync::{Arc, OnceLock},
};

use mio::{Evented, Poll, PollOpt, Ready, Token, net::TcpStream};

/// How much is read from the socket at a time.
const CHUNK: usize = 64 * 1024;

/// How far the handshake has come.
#[derive(Default)]
pub(crate) struct Handshake {
    /// User and password were sent.
    pub(crate) login: OnceLock<()>,
    /// The broker let us in, and this heartbeat was agreed.
    pub(crate) heartbeat_s: OnceLock<u16>,
}

pub(crate) struct Wire {
    socket: TcpStream,
    name: String,
    handshake: Arc<Handshake>,
    inbound: Inbound,
}

impl Wire {
    pub(crate) fn new(socket: TcpStream, name: &str, handshake: Arc<Handshake>) -> Self {
        Self { socket, name: name.into(), handshake, inbound: Inbound::default() }
    }
}

impl amiquip::IoStream for Wire {}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.inbound.has_some() {
            if self.inbound.fill(|space| self.socket.read(space))? == 0 {
                return Ok(0);
            }
        }
        Ok(self.inbound.give(buffer))
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.handshake.heartbeat_s.get().is_none() {
            // The handshake: the client writes each of its answers by itself and waits for the next question.
            if let Some(named) = with_connection_name(bytes, &self.name) {
                let written = self.socket.write(&named)?;
                let _ = self.handshake.login.set(());
                // An empty send buffer holds some hundred bytes; if one doesn't, the connection fails and is tried again.
                return if written == named.len() { Ok(bytes.len()) } else { Err(io::ErrorKind::WriteZero.into()) };
            }
            if let Some(heartbeat_s) = agreed_heartbeat(bytes) {
                let _ = self.handshake.heartbeat_s.set(heartbeat_s);
            }
        }
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

impl Evented for Wire {
    fn register(&self, poll: &Poll, token: Token, interest: Ready, opts: PollOpt) -> io::Result<()> {
        self.socket.register(poll, token, interest, opts)
    }

    fn reregister(&self, poll: &Poll, token: Token, interest: Ready, opts: PollOpt) -> io::Result<()> {
        self.socket.reregister(poll, token, interest, opts)
    }

    fn deregister(&self, poll: &Poll) -> io::Result<()> {
        self.socket.deregister(poll)
    }
}

/// Bytes from the broker: what has been given to the client, whole frames that may be given, and the rest.
#[derive(Default)]
struct Inbound {
    buffer: Vec<u8>,
    given: usize,
    whole: usize,
    filled: usize,
}

impl Inbound {
    fn has_some(&self) -> bool {
        self.given < self.whole
    }

    fn give(&mut self, to: &mut [u8]) -> usize {
        let count = to.len().min(self.whole - self.given);
        to[..count].copy_from_slice(&self.buffer[self.given..self.given + count]);
        self.given += count;
        count
    }

    /// Reads more behind what is there. Only called when all whole frames have been given.
    fn fill(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        self.buffer.copy_within(self.whole..self.filled, 0);
        self.filled -= self.whole;
        (self.given, self.whole) = (0, 0);
        if self.buffer.len() < self.filled + CHUNK {
            self.buffer.resize(self.filled + CHUNK, 0);
        }
        let count = read(&mut self.buffer[self.filled..])?;
        self.filled += count;
        while let Some(length) = frame_length(&self.buffer[self.whole..self.filled]) {
            make_names_utf8(&mut self.buffer[self.whole..self.whole + length]);
            self.whole += length;
        }
        Ok(count)
    }
}

// A frame: type, channel (2 bytes), length of the payload (4), payload, end mark.
const HEADER: usize = 7;
const FRAME_METHOD: u8 = 1;
const FRAME_CONTENT_HEADER: u8 = 2;
// A method frame's payload starts with its class and method.
const CONNECTION_START_OK: [u8; 4] = [0, 10, 0, 11];
const CONNECTION_TUNE_OK: [u8; 4] = [0, 10, 0, 31];
const BASIC_DELIVER: [u8; 4] = [0, 60, 0, 60];

/// The length of the whole frame that the bytes start with, if all of it is there.
fn frame_length(bytes: &[u8]) -> Option<usize> {
    let payload = u32::from_be_bytes(bytes.get(3..HEADER)?.try_into().ok()?);
    let length = HEADER + payload as usize + 1;
    (bytes.len() >= length).then_some(length)
}

/// What follows class and method in the frame that the bytes start with, if it's this method's.
fn arguments(bytes: &[u8], method: [u8; 4]) -> Option<&[u8]> {
    let frame = &bytes[..frame_length(bytes)?];
    (frame[0] == FRAME_METHOD).then_some(())?;
    frame[HEADER..].strip_prefix(&method)
}

/// The answer to the broker's `connection.start` with one more client property, whose table comes first in it.
fn with_connection_name(bytes: &[u8], name: &str) -> Option<Vec<u8>> {
    const KEY: &[u8] = b"connection_name";
    let table = arguments(bytes, CONNECTION_START_OK)?;
    let table_length = u32::from_be_bytes(table.get(..4)?.try_into().ok()?);

    let mut property = vec![KEY.len() as u8];
    property.extend_from_slice(KEY);
    property.push(b'S');
    property.extend_from_slice(&(name.len() as u32).to_be_bytes());
    property.extend_from_slice(name.as_bytes());
    let grown = |length: u32| (length + property.len() as u32).to_be_bytes();

    let mut named = bytes[..3].to_vec();
    named.extend_from_slice(&grown((frame_length(bytes)? - HEADER - 1) as u32));
    named.extend_from_slice(&CONNECTION_START_OK);
    named.extend_from_slice(&grown(table_length));
    named.extend_from_slice(&property);
    named.extend_from_slice(&bytes[HEADER + 8..]);
    Some(named)
}

fn agreed_heartbeat(bytes: &[u8]) -> Option<u16> {
    // Greatest channel number (2 bytes), greatest frame (4), heartbeat.
    Some(u16::from_be_bytes(arguments(bytes, CONNECTION_TUNE_OK)?.get(6..8)?.try_into().ok()?))
}

/// Puts ASCII's SUB, which is there for it, in place of each byte of a name that isn't UTF-8: exchange and routing key of a delivery, and the short strings
/// among its properties. A header's value that isn't UTF-8 only costs that header and those behind it.
fn make_names_utf8(frame: &mut [u8]) {
    let kind = frame[0];
    let end = frame.len() - 1;
    let mut fields = Fields(&mut frame[HEADER..end]);
    match kind {
        FRAME_METHOD if fields.0.starts_with(&BASIC_DELIVER) => fields.deliver(),
        FRAME_CONTENT_HEADER => fields.properties(),
        _ => None,
    };
}

/// The fields of a payload, from front to back. `None` if there's less than should be, which the client will find too.
struct Fields<'a>(&'a mut [u8]);

impl Fields<'_> {
    fn deliver(&mut self) -> Option<()> {
        self.take(BASIC_DELIVER.len())?;
        self.short_string()?; // consumer tag
        self.take(8 + 1)?; // delivery tag, redelivered
        self.short_string()?; // exchange
        self.short_string() // routing key
    }

    fn properties(&mut self) -> Option<()> {
        enum Kind {
            ShortString,
            Table,
            Bytes(usize),
        }
        use Kind::{Bytes, ShortString, Table};
        // content-type, content-encoding, headers, delivery-mode, priority, correlation-id, reply-to, expiration,
        // message-id, timestamp, type, user-id, app-id, cluster-id
        const PROPERTIES: [Kind; 14] = [
            ShortString,
            ShortString,
            Table,
            Bytes(1),
            Bytes(1),
            ShortString,
            ShortString,
            ShortString,
            ShortString,
            Bytes(8),
            ShortString,
            ShortString,
            ShortString,
            ShortString,
        ];
        self.take(2 + 2 + 8)?; // class, weight, size of the body
        let present = u16::from_be_bytes(self.take(2)?.try_into().ok()?);
        for (position, kind) in PROPERTIES.iter().enumerate() {
            if present & (0x8000 >> position) != 0 {
                match kind {
                    ShortString => self.short_string()?,
                    Table => {
                        let length = u32::from_be_bytes(self.take(4)?.try_into().ok()?);
                        self.take(length as usize)?;
                    }
                    Bytes(length) => {
                        self.take(*length)?;
                    }
                }
            }
        }
        Some(())
    }

    fn take(&mut self, length: usize) -> Option<&mut [u8]> {
        self.0.split_off_mut(..length)
    }

    fn short_string(&mut self) -> Option<()> {
        let length = self.take(1)?[0];
        let mut text = self.take(length.into())?;
        while let Err(error) = std::str::from_utf8(text) {
            let wrong = error.valid_up_to();
            text[wrong] = SUBSTITUTE;
            text = &mut text[wrong..];
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng, rngs::SmallRng};

    fn frame(kind: u8, payload: &[&[u8]]) -> Vec<u8> {
        let payload = payload.concat();
        let length = (payload.len() as u32).to_be_bytes();
        [&[kind, 0, 1], &length[..], &payload, &[0xCE]].concat()
    }

    /// A delivery with these as routing key and message id, and a body of two frames.
    fn delivery(key: &[u8], id: &[u8; 3]) -> Vec<u8> {
        let body = [0xFF; 3000];
        let size = 6000_u64.to_be_bytes();
        [
            frame(
                FRAME_METHOD,
                &[&BASIC_DELIVER, b"\x03tag", &7_u64.to_be_bytes(), &[1], b"\x02ex", &[key.len() as u8], key],
            ),
            // Headers, delivery mode, message id.
            frame(
                FRAME_CONTENT_HEADER,
                &[&[0, 60, 0, 0], &size, &0x3080_u16.to_be_bytes(), &[0, 0, 0, 2, 0xFF, 0xFF], &[2], &[3], id],
            ),
            frame(3, &[&body]),
            frame(3, &[&body]),
        ]
        .concat()
    }

    #[test]
    fn names_become_utf8_however_the_bytes_come_and_nothing_else_changes() {
        let sent = [delivery(b"a\xFFb\xC3", b"\x80id"), delivery("aäb".as_bytes(), b"ids")].concat();
        let expected = [delivery(b"a\x1Ab\x1A", b"\x1Aid"), delivery("aäb".as_bytes(), b"ids")].concat();
        let mut random = SmallRng::seed_from_u64(3);
        for most in [1, 10, 1000, 100_000] {
            let (mut inbound, mut unread, mut received) = (Inbound::default(), &sent[..], Vec::new());
            while received.len() < sent.len() {
                if inbound.has_some() {
                    let mut space = vec![0; random.random_range(1..=most)];
                    let count = inbound.give(&mut space);
                    received.extend_from_slice(&space[..count]);
                } else {
                    let limit = random.random_range(1..=most);
                    inbound.fill(|space| (&mut unread).take(limit as u64).read(space)).unwrap();
                }
            }
            assert!(received == expected, "at most {most} bytes at a time");
        }
    }

    #[test]
    fn cut_short_frames_are_left_to_the_client() {
        for whole in [delivery(b"\xFF\xFF\xFF\xFF", b"\xFF\xFF\xFF"), frame(FRAME_CONTENT_HEADER, &[])] {
            let length = frame_length(&whole).unwrap();
            for payload in 0..length - HEADER {
                let mut short = frame(whole[0], &[&whole[HEADER..HEADER + payload]]);
                make_names_utf8(&mut short);
                assert_eq!(short.len(), HEADER + payload + 1);
            }
        }
    }

    #[test]
    fn the_connection_gets_a_name_and_its_heartbeat_is_noted() {
        let start_ok = frame(FRAME_METHOD, &[&CONNECTION_START_OK, &[0, 0, 0, 5], b"\x02abV.", b"\x05PLAIN"]);
        let property = [b"\x0fconnection_nameS", &[0, 0, 0, 4][..], b"name"].concat();
        let table_length = [0, 0, 0, 5 + property.len() as u8];
        assert_eq!(
            with_connection_name(&start_ok, "name"),
            Some(frame(FRAME_METHOD, &[&CONNECTION_START_OK, &table_length, &property, b"\x02abV.", b"\x05PLAIN"]))
        );
        assert_eq!(with_connection_name(b"AMQP\x00\x00\x09\x01", "name"), None);

        let tune_ok = frame(FRAME_METHOD, &[&CONNECTION_TUNE_OK, &[7, 255], &[0, 2, 0, 0], &[0, 5]]);
        assert_eq!(agreed_heartbeat(&[tune_ok, start_ok.clone()].concat()), Some(5));
        assert_eq!(agreed_heartbeat(&start_ok), None);
    }
}
