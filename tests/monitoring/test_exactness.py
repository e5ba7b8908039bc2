# SPDX-License-Identifier: Apache-2.0
"""What metrics count is what happened: for a scripted workload they equal, to the byte, what the
test sent, what the kernel saw the worker read and write (strace), and the records on the disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fvdengine.create import create_image
from fvdengine.header import Header
from fvdengine.options import CreateOptions
from fvdengine.records import read_journal
from fvdtest.daemon import wait_until
from fvdtest.nbd_client import NbdClient
from fvdtest.prometheus import fetch
from fvdtest.serve import FVDCTL

BLOCK = 4096
BLOCKS = 1024
BASE_SIZE = BLOCKS * BLOCK
SIZE = BASE_SIZE + (1 << 20)
KEPT = 3 + 1 + 7  # blocks that the script reads while only the base has them
CALLS = "pread64,preadv,preadv2,pwrite64,pwritev,pwritev2,splice,fdatasync,fsync"
LINE = re.compile(
    r"(?P<call>p(?:read|write)\w*|splice|f(?:data)?sync)\(\d+<(?P<path>[^>]*)>.*= (?P<result>-?\d+)"
)
ENDED = re.compile(r"<\.\.\. (?P<call>\w+) resumed>.*= (?P<result>-?\d+)")
BEGUN = re.compile(r"\b(?P<call>\w+)\(\d+<(?P<path>[^>]*)>.*<unfinished")


@dataclass(frozen=True)
class World:
    image: Path
    base: Path
    client: NbdClient
    url: str
    trace: Path

    def metrics(self) -> dict[tuple[str, tuple[str, ...]], float]:
        return {
            (s.name, tuple(v for k, v in sorted(s.labels.items()) if k != "device")): s.value
            for family in text_string_to_metric_families(fetch(self.url))
            for s in family.samples
        }

    def seen(self) -> Counter[tuple[str, str]]:
        """(read, write or sync; image or base) -> bytes, or calls for sync, of the engine."""
        total: Counter[tuple[str, str]] = Counter()
        open_calls: dict[str, tuple[str, str]] = {}
        for line in self.trace.read_text().splitlines():
            thread = line.split(maxsplit=1)[0]
            if (match := BEGUN.search(line)) is not None:
                open_calls[thread] = (match["call"], match["path"])
                continue
            if (match := ENDED.search(line)) is not None:
                call, path = open_calls.pop(thread)
            elif (match := LINE.search(line)) is not None:
                call, path = match["call"], match["path"]
            else:
                continue
            file = {str(self.image): "image", str(self.base): "base"}.get(path)
            if file is None or int(match["result"]) < 0:
                continue
            kind = "sync" if "sync" in call else "write" if "write" in call else "read"
            total[kind, file] += 1 if kind == "sync" else int(match["result"])
        return total


@pytest.fixture
def world(tmp_path, request):
    """An image served by a process that strace watches."""
    base = tmp_path / "base.raw"
    # Whole blocks of noise, but for some of zeros.
    base.write_bytes(
        b"".join(bytes(BLOCK) if n % 64 == 9 else os.urandom(BLOCK) for n in range(BLOCKS))
    )
    image = tmp_path / "image.fvd"
    options = {
        "copy_on_read": "copy-on-read" in request.param,
        "compact": "compact" in request.param,
    }
    create_image(
        image,
        CreateOptions(size=SIZE, base=str(base), base_format="raw", block_size=BLOCK, **options),
    )
    trace, log = tmp_path / "trace", tmp_path / "log"
    argv = ["strace", "-f", "-y", "-q", "-s", "0", "-o", str(trace), "-e", f"trace={CALLS}"]
    argv += [*FVDCTL, "serve", str(image), "--socket", str(tmp_path / "nbd.sock")]
    argv += ["--metrics", "127.0.0.1:0"]
    argv += ["--prefetch-delay", "0" if "prefetch" in request.param else "off"]
    with log.open("wb") as err:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err)
    try:
        uri = process.stdout.readline().decode().strip()
        url = re.search(r"message=metrics url=(\S+)", log.read_text())[1]
        with NbdClient.attach(uri) as client:
            yield World(image, base, client, url, trace)
    finally:
        # strace passes it on to the server and ends with it.
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGTERM)
        process.wait(60)
        process.stdout.close()
    assert process.returncode == 0, log.read_text()


def journal_records(image: Path) -> int:
    data = image.read_bytes()
    header = Header.unpack(data[:8192])
    begin = header.journal_offset
    journal = read_journal(data[begin : begin + header.journal_size], header, str(image))
    return sum(len(sector.records) for sector in journal.live)


def work(client: NbdClient, settled: Callable[[int], None]) -> dict[str, list[int]]:
    """The script; operation -> lengths of its requests. settled: until so many blocks were kept."""
    done: dict[str, list[int]] = {name: [] for name in ("read", "write", "discard", "zeroes")}

    def read(offset: int, length: int) -> None:
        client.read(offset, length)
        done["read"].append(length)

    def write(offset: int, length: int, fua: bool = False) -> None:
        client.write(offset, os.urandom(length), fua=fua)
        done["write"].append(length)

    read(0, 3 * BLOCK)
    settled(3)
    read(100, 1000)
    read(9 * BLOCK, BLOCK)
    settled(4)
    for number in range(40):
        write((100 + 3 * number) * BLOCK, BLOCK)
    write(300 * BLOCK + 17, 100)
    write(400 * BLOCK - 50, 100)
    write(500 * BLOCK, 64 * BLOCK)
    write(BASE_SIZE + 5000, 70000)
    client.flush()
    write(600 * BLOCK, BLOCK, fua=True)
    read(98 * BLOCK, 10 * BLOCK)
    settled(KEPT)
    read(BASE_SIZE, 100000)
    client.trim(500 * BLOCK, 8 * BLOCK)
    done["discard"].append(8 * BLOCK)
    client.write_zeroes(700 * BLOCK, 5 * BLOCK)
    done["zeroes"].append(5 * BLOCK)
    client.flush()
    return done


LAYOUTS = ["plain", "copy-on-read", "compact", "compact copy-on-read"]


@pytest.mark.parametrize("world", LAYOUTS, indirect=True)
def test_metrics_equal_what_was_done(world, request):
    before_seen, before = world.seen(), world.metrics()
    copies = "copy-on-read" in request.node.name

    def settled(blocks: int) -> None:
        # Copies follow the reply; those of one chunk that come meanwhile would be skipped.
        wait_until(
            lambda: (
                not copies or world.metrics()["fvd_cor_blocks_total", ()] == blocks
                and world.metrics()["fvd_cor_outstanding_bytes", ()] == 0
            ),
            f"{blocks} blocks to be kept",
        )  # fmt: skip

    done = work(world.client, settled)
    found = world.metrics()
    seen = world.seen() - before_seen

    def counted(name: str, *labels: str) -> float:
        return found[name, labels] - before[name, labels]

    for op, sizes in zip(("read", "write", "discard", "write_zeroes"), done.values(), strict=True):
        assert counted("fvd_io_requests_total", op) == len(sizes), op
        assert counted("fvd_io_bytes_total", op) == sum(sizes), op
        assert counted("fvd_io_request_duration_seconds_count", op) == len(sizes), op
    assert counted("fvd_io_requests_total", "flush") == 2
    reasons = ("demand", "cow", "prefetch")
    from_base = sum(counted("fvd_base_bytes_total", reason) for reason in reasons)
    assert from_base == seen["read", "base"]
    assert counted("fvd_base_bytes_total", "cow") == counted("fvd_cow_fill_bytes_total")
    assert counted("fvd_read_bytes_total", "base") == counted("fvd_base_bytes_total", "demand")
    assert counted("fvd_read_bytes_total", "image") == seen["read", "image"]
    assert counted("fvd_image_write_bytes_total") == seen["write", "image"]
    assert counted("fvd_image_flushes_total") == seen["sync", "image"]
    assert counted("fvd_journal_records_total") == journal_records(world.image)
    local = found["fvd_image_local_bytes", ()] - before["fvd_image_local_bytes", ()]
    assert local == before["fvd_prefetch_remaining_bytes", ()] - found[
        "fvd_prefetch_remaining_bytes", ()
    ]
    copied = counted("fvd_cor_bytes_total")
    written = 40 + 1 + 2 + 64 + 1 + 5
    assert local == written * BLOCK + copied
    # With copy-on-read each block of the base that was read was kept, each once.
    kept = KEPT if copies else 0
    assert copied == kept * BLOCK == counted("fvd_cor_blocks_total") * BLOCK
    assert counted("fvd_cor_zero_blocks_total") == (1 if kept else 0)


@pytest.mark.parametrize("world", ["prefetch", "compact prefetch"], indirect=True)
def test_prefetch_counts_each_byte_of_the_base_once(world):
    def is_done() -> bool:
        return world.metrics()["fvd_prefetch_state", ("done",)] == 1

    wait_until(is_done, "prefetch to end")
    found, seen = world.metrics(), world.seen()
    assert found["fvd_prefetch_bytes_total", ()] == BASE_SIZE
    assert found["fvd_base_bytes_total", ("prefetch",)] == seen["read", "base"] == BASE_SIZE
    assert found["fvd_prefetch_zero_bytes_total", ()] == BLOCKS // 64 * BLOCK
    assert found["fvd_image_write_bytes_total", ()] == seen["write", "image"]
    assert found["fvd_prefetch_remaining_bytes", ()] == 0
    assert found["fvd_prefetch_completed_timestamp_seconds", ()] == pytest.approx(
        time.time(), abs=60
    )
