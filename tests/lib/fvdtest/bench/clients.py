# SPDX-License-Identifier: Apache-2.0
"""The clients: fio with its nbd engine, and nbdcopy. What they are told and what they tell."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

GRACE_SECONDS = 90.0


class ClientError(Exception):
    """A client failed or told what nobody understands; the message holds its output."""


@dataclass(frozen=True)
class Measured:
    """What a client saw. requests: reads and writes; p99_us: of their completion."""

    requests: int
    bytes: int
    seconds: float
    p99_us: float = 0.0
    p999_us: float = 0.0

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0


def uri_of(socket_path: str) -> str:
    return f"nbd+unix:///?socket={socket_path}"


def fio_words(socket_path: str, options: Sequence[str], seconds: float) -> list[str]:
    """The command line of one run of at most `seconds`."""
    return [
        "fio", "--name=bench", "--ioengine=nbd", f"--uri={uri_of(socket_path)}",
        "--output-format=json", "--randrepeat=0", f"--runtime={seconds * 1000:.0f}ms", *options,
    ]  # fmt: skip


def parse_fio(text: str) -> Measured:
    """fio's JSON, which it prints after a line about the connection."""
    begin = text.find("{")
    try:
        told = json.loads(text[begin:])
        job = told["jobs"][0]
        error = job["error"]
    except (ValueError, LookupError) as failure:
        raise ClientError(f"fio told no result: {text[-400:]}") from failure
    if begin < 0 or error:
        raise ClientError(f"fio failed with errno {error}")
    sides = [job["read"], job["write"]]
    requests = sum(side["total_ios"] for side in sides)
    if requests == 0:
        raise ClientError("fio made no request")
    busy = max(sides, key=lambda side: int(side["total_ios"]))
    percentiles = busy.get("clat_ns", {}).get("percentile", {})
    return Measured(
        requests=requests,
        bytes=sum(side["io_bytes"] for side in sides),
        seconds=max(side["runtime"] for side in sides) / 1000,
        p99_us=percentiles.get("99.000000", 0) / 1000,
        p999_us=percentiles.get("99.900000", 0) / 1000,
    )


def call(words: Sequence[str], limit: float) -> str:
    """Run a client; its output."""
    try:
        done = subprocess.run(
            list(words), capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as late:
        raise ClientError(f"{words[0]} did not end within {limit:g} s") from late
    if done.returncode:
        raise ClientError(f"{' '.join(words)}\n{done.stdout[-400:]}{done.stderr[-800:]}")
    return done.stdout


def fio(
    socket_path: str, options: Sequence[str], seconds: float, pinned: bool = False
) -> Measured:
    """One run of fio; pinned: on the first processor only."""
    words = ["taskset", "-c", "0"] if pinned else []
    return parse_fio(
        call([*words, *fio_words(socket_path, options, seconds)], seconds + GRACE_SECONDS)
    )


def nbdcopy(socket_path: str, size: int, options: Sequence[str] = ()) -> Measured:
    """Read a whole export of `size` bytes into nothing."""
    begin = time.monotonic()
    call(["nbdcopy", *options, uri_of(socket_path), "null:"], GRACE_SECONDS)
    seconds = time.monotonic() - begin
    # What nbdcopy asks for at a time, so that the processor time a request can be told.
    return Measured(requests=max(1, size >> 18), bytes=size, seconds=seconds)


def fill(socket_path: str, source: str) -> None:
    """Write a file into an export, all of it, from the beginning."""
    call(["nbdcopy", "--allocated", source, uri_of(socket_path)], 10 * GRACE_SECONDS)
