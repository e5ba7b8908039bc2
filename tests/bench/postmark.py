#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Mails on a file system of a kernel's nbd device: ours, and qemu-nbd's of a qcow2 image, in turn.

Runs inside User Mode Linux (fvdtest.bench.postmark starts it). The last line printed is JSON:
{"fvd": [transactions a second, ...], "qcow2": [...]}, a value a round.

PostMark itself is not in Debian. This does what it does: files of 500 B to 100 KiB in ten folders;
a transaction creates or deletes a file, then reads all of one or appends to one; both are equally
likely. Everything is written through the page cache and synced at the end, inside the clock. The
files are to be more than the machine keeps in memory, or the device would hardly be asked.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))

from fvdtest.guest import Fvd, run, wait_until  # noqa: E402

SMALLEST, LARGEST = 500, 100 << 10
FOLDERS = 10
DISK = "900M"
STORE = Path("/run/store")


class Mails:
    """A pool of files and what is done to it; the same for everybody."""

    def __init__(self, root: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.root = root
        self.files: list[Path] = []
        self.number = 0
        self.text = self.rng.randbytes(LARGEST)
        for at in range(FOLDERS):
            (root / f"s{at}").mkdir()

    def create(self) -> None:
        path = self.root / f"s{self.rng.randrange(FOLDERS)}" / str(self.number)
        self.number += 1
        path.write_bytes(self.text[: self.rng.randrange(SMALLEST, LARGEST)])
        self.files.append(path)

    def pick(self) -> int:
        return self.rng.randrange(len(self.files))

    def delete(self) -> None:
        at = self.pick()
        self.files[at], self.files[-1] = self.files[-1], self.files[at]
        self.files.pop().unlink()

    def transaction(self) -> None:
        if self.rng.random() < 0.5 or len(self.files) < 2:
            self.create()
        else:
            self.delete()
        path = self.files[self.pick()]
        if self.rng.random() < 0.5:
            path.read_bytes()
        else:
            with path.open("ab") as file:
                file.write(self.text[: self.rng.randrange(SMALLEST, LARGEST)])


def transactions_a_second(device: str, files: int, transactions: int, seed: int) -> float:
    """Make a file system, fill it, and time the transactions, with the sync at the end."""
    run("mkfs.ext4", "-q", "-F", device)
    with tempfile.TemporaryDirectory() as name:
        run("mount", device, name)
        try:
            mails = Mails(Path(name), seed)
            for _ in range(files):
                mails.create()
            run("sync", "-f", name)
            begin = time.monotonic()
            for _ in range(transactions):
                mails.transaction()
            run("sync", "-f", name)
            return transactions / (time.monotonic() - begin)
        finally:
            run("umount", name)


def ours(fvd: Fvd, told: argparse.Namespace, turn: int) -> float:
    image = STORE / f"ours{turn}.fvd"
    fvd.ctl("create", image, DISK, "--compact")
    device = fvd.attach(image, "--name", f"ours{turn}")
    try:
        return transactions_a_second(device, told.files, told.transactions, turn)
    finally:
        fvd.ctl("detach", f"ours{turn}")
        image.unlink()


def theirs(told: argparse.Namespace, turn: int) -> float:
    image, device = STORE / f"theirs{turn}.qcow2", told.peer_device
    run("qemu-img", "create", "-q", "-f", "qcow2", image, DISK)
    run("qemu-nbd", "-c", device, "-f", "qcow2", "--cache=writeback", "--discard=unmap", image)
    size = Path("/sys/block") / Path(device).name / "size"
    try:
        wait_until(lambda: int(size.read_text()) > 0, 30, "qemu-nbd's device")
        return transactions_a_second(device, told.files, told.transactions, turn)
    finally:
        run("qemu-nbd", "-d", device)
        wait_until(lambda: int(size.read_text()) == 0, 30, "the end of qemu-nbd's device")
        image.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--transactions", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-device", default="/dev/nbd7")
    told = parser.parse_args()
    found: dict[str, list[float]] = {"fvd": [], "qcow2": []}
    with tempfile.TemporaryDirectory() as folder:
        fvd = Fvd(Path(folder))
        fvd.start()
        for turn in range(told.rounds):
            for name in ("fvd", "qcow2") if turn % 2 == 0 else ("qcow2", "fvd"):
                rate = ours(fvd, told, turn) if name == "fvd" else theirs(told, turn)
                found[name].append(rate)
        fvd.stop()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
