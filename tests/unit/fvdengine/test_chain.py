# SPDX-License-Identifier: Apache-2.0
"""Chains of bases: identity of each kind, changes noticed, loops and depth limited."""

import contextlib
import os
from dataclasses import replace

import pytest

from fvdengine import chain
from fvdengine.create import create_image
from fvdengine.errors import (
    BaseChanged,
    BaseMissing,
    BaseTooShort,
    ChainLoop,
    ChainTooDeep,
    EngineError,
    InvalidHeader,
    LiveStateLeft,
)
from fvdengine.header import BASE_FVD, Header
from fvdengine.opening import OpenOptions, open_plan
from fvdengine.options import CreateOptions

READ = OpenOptions(read_only=True)


def rewrite(path, *, backup=False, **values):
    """Change header fields, or extension fields by ext_NAME; `backup`: in the copy as well."""
    header = Header.unpack(path.read_bytes()[:8192])
    inner = {name[4:]: value for name, value in values.items() if name.startswith("ext_")}
    outer = {name: value for name, value in values.items() if not name.startswith("ext_")}
    extension = replace(header.extension, **inner)
    with path.open("r+b") as file:
        file.write(replace(header, **outer, extension=extension).pack() * (1 + backup))


def test_untouched_base_is_accepted(image):
    with open_plan(image, READ) as plan:
        assert [layer.format for layer in plan.layers] == ["fvd", "raw"]
        assert plan.warnings == []


def test_touched_base_is_refused_and_can_be_accepted(image, base):
    os.utime(base, ns=(10**18, 10**18 + 1))
    with pytest.raises(BaseChanged, match="it was modified: its time is"):
        open_plan(image, READ)
    with open_plan(image, replace(READ, accept_changed_base=True)) as plan:
        assert any("has changed" in warning for warning in plan.warnings)


def test_grown_base_is_refused(image, base):
    with base.open("ab") as file:
        file.write(b"more")
    with pytest.raises(BaseChanged, match="1048576 bytes and has 1048580 now"):
        open_plan(image, READ)


def test_short_base_is_refused_whatever_is_accepted(image, base):
    os.truncate(base, 1048576 - 512)
    with pytest.raises(BaseTooShort, match="fewer"):
        open_plan(image, replace(READ, accept_changed_base=True))


def test_missing_base_is_refused(image, base):
    base.unlink()
    with pytest.raises(BaseMissing):
        open_plan(image, READ)


def test_bases_of_an_image_in_use_are_checked_as_its_next_opening_would(second, image, base):
    options = OpenOptions()
    before = len(os.listdir("/proc/self/fd"))
    with open_plan(second, options):
        chain.check_local_bases(str(second), options)
        base.rename(f"{base}.aside")
        with pytest.raises(BaseMissing):
            chain.check_local_bases(str(second), options)
        base.write_bytes(b"another" * 200_000)
        with pytest.raises(BaseChanged):
            chain.check_local_bases(str(second), options)
        chain.check_local_bases(str(second), replace(options, accept_changed_base=True))
    assert len(os.listdir("/proc/self/fd")) == before
    second.unlink()
    with pytest.raises(EngineError):
        chain.check_local_bases(str(second), options)


@pytest.mark.parametrize(
    ("name", "base_format", "fault"),
    [("nbd://nobody/x", "raw", None), ("base.raw", "qcow2", None), ("no", "qcow2", BaseMissing)],
)
def test_bases_of_servers_are_not_waited_for(image, name, base_format, fault):
    rewrite(image, backup=True, base_img=name, base_img_fmt=base_format)
    with pytest.raises(fault) if fault else contextlib.nullcontext():
        chain.check_local_bases(str(image), OpenOptions())


def test_base_that_ends_within_a_sector_is_long_enough(tmp_path):
    (tmp_path / "odd.raw").write_bytes(b"x" * 1000)
    result = create_image(tmp_path / "c.fvd", CreateOptions(base=str(tmp_path / "odd.raw")))
    assert result.header.base_img_size == 1024
    open_plan(tmp_path / "c.fvd", READ).close()


@pytest.fixture
def second(image, tmp_path):
    """A clone of the clone."""
    path = tmp_path / "second.fvd"
    create_image(path, CreateOptions(base=str(image), base_format="fvd"))
    return path


def test_chain_goes_down_to_the_raw_file(second, image, base):
    with open_plan(second, READ) as plan:
        assert [layer.path for layer in plan.layers] == [str(second), str(image), str(base)]
        assert plan.header.extension.base_kind == BASE_FVD


def test_base_image_opened_for_writing_since_is_refused(second, image):
    rewrite(image, ext_open_session=b"n" * 16)
    with pytest.raises(BaseChanged, match="opened for writing"):
        open_plan(second, READ)


def test_another_base_image_is_refused(second, image):
    rewrite(image, ext_image_uuid=b"n" * 16)
    with pytest.raises(BaseChanged, match="another image"):
        open_plan(second, READ)


def test_base_of_another_kind_is_refused(second):
    rewrite(second, backup=True, base_img_fmt="raw")
    with pytest.raises(BaseChanged, match="another kind"):
        open_plan(second, READ)


def test_base_image_that_a_dead_process_left_is_refused(second, image):
    rewrite(image, clean_shutdown=0, ext_boot_id=chain.boot_id())
    with pytest.raises(LiveStateLeft, match=r"clone\.fvd"):
        open_plan(second, replace(READ, discard_live_state=True, accept_changed_base=True))


def test_invalid_base_image_is_refused(second, image):
    rewrite(image, table_size=4096)
    with pytest.raises(InvalidHeader, match=r"clone\.fvd is invalid: table_offset"):
        open_plan(second, READ)


def test_image_that_no_longer_needs_its_base_does_not_look_for_it(image, base):
    header = Header.unpack(image.read_bytes()[:8192])
    with image.open("r+b") as file:
        file.seek(header.bitmap_offset)
        file.write(b"\xff" * (header.base_img_size // header.block_size // 8))
    rewrite(image, base_img_fully_prefetched=1)
    base.unlink()
    with open_plan(image, READ) as plan:
        assert len(plan.layers) == 1


def test_unknown_identity_is_a_warning(image, base):
    rewrite(image, last_open_version=1)
    os.utime(base, ns=(1, 1))
    with open_plan(image, READ) as plan:
        assert any("identity" in warning for warning in plan.warnings)


def test_loop_is_refused(image):
    rewrite(image, backup=True, base_img="clone.fvd", base_img_fmt="fvd", ext_base_kind=0)
    with pytest.raises(ChainLoop):
        open_plan(image, READ)


def test_depth_is_limited(tmp_path, base, monkeypatch):
    previous, base_format = base, "raw"
    for number in range(chain.CHAIN_LENGTH_MAX - 1):
        following = tmp_path / f"{number}.fvd"
        options = CreateOptions(
            base=str(previous), base_format=base_format, journal_size=65536
        )
        create_image(following, options)
        previous, base_format = following, "fvd"
    with open_plan(previous, READ) as plan:
        assert len(plan.layers) == chain.CHAIN_LENGTH_MAX
    options = CreateOptions(base=str(previous), base_format="fvd", journal_size=65536)
    with pytest.raises(ChainTooDeep, match="more than 63"):
        create_image(tmp_path / "last.fvd", options)
    assert not (tmp_path / "last.fvd").exists()
    monkeypatch.setattr(chain, "CHAIN_LENGTH_MAX", chain.CHAIN_LENGTH_MAX - 1)
    with pytest.raises(ChainTooDeep, match="more than 63"):
        open_plan(previous, READ)


def test_failed_open_leaks_no_descriptor(second, base):
    base.unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BaseMissing):
        open_plan(second, READ)
    assert len(os.listdir("/proc/self/fd")) <= before


DAMAGE = [
    ("first page", 0, bytes(4096), "--repair {path}`"),
    ("size", 16, bytes(8), "--repair {path}`"),
    ("header size", 4, bytes(4), "--repair {path}`"),
    ("features", 4096, b"\xff" * 3000, "--repair --header backup {path}`"),
]


@pytest.mark.parametrize(
    ("offset", "data", "words"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE]
)
def test_damaged_header_points_to_its_sound_copy(image, poke, offset, data, words):
    poke(offset, data)
    with pytest.raises(EngineError) as caught:
        open_plan(image, READ)
    assert "sound backup copy" in caught.value.hint
    assert words.format(path=image) in caught.value.hint
    assert "create" not in caught.value.hint
    poke(8192, bytes(8192))
    with pytest.raises(EngineError) as caught:
        open_plan(image, READ)
    assert "--repair" not in caught.value.hint
