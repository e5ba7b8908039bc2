# SPDX-License-Identifier: Apache-2.0
"""Other people's NBD programs agree with us, on every kind of image, to the byte.

Each test starts from a world whose content is known (conftest.py) and ends by reading the whole
device again, through another program than the one under test where there is a choice.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from fvdtest.model import KIB, MIB
from fvdtest.serve import Server
from fvdtest.tools import libnbd_script, run

from .conftest import IMAGE_SIZE, Reading, World, create

FOUR = ("--connections=4", "--threads=4", "--requests=16")


def test_nbdinfo_tells_what_the_export_can_do(clone: World) -> None:
    with clone.serve() as server:
        told = json.loads(run("nbdinfo", "--json", server.uri))
    assert told["protocol"] == "newstyle-fixed"
    assert told["TLS"] is False
    assert told["structured"] is True
    (export,) = told["exports"]
    expected = {
        "export-name": "",
        "description": "image.fvd",
        "export-size": IMAGE_SIZE,
        "contexts": ["base:allocation"],
        "is_read_only": False,
        "is_rotational": False,
        "can_cache": False,
        "can_df": True,
        "can_fast_zero": False,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MIB,
    }
    assert {name: export[name] for name in expected} == expected


def test_nbdinfo_of_a_read_only_export_offers_no_change(clone: World) -> None:
    with clone.serve("-r") as server:
        (export,) = json.loads(run("nbdinfo", "--json", server.uri))["exports"]
    assert export["is_read_only"] is True
    assert export["can_trim"] is False
    assert export["can_zero"] is False


def test_nbdinfo_lists_the_export(clone: World) -> None:
    with clone.serve(tcp=True) as server:
        told = json.loads(run("nbdinfo", "--json", "--list", server.uri))
    assert [export["export-name"] for export in told["exports"]] == [""]


def test_nbdinfo_map_covers_the_device_and_never_calls_data_a_hole(reading: Reading) -> None:
    position = 0
    for extent in json.loads(run("nbdinfo", "--map", "--json", reading.server.uri)):
        assert extent["offset"] == position
        assert extent["length"] > 0
        if extent["type"] & 2:
            found = reading.world.model.read(position, extent["length"])
            assert not found.strip(b"\0"), f"data at {position} are said to be zeros"
        position += extent["length"]
    assert position == IMAGE_SIZE


def test_qemu_img_compares_equal_with_the_flat_content(reading: Reading) -> None:
    options = ("-f", "raw", "-F", "raw")
    run("qemu-img", "compare", *options, reading.server.uri, reading.expected)


def test_qemu_img_compares_equal_over_tcp(clone: World) -> None:
    expected = clone.model.save(clone.new_file("expected.raw"))
    with clone.serve("-r", tcp=True) as server:
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, expected)


def test_qemu_img_converts_out_of_the_device(reading: Reading, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", reading.server.uri, copy)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", copy, reading.expected)


def test_qemu_img_converts_into_the_device(world: World) -> None:
    content = world.rng.randbytes(3 * MIB) + bytes(2 * MIB)
    content += world.rng.randbytes(IMAGE_SIZE - len(content))
    world.model.write(0, content)
    source = world.model.save(world.new_file("source.raw"))
    with world.serve() as server:
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, server.uri)
        world.expect(server)
    with world.serve() as server:
        world.expect(server)


QEMU_IO_STEPS = [
    # (command, offset, length, pattern); the pattern is what the range must read as afterwards
    ("write -P {p}", 0, 65536, 0x11),
    ("write -P {p}", 4095, 2, 0x22),
    ("write -f -P {p}", 100_001, 70_003, 0x33),
    ("write -z", 8192, 4096, 0),
    ("write -z", 130_000, 100_000, 0),
    ("write -z -u", 300_000, 400_000, 0),
    ("write -P {p}", 6 * MIB, 64 * KIB, 0x44),
    ("write -P {p}", IMAGE_SIZE - 777, 777, 0x55),
    ("aio_write -P {p}", MIB, 2 * MIB, 0x66),
]


def test_qemu_io_patterns_read_back(world: World) -> None:
    # qemu-io prints "Pattern verification failed" and goes on, so its output is looked at.
    words: list[str] = []
    for command, offset, length, pattern in QEMU_IO_STEPS:
        words += ["-c", f"{command.format(p=pattern)} {offset} {length}"]
        if command.startswith("aio"):
            words += ["-c", "aio_flush"]
        words += ["-c", f"read -P {pattern} {offset} {length}"]
        world.model.write(offset, bytes([pattern]) * length)
    with world.serve() as server:
        told = run("qemu-io", "-f", "raw", *words, "-c", "flush", server.uri)
        assert "failed" not in told
        world.expect(server)


def test_qemu_io_discard_leaves_the_rest_alone(world: World) -> None:
    offset, length = MIB, 2 * MIB
    with world.serve() as server:
        run("qemu-io", "-d", "unmap", "-f", "raw", "-c", f"discard {offset} {length}", server.uri)
        with server.connect() as client:
            # What was trimmed may read as before, as zeros, or block by block either.
            found = client.read(offset, length)
            for at in range(0, length, 4096):
                piece = found[at : at + 4096]
                assert piece in (world.model.read(offset + at, 4096), bytes(4096))
            world.model.write(offset, found)
        world.expect(server)


def test_nbdcopy_reads_with_four_connections(reading: Reading, tmp_path: Path) -> None:
    copy = tmp_path / "copy.raw"
    run("nbdcopy", *FOUR, reading.server.uri, copy)
    found = copy.read_bytes().ljust(IMAGE_SIZE, b"\0")
    assert reading.world.model.difference(found) is None


def test_nbdcopy_writes_with_four_connections(world: World) -> None:
    world.model.write(0, world.rng.randbytes(4 * MIB) + bytes(MIB))
    source = world.model.save(world.new_file("source.raw"))
    with world.serve() as server:
        run("nbdcopy", *FOUR, "--flush", source, server.uri)
        assert server.log.count('message="connection open"') >= 4
        world.expect(server)


def test_nbdcopy_between_two_devices(tmp_path: Path, world: World) -> None:
    directory = tmp_path / "second"
    directory.mkdir()
    second = World(directory, directory / "copy.fvd", world.model, world.rng)
    create(second.image, size=IMAGE_SIZE)
    with world.serve() as source, second.serve() as target:
        run("nbdcopy", *FOUR, source.uri, target.uri)
        second.expect(target)


LIBNBD_SCRIPT = """
import os
size = h.get_size()
assert h.can_meta_context("base:allocation")
assert h.get_structured_replies_negotiated()

# Many requests in flight at once, none beside another, answered in any order.
def finish(cookies):
    while cookies:
        h.poll(-1)
        cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
written = {i * 100003: os.urandom(5000 + i) for i in range(64)}
sent = {at: nbd.Buffer.from_bytearray(bytearray(data)) for at, data in written.items()}
finish([h.aio_pwrite(buffer, offset) for offset, buffer in sent.items()])
h.flush()
reads = {offset: nbd.Buffer(len(data)) for offset, data in written.items()}
finish([h.aio_pread(buffer, offset) for offset, buffer in reads.items()])
for offset, buffer in reads.items():
    assert buffer.to_bytearray() == written[offset], offset

# The extents of block status add up, also where one extent is asked for.
def extents(offset, length, flags=0):
    found = []
    h.block_status(length, offset, lambda c, o, e, err: found.extend(e) or 0, flags)
    return found
total = 0
while total < size:
    got = extents(total, min(size - total, 1 << 20))
    lengths = got[0::2]
    assert lengths and all(lengths), got
    total += sum(lengths)
one = extents(512, 4096, nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 2 and one[0] <= 4096, one

# A structured read in chunks covers the range once.
seen = []
def chunk(piece, offset, status, error):
    seen.append((offset, len(piece)))
    return 0
data = h.pread_structured(1000000, 333, chunk)
position = 333
for offset, length in sorted(seen):
    assert offset == position, seen
    position += length
assert position == 1000333
seen.clear()
assert h.pread_structured(1000000, 333, chunk, nbd.CMD_FLAG_DF) == data
assert seen == [(333, 1000000)], seen

# Errors come back as errors and leave the connection usable.
h.set_strict_mode(0)
for call in (
    lambda: h.pread(512, size),
    lambda: h.pwrite(b"x" * 512, size - 511),
    lambda: h.zero(4096, size),
    lambda: h.trim(4096, size),
    lambda: h.cache(512, 0),
):
    try:
        call()
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "ENOSPC"), error
    else:
        raise AssertionError("an error was expected")
assert len(h.pread(512, size - 512)) == 512
h.shutdown()
print("done")
"""


def test_libnbd_finds_no_fault(world: World) -> None:
    with world.serve() as server:
        assert libnbd_script(server.uri, LIBNBD_SCRIPT).strip() == "done"


def test_nbdkit_is_content_with_the_export(reading: Reading) -> None:
    """nbdkit's own client side: its nbd plugin proxies our export to qemu-img."""
    command = f'qemu-img compare -f raw -F raw "$uri" "{reading.expected}"'
    run("nbdkit", "-U", "-", "-r", "nbd", f"uri={reading.server.uri}", "--run", command)


def test_simple_and_structured_replies_say_the_same(reading: Reading, rng: random.Random) -> None:
    with reading.server.connect() as simple, reading.server.connect(structured=True) as structured:
        for _ in range(50):
            offset = rng.randrange(IMAGE_SIZE - 1)
            length = rng.randint(1, min(300_000, IMAGE_SIZE - offset))
            expected = reading.world.model.read(offset, length)
            assert simple.read(offset, length) == expected
            assert structured.read(offset, length) == expected


def test_device_is_the_same_after_a_clean_stop(world: World) -> None:
    for _ in range(2):
        with world.serve() as server:
            world.scribble(server)
    with world.serve("-r") as server:
        world.expect(server)


def served(world: World, *options: str) -> Server:
    """A server of the world's image with copy-on-read and prefetch at work."""
    return world.serve("--copy-on-read", "--prefetch-delay", "0", *options)


def test_copy_on_read_and_prefetch_change_no_byte(world: World) -> None:
    expected = world.model.save(world.new_file("expected.raw"))
    with served(world) as server:
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", server.uri, expected)
        world.scribble(server, 200)
        world.expect(server)
    with world.serve() as server:
        world.expect(server)
