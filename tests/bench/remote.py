# SPDX-License-Identifier: Apache-2.0
"""Prefetch over a shaped link: how much of the link it gets, and what a guest's reads feel of it.

    unshare -n .venv/bin/python -P tests/bench/remote.py [--seconds 10] [--links 100:50,1000:1]

--links takes MBIT:MS; --policies takes polite, fixed, eager, and block-stream, which is QEMU's job
of that name on a qcow2 clone (package qemu-system-common).

Root makes two network namespaces with a link between them: a token bucket of so many Mbit/s at the
server's end (one queue, first in, first out), and so many ms that nbdkit waits before each answer.
The guest is an open loop of random reads of 4 KiB at a fifth of the link (less where that would be
more in flight than a kernel sends), in the half of the disk that prefetch does not reach; it is
measured alone, then beside each policy, in turn. "ratio" is its p99 over that of the run alone (the
peer's own for block-stream), "prefetch" what that got of the link, "share" what it got of what the
guest leaves.

`--fsync FOLDER` instead writes 4 KiB and flushes, again and again, on a clone in that folder, which
should be on a disk: without prefetch and beside it, in turn.

`--boot` instead reads as a system does that starts: pieces one after the other, with a pause of the
processor between, on a new clone; then on another one that follows the profile of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/lib"), str(ROOT)]

from fvdcore import Device, export_length  # noqa: E402
from fvdengine.create import create_image  # noqa: E402
from fvdengine.options import CreateOptions  # noqa: E402
from fvdtest.bench.streaming import PROGRAM, BlockStream  # noqa: E402

DISK = 4 << 30
BLOCK = 4096
BOOT_FILES, BOOT_CPU = 400, 0.002
FSYNC_SPREAD = 256 << 20
IN_FLIGHT = 64  # of a guest, on average: half of what a kernel sends over a connection
SERVER, CLIENT, PORT = "10.77.0.2", "10.77.0.1", 10809
QEMU = os.environ.get("FVD_QEMU_STORAGE_DAEMON", PROGRAM)
READ = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


class Link:
    """The other namespace, with a server behind the shaped link."""

    def __init__(self, mbit: int, delay_ms: float) -> None:
        self.holder = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        here = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self.holder.pid}/ns/net") == here:
            time.sleep(0.01)  # until unshare has made its namespace: nothing tells of that
        there = ["nsenter", "-t", str(self.holder.pid), "-n"]
        run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far", "netns",
            self.holder.pid)  # fmt: skip
        run("ip", "addr", "add", f"{CLIENT}/24", "dev", "near")
        run("ip", "link", "set", "near", "up")
        run(*there, "ip", "addr", "add", f"{SERVER}/24", "dev", "far")
        run(*there, "ip", "link", "set", "far", "up")
        run(*there, "tc", "qdisc", "add", "dev", "far", "root", "tbf", "rate", f"{mbit}mbit",
            "burst", "32k", "limit", "8m")  # fmt: skip
        # nbdkit 1.32 may end with an assertion when a client leaves in the middle of an answer.
        words = (f"nbdkit -f --exit-with-parent -t 64 -i {SERVER} -p {PORT} --filter=noextents "
                 f"--filter=delay pattern {DISK} rdelay={int(delay_ms)}ms")  # fmt: skip
        self.server = subprocess.Popen(
            [*there, "sh", "-c", f"while :; do {words}; sleep 0.1; done"], start_new_session=True
        )
        self.uri = f"nbd://{SERVER}:{PORT}"
        self.wait()

    def wait(self) -> None:
        """Until the server answers."""
        for _ in range(500):
            try:
                socket.create_connection((SERVER, PORT), 1).close()
                return
            except OSError:
                time.sleep(0.02)  # until the server listens

    def close(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.holder.kill()
        self.server.wait()
        self.holder.wait()
        subprocess.run(["ip", "link", "del", "near"], check=False, stderr=subprocess.DEVNULL)


class Guest:
    """An open loop of random reads over one connection: latencies in seconds."""

    def __init__(self, sock: socket.socket, per_second: float) -> None:
        sock.settimeout(None)
        self.sock, self.period = sock, 1 / per_second
        self.sent: dict[int, float] = {}
        self.latencies: list[float] = []
        self.rng = random.Random(7)

    def measure(self, seconds: float) -> list[float]:
        receiver = threading.Thread(target=self._receive)
        receiver.start()
        begin = time.monotonic()
        due, cookie = begin, 0
        while due < begin + seconds:
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)  # the pace of an open loop: requests are due by the clock
            offset = DISK // 2 + self.rng.randrange(DISK // 2 // BLOCK) * BLOCK
            # From when it was due, not from when it could be sent.
            self.sent[cookie] = due
            self.sock.sendall(READ.pack(0x25609513, 0, 0, cookie, offset, BLOCK))
            cookie += 1
            due += self.rng.expovariate(1 / self.period)
        self.count = cookie
        while len(self.latencies) < cookie:
            time.sleep(0.01)  # until the last answer is there
        self.sock.sendall(READ.pack(0x25609513, 0, 2, cookie, 0, 0))
        receiver.join()
        self.sock.close()
        return sorted(self.latencies)

    def _receive(self) -> None:
        pending = bytearray()
        size = REPLY.size + BLOCK
        while piece := self.sock.recv(1 << 18):
            now = time.monotonic()
            pending += piece
            while len(pending) >= size:
                _, error, cookie = REPLY.unpack_from(pending)
                assert not error
                del pending[:size]
                self.latencies.append(now - self.sent.pop(cookie))


def opened(folder: Path, uri: str, policy: str, prefetch: bool, **options: Any) -> Device:
    path = folder / "clone.fvd"
    path.unlink(missing_ok=True)
    create_image(path, CreateOptions(base=uri, prefetch_min_read_kb=0, prefetch_min_write_kb=0))
    fd = os.open(path, os.O_RDWR)
    device = Device.open(
        [(fd, "fvd"), (uri, "nbd", {"length": DISK})], prefetch_policy=policy,
        prefetch_delay=0 if prefetch else -1, **options,
    )  # fmt: skip
    os.close(fd)
    device.start()
    return device


class Clone:
    """Ours, with what a peer offers, too."""

    def __init__(self, folder: Path, link: Link, policy: str, *, prefetch: bool) -> None:
        self.device = opened(folder, link.uri, policy, prefetch)

    def connect(self) -> socket.socket:
        mine, theirs = socket.socketpair()
        self.device.serve(theirs.detach())
        return mine

    def fetched(self) -> int:
        return int(self.device.status()["prefetch_bytes"])

    def close(self) -> None:
        self.device.abandon()


def once(folder: Path, link: Link, policy: str, *, prefetch: bool, guest: float,
         seconds: float) -> tuple[list[float], float]:
    """The guest's latencies, and the bytes a second that prefetch got meanwhile."""
    # Measured are states that last, so each wait lets what came before die away; none is a test's.
    link.wait()
    time.sleep(0.5)  # what the last run left in the queue of the link
    device: Clone | BlockStream
    if policy == "block-stream":
        device = BlockStream(folder, SERVER, PORT, job=prefetch, program=QEMU)
    else:
        device = Clone(folder, link, policy, prefetch=prefetch)
    try:
        time.sleep(2.0 if prefetch else 0.3)  # past its start
        reader = Guest(device.connect(), guest) if guest else None
        if reader is not None and prefetch:
            time.sleep(0.1)  # its first reads find the window of an idle host
        before, begin = device.fetched(), time.monotonic()
        latencies = reader.measure(seconds) if reader is not None else []
        if reader is None:
            time.sleep(seconds)  # the time that is measured
        spent = time.monotonic() - begin
        return latencies, (device.fetched() - before) / spent
    finally:
        device.close()


def fsync_once(folder: Path, link: Link, policy: str, *, prefetch: bool,
               seconds: float) -> tuple[list[float], float]:
    """Latencies of a write of 4 KiB with its flush, one after the other, and prefetch's rate."""
    link.wait()
    device = opened(folder, link.uri, policy, prefetch)
    rng, latencies = random.Random(7), []
    try:
        time.sleep(1.0)  # past its start
        before = int(device.status()["prefetch_bytes"])
        begin = now = time.monotonic()
        while now < begin + seconds:
            offset = DISK // 2 + rng.randrange(FSYNC_SPREAD // BLOCK) * BLOCK
            device.write(offset, rng.randbytes(BLOCK))
            device.flush()
            latencies.append(time.monotonic() - now)
            now = time.monotonic()
        got = (int(device.status()["prefetch_bytes"]) - before) / (now - begin)
        return sorted(latencies), got
    finally:
        device.abandon()


def report_fsync(
    mbit: int, delay: float, seconds: float, turns: int, policies: list[str], folder: Path
) -> dict[str, object]:
    """Ratios of the p99 beside prefetch to that without, of neighbouring runs."""
    link = Link(mbit, delay)
    found: dict[str, object] = {"mbit": mbit, "delay_ms": delay}
    try:
        assert export_length(link.uri, 5.0) == DISK
        for turn in range(turns):
            alone = 0.0
            for policy in ("alone", *policies):
                latencies, got = fsync_once(
                    folder, link, "polite" if policy == "alone" else policy,
                    prefetch=policy != "alone", seconds=seconds,
                )  # fmt: skip
                alone = alone or part(latencies, 0.99)
                found[f"{policy}{turn}"] = {
                    "samples": len(latencies), "p50": round(part(latencies, 0.5), 2),
                    "p99": round(part(latencies, 0.99), 2),
                    "ratio": round(part(latencies, 0.99) / alone, 2),
                    "prefetch": round(got / (mbit * 125_000), 3),
                }  # fmt: skip
    finally:
        link.close()
    return found


def boot_reads() -> list[tuple[int, int]]:
    """Files here and there, each read from its begin on in pieces; always the same."""
    rng, reads = random.Random(11), []
    for _ in range(BOOT_FILES):
        offset = rng.randrange(DISK // BLOCK - 256) * BLOCK
        length = min(int(rng.paretovariate(1.1) * 16384), 1 << 20) // BLOCK * BLOCK
        reads += [(at, min(32768, offset + length - at))
                  for at in range(offset, offset + length, 32768)]  # fmt: skip
    return reads


def boot_once(folder: Path, link: Link, order: list[tuple[int, int]], *,
              prefetch: bool) -> tuple[dict[str, float], list[tuple[int, int]]]:
    """Seconds until all was read and bytes that came over the link by then; the order of reads."""
    link.wait()
    device = opened(
        folder, link.uri, "polite", prefetch, copy_on_read=True, fetch_first=order,
        record_reads=True,
    )  # fmt: skip
    try:
        begin = time.monotonic()
        for offset, length in boot_reads():
            device.read(offset, length)
            until = time.process_time() + BOOT_CPU
            while time.process_time() < until:
                pass
        spent, status = time.monotonic() - begin, device.status()
        return {"seconds": round(spent, 2), "bytes": status["local_bytes"]}, device.first_reads()
    finally:
        device.abandon()


def report_boot(mbit: int, delay: float, folder: Path) -> dict[str, object]:
    """A first start, one beside prefetch, and one that follows the profile of the first."""
    link = Link(mbit, delay)
    reads = boot_reads()
    found: dict[str, object] = {
        "mbit": mbit, "delay_ms": delay, "read": sum(length for _, length in reads),
        "copy_seconds": round(DISK / (mbit * 125_000), 1),
        "cpu_seconds": round(len(reads) * BOOT_CPU, 1),
    }  # fmt: skip
    try:
        assert export_length(link.uri, 5.0) == DISK
        found["first"], order = boot_once(folder, link, [], prefetch=False)
        found["prefetch"], _ = boot_once(folder, link, [], prefetch=True)
        found["profile"], _ = boot_once(folder, link, order, prefetch=True)
    finally:
        link.close()
    return found


def part(values: list[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)] * 1000


def in_turn(policies: list[str]) -> list[str]:
    """The runs of one turn; a peer has one alone of its own."""
    runs = ["alone"]
    for policy in policies:
        runs += [f"{policy}-alone", policy] if policy == "block-stream" else [policy]
    return runs


def report(
    mbit: int, delay: float, seconds: float, turns: int, policies: list[str]
) -> dict[str, object]:
    link = Link(mbit, delay)
    rate = mbit * 125_000
    often = min(rate / 5 / BLOCK, IN_FLIGHT / (delay / 1000 + 0.001))
    found: dict[str, object] = {"mbit": mbit, "delay_ms": delay}
    try:
        assert export_length(link.uri, 5.0) == DISK
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            folder = Path(name)
            _, idle = once(folder, link, "polite", prefetch=True, guest=0, seconds=seconds)
            found["idle"] = round(idle / rate, 3)
            for turn in range(turns):
                alone = {}
                for name in in_turn(policies):
                    policy = name.removesuffix("-alone")
                    latencies, got = once(
                        folder, link, policy if policy != "alone" else "polite",
                        prefetch=name == policy != "alone", guest=often, seconds=seconds,
                    )  # fmt: skip
                    p99 = part(latencies, 0.99)
                    alone[name] = p99
                    beside = alone.get(f"{policy}-alone", alone["alone"])
                    found[f"{name}{turn}"] = {
                        "samples": len(latencies), "p50": round(part(latencies, 0.5), 2),
                        "p90": round(part(latencies, 0.9), 2),
                        "p99": round(p99, 2), "ratio": round(p99 / beside, 2),
                        "prefetch": round(got / rate, 3),
                        "share": round(got / (rate - often * BLOCK), 3),
                    }  # fmt: skip
    finally:
        link.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--policies", default="polite,fixed,eager")
    parser.add_argument("--boot", action="store_true")
    parser.add_argument("--fsync", type=Path, metavar="FOLDER")
    parser.add_argument("--links", default="100:50,100:1,1000:50,1000:1")
    arguments = parser.parse_args()
    run("ip", "link", "set", "lo", "up")
    for one in arguments.links.split(","):
        mbit, delay = one.split(":")
        how = (
            int(mbit), float(delay), arguments.seconds, arguments.turns,
            arguments.policies.split(","),
        )  # fmt: skip
        if arguments.boot:
            with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
                found = report_boot(int(mbit), float(delay), Path(name))
        else:
            found = report_fsync(*how, arguments.fsync) if arguments.fsync else report(*how)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
