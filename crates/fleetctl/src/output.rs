//! What a terminal shows: columns, and messages of strangers that mustn't move its cursor.

use chrono::{DateTime, Utc};
use serde::Serialize;
use std::{
    fmt::Write as _,
    io::{self, Write},
    time::Duration,
};

/// Takes a reader who has seen enough and gone away for one who reads on: the work goes on, and its status counts.
pub(crate) struct Forgiving<W>(pub(crate) W);

impl<W: Write> Write for Forgiving<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(bytes.len()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.0.flush() {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }
}

/// The text with every control character in visible form, so that it neither breaks a line nor steers the terminal.
pub(crate) fn visible(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        match c {
            // Those that reverse the direction of writing can make a text look like another one.
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                shown.extend(c.escape_unicode());
            }
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
        shown
    })
}

/// As [`visible`], with lines and tabs left as they are.
pub(crate) fn visible_lines(text: &str) -> String {
    let line = |line: &str| line.split('\t').map(visible).collect::<Vec<_>>().join("\t");
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// As [`visible`], cut to `max` characters.
pub(crate) fn short(text: &str, max: usize) -> String {
    let text = visible(text);
    match text.char_indices().nth(max) {
        None => text,
        Some(_) => text.chars().take(max.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// Writes a JSON value, with line breaks.
pub(crate) fn json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

/// Writes rows in columns as wide as their widest cell. Cells are to be [`visible`].
pub(crate) fn table(out: &mut dyn Write, header: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    let width = |text: &str| text.chars().count();
    let widths: Vec<usize> = header
        .iter()
        .enumerate()
        .map(|(column, name)| rows.iter().map(|row| width(&row[column])).chain([width(name)]).max().unwrap_or(0))
        .collect();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, width) in cells.zip(&widths) {
            write!(line, "{cell:width$}  ").expect("writing to a string can't fail");
        }
        writeln!(out, "{}", line.trim_end())
    };
    line(&mut header.iter().copied())?;
    rows.iter().try_for_each(|row| line(&mut row.iter().map(String::as_str)))
}

/// A body as far as it's shown.
#[derive(Debug, PartialEq)]
pub(crate) enum Body<'a> {
    Text(&'a str),
    Binary(&'a [u8]),
}

impl<'a> Body<'a> {
    /// At most `max` bytes; a character that the limit cuts through is left out.
    pub(crate) fn of(body: &'a [u8], max: usize) -> Self {
        let shown = &body[..max.min(body.len())];
        match std::str::from_utf8(shown) {
            Ok(text) => Self::Text(text),
            Err(error) if error.error_len().is_none() && shown.len() < body.len() => {
                Self::Text(std::str::from_utf8(&shown[..error.valid_up_to()]).unwrap_or_default())
            }
            Err(_) => Self::Binary(shown),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Binary(bytes) => bytes.len(),
        }
    }
}

/// Two digits for each byte.
pub(crate) fn hex(bytes: &[u8], separator: &str) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(separator)
}

/// Sixteen bytes to a line: offset, hexadecimal, and what of it is printable ASCII.
pub(crate) fn hex_dump(bytes: &[u8]) -> String {
    bytes.chunks(16).enumerate().fold(String::new(), |mut dump, (line, chunk)| {
        let ascii: String =
            chunk.iter().map(|byte| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '.' }).collect();
        writeln!(dump, "{:08x}  {:47}  {ascii}", line * 16, hex(chunk, " ")).expect("writing to a string can't fail");
        dump
    })
}

/// UTC, to the second.
pub(crate) fn time(time: DateTime<Utc>) -> String {
    time.format("%Y-%m-%d %H:%M:%S").to_string()
}

/// `12.3 s (4567/s)`.
pub(crate) fn pace(count: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64().max(1e-6);
    format!("{seconds:.1} s ({:.0}/s)", count as f64 / seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strangers_text_cant_steer_the_terminal() {
        assert_eq!(visible("a\x1b[2Jb\nc\u{9b}d"), r"a\u{1b}[2Jb\nc\u{9b}d");
        assert_eq!(visible("a\u{202e}b"), r"a\u{202e}b");
        assert_eq!(visible("žluťoučký 雁"), "žluťoučký 雁");
        assert_eq!(visible_lines("a\tb\r\nc\x07"), "a\tb\nc\\u{7}");
        assert_eq!(short("abcdef", 6), "abcdef");
        assert_eq!(short("abcdefg", 6), "abcde…");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut out = Vec::new();
        let rows = [vec!["1".into(), "žluť".into(), "x".into()], vec!["100".into(), "b".into(), String::new()]];
        table(&mut out, &["ID", "B", "C"], &rows).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "ID   B     C\n1    žluť  x\n100  b\n");
    }

    #[test]
    fn a_dump_shows_offset_bytes_and_text() {
        assert_eq!(
            hex_dump(b"\xff\x00ABCDEFGHIJKLMNOPQ"),
            "00000000  ff 00 41 42 43 44 45 46 47 48 49 4a 4b 4c 4d 4e  ..ABCDEFGHIJKLMN\n\
             00000010  4f 50 51                                         OPQ\n"
        );
    }

    #[test]
    fn a_body_is_cut_between_characters_and_told_from_binary() {
        assert_eq!(Body::of("žluť".as_bytes(), 100), Body::Text("žluť"));
        assert_eq!(Body::of("žluť".as_bytes(), 5), Body::Text("žlu"));
        assert_eq!(Body::of("žluť".as_bytes(), 1), Body::Text(""));
        assert_eq!(Body::of(b"a\xffb", 100), Body::Binary(b"a\xffb"));
        // A text that really ends in the middle of a character isn't UTF-8.
        assert_eq!(Body::of(b"a\xc5", 100), Body::Binary(b"a\xc5"));
    }
}
