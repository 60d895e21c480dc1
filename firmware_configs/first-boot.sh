#!/bin/sh
# Make this board a flowspec node that starts at every boot. Run as root; safe to run again.
#
#   first-boot.sh [KEY | FILE]
#
# The cluster key of another board (flowspec key show), or a file with it. Without one this board is the first: it makes a
# key, and
#   sudo journalctl -u flowspec-node
# shows the line to run on the others. FLOWSPEC_WHEELS names a directory with wheels (for boards without internet);
# where there is none, FLOWSPEC_PACKAGE says what pip installs. FLOWSPEC_PYTHON is a Python to prefer.
set -eu

key="${1:-}"
[ ! -f "$key" ] || key="$(cat "$key")"
home=/opt/flowspec
state=/var/lib/flowspec
wheels="${FLOWSPEC_WHEELS:-}"
package="${FLOWSPEC_PACKAGE:-flowspec-edge}"
here="$(cd "$(dirname "$0")" && pwd)"

fail() {
    echo "first-boot.sh: $*" >&2
    exit 1
}

[ "$(id -u)" = 0 ] || fail "needs root; run it with sudo"
if [ -z "$wheels" ]; then # what was copied to the card's boot partition, which any computer can write
    for directory in /boot/firmware/flowspec /boot/flowspec "$here/wheels"; do
        if ls "$directory"/flowspec_edge-*.whl >/dev/null 2>&1; then
            wheels="$directory"
            break
        fi
    done
fi

python=""
for candidate in "${FLOWSPEC_PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
    fi
done
[ -n "$python" ] || fail "needs Python 3.11 or newer, installed for all users; say where with FLOWSPEC_PYTHON=/path/to/python3"

id flowspec >/dev/null 2>&1 ||
    useradd --system --user-group --home-dir "$state" --no-create-home --shell /usr/sbin/nologin flowspec
install -d -o flowspec -g flowspec -m 0700 "$state"

[ -x "$home/bin/python" ] || "$python" -m venv "$home" ||
    fail "cannot make a virtual environment in $home; install the package python3-venv and run this again"
runuser -u flowspec -- "$home/bin/python" -c "" ||
    fail "the user flowspec may not run $python; install Python for all users, remove $home, and run this again"
if [ -n "$wheels" ]; then
    "$home/bin/pip" install --quiet --no-index --find-links "$wheels" --upgrade flowspec-edge
else
    attempt=1
    until "$home/bin/pip" install --quiet --upgrade "$package"; do # the network may be later than we are
        [ "$attempt" -lt 5 ] || fail "pip cannot install $package; is there internet? Without: see FLOWSPEC_WHEELS above"
        sleep $((attempt * 5))
        attempt=$((attempt + 1))
    done
fi

if [ -n "$key" ]; then # by way of standard input: arguments can be seen by every user of the board
    printf '%s\n' "$key" | FLOWSPEC_HOME="$state" "$home/bin/flowspec" key set - >/dev/null
    chown flowspec:flowspec "$state"/*
fi

unit=/etc/systemd/system/flowspec-node.service
if [ -f "$here/systemd/flowspec-node.service" ]; then
    install -m 0644 "$here/systemd/flowspec-node.service" "$unit"
fi
[ -f "$unit" ] || fail "$unit is missing; copy it from firmware_configs/systemd"
systemctl daemon-reload
systemctl enable --now flowspec-node.service
