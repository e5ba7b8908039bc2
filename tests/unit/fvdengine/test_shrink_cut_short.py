# SPDX-License-Identifier: Apache-2.0
"""A shrink that stops at any of its writes: check, open, check again: one size or the other."""

import os

import pytest

from fvdengine import resize
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.editing import ImageFile
from fvdengine.opening import OpenOptions, open_device, open_plan
from fvdengine.options import CreateOptions

MIB = 1 << 20
OLD, NEW = 8 * MIB, 3 * MIB


class Stopped(BaseException):
    """The process ends here."""


@pytest.fixture(params=["raw", "compact"])
def image(request, tmp_path):
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(6 * MIB))
    path = tmp_path / "web.fvd"
    options = CreateOptions(size=OLD, base=str(base), compact=request.param == "compact")
    create_image(str(path), options)
    with open_plan(path) as plan:
        device = open_device(plan)
        device.write(5 * MIB, b"x" * 4096)
        device.flush()
        device.close()
    return path


def shrink_until(path, monkeypatch, count):
    """Shrink, and stop at the count-th write; whether there were as many."""
    left = [count]
    write = ImageFile.write

    def counted(file, offset, data):
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        write(file, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(ImageFile, "write", counted)
        try:
            resize.resize_image(path, str(NEW), resize.ResizeOptions(shrink=True, force=True))
        except Stopped:
            return True
    return False


def test_every_stop_leaves_an_image_that_opens_and_stays_sound(image, monkeypatch, tmp_path):
    whole = image.read_bytes()
    sizes = []
    count = 0
    while shrink_until(image, monkeypatch, count):
        report = check_image(image)
        assert report.exit_status in (0, 3), (count, [one.message for one in report.findings])
        with open_plan(image, OpenOptions()) as plan:
            device = open_device(plan)
            sizes.append(device.size)
            assert device.size == plan.header.virtual_disk_size
            device.write(0, b"later")
            device.flush()
            device.close()
        report = check_image(image)
        assert report.exit_status in (0, 3), (count, [one.message for one in report.findings])
        image.write_bytes(whole)
        count += 1
    assert set(sizes) == {OLD, NEW}
    assert sizes == sorted(sizes, reverse=True)
