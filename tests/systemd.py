"""A machine on this machine, with systemd as its first process and this Python in /opt, in namespaces of its own.

Needs root, systemd and a kernel with overlayfs and cgroup2. Its files are those of this machine, under a layer in
memory: what is written there is gone in the end. It has no network but loopback.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
INIT = "/lib/systemd/systemd"
BOOT_S, COMMAND_S = 30, 60
SETUP = """
set -e
mount --make-rprivate /
mount -t overlay overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys  # this kernel's settings are not the guest's
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for directory in run tmp; do mount -t tmpfs tmpfs $directory; done
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom tty; do touch dev/$device; mount --bind /dev/$device dev/$device; done
mkdir dev/shm dev/pts
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
touch dev/console
mount --bind "$1/console" dev/console
mkdir -p opt/flowspec/bin opt/flowspec/python opt/flowspec/packages opt/flowspec/source
mount --bind "$2" opt/flowspec/python
mount --bind "$3" opt/flowspec/packages
mount --bind "$4" opt/flowspec/source
ip link set lo up
mkdir mnt/outside
pivot_root . mnt/outside
exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . sh -c \
    'umount --lazy /mnt/outside; exec {init} --unit=basic.target --show-status=no' </dev/null
""".replace("{init}", INIT)
FLOWSPEC = f"""#!/bin/sh
export PYTHONPATH=/opt/flowspec/source:/opt/flowspec/packages PYTHONDONTWRITEBYTECODE=1
export LD_LIBRARY_PATH=/opt/flowspec/python/lib
exec /opt/flowspec/python/bin/python{sys.version_info.major}.{sys.version_info.minor} -m flowspec_edge "$@"
"""


class NotPossible(Exception):
    """Why there can be no such machine here."""


class Guest:
    """The machine. ``place`` holds its upper layer and its root as this machine sees it."""

    def __init__(self, place: Path, init: int) -> None:
        self._place = place
        self._init = init

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command there as root, and wait for it."""
        where = ("nsenter", "--target", str(self._init), "--all", "--root", "--wd")
        return subprocess.run([*where, *command], capture_output=True, text=True, timeout=COMMAND_S, check=False)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file there."""
        script = 'mkdir -p "$(dirname "$1")"; printf %s "$2" > "$1"; chmod "$3" "$1"'
        done = self.run("sh", "-c", script, "sh", path, text, f"{mode:o}")
        assert done.returncode == 0, done.stderr

    def properties(self, unit: str, *names: str) -> list[str]:
        """What ``systemctl show`` says of a unit, in the order of the names."""
        shown = self.run("systemctl", "show", unit, *(f"--property={name}" for name in names)).stdout
        values = dict(line.split("=", 1) for line in shown.splitlines())
        return [values[name] for name in names]

    def until(self, unit: str, name: str, value: str) -> None:
        """Wait until a unit's property has that value."""
        deadline = time.monotonic() + COMMAND_S
        while self.properties(unit, name) != [value]:
            assert time.monotonic() < deadline, self.log(unit)
            time.sleep(0.05)

    def log(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--unit", unit).stdout


@contextlib.contextmanager
def booted(place: Path) -> Iterator[Guest]:
    """A machine that has started, in the empty directory ``place``.

    Raises:
        NotPossible: there can be none here.
    """
    for program in (INIT, "unshare", "nsenter", "ip", "mount"):
        if os.geteuid() != 0 or shutil.which(program) is None:
            raise NotPossible(f"a machine with systemd needs root and {program}")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    group = _cgroup_mount() / f"flowspec-{os.getpid()}"
    with contextlib.ExitStack() as held:
        held.callback(lambda: subprocess.run(["umount", place], check=True))
        for name in ("upper", "work", "root"):
            (place / name).mkdir()
        (place / "console").touch()
        group.mkdir()
        held.callback(_remove_group, group)
        with open(place / "said", "w") as said:
            boot = subprocess.Popen(_unshared(place, group), stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        held.callback(boot.wait)
        held.callback(_end, boot)
        guest = Guest(place, _await_init(boot, place))
        guest.write("/opt/flowspec/bin/flowspec", FLOWSPEC, 0o755)
        yield guest


def _cgroup_mount() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path)
    raise NotPossible("a machine with systemd needs cgroup2, which is not mounted here")


def _unshared(place: Path, group: Path) -> Sequence[str | Path]:
    enter = 'echo $$ > "$0/cgroup.procs"; exec "$@"'
    namespaces = ("--pid", "--fork", "--kill-child", "--mount", "--cgroup", "--net", "--ipc", "--uts")
    files = (place, sys.base_prefix, sysconfig.get_path("purelib"), ROOT)
    return ["sh", "-c", enter, group, "unshare", *namespaces, "sh", "-c", SETUP, "sh", *files]


def _await_init(boot: subprocess.Popen[bytes], place: Path) -> int:
    """The process id of the guest's systemd, here, once it takes commands."""
    deadline = time.monotonic() + BOOT_S
    while time.monotonic() < deadline and boot.poll() is None:
        children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
            state = Guest(place, int(children[0])).run("systemctl", "is-system-running").stdout.strip()
            if state in ("running", "degraded"):
                return int(children[0])
        time.sleep(0.1)
    raise NotPossible(f"systemd does not start in namespaces here: {(place / 'said').read_text()[-500:]}")


def _end(boot: subprocess.Popen[bytes]) -> None:
    if boot.poll() is None:
        boot.kill()  # and with it, by --kill-child, the first process, and with that all others


def _remove_group(group: Path) -> None:
    deadline = time.monotonic() + COMMAND_S
    while True:
        for path in sorted(group.rglob("*"), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()
        try:
            group.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
