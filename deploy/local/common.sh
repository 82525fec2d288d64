# shellcheck shell=bash
# Shared by up, down, python and demo: where the local servers live, how they are named, checked and spoken to.
#
# Everything is in one folder, WALPOST_LOCAL_DIR (default: <tmp>/walpost-local-<uid>):
#   lock                       held by the one `up` or `down` at work
#   env, env.pg18, …           what the tests source: URLs, ports, pids, folders
#   password                   of the superuser `postgres`, over TCP
#   pg15/, pg18/, …            one Postgres each: port, data/, socket/, log
#   dist/                      what was fetched and unpacked (Pulsar, other Postgres majors, the Python environment)
#   pulsar/                    ports, pid, standalone.conf, data/, log
# A server is ours only if its recorded pid is alive AND its command line names our folder; nothing else is ever signalled.

# shellcheck disable=SC2034 # used by those that source this
PULSAR_VERSION=4.0.8
DEBIAN_MAJOR=15
# The account that owns the servers when root starts them: Postgres refuses to run as root, and Pulsar has no need to.
SERVICE_USER=postgres
# Goes before a command that is to run as that account.
# shellcheck disable=SC2034 # the same
AS_SERVICE=(env)
if [ "$(id -u)" = 0 ]; then AS_SERVICE=(setpriv --reuid="$SERVICE_USER" --regid="$SERVICE_USER" --clear-groups); fi

say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }
warn() { printf '[%4ds] %s\n' "$SECONDS" "$*" >&2; }
die() {
    warn "error: $*"
    exit 1
}

# open_dir create|look: makes the folder or only looks for it (1 = none), checks that it is ours, sets $DIR.
open_dir() {
    local me
    me=$(id -u)
    DIR=${WALPOST_LOCAL_DIR:-${TMPDIR:-/tmp}/walpost-local-$me}
    case $DIR in
    /*) ;;
    *) DIR=$PWD/$DIR ;;
    esac
    DIR=${DIR%/}
    # Pulsar's own start script splits its arguments at blanks, and the path stands in URLs.
    [[ $DIR =~ ^[A-Za-z0-9/._+-]+$ ]] || die "WALPOST_LOCAL_DIR is '$DIR': only letters, digits and / . _ + - are allowed"
    # 107 bytes is the kernel's limit for the path of a Unix socket.
    ((${#DIR} <= 75)) || die "WALPOST_LOCAL_DIR is '$DIR': at most 75 characters, or Postgres' socket path gets too long"
    # In /tmp anybody may have made the folder first: look at what it is before trusting anything in it.
    if [ ! -e "$DIR" ] && [ ! -L "$DIR" ]; then
        [ "$1" = create ] || return 1
        mkdir -p "$(dirname "$DIR")"
        mkdir -m 0711 "$DIR"
    fi
    [ ! -L "$DIR" ] || die "$DIR is a symbolic link; remove it or set WALPOST_LOCAL_DIR to another folder"
    [ -d "$DIR" ] || die "$DIR is not a folder; set WALPOST_LOCAL_DIR to another one"
    [ "$(stat -c %u "$DIR")" = "$me" ] || die "$DIR belongs to $(stat -c %U "$DIR"), not to you; set WALPOST_LOCAL_DIR to another folder"
    chmod 0711 "$DIR"
}

# One `up` or `down` at a time; the lock goes with the process, however it ends.
take_lock() {
    command -v flock >/dev/null || die "flock is missing: apt-get install -y util-linux"
    exec 9>"$DIR/lock"
    if ! flock -n 9; then
        say "waiting for another up or down in $DIR"
        flock -w 900 9 || die "another up or down has held $DIR/lock for 15 minutes"
    fi
}

# Gives files made here to the account that uses them.
give_to_service() {
    if [ "$(id -u)" = 0 ]; then chown -R "$SERVICE_USER:$SERVICE_USER" "$@"; fi
}

# is_process PID TEXT: alive, and TEXT is in its command line (pids are reused; the text is a path in our folder).
is_process() {
    [[ $1 =~ ^[0-9]+$ ]] && [ -r "/proc/$1/cmdline" ] && grep -qF -- "$2" "/proc/$1/cmdline" 2>/dev/null
}

postgres_pid() { # FOLDER: prints the postmaster's pid if it lives
    local pid=
    [ -r "$1/data/postmaster.pid" ] && read -r pid <"$1/data/postmaster.pid"
    is_process "$pid" "$1/data" && printf '%s\n' "$pid"
}

pulsar_pid() { # prints Pulsar's pid if it lives
    local pid=
    [ -r "$DIR/pulsar/pid" ] && read -r pid <"$DIR/pulsar/pid"
    is_process "$pid" "$DIR/pulsar/standalone.conf" && printf '%s\n' "$pid"
}

# True when something listens on the TCP port, on any address.
port_taken() {
    local hex
    hex=$(printf ':%04X' "$1")
    awk -v port="$hex" '$4 == "0A" && substr($2, length($2) - 4) == port { found = 1 } END { exit !found }' \
        /proc/net/tcp /proc/net/tcp6 2>/dev/null
}

# Prints a port nobody listens on, below the range the kernel takes for outgoing connections (32768 and up).
free_port() {
    local port try
    for ((try = 0; try < 200; try++)); do
        port=$((20000 + (RANDOM * 32768 + RANDOM) % 12000))
        port_taken "$port" || {
            printf '%s\n' "$port"
            return
        }
    done
    die "found no free TCP port between 20000 and 32000"
}

# http_status PORT PATH SECONDS: prints the status code of a GET on loopback, nothing when there is no answer.
# By the shell itself, so that curl need not be installed.
http_status() {
    local line=
    (
        exec 2>/dev/null 3<>"/dev/tcp/127.0.0.1/$1" || exit 0
        {
            printf 'GET %s HTTP/1.0\r\nHost: 127.0.0.1\r\nConnection: close\r\n' "$2"
            pulsar_authorization
            printf '\r\n'
        } >&3
        IFS= read -r -t "$3" line <&3 || exit 0
        line=${line#HTTP/* }
        printf '%s\n' "${line%% *}"
    ) || true
}

# Prints the header line that a Pulsar with authentication wants to see: with the token by which the broker calls itself.
pulsar_authorization() {
    local token
    token=$(sed -n 's/^brokerClientAuthenticationParameters=token://p' "$DIR/pulsar/standalone.conf" 2>/dev/null | tail -n 1)
    if [ -n "$token" ]; then printf 'Authorization: Bearer %s\r\n' "$token"; fi
}

pulsar_answers() { # SECONDS
    [ "$(http_status "$(cat "$DIR/pulsar/web_port")" /admin/v2/brokers/health "$1")" = 200 ]
}

postgres_answers() { # FOLDER
    "/usr/lib/postgresql/$DEBIAN_MAJOR/bin/pg_isready" -q -t 3 -h 127.0.0.1 -p "$(cat "$1/port")" 9>&-
}

show_log() { # FILE
    warn "the end of $1:"
    tail -n 30 "$1" >&2 || true
}

# apt_update LOG PACKAGE…: begins an installation of these: is it possible, and what is there?
apt_update() {
    local log=$1
    shift
    command -v apt-get >/dev/null || die "missing, and no apt-get here (made for Debian 12): $*"
    if [ "$(id -u)" != 0 ]; then
        die "something is missing; run this as root, then try again:
    apt-get update && apt-get install -y --no-install-recommends $*"
    fi
    say "installing Debian packages: $*"
    apt_get update >"$log" 2>&1 || {
        show_log "$log"
        die "apt-get update failed"
    }
}

apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 "$@" 9>&-; }

apt_install() { # LOG PACKAGE…
    local log=$1
    shift
    apt_get install -y --no-install-recommends "$@" >>"$log" 2>&1 || {
        show_log "$log"
        die "apt-get install failed: $*"
    }
}

pulsar_has_namespace() {
    [ "$(http_status "$(cat "$DIR/pulsar/web_port")" /admin/v2/namespaces/public/default 10)" = 200 ]
}

# need_cargo: cargo on PATH, also when only rustup's own folder has it.
need_cargo() {
    command -v cargo >/dev/null || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    command -v cargo >/dev/null || die "cargo is missing: install Rust with rustup (https://rustup.rs), open a new shell, try again"
}

# in_group COMMAND…: runs it in a process group of its own and returns its exit code. Only this way a signal that this
# shell gets reaches the command's children too, and is acted on now and not when the command has ended.
GROUP=
in_group() {
    local code=0
    set -m
    "$@" &
    GROUP=$!
    set +m
    wait "$GROUP" || code=$?
    GROUP=
    return "$code"
}

# pass_on SIGNAL: to the command that in_group runs, and waits for its end.
pass_on() {
    if [ -n "$GROUP" ]; then
        kill "-$1" -- "-$GROUP" 2>/dev/null || true
        wait "$GROUP" 2>/dev/null || true
    fi
}
