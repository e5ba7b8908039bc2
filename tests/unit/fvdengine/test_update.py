# SPDX-License-Identifier: Apache-2.0
"""Update: every run-time field arrives, everything else is refused and changes nothing."""

import os
import re
import shutil
from dataclasses import replace

import pytest

from fvdengine import chain
from fvdengine.check import check_image
from fvdengine.create import create_image
from fvdengine.errors import (
    BaseTooShort,
    DataFileMissing,
    DataFileShared,
    DataFileTooShort,
    ImageInUse,
    InvalidOption,
    InvalidTable,
    LiveStateLeft,
    NotAnImage,
    PathNotAllowed,
)
from fvdengine.header import Header
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions
from fvdengine.update import KEYS, UpdateOptions, plan_update, update_image
from fvdtest.forge import Forged, disk_bytes, forge_image

GOOD = [
    ("journal_buf_size", "8k", 8192),
    ("journal_buf_size", "0", 0),
    ("journal_clean_buf_period", "3600000", 3_600_000),
    ("storage_grow_unit", "1G", 1 << 30),
    ("add_storage_cmd", "builtin:lvextend", "builtin:lvextend"),
    ("add_storage_cmd", "x" * 1023, "x" * 1023),
    ("copy_on_read", "On", 1),
    ("copy_on_read", "false", 0),
    ("max_outstanding_copy_on_read_data", "8M", 8 << 20),
    ("prefetch_start_delay", "0", 0),
    ("prefetch_start_delay", "off", -1),
    ("prefetch_start_delay", "-1", -1),
    ("num_prefetch_slots", "64", 64),
    ("bytes_per_prefetch", "64k", 65536),
    ("prefetch_read_throughput_measure_time", "1", 1),
    ("prefetch_write_throughput_measure_time", "70", 70),
    ("prefetch_min_read_throughput", "0", 0),
    ("prefetch_min_write_throughput", "7", 7),
    ("prefetch_max_read_throughput", "6000", 6000),
    ("prefetch_max_write_throughput", "7000", 7000),
    ("prefetch_throttle_time", "0", 0),
    ("need_zero_init", "off", 0),
    ("base_img_fmt", "raw", "raw"),
]
BAD = [
    ("journal_buf_size", "65M", "64M"),
    ("journal_buf_size", "1M", "larger than the journal"),
    ("journal_buf_size", "-1", "from 0 to 64M"),
    ("journal_clean_buf_period", "3600001", "3600000"),
    ("journal_clean_buf_period", "5k", "milliseconds"),
    ("storage_grow_unit", "4k", "at least a chunk, 1M"),
    ("add_storage_cmd", "x" * 1024, "1023 bytes"),
    ("add_storage_cmd", "a\0b", "NUL"),
    ("add_storage_cmd", "a\nb", "control characters"),
    ("base_img", "b\x1b[31m.raw", "control characters"),
    ("base_img", "b\x7f.raw", "control characters"),
    ("copy_on_read", "maybe", "on or off"),
    ("copy_on_read", "", "on or off"),
    ("max_outstanding_copy_on_read_data", "4k", "two blocks, 8k"),
    ("max_outstanding_copy_on_read_data", "1.3", "from 0"),
    ("prefetch_start_delay", "-2", "or off"),
    ("prefetch_start_delay", "99999999999", "or off"),
    ("num_prefetch_slots", "0", "1 to 64"),
    ("num_prefetch_slots", "65", "1 to 64"),
    ("num_prefetch_slots", "1e1", "1 to 64"),
    ("bytes_per_prefetch", "5000", "block size, 4k"),
    ("bytes_per_prefetch", "1G", "256M"),
    ("prefetch_read_throughput_measure_time", "0", "from 1"),
    ("prefetch_write_throughput_measure_time", "\u0664", "from 1"),
    ("prefetch_min_read_throughput", "1000000001", "is below prefetch_min_read_throughput"),
    ("prefetch_max_write_throughput", "5", "is below prefetch_min_write_throughput"),
    ("prefetch_throttle_time", "99999999999999999999", "milliseconds"),
    ("need_zero_init", "on", "only be taken back"),
    ("base_img", "", "name of a file"),
    ("base_img", "b" * 1024, "1023 bytes"),
    ("base_img_fmt", "parallels", "raw, fvd"),
    ("data_file", "other.raw", "made without a data_file"),
    ("data_file_fmt", "raw", "made without a data_file"),
    ("virtual_disk_size", "1G", "fvdctl resize"),
    ("block_size", "8k", "fixed"),
    ("clean_shutdown", "1", "check --repair"),
    ("magic", "1", "fixed"),
    ("copy_on_reed", "on", "Did you mean copy_on_read"),
    ("", "on", "update --help"),
]


def header_of(path):
    return Header.unpack(path.read_bytes()[:8192])


@pytest.mark.parametrize(("key", "text", "expected"), GOOD)
def test_value_arrives_in_header_and_backup_copy(image, change, key, text, expected):
    change(backup=True, need_zero_init=1, copy_on_read=0)
    old = header_of(image)
    result = update_image(image, {key: text})
    new = header_of(image)
    assert getattr(new, key) == expected
    assert replace(new, **{key: getattr(old, key)}) == old
    assert image.read_bytes()[8192:16384] == image.read_bytes()[:8192]
    assert result.changes == (
        {} if getattr(old, key) == expected else {key: (getattr(old, key), expected)}
    )
    assert check_image(image).findings == []


@pytest.mark.parametrize(("key", "text", "words"), BAD)
def test_bad_value_is_named_with_its_range_and_changes_nothing(image, digest, key, text, words):
    before = digest(image)
    with pytest.raises(InvalidOption) as caught:
        update_image(image, {"copy_on_read": "on", key: text})
    assert words in caught.value.message + " " + caught.value.hint
    assert key in caught.value.message or "throughput" in key
    assert digest(image) == before


def test_every_key_is_a_field_and_has_a_good_example(header):
    tried = {key for key, _, _ in GOOD}
    assert set(KEYS) - tried == {"base_img", "data_file", "data_file_fmt"}
    assert all(hasattr(header, key) for key in KEYS)


def test_values_that_fit_only_together_are_taken_together(image):
    both = {
        "prefetch_min_read_throughput": "2000000000",
        "prefetch_max_read_throughput": "3000000000",
    }
    update_image(image, both)
    with pytest.raises(InvalidOption):
        update_image(image, {"prefetch_max_read_throughput": "1"})
    slots = {"num_prefetch_slots": "64", "bytes_per_prefetch": "8M"}
    with pytest.raises(InvalidOption, match="256 MiB"):
        update_image(image, slots)


def test_planning_reads_and_writes_nothing(header):
    new = plan_update(header, {"copy_on_read": "yes", "base_img": "gone/base.raw"})
    assert (new.copy_on_read, new.base_img) == (1, "gone/base.raw")
    assert plan_update(header, {}) == header


def test_old_value_that_open_tolerates_does_not_stop_others(header):
    odd = replace(header, max_outstanding_copy_on_read_data=1, storage_grow_unit=1 << 20)
    assert plan_update(odd, {"copy_on_read": "on"}).copy_on_read == 1


def test_open_image_is_refused_with_its_holder(image, digest):
    before = digest(image)
    with open_plan(image), pytest.raises(ImageInUse, match="this process"):
        update_image(image, {"copy_on_read": "on"})
    assert digest(image) == before


def test_image_of_a_dead_process_is_refused(image, change, digest):
    change(clean_shutdown=0, ext_boot_id=chain.boot_id())
    before = digest(image)
    with pytest.raises(LiveStateLeft):
        update_image(image, {"copy_on_read": "on"})
    assert digest(image) == before


def test_unclean_image_stays_unclean(image, change):
    change(clean_shutdown=0)
    update_image(image, {"copy_on_read": "on"})
    assert header_of(image).clean_shutdown == 0


# The base ----------------------------------------------------------------------------------


def test_moved_base_is_followed_though_the_old_name_is_gone(image, base, tmp_path):
    (tmp_path / "sub").mkdir()
    moved = base.rename(tmp_path / "sub" / "golden.raw")
    update_image(image, {"base_img": os.path.relpath(moved)})
    assert header_of(image).base_img == "sub/golden.raw"
    open_plan(image).close()
    assert check_image(image).findings == []


def test_other_fields_need_no_base(image, base):
    base.unlink()
    update_image(image, {"copy_on_read": "on"})
    assert header_of(image).copy_on_read == 1


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: os.utime(path, (5, 5)), "1970-01-01 00:00:05"),
        (lambda path: os.truncate(path, 2 << 20), "bytes and has"),
    ],
    ids=["other time", "other length"],
)
def test_other_base_is_refused_unless_forced(image, base, tmp_path, digest, damage, words):
    other = tmp_path / "other.raw"
    shutil.copy2(base, other)
    damage(other)
    before = digest(image)
    with pytest.raises(InvalidOption, match=words) as caught:
        update_image(image, {"base_img": str(other)})
    assert "--unsafe" in caught.value.hint
    assert digest(image) == before
    update_image(image, {"base_img": str(other)}, UpdateOptions(unsafe=True))
    open_plan(image, OpenOptions(read_only=True)).close()
    assert check_image(image).findings == []


def test_shorter_base_is_refused_even_then(image, base, tmp_path, digest):
    (tmp_path / "short.raw").write_bytes(bytes(512))
    before = digest(image)
    with pytest.raises(BaseTooShort):
        update_image(
            image, {"base_img": str(tmp_path / "short.raw")}, UpdateOptions(unsafe=True)
        )
    assert digest(image) == before


def test_missing_and_forbidden_and_own_names_are_refused(image, tmp_path, digest):
    before = digest(image)
    with pytest.raises(InvalidOption, match="does not exist"):
        update_image(image, {"base_img": str(tmp_path / "nothing.raw")})
    with pytest.raises(PathNotAllowed):
        update_image(image, {"base_img": "/etc/passwd"})
    with pytest.raises(chain.ChainLoop):
        update_image(image, {"base_img": str(image), "base_img_fmt": "fvd"})
    create_image(tmp_path / "other.fvd", CreateOptions(size=1 << 20))
    with pytest.raises(InvalidOption, match="another kind"):
        update_image(image, {"base_img": str(tmp_path / "other.fvd"), "base_img_fmt": "fvd"})
    assert digest(image) == before


@pytest.mark.parametrize("uri", ["nbd://[x/y", "http://host:99999/x", "nbd://u:p@host/x"])
def test_uri_that_means_nothing_is_refused_even_then(image, digest, uri):
    before = digest(image)
    with pytest.raises(InvalidOption, match=re.escape(uri)) as caught:
        update_image(image, {"base_img": uri}, UpdateOptions(unsafe=True))
    assert "Nothing was changed." in caught.value.hint
    assert digest(image) == before


def test_chain_that_would_lead_back_is_refused_even_then(image, base, tmp_path, digest):
    clones = [image, tmp_path / "second.fvd", tmp_path / "third.fvd"]
    for below, above in zip(clones, clones[1:], strict=False):
        create_image(above, CreateOptions(base=str(below), base_format="fvd"))
    before = digest(image)
    for clone in clones[1:]:
        with pytest.raises(InvalidOption, match="itself, or its data file, among") as caught:
            update_image(
                image, {"base_img": str(clone), "base_img_fmt": "fvd"}, UpdateOptions(unsafe=True)
            )
        assert "nothing was changed" in caught.value.hint
    assert digest(image) == before


def test_data_file_of_the_image_itself_cannot_become_its_base(base, tmp_path, digest):
    """Not at once, nor further below: each write would change what is still to be copied."""
    path, data = tmp_path / "s.fvd", tmp_path / "x.data"
    forge_image(path, Forged(size=1 << 20, base=base, data_file="x.data", filled=[0]))
    over = tmp_path / "over.fvd"
    create_image(over, CreateOptions(base=str(data)))
    before = digest(path), digest(data)
    for given in ({"base_img": str(data)}, {"base_img": str(over), "base_img_fmt": "fvd"}):
        with pytest.raises(InvalidOption, match="data file") as caught:
            update_image(path, given, UpdateOptions(unsafe=True))
        assert "nothing was changed" in caught.value.hint
    assert (digest(path), digest(data)) == before


def test_chain_that_would_be_too_long_to_be_opened_is_refused(image, tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "CHAIN_LENGTH_MAX", 3)
    second, lone = tmp_path / "second.fvd", tmp_path / "lone.fvd"
    create_image(second, CreateOptions(base=str(image), base_format="fvd"))
    open_plan(second, OpenOptions(read_only=True)).close()
    with pytest.raises(chain.ChainTooDeep):
        create_image(lone, CreateOptions(base=str(second), base_format="fvd"))
    create_image(tmp_path / "below.fvd", CreateOptions(size=1 << 20))
    create_image(lone, CreateOptions(base=str(tmp_path / "below.fvd"), base_format="fvd"))
    with pytest.raises(InvalidOption, match="3 images or more"):
        update_image(lone, {"base_img": str(second)}, UpdateOptions(unsafe=True))
    update_image(lone, {"base_img": str(image)}, UpdateOptions(unsafe=True))


def test_base_whose_own_base_is_away_is_taken_with_a_warning(image, base, tmp_path):
    second = tmp_path / "second.fvd"
    create_image(second, CreateOptions(base=str(image), base_format="fvd"))
    image.rename(tmp_path / "renamed.fvd")
    base.unlink()
    result = update_image(second, {"base_img": str(tmp_path / "renamed.fvd")})
    assert any("base.raw" in warning for warning in result.warnings)


@pytest.mark.parametrize("key", ["base_img", "data_file"])
def test_directory_is_no_file(image, tmp_path, digest, key):
    before = digest(image)
    for name in (str(tmp_path), "/etc"):
        with pytest.raises(InvalidOption, match=key) as caught:
            update_image(image, {key: name})
        assert "a directory" in caught.value.hint
    assert digest(image) == before


def test_wrong_format_of_the_base_is_named(image, digest):
    before = digest(image)
    with pytest.raises(NotAnImage) as caught:
        update_image(image, {"base_img_fmt": "fvd"}, UpdateOptions(unsafe=True))
    assert caught.value.hint == "Check base_img and base_img_fmt; nothing was changed."
    assert digest(image) == before


def test_allowed_directory_counts(image, base, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    moved = str(shutil.move(base, away / "base.raw"))
    update_image(image, {"base_img": moved}, UpdateOptions(allow_dirs=(str(away),)))
    assert header_of(image).base_img == moved


def test_base_image_of_fvd_is_recognised_by_its_identity(image, tmp_path):
    clone = tmp_path / "second.fvd"
    create_image(clone, CreateOptions(base=str(image), base_format="fvd"))
    moved = image.rename(tmp_path / "renamed.fvd")
    update_image(clone, {"base_img": str(moved)})
    open_plan(clone, OpenOptions(read_only=True)).close()
    create_image(tmp_path / "stranger.fvd", CreateOptions(size=1 << 20))
    with pytest.raises(InvalidOption, match="another image"):
        update_image(clone, {"base_img": str(tmp_path / "stranger.fvd")})


def test_image_without_base_gets_none(tmp_path, base):
    path = tmp_path / "alone.fvd"
    create_image(path, CreateOptions(size=1 << 20))
    with pytest.raises(InvalidOption, match="made without a base_img"):
        update_image(path, {"base_img": str(base)})


def test_base_that_is_not_needed_may_have_any_name(image, change):
    change(base_img_fully_prefetched=1)
    header = header_of(image)
    with image.open("r+b") as file:
        file.seek(header.bitmap_offset)
        file.write(b"\xff" * (header.base_img_size // header.block_size // 8))
    update_image(image, {"base_img": "gone.raw"})
    assert header_of(image).base_img.endswith("gone.raw")


def test_image_of_an_older_writer_keeps_its_unknown_identity(image, base, change):
    change(last_open_version=1)
    result = update_image(
        image, {"base_img": str(base)}, UpdateOptions(unsafe=True)
    )
    assert header_of(image).last_open_version == 1
    assert any("identity" in warning for warning in result.warnings)


# The data file -----------------------------------------------------------------------------


@pytest.fixture(params=[None, {0: 1, 3: 0}], ids=["raw", "compact"])
def separate(request, tmp_path):
    """An image with its data in x.data."""
    path = tmp_path / "s.fvd"
    forge_image(
        path, Forged(size=1 << 18, places=request.param, data_file="x.data", filled=[0])
    )
    return path


def test_moved_data_file_is_followed(separate, tmp_path):
    before = disk_bytes(separate)
    (tmp_path / "sub").mkdir()
    (tmp_path / "x.data").rename(tmp_path / "sub" / "y.data")
    update_image(separate, {"data_file": str(tmp_path / "sub" / "y.data")})
    assert header_of(separate).data_file == "sub/y.data"
    assert disk_bytes(separate) == before
    assert check_image(separate).findings == []


def test_base_cannot_become_the_data_file(base, tmp_path, digest):
    path = tmp_path / "s.fvd"
    create_image(path, CreateOptions(base=str(base), data_file=str(tmp_path / "x.data")))
    (tmp_path / "x.data").unlink()
    before = digest(path)
    for options in (UpdateOptions(), UpdateOptions(unsafe=True)):
        with pytest.raises(DataFileShared, match="its base") as caught:
            update_image(path, {"data_file": str(base)}, options)
        assert "as it is called now" in caught.value.hint
    assert digest(path) == before


def test_other_data_file_is_refused_unless_forced(separate, tmp_path, digest):
    shutil.copy(tmp_path / "x.data", tmp_path / "y.data")
    before = digest(separate)
    with pytest.raises(InvalidOption, match="still there"):
        update_image(separate, {"data_file": str(tmp_path / "y.data")})
    assert digest(separate) == before
    update_image(separate, {"data_file": str(tmp_path / "y.data")}, UpdateOptions(unsafe=True))
    assert header_of(separate).data_file == "y.data"


def test_data_file_that_cannot_be_it_is_refused_even_then(separate, tmp_path, digest):
    before = digest(separate)
    (tmp_path / "x.data").rename(tmp_path / "away")
    (tmp_path / "short").write_bytes(bytes(512))
    for name, error in (
        (tmp_path / "short", (DataFileTooShort, InvalidTable)),
        (separate, DataFileShared),
        (tmp_path / "none", DataFileMissing),
        ("/etc/passwd", PathNotAllowed),
    ):
        with pytest.raises(error):
            update_image(separate, {"data_file": str(name)}, UpdateOptions(unsafe=True))
    assert digest(separate) == before
