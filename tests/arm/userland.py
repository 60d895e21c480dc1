"""An aarch64 userland in a folder: qemu-user, Debian's Python for arm64, and the wheels that a board would install.

Packages are unpacked, never installed: nothing of this machine changes, and no root is needed. What was fetched stays
in the folder, so that the next check begins at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "flowspec_edge", "exporter", "firmware_configs")
"""The files and folders of which the project's wheel is made."""
PYTHON = "python3.11"
ARM_PACKAGES = (PYTHON, "libstdc++6")
PLATFORMS = tuple(f"manylinux{tag}_aarch64" for tag in ("_2_31", "_2_28", "_2_27", "_2_26", "_2_17", "2014"))
"""The platforms that pip accepts on Debian 11 and newer, and so on Raspberry Pi OS and JetPack 6."""
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "rustc", "cargo", "as", "ld")
EM_AARCH64 = 183  # e_machine of an ELF file (ELF for the Arm 64-bit Architecture)
Report = Callable[[str], None]


class ArmCheckError(Exception):
    """The check cannot be made here, or did not pass."""


@dataclass(frozen=True)
class Board:
    """What a node sees of the board on which it believes to run. ``cpu`` is qemu's name of its processor."""

    name: str
    model: str
    cpu: str
    part: str
    features: str
    num_cores: int = 4

    @property
    def cpuinfo(self) -> str:
        """As Linux prints it; without it onnxruntime's CPU detection ends the process."""
        return "".join(
            f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: {self.features}\nCPU implementer\t: 0x41\n"
            f"CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: {self.part}\nCPU revision\t: 1\n\n"
            for number in range(self.num_cores)
        )


BOARDS = (
    Board(
        name="raspberry-pi-5",
        model="Raspberry Pi 5 Model B Rev 1.0",
        cpu="cortex-a76",
        part="0xd0b",
        features="fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
    Board(
        name="raspberry-pi-4",
        model="Raspberry Pi 4 Model B Rev 1.5",
        cpu="cortex-a72",
        part="0xd08",
        features="fp asimd evtstrm crc32 cpuid",
    ),
)
"""Boards with and without the dot products (asimddp) that 8-bit kernels are written for: onnxruntime has other kernels
for each.
"""


@dataclass(frozen=True)
class Userland:
    """The userland in ``folder``. :meth:`prepare` makes what is missing."""

    folder: Path

    @property
    def site(self) -> Path:
        """The folder into which pip unpacks the wheels, flowspec-edge as one of them."""
        return self.folder / "site"

    @property
    def _converters(self) -> Path:
        """The folder with what the extra `gguf` adds."""
        return self.folder / "converters"

    @property
    def _root(self) -> Path:
        return self.folder / "root"

    def command(self, board: Board, *arguments: str) -> list[str]:
        """The command that runs Python on that board with these arguments."""
        return self._command(board, [self.site], arguments)

    def _command(self, board: Board, libraries: Sequence[Path], arguments: Sequence[str]) -> list[str]:
        root = self.folder / "boards" / board.name
        return [
            str(self.folder / "qemu/usr/bin/qemu-aarch64-static"),
            *("-cpu", board.cpu, "-L", str(root)),
            *(
                "-E",
                "PYTHONPATH=" + os.pathsep.join(map(str, libraries)),
                "-E",
                "PATH=" + os.pathsep.join(map(str, self._search_path())),
            ),
            *(str(self._root / "usr/bin" / PYTHON), *arguments),
        ]

    def prepare(self, report: Report) -> None:
        """Fetch and unpack what is missing, then check all that is there.

        Raises:
            ArmCheckError: a package or wheel cannot be had, or is not what a board could use.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._once("qemu", ["qemu-user-static"], report, self._unpack_qemu)
        self._once("root", ARM_PACKAGES, report, self._unpack_root)
        self._once("site", [*_runtime_dependencies(), _digest_of_sources()], report, self._install_wheels)
        self._once("converters", _extra("gguf"), report, self._install_converters)
        for board in BOARDS:
            self._describe(board)
        self._check_site()

    def versions(self, board: Board) -> dict[str, str]:
        """The versions of Python and libraries there, once it is known that it starts and finds neither torch nor a
        compiler.

        Raises:
            ArmCheckError: it does not start, or sees one.
        """
        program = (
            "import importlib.util, json, platform, shutil, numpy, onnxruntime\n"
            f"extra = [name for name in {COMPILERS!r} if shutil.which(name)]\n"
            "extra += ['torch'] if importlib.util.find_spec('torch') else []\n"
            "versions = [platform.python_version(), numpy.__version__, onnxruntime.__version__]\n"
            "print(json.dumps([platform.machine(), *versions, extra]))"
        )
        found = run(self.command(board, "-c", program), f"{board.cpu}: Python does not start")
        machine, python, numpy, onnxruntime, extra = json.loads(found)
        if machine != "aarch64" or extra:
            raise ArmCheckError(
                f"{board.name}: this is {machine}, with {', '.join(extra)}; a bare aarch64 board is wanted"
            )
        return {"python": python, "numpy": numpy, "onnxruntime": onnxruntime}

    def rows_that_differ(self, board: Board, bundle: Path) -> dict[str, dict[str, Any]]:
        """How many rows of random trees were compared there with plain chains, and how many differ, by precision."""
        program = str(Path(__file__).with_name("row_bits.py"))
        found: dict[str, dict[str, Any]] = json.loads(
            run(self.command(board, program, str(bundle)), f"{board.name}: no rows")
        )
        return found

    def convert(self, board: Board, model: Path, bundle: Path) -> None:
        """Have that board make a bundle of a GGUF file.

        Raises:
            ArmCheckError: it cannot.
        """
        arguments = ["-m", "exporter", str(model), "--out", str(bundle), "--force"]
        run(self._command(board, [self.site, self._converters], arguments), f"{board.name}: no bundle of {model.name}")

    def _search_path(self) -> list[Path]:
        return [self.site / "bin", self._root / "usr/bin", self._root / "bin"]

    def _once(self, name: str, inputs: Sequence[str], report: Report, make: Callable[[Path], None]) -> None:
        """Make ``folder/name`` anew, unless it was made whole from the same inputs."""
        made_from = self.folder / f"{name}.json"
        if made_from.exists() and json.loads(made_from.read_text()) == list(inputs):
            return
        report(f"{name}: fetching {', '.join(inputs[:8])} ...")
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        make(target)
        made_from.write_text(json.dumps(list(inputs)))

    def _unpack_qemu(self, target: Path) -> None:
        packages = self.folder / "packages"
        packages.mkdir(exist_ok=True)
        run(["apt-get", "download", "qemu-user-static"], "qemu-user-static cannot be fetched", cwd=packages)
        for package in packages.glob("qemu-user-static_*.deb"):
            run(["dpkg", "-x", str(package), str(target)], f"{package}: cannot be unpacked")

    def _unpack_root(self, target: Path) -> None:
        """Fetch the arm64 packages and all that they depend on, with an apt that keeps its state in this folder."""
        state, cache = self.folder / "apt", self.folder / "apt/cache"
        for directory in (state / "lists/partial", cache / "archives/partial"):
            directory.mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        settings = state / "apt.conf"
        settings.write_text(
            'APT::Architecture "arm64";\nAPT::Architectures { "arm64"; };\nAPT::Install-Recommends "false";\n'
            'APT::Sandbox::User "";\nDebug::NoLocking "1";\n'
            f'Dir::State "{state}";\nDir::State::status "{state / "status"}";\nDir::Cache "{cache}";\n'
        )
        environment = {**os.environ, "APT_CONFIG": str(settings)}
        hint = f"arm64 packages cannot be fetched (Debian 12's {PYTHON} is wanted: see /etc/apt)"
        run(["apt-get", "-qq", "update"], hint, env=environment)
        run(["apt-get", "-qq", "-y", "--download-only", "install", *ARM_PACKAGES], hint, env=environment)
        for package in sorted((cache / "archives").glob("*.deb")):
            run(["dpkg", "-x", str(package), str(target)], f"{package}: cannot be unpacked")

    def _install_wheels(self, target: Path) -> None:
        """Unpack the project's wheel, and the wheels that it depends on as they were published."""
        wheels = self.folder / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        run([*PIP, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(PROJECT)], "the project's wheel has no build")
        (own,) = wheels.glob("flowspec_edge-*.whl")
        _unpack_wheels([str(own)], wheels, target)

    def _install_converters(self, target: Path) -> None:
        """Unpack the wheels with which a board makes bundles of GGUF files."""
        _unpack_wheels(_extra("gguf"), self.folder / "wheels", target)

    def _describe(self, board: Board) -> None:
        """Make a root for the board, with the files in which the kernel would describe it."""
        root = self.folder / "boards" / board.name
        (root / "proc/device-tree").mkdir(parents=True, exist_ok=True)
        (root / "proc/cpuinfo").write_text(board.cpuinfo)
        (root / "proc/device-tree/model").write_text(board.model + "\0")
        for entry in self._root.iterdir():
            link = root / entry.name
            if entry.name != "proc" and not link.is_symlink():
                link.symlink_to(entry.resolve())

    def _check_site(self) -> None:
        """Check that every file of machine code is for aarch64, and that nothing is there that only
        the exporter needs.
        """
        if unwanted := [name for name in ("torch", "transformers", "optimum") if (self.site / name).exists()]:
            raise ArmCheckError(f"{self.site}: holds {', '.join(unwanted)}; boards do without")
        for path in _elf_files(self.site):
            with path.open("rb") as file:
                machine = struct.unpack_from("<H", file.read(20), 18)[0]
            if machine != EM_AARCH64:
                raise ArmCheckError(f"{path}: machine code of another processor (ELF machine {machine})")


def _elf_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def _runtime_dependencies() -> list[str]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"])


def _extra(name: str) -> list[str]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return list(project["optional-dependencies"][name])


def _unpack_wheels(wanted: Sequence[str], wheels: Path, target: Path) -> None:
    """Fetch the wheels that a board would install for these requirements, into ``wheels``, and unpack them."""
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    binary = ["--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp", *platforms]
    run([*PIP, "download", "--dest", str(wheels), *binary, *wanted], "a dependency has no wheel for aarch64")
    for wheel in wheels.glob("*.whl"):
        tag = wheel.stem.rpartition("-")[2]
        if tag != "any" and "aarch64" not in tag:
            raise ArmCheckError(f"{wheel.name}: not a wheel for aarch64")
    found = ["--no-index", "--find-links", str(wheels), "--target", str(target)]
    run([*PIP, "install", *found, *binary, *wanted], "the wheels cannot be unpacked")


def _digest_of_sources() -> str:
    """A digest of the files of which the project's wheel is made."""
    digest = hashlib.sha256()
    for source in SOURCES:
        for path in sorted((PROJECT / source).rglob("*")) or [PROJECT / source]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.read_bytes())
    return f"sources {digest.hexdigest()[:16]}"


def run(command: Sequence[str], failure: str, **options: Any) -> str:
    """Run a command, with further options of :func:`subprocess.run`, and return its standard output.

    Raises:
        ArmCheckError: it does not exist or fails; the text is ``failure`` and the last line that it wrote.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    except OSError as cause:
        raise ArmCheckError(f"{failure}: {cause}") from cause
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise ArmCheckError(f"{failure}: {command[0]}: {words[-1]}")
    return str(done.stdout)
