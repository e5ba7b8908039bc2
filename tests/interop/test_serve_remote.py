# SPDX-License-Identifier: Apache-2.0
"""`fvdctl serve` over a remote base: it copies, it records, and what is local outlives the base."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdd.worker.opened import OpenedImage, OpenRequest
from fvdengine.create import create_image
from fvdengine.options import CreateOptions
from fvdengine.profile import read_profile
from fvdtest.daemon import wait_until
from fvdtest.model import KIB, MIB
from fvdtest.remote import Nbdkit
from fvdtest.serve import Server, refused

SIZE = 4 * MIB
BLOCK = 4 * KIB


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    data = os.urandom(SIZE)
    (tmp_path / "base.raw").write_bytes(data)
    return data


@pytest.fixture
def base(tmp_path: Path, content: bytes) -> Iterator[Nbdkit]:
    (tmp_path / "far").mkdir()
    with Nbdkit(tmp_path / "far", "file", tmp_path / "base.raw") as running:
        yield running


@pytest.fixture
def image(tmp_path: Path, base: Nbdkit) -> Path:
    path = tmp_path / "clone.fvd"
    create_image(path, CreateOptions(base=base.uri))
    return path


def serve(image: Path, base: Nbdkit, *options: str) -> Server:
    return Server(image, "--allow-uri", base.uri, *options, directory=image.parent)


def test_reads_are_kept_in_windows_and_recorded(
    image: Path, base: Nbdkit, content: bytes, tmp_path: Path
) -> None:
    profile = tmp_path / "boot.profile"
    options = ("--copy-on-read", "--fetch-size", "64K", "--profile", "record", str(profile))
    with serve(image, base, *options) as server, server.connect() as client:
        assert client.read(3 * MIB + BLOCK, BLOCK) == content[3 * MIB + BLOCK :][:BLOCK]
        assert client.read(0, 512) == content[:512]
        client.flush()  # behind the copies, which follow the replies
        base.kill()
        assert client.read(3 * MIB, 64 * KIB) == content[3 * MIB :][: 64 * KIB]
    assert read_profile(profile) == [(3 * MIB, 64 * KIB), (0, 64 * KIB)]


@pytest.mark.parametrize("policy", ["polite", "eager"])
def test_prefetch_ends_and_the_base_may_go(
    image: Path, base: Nbdkit, content: bytes, policy: str, tmp_path: Path
) -> None:
    order = tmp_path / "order"
    order.write_text("fvd-profile 1\n2097152 65536\n")
    options = ("--prefetch-delay", "0", "--prefetch-policy", policy)
    with serve(image, base, *options, "--profile", "replay", str(order)) as server:
        wait_until(lambda: "done" in server.log, "prefetch to end")
        base.kill()
        with server.connect() as client:
            assert client.read(0, SIZE) == content
    with Server(image, directory=tmp_path) as server, server.connect() as client:
        assert client.read(0, SIZE) == content


@pytest.mark.parametrize("text", ["fvd-profile 1\n2097152 65536\n", "dear diary\n"])
def test_a_profile_beside_the_base_is_followed_and_a_wrong_one_told(
    tmp_path: Path, text: str
) -> None:
    """What it names is local long before a slow prefetch would have come there."""
    (tmp_path / "base.raw").write_bytes(os.urandom(SIZE))
    (tmp_path / "base.raw.profile").write_text(text)
    image = tmp_path / "clone.fvd"
    create_image(
        image, CreateOptions(
            base=str(tmp_path / "base.raw"), prefetch_min_read_kb=0, prefetch_max_read_kb=16
        ),
    )  # fmt: skip
    opened = OpenedImage.open(OpenRequest(str(image), prefetch_delay=0))
    device = opened.device

    def is_local(offset: int) -> bool:
        return device.block_status(offset, BLOCK)[0][1] != "base"

    try:
        follows = text.startswith("fvd")
        wait_until(lambda: is_local(2 * MIB if follows else 0), "the first piece")
        assert not is_local(3 * MIB)
        assert any("cannot be used" in word for word in opened.plan.warnings) is not follows
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--profile", "replay", "none"), "boot profile"), (("--profile", "play", "x"), "play"),
        (("--fetch-size", "3M"), "fetch"), (("--prefetch-policy", "rude"), "rude"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    image: Path, base: Nbdkit, options: tuple[str, ...], word: str
) -> None:
    where = ("--socket", str(image.parent / "nbd.sock"), "--allow-uri", base.uri)
    assert word in refused(image, *where, *options)
