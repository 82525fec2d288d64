//! What this process takes of the machine, from `/proc`; names and meanings are those of Prometheus' client libraries.

/// Figures of this process. `None`: `/proc` is not there, or not as expected.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Process {
    pub(super) cpu_seconds: f64,
    pub(super) resident_bytes: u64,
    pub(super) virtual_bytes: u64,
    pub(super) open_fds: Option<u64>,
}

/// As it is now.
pub(super) fn read() -> Option<Process> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let open_fds = std::fs::read_dir("/proc/self/fd").ok();
    Some(Process {
        // The listing holds one open itself.
        open_fds: open_fds.map(|entries| (entries.count() as u64).saturating_sub(1)),
        ..parse(
            &stat,
            rustix::param::clock_ticks_per_second() as f64,
            rustix::param::page_size() as u64,
        )?
    })
}

/// Reads `/proc/<pid>/stat` (proc(5)). The program's name, in parentheses, may hold anything; fields count from behind it.
fn parse(stat: &str, ticks_per_second: f64, page_bytes: u64) -> Option<Process> {
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
    let number = |place: usize| fields.get(place)?.parse::<u64>().ok();
    // Fields 14 and 15 (user and system time), 23 (virtual bytes), 24 (resident pages); the first one here is number 3.
    Some(Process {
        cpu_seconds: (number(11)? + number(12)?) as f64 / ticks_per_second,
        virtual_bytes: number(20)?,
        resident_bytes: number(21)? * page_bytes,
        open_fds: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_blanks_and_parentheses_moves_no_field() {
        let stat = "7 (a) 1 (b) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 2 0 99 8192 3 18446744073709551615";
        let read = parse(stat, 100.0, 4096).unwrap();
        assert!((read.cpu_seconds - 2.0).abs() < 1e-9);
        assert_eq!((read.virtual_bytes, read.resident_bytes), (8192, 12288));
        assert!(parse("nonsense", 100.0, 4096).is_none());
    }

    #[test]
    fn this_process_has_memory_and_files() {
        let read = read().unwrap();
        assert!(read.resident_bytes > 1 << 20 && read.open_fds.is_some_and(|count| count > 2));
    }
}
