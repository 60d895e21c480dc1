"""Small private files: whole or not at all, and never readable by others."""

import os
import resource
import threading
from pathlib import Path

import pytest

from flowspec_edge.errors import StateError
from flowspec_edge.files import RECORD_VARIABLE, open_record, read_private, state_directory, write_private
from flowspec_edge.net.auth import load_key, make_key
from tests.narrowing import present


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


def test_a_link_that_leads_nowhere_is_named_and_not_taken_for_a_file_that_is_not_there(state: Path) -> None:
    (state / "cluster.key").symlink_to(state / "usb" / "cluster.key")
    with pytest.raises(StateError, match=r"cluster.key leads to .*usb/cluster.key, which does not exist; .* rm "):
        make_key()
    assert (state / "cluster.key").is_symlink()


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop"])
def test_what_is_no_file_is_named_at_once(state: Path, kind: str) -> None:
    path = state / "cluster.key"
    if kind == "directory":
        path.mkdir(0o700)
    elif kind == "pipe":
        os.mkfifo(path, 0o600)
    else:
        path.symlink_to(path)
    with pytest.raises(StateError, match=r"cluster.key (is no file|cannot be read)"):
        make_key()


def test_a_key_that_is_no_text_or_far_too_long_is_named(state: Path) -> None:
    write_private(state / "cluster.key", "x")
    (state / "cluster.key").write_bytes(b"\xff\xfe")
    with pytest.raises(StateError, match="cannot be read"):
        load_key()
    with (state / "cluster.key").open("wb") as file:
        file.truncate(2**25)
    with pytest.raises(StateError, match="33554432 bytes"):
        load_key()


def test_journals_are_written_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RECORD_VARIABLE, raising=False)
    assert open_record("stage") is None
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path / "journals"))
    for _ in range(2):
        present(open_record("stage"))(b"entry")
    first, second = (tmp_path / "journals").glob("stage-*.journal")
    assert first.read_bytes() == second.read_bytes() == b"entry"
    assert first.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(RECORD_VARIABLE, str(first))
    with pytest.raises(StateError, match=RECORD_VARIABLE):
        open_record("stage")


def test_a_journal_on_a_full_disk_ends_once_and_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(RECORD_VARIABLE, str(tmp_path))
    write = present(open_record("stage"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, hard))
    try:
        for _ in range(5):
            write(b"four")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    write(b"four")
    (journal,) = tmp_path.glob("stage-*.journal")
    assert journal.read_bytes() == b"fourfo"
    assert len([line for line in caplog.messages if "not written any further" in line]) == 1
