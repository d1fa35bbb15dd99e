//! The proxy passes bytes on, and misbehaves as it's told to.

use harness::{Action, Direction, Proxy, after, eventually};
use std::{
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::Duration,
};

/// How long nothing has to come for it to be held back.
const SILENCE: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(20);

/// A server that sends back what it gets, and tells what that was.
fn echo() -> (u16, mpsc::Receiver<u8>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let (got, all) = mpsc::channel();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let got = got.clone();
            thread::spawn(move || {
                let mut byte = [0];
                while stream.read_exact(&mut byte).is_ok() && got.send(byte[0]).is_ok() {
                    let _ = stream.write_all(&byte);
                }
            });
        }
    });
    (port, all)
}

fn client(proxy: &Proxy) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", proxy.port())).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

fn read(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn is_silent(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(SILENCE)).unwrap();
    let silent = stream.read(&mut [0]).is_err();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    silent
}

fn is_closed(stream: &mut TcpStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0)) || stream.peer_addr().is_err()
}

#[test]
fn bytes_pass_are_held_and_are_cut() {
    let (port, _all) = echo();
    let (proxy, url) = Proxy::of(&format!("amqp://me@127.0.0.1:{port}/%2f"));
    assert_eq!(url, format!("amqp://me@127.0.0.1:{}/%2f", proxy.port()));
    let mut client_of = client(&proxy);
    client_of.write_all(b"hello").unwrap();
    assert_eq!(read(&mut client_of, 5), b"hello");

    let held = proxy.hold(Direction::ToClient);
    client_of.write_all(b"again").unwrap();
    assert!(is_silent(&mut client_of));
    drop(held);
    assert_eq!(read(&mut client_of, 5), b"again");

    let refusing = proxy.refuse();
    assert!(is_closed(&mut client(&proxy)));
    drop(refusing);
    assert_eq!(proxy.cut(), 1);
    assert!(is_closed(&mut client_of));
    eventually("the connection is forgotten", || (proxy.connections() == 0).then_some(()));
    let mut another = client(&proxy);
    another.write_all(b"x").unwrap();
    assert_eq!(read(&mut another, 1), b"x");
    drop(proxy);
    assert!(is_closed(&mut another));
}

#[test]
fn a_trap_springs_once_at_its_place_even_between_two_pieces() {
    let (port, all) = echo();
    let proxy = Proxy::to(port);
    let trap = proxy.trap(Direction::ToServer, after("COMMIT"), Action::Cut);
    let mut first = client(&proxy);
    first.write_all(b"BEGIN COM").unwrap();
    assert_eq!(read(&mut first, 9), b"BEGIN COM");
    assert!(!trap.sprung());
    first.write_all(b"MIT;").unwrap();
    while first.read(&mut [0]).is_ok_and(|count| count > 0) {}
    assert!(trap.sprung());
    let mut second = client(&proxy);
    second.write_all(b"COMMIT").unwrap();
    assert_eq!(read(&mut second, 6), b"COMMIT", "it has sprung");
    let got: Vec<_> = all.try_iter().collect();
    assert!(got.starts_with(b"BEGIN COM") && !got.contains(&b';'), "what is behind the place doesn't arrive");
}

#[test]
fn an_answer_is_lost_or_held_while_the_request_has_arrived() {
    let (port, all) = echo();
    let proxy = Proxy::to(port);
    let trap = proxy.trap(Direction::ToServer, after("COMMIT"), Action::CutAnswer);
    let mut cut = client(&proxy);
    cut.write_all(b"COMMIT").unwrap();
    assert!(is_closed(&mut cut) && trap.sprung());
    let got: Vec<_> = (0..6).map(|_| all.recv_timeout(PATIENCE).unwrap()).collect();
    assert_eq!(got, b"COMMIT");

    let trap = proxy.trap(Direction::ToClient, after("ok"), Action::Hold);
    let mut held = client(&proxy);
    held.write_all(b"ok, and more").unwrap();
    assert_eq!(read(&mut held, 2), b"ok");
    assert!(is_silent(&mut held) && trap.sprung());
    let mut other = client(&proxy);
    other.write_all(b"ok").unwrap();
    assert_eq!(read(&mut other, 2), b"ok", "another connection isn't held");
    drop(trap);
    assert_eq!(read(&mut held, 10), b", and more");
}
