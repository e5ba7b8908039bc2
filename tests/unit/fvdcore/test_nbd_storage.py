# SPDX-License-Identifier: Apache-2.0
"""Exports of NBD servers as stores: nbdkit as the server, killed, slowed and failing."""

import errno
import os
import struct
import threading
import time

import pytest

from fvdtest.remote import (
    CHUNK_DATA,
    CHUNK_ERROR,
    CHUNK_STATUS,
    HAS_FLAGS,
    MULTI_CONN,
    READ_ONLY,
    Liar,
    Nbdkit,
    chunk,
)

NOWAIT, DSYNC, KEEP, HINT = 1, 2, 1, 2
DATA, ZERO = 0, 1
ALLOCATION_ZERO = 2
MIB = 1 << 20
SIZE = 3 * MIB + 512


@pytest.fixture
def content():
    return os.urandom(SIZE)


@pytest.fixture
def served(tmp_path, content):
    """Start nbdkit over a file: served("--filter=...", "option=value") -> Nbdkit."""
    path = tmp_path / "export"
    path.write_bytes(content)
    servers = []

    def serve(*options, plugin=("file",)):
        filters = [word for word in options if word.startswith("-")]
        rest = [word for word in options if not word.startswith("-")]
        servers.append(Nbdkit(tmp_path, *filters, *plugin, path, *rest))
        servers[-1].path = path
        return servers[-1]

    yield serve
    for server in servers:
        server.kill()


@pytest.fixture
def opened(probes):
    """Open exports that are closed at the end."""
    made = []

    def open_export(uri, **options):
        made.append(probes.nbd.NbdStorage(str(uri), **options))
        return made[-1]

    yield open_export
    for store in made:
        store.close()


@pytest.fixture
def store(served, opened):
    return opened(served().uri)


@pytest.fixture
def writable(served, opened):
    return opened(served().uri, writable=True)


# -- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, SIZE), (0, 0), (1, 1), (4095, 70001), (SIZE - 512, 512), (SIZE, 0), (262143, 262146)],
)
def test_reads_what_the_server_has(store, content, offset, length):
    assert store.length == SIZE
    assert store.read(length, offset) == content[offset : offset + length]


@pytest.mark.parametrize(
    ("offset", "length"), [(SIZE, 1), (0, SIZE + 1), (1 << 63, 512), ((1 << 64) - 1, 2)]
)
def test_ranges_outside_are_refused(store, offset, length):
    assert store.read(length if length < 1 << 30 else 512, offset) == -errno.EIO
    assert store.status(length, offset) == (DATA, length)


def test_a_read_never_waits_when_told_not_to(store):
    assert store.read(512, 0, NOWAIT) == -errno.EAGAIN


def test_a_base_is_never_written(store, content):
    assert store.write(b"x", 0) == -errno.EROFS
    assert store.zero(512, 0) == -errno.EROFS
    assert store.zero(512, 0, HINT) == -errno.EROFS
    assert store.flush() == 0
    assert store.resize(SIZE) == -errno.EROFS
    store.start_writeback()
    assert store.read(SIZE, 0) == content


def test_many_requests_are_in_flight_at_once(served, opened, task, content, wait_until):
    """Twelve calls of four pieces need one round trip of 200 ms each, not 48."""
    store = opened(served("--filter=delay", "rdelay=200ms").uri)
    wait_until(lambda: store.figures()["ready"] == 4, "four connections")
    begin = time.monotonic()
    tasks = [task(store.read, MIB, at * 65536) for at in range(12)]
    for at, one in enumerate(tasks):
        assert one.result() == content[at * 65536 : at * 65536 + MIB]
    assert time.monotonic() - begin < 48 * 0.2 / 3


def test_one_connection_where_the_server_allows_no_more(served, opened):
    store = opened(served("--filter=multi-conn", "multi-conn-mode=disable").uri)
    assert len(store.read(MIB, 0)) == MIB
    assert store.figures()["started"] == 1


def test_units_of_the_server_are_kept(served, opened, content):
    server = served(
        "--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-maximum=65536",
        "blocksize-error-policy=error",
    )  # fmt: skip
    server.kill()
    with server.path.open("r+b") as file:
        file.truncate(3 * MIB)
    server.start()
    store = opened(server.uri)
    assert store.figures()["align"] == 4096
    assert store.read(2 * MIB, 4096) == content[4096 : 4096 + 2 * MIB]
    assert store.read(5000, 777) == content[777:5777]
    assert store.read(1, 3 * MIB - 1) == content[3 * MIB - 1 : 3 * MIB]


# -- what goes wrong ---------------------------------------------------------------------------


def test_a_read_outlives_the_server(served, opened, task, content, wait_until):
    server = served()
    store = opened(server.uri)
    assert store.read(512, 0) == content[:512]
    server.kill()
    wait_until(lambda: store.figures()["ready"] == 0, "the loss to be seen")
    reading = task(store.read, SIZE, 0)
    wait_until(lambda: store.figures()["attempts"] > 2, "attempts to connect")
    server.start()
    assert reading.result() == content
    assert store.figures()["losses"] >= 1


def test_a_read_in_flight_is_sent_again(served, opened, task, content, wait_until):
    server = served("--filter=delay", "rdelay=20")
    store = opened(server.uri, timeout=60.0)
    reading = task(store.read, MIB, 0)
    wait_until(lambda: sum(store.figures()["in_flight"]) >= 4, "pieces in flight")
    server.kill()
    server.start("file", server.path)
    assert reading.result() == content[:MIB]


def test_a_server_that_stays_away_is_an_error_in_the_end(served, opened):
    server = served()
    store = opened(server.uri, timeout=0.3)
    begin = time.monotonic()  # the time runs from the loss, not from the request
    server.kill()
    assert store.read(512, 0) == -errno.EIO
    assert 0.2 < time.monotonic() - begin < 5


def test_a_connection_that_dies_as_a_request_is_made_is_no_error_yet(served, opened):
    """libnbd says EINVAL then, as it does for requests that no connection could carry."""
    server = served()
    for _ in range(10):
        store = opened(server.uri, timeout=0.5)
        begin = time.monotonic()
        server.kill()
        assert store.read(512, 0) == -errno.EIO
        assert time.monotonic() - begin > 0.45
        server.start()


def test_a_server_that_hangs_is_an_error_in_the_end(served, opened):
    store = opened(served("--filter=delay", "rdelay=100").uri, timeout=0.5)
    begin = time.monotonic()
    assert store.read(512, 0) == -errno.EIO
    assert time.monotonic() - begin < 5
    assert store.figures()["losses"] > 0


def test_errors_are_tried_again(served, opened, tmp_path, content):
    trigger = tmp_path / "trigger"
    trigger.touch()
    store = opened(served("--filter=error", f"error-file={trigger}", "error-rate=50%").uri)
    assert store.read(SIZE, 0) == content


def test_errors_that_stay_are_errors(served, opened):
    store = opened(served("--filter=error", "error-pread-rate=100%").uri, timeout=0.3)
    assert store.read(512, 0) == -errno.EIO
    assert store.figures()["losses"] == 0


def test_the_end_lets_a_server_answer_what_it_was_asked(
    served, opened, task, wait_until, content
):
    """nbdkit 1.32.5 ends with an assertion where a client leaves before."""
    server = served("--filter=delay", "rdelay=300ms")
    store = opened(server.uri, timeout=100.0)
    reading = task(store.read, SIZE, 0)
    wait_until(lambda: sum(store.figures()["in_flight"]), "requests to be sent")
    store.interrupt(60.0)
    assert reading.result() == -errno.EIO  # not all of it was sent
    assert store.figures()["losses"] == sum(store.figures()["in_flight"]) == 0
    store.close()
    assert opened(server.uri).read(512, 0) == content[:512]
    assert server.process.poll() is None


def test_closing_does_not_wait_for_a_server(served, opened, task, wait_until):
    server = served("--filter=delay", "rdelay=100")
    store = opened(server.uri, timeout=100.0)
    reading = task(store.read, 512, 0)
    wait_until(lambda: sum(store.figures()["in_flight"]), "the request to be sent")
    store.interrupt()
    assert reading.result() == -errno.EIO
    store.close()
    store.close()


# -- opening -----------------------------------------------------------------------------------


def test_an_absent_server_is_told_by_name(opened, tmp_path):
    with pytest.raises(OSError, match="No such file") as caught:
        opened(f"nbd+unix:///?socket={tmp_path / 'none'}", timeout=0.2)
    assert caught.value.errno == errno.ETIMEDOUT


@pytest.mark.parametrize(
    "uri", ["", "nbd", "http://127.0.0.1/", "nbd+vsock://1/", "nbd://[::1", "nbd+unix://"]
)
def test_what_is_no_nbd_uri_is_never_reached(opened, uri):
    with pytest.raises(OSError, match="nbd_"):
        opened(uri, timeout=0.1)


def test_a_uri_that_names_files_is_refused(served, opened):
    with pytest.raises(OSError, match="local file"):
        opened(served().uri + "&tls-certificates=/tmp", timeout=0.1)


def test_a_uri_too_long_is_refused(opened):
    with pytest.raises(OSError, match="nbd_storage_open") as caught:
        opened("nbd://" + "a" * 2000)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("options", [{"connections": 0}, {"connections": 17}, {"timeout": 0.0}])
def test_bad_options_are_refused(served, opened, options):
    with pytest.raises(OSError, match="nbd_storage_open"):
        opened(served().uri, **options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"length": SIZE + 1, "writable": True}, "shorter"),
        ({"length": SIZE - 512, "exact": True, "writable": True}, "another length"),
    ],
)
def test_an_export_of_another_length_is_unfit(served, opened, options, why):
    with pytest.raises(OSError, match=why) as caught:
        opened(served().uri, **options)
    assert caught.value.errno == errno.EUCLEAN


def test_an_export_that_cannot_be_written_is_no_data_file(served, opened):
    with pytest.raises(OSError, match="no writes"):
        opened(served("-r").uri, writable=True, timeout=1.0)


def test_a_known_length_opens_without_the_server(served, opened, task, content, wait_until):
    server = served()
    server.kill()
    store = opened(server.uri, length=SIZE, exact=True)
    assert store.length == SIZE
    reading = task(store.read, SIZE, 0)
    wait_until(lambda: store.figures()["attempts"] > 1, "attempts to connect")
    assert store.status(SIZE, 0) == (DATA, SIZE)
    server.start()
    assert reading.result() == content


def test_a_server_that_comes_back_shorter_is_not_used(served, opened, wait_until):
    server = served()
    store = opened(server.uri, timeout=0.5)
    server.kill()
    os.truncate(server.path, SIZE - 512)
    server.start()
    wait_until(lambda: store.figures()["unfit"], "the other length to be seen")
    assert store.read(512, 0) == -errno.EIO
    assert store.read(512, SIZE - 512) == -errno.EIO


# -- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (0, 0), (1, 1), (4095, 1_000_001)])
@pytest.mark.parametrize("flags", [0, DSYNC])
def test_writes_reach_the_file(writable, served, tmp_path, content, offset, length, flags):
    data = os.urandom(length)
    assert writable.write(data, offset, flags) == 0
    assert writable.read(length, offset) == data
    assert writable.flush() == 0
    expected = content[:offset] + data + content[offset + length :]
    assert (tmp_path / "export").read_bytes() == expected


def test_writes_outside_are_refused(writable):
    assert writable.write(b"xx", SIZE - 1) == -errno.EIO
    assert writable.zero(2, SIZE - 1) == -errno.EIO
    assert writable.zero(512, 1 << 63) == -errno.EIO


@pytest.mark.parametrize("flags", [0, KEEP])
def test_zeroing(writable, tmp_path, content, flags):
    path = tmp_path / "export"
    assert writable.zero(2 * MIB, 4096, flags) == 0
    assert writable.zero(777, SIZE - 1000, flags) == 0
    expected = bytearray(content)
    expected[4096 : 4096 + 2 * MIB] = bytes(2 * MIB)
    expected[SIZE - 1000 : SIZE - 223] = bytes(777)
    assert path.read_bytes() == expected
    if not flags:
        assert writable.status(4 * MIB - 4096, 4096)[0] == DATA  # outside, so nothing is known
        assert writable.status(MIB, 4096) == (ZERO, MIB)


@pytest.mark.parametrize("filters", [["--filter=nozero", "zeromode=none"], []])
def test_zeroing_without_the_servers_help(served, opened, filters, content):
    server = served(*filters)
    store = opened(server.uri, writable=True)
    assert store.zero(300_001, 777) == 0
    assert server.path.read_bytes() == content[:777] + bytes(300_001) + content[300_778:]


def test_a_hint_gives_space_back(writable, tmp_path):
    path = tmp_path / "export"
    before = os.stat(path).st_blocks
    assert writable.zero(MIB, MIB, HINT) == 0
    assert os.stat(path).st_blocks < before
    assert writable.zero(0, 0, HINT) == 0


def test_parts_of_units_are_written(served, opened, content):
    server = served("--filter=blocksize-policy", "blocksize-minimum=4096",
                    "blocksize-error-policy=error")  # fmt: skip
    server.kill()
    os.truncate(server.path, 3 * MIB)
    server.start()
    store = opened(server.uri, writable=True)
    expected = bytearray(content[: 3 * MIB])
    for offset, length in [(1, 1), (4095, 2), (4096, 4096), (777, 100_000), (3 * MIB - 5, 5)]:
        data = os.urandom(length)
        assert store.write(data, offset) == 0
        expected[offset : offset + length] = data
    assert store.zero(10_000, 200_001) == 0
    expected[200_001:210_001] = bytes(10_000)
    assert store.flush() == 0
    assert server.path.read_bytes() == expected


def test_a_lost_connection_with_unflushed_writes_fails_the_flush(served, opened, wait_until):
    server = served()
    store = opened(server.uri, writable=True)
    assert store.write(b"a" * 512, 0) == 0
    server.kill()
    server.start()
    assert store.flush() == -errno.EIO
    wait_until(lambda: store.figures()["ready"], "a new connection")
    assert store.figures()["lost"]
    assert store.flush() == -errno.EIO
    assert store.read(512, 0) == b"a" * 512


def test_a_lost_connection_with_all_flushed_is_no_loss(served, opened, wait_until):
    server = served()
    store = opened(server.uri, writable=True)
    assert store.write(b"b" * 512, 0) == 0
    assert store.flush() == 0
    server.kill()
    server.start()
    assert store.flush() == 0
    assert store.write(b"c" * 512, 512) in (0, -errno.EIO)


def test_a_write_in_flight_is_not_sent_twice(served, opened, task, wait_until):
    server = served("--filter=delay", "wdelay=20")
    store = opened(server.uri, writable=True, timeout=60.0)
    writing = task(store.write, b"d" * 512, 0)
    wait_until(lambda: sum(store.figures()["in_flight"]), "the write to be sent")
    server.kill()
    server.start("file", server.path)
    assert writing.result() == -errno.EIO
    assert store.flush() == -errno.EIO


def test_a_full_server_says_so(served, opened):
    store = opened(
        served("--filter=error", "error-pwrite=ENOSPC", "error-pwrite-rate=100%").uri, writable=True
    )
    assert store.write(b"e" * 512, 0) == -errno.ENOSPC


def test_a_failed_flush_is_told(served, opened, tmp_path):
    server = served()
    server.kill()
    server.start("eval", f"get_size=echo {SIZE}", "can_write=true", "can_flush=true",
                 "pread=dd if=/dev/zero count=$3 iflag=count_bytes", "pwrite=cat >/dev/null",
                 "flush=echo EIO >&2; exit 1")  # fmt: skip
    store = opened(server.uri, writable=True)
    assert store.write(b"f" * 512, 0) == 0
    assert store.flush() == -errno.EIO


# -- block status ------------------------------------------------------------------------------


def test_holes_are_seen(tmp_path, opened):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        for at in (0, 5, 6, 63):
            file.seek(at * MIB)
            file.write(os.urandom(MIB))
    with Nbdkit(tmp_path, "file", path) as server:
        store = opened(server.uri)
        assert store.status(64 * MIB, 0) == (DATA, MIB)
        assert store.status(63 * MIB, MIB) == (ZERO, 4 * MIB)
        assert store.status(100, 5 * MIB - 50) == (ZERO, 50)
        assert store.status(59 * MIB, 5 * MIB) == (DATA, 2 * MIB)
        assert store.status(57 * MIB, 7 * MIB) == (ZERO, 56 * MIB)
        assert store.status(1, 64 * MIB - 1) == (DATA, 1)
        store.close()


def test_extents_beyond_what_is_kept_are_asked_for_again(tmp_path, opened):
    """20,000 runs; 8,192 of them are kept at a time."""
    extents = tmp_path / "extents"
    kinds = ("hole,zero", "0")
    extents.write_text("".join(f"{at * 4096} 4096 {kinds[at % 2]}\n" for at in range(20_000)))
    size = 20_000 * 4096
    words = ["--filter=extentlist", "memory", str(size), f"extentlist={extents}"]
    with Nbdkit(tmp_path, *words) as server:
        store = opened(server.uri)
        at, kinds = 0, []
        while at < size:
            kind, run = store.status(store.length - at, at)
            kinds.append(kind)
            assert run == 4096
            at += run
        assert kinds == [ZERO, DATA] * 10_000
        store.close()


def test_without_block_status_all_is_data(served, opened):
    store = opened(served("--filter=noextents").uri)
    assert store.status(SIZE, 0) == (DATA, SIZE)


READ, BLOCK_STATUS = 0, 7


@pytest.fixture
def told(tmp_path):
    """Start a server whose block status is told by a function, and whose reads are honest."""
    made = []

    def start(status):
        def answer(sock, kind, cookie, offset, length):
            if kind == READ:
                chunk(sock, cookie, CHUNK_DATA, struct.pack(">Q", offset) + b"d" * length)
                return True
            return status(sock, cookie, length)

        export = (4 * MIB, HAS_FLAGS | READ_ONLY | MULTI_CONN)
        made.append(Liar(tmp_path, answer, export=export, structured=True))
        return made[-1]

    yield start
    for server in made:
        server.close()


def refused(sock, cookie, length):
    chunk(sock, cookie, CHUNK_ERROR, struct.pack(">IH", errno.EIO, 0))
    return True


def unanswered(sock, cookie, length):
    return True


def questions(server):
    return sum(kind == BLOCK_STATUS for kind, _, _ in server.requests)


@pytest.mark.parametrize("status", [refused, unanswered])
def test_block_status_that_fails_is_given_up_for_a_while(told, opened, status):
    """Reads go on, and are not kept waiting for it."""
    server = told(status)
    store = opened(server.uri, timeout=0.5)
    assert store.status(MIB, 0) == (DATA, MIB)
    asked = questions(server)
    assert asked
    for at in (0, MIB, 2 * MIB):
        assert store.status(MIB, at) == (DATA, MIB)
        assert store.read(4096, at) == b"d" * 4096
    assert questions(server) == asked


def test_a_server_that_refuses_block_status_is_asked_once(told, opened):
    server = told(refused)
    assert opened(server.uri, timeout=30.0).status(MIB, 0) == (DATA, MIB)
    assert questions(server) == 1


def test_block_status_is_asked_for_again_where_the_server_was_away(tmp_path, opened):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
    with Nbdkit(tmp_path, "file", path) as server:
        store = opened(server.uri, timeout=0.5)
        server.kill()
        assert store.status(MIB, 0) == (DATA, MIB)
        server.start()
        assert store.read(512, 0) == bytes(512)
        assert store.status(4 * MIB, 0) == (ZERO, 4 * MIB)
        store.close()


def test_what_is_known_is_told_while_the_server_hangs(told, opened, task, wait_until):
    """The first question is answered for the first MiB, the second one for the next, late."""
    late = threading.Event()

    def status(sock, cookie, length):
        if questions(server) > 1:
            late.wait()
        extent = struct.pack(">III", 1, MIB, ALLOCATION_ZERO)
        chunk(sock, cookie, CHUNK_STATUS, extent)
        return True

    server = told(status)
    store = opened(server.uri, timeout=30.0)
    assert store.status(2 * MIB, 0) == (ZERO, MIB)
    asker = task(store.status, MIB, MIB)
    wait_until(lambda: questions(server) == 2, "the second question")
    other = task(store.status, MIB, MIB)
    try:
        assert task(store.status, 4096, 0).result(10.0) == (ZERO, 4096)
    finally:
        late.set()
    assert asker.result() == other.result() == (ZERO, MIB)
    assert questions(server) == 2, "whoever waits for an answer has it, too"


def test_all_that_ask_a_server_that_is_away_wait_once(served, opened, task):
    server = served()
    store = opened(server.uri, timeout=0.5)
    server.kill()
    began = time.monotonic()
    tasks = [task(store.status, 4096, at * 4096) for at in range(12)]
    assert {one.result() for one in tasks} == {(DATA, 4096)}
    assert time.monotonic() - began < 4.0, "not one after the other"
