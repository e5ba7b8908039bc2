# SPDX-License-Identifier: Apache-2.0
"""A boot profile is a hint: a device that is attached outlives its loss, and says so."""

import os
import shutil
import signal

import pytest

from fvdtest.daemon import wait_until

TEXT = b"acknowledged"


def fresh_worker(daemon, verb, tmp_path):
    """Let another worker open the image."""
    old = daemon.device("web").worker_pid
    if verb == "killed":
        os.kill(old, signal.SIGKILL)
    else:
        daemon.ctl(verb, "web", *([tmp_path / "new"] if verb in ("snapshot", "backup") else ()))
    wait_until(lambda: daemon.device("web").worker_pid not in (old, None), "another worker")
    wait_until(lambda: daemon.device("web").state == "attached", "it to serve")


@pytest.mark.parametrize(
    ("verb", "how"),
    [
        ("killed", "deleted"),
        ("killed", "rubbish"),
        ("upgrade", "a folder"),
        ("snapshot", "rubbish"),
        ("backup", "deleted"),
    ],
)
def test_profile_that_is_followed(daemon, clone, tmp_path, verb, how):
    profile = tmp_path / "boot.profile"
    profile.write_text("fvd-profile 1\n0 4096\n")
    image, model = clone()
    disk = daemon.attach(image, "--profile", "replay", profile)
    disk.write(0, TEXT)
    model.write(0, TEXT)
    profile.unlink()
    if how == "rubbish":
        profile.write_bytes(b"\xff\xfe")
    elif how == "a folder":
        profile.mkdir()
    fresh_worker(daemon, verb, tmp_path)
    assert model.difference(disk.read(0, model.size)) is None
    (warning,) = daemon.device("web").warnings
    assert str(profile) in warning
    assert "prefetch goes without it" in warning
    daemon.ctl("detach", "web")
    if verb == "killed":
        refused = daemon.ctl("attach", image, "--profile", "replay", profile, check=False)
        assert refused.returncode
        assert str(profile) in refused.stderr


@pytest.mark.parametrize("verb", ["killed", "upgrade"])
def test_profile_that_is_recorded(daemon, clone, tmp_path, verb):
    place = tmp_path / "profiles"
    place.mkdir()
    image, model = clone()
    disk = daemon.attach(image, "--profile", "record", place / "boot.profile")
    shutil.rmtree(place)
    fresh_worker(daemon, verb, tmp_path)
    assert model.difference(disk.read(0, model.size)) is None
    (warning,) = daemon.device("web").warnings
    assert "nothing is recorded any more" in warning
    daemon.ctl("detach", "web")
