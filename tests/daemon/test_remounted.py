# SPDX-License-Identifier: Apache-2.0
"""The file system of an image comes back under another device number while nobody serves it."""

import os
import signal

import pytest

from fvdd.devices.adoption import worker_pids
from fvdtest.daemon import change_record, wait_until

TEXT = b"acknowledged" * 500


@pytest.fixture
def remounted(relay, clone):
    """A device whose worker and fvdd are gone; then it is told another number than the image has
    now, as if that were from before."""
    image, model = clone()
    disk = relay.running.attach(image)
    disk.write(5000, TEXT)
    disk.flush()
    model.write(5000, TEXT)

    def come_back(**changes):
        relay.stop()
        directory = relay.running.state / "devices/web"
        for pid in worker_pids(directory):
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not worker_pids(directory), "their end")
        status = image.stat()
        known = {"image_id": (status.st_dev + 1, status.st_ino), **changes}
        change_record(relay.running, **known)
        return relay.next()

    return relay.running, image, model, disk, come_back


def test_an_image_that_is_closed_goes_on(remounted):
    daemon, image, model, disk, come_back = remounted
    daemon.ctl("set-read-only", "web", "on")
    daemon = come_back()
    assert daemon.device("web").state == "attached", daemon.device("web").reason
    assert model.difference(disk.read(0, model.size)) is None
    daemon.ctl("set-read-only", "web", "off")
    disk.write(0, TEXT)


def test_what_was_open_is_given_up_only_when_that_is_said(remounted):
    daemon, image, model, disk, come_back = remounted
    daemon = come_back()
    status = daemon.device("web")
    command = f"recover web --image {image} --discard-unflushed"
    assert status.state == "failed"
    assert status.reason == (
        f"the file system of {image} was mounted anew, under another device number, while the "
        f"image was open: what was not flushed may be lost; fvdctl {command} goes on with what it "
        "holds, as after a power cut"
    )
    daemon.ctl(*command.split())
    assert daemon.device("web").state == "attached"
    assert model.difference(disk.read(0, model.size)) is None


@pytest.mark.parametrize("changes", [{"sessions": ["5a" * 16]}, {"image_uuid": "5a" * 16}])
def test_another_state_of_it_is_not_taken_for_it(remounted, changes):
    daemon, image, model, disk, come_back = remounted
    daemon.ctl("set-read-only", "web", "on")
    before = image.read_bytes()
    daemon = come_back(**changes)
    status = daemon.device("web")
    assert status.state == "failed"
    assert status.reason.endswith("the file there is not in the state in which the device had it")
    assert image.read_bytes() == before
    status = image.stat()
    wanted = {"image_id": (status.st_dev, status.st_ino)}
    come_back(**wanted, sessions=[], image_uuid=None)
