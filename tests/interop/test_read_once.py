# SPDX-License-Identifier: Apache-2.0
"""What was copied from a base is never asked of it again: not by the same reads, not by a prefetch
that goes on after a restart. The base counts for itself."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdengine.create import create_image
from fvdengine.options import CreateOptions
from fvdtest.daemon import fvdctl, wait_until
from fvdtest.model import KIB, MIB
from fvdtest.nbd_client import NbdClient
from fvdtest.remote import HAS_FLAGS, MULTI_CONN, READ_ONLY, Liar, simple_reply
from fvdtest.serve import Server

SIZE = 8 * MIB + 512
BLOCK = 4 * KIB
READ = 0
NO_PREFETCH = ("--prefetch-delay", "off")


@pytest.fixture
def content() -> bytes:
    return os.urandom(SIZE - MIB) + bytes(MIB)


@pytest.fixture
def base(tmp_path: Path, content: bytes) -> Iterator[Liar]:
    """A server that keeps account of what it is asked."""

    def answer(sock: socket.socket, kind: int, cookie: int, offset: int, length: int) -> bool:
        simple_reply(sock, cookie, content[offset : offset + length])
        return True

    server = Liar(tmp_path, answer, export=(SIZE, HAS_FLAGS | READ_ONLY | MULTI_CONN))
    yield server
    server.close()


def asked(base: Liar) -> list[tuple[int, int]]:
    return [(offset, length) for kind, offset, length in base.requests if kind == READ]


def same_reads(server: Server, content: bytes) -> None:
    """A stream, and reads here and there of any size and alignment: the same each time."""
    rng = random.Random(9)
    with server.connect() as client:
        for at in range(0, 2 * MIB, 64 * KIB):
            check_read(client, content, at, 64 * KIB)
        for length in (512, BLOCK, 3 * KIB, 5 * BLOCK + 512, 200 * KIB) * 30:
            check_read(client, content, rng.randrange((SIZE - length) // 512) * 512, length)
        check_read(client, content, SIZE - 512, 512)
        client.flush()  # behind the copies, which follow the replies


def check_read(client: NbdClient, content: bytes, offset: int, length: int) -> None:
    assert client.read(offset, length) == content[offset : offset + length]


@pytest.mark.parametrize("fetch_size", ["0", "128K"])
@pytest.mark.parametrize("shape", [{}, {"compact": True}])
def test_a_second_pass_of_the_same_reads_asks_a_server_for_nothing(
    tmp_path: Path, base: Liar, content: bytes, fetch_size: str, shape: dict[str, bool]
) -> None:
    image = tmp_path / "clone.fvd"
    create_image(image, CreateOptions(base=base.uri, **shape))
    options = ("--allow-uri", base.uri, "--copy-on-read", "--fetch-size", fetch_size, *NO_PREFETCH)
    with Server(image, *options, directory=tmp_path) as server:
        same_reads(server, content)
        first = asked(base)
        assert MIB < sum(length for _, length in first) <= SIZE
        same_reads(server, content)
        assert asked(base) == first
    with Server(image, *options, directory=tmp_path) as server:  # and what was kept is durable
        same_reads(server, content)
    assert asked(base) == first


def test_a_second_pass_of_the_same_reads_takes_nothing_of_a_file(
    tmp_path: Path, content: bytes
) -> None:
    """The file holds something else by then, which would be seen."""
    (tmp_path / "base.raw").write_bytes(content)
    image = tmp_path / "clone.fvd"
    create_image(image, CreateOptions(base=str(tmp_path / "base.raw"), base_format="raw"))
    with Server(image, "--copy-on-read", *NO_PREFETCH, directory=tmp_path) as server:
        same_reads(server, content)
        with (tmp_path / "base.raw").open("r+b") as file:
            file.write(b"other than before!" * (SIZE // 18))
        same_reads(server, content)


def local_parts(image: Path, uri: str) -> list[tuple[int, int]]:
    """What lies in the image or is known to be zeros there."""
    said = json.loads(fvdctl("map", image, "--json", "--allow-uri", uri).stdout)
    return [(one["start"], one["length"]) for one in said if not one["kind"].startswith("base")]


def test_a_prefetch_goes_on_where_it_was(tmp_path: Path, base: Liar, content: bytes) -> None:
    image = tmp_path / "clone.fvd"
    create_image(
        image, CreateOptions(
            base=base.uri, bytes_per_prefetch=64 * KIB, prefetch_min_read_kb=0,
            prefetch_max_read_kb=2048,
        ),
    )  # fmt: skip
    options = ("--allow-uri", base.uri, "--prefetch-delay", "0", "--prefetch-policy", "fixed")
    with Server(image, *options, directory=tmp_path):
        wait_until(lambda: len(asked(base)) > 20, "a part of it")
    local = local_parts(image, base.uri)
    kept = sum(length for _, length in local)
    assert 8 * 64 * KIB <= kept < SIZE
    before = len(asked(base))
    fvdctl("update", image, "prefetch_max_read_throughput=1000000000")
    with Server(image, *options, directory=tmp_path) as server:
        wait_until(lambda: "done" in server.log, "prefetch to end")
        again = asked(base)[before:]
        assert sum(length for _, length in again) == SIZE - kept
        for offset, length in again:
            assert not any(at < offset + length and offset < at + size for at, size in local)
        with server.connect() as client:
            check_read(client, content, 0, SIZE)
