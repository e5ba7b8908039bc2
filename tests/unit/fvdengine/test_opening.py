# SPDX-License-Identifier: Apache-2.0
"""Opening: locks of each role, what a dead process left, and that nothing is ever written."""

import os
import struct
import sys
import types
from dataclasses import replace

import pytest

from fvdengine import chain, stores
from fvdengine.check import check_image
from fvdengine.errors import (
    EngineFailed,
    EngineMissing,
    HeadersDisagree,
    ImageInUse,
    LiveStateLeft,
    LiveStateMismatch,
    UnsupportedStore,
)
from fvdengine.header import Header
from fvdengine.opening import OpenOptions, lock_owner, open_device, open_plan
from fvdengine.repair import repair_image
from fvdengine.resize import ResizeOptions, resize_image
from fvdengine.stores import Verdict
from fvdtest.images import make_image, open_image

READ = OpenOptions(read_only=True)
WRITE = OpenOptions()


def test_writer_keeps_everybody_out(image):
    with open_plan(image, WRITE):
        for options in (WRITE, READ):
            with pytest.raises(ImageInUse):
                open_plan(image, options)
    open_plan(image, WRITE).close()


def test_readers_share(image):
    with open_plan(image, READ), open_plan(image, READ), pytest.raises(ImageInUse):
        open_plan(image, WRITE)


def test_base_of_an_open_clone_cannot_be_opened_for_writing(image, tmp_path):
    from fvdengine.create import create_image
    from fvdengine.options import CreateOptions

    second = tmp_path / "second.fvd"
    create_image(second, CreateOptions(base=str(image), base_format="fvd"))
    with open_plan(second, READ), pytest.raises(ImageInUse):
        open_plan(image, WRITE)


def test_owner_and_its_worker_share_the_image(image):
    owner = lock_owner(image)
    try:
        with pytest.raises(ImageInUse):
            open_plan(image, READ)
        with open_plan(image, replace(WRITE, owner_held=True)):
            with pytest.raises(ImageInUse):
                lock_owner(image)
            with pytest.raises(ImageInUse):
                open_plan(image, replace(WRITE, owner_held=True))
    finally:
        os.close(owner)
    open_plan(image, WRITE).close()


@pytest.mark.parametrize("options", [READ, WRITE], ids=["read", "write"])
def test_planning_writes_nothing(image, digest, options):
    before = digest(image), image.stat().st_mtime_ns
    open_plan(image, options).close()
    assert (digest(image), image.stat().st_mtime_ns) == before


def test_close_gives_everything_back(image):
    before = len(os.listdir("/proc/self/fd"))
    plan = open_plan(image, WRITE)
    plan.close()
    plan.close()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("read_only", [True, False])
def test_what_a_dead_process_left_is_refused(image, change, digest, read_only):
    change(clean_shutdown=0, ext_boot_id=chain.boot_id())
    before = digest(image)
    with pytest.raises(LiveStateLeft) as caught:
        open_plan(image, OpenOptions(read_only=read_only))
    assert "--state" in caught.value.hint
    assert "--discard-live-state" in caught.value.hint
    for field in ("discard_live_state", "takeover"):
        open_plan(image, replace(WRITE, **{field: True})).close()
    assert digest(image) == before


@pytest.mark.parametrize("boot", [bytes(16), b"an earlier boot."], ids=["none", "earlier"])
def test_unclean_image_of_no_live_process_opens(image, change, boot):
    change(clean_shutdown=0, ext_boot_id=boot)
    open_plan(image, WRITE).close()


def test_network_store_is_refused_for_writing_only(image, monkeypatch):
    monkeypatch.setattr(stores, "judge_store", lambda fd: (Verdict.REFUSED, "nfs4"))
    with pytest.raises(UnsupportedStore, match="nfs4"):
        open_plan(image, WRITE)
    with open_plan(image, READ) as plan:
        assert any("nfs4" in warning for warning in plan.warnings)


def test_untested_store_is_a_warning(image, monkeypatch):
    monkeypatch.setattr(stores, "judge_store", lambda fd: (Verdict.UNTESTED, "overlay"))
    with open_plan(image, WRITE) as plan:
        assert any("overlay" in warning for warning in plan.warnings)


# The engine, replaced: what it is given and how its failures come back ------------------------


class Fault(Exception):
    errno = 117


@pytest.fixture
def engine(monkeypatch):
    """A module in the place of the compiled engine that remembers how it was called."""
    calls = []

    class Device:
        @staticmethod
        def open(layers, **options):
            calls.append((layers, options))
            if options["crew_threads"] == 0:
                raise Fault("the journal holds nonsense")
            return "device"

    module = types.ModuleType("fvdcore")
    module.Device, module.EngineFault = Device, Fault
    monkeypatch.setitem(sys.modules, "fvdcore", module)
    return calls


def test_engine_gets_the_chain_and_the_options(image, engine):
    with open_plan(image, WRITE) as plan:
        called = open_device(plan, copy_on_read=True, prefetch_delay=3, on_full="wait")
        assert called == "device"
        ((layers, options),) = engine
        assert layers == [(layer.fd, layer.format) for layer in plan.layers]
        assert options == {
            "read_only": False, "live_fd": -1, "takeover": False, "stats_fd": -1,
            "boot_id": chain.boot_id(), "open_session": None, "crew_threads": 8,
            "copy_on_read": True, "prefetch_delay": 3, "base_timeout": 60.0,
            "on_full": "wait", "can_grow": False, "prefetch_policy": "polite",
            "fetch_first": (), "fetch_size": 131072, "record_reads": False,
            "cache": "writeback", "direct_fd": -1,
        }  # fmt: skip


def test_fault_of_the_engine_becomes_an_error(image, engine):
    with (
        open_plan(image, WRITE) as plan,
        pytest.raises(EngineFailed, match="holds nonsense") as caught,
    ):
        open_device(plan, crew_threads=0)
    assert caught.value.details["errno"] == 117


def test_takeover_without_live_state_is_refused(image, engine):
    with (
        open_plan(image, replace(WRITE, takeover=True)) as plan,
        pytest.raises(LiveStateMismatch),
    ):
        open_device(plan)
    assert engine == []


def test_missing_engine_is_said_so(image, monkeypatch):
    monkeypatch.setitem(sys.modules, "fvdcore", None)
    with open_plan(image, READ) as plan, pytest.raises(EngineMissing):
        open_device(plan)


@pytest.fixture
def smaller(tmp_path, rng):
    """A compact image whose disk size was damaged to a smaller one, and what it held."""
    path = make_image(tmp_path / "image.fvd", size=16 << 20, compact=True)
    opened = open_image(path)
    data = rng.randbytes(1 << 20)
    opened.device.write(15 << 20, data)
    opened.close()
    with path.open("r+b") as file:
        file.seek(16)
        file.write(struct.pack("<Q", 4 << 20))
    return path, data


def test_damage_that_makes_a_disk_smaller_destroys_nothing(smaller):
    path, data = smaller
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(HeadersDisagree, match="virtual_disk_size") as caught:
            open_image(path, read_only=read_only)
        assert "--header backup" in caught.value.hint
    assert path.read_bytes() == before
    found = check_image(path)
    assert found.exit_status == 2
    assert "size_damaged" in [finding.code for finding in found.findings]
    assert repair_image(path, header="backup").exit_status == 0
    opened = open_image(path)
    assert opened.device.read(15 << 20, 1 << 20) == data
    opened.close()


def test_disk_that_was_shrunk_opens_though_the_copy_is_older(tmp_path):
    """As a crash leaves it between the size and the copy of the header."""
    size = 4 << 20
    path = make_image(tmp_path / "image.fvd", size=16 << 20, compact=True)
    opened = open_image(path)
    opened.device.write(0, b"x" * 4096)
    opened.close()
    copy = path.read_bytes()[8192:16384]
    resize_image(path, "4M", ResizeOptions(shrink=True))
    with path.open("r+b") as file:
        header = Header.unpack(file.read(8192))
        extension = replace(header.extension, shrink_size=size)
        file.seek(0)
        file.write(replace(header, clean_shutdown=0, extension=extension).pack())
        file.write(copy)
    opened = open_image(path)
    assert opened.device.size == size
    opened.close()
    assert check_image(path).exit_status == 0
