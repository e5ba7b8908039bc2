# SPDX-License-Identifier: Apache-2.0
"""Create with the data in an NBD server: asked before anything is made, then used for all data."""

import contextlib
import errno
import os

import pytest

from fvdcore import EngineFault
from fvdengine import uris
from fvdengine.create import create_image
from fvdengine.errors import (
    DataFileTooShort,
    DataServerInUse,
    DataServerUnreachable,
    InvalidOption,
)
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
            filters = [option for option in options if option.startswith("--")]
            settings = [option for option in options if not option.startswith("--")]
            arguments = (*filters, "memory", str(length), *settings)
            return stack.enter_context(Nbdkit(folder, *arguments)).uri

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


def read_all(path, uri):
    with contextlib.closing(
        open_image(path, read_only=True, allow_uris=(uris.parse_uri(uri).pattern,))
    ) as opened:
        return opened.device.read(0, opened.device.size)


def write_once(path, uri, data):
    with contextlib.closing(
        open_image(path, allow_uris=(uris.parse_uri(uri).pattern,))
    ) as opened:
        opened.device.write(0, data)


@pytest.mark.parametrize("compact", [False, True])
def test_a_server_that_holds_data_is_taken_only_by_force_and_shows_none(
    tmp_path, server, compact
):
    """Or the new disk would show what somebody else left there."""
    uri = server(4 * MIB)
    options = {
        "size": 2 * MIB + 4096, "data_file": uri, "data_file_format": "nbd", "compact": compact,
    }  # fmt: skip
    first, second = tmp_path / "first.fvd", tmp_path / "second.fvd"
    create_image(first, CreateOptions(**options))
    write_once(first, uri, b"secret" * 10_000)
    with pytest.raises(DataServerInUse, match="holds data") as caught:
        create_image(second, CreateOptions(**options))
    assert "--force" in caught.value.hint
    assert not second.exists()
    create_image(second, CreateOptions(**options, force=True))
    assert read_all(second, uri) == bytes(2 * MIB + 4096)
    write_once(second, uri, b"n" * 512)
    assert read_all(second, uri) == (b"n" * 512).ljust(2 * MIB + 4096, b"\0")


def test_behind_the_base_old_data_are_zeroed_and_nowhere_else(tmp_path, server, base):
    uri = server(4 * MIB)
    create_image(
        tmp_path / "old.fvd", CreateOptions(size=4 * MIB, data_file=uri, data_file_format="nbd")
    )
    write_once(tmp_path / "old.fvd", uri, b"o" * 4 * MIB)
    path = tmp_path / "new.fvd"
    create_image(path, CreateOptions(
        base=str(base), size=3 * MIB, data_file=uri, data_file_format="nbd", force=True,
    ))  # fmt: skip
    assert read_all(path, uri) == base.read_bytes().ljust(3 * MIB, b"\0")
    old = read_all(tmp_path / "old.fvd", uri)
    assert old == b"o" * MIB + bytes(2 * MIB) + b"o" * MIB


def test_a_server_that_cannot_tell_is_read_and_if_it_is_large_taken_to_hold_data(
    tmp_path, server
):
    uri = server(65 * MIB, "--filter=noextents")
    options = {"size": 2 * MIB, "data_file": uri, "data_file_format": "nbd"}
    small = options | {"data_file": server(64 * MIB, "--filter=noextents")}
    create_image(tmp_path / "small.fvd", CreateOptions(**small))
    with pytest.raises(DataServerInUse):
        create_image(tmp_path / "new.fvd", CreateOptions(**options))
    create_image(tmp_path / "new.fvd", CreateOptions(**options, force=True))
    assert read_all(tmp_path / "new.fvd", uri) == bytes(2 * MIB)


def test_a_server_that_cannot_be_zeroed_leaves_no_image(tmp_path, server):
    uri = server(
        2 * MIB, "--filter=noextents", "--filter=error", "error=EIO", "error-pwrite-rate=100%",
        "error-zero-rate=100%",
    )
    options = {"size": 2 * MIB, "data_file": uri, "data_file_format": "nbd", "force": True}
    with pytest.raises(DataServerUnreachable):
        create_image(tmp_path / "new.fvd", CreateOptions(**options))
    assert os.listdir(tmp_path) == []
