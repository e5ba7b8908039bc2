# SPDX-License-Identifier: Apache-2.0
"""The data on a server as repair sees them: length, zeros, durability, and a clear refusal."""

import contextlib
import os

import pytest

from fvdengine.checkpoint import Files
from fvdengine.errors import DataServerUnreachable, InvalidUri
from fvdengine.server_file import ServerFile
from fvdtest.remote import Nbdkit

MIB = 1 << 20


@pytest.fixture
def content(tmp_path):
    path = tmp_path / "data.raw"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.fixture
def server(tmp_path, content):
    with Nbdkit(tmp_path, "file", content) as running:
        yield running


def test_what_is_asked_and_zeroed_reaches_the_server(server, content):
    file, before = ServerFile(server.uri), content.read_bytes()
    assert file.length() == MIB
    file.zero(5000, 100_000)
    file.flush()
    assert content.read_bytes() == before[:5000] + bytes(100_000) + before[105_000:]
    file.truncate(4096)
    file.reserve(0, MIB)
    assert file.length() == MIB, "it keeps its length"
    Files(file, file).flush()


def test_who_is_away_or_takes_no_writes_is_named(tmp_path, server):
    with contextlib.ExitStack() as stack:
        folder = tmp_path / "read-only"
        folder.mkdir()
        arguments = ("--readonly", "memory", str(MIB))
        fixed = stack.enter_context(Nbdkit(folder, *arguments))
        with pytest.raises(DataServerUnreachable, match="no writes"):
            ServerFile(fixed.uri).flush()
    file = ServerFile(server.uri)
    server.kill()
    for call in (file.length, file.flush, lambda: file.zero(0, 512)):
        with pytest.raises(DataServerUnreachable):
            call()
    with pytest.raises(InvalidUri):
        ServerFile("no uri")
