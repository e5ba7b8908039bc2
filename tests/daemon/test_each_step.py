# SPDX-License-Identifier: Apache-2.0
"""fvdd is killed at its first step of an operation, at the second, and so on until it gets through:
each time the next fvdd finds everything, the device serves, and nothing is lost or left over.
"""

import functools
import os
import random
import re
import threading
from pathlib import Path

import pytest

from fvdapi.models import (
    AttachRequest,
    BackupRequest,
    ReadOnlyRequest,
    ResizeRequest,
    SnapshotRequest,
    UpdateRequest,
)
from fvdengine.overlay import header_of
from fvdtest.daemon import wait_until
from fvdtest.marks import in_proof
from fvdtest.mortal import mortal_daemon

# Every so manieth step, the first by --seed; FVD_STEPS_APART=1 takes them all, which are hours.
APART = int(os.environ.get("FVD_STEPS_APART", "12"))
KNOWN = re.compile(r"device\.json|live|stats|control\.sock")


pytestmark = pytest.mark.timeout(120 if APART > 1 else 7200)


@pytest.fixture
def mortal(tmp_path):
    with mortal_daemon(tmp_path) as made:
        yield made


@pytest.fixture
def steps(rng):
    """Steps to die at, one after the other."""
    first = rng.randint(1, APART)
    return lambda: iter(range(first, 10_000, APART))


class Guest:
    """Somebody who writes all the time, and knows what was acknowledged."""

    def __init__(self, disk, model):
        self.disk, self.model = disk, model
        self.count = 0
        self.failure = None
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        source = random.Random(5)
        try:
            while not self.ending.wait(0.005):
                offset = source.randrange(self.model.size - 9000)
                data = source.randbytes(source.choice([100, 4096, 9000]))
                self.model.write(offset, data)  # of one that is never answered nothing is read
                self.disk.write(offset, data)
                self.count += 1
        except BaseException as error:
            self.failure = error

    def leave(self):
        self.ending.set()
        self.thread.join(60)
        assert not self.thread.is_alive(), "a request is never answered"
        assert self.failure is None


def check_device(mortal, disk, model, name="web"):
    """The device is served by one worker, has its content, and nothing is left over."""
    (status,) = mortal.devices()
    assert (status.name, status.state.value, status.reason) == (name, "attached", None)
    assert list(mortal.kernel.disks.values()) == [disk]
    assert model.difference(disk.read(0, model.size)) is None
    wait_until(lambda: mortal.workers(name) == [status.worker_pid], "one worker")
    wait_until(lambda: len(mortal.workers()) <= 2, "one spare besides")
    check_directory(mortal, name)


def check_directory(mortal, name="web"):
    found = os.listdir(mortal.state / "devices" / name)
    assert [one for one in found if not KNOWN.fullmatch(one)] in ([], ["device.json.new"])


def check_gone(mortal, image, model):
    """Nothing is left of the device, and its image is closed clean."""
    assert mortal.devices() == []
    assert mortal.kernel.disks == {}
    assert os.listdir(mortal.state / "devices") == []
    wait_until(lambda: not mortal.workers(), "the workers to end")
    assert header_of(str(image)).is_clean


def attach(mortal, image, **options):
    with mortal.client() as client:
        index = int(client.attach(AttachRequest(image=str(image), **options)).device[8:])
    return mortal.kernel.disks[index]


def campaign(mortal, steps, disk, model, operation, *, both=False, writes=True):
    """Do it until fvdd gets through, after a death at each of the steps; the last of them. With
    `both` the workers die as well."""
    for number in steps():
        mortal.kill()
        mortal.start(number)
        wait_until(mortal.settled, "the adoption to end")
        guest = Guest(disk, model) if writes else None
        through = mortal.survives(lambda client, number=number: operation(client, number))
        print("survived" if through else "killed", mortal.steps[-1:])
        if both:
            mortal.kill_workers("web")
        if not through:
            mortal.next()
        wait_until(mortal.settled, "a successor of the worker")
        if guest is not None:
            guest.leave()
        check_device(mortal, disk, model)
        if through:
            return number
    raise AssertionError("it has no end")


OPERATIONS = {
    "upgrade": lambda client, _, place: client.upgrade("web"),
    "snapshot": lambda client, number, place: client.snapshot(
        "web", SnapshotRequest(target=f"{place}/s{number}.fvd")
    ),
    "resize": lambda client, _, place: client.resize("web", ResizeRequest(size="+1M")),
    "update": lambda client, number, place: client.update(
        "web", UpdateRequest(fields={"journal_clean_buf_period": str(1000 + number)})
    ),
    "backup": lambda client, number, place: client.backup(
        "web", BackupRequest(target=f"{place}/copy{number}.raw")
    ),
}


@pytest.mark.proof
@pytest.mark.parametrize("both", [False, True], ids=["worker lives", "worker dies"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_device_in_use_outlives_fvdd_at_each_step_of(mortal, clone, steps, name, both, tmp_path):
    image, model = clone()
    mortal.start()
    disk = attach(mortal, image)
    do = OPERATIONS[name]
    last = campaign(mortal, steps, disk, model, lambda c, n: do(c, n, tmp_path), both=both)
    if name == "backup":
        assert (tmp_path / f"copy{last}.raw").stat().st_size == model.size
        assert not [one for one in os.listdir(tmp_path) if "backup-base" in one]
    (status,) = mortal.devices()
    if name == "resize":
        assert status.size_bytes == disk.spec.size_bytes > model.size
    mortal.ctl("detach", "web")
    check_gone(mortal, Path(status.image), model)


def turned(client, request):
    client.set_read_only("web", request)


@pytest.mark.proof
def test_mode_of_a_device_can_be_said_again_after_each_step(mortal, clone, steps):
    image, model = clone()
    mortal.start()
    disk = attach(mortal, image)

    for wanted in (True, False):
        request = ReadOnlyRequest(read_only=wanted)
        turn = functools.partial(turned, request=request)
        for number in steps():
            mortal.kill()
            mortal.start(number)
            wait_until(mortal.settled, "the adoption to end")
            through = mortal.survives(turn)
            if not through:
                mortal.next()
            check_device(mortal, disk, model)
            for again in (wanted, not wanted):
                with mortal.client() as client:
                    client.set_read_only("web", ReadOnlyRequest(read_only=again))
                (status,) = mortal.devices()
                assert (status.read_only, disk.is_read_only) == (again, again)
            if through:
                break


def test_attach_leaves_a_device_or_nothing_at_each_step(mortal, clone, steps):
    image, model = clone()
    mortal.start()
    request = AttachRequest(image=str(image))
    for number in steps():
        mortal.kill()
        mortal.start(number)
        through = mortal.survives(lambda client: client.attach(request))
        print("survived" if through else "killed", mortal.steps[-1:])
        if not through:
            mortal.next()
        wait_until(mortal.settled, "the device to be there or gone")
        if mortal.devices():
            (disk,) = mortal.kernel.disks.values()
            check_device(mortal, disk, model)
            mortal.ctl("detach", "web")
        check_gone(mortal, image, model)
        if through:
            return


def test_detach_leaves_a_device_or_nothing_at_each_step(mortal, clone, steps):
    image, model = clone()
    mortal.start()
    for number in steps():
        if not mortal.devices():
            disk = attach(mortal, image)
        disk.write(number * 512, b"%d" % number)
        model.write(number * 512, b"%d" % number)
        mortal.kill()
        mortal.start(number)
        wait_until(mortal.settled, "the adoption to end")
        through = mortal.survives(lambda client: client.detach("web"))
        print("survived" if through else "killed", mortal.steps[-1:])
        if not through:
            mortal.next()
        if mortal.devices():
            check_device(mortal, disk, model)
        else:
            check_gone(mortal, image, model)
        if through:
            return


@pytest.mark.parametrize("both", [False, in_proof(True)], ids=["worker lives", "worker dies"])
def test_start_of_fvdd_is_begun_again_after_each_step(mortal, clone, steps, both):
    image, model = clone()
    mortal.start()
    disk = attach(mortal, image)
    for number in steps():
        mortal.kill()
        if both:
            mortal.kill_workers("web")
        guest = Guest(disk, model)
        mortal.start(number, from_the_start=True)
        through = mortal.survives_its_start()
        print("survived" if through else "killed", mortal.steps[-1:])
        if not through:
            mortal.next()
        guest.leave()
        check_device(mortal, disk, model)
        if through:
            return
