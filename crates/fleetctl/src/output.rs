//! What a terminal shows: columns, and messages of strangers that mustn't move its cursor.

use chrono::{DateTime, Utc};
use domain::values::whole_clusters;
use serde::Serialize;
use serde_json::{
    Serializer,
    ser::{CompactFormatter, Formatter, PrettyFormatter},
};
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

/// Whether a terminal takes the character for anything but one to be shown: it steers, breaks the line, turns the direction
/// of writing, or isn't seen at all, so that a text looks like another one or a column is wider than it seems.
fn disturbs(c: char) -> bool {
    match c {
        // Lines and paragraphs end.
        '\u{2028}' | '\u{2029}' => true,
        // Marks of interlinear annotations.
        '\u{fff9}'..='\u{fffb}' => true,
        // What Unicode has as `Default_Ignorable_Code_Point`: marks of direction, joiners and other characters without width,
        // fillers, variation selectors, tags, and what is reserved for more of them.
        '\u{ad}'
        | '\u{34f}'
        | '\u{61c}'
        | '\u{115f}'..='\u{1160}'
        | '\u{17b4}'..='\u{17b5}'
        | '\u{180b}'..='\u{180f}'
        | '\u{200b}'..='\u{200f}'
        | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}'
        | '\u{feff}'
        | '\u{ffa0}'
        | '\u{fff0}'..='\u{fff8}'
        | '\u{1bca0}'..='\u{1bca3}'
        | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0000}'..='\u{e0fff}' => true,
        c => c.is_control(),
    }
}

/// The text with every character that [`disturbs`] in visible form.
pub(crate) fn visible(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut shown, c| {
        if disturbs(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
        shown
    })
}

/// As [`visible`], with lines and tabs left as they are.
pub(crate) fn visible_lines(text: &str) -> String {
    let line = |line: &str| line.split('\t').map(visible).collect::<Vec<_>>().join("\t");
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// As [`visible`], cut to `max` characters, between what a reader takes for one each.
pub(crate) fn short(text: &str, max: usize) -> String {
    let text = visible(text);
    match text.char_indices().nth(max) {
        None => text,
        Some(_) => whole_clusters(&text, max.saturating_sub(1)).to_owned() + "…",
    }
}

/// Writes a JSON value, with line breaks. What [`disturbs`] a terminal is written as JSON's `\uXXXX`, which says the same.
pub(crate) fn json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    value.serialize(&mut Serializer::with_formatter(&mut *out, Calm(PrettyFormatter::new())))?;
    writeln!(out)
}

/// As [`json`], on one line.
pub(crate) fn json_line(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    value.serialize(&mut Serializer::with_formatter(&mut *out, Calm(CompactFormatter)))?;
    writeln!(out)
}

/// A form of JSON without the characters that disturb.
struct Calm<F>(F);

fn write_calm(out: &mut (impl Write + ?Sized), text: &str, disturbs: impl Fn(char) -> bool) -> io::Result<()> {
    let mut rest = text;
    while let Some((at, c)) = rest.char_indices().find(|(_, c)| disturbs(*c)) {
        out.write_all(&rest.as_bytes()[..at])?;
        for unit in c.encode_utf16(&mut [0; 2]) {
            write!(out, "\\u{unit:04x}")?;
        }
        rest = &rest[at + c.len_utf8()..];
    }
    out.write_all(rest.as_bytes())
}

impl<F: Formatter> Formatter for Calm<F> {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, fragment: &str) -> io::Result<()> {
        write_calm(out, fragment, disturbs)
    }

    fn write_raw_fragment<W: ?Sized + Write>(&mut self, out: &mut W, fragment: &str) -> io::Result<()> {
        // JSON that is there already. Outside of its strings there is nothing but ASCII, line breaks among it.
        write_calm(out, fragment, |c| !c.is_ascii() && disturbs(c))
    }

    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_array(out)
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array(out)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(out, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array_value(out)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object(out)
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object(out)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object_value(out)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object_value(out)
    }
}

/// Writes rows in columns as wide as their widest cell, with every cell [`visible`].
pub(crate) fn table(out: &mut dyn Write, header: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| visible(cell)).collect()).collect();
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
        for hidden in [
            0x7f, 0x9f, 0xad, 0x34f, 0x61c, 0x1160, 0x180e, 0x200b, 0x200d, 0x200e, 0x2028, 0x2029, 0x2060, 0x2066,
            0x206f, 0x3164, 0xfe0f, 0xfeff, 0xfffb, 0x1d173, 0xe0001, 0xe0041, 0xe0100,
        ] {
            let text = format!("a{}b", char::from_u32(hidden).unwrap());
            assert_eq!(visible(&text), format!(r"a\u{{{hidden:x}}}b"));
            let mut out = Vec::new();
            json(&mut out, &[&text]).unwrap();
            assert_eq!(serde_json::from_slice::<[String; 1]>(&out).unwrap(), [text], "the same is said");
            let out = String::from_utf8(out).unwrap();
            assert!(out.chars().all(|c| c == '\n' || !disturbs(c)), "{out:?}");
        }
        assert_eq!(visible("e\u{301} ع क्षि"), "e\u{301} ع क्षि");
        assert_eq!(visible("žluťoučký 雁"), "žluťoučký 雁");
        assert_eq!(visible_lines("a\tb\r\nc\x07"), "a\tb\nc\\u{7}");
        assert_eq!(short("abcdef", 6), "abcdef");
        assert_eq!(short("abcdefg", 6), "abcde…");
        assert_eq!(short("abcde\u{301}fg", 6), "abcd…");
        assert_eq!(short("🇨🇿🇨🇿🇨🇿", 4), "🇨🇿…");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut out = Vec::new();
        let rows = [vec!["1".into(), "žluť".into(), "x".into()], vec!["100".into(), "b".into(), String::new()]];
        table(&mut out, &["ID", "B", "C"], &rows).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "ID   B     C\n1    žluť  x\n100  b\n");
        let mut out = Vec::new();
        table(&mut out, &["A", "B"], &[vec!["1\u{2028}".into(), "2\u{200b}".into()]]).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "A          B\n1\\u{2028}  2\\u{200b}\n");
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
