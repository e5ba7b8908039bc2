# SPDX-License-Identifier: Apache-2.0
"""The simulator's checker of bytes and fvdctl's check refuse the same damage.

They share no code: the one reads FORMAT.md in Cython, the other in Python. What one of them cannot
see is said here. Damage is planted in images that both find in order.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from fvdengine.check import check_image
from fvdengine.findings import Severity
from fvdengine.header import Header
from fvdengine.records import BitmapRecord, Record, TableRecord
from fvdtest.forge import Forged, forge_image, header_of, poke, put_records
from fvdtest.sim import run

pytestmark = pytest.mark.timeout(400)  # the first test may have to compile

SIZE = 1 << 18
PLACES = {0: 1, 5: 0, 9: 2}
LOCAL = (0, 1, 20, 36)


@dataclass(frozen=True)
class Damage:
    """What is done to the bytes, which invariant our checker names, and the finding of check."""

    invariant: str
    code: str
    entries: tuple[tuple[int, int], ...] = ()
    records: tuple[Record, ...] = ()
    values: tuple[tuple[str, int | str], ...] = ()  # of the header, or another field's name


UNCLEAN = (("clean_shutdown", 0),)
DAMAGES = {
    "two chunks share a place": Damage("I8", "entry_double", entries=((3, 1),)),
    "a place behind the end": Damage("I2", "entry_behind", entries=((3, 3),)),
    "a place far behind the end": Damage("I2", "entry_range", entries=((3, 0x7FFFFFFF),)),
    "a place under the table": Damage(
        "I2", "entry_overlap", values=(("data_offset", "table_offset"), ("chunks_relocated", 1))
    ),
    "a record takes a place twice": Damage(
        "I8", "entry_double", records=(TableRecord(1, 7, (1,)),), values=UNCLEAN
    ),
    "a record maps behind the end": Damage(
        "I2", "entry_behind", records=(TableRecord(1, 7, (9,)),), values=UNCLEAN
    ),
    "a record of chunks that are not": Damage(
        "journal", "invalid_journal", records=(TableRecord(1, 16, (2,)),), values=UNCLEAN
    ),
    "a record of another epoch": Damage(
        "journal", "invalid_journal", records=(TableRecord(2, 7, (3,)),), values=UNCLEAN
    ),
    "a record of blocks that are not": Damage(
        "journal", "invalid_journal", records=(BitmapRecord(1 << 40, 8),), values=UNCLEAN
    ),
    "a record that ends behind the base": Damage(
        "journal", "invalid_journal", records=(BitmapRecord(SIZE // 512 - 1, 9),), values=UNCLEAN
    ),
    "clean with a bit in the journal": Damage(
        "I4", "clean_with_records", records=(BitmapRecord(64, 8),)
    ),
    "clean with a mapping in the journal": Damage(
        "I4", "clean_with_records", records=(TableRecord(1, 9, (0xFFFFFFFF,)),)
    ),
    "prefetched without a bit": Damage(
        "I5", "prefetched_without_bits", values=(("base_img_fully_prefetched", 1),)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def look() -> Callable[[bytes], str]:
    """The simulator's checker: what it says of an image."""
    found: Callable[[bytes], str] = run.native().sim_look.look
    return found


@pytest.fixture
def image(tmp_path):
    base = tmp_path / "base.raw"
    base.write_bytes(random.Random(3).randbytes(SIZE))
    path = tmp_path / "a.fvd"
    forge_image(path, Forged(size=SIZE, base=base, places=PLACES, local=LOCAL, file_places=3))
    return path


def plant(path, damage: Damage) -> Header:
    header = header_of(path)
    for index, place in damage.entries:
        poke(path, header.table_offset + 4 * index, place.to_bytes(4, "little"))
    if damage.records:
        put_records(path, header, 0, damage.records)
    values = {
        name: getattr(header, value) if isinstance(value, str) else value
        for name, value in damage.values
    }
    changed = replace(header, **values)
    for at in (0, 8192):
        poke(path, at, changed.pack())
    return changed


def corrupt(path):
    return [f.code for f in check_image(path).findings if f.severity is Severity.CORRUPT]


def test_image_in_order_is_so_to_both(image, look):
    assert look(image.read_bytes()) == ""
    assert corrupt(image) == []


@pytest.mark.parametrize("name", DAMAGES)
def test_both_checkers_refuse_the_same_damage(image, look, name):
    damage = DAMAGES[name]
    plant(image, damage)
    assert look(image.read_bytes()).startswith(f"{damage.invariant}: ")
    assert corrupt(image) == [damage.code]
