# SPDX-License-Identifier: Apache-2.0
"""An update is made or not made, whatever happens while it is written."""

import os
from dataclasses import replace

import pytest

from fvdengine import editing, intent, update
from fvdengine.check import check_image
from fvdengine.errors import (
    FileTooLarge,
    InvalidJournal,
    InvalidOption,
    InvalidSize,
    TailInUse,
)
from fvdengine.info import image_info
from fvdengine.options import OpenOptions
from fvdengine.records import BitmapRecord, Trailer, seal_sector
from fvdengine.repair import repair_image
from fvdengine.resize import ResizeOptions, resize_image
from fvdengine.update import UpdateOptions, update_image
from fvdtest.forge import Recorder, crashes, header_of, poke
from fvdtest.images import content_on_disk, open_image

SETTINGS = {"journal_buf_size": "8k", "copy_on_read": "on", "num_prefetch_slots": "5"}
ACCEPT = OpenOptions(accept_changed_base=True)


def shown(path):
    """The fields of the image as everybody but the engine sees them."""
    header = image_info(path).header
    return {name: getattr(header, name) for name in intent.UPDATE_FIELDS}


def recorded(monkeypatch, change):
    """The steps in which `change` writes."""
    steps = []
    with monkeypatch.context() as patched:
        patched.setattr(editing, "ImageFile", lambda fd, name: Recorder(fd, name, steps))
        change()
    return steps


def states_of(image, monkeypatch, rng, change):
    """What a crash at any point of `change` leaves, and the fields before and after it."""
    before, old = image.read_bytes(), shown(image)
    steps = recorded(monkeypatch, change)
    new = shown(image)
    states = [state[str(image)] for state in crashes({str(image): before}, steps, rng)]
    return states, old, new


@pytest.fixture(params=["settings", "name", "base"])
def states(request, image, base, monkeypatch, rng):
    if request.param == "settings":
        return states_of(image, monkeypatch, rng, lambda: update_image(image, SETTINGS))
    if request.param == "name":
        name = str(image.parent / "same.raw")
        os.link(base, name)
        return states_of(
            image, monkeypatch, rng, lambda: update_image(image, {"base_img": name})
        )
    name = "d" * 120 + "/" + "e" * 120 + "/base.raw"
    longer = image.parent / ("f" * 200) / ("g" * 200) / ("h" * 200) / "b.raw"
    for path in (image.parent / name, longer):
        path.parent.mkdir(parents=True)
        path.write_bytes(base.read_bytes())
    update_image(image, {"base_img": str(image.parent / name)}, UpdateOptions(unsafe=True))
    return states_of(
        image, monkeypatch, rng,
        lambda: update_image(image, {"base_img": str(longer)}, UpdateOptions(unsafe=True)),
    )  # fmt: skip


def test_every_crash_shows_all_of_an_update_or_nothing(image, states):
    found, old, new = states
    assert old != new
    seen = []
    for state in found:
        image.write_bytes(state)
        assert check_image(image, ACCEPT).exit_status == 0
        assert shown(image) in (old, new)
        seen.append(shown(image) == new)
    assert (seen[0], seen[-1]) == (False, True)
    staged = [state for state in found if state[7504] & 2]
    assert staged, "no crash falls into the update"


def test_whoever_writes_next_finishes_the_update(image, states):
    found, old, new = states
    for state in [state for state in found if state[7504] & 2]:
        for finish in (
            lambda: open_image(image).close(),
            lambda: update_image(image, {"prefetch_throttle_time": "30000"}),
            lambda: resize_image(
                image,
                str(header_of(image).virtual_disk_size),
                ResizeOptions(accept_changed_base=True),
            ),
            lambda: repair_image(image, ACCEPT),
        ):
            image.write_bytes(state)
            content = content_on_disk(image)
            finish()
            header = header_of(image)
            assert not intent.is_staged(header)
            assert {name: getattr(header, name) for name in intent.UPDATE_FIELDS} == new
            assert content_on_disk(image) == content
            assert check_image(image, ACCEPT).findings == []


@pytest.mark.parametrize("states", ["name"], indirect=True)
def test_names_that_were_to_be_changed_are_forgotten_by_whoever_writes_next(image, states):
    """The copy may have the new one, or parts of it, though it does not count."""
    found, old, _ = states
    found = [state for state in found if state[7504] & 6 == 4]
    assert any(state[:7440] != state[8192 : 8192 + 7440] for state in found)
    for state in found:
        for finish in (
            lambda: open_image(image).close(),
            lambda: update_image(image, {"prefetch_throttle_time": "30000"}),
            lambda: resize_image(image, str(header_of(image).virtual_disk_size)),
            lambda: repair_image(image),
        ):
            image.write_bytes(state)
            finish()
            assert not intent.is_renaming(header_of(image))
            assert shown(image) == old
            assert check_image(image).findings == []


def test_a_reader_and_a_refused_opening_leave_it_as_it_is(image, header, states):
    found, _, _ = states
    state = next(state for state in found if state[7504] & 2)
    image.write_bytes(state)
    check_image(image, ACCEPT)
    told = repair_image(image, ACCEPT, dry_run=True)
    assert [action.code for action in told.actions] == ["finish_update"]
    assert image.read_bytes() == state
    extension = header_of(image).extension
    sector = seal_sector([BitmapRecord(1 << 40, 8)], Trailer(1, 1), extension.image_uuid)
    poke(image, header.journal_offset, sector)
    broken = image.read_bytes()
    with pytest.raises(InvalidJournal):
        open_image(image)
    assert image.read_bytes() == broken


def test_a_copy_that_is_damaged_or_of_another_image_is_not_believed(image, header):
    staged = intent.marked(header)
    poke(image, 0, staged.pack())
    assert shown(image)["copy_on_read"] == header.copy_on_read
    other = replace(header.extension, image_uuid=b"o" * 16)
    for copy in (
        bytes(8192),
        replace(header, copy_on_read=1, extension=other).pack(),
        replace(header, num_prefetch_slots=0).pack(),
        replace(header, copy_on_read=1).pack()[:7440].ljust(8192, b"\0"),
    ):
        poke(image, 8192, copy)
        assert shown(image)["copy_on_read"] == header.copy_on_read
    poke(image, 8192, replace(header, copy_on_read=1).pack())
    assert shown(image)["copy_on_read"] == 1
    open_image(image).close()
    assert (header_of(image).copy_on_read, intent.is_staged(header_of(image))) == (1, False)


def test_a_lost_front_comes_back_with_the_update(image, header):
    poke(image, 8192, replace(header, copy_on_read=1, num_prefetch_slots=7).pack())
    poke(image, 0, intent.marked(header).pack())
    poke(image, 0, bytes(8))
    assert repair_image(image).exit_status == 0
    found = header_of(image)
    assert (found.copy_on_read, found.num_prefetch_slots) == (1, 7)
    assert not intent.is_staged(found)


def test_all_that_update_changes_can_be_staged():
    assert set(intent.UPDATE_FIELDS) == set(update.KEYS)


def test_what_is_refused_leaves_a_staged_update_as_it_is(image, header, base):
    poke(image, 8192, replace(header, copy_on_read=1).pack())
    poke(image, 0, intent.marked(header).pack())
    before = image.read_bytes()
    size = header.virtual_disk_size
    other = image.parent / "other.raw"
    other.write_bytes(bytes(header.base_img_size))
    for error, refused in (
        (InvalidOption, lambda: update_image(image, {"prefetch_max_read_throughput": "1"})),
        (InvalidOption, lambda: update_image(image, {"base_img": str(other)})),
        (TailInUse, lambda: resize_image(image, str(size // 2), ResizeOptions(shrink=True))),
        (InvalidSize, lambda: resize_image(image, str(1 << 63))),
        (FileTooLarge, lambda: resize_image(image, str(1 << 62))),
    ):
        with pytest.raises(error):
            refused()
        assert image.read_bytes() == before


@pytest.mark.parametrize("change", [{"header_size": 8192}, {"last_open_version": 1}])
def test_where_nothing_can_be_staged_one_field_is_changed_at_a_time(
    image, header, monkeypatch, change
):
    poke(image, 0, replace(header, **change).pack())
    if "header_size" in change:
        poke(image, 8192, bytes(8192))
    before = image.read_bytes()
    with pytest.raises(InvalidOption, match="one step"):
        update_image(image, SETTINGS)
    assert image.read_bytes() == before
    for key, text in SETTINGS.items():
        steps = recorded(monkeypatch, lambda key=key, text=text: update_image(image, {key: text}))
        front = [step for _, step in steps if step[0] == "write" and step[1] < 8192]
        assert len(front) == 1
    assert header_of(image).num_prefetch_slots == 5
