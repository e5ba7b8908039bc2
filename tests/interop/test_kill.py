# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the server at random moments: what was acknowledged, or flushed, is still there.

Writers on connections of their own note every write before it is sent and when it is answered.
The ranges of two of them lie interleaved inside the same blocks, so that they meet in
copy-on-write; no byte has two writers, so each byte has one history. After a kill and a restart
every byte is judged:

- with --state (I7): it has its last acknowledged value, or that of the one write in flight;
- without (I6): it has the value of the last acknowledged flush, or that of any later write.

What is found then is where the next round starts. FVD_KILL_ROUNDS sets the length of the long
form, which belongs to `make proof`.
"""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fvdtest.model import KIB, MIB, FlatModel, base_content
from fvdtest.nbd_client import Closed, NbdClient
from fvdtest.serve import FVDCTL, Server
from fvdtest.tools import run

from .conftest import create

BASE_SIZE = 40 * MIB + 512
IMAGE_SIZE = 48 * MIB
STRIPE = 1000
WRITERS = 4
ROUNDS = 3
LONG_ROUNDS = int(os.environ.get("FVD_KILL_ROUNDS", "150"))


@dataclass(slots=True)
class Write:
    """One write since the last flush; trims are left out, they leave content undefined."""

    offset: int
    data: bytes
    is_acknowledged: bool = False


@dataclass
class History:
    """What may be on the device. Writers share it under its lock."""

    flushed: FlatModel
    writes: list[Write] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    flush_count: int = 0

    def begin(self, offset: int, data: bytes) -> Write:
        write = Write(offset, data)
        with self.lock:
            self.writes.append(write)
        return write

    def acknowledged(self) -> list[Write]:
        with self.lock:
            return [write for write in self.writes if write.is_acknowledged]

    def flush_done(self, covered: list[Write]) -> None:
        """A flush that was sent when these writes had been answered has been answered."""
        done = {id(write) for write in covered}
        with self.lock:
            for write in self.writes:
                # Another writer's flush may have covered some of them before.
                if id(write) in done:
                    self.flushed.write(write.offset, write.data)
            self.writes = [write for write in self.writes if id(write) not in done]
            self.flush_count += 1

    def settle_acknowledged(self) -> None:
        """Under live state an acknowledged write is as good as a flushed one."""
        self.flush_done(self.acknowledged())

    def judge(self, found: bytes) -> str | None:
        """Say what is wrong with the content of the device; None when every byte may be so."""
        for start in range(0, len(found), 4096):
            piece = found[start : start + 4096]
            expected = self.flushed.read(start, len(piece))
            if piece != expected:
                wrong = self._judge_block(start, piece, expected)
                if wrong is not None:
                    return wrong
        return None

    def _judge_block(self, start: int, piece: bytes, expected: bytes) -> str | None:
        end = start + len(piece)
        pieces: list[tuple[int, bytes]] = []
        left = bytearray(piece)
        for write in self.writes:
            first, last = max(write.offset, start), min(write.offset + len(write.data), end)
            if first < last:
                data = write.data[first - write.offset : last - write.offset]
                pieces.append((first - start, data))
                # The usual case, and quick: the write is there as a whole.
                if piece[first - start : last - start] == data:
                    left[first - start : last - start] = expected[first - start : last - start]
        if left == expected:
            return None
        allowed = [{byte} for byte in expected]
        for at, data in pieces:
            for number, byte in enumerate(data):
                allowed[at + number].add(byte)
        for at, byte in enumerate(piece):
            if byte not in allowed[at]:
                return f"byte {start + at} is {byte:#04x}, allowed: {sorted(allowed[at])}"
        return None


class Writer(threading.Thread):
    """Writes into its own ranges until the connection ends."""

    def __init__(
        self, number: int, uri: str, history: History, seed: int, size: int = IMAGE_SIZE
    ) -> None:
        super().__init__()
        self._half = size // 2
        self._number = number
        self._client = NbdClient.attach(uri)
        self._history = history
        self._rng = random.Random(seed)
        self.count = 0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with self._client:
                while True:
                    self._step()
        except Closed:
            pass
        except Exception as error:
            self.error = error

    def _step(self) -> None:
        if self._rng.random() < 0.06:
            covered = self._history.acknowledged()
            self._client.flush()
            self._history.flush_done(covered)
            return
        offset, length = self._pick()
        kind = self._rng.random()
        data = bytes(length) if kind < 0.1 else self._rng.randbytes(length)
        write = self._history.begin(offset, data)
        if kind < 0.1:
            self._client.write_zeroes(offset, length, no_hole=kind < 0.05)
        else:
            self._client.write(offset, data, fua=kind > 0.97)
        write.is_acknowledged = True
        self.count += 1

    def _pick(self) -> tuple[int, int]:
        """Writers 0 and 1 share blocks in the first half, 2 and 3 have a quarter each."""
        half = self._half
        if self._number < 2:
            stripe = self._rng.randrange(half // STRIPE // 2 - 1) * 2 + self._number
            start = self._rng.randrange(STRIPE)
            return stripe * STRIPE + start, self._rng.randint(1, STRIPE - start)
        length = self._rng.choice([512, 4096, 5000, 64 * KIB, 200 * KIB])
        offset = self._rng.randrange(half // 2 - length)
        return half + (self._number - 2) * half // 2 + offset, length


def read_all(uri: str, size: int = IMAGE_SIZE) -> bytes:
    """The whole content of the device."""
    with NbdClient.attach(uri) as client:
        return b"".join(client.read(at, MIB) for at in range(0, size, MIB))


def write_until_killed(server: Server, history: History, rng: random.Random) -> int:
    """Let the writers work for a random time and kill the server; the writes answered."""
    writers = [Writer(i, server.uri, history, rng.getrandbits(64)) for i in range(WRITERS)]
    for writer in writers:
        writer.start()
    threading.Event().wait(rng.uniform(0.02, 0.5))
    server.kill()
    for writer in writers:
        writer.join(30)
        assert not writer.is_alive(), "a writer hangs on a dead connection"
        assert writer.error is None
    return sum(writer.count for writer in writers)


def kill_while_starting(image: Path, options: list[str], directory: Path, seconds: float) -> None:
    """Start a server and kill it so soon that it may not have begun to serve."""
    server = Server(image, *options, directory=directory, ready=False)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.status is None:
        time.sleep(0.002)
    server.kill()


def campaign(directory: Path, rng: random.Random, rounds: int, *, with_state: bool) -> None:
    """Write, kill, restart, judge, again and again; at the end all is well with the image."""
    base = directory / "base.raw"
    content = base_content(rng, BASE_SIZE)
    base.write_bytes(content)
    image = create(directory / "image.fvd", size=IMAGE_SIZE, base=str(base), base_format="raw")
    history = History(FlatModel(IMAGE_SIZE, content))
    state = ["--state", str(directory / "state")] if with_state else []
    written = 0
    for number in range(rounds):
        options = list(state)
        if rng.random() < 0.5:
            options += ["--copy-on-read", "--prefetch-delay", "0"]
        if rng.random() < 0.4:
            kill_while_starting(image, options, directory, rng.uniform(0.0, 0.6))
        with Server(image, *options, directory=directory) as server:
            found = read_all(server.uri)
            if with_state:
                history.settle_acknowledged()
            wrong = history.judge(found)
            assert wrong is None, f"after kill {number}: {wrong}"
            history = History(FlatModel(IMAGE_SIZE, found), flush_count=history.flush_count)
            written += write_until_killed(server, history, rng)
    with Server(image, *state, directory=directory) as server:
        if with_state:
            history.settle_acknowledged()
        found = read_all(server.uri)
        assert history.judge(found) is None
    run(*FVDCTL, "check", image)
    with Server(image, "-r", directory=directory) as server:
        assert read_all(server.uri) == found
    assert base.read_bytes() == content
    assert written > rounds * WRITERS, "the writers hardly came to write"
    assert history.flush_count > 0


def test_no_acknowledged_write_is_lost_with_live_state(tmp_path: Path, rng: random.Random) -> None:
    campaign(tmp_path, rng, ROUNDS, with_state=True)


def test_no_flushed_write_is_lost_without_live_state(tmp_path: Path, rng: random.Random) -> None:
    campaign(tmp_path, rng, ROUNDS, with_state=False)


@pytest.mark.proof
@pytest.mark.timeout(LONG_ROUNDS * 10 + 300)
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no state"])
def test_long_kill_campaign(tmp_path: Path, rng: random.Random, with_state: bool) -> None:
    campaign(tmp_path, rng, LONG_ROUNDS, with_state=with_state)


def test_judge_sees_a_lost_write() -> None:
    history = History(FlatModel(8192, b"\x01" * 8192))
    first = history.begin(100, b"\x02" * 50)
    first.is_acknowledged = True
    history.begin(200, b"\x03" * 50)
    new = bytearray(b"\x01" * 8192)
    new[200:225] = b"\x03" * 25
    assert history.judge(bytes(new)) is None, "unflushed, so it may be lost"
    history.settle_acknowledged()
    assert history.judge(bytes(new)) == "byte 100 is 0x01, allowed: [2]"
    new[100:150] = b"\x02" * 50
    assert history.judge(bytes(new)) is None
    new[8191] = 9
    assert history.judge(bytes(new)) == "byte 8191 is 0x09, allowed: [1]"
