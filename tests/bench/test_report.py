# SPDX-License-Identifier: Apache-2.0
"""Table, saved file, comparison with it, and the chart."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from fvdtest.bench import chart, report
from fvdtest.bench.figures import Row, Run
from fvdtest.bench.report import SavedError

ROW = Row("hit", "ours", "peer", 50_000, 25_000, ratio=2.0, low=1.5, high=2.5, cpu_us=5,
          cpu_ratio=0.4, pairs=5, wanted=1.6, wanted_cpu=0.5, unit="requests/s")  # fmt: skip
MISSED = replace(ROW, job="other", ratio=1.0, low=0.9, high=1.1)
FREE = replace(ROW, job="free", wanted=None, wanted_cpu=None)


def test_table_tells_ratio_target_and_verdict():
    lines = report.table([ROW, MISSED, FREE]).splitlines()
    assert "50.0 k/s" in lines[1]
    assert ">= 1.6, cpu <= 0.5" in lines[1]
    assert lines[1].endswith("reached")
    assert lines[2].endswith("MISSED")
    assert lines[3].endswith("0.40")
    assert len({line.index("hit" if at else "job") for at, line in enumerate(lines[:2])}) == 1


def test_page_shows_only_rows_with_targets():
    text = report.markdown([ROW, FREE])
    assert "hit" in text
    assert "free" not in text
    assert len({line.count("|") for line in text.splitlines()}) == 1


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [(2.5e9, "B/s", "2.50 GB/s"), (1e4, "us", "100 us"), (0, "us", "-"), (0.125, "s", "0.125 s")],
)
def test_values_are_told_in_their_units(value, unit, words):
    assert report.number(value, unit) == words


def test_saved_file_has_all_and_can_be_loaded(tmp_path):
    path = tmp_path / "b.json"
    report.save(path, {"load": 3.5}, [Run("hit", "ours", 0, 1, 1, 1, 2.5)], [ROW], ["x: no"])
    told = json.loads(path.read_text())
    assert (told["load"], told["runs"][0]["load"], told["left_out"]) == (3.5, 2.5, ["x: no"])
    assert told["ratios"][0]["met"] is True
    assert report.load(path) == {("hit", "ours", "peer"): 2.0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no saved run"),
        ("[]", "no saved run"),
        ('{"format": 1}', "no saved run"),
        ('{"format": 1, "ratios": [{"job": "x"}]}', "no saved run"),
        ('{"format": 2, "ratios": []}', "format 2"),
        (None, "cannot be read"),
    ],
)
def test_file_that_is_no_saved_run_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "b.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SavedError, match=words) as caught:
        report.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("before", "lines", "worse"),
    [(2.0, 0, False), (2.2, 0, False), (2.5, 1, True), (1.5, 1, False)],
)
def test_only_what_leaves_the_tolerance_is_told(before, lines, worse):
    told, is_worse = report.changes([ROW, FREE], {("hit", "ours", "peer"): before}, 0.15)
    assert (len(told), is_worse) == (lines, worse)


def test_chart_is_well_formed_and_has_a_bar_for_each_target():
    names = replace(ROW, peer="<&>")
    picture = ElementTree.fromstring(chart.draw([names, MISSED, FREE], "a < b"))
    space = "{http://www.w3.org/2000/svg}"
    colours = [bar.get("fill") for bar in picture.iter(f"{space}rect")]
    assert colours.count(chart.REACHED) == 1
    assert colours.count(chart.MISSED) == 1
    assert any("<&>" in (label.text or "") for label in picture.iter(f"{space}text"))


def test_ratios_beyond_the_scale_stay_in_the_picture():
    assert chart.x_of(1000) == chart.x_of(chart.HIGHEST) <= chart.WIDTH
    assert chart.x_of(0.0) == chart.x_of(chart.LOWEST)
    assert chart.x_of(4) - chart.x_of(2) == pytest.approx(chart.x_of(2) - chart.x_of(1))
