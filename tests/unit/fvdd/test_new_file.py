# SPDX-License-Identifier: Apache-2.0
"""Files that have no name before they are complete, and what cannot be one."""

import errno
import os

import pytest

from fvdapi.errors import ApiError
from fvdd.devices import new_file
from fvdd.devices.new_file import PART, NewFile, check_new_name
from fvdengine.errors import EngineError


@pytest.fixture
def no_unnamed(monkeypatch):
    """A file system without O_TMPFILE."""
    real = os.open

    def opened(path, flags, *rest, **others):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *rest, **others)

    monkeypatch.setattr(os, "open", opened)


def refuse(number):
    def refused(*words, **others):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.fixture(params=["unnamed", "rename", "link"])
def way(request, monkeypatch):
    if request.param != "unnamed":
        request.getfixturevalue("no_unnamed")
    if request.param == "link":
        monkeypatch.setattr(new_file, "_rename", refuse(errno.EINVAL))
    if request.param == "rename":
        monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    return request.param


def test_file_has_its_name_when_it_is_kept(tmp_path, way):
    target = tmp_path / "copy.raw"
    with NewFile(str(target), 8192) as file:
        assert os.listdir(tmp_path) == ([] if way == "unnamed" else [f"copy.raw{PART}"])
        os.pwrite(file.fd, b"all of it", 0)
        file.keep()
    assert os.listdir(tmp_path) == ["copy.raw"]
    assert target.read_bytes() == b"all of it" + bytes(8192 - 9)
    assert target.stat().st_mode & 0o777 == 0o600


def test_file_that_is_not_kept_is_gone(tmp_path, way):
    with NewFile(str(tmp_path / "copy.raw"), 8192):
        pass
    assert os.listdir(tmp_path) == []


def test_name_that_is_not_durable_is_taken_back(tmp_path, way, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, "lost")

    with NewFile(str(tmp_path / "copy.raw"), 4096) as file:
        monkeypatch.setattr(new_file.overlay, "flush_folder", failing)
        with pytest.raises(EngineError, match="copy.raw"):
            file.keep()
    assert os.listdir(tmp_path) == []


def test_what_appears_meanwhile_is_not_replaced(tmp_path, way):
    with NewFile(str(tmp_path / "copy.raw"), 8192) as file:
        (tmp_path / "copy.raw").write_text("somebody's")
        with pytest.raises(ApiError, match="exists already"):
            file.keep()
    assert os.listdir(tmp_path) == ["copy.raw"]
    assert (tmp_path / "copy.raw").read_text() == "somebody's"


def test_what_a_dead_process_left_is_taken_over_and_what_a_live_one_writes_is_not(
    tmp_path, no_unnamed
):
    target, part = str(tmp_path / "copy.raw"), tmp_path / f"copy.raw{PART}"
    part.write_text("half of")
    with NewFile(target, 4096) as file:
        os.pwrite(file.fd, b"a", 0)
        with pytest.raises(ApiError, match="is being written"):
            NewFile(target, 4096)
        assert part.exists()
        file.keep()
    assert (tmp_path / "copy.raw").read_bytes() == b"a" + bytes(4095)
    assert not part.exists()


def test_what_is_no_file_is_not_written(tmp_path, no_unnamed):
    os.mkfifo(tmp_path / f"copy.raw{PART}")
    with pytest.raises(ApiError, match="exists already"):
        NewFile(str(tmp_path / "copy.raw"), 4096)
    assert os.listdir(tmp_path) == [f"copy.raw{PART}"]


def test_file_system_that_cannot_keep_from_replacing_is_refused_at_once(
    tmp_path, no_unnamed, monkeypatch
):
    monkeypatch.setattr(new_file, "_rename", refuse(errno.EINVAL))
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    with pytest.raises(ApiError, match="cannot rename without replacing") as refused:
        NewFile(str(tmp_path / "copy.raw"), 4096)
    assert "ext4" in refused.value.hint
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("there", "exists already"),
        ("link", "exists already"),
        ("none/copy.raw", "there is no directory"),
        ("there/copy.raw", "there is no directory"),
        ("n" * 256, "too long"),
        ("web.fvd.backup-base", "a name that backups give"),
        ("web.fvd.backup-base.new", "a name that backups give"),
    ],
)
def test_names_that_are_refused(tmp_path, name, reason):
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ApiError, match=reason):
        check_new_name(str(tmp_path / name))


def test_longest_name_is_none_too_long(tmp_path, no_unnamed, monkeypatch):
    longest = str(tmp_path / ("n" * 255))
    with pytest.raises(ApiError, match="too long"):  # no room for what stands there meanwhile
        NewFile(longest, 4096)
    monkeypatch.undo()
    with NewFile(longest, 4096) as file:
        file.keep()
    assert os.path.getsize(longest) == 4096


def test_places_that_take_no_files_are_told(tmp_path):
    with pytest.raises(ApiError, match="cannot be created") as refused:
        NewFile("/proc/copy.raw", 4096)
    assert "a directory in which files can be made" in refused.value.hint
    with pytest.raises(EngineError, match="does not take files as large"):
        NewFile(str(tmp_path / "copy.raw"), (1 << 63) - 1)
    assert os.listdir(tmp_path) == []
