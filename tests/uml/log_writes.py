#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What runs inside the machine: a load on an image that lies on a disk whose writes are logged.

Arguments: the kind of image, a seed, a folder outside the machine. There it leaves `ledger`, with
`issued VERSION BLOCK...` before blocks are written and `promised MARK VERSION BLOCK...` after they
were synced; the mark of that name stands in the log of the disk (/dev/ubdb) at that moment.
"""

import mmap
import os
import random
import struct
import sys
from pathlib import Path

from fvdtest.guest import Fvd, run, wait_until

LOGGED = "/dev/dm-0"  # without udev nobody makes the name in /dev/mapper
SECTOR = 512
BLOCK = 4096
SECTORS = BLOCK // SECTOR
BLOCKS = 4096  # of the disk: 16 MiB
STEPS = 60
BLOCKS_MAX = 24
HEAD = struct.Struct("<II")
KINDS = {
    "plain": (f"{BLOCKS * BLOCK}",),
    "compact": (f"{BLOCKS * BLOCK}", "--compact", "--chunk-size", "64K"),
    "clone": (
        "--base-format", "raw", "--copy-on-read", "--block-size", "64K", "--prefetch-delay", "0",
        "--prefetch-min-read", "0", "--prefetch-min-write", "0", "--prefetch-max-read", "1000",
    ),
}  # fmt: skip


def block(number: int, version: int) -> bytes:
    """Sectors that say what they are."""
    filler = bytes([version % 251 + 1]) * (SECTOR - HEAD.size)
    first = number * SECTORS
    return b"".join(HEAD.pack(first + at, version) + filler for at in range(SECTORS))


def mark(name: str) -> None:
    run("dmsetup", "message", "logged", "0", "mark", name)


def load(device: str, rng: random.Random, ledger: Path) -> None:
    """Write and sync; the reads in between make copy-on-read work."""
    disk = os.open(device, os.O_RDWR | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK)
    with ledger.open("a") as promises:
        for version in range(1, STEPS + 1):
            chosen = sorted({rng.randrange(BLOCKS) for _ in range(rng.randrange(1, BLOCKS_MAX))})
            names = " ".join(map(str, chosen))
            promises.write(f"issued {version} {names}\n")
            promises.flush()
            for number in chosen:
                buffer[:] = block(number, version)
                os.pwritev(disk, [buffer], number * BLOCK)
                os.preadv(disk, [buffer], rng.randrange(BLOCKS) * BLOCK)
            if rng.random() < 0.8:
                os.fsync(disk)
                mark(f"m{version}")
                promises.write(f"promised m{version} {version}\n")
                promises.flush()
    os.close(disk)


def main() -> None:
    kind, seed, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    sectors = int(run("blockdev", "--getsz", "/dev/ubda").stdout)
    run(
        "dmsetup", "create", "logged", "--noudevsync", "--noudevrules",
        "--table", f"0 {sectors} log-writes /dev/ubda /dev/ubdb",
    )  # fmt: skip
    options: list[object] = [*KINDS[kind]]
    allowed = ("--allow-dir", folder)
    if kind == "clone":
        base = folder / "base.img"
        base.write_bytes(b"".join(block(number, 0) for number in range(BLOCKS)))
        options += ["--base", base, *allowed]
    state = Path("/run/fvd")
    state.mkdir()
    fvd = Fvd(state)
    fvd.ctl("create", "--force", LOGGED, *options)
    fvd.start()
    mark("created")
    device = fvd.attach(LOGGED, "--name", "disk", *allowed)
    load(device, random.Random(seed), folder / "ledger")
    if kind == "clone":
        wait_until(lambda: fvd.status("disk")["prefetch"]["state"] == "done", 60, "prefetch")
    fvd.detach("disk")
    mark("detached")
    fvd.stop()
    run("dmsetup", "remove", "--noudevsync", "logged")
    print("logged", flush=True)


if __name__ == "__main__":
    main()
