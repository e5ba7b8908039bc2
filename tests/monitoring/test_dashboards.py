# SPDX-License-Identifier: Apache-2.0
"""The dashboards: the committed JSON is what the code makes, and keeps Grafana's rules."""

import importlib.util
import json
import re
import sys

import pytest

from fvdtest import tree

FOLDER = tree.ROOT / "packaging/grafana"


def load_dashboards():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("fvd_dashboards", FOLDER / "dashboards.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


MODULE = load_dashboards()
SAVED = sorted(FOLDER.glob("*.json"))
PANELS = [
    pytest.param(panel, id=f"{path.stem}-{panel['title']}")
    for path in SAVED
    for panel in json.loads(path.read_text())["panels"]
    if panel["type"] != "row"
]


def test_committed_files_are_those_that_the_code_makes():
    made = {f"{one.uid}.json": MODULE.written(one) for one in MODULE.DASHBOARDS}
    assert {path.name: path.read_text() for path in SAVED} == made


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_panels_have_numbers_of_their_own_and_do_not_overlap(path):
    panels = json.loads(path.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells


@pytest.mark.parametrize("panel", PANELS)
def test_panel_says_what_it_shows_and_names_only_alerts_that_exist(panel):
    assert panel["description"].endswith(".")
    assert panel["targets"]
    rules = (tree.ROOT / "packaging/prometheus/fvd.rules.yml").read_text()
    for alert in re.findall(r"\bFvd\w+", panel["description"]):
        assert f"alert: {alert}\n" in rules


def test_one_device_is_one_of_one_host():
    """Every host has an nbd0: a panel of the device's dashboard must not mix them."""
    (board,) = (json.loads(path.read_text()) for path in SAVED if path.stem == "fvd-device")
    for variable in board["templating"]["list"]:
        assert not variable.get("multi"), variable["name"]
        assert not variable.get("includeAll"), variable["name"]
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            selectors = re.findall(r"{[^{}]*}", target["expr"])
            assert selectors, target["expr"]
            assert all('instance="$instance"' in one for one in selectors), target["expr"]


def test_a_device_in_the_fleets_table_leads_to_its_page():
    (board,) = (json.loads(path.read_text()) for path in SAVED if path.stem == "fvd-fleet")
    (table,) = (panel for panel in board["panels"] if panel["title"] == "Every device")
    (link,) = (
        value["url"]
        for one in table["fieldConfig"]["overrides"] if one["matcher"]["options"] == "Device"
        for prop in one["properties"] if prop["id"] == "links"
        for value in prop["value"]
    )  # fmt: skip
    assert link.startswith("/d/fvd-device?")
    shown = set(table["transformations"][-1]["options"]["renameByName"].values())
    named = re.findall(r"var-(\w+)=\${__data\.fields\.(\w+)}", link)
    assert dict(named).keys() == {"instance", "device"}
    assert set(dict(named).values()) <= shown
