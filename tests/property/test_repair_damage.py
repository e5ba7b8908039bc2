# SPDX-License-Identifier: Apache-2.0
"""Random damage anywhere in the metadata: repair mends it or refuses, and never makes it worse.

After a repair the check finds nothing, a second repair has nothing to do, and what no damage
touched reads as before. A refusal is one of our errors and changes no byte.
"""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import event, given, settings
from hypothesis import strategies as st

from fvdengine.check import check_image
from fvdengine.errors import EngineError
from fvdengine.opening import OpenOptions, open_device, open_plan
from fvdengine.records import BitmapRecord, TableRecord
from fvdengine.repair import repair_image
from fvdtest.forge import Forged, disk_bytes, forge_image, header_of, poke, put_records

SIZE = 1 << 18
ACCEPT = OpenOptions(accept_changed_base=True)
PLACES = {0: 4, 1: 0, 5: 2, 11: 5, 12: 1, 15: 3}

spots = st.one_of(
    st.tuples(st.just("front"), st.integers(0, 8191)),
    st.tuples(st.just("copy"), st.integers(0, 8191)),
    st.tuples(st.just("bitmap"), st.integers(0, 4095)),
    st.tuples(st.just("table"), st.integers(0, 127)),
    st.tuples(st.just("journal"), st.integers(0, 8191)),
)
patches = st.lists(
    st.tuples(spots, st.one_of(st.binary(min_size=1, max_size=8), st.just(bytes(600)))),
    min_size=1, max_size=4,
)  # fmt: skip
records = st.lists(
    st.one_of(
        st.builds(BitmapRecord, st.integers(0, 600), st.integers(0, 16)),
        st.builds(
            TableRecord, st.just(3), st.integers(0, 17),
            st.lists(st.sampled_from([0, 1, 5, 6, 9, 0x7FFFFFFF, 0xFFFFFFFF]), min_size=1,
                     max_size=3).map(tuple),
        ),
    ),
    max_size=3,
)  # fmt: skip


def forged(place: Path, compact: bool, found: list, clean: int) -> Path:
    """An image of either layout, with some records in its journal."""
    base = place / "base.raw"
    base.write_bytes(random.Random(3).randbytes(SIZE - 9000))
    path = place / "c.fvd"
    layout = {"places": PLACES} if compact else {"filled": range(64)}
    header = forge_image(path, Forged(size=SIZE, base=base, local=range(0, 60, 2), **layout))
    if found:
        put_records(path, header, 0, found, epoch=3, sequence=7)
    poke(path, 0, replace(header, clean_shutdown=clean).pack())
    return path


def damaged(path: Path, damage: list) -> None:
    header = header_of(path)
    starts = {
        "front": 0, "copy": 8192, "bitmap": header.bitmap_offset,
        "table": header.table_offset or header.bitmap_offset, "journal": header.journal_offset,
    }  # fmt: skip
    for (section, offset), data in damage:
        poke(path, starts[section] + offset, data)


@settings(max_examples=150, deadline=None)
@given(compact=st.booleans(), found=records, clean=st.integers(0, 1), damage=patches)
def test_repair_mends_or_refuses_and_changes_nothing(compact, found, clean, damage):
    with tempfile.TemporaryDirectory(prefix="fvd-damage-") as directory:
        path = forged(Path(directory), compact, found, clean)
        damaged(path, damage)
        before = path.read_bytes()
        try:
            told = repair_image(path, ACCEPT, dry_run=True)
        except EngineError:
            told = None
        assert path.read_bytes() == before
        try:
            done = repair_image(path, ACCEPT)
        except EngineError:
            assert told is None
            assert path.read_bytes() == before
            event("refused")
            return
        assert told is not None
        assert told.actions == done.actions
        event(f"{min(len(done.actions), 3)} actions")
        after = check_image(path, ACCEPT)
        reachable = [f for f in after.findings if f.where not in ("base", "data file")]
        assert reachable == [] or after.exit_status in (0, 3), reachable
        assert after.exit_status in (0, 1, 3)
        if after.exit_status == 0:
            content = disk_bytes(path)
            assert repair_image(path, ACCEPT).actions == []
            assert disk_bytes(path) == content
            if not compact:
                assert served(path) == content


def served(path: Path) -> bytes:
    """What the compiled engine makes of the image."""
    with open_plan(path, replace(ACCEPT, read_only=True)) as plan:
        device = open_device(plan)
        try:
            return device.read(0, device.size)
        finally:
            device.close()


@settings(max_examples=60, deadline=None)
@given(compact=st.booleans(), found=records, data=st.data())
def test_undamaged_image_keeps_its_content(compact, found, data):
    """Whatever a valid journal holds: settling it changes nothing that can be read."""
    with tempfile.TemporaryDirectory(prefix="fvd-damage-") as directory:
        path = forged(Path(directory), compact, found, 0)
        try:
            content = disk_bytes(path)
        except EngineError:
            return  # the records do not fit the image: the other test's subject
        poke(path, 8192 + data.draw(st.integers(0, 8191)), b"?")
        repair_image(path, ACCEPT)
        assert disk_bytes(path) == content
        assert check_image(path, ACCEPT).exit_status in (0, 3)
