"""Small private files: whole or not at all, and never readable by others."""

import threading
from pathlib import Path

import pytest

from flowspec_edge.errors import StateError
from flowspec_edge.files import read_private, state_directory, write_private


def test_what_was_written_is_read_and_private(state: Path) -> None:
    path = state / "deeper" / "file"
    assert read_private(path) is None
    assert write_private(path, "one")
    assert write_private(path, "two")
    assert read_private(path) == "two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_of_many_that_make_a_file_at_once_one_wins(state: Path) -> None:
    path, wins = state / "key", []
    threads = [
        threading.Thread(target=lambda n=n: wins.append(n) if write_private(path, str(n), is_new=True) else None)
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_private(path) == str(wins[0])
    assert len(wins) == 1


def test_a_file_that_others_may_read_is_refused(state: Path) -> None:
    write_private(state / "key", "x")
    (state / "key").chmod(0o640)
    with pytest.raises(StateError, match=r"mode 0640.*chmod 600"):
        read_private(state / "key")


def test_a_place_that_cannot_be_written_is_named(state: Path) -> None:
    (state / "file").write_text("")
    with pytest.raises(StateError, match=r"file/key cannot be written .*FLOWSPEC_HOME"):
        write_private(state / "file" / "key", "x")


def test_a_full_disk_is_named_and_leaves_no_half_file(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_private(state / "key", "whole")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StateError, match="No space left on device"):
        write_private(state / "key", "half")
    assert read_private(state / "key") == "whole"
    assert [entry.name for entry in state.iterdir()] == ["key"]


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FLOWSPEC_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert state_directory() == tmp_path / "flowspec"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/pi")
    assert str(state_directory()) == "/home/pi/.config/flowspec"
