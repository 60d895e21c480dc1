"""The unit that boards get, under a real systemd: ready, alive, restarted where it hangs, and ended."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd import ROOT, Guest, NotPossible, booted

pytestmark = pytest.mark.slow

UNIT = "flowspec-node.service"
IMPATIENT = """
[Service]
WatchdogSec=2
RestartSec=0
"""
"""What the test waits for is the same with the unit's own minute."""
STOP_S = 6.0


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    try:
        with booted(tmp_path) as machine:
            added = machine.run("useradd", "--system", "--user-group", "--home-dir", "/var/lib/flowspec", "flowspec")
            assert added.returncode == 0, added.stderr
            machine.write(f"/etc/systemd/system/{UNIT}", (ROOT / "firmware_configs/systemd" / UNIT).read_text())
            machine.write(f"/etc/systemd/system/{UNIT}.d/impatient.conf", IMPATIENT)
            machine.run("systemctl", "daemon-reload")
            yield machine
    except NotPossible as why:
        pytest.skip(str(why))


def test_the_node_is_ready_serves_hangs_is_started_again_and_stops(guest: Guest) -> None:
    started = guest.run("systemctl", "start", UNIT)  # returns when the service is ready, or has failed
    assert started.returncode == 0, guest.log(UNIT)
    state, sub_state, kind, process, status = guest.properties(
        UNIT, "ActiveState", "SubState", "Type", "MainPID", "StatusText"
    )
    assert (state, sub_state, kind) == ("active", "running", "notify")
    assert "serves on port 7361" in status
    generated = guest.run(
        *("runuser", "-u", "flowspec", "--", "env", "FLOWSPEC_HOME=/var/lib/flowspec", "/opt/flowspec/bin/flowspec"),
        *("generate", "def main(", "--nodes", "1", "--max-new-tokens", "8", "--json"),
    )
    assert generated.returncode == 0, generated.stderr + guest.log(UNIT)
    assert len(json.loads(generated.stdout)["token_ids"]) == 8, "a stage works with all that the unit forbids"

    assert guest.properties(UNIT, "NRestarts") == ["0"], "signs of life came in time"
    guest.run("kill", "-STOP", process)
    guest.until(UNIT, "NRestarts", "1")
    guest.until(UNIT, "ActiveState", "active")
    assert "Watchdog timeout" in guest.log(UNIT)
    assert guest.properties(UNIT, "MainPID") != [process]

    began = time.monotonic()
    stopped = guest.run("systemctl", "stop", UNIT)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert time.monotonic() - began < STOP_S
    assert guest.properties(UNIT, "ActiveState", "Result", "ExecMainStatus") == ["inactive", "success", "0"]
    assert "Traceback" not in guest.log(UNIT)
