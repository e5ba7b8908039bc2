# SPDX-License-Identifier: Apache-2.0
"""Prefetch over a shaped link: how much of the link it gets, and what a guest's reads feel of it.

    unshare -n .venv/bin/python -P tests/bench/remote.py [--seconds 10] [--links 100:50,1000:1]

Root makes two network namespaces with a link between them: a token bucket of so many Mbit/s at the
server's end (one queue, first in, first out), and so many ms that nbdkit waits before each answer.
The guest is an open loop of random reads of 4 KiB at a fifth of the link, in the half of the disk
that prefetch does not reach; it is measured alone, then beside each policy, in turn.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/lib"), str(ROOT)]

from fvdcore import Device, export_length  # noqa: E402
from fvdengine.create import create_image  # noqa: E402
from fvdengine.options import CreateOptions  # noqa: E402

DISK = 4 << 30
BLOCK = 4096
SERVER, CLIENT, PORT = "10.77.0.2", "10.77.0.1", 10809
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
            time.sleep(0.01)
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
                time.sleep(0.02)

    def close(self) -> None:
        os.killpg(self.server.pid, signal.SIGKILL)
        self.holder.kill()
        self.server.wait()
        self.holder.wait()
        subprocess.run(["ip", "link", "del", "near"], check=False, stderr=subprocess.DEVNULL)


class Guest:
    """An open loop of random reads over one connection: latencies in seconds."""

    def __init__(self, device: Device, per_second: float) -> None:
        mine, theirs = socket.socketpair()
        device.serve(theirs.detach())
        self.sock, self.period = mine, 1 / per_second
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
                time.sleep(wait)
            offset = DISK // 2 + self.rng.randrange(DISK // 2 // BLOCK) * BLOCK
            # From when it was due, not from when it could be sent.
            self.sent[cookie] = due
            self.sock.sendall(READ.pack(0x25609513, 0, 0, cookie, offset, BLOCK))
            cookie += 1
            due += self.rng.expovariate(1 / self.period)
        self.count = cookie
        while len(self.latencies) < cookie:
            time.sleep(0.01)
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


def opened(folder: Path, uri: str, policy: str, prefetch: bool) -> Device:
    path = folder / "clone.fvd"
    path.unlink(missing_ok=True)
    create_image(path, CreateOptions(base=uri, prefetch_min_read_kb=0, prefetch_min_write_kb=0))
    fd = os.open(path, os.O_RDWR)
    device = Device.open(
        [(fd, "fvd"), (uri, "nbd", {"length": DISK})], prefetch_policy=policy,
        prefetch_delay=0 if prefetch else -1,
    )  # fmt: skip
    os.close(fd)
    device.start()
    return device


def once(folder: Path, link: Link, policy: str, *, prefetch: bool, guest: float,
         seconds: float) -> tuple[list[float], float]:
    """The guest's latencies, and the bytes a second that prefetch got meanwhile."""
    # Measured are states that last, so each wait lets what came before die away; none is a test's.
    link.wait()
    time.sleep(0.5)  # what the last run left in the queue of the link
    device = opened(folder, link.uri, policy, prefetch)
    try:
        time.sleep(2.0 if prefetch else 0.3)  # past its start
        reader = Guest(device, guest) if guest else None
        if reader is not None and prefetch:
            time.sleep(0.1)  # its first reads find the window of an idle host
        before, begin = int(device.status()["prefetch_bytes"]), time.monotonic()
        latencies = reader.measure(seconds) if reader is not None else []
        if reader is None:
            time.sleep(seconds)  # the time that is measured
        spent = time.monotonic() - begin
        return latencies, (int(device.status()["prefetch_bytes"]) - before) / spent
    finally:
        device.abandon()


def part(values: list[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)] * 1000


def report(
    mbit: int, delay: float, seconds: float, turns: int, policies: list[str]
) -> dict[str, object]:
    link = Link(mbit, delay)
    rate = mbit * 125_000
    often = rate / 5 / BLOCK
    found: dict[str, object] = {"mbit": mbit, "delay_ms": delay}
    try:
        assert export_length(link.uri, 5.0) == DISK
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            folder = Path(name)
            _, idle = once(folder, link, "polite", prefetch=True, guest=0, seconds=5)
            found["idle"] = idle / rate
            for turn in range(turns):
                for policy in ("alone", *policies):
                    latencies, got = once(
                        folder, link, "polite" if policy == "alone" else policy,
                        prefetch=policy != "alone", guest=often, seconds=seconds,
                    )  # fmt: skip
                    found[f"{policy}{turn}"] = {
                        "samples": len(latencies), "p50": round(part(latencies, 0.5), 2),
                        "p99": round(part(latencies, 0.99), 2), "prefetch": round(got / rate, 3),
                    }
    finally:
        link.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--policies", default="polite,fixed,eager")
    parser.add_argument("--links", default="100:50,100:1,1000:50,1000:1")
    arguments = parser.parse_args()
    run("ip", "link", "set", "lo", "up")
    for one in arguments.links.split(","):
        mbit, delay = one.split(":")
        found = report(
            int(mbit), float(delay), arguments.seconds, arguments.turns,
            arguments.policies.split(","),
        )  # fmt: skip
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
