# SPDX-License-Identifier: Apache-2.0
"""What happens to a device besides requests: it grows, is updated, prefetches politely, and its
base may be an image itself, far away, or away for a while.

All of it is drawn from a sequence of its own, so that it changes nothing else of a run.
"""

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fvdengine.header import FEATURE_JOURNAL_TRAILERS, FEATURES_SIZE, Extension, Header
from fvdtest.sim import pattern

if TYPE_CHECKING:
    from fvdtest.sim.scenario import Geometry, Session

SECTOR = pattern.SECTOR
PAGE = 4096
ENTRIES = PAGE // 4  # chunks of one page of the table
UNMAPPED = b"\xff\xff\xff\xff"
GROW, UPDATE, PREFETCH = range(3)
ACTIONS_MAX = 8
STILL = ("reuse", "small", "nth")  # nothing beside the requests: these look at something else


@dataclass(frozen=True, slots=True)
class Outage:
    """From the n-th read on the base is away for ns; a read waits patience_ns, then fails."""

    reads: int
    ns: int
    patience_ns: int


def round_up(value: int, unit: int) -> int:
    return (value + unit - 1) // unit * unit


# -- growing -----------------------------------------------------------------------------------


def make_wide(rng: random.Random, g: "Geometry") -> "Geometry":
    """Nearly as many chunks as one page of the table can name: growing moves chunks away."""
    block_size = rng.choice((512, 1024, 2048, 4096))
    size = (ENTRIES - rng.choice((0, 0, 3, 40))) * PAGE - rng.choice((0, 0, 1, 3)) * SECTOR
    base_length = rng.choice((65536, 300_000, 700_000)) if g.base_size else 0
    base_size = round_up(base_length, SECTOR)
    bitmap_size = round_up(-(-base_size // block_size // 8) + 1, PAGE) if base_size else 0
    table_offset = 16384 + bitmap_size + g.journal_size
    return replace(
        g, size=size, base_size=base_size, base_length=base_length, block_size=block_size,
        bitmap_offset=16384 if base_size else 0, bitmap_size=bitmap_size,
        journal_offset=16384 + bitmap_size if g.journal_size else 0,
        table_offset=table_offset, table_size=PAGE, chunk_size=PAGE,
        grow_unit=PAGE * rng.choice((1, 3, 16)), data_file=False,
        data_offset=table_offset + PAGE, capacity=rng.choice((64, 200, 400)) * PAGE,
    )  # fmt: skip


def draw_sizes(rng: random.Random, g: "Geometry", wide: bool) -> list[int]:
    """To which sizes the disk grows, one after the other."""
    sizes = []
    at = g.size
    much = PAGE if wide else (g.size // 4 // SECTOR + 1) * SECTOR
    steps = (SECTOR, 3 * SECTOR, g.block_size, g.chunk_size, 3 * g.chunk_size + SECTOR, much)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at += rng.choice(steps)
        sizes.append(at)
    if wide:
        sizes[0] = max(sizes[0], (ENTRIES + rng.randrange(1, 20)) * PAGE - rng.choice((0, SECTOR)))
    return sorted(set(sizes))


def draw_growth(
    rng: random.Random, name: str, g: "Geometry"
) -> tuple["Geometry", list[int]]:
    """The geometry of a disk that grows, and how."""
    if name in STILL or (name != "grow" and rng.random() > 0.45):
        return g, []
    wide = g.compact and name != "plain" and rng.random() < 0.5
    if wide:
        g = make_wide(rng, g)
    sizes = draw_sizes(rng, g, wide)
    if not g.compact and not (g.fixed and rng.random() < 0.3):
        g = replace(g, capacity=sizes[-1])  # else the device is too short
    return replace(g, size_max=sizes[-1]), sizes


def draw_actions(
    rng: random.Random, name: str, sizes: list[int], sessions: tuple["Session", ...]
) -> tuple["Session", ...]:
    """What the manager does in each session, and when."""
    if name in STILL:
        return sessions
    found = []
    for at, session in enumerate(sessions):
        actions = [(GROW, size) for size in sizes[at :: len(sessions)]]
        if name == "grow" or rng.random() < 0.3:
            actions += [(UPDATE, rng.getrandbits(36)) for _ in range(rng.choice((1, 2, 3)))]
        if rng.random() < 0.2:
            actions += [(PREFETCH, on) for on in rng.choice(((0, 1), (1,), (0, 1, 0, 1)))]
        actions = actions[:ACTIONS_MAX]
        when = sorted(rng.randrange(session.requests + 1) for _ in actions)
        order = sorted((rng.random(), i) for i in range(len(actions)))
        mixed = [actions[i] for _, i in order]
        found.append(replace(session, actions=tuple(
            (kind, moment, value) for moment, (kind, value) in zip(when, mixed, strict=True)
        )))  # fmt: skip
    return tuple(found)


# -- the base ----------------------------------------------------------------------------------


def draw_outages(
    rng: random.Random, name: str, g: "Geometry", sessions: tuple["Session", ...]
) -> tuple["Session", ...]:
    """Now and then the base hangs, or the way to it is cut."""
    if name in STILL or not g.base_size:
        return sessions
    often = 0.4 if name == "faults" else 0.16
    return tuple(
        replace(session, outage=Outage(
            rng.randrange(30), rng.choice((10**8, 5 * 10**9, 2 * 10**11)),
            rng.choice((0, 10**9, 6 * 10**10)),
        )) if rng.random() < often else session
        for session in sessions
    )  # fmt: skip


def draw_base(rng: random.Random, name: str, g: "Geometry") -> tuple["Geometry", int]:
    """Is the base an image? Then it has whole sectors. The second: what its image is drawn from."""
    if name in STILL or not g.base_size or rng.random() > 0.3:
        return g, 0
    return replace(g, base_length=round_up(g.base_length, SECTOR)), rng.getrandbits(48) | 1


def draw_flat(rng: random.Random, chain: int) -> dict[str, int]:
    """How the device reads a base that is an image. flat: 0: layer after layer; else through a map
    of the owners of so many images. ends_base: it lets go of its base once all is local."""
    if not chain:
        return {"flat": 0, "ends_base": 0}
    return {"flat": rng.choice((0, 1, 2, 2)), "ends_base": rng.choice((0, 1))}


def draw_habits(rng: random.Random, name: str, chain: int) -> dict[str, int]:
    """ahead_min: a growth of storage by so much is allocated before it is needed; 0: those that the
    engine chooses, which are larger than a whole disk here. patient: a raw base is read by readers
    of its own, which hang with it, and it is let go of when all is local."""
    found = {"ahead_min": 0, "patient": 0}
    if name in STILL:
        return found
    found["ahead_min"] = rng.choice((0, 1))
    if not chain and rng.random() < 0.5:
        found |= {"patient": 1, "ends_base": rng.choice((0, 1))}
    return found


def draw_hangs(
    rng: random.Random, sessions: tuple["Session", ...]
) -> tuple["Session", ...]:
    """What is read with patience hangs more often, and for longer than it is waited for."""
    return tuple(
        replace(session, outage=Outage(
            rng.randrange(40), rng.choice((5 * 10**9, 2 * 10**11, 10**13)), rng.choice((0, 10**9))
        )) if session.outage is None and rng.random() < 0.35 else session
        for session in sessions
    )  # fmt: skip


def lower_image(
    seed: int, content: bytes, stranger: pattern.Sheet
) -> tuple[bytes, bytes]:
    """An image that shows the content, and its own base. What is not to be seen is a stranger's."""
    rng = random.Random(seed)
    size = len(content)
    block_size = rng.choice((512, 4096, 4096, 8192))
    compact = rng.random() < 0.5
    blocks = -(-size // block_size)
    share = rng.choice((0.1, 0.5, 0.9))
    local = [rng.random() < share for _ in range(blocks)]
    bitmap = bytearray(round_up(-(-blocks // 8), PAGE))
    below = bytearray(stranger.cut(0, size // SECTOR))
    above = bytearray(stranger.cut(0, size // SECTOR))
    for n, here in enumerate(local):
        part = slice(n * block_size, min((n + 1) * block_size, size))
        (above if here else below)[part] = content[part]
        bitmap[n // 8] |= here << (n % 8)
    chunk_size = max(block_size, PAGE)
    chunks = -(-size // chunk_size)
    table_offset = 16384 + len(bitmap)
    table_size = round_up(4 * chunks, PAGE) if compact else 0
    table, data = place_chunks(rng, above, chunk_size) if compact else (b"", bytes(above))
    header = lower_header(size, block_size, len(bitmap), table_offset, table_size, chunk_size)
    head = header.pack()
    front = head + head + bytes(bitmap) + table.ljust(table_size, b"\xff")
    return front + data, bytes(below)


def place_chunks(rng: random.Random, above: bytearray, chunk_size: int) -> tuple[bytes, bytes]:
    """A table with places in any order, and the data in theirs."""
    chunks = -(-len(above) // chunk_size)
    places = list(range(chunks))
    rng.shuffle(places)
    table = bytearray()
    data = bytearray(chunks * chunk_size)
    for chunk, place in enumerate(places):
        part = bytes(above[chunk * chunk_size : (chunk + 1) * chunk_size]).ljust(chunk_size, b"\0")
        if not any(part):
            table += UNMAPPED
            continue
        table += place.to_bytes(4, "little")
        data[place * chunk_size : (place + 1) * chunk_size] = part
    return bytes(table), bytes(data)


def lower_header(
    size: int, block_size: int, bitmap_size: int, table_offset: int, table_size: int,
    chunk_size: int,
) -> Header:  # fmt: skip
    """The header of a base."""
    extension = Extension(
        bytes(range(2, 18)), bytes(16), bytes(16), 1_700_000_000, FEATURE_JOURNAL_TRAILERS, size,
        0, bytes(32),
    )  # fmt: skip
    return Header(
        magic=0x00445646, header_size=16384, create_version=2, last_open_version=2,
        virtual_disk_size=size, data_offset=table_offset + table_size, data_file="",
        data_file_fmt="", base_img="below.raw", base_img_fmt="raw", base_img_size=size,
        bitmap_offset=16384, bitmap_size=bitmap_size, block_size=block_size, journal_offset=0,
        journal_size=0, clean_shutdown=1, stable_journal_epoch=1, journal_buf_size=0,
        journal_clean_buf_period=0, table_offset=table_offset if table_size else 0,
        table_size=table_size, chunk_size=chunk_size, storage_grow_unit=chunk_size,
        add_storage_cmd="", chunks_relocated=0, copy_on_read=0,
        max_outstanding_copy_on_read_data=1, prefetch_start_delay=-1,
        base_img_fully_prefetched=0, num_prefetch_slots=2, bytes_per_prefetch=block_size,
        prefetch_read_throughput_measure_time=100, prefetch_write_throughput_measure_time=100,
        prefetch_min_read_throughput=0, prefetch_min_write_throughput=0,
        prefetch_max_read_throughput=10**9, prefetch_max_write_throughput=10**9,
        prefetch_throttle_time=30000, need_zero_init=0,
        incompatible_features=bytes(FEATURES_SIZE), extension=extension,
    )  # fmt: skip


def draw_steps(rng: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """Which part of the atomic operations let others go first (none in some runs), and how long at
    most a thread then stays away."""
    delay = config["file"]["delay_max"]
    return {
        "step_every": rng.choice((0, 0, 2, 5, 12, 30, 100)),
        "step_stall": 1 + rng.choice((10_000, delay, 4 * delay)),
    }
