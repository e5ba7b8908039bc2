# SPDX-License-Identifier: Apache-2.0
"""Large reads that leave as pages of the page cache: what a client gets, whatever happens to those
pages between the answer and its arrival."""

import ctypes
import os
import random
import socket
import subprocess
import sys
import termios
from array import array
from fcntl import ioctl

import pytest

from fvdcore import EngineFault
from fvdtest.bench.stand import environment
from fvdtest.images import make_image, open_image
from fvdtest.nbd_client import CMD_READ, NbdClient, NbdError

KIB = 1024
MIB = 1024 * KIB
SIZE = 8 * MIB
LARGE = 256 * KIB
CHUNK = 1 * MIB

# As somebody who may have no more pages of pipes, with argv[1] open: reads, and counts its pipes.
POOR = """
import fcntl, os, socket, sys
from fvdtest.images import open_image
from fvdtest.nbd_client import NbdClient
def pipes():
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sum("pipe:" in os.readlink(link) for link in links if os.path.islink(link))
opened = open_image(sys.argv[1])
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
held = []
for size in range(20, 13, -1):
    try:
        while len(held) < 512:
            held.append(os.pipe())
            fcntl.fcntl(held[-1][0], fcntl.F_SETPIPE_SZ, 1 << size)
    except PermissionError:
        pass
mine, theirs = socket.socketpair()
before = pipes()
opened.device.serve(theirs.detach())
client = NbdClient(mine)
same = client.read(4096, 262144) == bytes([7]) * 262144
print(len(held) < 512, same, pipes() - before)
"""


def pipes():
    """How many ends of pipes this process has."""
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sum(1 for link in links if os.path.islink(link) and "pipe:" in os.readlink(link))


def can_be_spliced(path):
    """Does the kernel tell what is in the page cache (6.5 and later)?"""
    libc = ctypes.CDLL(None, use_errno=True)
    where, found = (ctypes.c_uint64 * 2)(0, 4096), (ctypes.c_uint64 * 5)()
    with path.open("rb") as file:
        return libc.syscall(451, file.fileno(), where, found, 0) == 0


class Stand:
    """An image that is open, and clients of it."""

    def __init__(self, path, **options):
        self.path = path
        self.opened = open_image(path, **options)
        self.device = self.opened.device
        self.clients = []

    def client(self, structured=False):
        mine, theirs = socket.socketpair()
        mine.settimeout(10)
        self.device.serve(theirs.detach(), structured=structured)
        client = NbdClient(mine)
        client.structured = structured
        self.clients.append(client)
        return client

    def close(self):
        for client in self.clients:
            client.close()
        self.opened.close()


@pytest.fixture
def stand(tmp_path):
    """Make an image, fill it, and open it with these options."""
    made = []

    def make(content, compact=False, base=False, **options):
        if base:
            (tmp_path / "base.raw").write_bytes(bytes(SIZE))
            image = make_image(tmp_path / "image.fvd", base=str(tmp_path / "base.raw"),
                               compact=compact)  # fmt: skip
        else:
            image = make_image(tmp_path / "image.fvd", size=SIZE, compact=compact)
        opened = open_image(image)
        opened.device.write(0, content)
        opened.close()
        made.append(Stand(image, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def arrived(client):
    """Bytes that lie in the client's socket."""
    count = array("i", [0])
    ioctl(client.sock, termios.FIONREAD, count)
    return count[0]


def ask(client, offset, length, wait_until):
    """Ask for a range and let the answer lie in the socket."""
    client.send_request(CMD_READ, offset=offset, length=length)
    wait_until(lambda: arrived(client) == 16 + length, "the answer")


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("base", [False, True], ids=["whole", "clone"])
def test_reads_of_all_sizes_and_places_are_right(stand, base, structured):
    content = os.urandom(SIZE - LARGE)
    one = stand(content, base=base)
    content += bytes(LARGE)
    client, rng = one.client(structured), random.Random(1)
    before = pipes()
    for _ in range(40):
        length = rng.choice([64 * KIB - 1, 64 * KIB, 65 * KIB + 7, LARGE, 500 * KIB, MIB])
        offset = rng.randrange((SIZE - length) // 4096) * 4096 + rng.choice([0, 0, 512, 77])
        assert client.read(offset, length) == content[offset : offset + length]
    assert client.read(SIZE - LARGE, LARGE) == bytes(LARGE)
    assert pipes() == before + (2 if can_be_spliced(one.path) else 0)


def test_many_in_flight_are_answered_each_with_its_own(stand):
    content = os.urandom(SIZE)
    one = stand(content)
    client, rng = one.client(), random.Random(2)
    for _ in range(4):
        wanted = {}
        for _ in range(12):
            length = rng.choice([4 * KIB, 64 * KIB, LARGE])
            offset = rng.randrange(SIZE - length)
            wanted[client.send_request(CMD_READ, offset, length)] = (offset, length)
        for _ in range(len(wanted)):
            answer = client.read_answer()
            offset, length = wanted.pop(answer.cookie)
            assert answer.data == content[offset : offset + length]


@pytest.mark.parametrize("way", ["write", "zero", "trim"])
def test_what_is_changed_before_an_answer_arrives_is_old_or_new(stand, wait_until, way):
    """The change was asked for while the read was under way: both are right, for each byte."""
    one = stand(b"o" * SIZE)
    client, other = one.client(), one.client()
    ask(client, CHUNK, LARGE, wait_until)
    if way == "write":
        other.write(CHUNK, b"n" * LARGE)
    elif way == "zero":
        other.write_zeroes(CHUNK, LARGE)
    else:
        other.trim(CHUNK, LARGE)
    other.write(CHUNK + LARGE, b"x" * LARGE)
    assert set(client.read_answer().data) <= set(b"on\0")
    now = other.read(CHUNK, LARGE)
    assert client.read(CHUNK, LARGE) == now


def test_a_chunk_that_others_got_meanwhile_never_shows_in_a_late_answer(stand, wait_until):
    """Places of compact images come to hold other bytes of the disk: their answers are copies."""
    one = stand(b"o" * (2 * CHUNK), compact=True)
    client, other = one.client(), one.client()
    before = pipes()
    ask(client, CHUNK, LARGE, wait_until)
    other.trim(CHUNK, CHUNK)
    other.flush()
    for chunk in range(4, 8):
        other.write(chunk * CHUNK, b"x" * CHUNK)
        other.flush()
    assert client.read_answer().data == b"o" * LARGE
    assert pipes() == before


def test_a_compact_image_that_nobody_writes_is_spliced(stand):
    content = os.urandom(SIZE)
    one = stand(content, compact=True, read_only=True)
    client = one.client()
    before = pipes()
    assert client.read(CHUNK, LARGE) == content[CHUNK : CHUNK + LARGE]
    # Neighbours lie together, so a read over the border of chunks is one piece, too.
    assert client.read(CHUNK - 4096, LARGE) == content[CHUNK - 4096 :][:LARGE]
    assert pipes() == before + (2 if can_be_spliced(one.path) else 0)


def test_what_is_not_in_memory_is_read_by_others(stand):
    content = os.urandom(SIZE)
    one = stand(content)
    client = one.client()
    with one.path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for offset in range(0, SIZE, LARGE):
        assert client.read(offset, LARGE) == content[offset : offset + LARGE]


def test_storage_that_shrank_is_an_error_and_the_connection_lives(stand):
    one = stand(os.urandom(SIZE))
    client = one.client()
    first = client.read(0, LARGE)
    length = one.path.stat().st_size
    os.truncate(one.path, length - SIZE + LARGE)
    with pytest.raises(NbdError):
        client.read(SIZE - LARGE, LARGE)
    assert client.read(0, LARGE) == first
    os.truncate(one.path, length)  # with zeros for what it lost
    with pytest.raises(EngineFault):
        one.device.flush()
    one.device.abandon()


def test_a_pipe_too_small_for_any_reply_is_not_kept(stand):
    one = stand(b"\7" * SIZE)
    one.close()
    done = subprocess.run([sys.executable, "-P", "-c", POOR, str(one.path)], text=True,
                          capture_output=True, env=environment(), check=False)  # fmt: skip
    assert done.stdout.split() == ["True", "True", "0"], done.stderr


def test_a_client_that_leaves_in_the_middle_stops_nobody(stand):
    content = os.urandom(SIZE)
    one = stand(content)
    for _ in range(3):
        client = one.client()
        for number in range(16):
            client.send_request(CMD_READ, number * LARGE, LARGE)
        client.receive(100_000)
        client.close()
    assert one.client().read(5, MIB // 2) == content[5 : 5 + MIB // 2]


def test_a_connection_that_was_handed_over_leaves_no_pipe(stand):
    content = os.urandom(SIZE)
    one = stand(content)
    before = pipes()
    client = one.client()
    assert client.read(0, LARGE) == content[:LARGE]
    given = one.device.hand_over(5.0)
    assert pipes() == before
    ((_, fd, received),) = given
    one.device.serve(fd, received=received)
    assert client.read(MIB, LARGE) == content[MIB : MIB + LARGE]
