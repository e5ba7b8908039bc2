# SPDX-License-Identifier: Apache-2.0
"""The picture of a map: well-formed, to scale, and safe whatever the image is called."""

import xml.etree.ElementTree as ET

import pytest

from fvdctl.svg import ROWS_MAX, svg_of, write_svg
from fvdengine.errors import InvalidOption
from fvdengine.mapping import Extent, ExtentKind

MIB = 1 << 20
SVG = "{http://www.w3.org/2000/svg}"


def extents(*pieces):
    at, found = 0, []
    for length, kind in pieces:
        found.append(Extent(at, length, kind, 0))
        at += length
    return found


def areas(text):
    """Colour -> share of the picture."""
    drawn = ET.fromstring(text).find(f"{SVG}g")
    widths = {}
    for rect in drawn:
        color = rect.get("fill")
        widths[color] = widths.get(color, 0) + float(rect.get("width"))
    total = sum(widths.values())
    return {color: width / total for color, width in widths.items()}


def test_areas_are_as_large_as_the_extents():
    text = svg_of("web.fvd", extents((3 * MIB, ExtentKind.DATA), (MIB, ExtentKind.BASE)))
    assert areas(text) == {"#2a7": pytest.approx(0.75), "#bbb": pytest.approx(0.25)}
    assert "local 3M" in text
    assert "in the base 1M" in text


@pytest.mark.parametrize("size", [512, 4096, MIB + 512, 1 << 40])
def test_any_size_makes_rows_that_fit(size):
    root = ET.fromstring(svg_of("x", extents((size, ExtentKind.ZERO))))
    rects = root.find(f"{SVG}g")
    assert 1 <= len(rects) <= ROWS_MAX
    height = float(root.get("viewBox").split()[3])
    assert all(float(rect.get("y")) < height for rect in rects)


def test_a_small_extent_is_seen_all_the_same():
    text = svg_of("x", extents((1 << 40, ExtentKind.BASE), (4096, ExtentKind.DATA)))
    assert 'fill="#2a7"/>\n</g>' in text


def test_an_empty_disk_is_a_picture_too():
    assert ET.fromstring(svg_of("x", [])).tag == f"{SVG}svg"


def test_a_name_is_no_markup(tmp_path):
    path = tmp_path / "map.svg"
    write_svg(str(path), '/a/<script>&"\x1b', extents((512, ExtentKind.DATA)))
    text = path.read_text()
    assert "<script>" not in text
    assert ET.fromstring(text).find(f"{SVG}title").text == '<script>&"?: 512'


def test_a_map_that_cannot_be_made_leaves_no_file(tmp_path):
    def broken():
        yield Extent(0, 512, ExtentKind.DATA, 0)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_svg(str(tmp_path / "map.svg"), "x", broken())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"FVD\0precious", b"", b"<html>"])
def test_only_another_picture_is_replaced(tmp_path, content):
    other = tmp_path / "disk.raw"
    other.write_bytes(content)
    with pytest.raises(InvalidOption, match="exists and is no picture"):
        write_svg(str(other), "x", extents((512, ExtentKind.DATA)))
    assert other.read_bytes() == content
    picture = tmp_path / "map.svg"
    write_svg(str(picture), "first", extents((512, ExtentKind.DATA)))
    write_svg(str(picture), "second", extents((512, ExtentKind.DATA)))
    assert "second" in picture.read_text()
    link = tmp_path / "link.svg"
    link.symlink_to(picture)
    with pytest.raises(InvalidOption, match="exists and is no picture"):
        write_svg(str(link), "x", extents((512, ExtentKind.DATA)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.raw", "link.svg", "map.svg"]


def test_a_picture_that_cannot_be_written_is_named_by_its_own_name(tmp_path):
    with pytest.raises(InvalidOption, match="no such folder") as caught:
        write_svg(str(tmp_path / "none" / "map.svg"), "x", extents((512, ExtentKind.DATA)))
    assert str(tmp_path / "none" / "map.svg ") in caught.value.message
