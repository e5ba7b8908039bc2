# SPDX-License-Identifier: Apache-2.0
"""Where images are made and servers run: one folder on disk, one in memory, nothing left behind."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fvdtest import tree
from fvdtest.bench import clients
from fvdtest.bench.kinds import Kind

START_SECONDS = 60.0
STOP_SECONDS = 120.0
PIECE = 64 << 20
MIB = 1 << 20
# Of a base too large to be filled: so much of random bytes, once in so many.
SPARSE_PIECE, SPARSE_STEP = MIB, 64 * MIB
DENSE_MAX = 4 << 30
SOURCES = ("cython", "daemon", "tests/lib", ".")
FIXTURES = tree.ROOT / "tests/fixtures"


class StandError(Exception):
    """An image could not be made, or a server did not start; the message has its words."""


def environment() -> dict[str, str]:
    """For our own programs, which lie in the tree; a build that comes first stays the first."""
    told = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [*filter(None, told), *(str(tree.ROOT / name) for name in SOURCES)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class Server:
    """A running server, known by its process and its socket."""

    def __init__(self, words: list[str], socket_path: Path, log: Path, pinned: bool) -> None:
        self.socket_path = str(socket_path)
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                ["taskset", "-c", "0", *words] if pinned else words,
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment(),
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text()

    def wait_ready(self) -> None:
        """Until it takes a connection."""
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise StandError(f"{self._process.args!r}\n{self._log.read_text()[-2000:]}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(self.socket_path)
                return len(probe.recv(8)) == 8
            except OSError:
                return False

    def kill(self) -> None:
        """At once: what was written need not reach the disk."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Cleanly, for images that are used again."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise StandError(f"{self._process.args!r} did not end") from None


class Stand:
    """Images and servers below one folder; all of it is removed at the end."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix="bench-", dir=directory))
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._memory = Path(tempfile.mkdtemp(prefix="fvd-bench-", dir=memory))
        self._number = 0

    def __enter__(self) -> Stand:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self._memory, ignore_errors=True)

    @property
    def memory(self) -> Path:
        """The folder in memory."""
        return self._memory

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.directory).free

    def new_name(self, stem: str) -> Path:
        self._number += 1
        return self.directory / f"{stem}-{self._number}"

    def random_file(self, size: int) -> Path:
        """A file of random bytes, made once; above DENSE_MAX in places only, but all over it."""
        path = self.directory / f"random-{size}.raw"
        if path.exists():
            return path
        block = os.urandom(min(size, PIECE))
        piece, step = (SPARSE_PIECE, SPARSE_STEP) if size > DENSE_MAX else (PIECE, PIECE)
        with path.open("wb") as file:
            file.truncate(size)
            for at in range(0, size, step):
                file.seek(at)
                file.write(block[: min(piece, size - at)])
        return path

    def unpacked(self, fixture: str) -> Path:
        """A packed file of tests/fixtures, unpacked once."""
        path = self.directory / fixture.removesuffix(".gz")
        if not path.exists():
            path.write_bytes(gzip.decompress((FIXTURES / fixture).read_bytes()))
        return path

    def _run(self, words: list[str]) -> None:
        done = subprocess.run(
            words, capture_output=True, text=True, env=environment(), check=False
        )
        if done.returncode:
            raise StandError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")

    def _make(self, steps: tuple[tuple[str, ...], ...], path: Path, **values: object) -> Path:
        places = {"image": path, "hole": f"{path}.hole", **values}
        for words in steps:
            self._run([word.format(**places) for word in words])
        return path

    def empty(self, kind: Kind, size: int) -> Path:
        """An image of which nothing is written."""
        return self._make(kind.make, self.new_name(kind.name).with_suffix(kind.suffix), size=size)

    def clone(self, kind: Kind, base: Path, base_format: str = "raw") -> Path:
        """An image that begins as the content of a base."""
        path = self.new_name(kind.name).with_suffix(kind.suffix)
        return self._make(kind.clone, path, base=base, base_format=base_format)

    def chain(self, kind: Kind, base: Path, depth: int) -> Path:
        """A clone of a clone of ..., the last of which is a clone of base."""
        path, base_format = base, "raw"
        for _ in range(depth):
            path = self.clone(kind, path, base_format)
            base_format = kind.own
        return path

    def local(self, kind: Kind, size: int) -> Path:
        """An image of which the first `size` bytes are written, made once; there is a little more
        of it, so that a clone keeps its bitmap."""
        path = self.directory / f"local-{kind.shares or kind.name}-{size}{kind.suffix}"
        if path.exists():
            return path
        self._make(kind.make, path, size=size + 16 * MIB)
        with self.running(kind, path, size) as server:
            clients.fill(server.socket_path, str(self.random_file(size)))
        return path

    @contextmanager
    def running(
        self, kind: Kind, image: Path, size: int, *, throwaway: bool = False, pinned: bool = False
    ) -> Iterator[Server]:
        """A server of the image; throwaway: killed at the end, the image being done with."""
        self._number += 1
        where = self.directory / f"s{self._number}"
        state = self._memory / f"state{self._number}"
        state.mkdir()
        places = {"image": image, "socket": where, "state": state, "size": size}
        words = [word.format(**places) for word in kind.serve]
        server = Server(words, where, self.directory / f"s{self._number}.log", pinned)
        try:
            server.wait_ready()
            yield server
        except BaseException:
            server.kill()
            raise
        else:
            server.kill() if throwaway else server.stop()
        finally:
            shutil.rmtree(state, ignore_errors=True)

    def discard(self, image: Path) -> None:
        """Remove an image and what was made beside it."""
        for path in self.directory.glob(image.name + "*"):
            path.unlink()
