use proptest::prelude::*;

use super::*;

/// Renders `template`, all of whose placeholders have the values in `values`.
fn rendered(template: &str, values: &[&str]) -> Result<String, (usize, Problem)> {
    let template = TopicTemplate::parse(template).expect("a valid template");
    let mut out = "a topic of the row before".to_owned();
    let result = template.render_into(&mut out, |n, out| {
        out.push_str(values[n]);
        Ok(())
    });
    if result.is_err() {
        assert_eq!(out, "", "an error leaves no topic behind");
    }
    result.map(|()| out)
}

fn own(topic: &str) -> Result<String, Problem> {
    let mut out = "a topic of the row before".to_owned();
    let result = own_topic_into(topic, &mut out);
    if result.is_err() {
        assert_eq!(out, "", "an error leaves no topic behind");
    }
    result.map(|()| out)
}

#[test]
fn values_are_put_in_place() {
    for (template, values, topic) in [
        (
            "persistent://public/default/outbox.{aggregatetype}",
            &["order"][..],
            "persistent://public/default/outbox.order",
        ),
        (
            "persistent://{tenant}/{ns}/a{b}c{d}",
            &["t-1", "n=2", "x:y", "0_.Z"],
            "persistent://t-1/n=2/ax:yc0_.Z",
        ),
        ("{type}", &["t"], "persistent://public/default/t"),
        ("a/b/{type}", &["t"], "persistent://a/b/t"),
        ("fixed", &[], "persistent://public/default/fixed"),
        ("{odd/column name}", &["v"], "persistent://public/default/v"),
        ("{a}{a}", &["v", "v"], "persistent://public/default/vv"),
        (
            "{a}",
            &[r"App\Models\Order"],
            r"persistent://public/default/App\Models\Order",
        ),
        (
            "{a}.{b}",
            &["com.x.Order$Item", "a b+c"],
            "persistent://public/default/com.x.Order$Item.a b+c",
        ),
        (
            "été {a}{b}!",
            &["größe", "%2F?#\n\u{1F600}"],
            "persistent://public/default/été größe%2F?#\n\u{1F600}!",
        ),
        ("{a}", &[" {b}"], "persistent://public/default/ {b}"),
        ("{a}x", &["v "], "persistent://public/default/v x"),
        (
            "{a}",
            &["v-partition-²"],
            "persistent://public/default/v-partition-²",
        ),
        ("{a}..", &["..."], "persistent://public/default/....."),
        (
            "x{a}-partition-3",
            &["v"],
            "persistent://public/default/xv-partition-3",
        ),
        (
            "{a}",
            &["v-partition-"],
            "persistent://public/default/v-partition-",
        ),
        (
            "{a}",
            &["v-partition-3x"],
            "persistent://public/default/v-partition-3x",
        ),
        (
            "fixed-partition-3",
            &[],
            "persistent://public/default/fixed-partition-3",
        ),
    ] {
        assert_eq!(
            rendered(template, values).as_deref(),
            Ok(topic),
            "{template}"
        );
    }
}

#[test]
fn a_value_that_cannot_stand_in_a_topic_name_is_an_error() {
    let character = |character, offset| Problem::TopicCharacter { character, offset };
    let namespace = |character, offset| Problem::NamespaceCharacter { character, offset };
    for (template, values, at, problem) in [
        ("t.{a}", &[""][..], 0, Problem::TopicEmpty),
        ("{a}.{b}", &["ok", "x/y"], 1, character('/', 1)),
        ("{a}", &["a\0b"], 0, character('\0', 1)),
        ("{a}/n/x", &["größe"], 0, namespace('ö', 2)),
        ("t/n{a}/{b}", &["a b", "a b"], 0, namespace(' ', 1)),
        ("t/{a}/{b}", &["n/x", "y"], 0, character('/', 1)),
        ("{a}", &["v "], 0, Problem::TopicBlankEnd),
        ("{a}{b}", &["v", "\n"], 1, Problem::TopicBlankEnd),
        ("{a}", &["v-partition-\u{663}"], 0, Problem::TopicPartition),
        ("{a}", &["v-partition-07"], 0, Problem::TopicPartition),
        ("{a}", &["."], 0, Problem::TopicDots),
        ("{a}.", &["."], 0, Problem::TopicDots),
        ("persistent://t/{a}/x", &[".."], 0, Problem::TopicDots),
        ("{a}", &["v-partition-3"], 0, Problem::TopicPartition),
        ("{a}-partition-{b}", &["v", "0"], 1, Problem::TopicPartition),
        ("{a}-7", &["v-partition"], 0, Problem::TopicPartition),
        ("{a}7", &["v-partition-"], 0, Problem::TopicPartition),
    ] {
        assert_eq!(
            rendered(template, values),
            Err((at, problem)),
            "{template} {values:?}"
        );
    }
}

#[test]
fn the_namespace_is_known_unless_a_row_decides() {
    for (template, namespace) in [
        ("{type}", "public/default"),
        ("a/b/{type}", "a/b"),
        ("persistent://t/n/x.{a}.{b}", "t/n"),
        ("persistent://t/n/fixed", "t/n"),
    ] {
        let template = TopicTemplate::parse(template).expect("valid");
        assert_eq!(template.namespace(), Ok(namespace.to_owned()));
    }
    for (template, columns) in [
        ("persistent://{a}/n/{c}", &["a"][..]),
        ("persistent://t/x{b}/{c}", &["b"]),
        ("{a}/{b}/{c}", &["a", "b"]),
    ] {
        let template = TopicTemplate::parse(template).expect("valid");
        assert_eq!(template.namespace(), Err(columns.to_vec()));
    }
}

#[test]
fn an_error_of_the_value_itself_is_passed_on() {
    let template = TopicTemplate::parse("{a}{b}").expect("valid");
    let mut out = String::new();
    let result = template.render_into(&mut out, |n, out| {
        out.push('v');
        if n == 1 { Err(Problem::Null) } else { Ok(()) }
    });
    assert_eq!(result, Err((1, Problem::Null)));
    assert_eq!(out, "");
}

#[test]
fn templates_of_no_use_are_refused_and_told_what_is_allowed() {
    for template in [
        "",
        "persistent://",
        "persistent://a",
        "persistent://a/b",
        "persistent://a/b/",
        "persistent:///b/c",
        "persistent://a//c",
        "persistent://a/b/c/d",
        "kafka://a/b/c",
        "{scheme}://a/b/c",
        "a/b",
        "/",
        "a b ",
        "t ö/n/x",
        "non-persistent://a/b/c",
        "non-persistent://a/b/{c}",
        "a{b",
        "a}b",
        "{}",
        "{a{b}}",
        "{{a}}",
        "..",
        "..-partition-3",
        "persistent://./b/c",
    ] {
        let error = TopicTemplate::parse(template).expect_err(template);
        assert!(error.contains("allowed are persistent://"), "{error}");
    }
    for (template, why) in [
        (
            "a b/n/x",
            "has ' ' at byte 1, which cannot stand in the name of a tenant or a namespace; allowed",
        ),
        (
            "non-persistent://a/b/c",
            "names a non-persistent topic, whose messages Pulsar drops under load and does not store; allowed",
        ),
    ] {
        let error = TopicTemplate::parse(template).expect_err(template);
        let start = format!("the topic template {template:?} {why}");
        assert!(error.starts_with(&start), "{error}");
    }
}

#[test]
fn columns_used_are_those_of_the_table() {
    let template = TopicTemplate::parse("{aggregatetype}.{region}").expect("valid");
    assert!(template.placeholders().eq(["aggregatetype", "region"]));
    let columns = Columns {
        aggregatetype: "kind".to_owned(),
        ..Columns::default()
    };
    assert!(template.columns_used(&columns).eq(["kind", "region"]));
}

#[test]
fn a_rows_own_topic_is_full_or_short() {
    for (topic, full) in [
        ("orders", "persistent://public/default/orders"),
        ("a/b/c", "persistent://a/b/c"),
        ("persistent://a/b/c", "persistent://a/b/c"),
        ("a/b/c d+é", "persistent://a/b/c d+é"),
        (
            r"App\Models\Order",
            r"persistent://public/default/App\Models\Order",
        ),
        (
            "non-persistent:",
            "persistent://public/default/non-persistent:",
        ),
    ] {
        assert_eq!(own(topic).as_deref(), Ok(full));
    }
    for (topic, problem) in [
        ("", Problem::TopicEmpty),
        ("a/b", Problem::TopicShape),
        ("a/b/", Problem::TopicShape),
        ("a/b/c/d", Problem::TopicShape),
        ("http://a/b/c", Problem::TopicShape),
        ("persistent://a/b", Problem::TopicShape),
        ("persistent://a/b/c/d", Problem::TopicShape),
        ("x-partition-12", Problem::TopicPartition),
        ("persistent://a/b/..", Problem::TopicDots),
        ("non-persistent://a/b/c", Problem::TopicNotPersistent),
        ("a/b/c ", Problem::TopicBlankEnd),
        ("x-partition-\u{ff11}", Problem::TopicPartition),
        (
            "a/b c/d",
            Problem::NamespaceCharacter {
                character: ' ',
                offset: 1,
            },
        ),
    ] {
        assert_eq!(own(topic), Err(problem), "{topic:?}");
    }
}

/// The digits of these tests' names, ASCII and others, as `Character.digit` of Java reads them.
const DIGITS: &str = "0123456789\u{660}\u{663}\u{967}\u{ff10}";

/// What a full topic name is that broker and clients take for one topic, said a second time and without the code under test.
fn is_full_name(topic: &str) -> bool {
    let Some((domain, path)) = topic.split_once("://") else {
        return false;
    };
    let pieces: Vec<&str> = path.split('/').collect();
    let named_entity = |piece: &&str| {
        let mut characters = piece.chars();
        characters.all(|c| c.is_ascii_alphanumeric() || "-=:._".contains(c))
    };
    domain == "persistent"
        && pieces.len() == 3
        && pieces[..2].iter().all(named_entity)
        && !pieces.iter().any(|piece| matches!(*piece, "" | "." | ".."))
        && !topic.contains('\0')
        && !topic.ends_with(|c: char| c <= ' ')
}

fn ends_like_a_partition(topic: &str) -> bool {
    topic
        .rsplit_once("-partition-")
        .is_some_and(|(_, digits)| !digits.is_empty() && digits.chars().all(|c| DIGITS.contains(c)))
}

fn name_part() -> impl Strategy<Value = String> {
    prop_oneof![
        "[aA.+ %é2FfcCE]{1,3}",
        "a(%2[Bb]|\\+|%20| )b",
        "é|e\u{301}|É"
    ]
}

proptest! {
    #[test]
    fn a_rendered_topic_is_valid_and_holds_the_values(
        values in proptest::collection::vec(
            prop_oneof!["[-=:.a-zA-Z0-9_]{0,8}", "-?partition-?[0-9\u{660}\u{663}]*", "[ -~é\n]{0,4}", "[/\\\\ .]{0,3}"], 2)
    ) {
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        match rendered("persistent://t/n/a.{x}{y}", &values) {
            Ok(topic) => {
                prop_assert!(is_full_name(&topic) && !ends_like_a_partition(&topic), "{topic}");
                prop_assert_eq!(topic, format!("persistent://t/n/a.{}{}", values[0], values[1]));
            }
            Err((at, _)) => {
                let topic = format!("persistent://t/n/a.{}{}", values[0], values[1]);
                let empty = values[at].is_empty();
                prop_assert!(empty || !is_full_name(&topic) || ends_like_a_partition(&topic), "{topic}");
            }
        }
    }

    #[test]
    fn two_values_never_give_one_topic(a in name_part(), b in name_part()) {
        for template in ["{v}", "persistent://t/n/a.{v}.b", "persistent://t/{v}/c"] {
            if let (Ok(one), Ok(other)) = (rendered(template, &[&a]), rendered(template, &[&b])) {
                prop_assert_eq!(one == other, a == b, "{}", one);
            }
        }
    }

    #[test]
    fn an_own_topic_is_valid_or_refused(
        topic in prop_oneof!["[ -~é\n]*", "((non-)?persistent://)?[-=:./a-z0-9_]{0,20}(-partition-[0-9\u{ff10}]{0,2})?"]
    ) {
        let full = match topic.matches('/').count() {
            0 => format!("persistent://public/default/{topic}"),
            2 => format!("persistent://{topic}"),
            _ => topic.clone(),
        };
        let is_one = is_full_name(&full) && !ends_like_a_partition(&full);
        prop_assert_eq!(own(&topic).ok(), is_one.then_some(full));
    }

    #[test]
    fn no_template_panics_and_a_valid_one_renders(template in "[-a-z:/{}. ]{0,30}") {
        if let Ok(parsed) = TopicTemplate::parse(&template) {
            let mut out = String::new();
            let result = parsed.render_into(&mut out, |_, out| { out.push('v'); Ok(()) });
            prop_assert_eq!(result, Ok(()));
            prop_assert!(is_full_name(&out), "{out}");
        }
    }
}
