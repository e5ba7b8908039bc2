# SPDX-License-Identifier: Apache-2.0
"""A look at an export: its length, or the reason why not. And devices over remote bases."""

import errno
import os
import time

import pytest

from fvdcore import Device, EngineFault, export_length
from fvdengine.geometry import Wanted
from fvdtest.images import content_on_disk, make_image, shape_image
from fvdtest.remote import Nbdkit

MIB = 1 << 20
SIZE = 2 * MIB


@pytest.fixture
def base(tmp_path):
    data = os.urandom(SIZE)
    (tmp_path / "base.raw").write_bytes(data)
    return data


@pytest.fixture
def server(tmp_path, base):
    with Nbdkit(tmp_path, "file", tmp_path / "base.raw") as server:
        yield server


@pytest.fixture
def image(tmp_path, base):
    """A clone of the file, to be opened over the export of the same file."""
    path = make_image(tmp_path / "clone.fvd", base=str(tmp_path / "base.raw"))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_the_length_of_an_export(server):
    assert export_length(server.uri, 5.0) == SIZE


def test_an_export_that_cannot_be_reached(tmp_path):
    with pytest.raises(EngineFault, match="No such file") as caught:
        export_length(f"nbd+unix:///?socket={tmp_path / 'none'}", 0.2)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_device_over_an_export(server, image, base, tmp_path):
    device = Device.open([(image, "fvd"), (server.uri, "nbd")], copy_on_read=True)
    device.start()
    assert device.read(0, MIB) + device.read(MIB, MIB) == base
    device.write(5000, b"new" * 1000)
    server.kill()
    expected = base[:5000] + b"new" * 1000 + base[8000:]
    assert device.read(0, SIZE) == expected  # all of it is local by now
    device.close()
    assert content_on_disk(tmp_path / "clone.fvd") == expected


def test_a_device_whose_base_is_away_serves_what_is_local(server, image, base, task):
    server.kill()
    device = Device.open([(image, "fvd"), (server.uri, "nbd", {"length": SIZE})])
    device.start()
    device.write(4096, b"x" * 4096)
    assert device.read(4096, 4096) == b"x" * 4096
    waiting = task(device.read, 0, SIZE)
    server.start()
    assert waiting.result() == base[:4096] + b"x" * 4096 + base[8192:]
    device.close()


def test_a_base_that_stays_away_is_an_io_error_in_time(server, image):
    server.kill()
    device = Device.open([(image, "fvd"), (server.uri, "nbd", {"length": SIZE})], base_timeout=0.3)
    with pytest.raises(EngineFault) as caught:
        device.read(0, 4096)
    assert caught.value.errno == errno.EIO
    device.abandon()


def test_closing_does_not_wait_for_the_base(server, image, task):
    """Prefetch waits for a base that is away: the device ends at once all the same."""
    server.kill()
    device = Device.open(
        [(image, "fvd"), (server.uri, "nbd", {"length": SIZE})], prefetch_delay=0
    )
    device.start()
    begin = time.monotonic()
    device.close()
    assert time.monotonic() - begin < 10


def test_a_base_that_was_shortened_is_refused(server, image):
    server.kill()
    os.truncate(server.arguments[-1], SIZE - 4096)
    server.start()
    with pytest.raises(EngineFault, match="shorter"):
        Device.open([(image, "fvd"), (server.uri, "nbd")])


def test_data_in_an_export(tmp_path, base, wait_until):
    """A data file that a server holds: what the device wrote lies there at its own offsets."""
    data = tmp_path / "data"
    path = shape_image(
        tmp_path / "image.fvd", tmp_path / "base.raw", "raw", Wanted(SIZE, has_data_file=True),
        data.name,
    )  # fmt: skip
    image, raw = os.open(path, os.O_RDWR), os.open(tmp_path / "base.raw", os.O_RDONLY)
    with Nbdkit(tmp_path, "file", data) as server:
        device = Device.open([(image, "fvd", server.uri), (raw, "raw")])
        device.start()
        device.write(4096, b"far" * 4096)
        device.flush()
        expected = base[:4096] + b"far" * 4096 + base[4096 + 3 * 4096 :]
        assert device.read(0, SIZE) == expected
        device.close()
        assert data.read_bytes()[4096 : 4096 + 12288] == b"far" * 4096
        again = Device.open([(image, "fvd", server.uri), (raw, "raw")])
        assert again.read(0, SIZE) == expected
        again.close()
    os.close(image)
    os.close(raw)


@pytest.mark.parametrize("options", [{"base_timeout": 0.0}, {"base_connections": 0}])
def test_bad_options_are_refused(image, options):
    with pytest.raises(ValueError, match="base_"):
        Device.open([(image, "fvd")], **options)
