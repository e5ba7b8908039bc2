# SPDX-License-Identifier: Apache-2.0
"""A device over a distant base: what a read takes along, and what a base that is away holds up."""

import os
import random
import socket
import struct

import pytest

from fvdcore import Device
from fvdtest.images import make_image
from fvdtest.nbd_client import CMD_FLUSH, CMD_READ, CMD_WRITE, FLAG_FUA, NbdClient
from fvdtest.remote import HAS_FLAGS, MULTI_CONN, READ_ONLY, Liar, simple_reply

BLOCK = 4096
KIB = 1024
SIZE = 4 << 20
READ = 0
EIO = 5
CREW_MAX, KEPT = 160, 8  # threads, and those that never wait for the base
OTHER_THREADS = 10  # that an open device has


@pytest.fixture
def base(tmp_path):
    data = random.Random(1).randbytes(SIZE)
    (tmp_path / "base.raw").write_bytes(data)
    return data


@pytest.fixture
def liar(tmp_path, base):
    """Start a server: honest, but for the range `bad`, where it fails or hangs, or silent."""
    made = []

    def start(bad=range(0), silent=False, hangs=False):
        def answer(sock, kind, cookie, offset, length):
            is_bad = offset < bad.stop and bad.start < offset + length
            if silent or (is_bad and hangs):
                return True
            if is_bad:
                simple_reply(sock, cookie, error=EIO)
            else:
                simple_reply(sock, cookie, base[offset : offset + length])
            return True

        export = (SIZE, HAS_FLAGS | READ_ONLY | MULTI_CONN)
        made.append(Liar(tmp_path, answer, export=export))
        return made[-1]

    yield start
    for server in made:
        server.close()


@pytest.fixture
def opened(tmp_path, base):
    """Open a clone over a server."""
    made = []

    def start(server, *, shape=None, keeper=-1, **options):
        path = make_image(tmp_path / "clone.fvd", base=str(tmp_path / "base.raw"), **(shape or {}))
        fd = os.open(path, os.O_RDWR)
        layers = [(fd, "fvd"), (server.uri, "nbd", {"length": SIZE, "keeper": keeper})]
        try:
            made.append(Device.open(layers, **options))
        finally:
            os.close(fd)
        made[-1].start()
        return made[-1]

    yield start
    for device in made:
        device.abandon()


@pytest.fixture
def client():
    """A connection to a device."""
    made = []

    def connect(device):
        mine, theirs = socket.socketpair()
        mine.settimeout(15.0)
        device.serve(theirs.detach())
        made.append(NbdClient(mine))
        return made[-1]

    yield connect
    for one in made:
        one.close()


def request(client, kind, cookie, offset=0, length=0, data=b"", flags=0):
    client.send(struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length) + data)


def reply(client, length=0):
    """(cookie, error, data) of one simple reply."""
    _, error, cookie = struct.unpack(">IIQ", client.receive(16))
    return cookie, error, client.receive(0 if error else length)


def reads(server):
    return [(offset, length) for kind, offset, length in server.requests if kind == READ]


def test_a_read_takes_a_window_along_which_is_local_afterwards(liar, opened, base):
    server = liar()
    device = opened(server, copy_on_read=True)
    assert device.read(40 * KIB, BLOCK) == base[40 * KIB : 40 * KIB + BLOCK]
    assert reads(server) == [(0, 128 * KIB)]
    assert device.status()["local_bytes"] == 128 * KIB
    assert device.read(0, 128 * KIB) == base[: 128 * KIB]
    assert len(reads(server)) == 1


@pytest.mark.parametrize("options", [{"fetch_size": 0}, {"copy_on_read": False}])
def test_what_would_not_be_kept_is_not_fetched(liar, opened, options):
    server = liar()
    device = opened(server, **{"copy_on_read": True} | options)
    device.read(40 * KIB, BLOCK)
    assert reads(server) == [(40 * KIB, BLOCK)]


def test_a_reader_that_goes_on_needs_few_round_trips(liar, opened, base):
    server = liar()
    device = opened(server, copy_on_read=True, shape={"max_outstanding_copy_on_read": 16 << 20})
    found = b"".join(device.read(at, 16 * KIB) for at in range(0, SIZE, 16 * KIB))
    assert found == base
    starts = {offset for offset, _ in reads(server)}
    assert sum(length for _, length in reads(server)) == SIZE
    assert len(starts) <= 24  # 32 windows would be, that do not grow


def test_what_cannot_be_read_beside_it_does_no_harm(liar, opened, base):
    server = liar(bad=range(100 * KIB, 101 * KIB))
    device = opened(server, copy_on_read=True)
    assert device.read(0, BLOCK) == base[:BLOCK]
    assert reads(server)[-1] == (0, BLOCK)


def test_what_hangs_beside_it_leaves_it_the_other_half_of_the_time(liar, opened, base):
    """More than the second in which an error is asked about again with all of the time."""
    server = liar(bad=range(100 * KIB, 101 * KIB), hangs=True)
    device = opened(server, copy_on_read=True, base_timeout=2.2)
    assert device.read(0, BLOCK) == base[:BLOCK]
    assert reads(server)[0] == (0, 128 * KIB)
    assert reads(server)[-1] == (0, BLOCK)
    status = device.status()
    assert (status["failed_requests"], status["local_bytes"]) == (0, BLOCK)


@pytest.mark.parametrize("size", [-1, (2 << 20) + 1])
def test_a_size_out_of_range_is_refused(liar, opened, size):
    with pytest.raises((ValueError, OverflowError)):
        opened(liar(), fetch_size=size)


@pytest.mark.parametrize("shape", [{}, {"compact": True}], ids=["raw", "compact"])
def test_a_base_that_is_away_holds_up_nothing_that_is_local(liar, opened, client, base, shape):
    """As many reads as a kernel sends at once wait for the base, and changes that need it; flushes,
    writes of whole blocks and reads of what is local go on beside them."""
    device = opened(liar(silent=True), shape=shape)
    guest = client(device)
    for cookie in range(80):
        request(guest, CMD_READ, cookie, (256 + cookie) * BLOCK, BLOCK)
    for cookie in range(80, 110):  # each of them would have to fill its block
        request(guest, CMD_WRITE, cookie, SIZE // 2 + cookie * BLOCK + 7, 9, b"y" * 9)
    for turn in range(12):
        request(guest, CMD_WRITE, 1000, turn * BLOCK, BLOCK, b"x" * BLOCK, FLAG_FUA)
        assert reply(guest) == (1000, 0, b"")
        request(guest, CMD_FLUSH, 2000)
        assert reply(guest) == (2000, 0, b"")
        request(guest, CMD_READ, 3000, turn * BLOCK, BLOCK)
        assert reply(guest, BLOCK) == (3000, 0, b"x" * BLOCK)


@pytest.mark.parametrize("connections", [1, 2])
def test_what_a_guest_asks_at_once_waits_for_one_round_trip(
    liar, opened, client, wait_until, connections
):
    """All that a kernel sends is with the server before it answers anything, but for what the crew
    cannot hold; an idle device does not pay for that in threads."""
    server = liar(silent=True)
    before = len(os.listdir("/proc/self/task"))
    device = opened(server, prefetch_delay=-1)
    idle = len(os.listdir("/proc/self/task")) - before
    for number in range(connections):
        guest = client(device)
        for cookie in range(128):
            request(guest, CMD_READ, cookie, (number * 128 + cookie) * 2 * BLOCK, BLOCK)
    wanted = min(128 * connections, CREW_MAX - KEPT)
    wait_until(lambda: len(reads(server)) == wanted, "all reads to be with the server")
    assert idle <= 2 * KEPT + OTHER_THREADS
    assert len(os.listdir("/proc/self/task")) - before <= CREW_MAX + OTHER_THREADS + connections


def test_changes_that_overlap_one_that_waits_come_after_it(liar, opened, client, base):
    """A whole block over a part of it that waits for the base: in their order, or none."""
    server = liar()
    device = opened(server)
    guest = client(device)
    for turn in range(50):
        at = turn * BLOCK
        request(guest, CMD_WRITE, turn, at + 5, 2, b"yy")
        request(guest, CMD_WRITE, 100 + turn, at, BLOCK, b"x" * BLOCK, FLAG_FUA)
    answers = [reply(guest) for _ in range(100)]
    assert {error for _, error, _ in answers} == {0}
    assert device.read(0, 50 * BLOCK) == b"x" * 50 * BLOCK


# -- when all is local ---------------------------------------------------------------------------


def held(path):
    """Whether this process has the file open."""
    fds = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return str(path) in {os.path.realpath(fd) for fd in fds}


def test_the_connections_end_when_all_is_local(liar, opened, base, wait_until):
    server = liar()
    reading, keeper = os.pipe()
    device = opened(server, keeper=keeper, prefetch_delay=-1)
    os.close(keeper)
    with pytest.raises(ValueError, match="is needed"):
        device.close_base()
    device.prefetch_start()
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to end")
    assert server.connections
    for _ in range(2):
        device.close_base()
    wait_until(lambda: all(one.fileno() < 0 for one in server.connections), "them to end")
    assert os.read(reading, 1) == b"", "who keeps the server knows that nobody needs it"
    os.close(reading)
    assert device.read(0, SIZE) == base
    assert {kind for _, kind in device.block_status(0, SIZE)} == {"data"}
    device.close()


@pytest.mark.parametrize("images", [1, 2, 3])
def test_the_files_are_closed_when_all_is_local(tmp_path, base, images, wait_until):
    below = [tmp_path / "base.raw"]
    kinds = ["fvd"] * images + ["raw"]
    for at in range(images, 1, -1):
        path = tmp_path / f"layer{at}.fvd"
        below.insert(0, make_image(path, base=str(below[0]), base_format=kinds[at]))
    image = make_image(tmp_path / "clone.fvd", base=str(below[0]), base_format=kinds[1])
    fds = [os.open(path, os.O_RDWR) for path in (image, *below)]
    device = Device.open(list(zip(fds, kinds, strict=True)), prefetch_delay=0)
    for fd in fds:
        os.close(fd)
    device.start()
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to end")
    assert all(held(path) for path in below)
    device.close_base()
    assert not any(held(path) for path in below)
    assert device.read(0, SIZE) == base
    device.close()


def serve_all_but_the_first(folder, base):
    """A server that never answers the first request, and the list that this one is in then."""
    hanging = []

    def answer(sock, kind, cookie, offset, length):
        if not hanging:
            hanging.append(cookie)
        else:
            simple_reply(sock, cookie, base[offset : offset + length])
        return True

    return Liar(folder, answer, export=(len(base), HAS_FLAGS | READ_ONLY | MULTI_CONN)), hanging


def test_a_read_that_hangs_in_the_base_is_answered_when_all_is_local(
    tmp_path, opened, base, client, wait_until
):
    """Its answer never comes, while others are answered; what is closed below it is no error."""
    server, hanging = serve_all_but_the_first(tmp_path, base)
    device = opened(server, prefetch_delay=-1)
    guest = client(device)
    request(guest, CMD_READ, 1, 9 * BLOCK, BLOCK)
    wait_until(lambda: hanging, "the read to reach the server")
    device.prefetch_start()
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to end")
    device.close_base()
    assert reply(guest, BLOCK) == (1, 0, base[9 * BLOCK : 10 * BLOCK])
    assert device.status()["failed_requests"] == 0
    server.close()


# -- boot profiles and policies ----------------------------------------------------------------


def test_the_order_of_reads_is_noted(liar, opened):
    device = opened(liar(), record_reads=True, fetch_size=0)
    for at in (9, 3, 4, 700):
        device.read(at * BLOCK, BLOCK)
    device.write(5 * BLOCK, b"x" * BLOCK)
    device.read(5 * BLOCK, BLOCK)
    assert device.first_reads() == [
        (9 * BLOCK, BLOCK), (3 * BLOCK, 2 * BLOCK), (700 * BLOCK, BLOCK),
    ]  # fmt: skip


@pytest.mark.parametrize("copies", [False, True])
def test_reads_that_need_not_wait_for_the_base_are_noted(tmp_path, base, client, copies):
    """A file in the page cache is read where the request arrives."""
    path = make_image(
        tmp_path / "clone.fvd", base=str(tmp_path / "base.raw"), copy_on_read=int(copies)
    )
    with path.open("r+b") as image, (tmp_path / "base.raw").open("rb") as below:
        layers = [(image.fileno(), "fvd"), (below.fileno(), "raw")]
        device = Device.open(layers, record_reads=True)
    device.start()
    guest = client(device)
    for at in (9, 3, 4, 700):
        request(guest, CMD_READ, at, at * BLOCK, BLOCK)
        assert reply(guest, BLOCK) == (at, 0, base[at * BLOCK : (at + 1) * BLOCK])
    noted = device.first_reads()
    device.abandon()
    assert noted == [(9 * BLOCK, BLOCK), (3 * BLOCK, 2 * BLOCK), (700 * BLOCK, BLOCK)]


def test_without_recording_nothing_is_noted(liar, opened):
    device = opened(liar())
    device.read(0, BLOCK)
    assert device.first_reads() == []


def test_prefetch_follows_a_profile_and_fetches_the_rest_behind_it(liar, opened, base, wait_until):
    server = liar()
    order = [(3 << 20, 64 * KIB), (1 << 20, 16 * KIB), (SIZE - BLOCK, BLOCK)]
    device = opened(server, prefetch_delay=0, fetch_first=order)
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to end")
    asked = reads(server)
    ordered = [
        at for at, (where, _) in enumerate(asked)
        if any(offset <= where < offset + length for offset, length in order)
    ]  # fmt: skip
    # Several are in flight, and a thread may be late with any of them, but not with most.
    assert sorted(ordered)[len(ordered) // 2] < len(ordered) < len(asked) // 4
    assert device.read(0, SIZE) == base


def test_what_a_profile_names_is_fetched_at_full_speed_beside_a_guest(
    tmp_path, opened, base, client, wait_until
):
    """It is what this guest is about to read: to make way for its reads would delay them."""
    server, hanging = serve_all_but_the_first(tmp_path, base)
    device = opened(server, prefetch_delay=-1, fetch_first=[(0, 3 << 20)])
    request(client(device), CMD_READ, 1, 2 << 20, BLOCK)
    wait_until(lambda: hanging, "a guest that reads from the base")
    device.prefetch_start()
    wait_until(lambda: device.status()["local_bytes"] >= 3 << 20, "the profile's part")
    assert len([at for at, _ in reads(server) if at < 3 << 20]) < 100  # 8 KiB each beside a guest
    server.close()


@pytest.mark.parametrize("where", [24 << 20, 31 << 20])
def test_a_guest_that_reads_elsewhere_than_the_profile_is_at_is_made_way_for(
    tmp_path, client, wait_until, where
):
    """One that names all but the end of the disk: a read far ahead of what is at hand, and one of
    what it does not name."""
    size, found = 32 << 20, 1 << 20
    content = bytes(size)
    with (tmp_path / "base.raw").open("wb") as file:
        file.truncate(size)
    server, hanging = serve_all_but_the_first(tmp_path, content)
    path = make_image(tmp_path / "clone.fvd", base=str(tmp_path / "base.raw"))
    with path.open("r+b") as image:
        layers = [(image.fileno(), "fvd"), (server.uri, "nbd", {"length": size})]
        device = Device.open(layers, prefetch_delay=-1, fetch_first=[(0, 30 << 20)])
    device.start()
    request(client(device), CMD_READ, 1, where, BLOCK)
    wait_until(lambda: hanging, "a guest that reads from the base")
    device.prefetch_start()
    wait_until(lambda: device.status()["local_bytes"] >= found, "a part of the profile")
    first = [length for at, length in reads(server) if at < found]
    device.abandon()
    server.close()
    assert len(first) > 100, "pieces of 8 KiB, and in the profile's order"


@pytest.mark.parametrize(
    "order", [[(SIZE, BLOCK), (1 << 60, 1 << 61), (1 << 63, 5)], [(0, 1 << 61)], [(5, 1)] * 1000]
)
def test_a_stale_profile_does_no_harm(liar, opened, base, wait_until, order):
    device = opened(liar(), prefetch_delay=0, fetch_first=order)
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to end")
    assert device.read(0, SIZE) == base


def test_an_entry_that_cannot_be_read_is_met_again_at_the_end(liar, opened, wait_until):
    server = liar(bad=range(1 << 20, (1 << 20) + 1))
    device = opened(server, prefetch_delay=0, fetch_first=[(1 << 20, BLOCK)], base_timeout=0.05)
    wait_until(lambda: device.status()["base_bytes_left"] <= 1 << 20, "what is behind it")
    assert device.status()["prefetch_state"] in ("running", "paused")


@pytest.mark.parametrize("policy", ["polite", "eager", "fixed"])
def test_every_policy_copies_all(liar, opened, base, wait_until, policy):
    server = liar()
    device = opened(server, prefetch_delay=0, prefetch_policy=policy)
    assert device.status()["prefetch_policy"] == policy
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to end")
    assert device.read(0, SIZE) == base
    assert sum(length for _, length in reads(server)) == SIZE


def test_the_policy_changes_while_prefetch_runs(liar, opened, base, wait_until):
    device = opened(liar(), prefetch_delay=0)
    for policy in ("eager", "polite", "fixed", "polite"):
        device.prefetch_control(policy=policy)
        assert device.status()["prefetch_policy"] == policy
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to end")
    assert device.read(0, SIZE) == base


def test_a_budget_holds_until_it_is_lifted(liar, opened, wait_until):
    device = opened(liar(), prefetch_delay=-1)
    device.prefetch_control(budget=1)
    device.prefetch_start()
    wait_until(lambda: device.status()["local_bytes"], "a first piece")
    assert device.status()["base_bytes_left"] > SIZE // 2
    device.prefetch_control(budget=0)
    wait_until(lambda: device.status()["prefetch_state"] == "done", "prefetch to end")


@pytest.mark.parametrize("values", [{"policy": "rude"}, {"budget": -1}, {"budget": 1 << 63}])
def test_what_cannot_be_is_refused(liar, opened, values):
    device = opened(liar())
    with pytest.raises(ValueError, match="is"):
        device.prefetch_control(**values)
