#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What runs inside the machine between two power cuts: verify what was synced, then write more.

Arguments: the kind of image, a seed, the ledger (a file outside the machine), and `last` for a
round that only verifies; FVD_LIE is a library that fvdd is started with. The ledger has a line for
everything that a sync has promised: `file NAME SHA256`, or `block NUMBER VERSION` for 4 KiB blocks
of one file that are written again and again. It is written after the promise, so it may know less
than the disk, never more: a block holds what was promised or the version after that, and where
that one was being written, sectors of both.
"""

import contextlib
import hashlib
import os
import random
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fvdtest.guest import Fvd, run

STORE = Path("/run/store")
IMAGE = STORE / "disk.fvd"
BASE = STORE / "base.img"
POINT = Path("/mnt/disk")
DISK = "300M"
BLOCK = 4096
SECTOR = 512
BLOCKS = 2048
FILES = 60  # a round; what time is left belongs to the blocks alone
FILE_BYTES = 60_000
LOAD_SECONDS = (0.3, 4.0)
LEAKS = 3
HEAD = struct.Struct("<II")

# What is different about the images; all of them get a file system and the same load.
KINDS = {
    "plain": (),
    "compact": ("--compact", "--chunk-size", "64K"),
    "clone": (
        "--base", BASE, "--base-format", "raw", "--copy-on-read", "--prefetch-delay", "0",
        "--prefetch-min-read", "0", "--prefetch-min-write", "0", "--prefetch-max-read", "4000",
    ),
}  # fmt: skip


def content(number: int, version: int) -> bytes:
    """A block that says what it is, and is whole or recognisably not."""
    return HEAD.pack(number, version) + random.Random(number << 32 | version).randbytes(
        BLOCK - HEAD.size
    )


def prepare(fvd: Fvd, kind: str) -> None:
    """Make the image and, where the base does not bring one, its file system."""
    if kind == "clone":
        folder = Path("/tmp/content")
        folder.mkdir()
        for number in range(40):
            (folder / f"base{number}").write_bytes(random.Random(number).randbytes(3 << 20))
        run("mkfs.ext4", "-q", "-F", "-d", folder, BASE, DISK)
        fvd.ctl("create", IMAGE, *KINDS[kind])
    else:
        fvd.ctl("create", IMAGE, DISK, *KINDS[kind])
        device = fvd.attach(IMAGE, "--name", "disk")
        run("mkfs.ext4", "-q", "-F", device)
        fvd.detach("disk")
    os.sync()


def check(fvd: Fvd) -> None:
    """The image has no error; a chunk that nothing refers to yet may be left by a power cut."""
    done = fvd.ctl("check", IMAGE, check=False)
    assert done.returncode in (0, LEAKS), done.stdout + done.stderr


def version_of(number: int, data: bytes, promised: int) -> int:
    """The version of a block, whose sectors are of the promised one or the next."""
    older = content(number, promised) if promised else bytes(BLOCK)
    newer = content(number, promised + 1)
    for at in range(0, BLOCK, SECTOR):
        found, part = data[at : at + SECTOR], slice(at, at + SECTOR)
        assert found in (older[part], newer[part]), (
            f"block {number} holds at {at} neither version {promised} nor the next: "
            f"{HEAD.unpack_from(data)} {found[:16].hex()}"
        )
    return promised + (data == newer)


def verify(kind: str, ledger: Path) -> dict[int, int]:
    """Compare with what was promised; the versions that the blocks have now."""
    promised: dict[int, int] = {}
    files = 0
    for line in ledger.read_text().splitlines():
        what, name, value = line.split()
        if what == "file":
            found = hashlib.sha256((POINT / name).read_bytes()).hexdigest()
            assert found == value, f"{name} was synced and has changed"
            files += 1
        else:
            promised[int(name)] = int(value)
    versions: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError), (POINT / "blocks").open("rb") as blocks:
        for number in range(BLOCKS):
            held = promised.get(number, 0)
            data = blocks.read(BLOCK).ljust(BLOCK, b"\0")
            if held or any(data):
                versions[number] = version_of(number, data, held)
    assert promised.keys() <= versions.keys(), "the file of the blocks is gone"
    # What is found now is on the disk.
    with ledger.open("a") as file:
        for number, version in versions.items():
            if version > promised.get(number, 0):
                file.write(f"block {number} {version}\n")
    if kind == "clone":
        for number in range(40):
            data = (POINT / f"base{number}").read_bytes()
            assert data == random.Random(number).randbytes(3 << 20), f"base{number} has changed"
    print(f"verified {files} files, {len(promised)} blocks", flush=True)
    return versions


class Load:
    """Two writers that promise in the ledger what they have synced."""

    def __init__(self, ledger: Path, seed: int, versions: dict[int, int]) -> None:
        self._ledger = ledger.open("a")
        self._seed = seed
        self._versions = versions
        self._lock = threading.Lock()
        for work in (self._files, self._blocks):
            threading.Thread(target=self._guarded, args=(work,), daemon=True).start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            print(f"failed: {error!r}", flush=True)
            os._exit(1)

    def _promise(self, *words: object) -> None:
        with self._lock:
            self._ledger.write(" ".join(map(str, words)) + "\n")
            self._ledger.flush()

    def _files(self) -> None:
        rng = random.Random(self._seed)
        directory = os.open(POINT, os.O_RDONLY)
        for number in range(FILES):
            name = f"{self._seed}-{number}"
            data = rng.randbytes(rng.randrange(1, FILE_BYTES))
            with (POINT / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.fsync(directory)
            self._promise("file", name, hashlib.sha256(data).hexdigest())

    def _blocks(self) -> None:
        rng = random.Random(self._seed + 1)
        flags = os.O_RDWR | os.O_CREAT
        file = os.open(POINT / "blocks", flags, 0o644)
        while True:
            chosen = {rng.randrange(BLOCKS) for _ in range(rng.randrange(1, 12))}
            written = {number: self._versions.get(number, 0) + 1 for number in chosen}
            for number, version in written.items():
                os.pwrite(file, content(number, version), number * BLOCK)
            os.fsync(file)
            self._versions.update(written)
            for number, version in written.items():
                self._promise("block", number, version)


def main() -> None:
    """One round; the machine dies in it, or it only verifies."""
    kind, seed, ledger, last = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    STORE.mkdir(parents=True)
    run("mount", "-o", "commit=600", "/dev/ubda", STORE)
    POINT.mkdir()
    folder = Path("/run/fvd")
    folder.mkdir()
    fvd = Fvd(folder)
    os.environ["LD_PRELOAD"] = os.environ.get("FVD_LIE", "")
    fvd.start()
    del os.environ["LD_PRELOAD"]
    if not IMAGE.exists():
        prepare(fvd, kind)
    check(fvd)
    device = fvd.attach(IMAGE, "--name", "disk")
    run("mount", device, POINT)
    versions = verify(kind, ledger)
    run("umount", POINT)
    run("e2fsck", "-fn", device)
    if last:
        fvd.detach("disk")
        check(fvd)
        fvd.stop()
        run("umount", STORE)
        print("whole", flush=True)
        return
    run("mount", device, POINT)
    Load(ledger, seed, versions)
    time.sleep(random.Random(seed).uniform(*LOAD_SECONDS))
    print("cut here", flush=True)
    time.sleep(60)


if __name__ == "__main__":
    main()
