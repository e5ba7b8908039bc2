# SPDX-License-Identifier: Apache-2.0
"""Create with the data in an NBD server: asked before anything is made, then used for all data."""

import contextlib
import errno
import os

import pytest

from fvdcore import EngineFault
from fvdengine import uris
from fvdengine.create import create_image
from fvdengine.errors import DataFileTooShort, DataServerUnreachable, InvalidOption
from fvdengine.options import CreateOptions
from fvdengine.resize import ResizeOptions, resize_image
from fvdtest.images import open_image
from fvdtest.remote import Nbdkit

MIB = 1 << 20


@pytest.fixture
def clone(tmp_path, base):
    """A function that makes tmp_path/new.fvd over `base`."""

    def make(**options):
        path = tmp_path / "new.fvd"
        return path, create_image(path, CreateOptions(base=str(base), **options)).header

    return make


@pytest.fixture
def server(tmp_path_factory):
    """A function that starts a server of that many bytes, all zeros."""
    with contextlib.ExitStack() as stack:

        def start(length, *options):
            folder = tmp_path_factory.mktemp("server")
            return stack.enter_context(Nbdkit(folder, *options, "memory", str(length))).uri

        yield start


@pytest.mark.parametrize("compact", [False, True])
def test_data_of_an_nbd_server_lie_there_and_nowhere_else(clone, tmp_path, server, base, compact):
    uri = server(8 * MIB)
    path, header = clone(data_file=uri, data_file_format="nbd", compact=compact)
    assert (header.data_file, header.data_file_fmt) == (uri, "nbd")
    metadata = path.stat().st_size
    expected = bytearray(base.read_bytes())
    for turn in (b"first", b"again"):
        pattern = uris.parse_uri(uri).pattern
        with contextlib.closing(open_image(path, allow_uris=(pattern,))) as opened:
            assert opened.device.read(0, len(expected)) == expected
            opened.device.write(520000, turn * 1024)
            expected[520000 : 520000 + 5120] = turn * 1024
            opened.device.flush()
            assert opened.device.read(0, len(expected)) == expected
    assert path.stat().st_size == metadata
    assert sorted(os.listdir(tmp_path)) == ["base.raw", "new.fvd"]


def test_server_without_room_for_the_data_is_refused(clone, tmp_path, server):
    uri = server(MIB - 512)
    with pytest.raises(DataFileTooShort, match=r"has 1048064 bytes, fewer than the 1048576"):
        clone(data_file=uri, data_file_format="nbd")
    assert os.listdir(tmp_path) == ["base.raw"]
    path, _ = clone(data_file=uri, data_file_format="nbd", compact=True)
    assert path.exists()


def test_server_of_data_that_is_not_there_is_refused(clone, tmp_path):
    uri = f"nbd+unix:///?socket={tmp_path}/nobody.sock"
    with pytest.raises(DataServerUnreachable, match="which is to hold the data, cannot be used"):
        clone(data_file=uri, data_file_format="nbd")
    assert os.listdir(tmp_path) == ["base.raw"]


def test_server_that_takes_no_writes_is_refused(clone, tmp_path, server):
    with pytest.raises(DataServerUnreachable, match="the server allows no writes") as caught:
        clone(data_file=server(8 * MIB, "--readonly"), data_file_format="nbd")
    assert "for writing" in caught.value.hint
    assert os.listdir(tmp_path) == ["base.raw"]


def test_holes_need_storage_that_reads_zeros(clone, tmp_path, server):
    options = {
        "data_file": server(8 * MIB), "data_file_format": "nbd", "detect_holes": 4096,
    }  # fmt: skip
    with pytest.raises(InvalidOption, match="--detect-holes needs storage that reads zeros"):
        clone(**options)
    assert clone(**options, compact=True)[1].need_zero_init == 0


def test_disk_grows_as_far_as_its_server_has_room(clone, server):
    uri = server(2 * MIB)
    path, _ = clone(data_file=uri, data_file_format="nbd")
    options = ResizeOptions(allow_uris=(uris.parse_uri(uri).pattern,))
    before = path.read_bytes()
    with pytest.raises(InvalidOption, match="needs 2097664 bytes of its data server"):
        resize_image(path, str(2 * MIB + 512), options)
    assert path.read_bytes() == before
    assert resize_image(path, "2M", options).new_size == 2 * MIB
    with contextlib.closing(open_image(path, allow_uris=options.allow_uris)) as opened:
        assert opened.device.read(MIB, MIB) == bytes(MIB)
        opened.device.write(2 * MIB - 512, b"e" * 512)
        assert opened.device.read(2 * MIB - 512, 512) == b"e" * 512


def test_full_server_is_no_space(clone, server):
    uri = server(MIB)
    path, _ = clone(data_file=uri, data_file_format="nbd", compact=True, size=4 * MIB)
    pattern = uris.parse_uri(uri).pattern
    with contextlib.closing(open_image(path, allow_uris=(pattern,))) as opened:
        opened.device.write(0, b"w" * 512)
        with pytest.raises(EngineFault) as caught:
            opened.device.write(2 * MIB, b"w" * 512)
        assert caught.value.errno == errno.ENOSPC
