# SPDX-License-Identifier: Apache-2.0
"""Which file an image is and what it is called now, and looks that do not wait for ever."""

import asyncio
import os
import threading

import pytest

from fvdapi.errors import ApiError
from fvdd.devices import whereabouts
from fvdd.devices.whereabouts import file_id, hold, id_of, let_go, look, name_of


def test_file_keeps_its_id_over_names(tmp_path):
    path = tmp_path / "a"
    assert file_id(str(path)) is None
    path.touch()
    own = file_id(str(path))
    assert own == id_of(path.stat())
    assert file_id(str(path.rename(tmp_path / "b"))) == own


def test_name_is_found_by_way_of_a_descriptor(tmp_path):
    path = tmp_path / "a"
    path.touch()
    own = id_of(path.stat())
    fd = hold(str(path), own)
    try:
        assert name_of(own, str(path), [], []) == str(path)
        moved = path.rename(tmp_path / "b")
        path.touch()
        assert name_of(own, str(path), [], []) is None
        assert name_of(own, str(path), [fd], []) == str(moved)
        assert name_of(own, str(path), [], [os.getpid(), 1 << 30]) == str(moved)
        moved.unlink()
        assert name_of(own, str(path), [fd], []) == f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        let_go(fd)


def test_another_file_is_not_held(tmp_path):
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    before = len(os.listdir("/proc/self/fd"))
    assert hold(str(tmp_path / "a"), id_of((tmp_path / "b").stat())) == -1
    assert hold(str(tmp_path / "none"), (1, 2)) == -1
    assert len(os.listdir("/proc/self/fd")) == before
    let_go(-1)


def test_look_that_takes_too_long_is_an_error_and_gives_back_what_it_finds(monkeypatch):
    monkeypatch.setattr(whereabouts, "LOOK_LIMIT_SECONDS", 0.01)
    answers, given_back = threading.Event(), threading.Event()

    async def main():
        assert await look("/x", lambda: 7) == 7
        with pytest.raises(ApiError) as caught:
            await look("/x", answers.wait, discard=lambda found: given_back.set())
        assert (caught.value.code, caught.value.exit_status) == ("storage_hangs", 8)
        assert caught.value.message == "the storage of /x does not answer"
        answers.set()
        await asyncio.to_thread(given_back.wait, 10)

    asyncio.run(main())
    assert given_back.is_set()
