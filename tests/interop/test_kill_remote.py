# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the server while a remote base is copied by prefetch and by reads, beside writes.

Each round works on what the last kill left, and judges by a server that copies nothing: so the
copying goes on over many kills, until the clone is complete and a new one takes its place. The
server of the base dies now and then as well. FVD_REMOTE_KILLS sets the number of kills.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from fvdengine.create import create_image
from fvdengine.options import CreateOptions
from fvdtest.model import KIB, MIB, FlatModel
from fvdtest.nbd_client import Closed, NbdClient
from fvdtest.remote import Nbdkit
from fvdtest.serve import FVDCTL, Server
from fvdtest.tools import run

from .test_kill import WRITERS, History, Writer, read_all

BASE_SIZE = 12 * MIB + 512
IMAGE_SIZE = 16 * MIB
KILLS = int(os.environ.get("FVD_REMOTE_KILLS", "4"))
RATE_KIB = 4096  # of prefetch: a clone lasts a few kills


def read_until_closed(uri: str, seed: int) -> None:
    """Read here and there, which copies; what is read is judged after the kill."""
    rng = random.Random(seed)
    try:
        with NbdClient.attach(uri) as client:
            while True:
                length = rng.choice([512, 4 * KIB, 64 * KIB, 200 * KIB])
                client.read(rng.randrange((IMAGE_SIZE - length) // 512) * 512, length)
    except Closed:
        pass


class Work:
    """Writers and a reader on a server, until it is killed."""

    def __init__(self, server: Server, history: History, rng: random.Random) -> None:
        self.writers = [
            Writer(number, server.uri, history, rng.getrandbits(64), IMAGE_SIZE)
            for number in range(WRITERS)
        ]
        reader = threading.Thread(target=read_until_closed, args=(server.uri, rng.getrandbits(64)))
        self.threads: list[threading.Thread] = [*self.writers, reader]
        for thread in self.threads:
            thread.start()

    def end(self) -> int:
        """The writes that were answered."""
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive(), "a client hangs on a dead connection"
        assert [writer.error for writer in self.writers] == [None] * WRITERS
        return sum(writer.count for writer in self.writers)


def local_bytes(image: Path, uri: str) -> int:
    """What `check` counts as local; it fails where something is wrong."""
    said = run(*FVDCTL, "check", image, "--allow-uri", uri)
    return 4 * KIB * int(next(line for line in said.splitlines() if "are local" in line).split()[0])


@pytest.mark.proof
@pytest.mark.timeout(KILLS * 20 + 120)
def test_no_byte_is_wrong_after_kills_beside_a_remote_base(
    tmp_path: Path, rng: random.Random
) -> None:
    content = rng.randbytes(BASE_SIZE - 2 * MIB) + bytes(2 * MIB)
    (tmp_path / "base.raw").write_bytes(content)
    written = amid = 0
    image, history = tmp_path / "none", History(FlatModel(IMAGE_SIZE, content))
    (tmp_path / "far").mkdir()
    with Nbdkit(tmp_path / "far", "file", tmp_path / "base.raw") as base:
        options = ("--allow-uri", base.uri, "--state", str(tmp_path / "state"))
        copying = ("--copy-on-read", "--fetch-size", "64K", "--prefetch-delay", "0")
        for number in range(KILLS):
            if not image.exists() or local_bytes(image, base.uri) >= BASE_SIZE:
                image.unlink(missing_ok=True)
                image = tmp_path / f"clone{number}.fvd"
                create_image(
                    image, CreateOptions(
                        size=IMAGE_SIZE, base=base.uri, prefetch_min_read_kb=0,
                        prefetch_max_read_kb=RATE_KIB,
                    ),
                )  # fmt: skip
                history = History(FlatModel(IMAGE_SIZE, content))
            server = Server(image, *options, *copying, directory=tmp_path)
            work = Work(server, history, rng)
            threading.Event().wait(rng.uniform(0.02, 0.5))
            if rng.random() < 0.3:
                base.kill()
                threading.Event().wait(rng.uniform(0.0, 0.1))
            server.kill()
            written += work.end()
            if base.process is None:
                base.start()
            with Server(image, *options, "--prefetch-delay", "off", directory=tmp_path) as judge:
                found = read_all(judge.uri, IMAGE_SIZE)
            history.settle_acknowledged()
            wrong = history.judge(found)
            assert wrong is None, f"after kill {number}: {wrong}"
            history = History(FlatModel(IMAGE_SIZE, found), flush_count=history.flush_count)
            amid += 0 < local_bytes(image, base.uri) < BASE_SIZE
        assert (tmp_path / "base.raw").read_bytes() == content
    assert written > KILLS * WRITERS, "the writers hardly came to write"
    assert amid, "no kill met a clone that was half copied"
