# SPDX-License-Identifier: Apache-2.0
"""What metrics cost: instructions a request, counted by callgrind, with them and without.

The job is hit-rr-32: random reads of 4 KiB, all local, 32 at a time, over a socket, to a process
that serves one compact image and nothing else; it is counted from when it is warm until the last
answer. "Without" is the same engine with everything that counts, times or tallies taken out of its
source, compiled in the same way. Instructions of the kernel are not counted, so of the whole
metrics are a smaller part still. A trace is no part of it, off as it is.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fvdtest import tree
from fvdtest.images import make_image, open_image

ENGINE = tree.ROOT / "cython/fvdcore"
OUTPUT = tree.ROOT / "build/without-metrics"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
PLACES = tuple(str(tree.ROOT / name) for name in ("cython", "daemon", "tests/lib", ""))
MODULES = ("nbd_loop", "nbd_send")  # all that counts on the way of a local read
DEPTH = 32
SIZE = 16 << 20
PIECE = 4096
WARM, COUNTED = 20, 300
SCRAPES = 4
SCRAPE_PERIOD_SECONDS = 15
REQUESTS_PER_SECOND = 100_000  # a machine at rest makes more, so that scrapes weigh less
LIMIT_SECONDS = 240

SERVER = """
import select, sys
from fvdd.worker.metrics_server import Served, new_page, render
from fvdtest.images import open_image
image, fd = sys.argv[1], int(sys.argv[2])
page = new_page()
opened = open_image(image, stats_fd=page)
served = Served(image, "", "", page)
render(served, openmetrics=False)
opened.device.serve(fd)
print("ready", flush=True)
for line in sys.stdin:
    render(served, openmetrics=False)
    print("scraped", flush=True)
opened.close()
"""

# (module, text that stands there once, what replaces it): all that counts, tallies and times.
WITHOUT = (
    ("counters.pxd", "    fetch_add_relaxed(b + slot, n)\n", "    pass\n"),
    ("counters.pxd", "    store_relaxed(b + slot, ns)\n", "    pass\n"),
    ("counters.pxd", "    t.reads += (<uint64_t>1 << TALLY_SHIFT) + length\n", "    pass\n"),
    ("counters.pxd", "    t.writes += (<uint64_t>1 << TALLY_SHIFT) + length\n", "    pass\n"),
    ("counters.pxd", "    if zeros or from_base:\n", "    if 0:\n"),
    ("nbd_send.pyx", "    tally_count(&c.tally, c.counters, c.begin_ns, c.device.gate)\n", ""),
    ("nbd_loop.pyx", "    c.begin_ns = clock_now(c.device.gate)\n", ""),
)  # fmt: skip


class CostError(Exception):
    """The engine's source changed, or a run failed; the message says how."""


@dataclass(frozen=True)
class Cost:
    """Instructions: of a request with metrics and without, and of a scrape of one device."""

    with_metrics: float
    without_metrics: float
    scrape: float

    @property
    def more(self) -> float:
        """By which part a request costs more with metrics and scrapes."""
        scraping = self.scrape / (REQUESTS_PER_SECOND * SCRAPE_PERIOD_SECONDS)
        return (self.with_metrics + scraping) / self.without_metrics - 1

    def text(self) -> str:
        return (
            f"{self.with_metrics:.1f} instructions a request with metrics, "
            f"{self.without_metrics:.1f} without, {self.scrape:.0f} a scrape: "
            f"{self.more * 100:+.1f} % at {REQUESTS_PER_SECOND} requests/s"
        )


def run(words: list[str | Path]) -> None:
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=LIMIT_SECONDS,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise CostError(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


def take_out(target: Path) -> None:
    """Copy the engine there and take its metrics out of the source."""
    for path in ENGINE.iterdir():
        if path.suffix in (".so", ".py", ".pyx", ".pxd", ".h"):
            shutil.copy(path, target / path.name)
    for name, old, new in WITHOUT:
        text = (target / name).read_text()
        if text.count(old) != 1:
            raise CostError(f"{name} has {text.count(old)} times {old!r}")
        (target / name).write_text(text.replace(old, new))


def compile_one(target: Path, module: str) -> None:
    flags = f"{sysconfig.get_config_var('CFLAGS')} -fPIC -shared -w".split()
    generated = target / f"{module}.c"
    run([sys.executable, "-P", "-m", "cython", "-3", "-I", target.parent, target / f"{module}.pyx",
         "-o", generated])  # fmt: skip
    run(["gcc", *flags, f"-I{sysconfig.get_path('include')}", f"-I{target}", generated,
         "-o", target / f"{module}{SUFFIX}"])  # fmt: skip


def build_without() -> Path:
    """A folder for PYTHONPATH whose fvdcore counts nothing; made anew when the engine changed."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(ENGINE.iterdir()):
        if path.suffix in (".pyx", ".pxd", ".h", ".so"):
            digest.update(path.name.encode() + path.read_bytes())
    stamp = OUTPUT / "digest"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return OUTPUT
    shutil.rmtree(OUTPUT, ignore_errors=True)
    target = OUTPUT / "fvdcore"
    target.mkdir(parents=True)
    take_out(target)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda module: compile_one(target, module), MODULES))
    stamp.write_text(digest.hexdigest())
    return OUTPUT


def ask(sock: socket.socket, batches: int) -> None:
    """So many batches of reads at random places."""
    rng = random.Random(1)
    answer = DEPTH * (16 + PIECE)
    buffer = bytearray(answer)
    for batch in range(batches):
        places = (rng.randrange(SIZE // PIECE) * PIECE for _ in range(DEPTH))
        sock.sendall(b"".join(
            struct.pack(">IHHQQI", 0x25609513, 0, 0, batch * DEPTH + n, place, PIECE)
            for n, place in enumerate(places)
        ))  # fmt: skip
        have, view = 0, memoryview(buffer)
        while have < answer:
            got = sock.recv_into(view[have:])
            if not got:
                raise CostError("the server closed the connection")
            have += got


class Bench:
    """One image, served again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = make_image(folder / "image.fvd", size=SIZE, compact=True)
        with_data = open_image(self.image)
        for place in range(0, SIZE, 1 << 20):
            with_data.device.write(place, os.urandom(1 << 20))
        with_data.close()

    def start(self, out: Path, theirs: socket.socket, engine: Path | None) -> Server:
        places = ([str(engine)] if engine else []) + list(PLACES)
        words = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--dump-line=no",
                 f"--callgrind-out-file={out}"]  # fmt: skip
        words += [sys.executable, "-c", SERVER, str(self.image), str(theirs.fileno())]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()], text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONHASHSEED": "0"},
        )  # fmt: skip
        return Server(process)

    def count(self, *, engine: Path | None = None, scrapes: int = 0) -> float:
        """Instructions a request; with scrapes, those of one scrape."""
        out = self.folder / "callgrind.out"
        out.unlink(missing_ok=True)
        mine, theirs = socket.socketpair()
        with mine, theirs:
            mine.settimeout(LIMIT_SECONDS)
            server = self.start(out, theirs, engine)
            server.wait("ready")
            ask(mine, WARM)
            server.instrument("on")
            if scrapes:
                server.scrape(scrapes)
            else:
                ask(mine, COUNTED)
            server.instrument("off")
            server.end()
        found = re.search(r"^totals: (\d+)", out.read_text(), re.M)
        if found is None:
            raise CostError("callgrind counted nothing")
        return int(found[1]) / (scrapes or COUNTED * DEPTH)


class ChainBench(Bench):
    """A chain of so many images, read through all of them: only the lowest has data."""

    def __init__(self, folder: Path, images: int) -> None:
        super().__init__(folder)
        for level in range(1, images):
            self.image = make_image(folder / f"{level}.fvd", base=str(self.image),
                                    base_format="fvd")  # fmt: skip


class Server:
    """A process that serves, and scrapes itself when it is told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def wait(self, word: str) -> None:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], LIMIT_SECONDS)
        if not readable or self.process.stdout.readline().strip() != word:
            self.process.kill()
            raise CostError(self.process.communicate()[1])

    def scrape(self, times: int) -> None:
        assert self.process.stdin is not None
        for _ in range(times):
            self.process.stdin.write("scrape\n")
            self.process.stdin.flush()
            self.wait("scraped")

    def instrument(self, state: str) -> None:
        run(["callgrind_control", "-i", state, str(self.process.pid)])

    def end(self) -> None:
        said = self.process.communicate(timeout=LIMIT_SECONDS)[1]
        if self.process.returncode:
            raise CostError(said)


def measure_chains(folder: Path, *images: int) -> list[float]:
    """Instructions a request of chains of so many images, with metrics."""
    benches = []
    for number in images:
        (folder / str(number)).mkdir()
        benches.append(ChainBench(folder / str(number), number))
    with ThreadPoolExecutor(len(benches)) as pool:
        return list(pool.map(lambda bench: bench.count(), benches))


def measure(folder: Path) -> Cost:
    """Build what is missing and measure."""
    without = build_without()
    benches = []
    for name in ("with", "without", "scrape"):
        (folder / name).mkdir()
        benches.append(Bench(folder / name))
    with ThreadPoolExecutor(len(benches)) as pool:
        with_metrics = pool.submit(benches[0].count)
        without_metrics = pool.submit(benches[1].count, engine=without)
        scrape = pool.submit(benches[2].count, scrapes=SCRAPES)
        return Cost(with_metrics.result(), without_metrics.result(), scrape.result())
