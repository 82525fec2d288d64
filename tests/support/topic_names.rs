//! Names of topics, well and ill.

/// Every text of up to three pieces that matter to the rule of what can be a topic's name.
pub(crate) fn topic_names() -> Vec<String> {
    const PIECES: [&str; 14] = [
        "a",
        ".",
        " ",
        "/",
        "\n",
        "-partition-",
        "07",
        "\u{663}",
        "\u{ff19}",
        "\u{b2}",
        "\\Order$+%2F",
        "é",
        "non-",
        "persistent://",
    ];
    let mut names = vec![String::new()];
    let mut longest = names.clone();
    for _ in 0..3 {
        longest = longest
            .iter()
            .flat_map(|name| PIECES.map(|piece| format!("{name}{piece}")))
            .collect();
        names.extend(longest.iter().cloned());
    }
    names
}
