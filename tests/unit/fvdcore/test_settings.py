# SPDX-License-Identifier: Apache-2.0
"""Fields of the header change while the image is open: durably, sector by sector, with effect."""

import errno
import fcntl
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fvdcore import Device, EngineFault
from fvdengine import chain, intent
from fvdengine.check import check_image
from fvdengine.header import Header
from fvdtest.daemon import wait_until
from fvdtest.images import make_image, open_image

MIB = 1 << 20
F_ADD_SEALS, F_SEAL_FUTURE_WRITE = 1033, 0x10

VALUES = {
    "journal_buf_size": 4096,
    "journal_clean_buf_period": 77,
    "storage_grow_unit": 3 * MIB,
    "copy_on_read": 1,
    "max_outstanding_copy_on_read_data": 5 * MIB,
    "prefetch_start_delay": -1,
    "num_prefetch_slots": 5,
    "bytes_per_prefetch": 65536,
    "prefetch_read_throughput_measure_time": 11,
    "prefetch_write_throughput_measure_time": 12,
    "prefetch_min_read_throughput": 13,
    "prefetch_min_write_throughput": 14,
    "prefetch_max_read_throughput": 15,
    "prefetch_max_write_throughput": 16,
    "prefetch_throttle_time": 17,
}


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.raw"
    path.write_bytes(random.Random(1).randbytes(2 * MIB))
    return path


@pytest.fixture
def clone(tmp_path, base):
    def make(**options):
        return make_image(tmp_path / "a.fvd", base=str(base), base_format="raw", **options)

    return make


def headers_of(path):
    """The header on disk, and its backup copy."""
    data = path.read_bytes()[:16384]
    return Header.unpack(data[:8192]), Header.unpack(data[8192:])


def test_every_field_is_stored_in_its_sector_and_in_the_copy(clone):
    image = clone()
    opened = open_image(image)
    before = image.read_bytes()[:8192]
    opened.device.update(VALUES)
    after = image.read_bytes()[:8192]
    changed = {at // 512 for at in range(8192) if before[at] != after[at]}
    assert changed == {4, 6}
    for header in headers_of(image):
        assert {name: getattr(header, name) for name in VALUES} == VALUES
    opened.device.write(0, b"x" * 4096)
    opened.close()
    assert {name: getattr(headers_of(image)[0], name) for name in VALUES} == VALUES
    assert check_image(image).exit_status == 0
    open_image(image).close()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.dictionaries(st.sampled_from(sorted(VALUES)), st.integers(0, 2**31 - 1), max_size=5),
        max_size=6,
    )
)
def test_any_changes_are_what_the_codec_reads(clone, tmp_path_factory, steps):
    image = clone()
    try:
        opened = open_image(image, start=False)
        expected = {name: getattr(headers_of(image)[0], name) for name in VALUES}
        for step in steps:
            opened.device.update(step)
            expected |= step
            for header in headers_of(image)[: 2 if step else 1]:
                assert {name: getattr(header, name) for name in VALUES} == expected
        opened.abandon()
    finally:
        image.unlink()


def test_copy_on_read_begins_and_ends_at_once(clone):
    opened = open_image(clone())
    device = opened.device
    device.read(0, 4096)
    assert device.status()["base_bytes_left"] == 2 * MIB
    device.update({"copy_on_read": 1})
    device.read(0, 4096)
    wait_until(lambda: device.status()["base_bytes_left"] == 2 * MIB - 4096, "the copy", 20)
    device.update({"copy_on_read": 0})
    device.read(65536, 4096)
    device.update({"copy_on_read": 1}, keep_copy_on_read=True)
    device.read(65536, 4096)
    device.flush()
    assert device.status()["base_bytes_left"] == 2 * MIB - 4096
    opened.close()


def test_cap_of_prefetch_is_lifted_while_it_waits_for_it(clone, base):
    image = clone()
    opened = open_image(image)
    # So slow that it would take half an hour.
    opened.device.update(
        {"prefetch_max_read_throughput": 1, "prefetch_min_read_throughput": 0,
         "prefetch_min_write_throughput": 0}
    )  # fmt: skip
    opened.device.prefetch_start()
    wait_until(lambda: opened.device.status()["prefetch_bytes"] > 0, "the first step", 20)
    assert opened.device.status()["prefetch_state"] == "running"
    opened.device.update({"prefetch_max_read_throughput": 10**9})
    wait_until(lambda: opened.device.status()["prefetch_state"] == "done", "prefetch", 60)
    opened.close()
    assert headers_of(image)[0].base_img_fully_prefetched
    # What prefetch stored is in the same sector.
    assert headers_of(image)[0].prefetch_max_read_throughput == 10**9


def test_shorter_period_of_the_journal_wakes_whoever_waits_for_the_longer_one(clone):
    opened = open_image(clone())
    opened.device.update({"journal_clean_buf_period": 3_600_000})
    opened.device.write(0, b"x" * 4096)
    assert opened.device.status()["pending_blocks"] == 1
    opened.device.update({"journal_clean_buf_period": 1})
    wait_until(lambda: opened.device.status()["pending_blocks"] == 0, "the commit", 20)
    opened.close()


def test_storage_grows_by_the_new_unit(tmp_path):
    image = make_image(tmp_path / "c.fvd", size=64 * MIB, compact=True)
    opened = open_image(image)
    empty = image.stat().st_size
    opened.device.update({"storage_grow_unit": 7 * MIB})
    opened.device.write(0, b"x" * 4096)
    assert image.stat().st_size == empty + 7 * MIB
    opened.close()


@pytest.mark.parametrize(
    "values",
    [{"virtual_disk_size": 1}, {"base_img": 1}, {"copy_on_read": 1 << 31},
     {"journal_buf_size": -1}, {"prefetch_start_delay": -2}, {"copy_on_read": 1, "magic": 0}],
    ids=str,
)  # fmt: skip
def test_what_may_not_change_is_refused_and_nothing_is_written(clone, values):
    image = clone()
    opened = open_image(image)
    before = image.read_bytes()[:16384]
    with pytest.raises(ValueError, match="cannot"):
        opened.device.update(values)
    assert image.read_bytes()[:16384] == before
    opened.close()


def test_reader_changes_nothing(clone):
    image = clone()
    opened = open_image(image, read_only=True)
    before = image.read_bytes()
    with pytest.raises(EngineFault) as caught:
        opened.device.update({"copy_on_read": 1})
    assert caught.value.errno == errno.EROFS
    opened.close()
    assert image.read_bytes() == before
    with pytest.raises(ValueError, match="closed"):
        opened.device.update({"copy_on_read": 1})


def test_storage_that_takes_no_write_keeps_the_former_values(clone, base):
    content = clone().read_bytes()
    fd = os.memfd_create("image", os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    base_fd = os.open(base, os.O_RDONLY)
    device = Device.open([(fd, "fvd"), (base_fd, "raw")])
    before = os.pread(fd, 16384, 0)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    with pytest.raises(EngineFault) as caught:
        device.update(VALUES)
    assert caught.value.errno == errno.EPERM
    assert os.pread(fd, 16384, 0) == before
    assert device.status()["copy_on_read"] is False
    device.abandon()
    os.close(fd)
    os.close(base_fd)


@pytest.mark.parametrize("kind", ["write", "flush"])
def test_whatever_stops_an_update_leaves_all_of_it_or_nothing(probes, clone, base, kind):
    """After so many writes the process dies; after so many flushes the power is cut."""
    values = {2172: (8, 8192), 2180: (8, 77), 3248: (4, 1), 3272: (4, 5)}
    names = ("journal_buf_size", "journal_clean_buf_period", "copy_on_read", "num_prefetch_slots")
    path = clone(journal_size=65536)
    content, outcomes = path.read_bytes(), []
    for steps in range(12):
        store = probes.storage.Storage(content)
        image = probes.image.Image(store, probes.storage.Storage(base.read_bytes()))
        former = store.content()
        store.fail(kind, errno.EIO, steps, always=True)
        rc = image.change(values)
        path.write_bytes(store.content() if kind == "write" else store.durable())
        image.free()
        with path.open("rb") as file:
            header = chain.read_header(file.fileno(), str(path))
        found = [getattr(header, name) for name in names]
        old = [getattr(Header.unpack(former), name) for name in names]
        assert found in (old, [8192, 77, 1, 5])
        if rc == 0:
            assert found == [8192, 77, 1, 5]
            assert not intent.is_staged(Header.unpack(path.read_bytes()))
        outcomes.append((rc == 0, found == old, intent.is_staged(Header.unpack(path.read_bytes()))))
    assert outcomes[0] == (False, True, False)
    assert outcomes[-1] == (True, False, False)
    assert (False, False, True) in outcomes, "nothing stopped it in the middle"
