# SPDX-License-Identifier: Apache-2.0
"""A repair that cannot be ended changes nothing; data on a server are no reason to refuse one."""

import contextlib
import os
import resource
from dataclasses import replace

import pytest

from fvdengine import uris
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.errors import (
    DataServerUnreachable,
    EngineError,
    FileTooLarge,
    ImageTruncated,
    UriNotAllowed,
)
from fvdengine.options import CreateOptions, OpenOptions
from fvdengine.repair import repair_image
from fvdtest.forge import Forged, forge_image, header_of, poke
from fvdtest.images import open_image
from fvdtest.remote import Nbdkit

MIB = 1 << 20
SIZE = 1 << 18


@contextlib.contextmanager
def no_file_longer_than(limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(path):
    return {entry.name: entry.read_bytes() for entry in path.parent.iterdir()}


@pytest.fixture(params=["raw", "compact", "raw with a data file", "compact with a data file"])
def short(request, tmp_path):
    """An unclean image whose storage was cut."""
    compact, separate = "compact" in request.param, "data file" in request.param
    path = tmp_path / "disk.fvd"
    places = {0: 1, 1: 0, 2: 5} if compact else None
    data_file = "disk.data" if separate else ""
    header = forge_image(path, Forged(size=SIZE, places=places, data_file=data_file))
    poke(path, 0, replace(header, clean_shutdown=0).pack())
    storage = tmp_path / header.data_file if separate else path
    os.truncate(storage, storage.stat().st_size - 8192)
    return path


def test_a_file_that_cannot_be_made_longer_leaves_all_as_it_was(short):
    before = files(short)
    longest = max(len(data) for data in before.values())
    with no_file_longer_than(longest), pytest.raises(EngineError):
        repair_image(short)
    assert files(short) == before
    assert repair_image(short).exit_status == 0


@pytest.mark.parametrize("limit", [4096, 20480, 40960])
def test_metadata_that_cannot_be_written_leave_all_as_it_was(tmp_path, limit):
    """The clean flag could be written, what it speaks of not."""
    path = tmp_path / "disk.fvd"
    header = forge_image(path, Forged(size=SIZE, places={0: 1, 1: 0}))
    poke(path, 0, replace(header, clean_shutdown=0).pack())
    before = files(path)
    with no_file_longer_than(limit), pytest.raises(FileTooLarge):
        repair_image(path)
    assert files(path) == before
    assert repair_image(path).exit_status == 0


def test_a_place_beyond_all_files_leaves_all_as_it_was(tmp_path):
    path = tmp_path / "disk.fvd"
    header = forge_image(path, Forged(size=SIZE, places={0: 1, 1: 0}))
    huge = replace(header, chunk_size=1 << 50, storage_grow_unit=1 << 50, clean_shutdown=0)
    for at in (0, 8192):
        poke(path, at, huge.pack())
    before = files(path)
    with pytest.raises((FileTooLarge, ImageTruncated)):
        repair_image(path)
    assert files(path) == before


# -- data on a server --------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path_factory):
    with Nbdkit(tmp_path_factory.mktemp("server"), "memory", str(4 * MIB)) as running:
        yield running


@pytest.mark.parametrize("compact", [False, True])
def test_an_unclean_image_with_its_data_on_a_server_is_mended(tmp_path, server, compact):
    path = tmp_path / "disk.fvd"
    create_image(path, CreateOptions(
        size=2 * MIB, data_file=server.uri, data_file_format="nbd", compact=compact,
        journal_size=65536 if compact else None,
    ))  # fmt: skip
    allow = (uris.parse_uri(server.uri).pattern,)
    opened = open_image(path, allow_uris=allow)
    opened.device.write(MIB, b"n" * 512)
    opened.device.flush()
    opened.abandon()
    before = path.read_bytes()
    with pytest.raises(UriNotAllowed):
        repair_image(path)
    assert path.read_bytes() == before
    assert repair_image(path, OpenOptions(allow_uris=allow), dry_run=True).actions
    assert path.read_bytes() == before
    done = repair_image(path, OpenOptions(allow_uris=allow))
    assert [action.code for action in done.actions] == ["replay"]
    assert done.exit_status == 0
    assert header_of(path).is_clean
    assert check_image(path, OpenOptions(allow_uris=allow)).exit_status == 0
    with contextlib.closing(open_image(path, allow_uris=allow)) as again:
        assert again.device.read(MIB, 512) == b"n" * 512


def test_a_server_that_is_away_leaves_all_as_it_was(tmp_path, server):
    path = tmp_path / "disk.fvd"
    create_image(path, CreateOptions(size=2 * MIB, data_file=server.uri, data_file_format="nbd"))
    poke(path, 0, replace(header_of(path), clean_shutdown=0).pack())
    before = path.read_bytes()
    server.kill()
    allow = OpenOptions(allow_uris=(uris.parse_uri(server.uri).pattern,))
    with pytest.raises(DataServerUnreachable):
        repair_image(path, allow)
    assert path.read_bytes() == before
