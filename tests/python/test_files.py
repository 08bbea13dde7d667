"""Files are written whole or not at all, in place of what was there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvpack.files import write_whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "file"


@pytest.fixture(autouse=True)
def folder(path: Path) -> None:
    path.parent.mkdir()


def test_what_is_written_takes_the_place_of_what_was_there(path: Path) -> None:
    for content in (b"first and longer", b"\xff\x00\n"):
        write_whole(str(path), content)
        assert path.read_bytes() == content and os.listdir(path.parent) == [path.name]


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]


def test_a_file_that_cannot_be_written_is_an_error_of_the_system_and_leaves_no_litter(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(path.parent / "missing" / "file", b"new")
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(path, b"new")
    assert os.listdir(path.parent) == [path.name]


def test_a_file_has_the_permissions_of_any_new_file_and_keeps_those_it_had(path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_whole(path, b"new")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o600)
        write_whole(path, b"newer")
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_a_link_to_a_file_stays_a_link(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    path.symlink_to(real)
    write_whole(path, b"new")
    assert path.is_symlink() and real.read_bytes() == b"new"
