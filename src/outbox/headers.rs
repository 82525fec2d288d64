//! The headers column: a JSON object of properties.
//!
//! A text becomes a property as it is; a number, a boolean, a list or an object as its JSON text, digit for digit; null
//! is no property. All texts go into the caller's arena, so that a row's headers cost no allocation once it has grown.
//! A name that stands twice (possible in `json`, not in `jsonb`) is passed on twice: Pulsar's clients keep the last.

use std::fmt;
use std::ops::Range;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::error::Problem;

/// Where one property's name and value stand in the arena.
#[derive(Clone, Debug)]
pub(super) struct Span {
    pub(super) name: Range<usize>,
    pub(super) value: Range<usize>,
}

/// Appends the properties in `json` to `spans`, and their texts to `arena`.
pub(super) fn parse(json: &str, arena: &mut String, spans: &mut Vec<Span>) -> Result<(), Problem> {
    // serde_json's own messages may quote the text, which must not reach a log.
    if json.trim_ascii() == "null" {
        // What many mappers write for "no headers".
        return Ok(());
    }
    if !json.trim_ascii_start().starts_with('{') {
        return Err(Problem::HeadersNotObject);
    }
    let mut deserializer = serde_json::Deserializer::from_str(json);
    deserializer
        .deserialize_map(Object { arena, spans })
        .and_then(|()| deserializer.end())
        .map_err(|_| Problem::HeadersNotJson)
}

struct Object<'s> {
    arena: &'s mut String,
    spans: &'s mut Vec<Span>,
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { arena, spans } = self;
        loop {
            let start = arena.len();
            if map.next_key_seed(Append(arena))?.is_none() {
                return Ok(());
            }
            let middle = arena.len();
            let json = map.next_value::<&RawValue>()?.get();
            if json == "null" {
                arena.truncate(start);
                continue;
            }
            if json.starts_with('"') {
                Append(arena)
                    .deserialize(&mut serde_json::Deserializer::from_str(json))
                    .map_err(|_| A::Error::custom("a text that Unicode does not have"))?;
            } else {
                arena.push_str(json);
            }
            spans.push(Span {
                name: start..middle,
                value: middle..arena.len(),
            });
        }
    }
}

/// Appends one JSON text, without its escapes.
struct Append<'s>(&'s mut String);

impl<'de> DeserializeSeed<'de> for Append<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Append<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(json: &str) -> Result<Vec<(String, String)>, Problem> {
        let mut arena = "what was there before".to_owned();
        let mut spans = Vec::new();
        parse(json, &mut arena, &mut spans)?;
        Ok(spans
            .into_iter()
            .map(|span| (arena[span.name].to_owned(), arena[span.value].to_owned()))
            .collect())
    }

    #[test]
    fn each_kind_of_value() {
        let json = r#" { "text" : "a\n\"ü\u00e9\ud83d\ude00", "n":-12.50e+3, "big": 123456789012345678901234567890,
            "yes":true, "gone":null, "list": [1, "x"], "object":{"a" : null}, "empty":"", "":"no name", "k\u0065y":1 } "#;
        let expected = [
            ("text", "a\n\"üé😀"),
            ("n", "-12.50e+3"),
            ("big", "123456789012345678901234567890"),
            ("yes", "true"),
            ("list", r#"[1, "x"]"#),
            ("object", r#"{"a" : null}"#),
            ("empty", ""),
            ("", "no name"),
            ("key", "1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(parsed(json), Ok(expected.to_vec()));
        assert_eq!(parsed("{}"), Ok(Vec::new()));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        for json in ["", "nul", "[]", r#""a""#, "1", "secret"] {
            assert_eq!(parsed(json), Err(Problem::HeadersNotObject), "{json:?}");
        }
        for json in [
            "{",
            "{} x",
            r#"{"a":1}{}"#,
            r#"{"a"}"#,
            r#"{"a":"\ud800"}"#,
            r#"{"a":secret}"#,
            "{a:1}",
            "{\"a\":\"\u{1}\"}",
        ] {
            assert_eq!(parsed(json), Err(Problem::HeadersNotJson), "{json:?}");
        }
    }

    proptest! {
        #[test]
        fn any_texts_come_back(pairs in proptest::collection::vec((".*", ".*"), 0..6)) {
            let fields: Vec<String> = pairs
                .iter()
                .map(|(name, value)| format!("{}:{}", serde_json::json!(name), serde_json::json!(value)))
                .collect();
            prop_assert_eq!(parsed(&format!("{{{}}}", fields.join(","))), Ok(pairs));
        }

        #[test]
        fn no_text_panics(json in r#"[{}\[\]",:0-9a-fnul\\ ]{0,40}"#) {
            let _ = parsed(&json);
            let _ = parsed(&format!("{{{json}"));
        }
    }
}
