# SPDX-License-Identifier: Apache-2.0
"""The jobs that one client command makes, with what we want of each. Others: special.py."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
MIB = 1 << 20

RAW_PEERS = ("nbdkit-file", "qemu-raw-io-uring", "qemu-raw-threads")
HIT_OURS = ("fvd-compact", "fvd-clone")
NONE_PEERS = ("qemu-raw-threads-none", "qemu-raw-io-uring-none")
QCOW2S = ("qcow2", "qcow2-extended", "qcow2-cache", "qcow2-metadata")


@dataclass(frozen=True)
class Target:
    """speed: our rate over that of the fastest of `against`, at least; cpu: our processor time a
    request over theirs, at most."""

    against: tuple[str, ...]
    speed: float | None = None
    cpu: float | None = None


@dataclass(frozen=True)
class Job:
    """state of the image: local (all written), empty, clone (of random bytes) or chain (10 of
    them). fresh: a new image for every run. size: of the disk; small: the same with --quick."""

    name: str
    what: str
    state: str
    options: tuple[str, ...]
    ours: tuple[str, ...]
    peers: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    size: int = GIB
    small: int = 256 * MIB
    seconds: float = 3.0
    unit: str = "requests/s"
    fresh: bool = False
    pinned: bool = False
    copies: bool = False  # by nbdcopy, not fio
    quick: bool = False
    by_latency: bool = False  # compared by the 99th percentile
    trace: str = ""  # a packed iolog of tests/fixtures that is replayed
    spared: tuple[str, ...] = ()  # peers and ours left out by --quick


def fio(rw: str, bs: str, depth: int, *more: str) -> tuple[str, ...]:
    return (f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}", *more)


TIMED = ("--time_based", "--norandommap=1")
SLOW_PEERS = ("qemu-raw-threads", "qcow2", "nbdkit-null", "fvd-raw", "fvd-data",
              "qcow2-extended", "qcow2-cache", "qcow2-metadata")  # fmt: skip
ALL_HIT_PEERS = (*RAW_PEERS, *QCOW2S, "nbdkit-null")
ALL_HIT_OURS = (*HIT_OURS, "fvd-raw", "fvd-data")

JOBS = (
    Job("hit-rr-32", "random reads of 4 KiB, depth 32", "local",
        fio("randread", "4k", 32, *TIMED), ALL_HIT_OURS, ALL_HIT_PEERS,
        (Target(RAW_PEERS, 1.6, 0.5),), quick=True, spared=SLOW_PEERS),
    Job("hit-rw-32", "random writes of 4 KiB, depth 32", "local",
        fio("randwrite", "4k", 32, *TIMED), ALL_HIT_OURS, ALL_HIT_PEERS[:-1],
        (Target(RAW_PEERS, 1.4, 0.65),), quick=True, spared=SLOW_PEERS),
    Job("hit-rr-1-pinned", "random reads of 4 KiB, depth 1, all on one processor", "local",
        fio("randread", "4k", 1, *TIMED), HIT_OURS, (*RAW_PEERS, "nbdkit-null"),
        (Target(RAW_PEERS, 1.5),), pinned=True, quick=True, spared=SLOW_PEERS),
    Job("hit-rr-1", "random reads of 4 KiB, depth 1", "local",
        fio("randread", "4k", 1, *TIMED), HIT_OURS, (*RAW_PEERS, "nbdkit-null")),
    Job("hit-sr", "reads of 256 KiB in order, depth 8", "local",
        fio("read", "256k", 8, *TIMED), HIT_OURS, (*RAW_PEERS, "qcow2", "nbdkit-null"),
        (Target((*RAW_PEERS, "qcow2"), 2.0, 0.4),), unit="B/s", quick=True, spared=SLOW_PEERS),
    Job("hit-sw", "writes of 256 KiB in order, depth 8", "local",
        fio("write", "256k", 8, *TIMED), HIT_OURS, (*RAW_PEERS, "qcow2"),
        (Target((*RAW_PEERS, "qcow2"), 1.05, 0.85),), unit="B/s", quick=True, spared=SLOW_PEERS),
    Job("stream-1", "nbdcopy of the whole disk, one connection", "local",
        ("--connections=1",), HIT_OURS, (*RAW_PEERS, "nbdkit-null"), unit="B/s", copies=True),
    Job("stream-4", "nbdcopy of the whole disk, four connections", "local",
        ("--connections=4",), HIT_OURS, (*RAW_PEERS, "nbdkit-null"), unit="B/s", copies=True),
    Job("trickle", "random reads of 4 KiB, 20,000 a second, depth 4", "local",
        fio("randread", "4k", 4, *TIMED, "--rate_iops=20000"), HIT_OURS, RAW_PEERS,
        (Target(RAW_PEERS, None, 0.85),), quick=True, spared=SLOW_PEERS),
    Job("alloc-rw-32", "random writes of 4 KiB all over an empty disk of 64 GiB", "empty",
        fio("randwrite", "4k", 32, *TIMED), ("fvd-compact", "fvd-clone"),
        ("nbdkit-file", "qcow2", "qemu-raw-io-uring"),
        (Target(("qcow2",), 4.0), Target(("nbdkit-file",), 1.1)),
        size=64 * GIB, small=64 * GIB, seconds=15.0, fresh=True, quick=True,
        spared=("qemu-raw-io-uring",)),
    Job("alloc-sw", "writes of 64 KiB in order to an empty disk, depth 8", "empty",
        fio("write", "64k", 8), ("fvd-compact", "fvd-clone"), (*RAW_PEERS, "qcow2"),
        (Target((*RAW_PEERS, "qcow2"), 1.2, 0.7),),
        size=4 * GIB, small=512 * MIB, seconds=60.0, unit="B/s", fresh=True, quick=True,
        spared=SLOW_PEERS),
    Job("sync-rw-1", "random writes of 4 KiB, a flush after each", "empty",
        fio("randwrite", "4k", 1, *TIMED, "--fsync=1"), ("fvd-compact", "fvd-clone"),
        ("qemu-raw-io-uring", "qcow2", "nbdkit-file"),
        (Target(("qemu-raw-io-uring",), 0.9), Target(("qcow2",), 1.5)),
        fresh=True, quick=True, spared=SLOW_PEERS),
    Job("cow-rw-32", "writes of 4 KiB at random places 64 KiB apart, each once", "clone",
        fio("randwrite", "4k", 32, "--blockalign=64k"), ("fvd-clone", "fvd-compact"),
        ("qcow2", "qcow2-extended"),
        (Target(("qcow2",), 8.0), Target(("qcow2-extended",), 2.0)),
        size=16 * GIB, small=16 * GIB, seconds=10.0, fresh=True, quick=True),
    Job("cow-rr-32", "random reads of 4 KiB, nothing copied", "clone",
        fio("randread", "4k", 32, *TIMED), ("fvd-clone", "fvd-compact"),
        ("qcow2", "nbdkit-cow"), (Target(("qcow2",), 2.5),), quick=True),
    Job("cor-rr-32", "random reads of 4 KiB with copy-on-read, twice over", "clone",
        fio("randread", "4k", 32, "--loops=2"), ("fvd-compact-cor",),
        ("qcow2-cor", "nbdkit-cor"), (Target(("qcow2-cor",), 2.5),),
        size=256 * MIB, small=64 * MIB, seconds=60.0, fresh=True),
    Job("chain-rr-32", "random reads of 4 KiB, ten clones deep", "chain",
        fio("randread", "4k", 32, *TIMED), ("fvd-clone", "fvd-compact"), ("qcow2",),
        (Target(("qcow2",), 2.5),), size=512 * MIB, quick=True),
    Job("cow-partial", "writes of 512 bytes at random places 64 KiB apart, each once", "clone",
        fio("randwrite", "512", 32, "--blockalign=64k"), ("fvd-compact-64k",), ("qcow2",),
        (Target(("qcow2",), 1.5),), size=4 * GIB, small=GIB, seconds=10.0, fresh=True),
    Job("cow-partial-4k", "writes of 4 KiB into blocks of 64 KiB, each once", "clone",
        fio("randwrite", "4k", 32, "--blockalign=64k"), ("fvd-compact-64k",), ("qcow2",),
        (Target(("qcow2",), 1.5),), size=4 * GIB, small=GIB, seconds=10.0, fresh=True),
    Job("mix-fs", "what ext4 asked for while a tree was unpacked, compiled, copied and removed",
        "clone", ("--iodepth=32", "--replay_no_stall=1"), ("fvd-clone", "fvd-compact"),
        ("qcow2", "nbdkit-cow"), size=256 * MIB, seconds=60.0, fresh=True,
        trace="mix-fs.iolog.gz"),
    Job("none-rr-32", "hit-rr-32 past the page cache (cache mode none)", "local",
        fio("randread", "4k", 32, *TIMED), ("fvd-none",), NONE_PEERS),
    Job("none-rw-32", "hit-rw-32 past the page cache", "local",
        fio("randwrite", "4k", 32, *TIMED), ("fvd-none",), NONE_PEERS),
    Job("writethrough-rw-32", "hit-rw-32 with each write durable (cache mode writethrough)",
        "local", fio("randwrite", "4k", 32, *TIMED), ("fvd-writethrough",),
        ("qemu-raw-threads-writethrough", "qemu-raw-io-uring-writethrough")),
    Job("hit-rw-32-tail", "the 99.9th percentile of hit-rw-32 while the kernel writes back",
        "local", fio("randwrite", "4k", 32, *TIMED), HIT_OURS, RAW_PEERS, unit="us",
        seconds=8.0, by_latency=True),
)  # fmt: skip
BY_NAME = {job.name: job for job in JOBS}


def of_quick(job: Job, names: tuple[str, ...]) -> tuple[str, ...]:
    """What --quick leaves of the servers of a job."""
    return tuple(name for name in names if name not in job.spared)
