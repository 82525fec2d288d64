//! Random literals of each base type: a function of the seed, so that a failure comes again.
//!
//! Input: a type's name in `pg_type` and [`Random`]. Output: text that the type's input function takes, whatever the version of the
//! server. Numbers are of every size, texts of every plane of Unicode, with quotes, backslashes and control characters.

use crate::support::Random;

/// Words that text is made of, beside random characters.
const WORDS: [&str; 8] = ["", " ", "a", "O'Neil", "\\", "\"x\"", "grüße", "😀"];

/// A literal of the type.
pub(crate) fn literal(name: &str, random: &mut Random) -> String {
    if let Some(literal) = number(name, random).or_else(|| range(name, random)) {
        return literal;
    }
    match name {
        "bool" => pick(random, &["t", "f"]),
        "bytea" => {
            let length = random.below(40);
            format!(r"\x{}", hex(&random.bytes(length)))
        }
        "char" => char::from(u8::try_from(33 + random.below(94)).expect("ASCII")).to_string(),
        "text" | "varchar" | "refcursor" => text(random, 30),
        "name" => text(random, 12),
        "bpchar" => text(random, 8),
        "bit" | "varbit" => {
            let length = random.below(40);
            (0..length).map(|_| pick(random, &["0", "1"])).collect()
        }
        "uuid" => hex(&random.bytes(16)),
        "json" | "jsonb" => json(random, 3),
        "jsonpath" => format!(
            "{} $.\"{}\"[{} to last].a ? (@.b {} {})",
            pick(random, &["strict", "lax"]),
            word(random),
            random.below(9),
            pick(random, &["==", "<", ">="]),
            small(random)
        ),
        "xml" => format!(
            "<{0} b='{1}'>{2}<![CDATA[{3}]]></{0}> text",
            word(random),
            random.below(99),
            pick(random, &["ü", "&lt;", "&#233;", ""]),
            word(random)
        ),
        "tsvector" => tsvector(random),
        "tsquery" => format!(
            "{}'{}':{} {} ('{}' <{}> {})",
            pick(random, &["", "!"]),
            word(random),
            pick(random, &["a", "B", "cd", "*"]),
            pick(random, &["&", "|"]),
            word(random),
            1 + random.below(9),
            word(random)
        ),
        "aclitem" => {
            let rights = ["r", "a", "w", "d", "D", "x", "t"];
            let rights = rights.map(|right| format!("{right}{}", pick(random, &["", "*"])));
            let count = 1 + random.below(rights.len());
            format!("pg_monitor={}/pg_monitor", rights[..count].concat())
        }
        _ => geometry(name, random).unwrap_or_else(|| moment(name, random)),
    }
}

fn number(name: &str, random: &mut Random) -> Option<String> {
    Some(match name {
        "int2" => i16::from_be_bytes(array(random)).to_string(),
        "int4" => sized(random, 32).to_string(),
        "int8" => sized(random, 64).to_string(),
        "oid" | "xid" | "cid" => u32::from_be_bytes(array(random)).to_string(),
        "xid8" => u64::from_be_bytes(array(random)).to_string(),
        "regproc" | "regprocedure" | "regoper" | "regoperator" | "regclass" | "regtype"
        | "regrole" | "regnamespace" | "regcollation" | "regconfig" | "regdictionary" => {
            // Of things that exist, and of others.
            random.below(5_000).to_string()
        }
        "float4" => float4(random),
        "float8" => float8(random),
        "numeric" => match random.below(12) {
            0 => pick(random, &["NaN", "Infinity", "-Infinity"]),
            _ => format!(
                "{}{}.{}",
                pick(random, &["", "-"]),
                digits(random),
                digits(random)
            ),
        },
        "money" => {
            let cents = sized(random, 60);
            let sign = if cents < 0 { "-" } else { "" };
            let cents = cents.unsigned_abs();
            format!("{sign}{}.{:02}", cents / 100, cents % 100)
        }
        "tid" => format!(
            "({},{})",
            u32::from_be_bytes(array(random)),
            u16::from_be_bytes(array(random))
        ),
        "pg_lsn" => format!(
            "{:X}/{:X}",
            u32::from_be_bytes(array(random)),
            u32::from_be_bytes(array(random))
        ),
        "txid_snapshot" | "pg_snapshot" => {
            let xmin = 1 + random.below(1 << 40);
            let mut running: Vec<usize> = (0..random.below(5))
                .map(|_| xmin + random.below(90))
                .collect();
            running.sort_unstable();
            running.dedup();
            let running: Vec<String> = running.iter().map(ToString::to_string).collect();
            format!("{xmin}:{}:{}", xmin + 100, running.join(","))
        }
        "macaddr" => hex(&random.bytes(6)),
        "macaddr8" => hex(&random.bytes(8)),
        "inet" | "cidr" => {
            let [a, b, c, d]: [u8; 4] = array(random);
            match (name, random.below(if name == "inet" { 4 } else { 2 })) {
                ("inet", 0) => format!("{a}.{b}.{c}.{d}/{}", random.below(33)),
                ("inet", 1) => format!("{a}.{b}.{c}.{d}"),
                ("inet", 2) => format!("{a:x}:{b:x}::{c:x}:{d:x}"),
                ("inet", _) => format!("{a:x}:{b:x}::{c:x}:{d:x}/{}", random.below(129)),
                (_, 0) => format!("{a}.{b}.0.0/{}", 16 + random.below(17)),
                _ => format!("{a:x}:{b:x}::/{}", 32 + random.below(97)),
            }
        }
        _ => return None,
    })
}

fn geometry(name: &str, random: &mut Random) -> Option<String> {
    let point = |random: &mut Random| format!("({},{})", float8(random), float8(random));
    let points = |random: &mut Random, least: usize| {
        let count = least + random.below(4);
        let points: Vec<String> = (0..count).map(|_| point(random)).collect();
        points.join(",")
    };
    Some(match name {
        "point" => point(random),
        "lseg" => format!("[{},{}]", point(random), point(random)),
        "box" => format!("{},{}", point(random), point(random)),
        "path" if random.below(2) == 0 => format!("[{}]", points(random, 1)),
        "path" | "polygon" => format!("({})", points(random, 1)),
        "line" => format!(
            "{{{},{},{}}}",
            1 + random.below(9),
            float8(random),
            float8(random)
        ),
        "circle" => format!("<{},{}>", point(random), random.below(1 << 40)),
        _ => return None,
    })
}

fn moment(name: &str, random: &mut Random) -> String {
    let (month, day) = (1 + random.below(12), 1 + random.below(28));
    let (hour, minute, second) = (random.below(24), random.below(60), random.below(60));
    let micros = match random.below(3) {
        0 => String::new(),
        1 => ".5".to_owned(),
        _ => format!(".{:06}", random.below(1_000_000)),
    };
    let time = format!("{hour:02}:{minute:02}:{second:02}{micros}");
    let zone = format!(
        "{}{:02}:{:02}",
        pick(random, &["+", "-"]),
        random.below(15),
        random.below(60)
    );
    let (year, era) = match random.below(4) {
        0 => (1 + random.below(4_700), " BC"),
        1 => (1 + random.below(290_000), ""),
        _ => (1_900 + random.below(200), ""),
    };
    let date = format!("{year:04}-{month:02}-{day:02}");
    match name {
        "date" => format!("{date}{era}"),
        "time" => time,
        "timetz" => format!("{time}{zone}"),
        "timestamp" => format!("{date} {time}{era}"),
        "timestamptz" => format!("{date} {time}{zone}{era}"),
        "interval" => format!(
            "{} years {} mons {} days {}{}:{minute:02}:{second:02}{micros}",
            sized(random, 16),
            sized(random, 16),
            sized(random, 24),
            pick(random, &["", "-"]),
            random.below(100_000)
        ),
        _ => panic!("type {name} has no generator"),
    }
}

/// Of a range or multirange; its bounds rise.
fn range(name: &str, random: &mut Random) -> Option<String> {
    let of = name.strip_suffix("range")?;
    let bound: fn(i64) -> String = match of.trim_end_matches("multi") {
        "int4" | "int8" => |at| at.to_string(),
        "num" => |at| format!("{}.{:03}", at / 1_000, at.abs() % 1_000),
        "date" => |at| {
            format!(
                "{:04}-{:02}-{:02}",
                1_800 + at / 400,
                1 + at / 28 % 12,
                1 + at % 28
            )
        },
        "ts" => |at| {
            format!(
                "\"{:04}-01-01 {:02}:{:02}:00\"",
                1_000 + at / 1_440,
                at / 60 % 24,
                at % 60
            )
        },
        "tstz" => |at| {
            format!(
                "\"{:04}-01-01 {:02}:{:02}:00+00\"",
                1_000 + at / 1_440,
                at / 60 % 24,
                at % 60
            )
        },
        _ => return None,
    };
    let one = |random: &mut Random, from: i64| {
        // 400 is above the length of the units in each form, so a later bound is never an earlier value.
        let at = from + 1_440 * (1 + i64::try_from(random.below(100)).expect("small"));
        let end = at + 1_440 * (1 + i64::try_from(random.below(100)).expect("small"));
        let open = pick(random, &["[", "("]);
        let close = pick(random, &["]", ")"]);
        (format!("{open}{},{}{close}", bound(at), bound(end)), end)
    };
    if !name.contains("multi") {
        return Some(match random.below(6) {
            0 => "empty".to_owned(),
            1 => format!("[{},)", bound(5_000)),
            2 => format!("(,{}]", bound(7_000)),
            _ => one(random, 0).0,
        });
    }
    let (mut ranges, mut from) = (Vec::new(), 0);
    for _ in 0..random.below(4) {
        let (range, end) = one(random, from);
        ranges.push(range);
        from = end;
    }
    Some(format!("{{{}}}", ranges.join(",")))
}

fn json(random: &mut Random, depth: usize) -> String {
    let string = |random: &mut Random| serde_json::Value::from(text(random, 10)).to_string();
    match random.below(if depth == 0 { 4 } else { 6 }) {
        0 => pick(random, &["null", "true", "false"]),
        1 => small(random),
        2 => format!(
            "{}.{}e{}",
            sized(random, 40),
            digits(random),
            random.below(30)
        ),
        3 => string(random),
        4 => {
            let items: Vec<String> = (0..random.below(4))
                .map(|_| json(random, depth - 1))
                .collect();
            format!("[ {}\n]", items.join(" ,\t"))
        }
        _ => {
            let items = (0..random.below(4))
                .map(|_| format!("{} :  {}", string(random), json(random, depth - 1)));
            format!("{{ {} }}", items.collect::<Vec<_>>().join(","))
        }
    }
}

fn tsvector(random: &mut Random) -> String {
    let words = (0..random.below(5)).map(|_| {
        let weight = pick(random, &["", "A", "C"]);
        format!(
            "'{} {}':{}{weight}",
            word(random),
            word(random),
            1 + random.below(99)
        )
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Up to so many characters, none of them NUL.
fn text(random: &mut Random, longest: usize) -> String {
    let mut text = String::new();
    for _ in 0..random.below(longest + 1) {
        let character = match random.below(4) {
            0 => u32::try_from(1 + random.below(127)).ok(),
            1 => u32::try_from(128 + random.below(0x2000)).ok(),
            2 => u32::try_from(0x1_0000 + random.below(0x1_0000)).ok(),
            _ => {
                text.push_str(WORDS[random.below(WORDS.len())]);
                None
            }
        };
        text.extend(character.and_then(char::from_u32));
    }
    text.chars().take(longest).collect()
}

/// A few letters.
fn word(random: &mut Random) -> String {
    let letter =
        |random: &mut Random| char::from(b'a' + u8::try_from(random.below(26)).expect("a letter"));
    (0..=random.below(8)).map(|_| letter(random)).collect()
}

fn pick(random: &mut Random, of: &[&str]) -> String {
    of[random.below(of.len())].to_owned()
}

fn small(random: &mut Random) -> String {
    random.below(1_000).to_string()
}

fn digits(random: &mut Random) -> String {
    (0..=random.below(20))
        .map(|_| small(random).pop().expect("a digit"))
        .collect()
}

/// Of any size that so many bits hold.
fn sized(random: &mut Random, bits: u32) -> i64 {
    let shift = 64 - bits + u32::try_from(random.below(bits as usize)).expect("small");
    i64::from_be_bytes(array(random)) >> shift
}

fn float4(random: &mut Random) -> String {
    if random.below(10) == 0 {
        return pick(random, &["NaN", "Infinity", "-Infinity", "-0", "0.1"]);
    }
    let value = f32::from_bits(u32::from_be_bytes(array(random)));
    if value.is_normal() {
        format!("{value:e}")
    } else {
        "3.4e38".to_owned()
    }
}

fn float8(random: &mut Random) -> String {
    match random.below(10) {
        0 => pick(random, &["-0", "0.1", "0.30000000000000004", "1e300"]),
        1 => small(random),
        _ => {
            // Products of coordinates must not overflow.
            let value = f64::from_bits(u64::from_be_bytes(array(random)));
            let value = if value.is_normal() { value } else { 0.1 };
            let small = value.abs().log10().abs() < 100.0;
            if small {
                format!("{value:e}")
            } else {
                format!("{}e-9", sized(random, 60))
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from_digit(u32::from(half), 16).expect("below 16");
    let pair = |byte: &u8| [digit(byte >> 4), digit(byte & 15)];
    bytes.iter().flat_map(pair).collect()
}

fn array<const N: usize>(random: &mut Random) -> [u8; N] {
    random.bytes(N).try_into().expect("so many bytes")
}
