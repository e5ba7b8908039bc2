# SPDX-License-Identifier: Apache-2.0
"""Live state: only the state of exactly this image, session and boot is ever adopted."""

import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvdengine import chain, live, opening
from fvdengine.create import create_image
from fvdengine.errors import (
    LiveStateLeft,
    LiveStateMismatch,
    LiveStateOutdated,
    LiveStateUnfinished,
    NoSpace,
)
from fvdengine.live import LiveHeader, LivePresence
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions

SIZES = (4096 + 8192, 5000)
ATTACHMENT = b"attachment uuid."
TAKEOVER = OpenOptions(takeover=True)

u64 = st.integers(0, (1 << 64) - 1)
uuids = st.binary(min_size=16, max_size=16)
live_headers = st.builds(
    LiveHeader, u64, u64, u64, uuids, uuids, uuids, u64, u64, u64, uuids, uuids,
    st.just("/a/path with spaces"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def sizes(monkeypatch):
    monkeypatch.setattr(opening, "state_sizes", lambda bitmap_size, table_size=0: SIZES)


@pytest.fixture
def state_dir(tmp_path, image, change):
    """The state of a process that died: sealed, and the image as its engine left it."""
    directory = tmp_path / "state"
    with open_plan(image) as plan:
        state = live.create_live(directory, plan, ATTACHMENT)
        session = state.header.open_session
        state.close()
    change(clean_shutdown=0, ext_boot_id=chain.boot_id(), ext_open_session=session)
    return directory


@given(live_headers)
def test_header_survives_packing(header):
    page = header.pack()
    assert len(page) == 4096
    assert LiveHeader.unpack(page) == header


@given(live_headers, st.integers(0, 4095), st.integers(1, 255))
def test_any_changed_byte_is_noticed(header, position, flip):
    page = bytearray(header.pack())
    page[position] ^= flip
    with pytest.raises(ValueError, match="live-state file|version|damaged"):
        LiveHeader.unpack(bytes(page))


def test_fresh_state_is_allocated_and_private(tmp_path, image):
    with open_plan(image) as plan:
        state = live.create_live(tmp_path / "state", plan, ATTACHMENT)
    for fd, size in zip((state.live_fd, state.stats_fd), SIZES, strict=True):
        status = os.fstat(fd)
        assert status.st_size == size
        assert status.st_blocks * 512 >= size
        assert status.st_mode & 0o077 == 0
    assert os.pread(state.live_fd, SIZES[0], 4096).strip(b"\0") == b""
    assert live.live_presence(state.directory) is LivePresence.FOUND
    state.remove()
    assert live.live_presence(state.directory) is LivePresence.ABSENT
    assert os.listdir(state.directory) == []


def test_state_of_a_dead_process_is_adopted(state_dir, image):
    with open_plan(image, TAKEOVER) as plan:
        state = live.adopt_live(state_dir, plan)
    assert state.attachment_uuid == ATTACHMENT
    os.pwrite(state.live_fd, b"x", 4096)
    state.close()
    state.close()


FOREIGN = {
    "st_ino": ({"st_ino": 1}, "another file"),
    "st_dev": ({"st_dev": 1}, "another file"),
    "image_uuid": ({"image_uuid": b"n" * 16}, "another image"),
    "virtual_size": ({"virtual_size": 1 << 60}, "size differs"),
    "bitmap_size": ({"bitmap_size": 1}, "bitmap differs"),
    "block_size": ({"block_size": 8192}, "block size differs"),
    "open_session": ({"open_session": b"n" * 16}, "opened for writing since"),
    "boot_id": ({"boot_id": b"n" * 16}, "earlier boot"),
}


@pytest.mark.parametrize(("values", "text"), FOREIGN.values(), ids=FOREIGN)
def test_any_mismatch_is_refused(state_dir, image, values, text):
    path = state_dir / live.LIVE_NAME
    data = path.read_bytes()
    path.write_bytes(replace(LiveHeader.unpack(data), **values).pack() + data[4096:])
    with (
        open_plan(image, TAKEOVER) as plan,
        pytest.raises(LiveStateMismatch, match=text) as caught,
    ):
        live.adopt_live(state_dir, plan)
    assert type(caught.value) is LiveStateMismatch  # never one that may be dropped


def test_image_closed_since_is_refused(state_dir, image, change):
    change(clean_shutdown=1, ext_boot_id=bytes(16))
    with open_plan(image) as plan, pytest.raises(LiveStateMismatch, match="closed since"):
        live.adopt_live(state_dir, plan)


def test_state_of_an_earlier_boot_may_be_dropped(state_dir, image, change):
    path = state_dir / live.LIVE_NAME
    data = path.read_bytes()
    header = replace(LiveHeader.unpack(data), boot_id=b"e" * 16)
    path.write_bytes(header.pack() + data[4096:])
    change(ext_boot_id=b"e" * 16)
    with open_plan(image) as plan:
        with pytest.raises(LiveStateOutdated):
            live.adopt_live(state_dir, plan)
        live.create_live(state_dir, plan, ATTACHMENT).close()


def test_state_whose_session_never_began_may_be_dropped(tmp_path, image):
    with open_plan(image) as plan:
        live.create_live(tmp_path / "state", plan, ATTACHMENT).close()
        with pytest.raises(LiveStateUnfinished):
            live.adopt_live(tmp_path / "state", plan)
        live.create_live(tmp_path / "state", plan, ATTACHMENT).close()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda path: path.unlink(), "there is none"),
        (lambda path: path.write_bytes(b""), "not a live-state file"),
        (lambda path: path.write_bytes(b"FVDLIVE\0\2" + bytes(4087)), "version 2"),
        (lambda path: os.truncate(path, 4096), "too short"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "cannot be opened"),
    ],
    ids=["missing", "empty", "version", "short", "pipe", "folder", "link"],
)
def test_damaged_state_is_refused(state_dir, image, damage, text):
    damage(state_dir / live.LIVE_NAME)
    with open_plan(image, TAKEOVER) as plan, pytest.raises(LiveStateMismatch, match=text):
        live.adopt_live(state_dir, plan)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"short"),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    ],
    ids=["missing", "short", "pipe", "link"],
)
def test_lost_counters_are_no_reason_to_serve_nobody(state_dir, image, damage):
    size = (state_dir / live.STATS_NAME).stat().st_size
    damage(state_dir / live.STATS_NAME)
    with open_plan(image, TAKEOVER) as plan:
        state = live.adopt_live(state_dir, plan)
    assert os.pread(state.stats_fd, size + 1, 0) == bytes(size)
    assert (state_dir / live.STATS_NAME).stat().st_size == size
    state.close()


def test_state_of_another_image_is_not_overwritten(state_dir, tmp_path):
    from fvdengine.create import create_image
    from fvdengine.options import CreateOptions

    create_image(tmp_path / "other.fvd", CreateOptions(size=1 << 20))
    before = (state_dir / live.LIVE_NAME).read_bytes()
    with (
        open_plan(tmp_path / "other.fvd") as plan,
        pytest.raises(LiveStateMismatch, match=r"state of .*clone\.fvd"),
    ):
        live.create_live(state_dir, plan, ATTACHMENT)
    assert (state_dir / live.LIVE_NAME).read_bytes() == before


def test_full_store_is_an_error_and_leaves_nothing(tmp_path, image, monkeypatch):
    def full(fd, offset, size):
        raise OSError(28, "No space left on device")

    with open_plan(image) as plan:
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(NoSpace):
            live.create_live(tmp_path / "state", plan, ATTACHMENT)
    assert os.listdir(tmp_path / "state") == []


def test_what_is_reserved_is_used_where_no_more_is_to_be_had(tmp_path, image, monkeypatch):
    state, allocate = tmp_path / "state", os.posix_fallocate
    state.mkdir()

    def full(fd, offset, size):
        if os.fstat(fd).st_size < size:
            raise OSError(28, "No space left on device")
        allocate(fd, offset, size)

    with open_plan(image) as plan:
        live.reserve(state, plan.header)
        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(NoSpace, match=r"live\.reserved"):
            live.reserve(tmp_path, plan.header)
        live.create_live(state, plan, ATTACHMENT).close()
        assert sorted(os.listdir(state)) == ["live", "stats"]
        assert [(state / name).stat().st_size for name in ("live", "stats")] == list(SIZES)
        assert not any((state / "live").read_bytes()[4096:])
        with pytest.raises(NoSpace):  # it is used up
            live.create_live(state, plan, ATTACHMENT)


@pytest.mark.parametrize("taken", ["fifo", "folder"])
def test_what_is_not_ours_is_not_taken_for_reserved(tmp_path, image, taken):
    state = tmp_path / "state"
    state.mkdir()
    if taken == "fifo":
        os.mkfifo(state / "live.reserved")
    else:
        (state / "live.reserved").symlink_to(tmp_path / "elsewhere")
    with open_plan(image) as plan:
        live.create_live(state, plan, ATTACHMENT).close()
        assert (state / "live").stat().st_size == SIZES[0]
        live.reserve(state, plan.header)
        live.release_reserved(state)
        assert sorted(os.listdir(state)) == ["live", "stats"]


def test_death_before_the_header_leaves_no_live_state(tmp_path, image, monkeypatch):
    def die(*_names):
        raise KeyboardInterrupt

    with open_plan(image) as plan:
        monkeypatch.setattr(os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            live.create_live(tmp_path / "state", plan, ATTACHMENT)
        monkeypatch.undo()
        assert live.live_presence(tmp_path / "state") is live.LivePresence.ABSENT
        live.create_live(tmp_path / "state", plan, ATTACHMENT).close()


def test_state_of_an_earlier_image_of_the_name_goes_only_when_told(state_dir, image, base):
    """The image was made anew: what its forerunner left is refused, and given up on request."""
    os.unlink(image)
    create_image(image, CreateOptions(base=str(base), journal_size=65536))
    refused = pytest.raises(LiveStateMismatch, match="an earlier image of that name")
    with open_plan(image) as plan, refused:
        live.create_live(state_dir, plan, ATTACHMENT)
    with open_plan(image, OpenOptions(discard_live_state=True)) as plan:
        live.create_live(state_dir, plan, ATTACHMENT).close()


def test_force_spares_an_image_with_live_state(state_dir, image, base, digest):
    before = digest(image)
    with pytest.raises(LiveStateLeft, match="not merged"):
        create_image(image, CreateOptions(base=str(base), force=True))
    assert digest(image) == before


def test_state_of_another_session_is_not_taken_for_unfinished(tmp_path, image, state_dir):
    """Of two state directories of an image, the one whose session never began yields."""
    plan_options = OpenOptions(discard_live_state=True)
    with open_plan(image, plan_options) as plan:
        live.create_live(tmp_path / "other", plan, ATTACHMENT).close()
    with open_plan(image, TAKEOVER) as plan:
        with pytest.raises(LiveStateUnfinished):
            live.adopt_live(tmp_path / "other", plan)
        live.adopt_live(state_dir, plan).close()
    with pytest.raises(LiveStateLeft):
        open_plan(image)


def test_unreadable_state_is_not_overwritten_unasked(tmp_path, image):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "live").write_bytes(b"FVDLIVE\0\2" + bytes(4087))
    with open_plan(image) as plan, pytest.raises(LiveStateMismatch, match="version 2"):
        live.create_live(tmp_path / "state", plan, ATTACHMENT)
