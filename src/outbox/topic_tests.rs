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
            "non-persistent://{tenant}/{ns}/a{b}c{d}",
            &["t-1", "n=2", "x:y", "0_.Z"],
            "non-persistent://t-1/n=2/ax:yc0_.Z",
        ),
        ("{type}", &["t"], "persistent://public/default/t"),
        ("a/b/{type}", &["t"], "persistent://a/b/t"),
        ("fixed", &[], "persistent://public/default/fixed"),
        ("{odd/column name}", &["v"], "persistent://public/default/v"),
        ("{a}{a}", &["v", "v"], "persistent://public/default/vv"),
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
    for (template, values, at, problem) in [
        ("t.{a}", &[""][..], 0, Problem::TopicEmpty),
        ("{a}.{b}", &["ok", "x/y"], 1, character('/', 1)),
        ("{a}", &["größe"], 0, character('ö', 2)),
        ("{a}", &["a b"], 0, character(' ', 1)),
        ("{a}", &["a\0"], 0, character('\0', 1)),
        ("{a}", &["%2f"], 0, character('%', 0)),
        ("{a}", &["{b}"], 0, character('{', 0)),
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
    for (template, domain, namespace) in [
        ("{type}", "persistent", "public/default"),
        ("a/b/{type}", "persistent", "a/b"),
        ("non-persistent://t/n/x.{a}.{b}", "non-persistent", "t/n"),
        ("persistent://t/n/fixed", "persistent", "t/n"),
    ] {
        let template = TopicTemplate::parse(template).expect("valid");
        assert_eq!(template.namespace(), Ok((domain, namespace.to_owned())));
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
        "a b",
        "tópico",
        "a{b",
        "a}b",
        "{}",
        "{a{b}}",
        "{{a}}",
        "..",
        "persistent://./b/c",
    ] {
        let error = TopicTemplate::parse(template).expect_err(template);
        assert!(error.contains("allowed are persistent://"), "{error}");
    }
    let error = TopicTemplate::parse("a b").expect_err("a space");
    assert!(
        error.starts_with(
            "the topic template \"a b\" has ' ' at byte 1, which cannot stand in a topic name; allowed"
        ),
        "{error}"
    );
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
        ("non-persistent://a/b/c", "non-persistent://a/b/c"),
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
        (
            "a/b/c d",
            Problem::TopicCharacter {
                character: ' ',
                offset: 1,
            },
        ),
    ] {
        assert_eq!(own(topic), Err(problem), "{topic:?}");
    }
}

/// What a full topic name is, said a second time and without the code under test.
fn is_full_name(topic: &str) -> bool {
    let Some((domain, path)) = topic.split_once("://") else {
        return false;
    };
    let pieces: Vec<&str> = path.split('/').collect();
    matches!(domain, "persistent" | "non-persistent")
        && pieces.len() == 3
        && pieces.iter().all(|piece| {
            !matches!(*piece, "" | "." | "..")
                && piece
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-=:._".contains(c))
        })
}

fn ends_like_a_partition(topic: &str) -> bool {
    topic
        .rsplit_once("-partition-")
        .is_some_and(|(_, digits)| !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit()))
}

proptest! {
    #[test]
    fn a_rendered_topic_is_valid_and_holds_the_values(
        values in proptest::collection::vec(prop_oneof!["[-=:.a-zA-Z0-9_]{0,8}", "-?partition-?[0-9]*", ".{0,4}"], 2)
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
    fn an_own_topic_is_valid_or_refused(
        topic in prop_oneof![".*", "((non-)?persistent://)?[-=:./a-z0-9_]{0,20}(-partition-[0-9]{0,2})?"]
    ) {
        if let Ok(full) = own(&topic) {
            prop_assert!(is_full_name(&full) && !ends_like_a_partition(&full), "{full}");
            prop_assert!(full.ends_with(&topic));
        }
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
