//! What processes have used of the processor, from `/proc`. Steps of 10 ms: of use for what takes seconds.

/// Ticks a second of `/proc/PID/stat`; a constant of Linux' interface on the systems walpost is built for.
const TICKS_PER_SECOND: f64 = 100.0;

/// User and system time of a process so far; panics when it has ended.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    let stat = Stat::read(pid).expect("it runs");
    stat.own_ticks as f64 / TICKS_PER_SECOND
}

/// The same of a process, of its children, and of those children that have ended: a whole Postgres server.
pub(crate) fn cpu_seconds_of_all(pid: u32) -> f64 {
    let server = Stat::read(pid).expect("it runs");
    let mut ticks = server.own_ticks + server.ended_children_ticks;
    for entry in std::fs::read_dir("/proc")
        .expect("/proc is there")
        .flatten()
    {
        let child = entry.file_name().to_string_lossy().parse().ok();
        // One that ends between the two looks is missed; there is none at the moments that count.
        if let Some(stat) = child.and_then(Stat::read).filter(|stat| stat.parent == pid) {
            ticks += stat.own_ticks + stat.ended_children_ticks;
        }
    }
    ticks as f64 / TICKS_PER_SECOND
}

struct Stat {
    parent: u32,
    own_ticks: u64,
    ended_children_ticks: u64,
}

impl Stat {
    /// `None` when there is no such process.
    fn read(pid: u32) -> Option<Self> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is a name in parentheses, which may hold anything; the third follows it.
        let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self {
            parent: u32::try_from(number(4)?).ok()?,
            own_ticks: number(14)? + number(15)?,
            ended_children_ticks: number(16)? + number(17)?,
        })
    }
}
