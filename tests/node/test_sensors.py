"""What boards take, read from trees of files as their kernels have them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import pytest

from flowspec_edge.core.device.power import Counted, Rail, Watts
from flowspec_edge.node import sensors
from flowspec_edge.node.board import find_profile, read_facts
from flowspec_edge.node.firmware_mailbox import ask_firmware, read_rails_w
from flowspec_edge.node.sensors import BoardPower, find_sensors
from tests.narrowing import present

ORIN_NANO = {  # the module's INA3221, JetPack 6
    "class/hwmon/hwmon0/name": "tmp451",
    "class/hwmon/hwmon0/temp1_input": "48000",
    "class/hwmon/hwmon1/name": "ina3221",
    **{f"class/hwmon/hwmon1/in{number}_input": volts for number, volts in ((1, 5016), (2, 4992), (3, 5000))},
    **{f"class/hwmon/hwmon1/curr{number}_input": amperes for number, amperes in ((1, 1200), (2, 400), (3, 300))},
    "class/hwmon/hwmon1/in1_label": "VDD_IN",
    "class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "class/hwmon/hwmon1/in3_label": "VDD_SOC",
    **{f"class/hwmon/hwmon1/in{number}_input": "6" for number in (4, 5, 6, 7)},  # of the shunts
    "class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
    "class/hwmon/hwmon1/curr4_input": "1900",
}
AGX_ORIN = {  # two of them; VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0, and two channels are not connected
    **{f"class/hwmon/hwmon3/{name}": value for name, value in {"name": "ina3221", "in1_label": "VDD_GPU_SOC"}.items()},
    "class/hwmon/hwmon3/in2_label": "VDD_CPU_CV",
    "class/hwmon/hwmon3/in3_label": "VIN_SYS_5V0",
    **{f"class/hwmon/hwmon3/in{number}_input": volts for number, volts in ((1, 20000), (2, 20000), (3, 5000))},
    **{f"class/hwmon/hwmon3/curr{number}_input": amperes for number, amperes in ((1, 300), (2, 200), (3, 800))},
    "class/hwmon/hwmon4/name": "ina3221",
    **{f"class/hwmon/hwmon4/in{number}_label": name for number, name in ((1, "NC"), (2, "VDDQ_VDD2_1V8AO"), (3, "NC"))},
    **{f"class/hwmon/hwmon4/in{number}_input": "5000" for number in (1, 2, 3)},
    **{f"class/hwmon/hwmon4/curr{number}_input": "100" for number in (1, 2, 3)},
}
XAVIER_RAILS = ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")
XAVIER_JETPACK_4 = {
    f"bus/iio/devices/iio:device{number // 3}/{name}{number % 3}{end}": value
    for number, rail in enumerate(XAVIER_RAILS)
    for name, end, value in (("rail_name_", "", rail), ("in_power", "_input", 1000 + number))
}
PI_WITH_A_METER = {  # an INA219 at the 5 V input, and what a Raspberry Pi 5 has itself
    "class/hwmon/hwmon0/name": "cpu_thermal",
    "class/hwmon/hwmon0/temp1_input": "51600",
    "class/hwmon/hwmon1/name": "rp1_adc",
    "class/hwmon/hwmon1/in1_input": "1500",
    "class/hwmon/hwmon2/name": "rpi_volt",
    "class/hwmon/hwmon2/in0_lcrit_alarm": "0",
    "class/hwmon/hwmon3/name": "ina219",
    "class/hwmon/hwmon3/in0_input": "12",
    "class/hwmon/hwmon3/in1_input": "5080",
    "class/hwmon/hwmon3/curr1_input": "1250",
    "class/hwmon/hwmon3/power1_input": "6340000",
}
RK3588 = {  # its USB-C port shows what was agreed with the source
    "class/hwmon/hwmon5/name": "tcpm_source_psy_6_0022",
    "class/hwmon/hwmon5/in1_input": "20000",
    "class/hwmon/hwmon5/curr1_input": "3250",
}
MINI_PC = {
    "class/powercap/intel-rapl:0/name": "package-0",
    "class/powercap/intel-rapl:0/energy_uj": "12000000",
    "class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl:0:0/name": "core",
    "class/powercap/intel-rapl:0:0/energy_uj": "7000000",
    "class/powercap/intel-rapl:0:0/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl:0:1/name": "dram",
    "class/powercap/intel-rapl:0:1/energy_uj": "3000000",
    "class/powercap/intel-rapl:0:1/max_energy_range_uj": "65712999613",
    "class/powercap/intel-rapl-mmio:0/name": "package-0",
    "class/powercap/intel-rapl-mmio:0/energy_uj": "12000000",
    "class/powercap/intel-rapl-mmio:0/max_energy_range_uj": "262143328850",
}
WATTS: dict[str, tuple[Mapping[str, object], list[str], list[Rail]]] = {
    "jetson-orin-nano": (ORIN_NANO, ["VDD_IN"], [Watts(6.0192)]),
    "generic-aarch64": (
        AGX_ORIN,
        ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"],
        [Watts(watts) for watts in (6.0, 4.0, 4.0)],
    ),
    "jetson-agx-xavier": (
        XAVIER_JETPACK_4,
        list(XAVIER_RAILS),
        [Watts(round(1 + n / 1000, 3)) for n in range(6)],
    ),
    "raspberry-pi-5": (PI_WITH_A_METER, ["ina219"], [Watts(6.34)]),
    "rk3588": (RK3588, [], []),
    "x86-mini-pc": (
        MINI_PC,
        ["package-0", "package-0/dram"],
        [Counted(12.0, 262143.32885), Counted(3.0, 65712.999613)],
    ),
}


def tree(root: Path, files: Mapping[str, object]) -> Path:
    for name, value in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    return root


def shown(power: BoardPower) -> list[Rail]:
    """Without the last digits of products."""
    return [
        Watts(round(rail.watts, 6)) if isinstance(rail, Watts) else Counted(rail.joules, round(rail.range_j, 6))
        for rail in power.read()
    ]


@pytest.mark.parametrize("board", WATTS)
def test_each_profile_takes_its_boards_input_and_counts_nothing_twice(board: str, tmp_path: Path) -> None:
    files, names, rails = WATTS[board]
    profile = present(find_profile(board, read_facts()))
    power = BoardPower(profile.power_sensors, tree(tmp_path, files), tmp_path / "no vcio")
    assert (power.names, shown(power), power.fault) == (names, rails, "")


def test_names_that_several_rails_have_are_none(tmp_path: Path) -> None:
    assert "NC" not in {sensor.name for sensor in find_sensors(tree(tmp_path, AGX_ORIN), tmp_path / "x")}
    second = {name.replace("hwmon3", "hwmon4"): value for name, value in PI_WITH_A_METER.items() if "hwmon3" in name}
    assert BoardPower(["ina219"], tree(tmp_path, {**PI_WITH_A_METER, **second}), tmp_path / "x").names == []


def test_a_mean_comes_before_a_moment_and_a_counter_before_both(tmp_path: Path) -> None:
    chip = "class/hwmon/hwmon0"
    root = tree(tmp_path, {f"{chip}/name": "meter", f"{chip}/power1_input": 5000000, f"{chip}/power1_average": 4000000})
    assert BoardPower(["meter"], root, tmp_path / "x").read() == [Watts(4.0)]
    tree(tmp_path, {f"{chip}/energy1_input": 7000000})
    assert BoardPower(["meter"], root, tmp_path / "x").read() == [Counted(7.0, 0.0)]
    tree(tmp_path, {f"{chip}/power1_average": -20, f"{chip}/energy1_input": 0})
    (root / chip / "energy1_input").unlink()
    assert BoardPower(["meter"], root, tmp_path / "x").read() == [Watts(0.0)], "which is noise"


def test_counters_that_only_root_may_read_are_named_with_what_the_system_says(tmp_path: Path) -> None:
    root = tree(tmp_path, MINI_PC)
    energy = root / "class/powercap/intel-rapl:0/energy_uj"
    energy.unlink()
    energy.mkdir()  # a file that cannot be read, for root either
    power = BoardPower(["package-0 + package-0/dram", "package-0"], root, tmp_path / "x")
    assert power.names == [] and power.read() == []
    assert power.fault == "package-0 + package-0/dram cannot be read (Is a directory)"
    assert BoardPower(["package-0/core"], root, tmp_path / "x").names == ["package-0/core"]


def test_a_sensor_that_goes_is_looked_for_until_it_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path, PI_WITH_A_METER)
    power = BoardPower(["ina219"], root, tmp_path / "x")
    assert power.read()
    (root / "class/hwmon/hwmon3").rename(root / "class/hwmon/hwmon7")
    assert power.read() == [] and power.names == []
    assert power.read() == [], "not each time"
    monkeypatch.setattr(sensors, "SEARCH_AGAIN_S", -1.0)
    assert shown(power) == [Watts(6.34)]


PMIC = """\
       3V7_WL_SW_A current(0)=0.10000000A
         3V3_SYS_A current(1)=0.20000000A
        VDD_CORE_A current(7)=2.00000000A
            HDMI_A current(11)=0.01000000A
       3V7_WL_SW_V volt(8)=3.70000000V
         3V3_SYS_V volt(9)=3.30000000V
        VDD_CORE_V volt(15)=0.80000000V
           EXT5V_V volt(24)=5.14950000V
            BATT_V volt(25)=0.00000000V
"""


def test_a_raspberry_pi_5s_firmware_tells_rails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def ioctl(file: int, request: int, message: bytearray, changes: bool) -> int:
        size, kind, tag, room, _, _, command, end = struct.unpack("<6I1024sI", message)
        assert (request, size, kind, tag, room, end) == (0xC0086400, 1052, 0, 0x30080, 1024, 0)
        asked.append(command.rstrip(b"\0").decode())
        message[20 : 24 + 1024] = struct.pack("<I1024s", error, PMIC.encode())
        return 0

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    (vcio := tmp_path / "vcio").touch()
    error = 0
    power = BoardPower(["ina219", "pmic"], tmp_path, vcio)
    assert shown(power) == [Watts(2.63)]
    assert set(asked) == {"pmic_read_adc"}
    error = 1
    with pytest.raises(OSError, match="the firmware does not know pmic_read_adc"):
        ask_firmware("pmic_read_adc", vcio)
    assert BoardPower(["pmic"], tmp_path, vcio).fault.startswith("pmic cannot be read")
    assert read_rails_w('error=1 error_msg="Command not registered"') is None
