# SPDX-License-Identifier: Apache-2.0
"""Jobs that no client command makes: what opening and creating cost, how fast prefetch is.

Each gives rows against a limit, of which the ratio has to be 1 at least (prefetch: 0.95).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from fvdtest.bench.figures import Row
from fvdtest.bench.kinds import FVDCTL, KINDS, Kind
from fvdtest.bench.limits import against_limit
from fvdtest.bench.programs import run
from fvdtest.bench.stand import Stand, StandError

TIB = 1 << 40
MIB = 1 << 20
OPEN_SECONDS, OPEN_ROOM = 0.2, 32 * MIB
CREATE_SECONDS = 1.0  # nobody's target: most of it is Python's start
LINK_BYTES_PER_SECOND = 64 * MIB
PREFETCH_BYTES = 256 * MIB
PREFETCH_SECONDS = 60.0
EVENT = re.compile(r"^time=(\S+) .*event=prefetch state=(\w+)", re.M)

# Says: seconds to open and read once, bytes that it took, bytes of metadata.
OPENING = """
import json, resource, sys, time
from fvdengine.opening import OpenOptions, open_device, open_plan
from fvdengine.chain import read_header
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
with open(sys.argv[1], "rb") as file:
    header = read_header(file.fileno(), sys.argv[1])
told = []
for turn in range(3):
    before, begin = resident(), time.perf_counter()
    with open_plan(sys.argv[1], OpenOptions()) as plan:
        device = open_device(plan)
    device.start()
    device.read(header.virtual_disk_size // 2, 4096)
    told.append((time.perf_counter() - begin, resident() - before))
    device.close()
seconds, grown = min(told)[0], max(grown for _, grown in told)
print(json.dumps([seconds, grown, header.bitmap_size + header.table_size]))
"""


def vast_image(folder: Path, size: int) -> tuple[Path, list[float]]:
    """A compact clone of a base that is one hole; how long each of three creations took."""
    base, image = folder / "base.raw", folder / "disk.fvd"
    with base.open("wb") as file:
        file.truncate(size)
    took = []
    for _ in range(3):
        image.unlink(missing_ok=True)
        begin = time.monotonic()
        run([*FVDCTL, "create", "-q", str(image), "--base", str(base), "--base-format", "raw",
             "--compact"])  # fmt: skip
        took.append(time.monotonic() - begin)
    return image, took


def created(took: list[float], name: str) -> Row:
    return against_limit(f"create-{name}", statistics.median(took), CREATE_SECONDS, "s",
                         wanted=None)  # fmt: skip


def create_1t(stand: Stand, quick: bool) -> list[Row]:
    """Nothing but creating it."""
    with tempfile.TemporaryDirectory(dir=stand.memory) as folder:
        return [created(vast_image(Path(folder), TIB)[1], "1T")]


def open_1t(stand: Stand, quick: bool) -> list[Row]:
    return opened(stand, TIB, "1T")


def open_16t(stand: Stand, quick: bool) -> list[Row]:
    return opened(stand, 16 * TIB, "16T")


def opened(stand: Stand, size: int, name: str) -> list[Row]:
    """In memory, so that the metadata are in the page cache, and files may be so long."""
    with tempfile.TemporaryDirectory(dir=stand.memory) as folder:
        image, _ = vast_image(Path(folder), size)
        words = [sys.executable, "-P", "-c", OPENING, str(image)]
        seconds, grown, metadata = json.loads(run(words))
    return [
        against_limit(f"open-{name}", seconds, OPEN_SECONDS, "s"),
        against_limit(f"open-{name}-memory", grown / MIB, (metadata + OPEN_ROOM) / MIB, "MiB"),
    ]


def moments(log: str) -> dict[str, float]:
    """When prefetch entered each of its states."""
    return {
        state: datetime.fromisoformat(at.replace("Z", "+00:00")).timestamp()
        for at, state in EVENT.findall(log)
    }


def prefetch_idle(stand: Stand, quick: bool) -> list[Row]:
    """A full copy of a base over a link that takes so much a second."""
    base = stand.random_file(PREFETCH_BYTES)
    link = Kind(
        "link", ".raw",
        ("nbdkit", "-f", "-U", "{socket}", "--filter=rate", "file", "{image}",
         f"rate={8 * LINK_BYTES_PER_SECOND}"),
    )  # fmt: skip
    image = stand.new_name("prefetch").with_suffix(".fvd")
    with stand.running(link, base, PREFETCH_BYTES) as server:
        allowed = ("--allow-uri", f"nbd+unix://{server.socket_path}")
        ours_kind = replace(KINDS["fvd-clone"], serve=(*KINDS["fvd-clone"].serve, *allowed))
        uri = f"nbd+unix:///?socket={server.socket_path}"
        run([*FVDCTL, "create", "-q", str(image), "--base", uri, "--base-format", "raw",
             *allowed, "--prefetch-delay", "0", "--prefetch-min-read", "0",
             "--prefetch-min-write", "0"])  # fmt: skip
        begin = time.time()
        with stand.running(ours_kind, image, PREFETCH_BYTES, throwaway=True) as ours:
            deadline = time.monotonic() + PREFETCH_SECONDS
            while "done" not in moments(ours.log) and time.monotonic() < deadline:
                time.sleep(0.05)
            seen = moments(ours.log)
    stand.discard(image)
    if "done" not in seen:
        raise StandError(f"prefetch was not done within {PREFETCH_SECONDS:g} s: {seen}")
    rate = PREFETCH_BYTES / (seen["done"] - max(begin, seen.get("running", begin)))
    return [against_limit("prefetch-idle", rate, LINK_BYTES_PER_SECOND, "B/s", least=True,
                          wanted=0.95)]  # fmt: skip
