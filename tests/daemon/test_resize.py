# SPDX-License-Identifier: Apache-2.0
"""A device grows while it is in use; whoever dies meanwhile, it has its old size or its new one.

The stand-in for the kernel waits for every request before it takes a size, and reconnects nothing
meanwhile, as the driver of newer kernels does.
"""

import asyncio
import json
import os
import random
import signal
import threading

import pytest

from fvdapi.errors import ApiError
from fvdapi.models import ResizeRequest
from fvdd.devices import supervise
from fvdd.worker.client import WorkerProcess
from fvdtest.daemon import Daemon, wait_until
from fvdtest.marks import in_proof

OLD, NEW = 8 << 20, 12 << 20


class Load:
    """Threads that write and read back, each in a lane of its own."""

    def __init__(self, disk, model, lanes=2):
        self.disk, self.model = disk, model
        self.requests = 0
        self.failures = []
        self.ending = threading.Event()
        room = model.size // lanes
        self.threads = [
            threading.Thread(target=self.run, args=(lane * room, room)) for lane in range(lanes)
        ]

    def run(self, begin, room):
        source = random.Random(begin)
        try:
            while not self.ending.is_set():
                length = source.choice([512, 4096, 100_000, 700_000])
                offset = begin + source.randrange(room - length)
                data = source.randbytes(length)
                self.disk.write(offset, data)
                self.model.write(offset, data)
                if self.disk.read(offset, length) != data:
                    raise AssertionError("something else came back")
                self.requests += 2
        except BaseException as error:
            self.failures.append(error)

    def wait_for_more(self):
        done = self.requests
        wait_until(lambda: self.failures or self.requests > done + 10, "more requests")

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, kind, error, trace):
        self.ending.set()
        for thread in self.threads:
            thread.join(60)
        assert not self.failures


def assert_grown(daemon, disk, model, size=NEW):
    """The device has its size everywhere, its content, and zeros behind it."""
    assert daemon.device("web").size_bytes == disk.spec.size_bytes == size
    assert model.difference(disk.read(0, OLD)) is None
    assert disk.read(OLD, size - OLD) == bytes(size - OLD)
    disk.write(size - 512, b"x" * 512)
    disk.write(size - 512, bytes(512))


def grow_image_alone(daemon, name="web", size=NEW):
    """What the worker does first, and nothing after it."""
    path = daemon.state / "devices" / name / "control.sock"

    async def main():
        worker = await WorkerProcess.connect(str(path))
        answer = await worker.request("resize", size=str(size), timeout=30)
        await worker.close()
        assert answer["size"] == size

    asyncio.run(main())


@pytest.mark.parametrize("connections", [in_proof(1), 3])
def test_device_grows_under_load_without_a_reconnect(daemon, clone, connections):
    image, model = clone()
    disk = daemon.attach(image, "--connections", connections)
    pid = daemon.device("web").worker_pid
    with Load(disk, model) as load:
        assert daemon.ctl("resize", "web", NEW).stdout == "web: 8M -> 12M\n"
        load.wait_for_more()
        report = json.loads(daemon.ctl("resize", "web", "+1M", "--json").stdout)
        load.wait_for_more()
    assert report == {
        "name": "web", "device": "/dev/nbd0", "old_size_bytes": NEW, "size_bytes": 13 << 20,
    }  # fmt: skip
    assert (disk.deaths, disk.resent) == (0, 0)
    status = daemon.device("web")
    assert (status.worker_pid, status.restarts, status.reconnects) == (pid, 0, 0)
    assert status.connections_alive == connections
    assert status.last_pause_seconds > 0
    assert_grown(daemon, disk, model, 13 << 20)
    found = {name: value for (name, _), value in daemon.metrics().items()}
    assert found["fvd_virtual_size_bytes"] == 13 << 20
    daemon.ctl("detach", "web")
    assert json.loads(daemon.ctl("info", image, "--json").stdout)["size_bytes"] == 13 << 20
    assert daemon.ctl("check", image).returncode == 0


def test_same_size_again_is_no_mistake(daemon, clone):
    image, _ = clone()
    disk = daemon.attach(image)
    disk.on_freeze = lambda: pytest.fail("nothing was to be changed")
    assert daemon.ctl("resize", "web", "8M").stdout == "web: 8M -> 8M\n"


def test_image_of_a_device_is_found_by_its_path(daemon, clone):
    image, _ = clone()
    disk = daemon.attach(image)
    assert daemon.ctl("resize", image, "9M").stdout == "web: 8M -> 9M\n"
    assert disk.spec.size_bytes == 9 << 20


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ((), [
            (("web", "4M"), 1, "smaller than the present one"),
            (("web", "8388609"), 1, "not a multiple of 512"),
            (("web", "much"), 1, "not a valid size"),
            (("web", "9000P"), 1, "size"),
            (("nobody", "9M"), 4, "neither a device nor a file called 'nobody'"),
            (("/dev/nbd7", "9M"), 1, "/dev/nbd7 does not exist"),
            (("web", "9M", "--shrink"), 1, "--shrink is only for images that nobody uses"),
        ]),
        (("--sector-size", "4096"), [(("web", "8389120"), 1, "sector size 4096")]),
        (("-r",), [(("web", "9M"), 1, "read-only")]),
    ],
    ids=["plain", "coarse sectors", "read-only"],
)  # fmt: skip
def test_refused_in_one_sentence_and_nothing_changed(daemon, clone, options, refused):
    image, model = clone()
    disk = daemon.attach(image, *options)
    for words, status, message in refused:
        done = daemon.ctl("resize", *words, check=False)
        assert (done.returncode, done.stdout) == (status, ""), words
        assert message in done.stderr
        assert daemon.device("web").size_bytes == disk.spec.size_bytes == OLD
        assert model.difference(disk.read(0, OLD)) is None


def test_failed_device_says_how_it_can_be_recovered(daemon, clone, base):
    image, _ = clone()
    daemon.attach(image)
    base.rename(base.with_suffix(".away"))
    wait_until(lambda: give_up(daemon), "the device to be given up")
    done = daemon.ctl("resize", "web", NEW, check=False)
    assert done.returncode == 1
    assert "fvdctl recover web" in done.stderr
    base.with_suffix(".away").rename(base)
    daemon.ctl("recover", "web")
    daemon.ctl("resize", "web", NEW)


def give_up(daemon):
    status = daemon.device("web")
    if status.state == "failed":
        return True
    if status.worker_pid is not None:
        os.kill(status.worker_pid, signal.SIGKILL)
    return False


def killer_of_the_worker(daemon):
    """Kills the worker that there is now; nobody when it is called again."""
    pids = [daemon.device("web").worker_pid]

    def kill():
        if pids:
            os.kill(pids.pop(), signal.SIGKILL)

    return kill


@pytest.mark.parametrize("connections", [in_proof(1), 2])
def test_worker_killed_while_the_kernel_waits_for_requests(daemon, clone, connections):
    image, model = clone()
    disk = daemon.attach(image, "--connections", connections)
    disk.on_freeze = killer_of_the_worker(daemon)
    with Load(disk, model) as load:
        daemon.ctl("resize", "web", NEW)
        load.wait_for_more()
    # The kernel saw neither a connection end nor a request unanswered.
    assert (disk.deaths, disk.resent) == (0, 0)
    assert daemon.device("web").restarts == 1
    assert_grown(daemon, disk, model)


def test_worker_killed_as_the_last_request_is_answered(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    disk.on_thaw = killer_of_the_worker(daemon)
    daemon.ctl("resize", "web", NEW)
    assert (disk.deaths, disk.resent) == (0, 0)
    assert daemon.device("web").restarts == 1
    assert_grown(daemon, disk, model)


@pytest.mark.proof
def test_worker_killed_at_any_moment_leaves_the_old_size_or_the_new(daemon, clone, seed):
    image, model = clone()
    disk = daemon.attach(image)
    source = random.Random(seed)
    size = OLD
    with Load(disk, model) as load:
        for _ in range(4):
            pid = daemon.device("web").worker_pid
            timer = threading.Timer(source.random() * 0.3, os.kill, (pid, signal.SIGKILL))
            timer.start()
            size += 1 << 20
            done = daemon.ctl("resize", "web", size, check=False)
            timer.join()
            wait_until(lambda pid=pid: replaced(daemon, pid), "the successor")
            if done.returncode:
                assert daemon.device("web").size_bytes in (size, size - (1 << 20))
                daemon.ctl("resize", "web", size)
            load.wait_for_more()
            assert daemon.device("web").size_bytes == disk.spec.size_bytes == size
    assert_grown(daemon, disk, model, size)
    daemon.ctl("detach", "web")
    assert daemon.ctl("check", image).returncode == 0


def replaced(daemon, pid):
    status = daemon.device("web")
    return status.state == "attached" and status.worker_pid not in (pid, None)


def test_kernel_follows_when_the_worker_dies_after_the_image_has_grown(daemon, clone):
    image, model = clone()
    disk = daemon.attach(image)
    grow_image_alone(daemon)
    os.kill(daemon.device("web").worker_pid, signal.SIGKILL)
    wait_until(lambda: daemon.device("web").size_bytes == NEW, "the device to follow")
    assert_grown(daemon, disk, model)


@pytest.fixture
def lives(tmp_path):
    """One fvdd after the other over the same kernel: call it for the next; all is ended."""
    made = []

    def begin():
        if made:
            made[-1].stop()
        made.append(Daemon(tmp_path, after=made[-1] if made else None).start())
        wait_until(made[-1].settled, "the adoption")
        return made[-1]

    try:
        yield begin
        made[-1].detach_all()
    finally:
        made[-1].stop()
        made[-1].kill_workers()


def test_kernel_follows_when_fvdd_dies_after_the_image_has_grown(lives, clone):
    image, model = clone()
    first = lives()
    disk = first.attach(image)
    grow_image_alone(first)
    second = lives()
    wait_until(lambda: second.device("web").size_bytes == NEW, "the device to follow")
    assert_grown(second, disk, model)


def test_record_follows_when_fvdd_dies_before_it_is_written(lives, clone):
    image, model = clone()
    first = lives()
    disk = first.attach(image)
    first.ctl("resize", "web", NEW)
    record = first.state / "devices/web/device.json"
    assert json.loads(record.read_text())["size_bytes"] == NEW
    first.stop()
    record.write_text(record.read_text().replace(str(NEW), str(OLD)))
    second = lives()
    wait_until(lambda: second.device("web").size_bytes == NEW, "the record")
    assert_grown(second, disk, model)


def test_connections_come_home_when_fvdd_dies_in_between(lives, clone):
    image, model = clone()
    first = lives()
    disk = first.attach(image, "--connections", "2")
    first.stop()
    with Load(disk, model) as load:
        pid = asyncio.run(cross_and_vanish(first.state / "devices/web"))
        wait_until(lambda: not os.path.exists(f"/proc/{pid}/exe"), "the relay to end")
        load.wait_for_more()
    assert (disk.deaths, disk.resent) == (0, 0)
    second = lives()
    assert second.device("web").connections_alive == 2
    assert model.difference(disk.read(0, OLD)) is None
    second.ctl("resize", "web", NEW)
    assert_grown(second, disk, model)


async def cross_and_vanish(directory):
    """Bring the connections to a relay, as a resize does, and let go of everything."""
    worker = await WorkerProcess.connect(str(directory / "control.sock"))
    relay = await WorkerProcess.spawn(str(directory))
    answer, descriptors = await worker.exchange("hand_over", seconds=5, timeout=30)
    _, ends = await supervise.serve_sockets(worker, len(answer["received"]), 30)
    fds = [*descriptors, *(end.fileno() for end in ends)]
    await relay.request("relay", fds, received=answer["received"], timeout=30)
    supervise.close_sockets(ends)
    for fd in descriptors:
        os.close(fd)
    await relay.close()
    await worker.close()
    return relay.pid


def test_api_refuses_what_makes_no_sense(daemon, clone):
    image, _ = clone()
    daemon.attach(image)
    with daemon.client() as client:
        with pytest.raises(ApiError, match="no device called"):
            client.resize("nobody", ResizeRequest(size="9M"))
        with pytest.raises(ApiError, match="not a valid size"):
            client.resize("web", ResizeRequest(size="-1"))
