"""For every test, and every process it starts: a place of its own for what a node keeps, without a cluster key."""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from flowspec_edge.files import STATE_VARIABLE
from tests.bundles import MadeOnce
from tests.lan import why_not

hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")
"""What takes 200 ms is no failure: on a loaded machine any example may."""


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory; see flowspec_edge/files.py."""
    directory = tmp_path_factory.mktemp("state")
    monkeypatch.setenv(STATE_VARIABLE, str(directory))
    return directory


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A test that has logging leave something out does so for itself alone."""
    level = logging.root.level
    yield
    logging.disable(logging.NOTSET)
    logging.root.setLevel(level)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("flowspec_edge") and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True


@pytest.fixture(scope="session")
def lan_is_possible() -> None:
    """Skips where hosts with addresses of their own cannot be made."""
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """``made_once(name, make)``: a directory that ``make(directory)`` filled, once for all processes of a test run.

    Whoever asks first makes it, the others wait. Nobody may change what is in it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of the run, not of this worker
    root = root / "made-once"

    def made_once(name: str, make: Callable[[Path], None]) -> Path:
        directory, done = root / name, root / f"{name}.done"
        root.mkdir(exist_ok=True)
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(directory, ignore_errors=True)  # of one who failed
                directory.mkdir()
                make(directory)
                done.touch()
        return directory

    return made_once


@pytest.fixture(scope="session")
def demo_export(made_once: MadeOnce) -> Callable[..., Path]:
    """``demo_export(precision, *also)``: the directory of the demo model's bundle, exported in these precisions."""
    exporter = pytest.importorskip("exporter.bundle", reason="exporting needs torch: pip install '.[export]'")
    model = Path(__file__).parents[1] / "exporter/demo_model"

    def demo_export(precision: str, *also: str) -> Path:
        def export(directory: Path) -> None:
            target, drafter, out = model / "target", model / "eagle", directory / "bundle"
            options = exporter.ExportOptions(
                checkpoint=target, drafter=drafter, out=out, precision=precision, also=also, max_loss=1.0
            )
            exporter.export_bundle(options)

        return made_once("-".join(("demo", precision, *also)), export) / "bundle"

    return demo_export
