# SPDX-License-Identifier: Apache-2.0
"""A data file that lies under its own image: nobody who writes data writes a base."""

import os
from dataclasses import replace

import pytest

from fvdengine import editing
from fvdengine.create import create_image
from fvdengine.errors import ChainLoop, EngineError
from fvdengine.options import CreateOptions
from fvdengine.repair import repair_image
from fvdengine.resize import ResizeOptions, resize_image
from fvdengine.update import update_image
from fvdtest.forge import header_of

MIB = 1 << 20


@pytest.fixture
def golden(tmp_path):
    path = tmp_path / "golden.img"
    path.write_bytes(os.urandom(4 * MIB))
    return path


@pytest.fixture(params=[False, True], ids=["the base", "below the base"])
def image(request, tmp_path, golden):
    """An image over the golden one, or two of them, whose own data file was moved away."""
    base, form = golden, "raw"
    if request.param:
        base, form = tmp_path / "mid.fvd", "fvd"
        create_image(str(base), CreateOptions(base=str(golden)))
    path = tmp_path / "top.fvd"
    options = CreateOptions(
        base=str(base), base_format=form, size=2 * MIB, data_file=str(tmp_path / "top.raw")
    )
    create_image(str(path), options)
    (tmp_path / "top.raw").rename(tmp_path / "moved.raw")
    return path


def test_update_does_not_make_a_base_the_data_file(image, golden):
    before = image.read_bytes(), golden.read_bytes()
    with pytest.raises(EngineError, match=r"golden\.img"):
        update_image(str(image), {"data_file": str(golden)})
    assert (image.read_bytes(), golden.read_bytes()) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda path: repair_image(path),
        lambda path: resize_image(path, str(MIB), ResizeOptions(shrink=True, force=True)),
    ],
    ids=["repair", "shrink"],
)
def test_no_base_is_cut_where_a_header_names_it_as_data(image, golden, change):
    header = header_of(image)
    with editing.open_for_change(str(image)) as file:
        editing.write_update(file, header, replace(header, data_file="golden.img"))
    before = image.read_bytes(), golden.read_bytes()
    with pytest.raises(ChainLoop):
        change(str(image))
    assert (image.read_bytes(), golden.read_bytes()) == before
