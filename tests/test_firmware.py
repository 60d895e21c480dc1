"""What makes a freshly flashed card join, and what a node says of the board it runs on."""

import asyncio
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import firmware_configs
from flowspec_edge.core.device.boards import settings_for
from flowspec_edge.core.device.throttling import ThermalReport
from flowspec_edge.errors import BoardError
from flowspec_edge.node.board import (
    describe_board,
    find_profile,
    read_facts,
    read_temperature_c,
    read_thermal,
    thermometer_of,
)
from tests.narrowing import present

FILES = Path(firmware_configs.__file__).parent
UNIT = FILES / "systemd/flowspec-node.service"
USER_DATA = FILES / "cloud-init/user-data"


def test_cloud_init_brings_the_very_unit_and_script_that_are_here() -> None:
    yaml = pytest.importorskip("yaml", reason="reading user-data needs PyYAML, which comes with the exporter")
    text = USER_DATA.read_text()
    assert text.startswith("#cloud-config\n")
    data = yaml.safe_load(text)
    files = {file["path"]: file for file in data["write_files"]}
    assert files["/etc/systemd/system/flowspec-node.service"]["content"].rstrip() == UNIT.read_text().rstrip()
    script = files["/opt/flowspec-setup/first-boot.sh"]
    assert script["content"].rstrip() == (FILES / "first-boot.sh").read_text().rstrip()
    assert (script["permissions"], files["/etc/flowspec/cluster.key"]["permissions"]) == ("0755", "0600")
    assert files["/etc/flowspec/cluster.key"]["content"] == "", "no key may ever be published"
    (command,) = data["runcmd"]
    for path in ("/opt/flowspec-setup/first-boot.sh", "/etc/flowspec/cluster.key"):
        assert path in command[-1] and path in files


def test_the_script_is_plain_shell_and_says_what_it_needs() -> None:
    script = FILES / "first-boot.sh"
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("running it without root needs setpriv")
    user = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    run = subprocess.run([*user, "sh", "-s"], stdin=script.open(), capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, "first-boot.sh: needs root; run it with sudo\n")


def test_the_unit_is_sound_and_hardened(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("checking a unit needs systemd-analyze")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/flowspec/bin/flowspec", sys.executable))
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert "flowspec-node" not in verified.stderr, verified.stderr
    arguments = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)]  # in tenths: 2.0 of 10
    security = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if "offline" in security.stderr:
        pytest.skip("this systemd cannot judge a unit that is not loaded")
    assert security.returncode == 0, security.stdout[-300:]


def test_the_temperature_is_that_of_the_first_zone_there_is(tmp_path: Path) -> None:
    for number, (kind, temperature) in enumerate([("gpu-thermal", "50000"), ("soc-thermal", "61250"), ("x", "no")]):
        zone = tmp_path / f"thermal_zone{number}"
        zone.mkdir()
        (zone / "type").write_text(kind + "\n")
        (zone / "temp").write_text(temperature + "\n")
    facts = read_facts()
    assert read_temperature_c(present(find_profile("rk3588", facts)), tmp_path) == 61.25
    assert read_temperature_c(present(find_profile("x86-mini-pc", facts)), tmp_path) is None


def test_a_hot_board_tells_how_much_of_its_clock_is_left(tmp_path: Path) -> None:
    profile = present(find_profile("rk3588", read_facts()))
    zone = tmp_path / "thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("package-thermal\n")
    (zone / "temp").write_text("86000\n")
    assert read_thermal(profile, [4], zone.parent, tmp_path) == ThermalReport(86.0, 85.0)
    for core, allowed in ((0, 408000), (4, 1800000), (5, 1200000)):
        policy = tmp_path / f"cpu{core}/cpufreq"
        policy.mkdir(parents=True)
        (policy / "cpuinfo_max_freq").write_text("2400000\n")
        (policy / "scaling_max_freq").write_text(f"{allowed}\n")
    assert read_thermal(profile, [4, 5, 6], zone.parent, tmp_path) == ThermalReport(86.0, 85.0, 0.5)
    assert read_thermal(profile, [4], tmp_path / "none", tmp_path) is None


def test_a_machine_without_a_profile_has_no_thermometer() -> None:
    facts = read_facts()
    assert thermometer_of(settings_for(facts, None, [0])) is None
    read = present(thermometer_of(settings_for(facts, find_profile("rk3588", facts), [0])))
    assert read() is None or present(read()).limit_c == 85.0, "as this machine has such a zone or not"


def test_this_machine_is_described() -> None:
    facts = read_facts()
    settings = settings_for(facts, find_profile(None, facts), [0])
    assert facts.cpuinfo and settings.memory_bytes > 0
    assert "; 1 threads on cores 0, " in describe_board(settings, facts)


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("pi-9", "no such profile; there are generic-aarch64, "),
        ("none.toml", "cannot be read"),
        ("bad.toml", "title is missing"),
    ],
)
def test_a_profile_that_is_not_there_is_refused(
    wanted: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("")
    with pytest.raises(BoardError, match=text):
        find_profile(wanted, read_facts())


@pytest.mark.slow
async def test_a_node_says_on_what_it_runs_and_takes_a_profile_of_the_users_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text((FILES / "generic-aarch64.toml").read_text().replace("num_threads = 8", "num_threads = 1"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowspec_edge", "node", "--host", "127.0.0.1", "--json"),
        *("--cluster", f"boards-{secrets.token_hex(4)}"),
        *("--board", str(mine), "--memory", "77", "--until-stdin-closes"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        said = json.loads(await present(process.stdout).readline())
        present(process.stdin).close()
        await process.wait()
    assert (said["board"], said["threads"], said["memory_bytes"]) == ("mine", 1, 77 * 2**20)
    assert set(said["cores"]) <= os.sched_getaffinity(0)
