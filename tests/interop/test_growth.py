# SPDX-License-Identifier: Apache-2.0
"""`fvdctl serve` of a compact image on a block device that a script makes longer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvdtest.nbd_client import NbdError
from fvdtest.serve import Server, refused

from .conftest import create
from .test_serve_metrics import scrape

MIB = 1 << 20
CHUNK = MIB


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device of 4 MiB; its file is `store` in the same directory as everything."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("loop devices need root and losetup")
    (tmp_path / "store").write_bytes(b"\xaa" * (4 * MIB))
    done = subprocess.run(
        ["losetup", "--find", "--show", str(tmp_path / "store")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip(f"no loop device here: {done.stderr.strip()}")
    node = Path(done.stdout.strip())
    create(
        node, size=256 * MIB, compact=True, chunk_size=CHUNK, storage_grow_unit=8 * MIB,
        journal_size=65536, force=True,
    )  # fmt: skip
    yield node
    subprocess.run(["losetup", "--detach", str(node)], check=True)


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "script"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_program_makes_room_for_what_is_written(tmp_path: Path, device: Path) -> None:
    program = script(
        tmp_path, f'echo "$1 $2" >>{tmp_path}/record\n'
        f'truncate -s +"$1" {tmp_path}/store && losetup -c "$2"',
    )  # fmt: skip
    with (
        Server(
            device, f"--grow-program={program}", "--metrics=127.0.0.1:0", directory=tmp_path
        ) as server,
        server.connect() as client,
    ):
        for at in range(32):
            client.write(at * CHUNK, bytes([at + 1]) * CHUNK)
        client.flush()
        assert all(client.read(at * CHUNK, 1) == bytes([at + 1]) for at in range(32))
        assert client.read(40 * CHUNK, CHUNK) == bytes(CHUNK)
        found = rooms(server)
        assert found["size_bytes"] == (tmp_path / "store").stat().st_size
        assert 32 * CHUNK < found["allocated_bytes"] < 34 * CHUNK
        assert "avail_bytes" not in found, "it has what the program can find, which nobody knows"
    assert set((tmp_path / "record").read_text().splitlines()) == {f"{8 * MIB} {device}"}


def rooms(server: Server) -> dict[str, float]:
    """What the metrics say about the store."""
    text = scrape(server)
    return {
        word: float(value)
        for word, value in re.findall(r"^fvd_(?:backing_store|image)_"
                                      r"((?:size|avail|allocated)_bytes){.*} (.*)$", text, re.M)
    }  # fmt: skip


def test_a_block_device_is_measured_by_what_the_image_uses(tmp_path: Path, device: Path) -> None:
    with (
        Server(device, "--metrics=127.0.0.1:0", directory=tmp_path) as server,
        server.connect() as client,
    ):
        before = rooms(server)
        client.write(0, b"x" * CHUNK)
        after = rooms(server)
    assert before["size_bytes"] == 4 * MIB == before["avail_bytes"] + before["allocated_bytes"]
    assert after["allocated_bytes"] == before["allocated_bytes"] + CHUNK
    assert after["avail_bytes"] == before["avail_bytes"] - CHUNK


def test_write_fails_when_the_program_does(tmp_path: Path, device: Path) -> None:
    program = script(tmp_path, f"echo x >>{tmp_path}/record\nexit 1")
    server = Server(device, f"--grow-program={program}", directory=tmp_path)
    with server.connect() as client:
        client.write(0, b"kept")
        for _ in range(2):
            with pytest.raises(NbdError) as full:
                client.write(CHUNK, b"x" * (8 * CHUNK))
            assert full.value.errno == 28
        assert client.read(0, 4) == b"kept"
    server.signal(15)
    assert server.wait() == 0
    # Not asked again so soon.
    assert (tmp_path / "record").read_text() == "x\n"


def test_program_that_is_none_is_refused(tmp_path: Path) -> None:
    image = create(tmp_path / "disk.fvd", size=MIB)
    for name in (tmp_path / "none", tmp_path, image):
        options = ("--socket", str(tmp_path / "sock"), "--grow-program", str(name))
        assert "is no program" in refused(image, *options)
