"""Boards are recognised by what they really say of themselves, and every profile is whole."""

import re

import pytest

from flowspec_edge.bench.testbed import load_testbed
from flowspec_edge.core.device.boards import (
    MIB,
    MODELLED,
    PRECISIONS,
    BoardFacts,
    BoardProfile,
    describe,
    parse_profile,
    recognise,
    settings_for,
)
from flowspec_edge.core.device.caps import Caps
from flowspec_edge.errors import BoardError
from flowspec_edge.node.board import load_profiles
from tests.narrowing import present

ARM_CORE = (
    "processor\t: {number}\nBogoMIPS\t: {mips}\nFeatures\t: {features}\nCPU implementer\t: {by}\n"
    "CPU architecture: 8\nCPU variant\t: {variant}\nCPU part\t: {part}\nCPU revision\t: {revision}\n\n"
)
OLD = "fp asimd evtstrm crc32 cpuid"
DOT = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
CARMEL = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp"


def arm(*kinds: tuple[int, str, str, str, str, str]) -> str:
    """/proc/cpuinfo as an arm64 kernel writes it.

    Each kind is (number of cores, part, variant, revision, BogoMIPS, features).
    """
    text, number = "", 0
    for count, part, variant, revision, mips, features in kinds:
        for _ in range(count):
            by = "0x4e" if part == "0x004" else "0x41"
            text += ARM_CORE.format(
                number=number, part=part, variant=variant, revision=revision, mips=mips, features=features, by=by
            )
            number += 1
    return text


def pi_tail(revision: str, model: str) -> str:
    return f"Revision\t: {revision}\nSerial\t\t: 10000000a3f1b2c4\nModel\t\t: {model}\n"


def x86(num_cores: int, model_name: str) -> str:
    return "".join(
        f"processor\t: {number}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 190\n"
        f"model name\t: {model_name}\nsiblings\t: {num_cores}\ncore id\t\t: {number}\ncpu cores\t: {num_cores}\n"
        "flags\t\t: fpu vme avx2 avx_vnni\n\n"
        for number in range(num_cores)
    )


A53 = (4, "0xd03", "0x0", "4", "38.40", OLD)
A72 = (4, "0xd08", "0x0", "3", "108.00", OLD)
A76 = (4, "0xd0b", "0x4", "1", "108.00", DOT)
A78AE = (6, "0xd42", "0x0", "1", "62.50", f"{DOT} uscat ilrcpc flagm paca pacg")
A55 = (4, "0xd05", "0x2", "0", "48.00", DOT)
RK3588 = arm(A55, (4, "0xd0b", "0x4", "0", "48.00", DOT))
BOARDS = [
    ("raspberry-pi-4", "Raspberry Pi 4 Model B Rev 1.4", "raspberrypi,4-model-b\0brcm,bcm2711", arm(A72), 7.6),
    ("raspberry-pi-4", "Raspberry Pi 400 Rev 1.0", "raspberrypi,400\0brcm,bcm2711", arm(A72), 3.7),
    (
        "raspberry-pi-4",
        "Raspberry Pi Compute Module 4 Rev 1.1",
        "raspberrypi,4-compute-module\0brcm,bcm2711",
        arm(A72),
        3.7,
    ),
    ("raspberry-pi-5", "Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b\0brcm,bcm2712", arm(A76), 7.9),
    ("raspberry-pi-5", "Raspberry Pi 5 Model B Rev 1.1", "raspberrypi,5-model-b\0brcm,bcm2712", arm(A76), 15.8),
    (
        "raspberry-pi-5",
        "Raspberry Pi Compute Module 5 Rev 1.0",
        "raspberrypi,5-compute-module\0brcm,bcm2712",
        arm(A76),
        7.9,
    ),
    (
        "raspberry-pi-zero-2-w",
        "Raspberry Pi Zero 2 W Rev 1.0",
        "raspberrypi,model-zero-2-w\0brcm,bcm2837",
        arm(A53),
        0.41,
    ),
    (
        "jetson-orin-nano",
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234",
        arm(A78AE),
        7.4,
    ),
    (
        "jetson-orin-nano",
        "NVIDIA Jetson Orin Nano Developer Kit",
        "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234",
        arm(A78AE),
        7.4,
    ),
    (
        "jetson-orin-nano",
        "A carrier of another maker",
        "nvidia,p3768-0000+p3767-0003\0nvidia,p3767-0003\0nvidia,tegra234",
        arm(A78AE),
        7.4,
    ),
    (
        "jetson-orin-nx",
        "NVIDIA Jetson Orin NX Engineering Reference Developer Kit",
        "nvidia,p3768-0000+p3767-0000\0nvidia,p3767-0000\0nvidia,tegra234",
        arm((8, *A78AE[1:])),
        15.3,
    ),
    (
        "jetson-agx-xavier",
        "NVIDIA Jetson AGX Xavier Developer Kit",
        "nvidia,p2972-0000\0nvidia,tegra194",
        arm((8, "0x004", "0x0", "0", "62.50", CARMEL)),
        31.2,
    ),
    (
        "jetson-agx-xavier",
        "Jetson-AGX",
        "nvidia,p2972-0000\0nvidia,tegra194",
        arm((6, "0x004", "0x0", "0", "62.50", CARMEL)),
        31.2,
    ),
    ("rk3588", "Orange Pi 5", "rockchip,rk3588s-orangepi-5\0rockchip,rk3588", RK3588, 7.7),
    ("rk3588", "Orange Pi 5 Plus", "xunlong,orangepi-5-plus\0rockchip,rk3588", RK3588, 15.6),
    ("rk3588", "Radxa ROCK 5B", "radxa,rock-5b\0rockchip,rk3588", RK3588, 15.6),
    ("rk3588", "FriendlyElec NanoPC-T6", "friendlyarm,nanopc-t6\0rockchip,rk3588", RK3588, 15.6),
    ("rk3566", "Orange Pi 3B", "rockchip,rk3566-orangepi-3b\0rockchip,rk3566", arm(A55), 3.8),
    ("rk3566", "Radxa ZERO 3W", "radxa,zero-3w\0rockchip,rk3566", arm(A55), 1.9),
    (
        "generic-aarch64",
        "Banana Pi BPI-M7000",
        "bananapi,m7000\0someone,soc",
        arm(A55, (2, "0xd41", "0x1", "0", "48.00", DOT)),
        3.8,
    ),
]
X86 = [("x86-mini-pc", "", "", x86(4, "Intel(R) N100"), 15.4)]


@pytest.fixture(scope="module")
def profiles() -> list[BoardProfile]:
    return load_profiles()


def facts_of(model: str, compatible: str, cpuinfo: str, gib: float, machine: str = "aarch64") -> BoardFacts:
    meminfo = (
        f"MemTotal:       {int(gib * 2**20)} kB\nMemFree:         1000 kB\nMemAvailable:   {int(gib * 2**20)} kB\n"
    )
    nul = "\0" if model else ""
    return BoardFacts(machine=machine, model=model + nul, compatible=compatible + nul, cpuinfo=cpuinfo, meminfo=meminfo)


@pytest.mark.parametrize(("name", "model", "compatible", "cpuinfo", "gib"), BOARDS, ids=lambda value: None)
def test_boards_are_recognised_by_their_device_tree(
    profiles: list[BoardProfile], name: str, model: str, compatible: str, cpuinfo: str, gib: float
) -> None:
    facts = facts_of(model, compatible, cpuinfo, gib)
    profile = present(recognise(facts, profiles))
    assert profile.name == name
    cores = sorted(facts.core_parts)
    assert cores == list(range(len(cores))) and len(cores) <= profile.num_cores
    settings = settings_for(facts, profile, cores)
    assert 1 <= settings.num_threads <= len(settings.cores)
    assert 0 < settings.memory_bytes <= gib * 2**30 * profile.memory_share
    assert settings.memory_bytes <= gib * 2**30 - profile.reserve_mib * MIB
    if not profile.is_generic:
        assert model in describe(settings, facts)
        # Without a device tree's model, other makers' boards are known by their processor.
        assert recognise(facts_of("", compatible, cpuinfo, gib), profiles) is profile


@pytest.mark.parametrize(("name", "model", "compatible", "cpuinfo", "gib"), X86)
def test_a_mini_pc_is_recognised_by_its_processor(
    profiles: list[BoardProfile], name: str, model: str, compatible: str, cpuinfo: str, gib: float
) -> None:
    facts = facts_of(model, compatible, cpuinfo, gib, machine="x86_64")
    settings = settings_for(facts, recognise(facts, profiles), range(4))
    assert (present(settings.profile).name, settings.cores, settings.num_threads) == (name, (0, 1, 2, 3), 4)
    assert describe(settings, facts) == "board: x86-64 mini-PC; 4 threads on cores 0-3, 12616 MiB for layers"


def test_in_a_container_a_raspberry_pi_is_known_by_its_cpuinfo(profiles: list[BoardProfile]) -> None:
    cpuinfo = arm(A76) + pi_tail("d04170", "Raspberry Pi 5 Model B Rev 1.0")
    assert present(recognise(facts_of("", "", cpuinfo, 8), profiles)).name == "raspberry-pi-5"
    cpuinfo = arm(A53) + "Hardware\t: BCM2835\n" + pi_tail("902120", "Raspberry Pi Zero 2 W Rev 1.0")
    assert present(recognise(facts_of("", "", cpuinfo, 0.4), profiles)).name == "raspberry-pi-zero-2-w"


def test_big_cores_are_used_where_there_are_small_ones(profiles: list[BoardProfile]) -> None:
    facts = facts_of("Orange Pi 5", "rockchip,rk3588", RK3588, 8)
    rk3588 = present(recognise(facts, profiles))
    assert {facts.core_parts[core] for core in rk3588.big_cores} == {"0xd0b"}
    assert settings_for(facts, rk3588, range(8)).cores == (4, 5, 6, 7)
    assert settings_for(facts, rk3588, range(6)).cores == (4, 5)
    assert settings_for(facts, rk3588, range(4)).cores == (0, 1, 2, 3)  # told to stay on the small ones
    unknown = facts_of("Someone's board", "", arm(A55, (2, "0xd41", "0x1", "0", "48.00", DOT)), 4)
    assert settings_for(unknown, recognise(unknown, profiles), range(6)).cores == (4, 5)
    alike = facts_of("Someone's board", "", arm(A55), 4)
    assert settings_for(alike, recognise(alike, profiles), range(4)).cores == (0, 1, 2, 3)


def test_the_memory_kept_back_counts_on_small_boards(profiles: list[BoardProfile]) -> None:
    facts = facts_of("Raspberry Pi Zero 2 W Rev 1.0", "", arm(A53), 300 / 1024)
    settings = settings_for(facts, recognise(facts, profiles), range(4))
    assert settings.memory_bytes // MIB == 300 - 96
    nothing = BoardFacts(machine="aarch64")
    assert settings_for(nothing, recognise(nothing, profiles), [0]).memory_bytes == 0


def test_a_processor_of_no_known_kind_has_no_profile(profiles: list[BoardProfile]) -> None:
    facts = BoardFacts(machine="riscv64", meminfo="MemAvailable: 1000000 kB\n")
    assert recognise(facts, profiles) is None
    settings = settings_for(facts, None, [0, 1, 3])
    assert (settings.cores, settings.num_threads, settings.memory_bytes) == ((0, 1, 3), 3, 819_200_000)
    assert "no known kind; 3 threads on cores 0-1,3" in describe(settings, facts)


def test_a_profile_may_name_rails_and_caps() -> None:
    more = 'power = { sensors = ["VDD_IN", "A + B"] }\npacing = { max_watts = 9.5, max_temperature_c = 70 }'
    mine = parse_profile("mine", f"{more}\n{GOOD}")
    assert (mine.power_sensors, mine.caps) == (("VDD_IN", "A + B"), Caps(9.5, 70.0))


def test_every_profile_is_whole_and_within_its_units(profiles: list[BoardProfile]) -> None:
    assert {name for name, *_ in [*BOARDS, *X86]} == {profile.name for profile in profiles}
    for profile in profiles:
        assert profile.num_threads <= max(len(profile.big_cores), profile.num_cores)
        assert not profile.big_cores or profile.num_threads == len(profile.big_cores)
        assert set(profile.precisions) <= set(PRECISIONS) and "fp32" in profile.precisions
        assert profile.providers[-1] == "CPUExecutionProvider"
        assert 60 <= profile.limit_c <= 95 and len(profile.limit_source) > 20
        assert profile.thermal_zones and "--calibrate" in profile.figures_note
        assert profile.power_sensors and not profile.caps, "it is its user's to say how warm a room may become"
        assert profile.is_generic or (profile.models and profile.compatible)
        assert not profile.allows_spinning, "the engine does not spin, whatever a profile says"
        assert profile.stages or profile.name == "generic-aarch64"
        for stage in profile.stages:
            assert 0 < stage.fixed_ms < 10_000 and 0 < stage.row_ms < 1_000 and 1 <= stage.num_layers <= 100
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", stage.date) and len(stage.source) > 20
        for figure in profile.figures:
            assert figure.unit in ("tokens/s", "GB/s", "GFLOP/s") and figure.value > 0
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", figure.date or figure.seen)


def test_stages_of_described_boards_are_theirs(profiles: list[BoardProfile]) -> None:
    cited = [
        (profile, stage, match[1])
        for profile in profiles
        for stage in profile.stages
        if (match := re.match(r"flowspec_edge/bench/testbeds/(.*)\.toml", stage.source))
    ]
    assert {profile.name for profile, *_ in cited} == {"raspberry-pi-5", "rk3588", "jetson-orin-nano"}
    for profile, stage, name in cited:
        assert stage.basis == MODELLED
        described = {(cost.num_layers, cost.fixed_ms, cost.row_ms): cost.device for cost in load_testbed(name).stages}
        device = described[stage.num_layers, stage.fixed_ms, stage.row_ms]
        assert profile.title.removesuffix(" board") in device


def test_no_pattern_claims_a_board_of_another_profile(profiles: list[BoardProfile]) -> None:
    for name, model, compatible, cpuinfo, gib in BOARDS:
        others = [profile for profile in profiles if profile.name != name and not profile.is_generic]
        found = recognise(facts_of(model, compatible, cpuinfo, gib), others)
        assert found is None, f"{model} is also a {found.name}"


STAGE = (
    '{ what = "m", precision = "int8", num_layers = 4, fixed_ms = 20.0, row_ms = 1.5, basis = "measured", '
    'source = "me", date = "2026-01-01" }'
)
GOOD = """
title = "A board"
figures_note = "none"
recognise = { models = ["A *"], compatible = [], machines = ["aarch64"] }
cpu = { num_cores = 4, big_cores = [2, 3], num_threads = 2, allows_spinning = false }
memory = { share = 0.8, reserve_mib = 100 }
engine = { providers = ["CPUExecutionProvider"], precisions = ["fp32"] }
thermal = { zones = ["cpu-thermal"], limit_c = 80, limit_source = "its maker" }
"""


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ('title = "A board"', "", "mine.toml: title is missing"),
        ('title = "A board"', 'title = "A board"\ncolour = "green"', "unknown key colour"),
        ("reserve_mib = 100", "reserve_gib = 1", "memory.reserve_mib is missing"),
        ("reserve_mib = 100", "reserve_mib = 100, swap = 1", "unknown key memory.swap"),
        ("share = 0.8", "share = 80", "memory.share is 80; it must be a number from 0.1 to 1"),
        ("share = 0.8", "share = true", "memory.share is True"),
        ("[2, 3]", "[2, 4]", "a core beyond the 4 there are"),
        ("[2, 3]", '["2"]', "a list of processor numbers"),
        ('["fp32"]', '["fp31"]', "engine.precisions is 'fp31'; it must be one of fp32, fp16"),
        ('["CPUExecutionProvider"]', '["CUDAExecutionProvider"]', "CPUExecutionProvider must be named"),
        ("limit_c = 80", "limit_c = 800", "thermal.limit_c is 800; it must be a number from 40 to 110"),
        ("title", "power = { sensors = [5] }\ntitle", "power.sensors is [5]; it must be a list of texts"),
        ("title", "power = { rails = [] }\ntitle", "unknown key power.rails"),
        ("title", "pacing = { max_watts = 0 }\ntitle", "pacing.max_watts is 0; it must be a number from 0.5 to 1000"),
        (
            "title",
            "pacing = { max_temperature_c = 300 }\ntitle",
            "pacing.max_temperature_c is 300; it must",
        ),
        ("title", "pacing = { max_heat = 70 }\ntitle", "unknown key pacing.max_heat"),
        ("allows_spinning = false", "allows_spinning = 0", "cpu.allows_spinning is 0; it must be true or false"),
        ("title", "title = =", "not readable as TOML"),
        (
            "title",
            'figures = [{ what = "x", value = 1.0, unit = "s", source = "hearsay", date = "2026" }]\ntitle',
            "address of its source",
        ),
        (
            "title",
            'figures = [{ what = "x", value = 1.0, unit = "s", source = "https://x" }]\ntitle',
            "neither date nor seen",
        ),
        ("title", 'stages = [{ what = "x", fixed_ms = 1.0 }]\ntitle', "stages: a key is missing or unknown"),
        (
            "title",
            f"stages = [{STAGE.replace('2026-01-01', '')}]\ntitle",
            "stages: 'm' lacks milliseconds, source or date",
        ),
        (
            "title",
            f"stages = [{STAGE.replace('1.5', '-1.5')}]\ntitle",
            "stages: 'm' lacks milliseconds, source or date",
        ),
        ("title", f"stages = [{STAGE.replace('measured', 'guessed')}]\ntitle", "basis measured or modelled"),
        ("title", 'figures = [{ what = "x" }]\ntitle', "figures: a key is missing or unknown"),
    ],
)
def test_a_profile_with_a_mistake_is_refused_by_file_and_key(old: str, new: str, text: str) -> None:
    mine = parse_profile("mine", GOOD)
    assert (mine.big_cores, mine.power_sensors, mine.caps) == ((2, 3), (), Caps())
    with pytest.raises(BoardError, match=re.escape(text)):
        parse_profile("mine", GOOD.replace(old, new, 1))
