# SPDX-License-Identifier: Apache-2.0
"""The cache mode of a device: chosen once, kept over a killed worker and an upgrade."""

import contextlib
import errno
import json
import os
import signal
from pathlib import Path

from fvdd.config import Storage
from fvdtest.daemon import Daemon, record_of, wait_until


def bypasses(pid, image):
    """Does the process have the file open past the page cache?"""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if link.readlink() != image:
                continue
            said = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
        except OSError:
            continue  # closed meanwhile
        if int(said.split("flags:")[1].split()[0], 8) & os.O_DIRECT:
            return True
    return False


def test_mode_outlives_workers(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image, "--cache", "none")
    first = daemon.device("web")
    assert first.cache == "none"
    assert bypasses(first.worker_pid, image)
    data = os.urandom(5000)
    disk.write(4001, data)
    model.write(4001, data)
    os.kill(first.worker_pid, signal.SIGKILL)
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: daemon.device("web").state == "attached", "the end of the recovery")
    assert bypasses(daemon.device("web").worker_pid, image)
    daemon.ctl("upgrade", "web")
    last = daemon.device("web")
    assert last.cache == "none"
    assert bypasses(last.worker_pid, image)
    assert model.difference(disk.read(0, model.size)) is None
    shown = daemon.ctl("status", "web").stdout
    assert any(line.split() == ["cache", "none"] for line in shown.splitlines()), shown


def test_mode_of_the_configuration_is_kept_by_what_is_attached(tmp_path, clone):
    image, _ = clone()
    with contextlib.ExitStack() as undo:
        first = Daemon(tmp_path, storage=Storage(cache="writethrough", on_full="wait"))
        undo.callback(first.kill_workers)
        first.start()
        try:
            first.attach(image)
        finally:
            first.stop()
        daemon = Daemon(tmp_path, after=first).start()
        undo.callback(daemon.stop)
        wait_until(daemon.settled, "the adoption to end")
        old = daemon.device("web").worker_pid
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: daemon.device("web").worker_pid not in (old, None), "a successor")
        wait_until(lambda: daemon.device("web").state == "attached", "it to serve")
        assert daemon.device("web").cache == "writethrough"
        assert json.loads(record_of(daemon).read_text())["request"]["on_full"] == "wait"
        daemon.detach_all()


def test_snapshot_where_the_mode_cannot_be_is_refused(daemon, clone, monkeypatch):
    """A store without O_DIRECT: no worker could open the new image in the way the device is run."""
    image, model = clone()
    disk = daemon.attach(image, "--cache", "none")
    new = image.parent / "new.fvd"
    plain = os.open

    def without(path, flags, *rest, **options):
        if flags & os.O_DIRECT and os.fsdecode(path) == str(new):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        return plain(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", without)
    refused = daemon.ctl("snapshot", "web", new, check=False)
    monkeypatch.undo()
    assert refused.returncode != 0
    assert f"the data of {new} cannot go past the page cache" in refused.stderr
    assert not new.exists()
    disk.write(5, b"goes on")
    model.write(5, b"goes on")
    assert model.difference(disk.read(0, model.size)) is None
    assert daemon.device("web").image == str(image)
    daemon.ctl("snapshot", "web", new)
    assert daemon.device("web").image == str(new)
