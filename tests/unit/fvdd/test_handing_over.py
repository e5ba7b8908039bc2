# SPDX-License-Identifier: Apache-2.0
"""Connections that no worker has: they go on with another, or are closed before anything else."""

import asyncio
import os
from types import SimpleNamespace

import pytest

from fvdd.devices.handing_over import handed_over, is_refusal
from fvdd.worker.client import WorkerError, WorkerLost


class _Worker:
    """Gives the reading ends of pipes away, and takes what it is given."""

    def __init__(self, failure=None):
        self.failure = failure
        self.taken = None
        self.writing = []

    async def exchange(self, op, *, seconds, timeout):
        if self.failure is not None:
            raise self.failure
        ends = [os.pipe() for _ in range(2)]
        self.writing = [theirs for _, theirs in ends]
        return {"received": ["a", "b"]}, [ours for ours, _ in ends]

    async def request(self, op, fds, *, received, timeout):
        assert (op, len(fds), received) == ("resume", 2, ["a", "b"])
        if self.failure is not None:
            raise self.failure
        self.taken = [os.dup(fd) for fd in fds]
        return {"connections": [7, 8]}


def session():
    return SimpleNamespace(connections={1, 2}, worker_limit=1.0)


def are_closed(worker):
    """Whether nobody has the ends that it gave away any more."""
    for fd in worker.writing:
        with pytest.raises(BrokenPipeError):
            os.write(fd, b"x")
        os.close(fd)
    return bool(worker.writing)


def test_another_worker_goes_on_with_them():
    async def main():
        served, giver, taker = session(), _Worker(), _Worker()
        async with handed_over(served, giver) as parted:
            assert served.connections == set()
            await parted.resume(taker)
        assert served.connections == {7, 8}
        for ours, theirs in zip(taker.taken, giver.writing, strict=True):
            os.write(theirs, b"x")
            assert os.read(ours, 1) == b"x"
            os.close(ours)
        assert are_closed(giver)

    asyncio.run(main())


@pytest.mark.parametrize("failure", [None, WorkerLost("died")], ids=["before", "by the taker"])
def test_they_are_closed_when_nobody_takes_them(failure):
    async def hand(served, giver):
        async with handed_over(served, giver) as parted:
            if failure is None:
                raise WorkerLost("the image is not there")
            await parted.resume(_Worker(failure))

    async def main():
        served, giver = session(), _Worker()
        with pytest.raises(WorkerLost):
            await hand(served, giver)
        assert served.connections == set()
        assert are_closed(giver)

    asyncio.run(main())


@pytest.mark.parametrize("code", ["worker_busy", "storage_full"])
def test_worker_that_gives_nothing_keeps_its_connections(code):
    async def main():
        served = session()
        with pytest.raises(WorkerError) as caught:
            async with handed_over(served, _Worker(WorkerError(code, "", "", {}))):
                raise AssertionError("nothing was given")
        assert served.connections == {1, 2}
        assert is_refusal(caught.value)

    asyncio.run(main())


def test_other_failures_are_no_refusals():
    assert not is_refusal(WorkerLost("died"))
    assert not is_refusal(WorkerError("no_space", "", "", {}))
