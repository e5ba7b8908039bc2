# SPDX-License-Identifier: Apache-2.0
"""A state directory in which nothing can be changed: every operation that would need it says so
beforehand, and no device notices."""

import errno
import os
from types import SimpleNamespace

import pytest

from fvdapi.errors import ApiError
from fvdd.devices import session
from fvdd.devices.registry import StateDirectory


@pytest.fixture
def read_only(daemon, monkeypatch):
    """Call it to let the state directory be on a file system that is read-only."""

    def fail(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def remount():
        access, statvfs = os.access, os.statvfs
        own = str(daemon.state)
        monkeypatch.setattr(
            os, "access", lambda path, *rest: not str(path).startswith(own) and access(path, *rest)
        )
        monkeypatch.setattr(
            os, "statvfs",
            lambda path: SimpleNamespace(f_flag=os.ST_RDONLY) if str(path).startswith(own)
            else statvfs(path),
        )  # fmt: skip
        monkeypatch.setattr(session, "store_record", fail)
        monkeypatch.setattr("pathlib.Path.mkdir", fail)

    yield remount
    monkeypatch.undo()


OPERATIONS = (
    ("attach", "{folder}/second.fvd"), ("detach", "web"), ("snapshot", "web", "{folder}/new.fvd"),
    ("backup", "web", "{folder}/copy.raw"), ("set-read-only", "web", "on"), ("upgrade", "web"),
    ("prefetch", "web", "pause"), ("prefetch", "web", "policy", "eager"),
)  # fmt: skip


@pytest.mark.parametrize("words", OPERATIONS, ids=lambda words: words[0])
def test_operation_is_refused_and_nothing_is_changed(daemon, clone, read_only, tmp_path, words):
    image, model = clone()
    clone("second")
    disk = daemon.attach(image, "--prefetch-delay", "3600")
    disk.write(0, b"acknowledged")
    model.write(0, b"acknowledged")
    before, status = sorted(os.listdir(tmp_path)), daemon.device("web")
    read_only()
    refused = daemon.ctl(*(word.format(folder=tmp_path) for word in words), check=False)
    assert refused.returncode == 1
    assert f"{daemon.state}/devices/" in refused.stderr
    assert "read-only file system" in refused.stderr
    assert "hint: Remount it for writing" in refused.stderr
    after = daemon.device("web")
    assert (after.state, after.worker_pid) == ("attached", status.worker_pid)
    assert (after.read_only, after.prefetch) == (status.read_only, status.prefetch)
    assert sorted(os.listdir(tmp_path)) == before
    assert model.difference(disk.read(0, model.size)) is None


@pytest.mark.parametrize(
    "words",
    [("snapshot", "web", "{folder}/new.fvd"), ("backup", "web", "{folder}/copy.raw"),
     ("set-read-only", "web", "off")],
    ids=lambda words: words[0],
)  # fmt: skip
def test_no_room_for_a_successor_is_said_before_the_worker_ends(
    daemon, clone, monkeypatch, tmp_path, words
):
    image, model = clone()
    disk = daemon.attach(image)
    if words[-1] == "off":
        daemon.ctl("set-read-only", "web", "on")
    before, pid = sorted(os.listdir(tmp_path)), daemon.device("web").worker_pid
    allocate = os.posix_fallocate

    def fail(fd, offset, size):
        if "stats.reserved" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fail)
    words = [word.format(folder=tmp_path) for word in words]
    refused = daemon.ctl(*words, check=False)
    assert refused.returncode == 1
    assert "no space left for" in refused.stderr
    assert "enlarge the tmpfs" in refused.stderr
    after = daemon.device("web")
    assert (after.state, after.worker_pid) == ("attached", pid)
    assert sorted(os.listdir(tmp_path)) == before
    assert not list((daemon.state / "devices/web").glob("*.reserved"))
    assert model.difference(disk.read(0, model.size)) is None
    monkeypatch.undo()
    daemon.ctl(*words)
    assert not list((daemon.state / "devices/web").glob("*.reserved"))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EROFS, "remount it for writing"), (errno.ENOSPC, "enlarge the tmpfs"),
        (errno.EACCES, "run fvdd as root"),
    ],
)  # fmt: skip
def test_fvdd_says_why_it_does_not_start(tmp_path, monkeypatch, number, words):
    path = tmp_path / "run"

    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", fail)
        with pytest.raises(ApiError) as caught:
            StateDirectory(str(path)).acquire()
    assert caught.value.message == (
        f"the state directory {path} cannot be used ({os.strerror(number)})"
    )
    assert words in caught.value.hint
    assert caught.value.hint.endswith("or choose another directory with --state-dir")


@pytest.mark.parametrize("which", [".", "devices"])
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_directory_that_others_write_to_is_refused(tmp_path, which, mode):
    path = tmp_path / "run" / which
    path.mkdir(parents=True)
    path.chmod(mode)
    with pytest.raises(ApiError) as caught:
        StateDirectory(str(tmp_path / "run")).acquire()
    assert f"{path} may be written to by others" in caught.value.message
    assert f"chmod go-w {path};" in caught.value.hint
    path.chmod(mode & ~0o022)
    state = StateDirectory(str(tmp_path / "run"))
    state.acquire()
    state.release()


def test_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1234)
    with pytest.raises(ApiError) as caught:
        StateDirectory(str(tmp_path)).acquire()
    assert f"{tmp_path} belongs to user {own}, not to {own + 1234}" in caught.value.message
    assert f"chown {own + 1234} {tmp_path};" in caught.value.hint
