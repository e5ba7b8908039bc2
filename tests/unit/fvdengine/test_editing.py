# SPDX-License-Identifier: Apache-2.0
"""Changing a header in place: whole sectors, in an order that every crash survives."""

import os
import stat
from dataclasses import fields, replace

import pytest

from fvdengine import chain, editing
from fvdengine import header as codec
from fvdengine.editing import FIELD_RANGES, ImageFile, open_for_change, patched
from fvdengine.errors import ImageInUse, ImageTruncated, IoFailed, NoSpace, UnsupportedStore
from fvdengine.header import Extension, Header
from fvdengine.opening import open_plan
from fvdengine.stores import Verdict

SHORT, LONG, LONGER = "a.raw", "l" * 700, "m" * 1000


class Recorder(ImageFile):
    """Notes what is written instead of writing it."""

    def __init__(self, fd, path):
        super().__init__(fd, path)
        self.writes = []
        self.flushes = 0

    def write(self, offset, data):
        self.writes.append((offset, bytes(data)))

    def flush(self):
        self.flushes += 1


@pytest.fixture
def recorder(image):
    fd = os.open(image, os.O_RDWR)
    yield Recorder(fd, str(image))
    os.close(fd)


def after(image, writes):
    """The header that a crash behind these writes leaves."""
    data = bytearray(image.read_bytes()[:8192])
    for offset, part in writes:
        data[offset : offset + len(part)] = part
    return Header.unpack(bytes(data))


def test_field_ranges_agree_with_the_codec(header):
    for name, place in FIELD_RANGES.items():
        value = getattr(header, name)
        other = {int: 1, str: "x", bytes: b"\1" * 4096}[type(value)]
        if other == value:
            other = 2
        old, new = header.pack(), replace(header, **{name: other}).pack()
        differing = [at for at in range(len(old)) if old[at] != new[at]]
        assert differing
        assert set(differing) <= set(place), name
    assert list(FIELD_RANGES) == [item.name for item in fields(Header) if item.name != "extension"]
    assert FIELD_RANGES["incompatible_features"].stop == codec.HEADER_FIELDS_SIZE


def test_one_changed_flag_is_one_write_of_one_sector(recorder, header):
    editing.write_header(recorder, header, replace(header, copy_on_read=1))
    assert [(offset, len(data)) for offset, data in recorder.writes] == [(6 * 512, 512)]
    assert recorder.flushes == 1


def test_nothing_changed_writes_nothing(recorder, header):
    editing.write_header(recorder, header, header)
    assert (recorder.writes, recorder.flushes) == ([], 0)


@pytest.mark.parametrize("name", ["base_img", "data_file", "add_storage_cmd"])
@pytest.mark.parametrize(
    ("old_name", "new_name"),
    [(SHORT, LONG), (LONG, SHORT), (SHORT, LONGER), (SHORT, "b.raw"), (LONGER, SHORT)],
    ids=["grows", "shrinks", "fills", "short", "empties"],
)
def test_name_changes_at_once_however_a_crash_falls(
    image, recorder, header, change, name, old_name, new_name
):
    old = change(**{name: old_name})
    new = replace(old, **{name: new_name})
    editing.write_header(recorder, old, new)
    seen = [getattr(after(image, recorder.writes[:n]), name) for n in range(10)]
    assert set(seen) == {old_name, new_name}
    assert recorder.flushes == len(recorder.writes)


def test_long_name_torn_by_a_crash_is_still_a_valid_header(image, recorder, change):
    old = change(base_img=LONG)
    editing.write_header(recorder, old, replace(old, base_img=LONGER))
    assert len(recorder.writes) > 1
    for n in range(len(recorder.writes) + 1):
        assert len(after(image, recorder.writes[:n]).base_img) in (700, 1000)


def test_extension_is_written_last(recorder, header):
    extension = replace(header.extension, base_kind=4)
    new = replace(header, base_img="b", extension=extension, copy_on_read=1)
    editing.write_header(recorder, header, new)
    assert recorder.writes[-1][0] == 14 * 512
    assert Extension.unpack(recorder.writes[-1][1][272:]) == extension


def test_garbage_behind_a_name_does_not_get_into_the_new_one(header):
    raw = bytearray(header.pack())
    raw[1072 + len(header.base_img) + 1 : 1072 + 40] = b"g" * (39 - len(header.base_img))
    old = Header.unpack(bytes(raw))
    new = replace(old, base_img=header.base_img + "xy")
    assert Header.unpack(patched(bytes(raw), old, new)) == new


def test_rest_of_a_longer_extension_is_kept(header):
    data = bytearray(header.pack())
    data[7440:7444] = (200).to_bytes(4, "little")
    data[7560:7640] = b"n" * 80
    data[7444:7448] = bytes(4)
    data[7444:7448] = editing.crc32c(data[7440:7640]).to_bytes(4, "little")
    old = Header.unpack(bytes(data))
    assert old.extension == header.extension
    new = replace(old, extension=replace(old.extension, boot_id=b"b" * 16))
    written = patched(bytes(data), old, new)
    assert Header.unpack(written).extension == new.extension
    assert written[7560:7640] == b"n" * 80


def test_backup_copy_becomes_equal(image, header):
    with open_for_change(str(image)) as file:
        new = editing.write_header(file, header, replace(header, copy_on_read=1))
        editing.write_backup(file, new)
    data = image.read_bytes()
    assert data[:8192] == data[8192:16384]
    assert Header.unpack(data).copy_on_read == 1


def test_image_without_room_for_a_copy_gets_none(image, recorder, header):
    editing.write_backup(recorder, replace(header, header_size=8192))
    assert recorder.writes == []


def test_session_begins_with_the_clean_flag_and_ends_with_it(image, recorder, header):
    begun = editing.begin_change(recorder, header)
    assert [offset for offset, _ in recorder.writes] == [4 * 512, 14 * 512]
    assert (begun.clean_shutdown, begun.extension.boot_id) == (0, bytes(16))
    assert begun.extension.open_session != header.extension.open_session
    assert after(image, recorder.writes) == begun
    with open_for_change(str(image)) as file:
        begun = editing.begin_change(file, header)
        ended = editing.end_change(file, begun)
    data = image.read_bytes()
    assert Header.unpack(data) == ended == replace(begun, clean_shutdown=1)
    assert Header.unpack(data[8192:]) == begun


def test_only_one_may_change_an_image(image):
    with open_plan(image), pytest.raises(ImageInUse), open_for_change(str(image)):
        pass
    with open_for_change(str(image)), pytest.raises(ImageInUse):
        open_plan(image)
    open_plan(image).close()


def test_unsafe_store_is_refused(image, monkeypatch):
    monkeypatch.setattr(editing.stores, "judge_store", lambda fd: (Verdict.REFUSED, "nfs"))
    with pytest.raises(UnsupportedStore), open_for_change(str(image)):
        pass


@pytest.mark.parametrize("punches", [True, False])
def test_zeroing_zeroes_just_that_and_never_grows(tmp_path, monkeypatch, punches):
    if not punches:
        monkeypatch.setattr(
            ImageFile, "_punch", lambda *_: (_ for _ in ()).throw(OSError(95, "no"))
        )
    path = tmp_path / "f"
    path.write_bytes(b"x" * 3_000_000)
    with open_for_change(str(path)) as file:
        file.zero(1000, 2_000_000)
        file.zero(2_999_000, 5000)
        file.zero(9_000_000, 10)
    expected = b"x" * 1000 + bytes(2_000_000) + b"x" * 998_000 + bytes(1000)
    assert path.read_bytes() == expected


def test_reading_past_the_end_and_faults_are_errors_of_ours(image, monkeypatch):
    def fail(*_):
        raise OSError(28, "full")

    with open_for_change(str(image)) as file:
        with pytest.raises(ImageTruncated):
            file.read(file.length() - 10, 11)
        monkeypatch.setattr(os, "pwrite", fail)
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "io")))
        monkeypatch.setattr(os, "ftruncate", fail)
        with pytest.raises(NoSpace):
            file.write(0, b"x")
        with pytest.raises(NoSpace):
            file.truncate(1 << 40)
        with pytest.raises(IoFailed):
            file.flush()
        assert not stat.S_ISBLK(os.fstat(file.fd).st_mode)


def test_header_of_a_live_image_is_not_given(image, change):
    change(clean_shutdown=0, ext_boot_id=chain.boot_id())
    with open_for_change(str(image)) as file, pytest.raises(editing.chain.LiveStateLeft):
        editing.read_free_header(file)
