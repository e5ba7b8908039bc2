# SPDX-License-Identifier: Apache-2.0
"""Every moment of a disk's life: power cuts after each flush, and between two, by dm-log-writes.

The kernel logs what fvd wrote to the disk below an image. Here the disk is put together again as it
was at each flush, and with random sectors of what came after it; each time the image must have no
error and hold everything that was promised by then.
"""

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fvdengine.check import check_image
from fvdtest.images import open_image
from fvdtest.write_log import MARK, SECTOR, Entry, apply, read_log

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(__file__).with_name("run.py")
LOAD = Path(__file__).with_name("log_writes.py")
LIMIT_SECONDS = 250
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
IS_BUILT = os.access(CACHE / "fvd/uml/linux", os.X_OK)
HEAD = struct.Struct("<II")
BLOCK_SECTORS = 8
DISK_BYTES = 48 << 20
LOG_BYTES = 1 << 30
LEAKS = 3  # a chunk whose mapping the power cut took
TORN_OF = 4  # every so many flushes, also a state with sectors of what followed


@pytest.fixture
def logged(tmp_path, seed, request):
    """Run the load in a machine; the entries of the log, and the ledger."""
    disks = [tmp_path / "disk.img", tmp_path / "log.img"]
    for path, size in zip(disks, (DISK_BYTES, LOG_BYTES), strict=True):
        with path.open("wb") as file:
            file.truncate(size)
    folder = tmp_path / "outside"
    folder.mkdir()
    words = [
        "--kernel", "new", "--timeout", LIMIT_SECONDS, "--quiet",
        "--ubd", disks[0], "--ubd", disks[1], "--share", folder,
        "--env", f"PYTHONPATH={ROOT / 'tests/lib'}",
        "--", sys.executable, "-P", LOAD, request.param, seed, folder,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", RUNNER, *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=2 * LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    entries = list(read_log(disks[1]))
    final = bytearray(DISK_BYTES)
    for entry in entries:
        apply(final, entry)
    assert final == disks[0].read_bytes(), "the log is not all that was written"
    return folder, entries


class Ledger:
    """What was written at all, and what was promised at each mark."""

    def __init__(self, path: Path) -> None:
        self.issued: dict[int, set[int]] = {}
        self._order: dict[int, list[int]] = {}
        self._marks: dict[str, int] = {}
        for line in path.read_text().splitlines():
            words = line.split()
            if words[0] == "issued":
                self._order[int(words[1])] = [int(word) for word in words[2:]]
                for word in words[2:]:
                    self.issued.setdefault(int(word), {0}).add(int(words[1]))
            else:
                self._marks[words[1]] = int(words[2])

    def promised(self, mark: str) -> dict[int, int]:
        """The version that each block has at least."""
        last = max(self._order) if mark == "detached" else self._marks.get(mark, 0)
        return {
            number: version
            for version, blocks in sorted(self._order.items())
            if version <= last
            for number in blocks
        }


def verify(path: Path, ledger: Ledger, promised: dict[int, int], base: bool) -> None:
    """The image has no error, and every sector an admissible content."""
    before = check_image(path)
    assert before.exit_status in (0, LEAKS), before.findings
    opened = open_image(path, allow_dirs=("/",))
    try:
        for number in promised if not base else range(opened.device.size // 4096):
            data = opened.device.read(number * 4096, 4096)
            for at in range(BLOCK_SECTORS):
                sector = data[at * SECTOR : (at + 1) * SECTOR]
                place, version = HEAD.unpack_from(sector)
                if not base and not any(sector):
                    place, version = number * BLOCK_SECTORS + at, 0
                assert place == number * BLOCK_SECTORS + at
                assert version in ledger.issued.get(number, {0})
                assert version >= promised.get(number, 0), f"block {number} lost a synced write"
                assert version == 0 or len(set(sector[HEAD.size :])) == 1
    finally:
        opened.close()
    after = check_image(path)
    assert after.exit_status in (0, LEAKS), after.findings


def following(entries: list[Entry], at: int) -> list[Entry]:
    """The writes after the entry `at` that no flush has made sure of."""
    found = []
    for entry in entries[at + 1 :]:
        if entry.is_flush:
            break
        if not entry.flags & MARK:
            found.append(entry)
    return found


def torn(disk: bytearray, writes: list[Entry], rng: random.Random) -> bytearray:
    """The disk with random sectors of these writes."""
    made = bytearray(disk)
    for entry in writes:
        for start in range(0, len(entry.data), SECTOR):
            if rng.random() < 0.5:
                place = entry.offset + start
                made[place : place + SECTOR] = entry.data[start : start + SECTOR]
    return made


@pytest.mark.proof
@pytest.mark.skipif(not IS_BUILT, reason="Debian's kernel has no dm-log-writes; make uml-kernel")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("logged", ["plain", "compact", "clone"], indirect=True)
def test_every_prefix_up_to_a_flush_opens_and_keeps_what_was_promised(logged, tmp_path, rng):
    folder, entries = logged
    ledger = Ledger(folder / "ledger")
    base = (folder / "base.img").exists()
    disk = bytearray(DISK_BYTES)
    state = tmp_path / "state.img"
    promised: dict[int, int] | None = None
    states = 0
    for at, entry in enumerate(entries):
        apply(disk, entry)
        if entry.is_mark:
            promised = ledger.promised(entry.data.decode())
        if promised is None or not (entry.is_flush or entry.is_mark):
            continue  # no image yet, or nothing to be sure of
        states += 1
        cuts = [disk]
        if states % TORN_OF == 0 and (writes := following(entries, at)):
            cuts.append(torn(disk, writes, rng))
        for cut in cuts:
            state.write_bytes(cut)
            verify(state, ledger, promised, base)
    print(f"{states} states of {len(entries)} requests")
    assert states > 60
