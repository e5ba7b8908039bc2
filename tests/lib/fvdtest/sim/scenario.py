# SPDX-License-Identifier: Apache-2.0
"""What a seed means: geometry, features, workload, faults and sessions of one simulated run.

Every seed also draws which features are on (swarm testing): a run that leaves most of them out
finds what a run with all of them hides. A scenario narrows the draw; `mixed` narrows nothing.
"""

import errno
import random
from dataclasses import dataclass, field, replace
from functools import cache
from math import lcm
from typing import Any

from fvdcore import Device
from fvdengine.header import FEATURE_JOURNAL_TRAILERS, FEATURES_SIZE, Extension, Header
from fvdtest.sim import extras, pattern

SECTOR = pattern.SECTOR
PAGE = 4096
SECTORS_MAX = 12288
TRIM = 3
UUID = bytes(range(1, 17))
SCENARIOS = ("mixed", "compact", "faults", "prefetch", "journal", "plain", "raw", "reuse", "small",
             "grow", "nth")  # fmt: skip
EXHAUSTED = ("small", "grow")  # each subset of few dirty sectors survives a crash once
NTH_MAX = 64
NTH_KINDS = (
    ("file", "write", errno.EIO, False), ("file", "write", errno.EIO, True),
    ("file", "write", errno.ENOSPC, False), ("file", "flush", errno.EIO, False),
    ("file", "flush", errno.ENOSPC, True), ("file", "read", errno.EIO, False),
    ("file", "read", errno.EIO, True), ("file", "zero", errno.EIO, False),
    ("file", "resize", errno.ENOSPC, False), ("file", "resize", errno.EIO, True),
    ("data", "write", errno.ENOSPC, False), ("data", "flush", errno.EIO, False),
    ("base", "read", errno.EIO, False), ("base", "read", errno.EIO, True),
    ("below", "read", errno.EIO, False),
)  # fmt: skip
NTH_RUNS = NTH_MAX * len(NTH_KINDS)
VERIFY_SHARE = 16  # of 256 clones, how many fvdctl's check looks at as well
VERIFY_SHARE_EXHAUSTIVE = 4
VERIFY_ALL = 256
WIDE = 4_000_000  # bytes from which on a look at a whole disk takes its time
EXHAUSTIVE_WIDE = 1
EXHAUSTIVE = 7  # dirty sectors of which every subset is tried


def round_up(value: int, unit: int) -> int:
    return (value + unit - 1) // unit * unit


@cache
def sheets() -> tuple[pattern.Sheet, pattern.Sheet]:
    """The base's content and the poison of storage that nobody wrote."""
    return (
        pattern.Sheet(pattern.BASE, SECTORS_MAX),
        pattern.Sheet(pattern.POISON, SECTORS_MAX),
    )


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where things lie in the image."""

    size: int
    base_size: int
    base_length: int
    block_size: int
    journal_size: int
    data_offset: int
    bitmap_offset: int
    bitmap_size: int
    journal_offset: int
    table_offset: int
    table_size: int
    chunk_size: int
    grow_unit: int
    data_file: bool
    fixed: bool
    capacity: int
    size_max: int = 0  # to which it grows; 0: it does not

    @property
    def compact(self) -> bool:
        """Whether a table says where chunks lie."""
        return self.table_size > 0

    @property
    def chunks(self) -> int:
        """Chunks of the disk."""
        return -(-self.size // self.chunk_size)


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of operation of one disk fails: the n-th, or a part of all."""

    disk: str
    op: str
    countdown: int
    error: int
    sticky: bool
    chance: int


@dataclass(frozen=True, slots=True)
class Session:
    """From one open to the next."""

    requests: int
    clones: int
    end: str
    faults: tuple[Fault, ...] = ()
    actions: tuple[tuple[int, int, int], ...] = ()
    outage: extras.Outage | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run, ready to be made."""

    name: str
    seed: int
    geometry: Geometry
    header: Header
    holes: tuple[tuple[int, int], ...]
    leftover: bool
    sessions: tuple[Session, ...]
    chain: int  # what a base that is an image is drawn from; 0: the base is raw
    config: dict[str, Any] = field(repr=False)


# -- geometry ----------------------------------------------------------------------------------


def draw_layout(rng: random.Random, name: str) -> tuple[bool, bool, bool]:
    """Compact? A data file? Storage that cannot grow (a device)?"""
    compact = name in ("compact", "reuse") or (name != "raw" and rng.random() < 0.5)
    return compact, rng.random() < 0.25, rng.random() < 0.3


def draw_capacity(rng: random.Random, name: str, chunks: int, chunk_size: int) -> int:
    """Bytes for chunks: all that can be mapped, more for what waits to be free, or too few."""
    few = rng.random() < (0.15 if name in ("mixed", "compact", "faults") else 0)
    places = max(chunks // 2, 1) if few else chunks + rng.choice((0, 1, chunks))
    return places * chunk_size + rng.choice((0, 0, PAGE)) * (chunk_size > PAGE)


def draw_geometry(rng: random.Random, name: str) -> Geometry:
    """Sizes that meet borders: odd blocks, a base that ends anywhere, tiny journals."""
    compact, data_file, fixed = draw_layout(rng, name)
    block_size = rng.choice((4096, 4096, 512, 1024, 2048, 1536, 8192, 16384, 65536, 12288))
    sectors = rng.choice((64, 256, 512, 1024, 2048, 3072)) + rng.choice((0, 0, 1, 7, 24))
    if name == "reuse":
        sectors, block_size = rng.choice((64, 128, 256)), rng.choice((4096, 1024))
    if name in EXHAUSTED:
        sectors = rng.choice((8, 17, 32))
        block_size = rng.choice((512, 1024, 4096))
    size = sectors * SECTOR
    base_length = 0
    if name != "plain" and not (compact and rng.random() < 0.3):
        base_length = rng.choice(
            (size, size, size - SECTOR, size // 2 // SECTOR * SECTOR, size - 700, size + 4096)
        )
    base_size = min(round_up(base_length, SECTOR), size)
    chunk_size = lcm(PAGE, block_size) * rng.choice((1, 1, 2, 4, 16))
    table_size = round_up(4 * -(-size // chunk_size), PAGE) if compact else 0
    blocks = -(-base_size // block_size)
    bitmap_size = round_up(-(-blocks // 8), PAGE) if base_size else 0
    journal_size = rng.choice((PAGE, 2 * PAGE, 4 * PAGE, 8 * PAGE, 16 * PAGE, 64 * PAGE))
    if name in ("journal", "small", "grow", "reuse"):
        journal_size = rng.choice((PAGE, PAGE, 2 * PAGE))
    if (name != "journal" and rng.random() < 0.1) or not (base_size or compact):
        journal_size = 0
    table_offset = 16384 + bitmap_size + journal_size
    chunk_room = draw_capacity(rng, name, -(-size // chunk_size), chunk_size)
    return Geometry(
        size=size, base_size=base_size, base_length=base_length, block_size=block_size,
        journal_size=journal_size,
        data_offset=0 if data_file else table_offset + table_size + rng.choice((0, 0, PAGE)),
        bitmap_offset=16384 if base_size else 0, bitmap_size=bitmap_size,
        journal_offset=16384 + bitmap_size if journal_size else 0,
        table_offset=table_offset if compact else 0, table_size=table_size,
        chunk_size=chunk_size, grow_unit=chunk_size * rng.choice((1, 1, 3, 16)),
        data_file=data_file, fixed=fixed, capacity=chunk_room if compact else size,
    )  # fmt: skip


def make_header(rng: random.Random, g: Geometry) -> Header:
    extension = Extension(
        UUID, bytes(16), bytes(16), 1_700_000_000, FEATURE_JOURNAL_TRAILERS, g.base_length,
        0, bytes(32),
    )  # fmt: skip
    return Header(
        magic=0x00445646, header_size=16384, create_version=2, last_open_version=2,
        virtual_disk_size=g.size, data_offset=g.data_offset,
        data_file="data.raw" if g.data_file else "", data_file_fmt="raw" if g.data_file else "",
        base_img="base.raw" if g.base_size else "", base_img_fmt="raw" if g.base_size else "",
        base_img_size=g.base_size, bitmap_offset=g.bitmap_offset, bitmap_size=g.bitmap_size,
        block_size=g.block_size, journal_offset=g.journal_offset, journal_size=g.journal_size,
        clean_shutdown=1, stable_journal_epoch=1,
        journal_buf_size=min(rng.choice((0, 64, 512, 4096, 65536)), g.journal_size or 65536),
        journal_clean_buf_period=rng.choice((0, 1, 20, 5000)),
        table_offset=g.table_offset, table_size=g.table_size, chunk_size=g.chunk_size,
        storage_grow_unit=g.grow_unit, add_storage_cmd="", chunks_relocated=0,
        copy_on_read=int(rng.random() < 0.5),
        max_outstanding_copy_on_read_data=rng.choice((1, 65536, 2_000_000)),
        prefetch_start_delay=-1, base_img_fully_prefetched=0 if g.base_size else 1,
        num_prefetch_slots=2, bytes_per_prefetch=g.block_size * rng.choice((1, 2, 5, 16)),
        prefetch_read_throughput_measure_time=100, prefetch_write_throughput_measure_time=100,
        prefetch_min_read_throughput=0, prefetch_min_write_throughput=0,
        prefetch_max_read_throughput=10**9, prefetch_max_write_throughput=10**9,
        prefetch_throttle_time=30000, need_zero_init=0,
        incompatible_features=bytes(FEATURES_SIZE), extension=extension,
    )  # fmt: skip


# -- workload ----------------------------------------------------------------------------------


def draw_config(rng: random.Random, name: str, g: Geometry) -> dict[str, Any]:
    """Scheduler, guests and disks."""
    prefetch = rng.choice((-1, -1, 0, 0, 1)) if name != "prefetch" else 0
    weights = [rng.choice((0, 1, 4, 8)) for _ in range(6)]
    weights[0] += 2
    weights[1] += 4
    weights[2] += rng.choice((0, 1, 2))
    delay = rng.choice((1, 10_000, 1_000_000, 30_000_000, 2_000_000_000))
    disk = {
        "holes": rng.random() < 0.8, "hints": rng.random() < 0.7, "again": rng.random() < 0.5,
        "writeback": rng.choice((0, 8, 64)), "fixed": g.fixed, "delay_max": delay,
        "wait_chance": rng.choice((2, 6, 16)),
    }  # fmt: skip
    return {
        "policy": rng.choice((0, 0, 1, 2)), "preempt": rng.choice((0, 8, 40, 200)),
        "spurious": rng.choice((0, 0, 300)), "guests": rng.choice((1, 2, 3, 4)),
        "crew": rng.choice((1, 2, 4, 8)), "depth": rng.choice((1, 2, 4, 8)),
        "hot": rng.choice((0, 0, 16, 48, 128)), "length_max": rng.choice((8, 40, 200)),
        "think_ns": rng.choice((0, 0, 1_000_000, 400_000_000)), "weights": weights,
        "fua": rng.choice((0, 16, 100)), "inline": rng.choice((0, 200, 256)),
        "prefetch_delay": prefetch if g.base_size else -1,
        "with_live": rng.random() < 0.7, "file": disk, "stall": 4 * delay * rng.choice((0, 1)),
        "base": disk | {"delay_max": rng.choice((delay, delay * 10)), "writeback": 0},
    }  # fmt: skip


def draw_faults(rng: random.Random, name: str) -> tuple[Fault, ...]:
    """Mostly none; in `faults` always some."""
    if name != "faults" and rng.random() > 0.25:
        return ()
    found = []
    for _ in range(rng.choice((1, 1, 2))):
        disk, op, error = rng.choice((
            ("file", "read", errno.EIO), ("file", "write", errno.EIO),
            ("file", "write", errno.ENOSPC), ("file", "flush", errno.EIO),
            ("file", "flush", errno.ENOSPC), ("file", "zero", errno.EIO),
            ("file", "resize", errno.ENOSPC), ("file", "resize", errno.EIO),
            ("data", "write", errno.EIO), ("data", "flush", errno.EIO),
            ("base", "read", errno.EIO),
        ))  # fmt: skip
        if op == "flush" or rng.random() < 0.6:
            found.append(Fault(disk, op, rng.randrange(60), error, rng.random() < 0.3, 0))
        else:
            found.append(Fault(disk, op, -1, error, False, rng.choice((200, 2000, 12000))))
    return tuple(found)


def draw_sessions(
    rng: random.Random, name: str, requests: int, clones: int
) -> tuple[Session, ...]:
    """Split the requests among one to four sessions, each with an end of its own."""
    count = rng.choice((1, 1, 2, 3, 4))
    found = []
    for _ in range(count):
        end = rng.choice(("close", "power", "power", "death", "death"))
        found.append(
            Session(requests // count, -(-clones // count), end, draw_faults(rng, name))
        )
    return tuple(found)


def draw_holes(rng: random.Random, g: Geometry) -> tuple[tuple[int, int], ...]:
    """Runs of zeros in the base: (first sector, sectors)."""
    sectors = g.base_length // SECTOR
    found = []
    for _ in range(rng.choice((0, 1, 2, 5))):
        first = rng.randrange(max(sectors, 1))
        found.append((first, 1 + rng.randrange(max(sectors // 4, 1))))
    return tuple(found)


def draw(name: str, seed: int, requests: int = 300, clones: int = 20) -> Scenario:
    """The run of a seed."""
    if name == "nth":
        return draw_nth(seed)
    rng, more = random.Random(f"{name}/{seed}"), random.Random(f"{name}/{seed}/more")
    if name in EXHAUSTED:
        requests, clones = min(requests, 24 if name == "small" else 12), 1
    g, sizes = extras.draw_growth(more, name, draw_geometry(rng, name))
    g, chain = extras.draw_base(more, name, g)
    header = make_header(rng, g)
    sessions = extras.draw_actions(
        more, name, sizes, draw_sessions(rng, name, requests, clones)
    )
    sessions = extras.draw_outages(more, name, g, sessions)
    config = draw_config(rng, name, g)
    if name == "reuse":
        # Chunks lose their places all the time, while slow requests still use them.
        config |= {"hot": 0, "weights": [6, 6, 4, 8, 2, 0], "depth": 4, "full_expected": True,
                   "guests": rng.choice((3, 4))}  # fmt: skip
    if name == "prefetch":
        # Copies of all kinds beside writes of the same few blocks.
        header = replace(header, copy_on_read=1)
        config |= {"hot": rng.choice((16, 48)), "weights": [8, 6, 1, 0, 1, 0]}
    if name in EXHAUSTED:
        few = EXHAUSTIVE if g.size < WIDE else EXHAUSTIVE_WIDE
        config |= {"exhaustive": few, "hot": 0, "length_max": 3, "depth": 1}
        config["guests"] = rng.choice((1, 2))
    size_max = g.size_max or g.size
    table_max = round_up(4 * -(-size_max // g.chunk_size), PAGE) if g.compact else 0
    config |= {
        "seed": rng.getrandbits(63), "size_max": size_max,
        # Where data have a file of their own, metadata may grow.
        "capacity": metadata_end(g) + (PAGE if g.data_file else round_up(g.capacity, PAGE)),
        "data_capacity": round_up(g.capacity, PAGE) if g.data_file else 0,
        "ops_max": requests + 64, "border": metadata_end(g),
        "live_bytes": Device.live_size(g.bitmap_size, table_max),
        "full_expected": g.compact and (
            g.capacity < round_up(size_max, g.chunk_size) or config["weights"][TRIM] > 0
        ),
        "distant": more.random() < 0.3, "prefetch_policy": more.choice((0, 1, 2, 2)),
        "verify_share": VERIFY_SHARE_EXHAUSTIVE if name in EXHAUSTED else VERIFY_SHARE,
    } | extras.draw_flat(random.Random(f"{name}/{seed}/flat"), chain)  # fmt: skip
    config |= extras.draw_steps(random.Random(f"{name}/{seed}/steps"), config)
    habits = random.Random(f"{name}/{seed}/habits")
    config |= extras.draw_habits(habits, name, chain)
    if config["patient"]:
        sessions = extras.draw_hangs(habits, sessions)
    return Scenario(
        name, seed, g, header, draw_holes(rng, g), rng.random() < 0.5, sessions, chain, config
    )


def draw_nth(seed: int) -> Scenario:
    """One of the small runs, in which the n-th operation of one kind fails: every n in turn."""
    which, at = divmod(seed, NTH_RUNS)
    kind, n = divmod(at, NTH_MAX)
    disk, op, error, sticky = NTH_KINDS[kind]
    small = draw("grow" if which % 2 else "small", which, 24, 2)
    while small.geometry.size > WIDE and which % 10 != 9:  # these take their time
        which += 1000
        small = draw("grow", which, 24, 2)
    sessions = (
        Session(24, 2, "close", (Fault(disk, op, n, error, sticky, 0),),
                small.sessions[0].actions),
        Session(8, 1, "close"),
    )  # fmt: skip
    config = small.config | {"exhaustive": 0}
    return replace(small, name="nth", seed=seed, sessions=sessions, config=config)


# -- content -----------------------------------------------------------------------------------


def base_content(s: Scenario) -> bytes | None:
    """The base: random, non-zero but for its holes, ending within a sector now and then."""
    if not s.geometry.base_size:
        return None
    length = s.geometry.base_length
    content = bytearray(sheets()[0].cut(0, -(-length // SECTOR)))
    for first, count in s.holes:
        end = min((first + count) * SECTOR, len(content))
        content[first * SECTOR : end] = bytes(max(end - first * SECTOR, 0))
    return bytes(content[:length])


def base_files(s: Scenario, base: bytes | None) -> tuple[bytes | None, ...]:
    """The base's file, that of its own base if it is an image, and that of the base of this."""
    if base is None or not s.chain:
        return base, None, None
    upper, below = extras.lower_image(s.chain, base, sheets()[1])
    if s.config["flat"] < 2:
        return upper, below, None
    return upper, *extras.lower_image(s.chain + 1, below, sheets()[1])


def start_content(s: Scenario, base: bytes | None) -> bytes:
    """What the virtual disk shows before anybody wrote."""
    return (base or b"")[: s.geometry.base_size].ljust(s.geometry.size, b"\0")


def metadata_end(g: Geometry) -> int:
    """Where data may begin in the image file."""
    behind = max(16384 + g.bitmap_size + g.journal_size, g.table_offset + g.table_size)
    return max(g.data_offset, behind)


def data_content(s: Scenario) -> bytes:
    """What lies where data will: poison where content is unknown (I9), zeros where it is promised.

    A compact file has nothing yet, or what a dead process left behind its last chunk."""
    g = s.geometry
    poison = sheets()[1]
    if not g.compact:
        unknown = poison.cut(0, g.base_size // SECTOR).ljust(g.size, b"\0")
        # Behind the disk: a device, or what an older, longer disk had there.
        behind = g.capacity if g.fixed or s.leftover else g.size
        return unknown + poison.cut(g.size // SECTOR, (behind - g.size) // SECTOR)
    if g.fixed:
        return poison.cut(0, g.capacity // SECTOR)
    left = g.capacity // 2 // SECTOR if s.leftover else 0
    return poison.cut(0, left)


def image_content(s: Scenario) -> bytes:
    """The image file: header, empty metadata, and the data unless they have a file of their own."""
    g = s.geometry
    head = s.header.pack()
    meta = bytearray((head + head).ljust(metadata_end(g), b"\0"))
    entries = 4 * g.chunks if g.compact else 0
    # Behind the last chunk's entry anything may stand.
    table = (b"\xff" * entries + sheets()[1].cut(0, g.table_size // SECTOR))[: g.table_size]
    meta[g.table_offset : g.table_offset + g.table_size] = table
    if g.table_size == 0:
        meta[: len(head)] = head
    return bytes(meta) + (b"" if g.data_file else data_content(s))


def without_faults(s: Scenario) -> Scenario:
    """The same run on sound disks."""
    return replace(s, sessions=tuple(replace(x, faults=()) for x in s.sessions))
