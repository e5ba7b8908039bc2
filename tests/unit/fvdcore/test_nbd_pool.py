# SPDX-License-Identifier: Apache-2.0
"""Servers that lie, are silent, or end connections: errors within the time limit, never worse."""

import errno
import struct
import time

import pytest

from fvdtest.remote import (
    CAN_FLUSH,
    CHUNK_DATA,
    CHUNK_ERROR,
    CHUNK_HOLE,
    CHUNK_NONE,
    HAS_FLAGS,
    MULTI_CONN,
    READ_ONLY,
    Liar,
    chunk,
    simple_reply,
)

SIZE = 1 << 20
FLAGS = HAS_FLAGS | READ_ONLY | MULTI_CONN


@pytest.fixture
def liar(tmp_path):
    """Start a server: liar(answer, export=..., blocks=..., greet=...)."""
    made = []

    def start(answer, **options):
        made.append(Liar(tmp_path, answer, **options))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def opened(probes, liar):
    """Open exports; closed before their servers."""
    made = []

    def open_export(uri, **options):
        made.append(probes.nbd.NbdStorage(uri, **options))
        return made[-1]

    yield open_export
    for store in made:
        store.close()


def honest(connection, kind, cookie, offset, length):
    simple_reply(connection, cookie, bytes(length) if kind == 0 else b"")
    return True


def wrong_magic(connection, kind, cookie, offset, length):
    connection.sendall(struct.pack(">IIQ", 0xDEADBEEF, 0, cookie) + bytes(length))
    return True


def wrong_cookie(connection, kind, cookie, offset, length):
    simple_reply(connection, cookie + 77, bytes(length))
    return True


def short(connection, kind, cookie, offset, length):
    simple_reply(connection, cookie, bytes(length // 2))
    return False


def oversized(connection, kind, cookie, offset, length):
    simple_reply(connection, cookie, bytes(length + 65536))
    return True


def twice(connection, kind, cookie, offset, length):
    simple_reply(connection, cookie, bytes(length))
    simple_reply(connection, cookie, b"\xff" * length)
    return True


def structured(connection, kind, cookie, offset, length):
    """A chunk though none was negotiated."""
    connection.sendall(struct.pack(">IHHQI", 0x668E33EF, 1, 1, cookie, 16) + bytes(16))
    return True


def silent(connection, kind, cookie, offset, length):
    return True


def hang_up(connection, kind, cookie, offset, length):
    return False


@pytest.mark.parametrize("answer", [wrong_magic, wrong_cookie, short, structured, silent, hang_up])
def test_bad_answers_are_errors(liar, opened, answer):
    store = opened(liar(answer).uri, timeout=0.5)
    begin = time.monotonic()
    assert store.read(SIZE, 0) == -errno.EIO
    assert store.read(4096, 512) == -errno.EIO
    assert time.monotonic() - begin < 10
    assert store.figures()["losses"] > 0


@pytest.mark.parametrize("answer", [oversized, twice])
def test_too_much_of_an_answer_never_reaches_a_buffer(liar, opened, answer):
    """What was asked for may be taken; what follows it ends the connection."""
    store = opened(liar(answer).uri, timeout=2.0)
    for _ in range(20):
        got = store.read(4096, 4096)
        assert got in (bytes(4096), -errno.EIO)


def data(at, length):
    """A chunk of data for bytes of the request, and what it is in the reply."""
    return CHUNK_DATA, lambda offset: struct.pack(">Q", offset + at) + b"\x5a" * length


def hole(at, length):
    return CHUNK_HOLE, lambda offset: struct.pack(">QI", offset + at, length)


NOTHING = (CHUNK_NONE, lambda offset: b"")
REFUSAL = (CHUNK_ERROR, lambda offset: struct.pack(">IH", errno.EIO, 0))
PARTIAL = {
    "nothing": [NOTHING],
    "short": [data(0, 3584)],
    "a gap in front": [data(512, 3584)],
    "a gap within": [data(0, 1024), hole(2048, 2048)],
    "a short hole": [hole(0, 4095)],
    "too much, with a gap": [data(0, 2048), data(1024, 2048), data(3584, 512)],
    "the first half twice": [data(0, 2048), data(0, 2048)],
    "a part twice instead of another": [data(0, 1024), data(0, 1024), hole(2048, 2048)],
    "all, and a part again": [data(0, 4096), data(0, 512)],
    "all, and an error": [data(0, 4096), REFUSAL],
}
WHOLE = {
    "one": [data(0, 4096)],
    "data and hole": [data(0, 1024), hole(1024, 3072)],
    "in another order": [hole(1024, 3072), data(512, 512), data(0, 512)],
    "with an end of its own": [hole(0, 1024), data(1024, 3072), NOTHING],
}


def chunks_of(parts):
    """Answer reads with these chunks."""

    def answer(connection, kind, cookie, offset, length):
        for i, (what, payload) in enumerate(parts):
            chunk(connection, cookie, what, payload(offset), flags=i == len(parts) - 1)
        return True

    return answer


@pytest.mark.parametrize("name", PARTIAL)
def test_a_reply_that_leaves_something_out_is_an_error(liar, opened, name):
    """Zeros that nobody sent would be taken for the base's, and kept."""
    server = liar(chunks_of(PARTIAL[name]), structured=True)
    store = opened(server.uri, timeout=0.5)
    assert store.read(4096, 8192) == -errno.EIO
    assert len(server.requests) > 1, "it is asked again before that"


@pytest.mark.parametrize("name", WHOLE)
def test_a_reply_in_any_chunks_that_make_the_whole_is_taken(liar, opened, name):
    server = liar(chunks_of(WHOLE[name]), structured=True)
    store = opened(server.uri, timeout=5.0)
    holes = {"one": (0, 0), "with an end of its own": (0, 1024)}.get(name, (1024, 4096))
    expected = bytearray(b"\x5a" * 4096)
    expected[slice(*holes)] = bytes(holes[1] - holes[0])
    assert store.read(4096, 8192) == expected
    assert len(server.requests) == 1


def test_what_a_reply_left_out_is_asked_for_again(liar, opened):
    """The next answer may be whole."""

    def answer(connection, kind, cookie, offset, length):
        parts = PARTIAL["short"] if len(server.requests) == 1 else WHOLE["one"]
        return chunks_of(parts)(connection, kind, cookie, offset, length)

    server = liar(answer, structured=True)
    assert opened(server.uri, timeout=20.0).read(4096, 0) == b"\x5a" * 4096
    assert len(server.requests) == 2


@pytest.mark.parametrize("number", [1, 5, 12, 22, 28, 75, 108, 9999])
def test_errors_of_the_server_are_errors(liar, opened, number):
    def fail(connection, kind, cookie, offset, length):
        simple_reply(connection, cookie, error=number)
        return True

    store = opened(liar(fail).uri, timeout=0.3)
    assert store.read(512, 0) in (-errno.EIO, -errno.EROFS, -errno.ENOSPC)


def test_a_server_that_says_nothing_is_given_up(liar, opened):
    begin = time.monotonic()
    with pytest.raises(OSError, match="does not answer") as caught:
        opened(liar(silent, greet=False).uri, timeout=0.4)
    assert caught.value.errno == errno.ETIMEDOUT
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("length", [(1 << 63) + 5, (1 << 64) - 1])
def test_impossible_lengths_are_refused(liar, opened, length):
    with pytest.raises(OSError):  # noqa: PT011
        opened(liar(honest, export=(length, FLAGS)).uri, timeout=0.4)


@pytest.mark.parametrize(
    "blocks", [(3, 4096, 1 << 20), (4096, 4096, 512), (0, 0, 0), (1 << 20, 1 << 20, 1 << 25)]
)
def test_block_sizes_that_make_no_sense_do_no_harm(liar, opened, blocks):
    try:
        store = opened(liar(honest, blocks=blocks).uri, timeout=0.5)
    except OSError:
        return
    assert store.read(5000, 777) == bytes(5000)


def test_an_export_that_cannot_flush_is_no_data_file(liar, opened):
    server = liar(honest, export=(SIZE, HAS_FLAGS | MULTI_CONN))
    with pytest.raises(OSError, match="cannot flush"):
        opened(server.uri, writable=True, timeout=0.4)


def test_an_empty_export_can_be_opened(liar, opened):
    store = opened(liar(honest, export=(0, FLAGS)).uri)
    assert store.length == 0
    assert store.read(1, 0) == -errno.EIO


def test_a_flush_goes_through_every_connection_that_wrote(liar, opened, task, wait_until):
    """A server that is another process by now must not answer for the one that took the data."""
    server = liar(honest, export=(SIZE, HAS_FLAGS | MULTI_CONN | CAN_FLUSH))
    store = opened(server.uri, writable=True)
    wait_until(lambda: store.figures()["ready"] == 4, "four connections")
    # Eight pieces in flight at once spread over all four.
    assert store.write(bytes(SIZE), 0) == 0
    writes = [one for one in server.requests if one[0] == 1]
    assert len(writes) == SIZE // 262144
    assert store.flush() == 0
    flushes = [one for one in server.requests if one[0] == 3]
    assert 1 <= len(flushes) <= 4
    assert store.flush() == 0
    assert len([one for one in server.requests if one[0] == 3]) == len(flushes) + 1


def test_reconnecting_backs_off(liar, opened, wait_until):
    """A server that hangs up at once is asked a few times a second, not in a loop."""
    server = liar(hang_up)
    store = opened(server.uri, timeout=1.5, connections=1)
    assert store.read(512, 0) == -errno.EIO
    assert 2 <= len(server.requests) <= 12


def test_connections_are_tried_again_later_and_later_and_never_in_step(
    probes, opened, tmp_path, wait_until
):
    """The pauses grow to three seconds, each a quarter shorter or longer by chance."""
    drawn = []
    for _ in range(2):
        gate = probes.gate.Gate()
        store = opened(f"nbd+unix:///?socket={tmp_path / 'nobody'}", length=SIZE, gate=gate)
        drawn.append([])
        for number, usual in enumerate((0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.0, 3.0), 1):
            wait_until(lambda: store.figures()["attempts"] == number, "an attempt")  # noqa: B023
            (pause,) = wait_until(gate.sleepers, "a pause")
            assert 0.749 * usual <= pause <= 1.251 * usual
            drawn[-1].append(pause)
            gate.advance(pause + 0.001)
    assert drawn[0] != drawn[1]
