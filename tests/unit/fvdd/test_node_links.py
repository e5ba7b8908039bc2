# SPDX-License-Identifier: Apache-2.0
"""Links with stable names: made, replaced, and removed only where they are the device's own."""

import os

import pytest

from fvdd.attach import node_links


@pytest.fixture(autouse=True)
def no_udev(monkeypatch, tmp_path):
    monkeypatch.setattr(node_links, "UDEV_CONTROL", str(tmp_path / "none"))


def links(folder):
    return {entry.name: os.readlink(entry) for entry in folder.iterdir()}


def test_links_of_a_disk_and_its_partitions(tmp_path):
    folder = tmp_path / "fvd"
    node_links.make("web", "nbd3", ["nbd3p1", "nbd3p12"], str(folder))
    assert links(folder) == {
        "web": "../nbd3", "web-part1": "../nbd3p1", "web-part12": "../nbd3p12",
    }  # fmt: skip
    node_links.make("web", "nbd4", [], str(folder))
    assert links(folder)["web"] == "../nbd4"
    # What leads elsewhere by now, and what is another device's, stays.
    node_links.make("web-2", "nbd3", [], str(folder))
    node_links.remove("web", "nbd3", str(folder))
    assert links(folder) == {"web": "../nbd4", "web-2": "../nbd3"}
    node_links.remove("web", "nbd4", str(folder))
    assert links(folder) == {"web-2": "../nbd3"}


def test_link_of_a_device_called_like_a_link_in_the_making_stays(tmp_path):
    node_links.make("web.new", "nbd1", [], str(tmp_path))
    node_links.make("web", "nbd2", [], str(tmp_path))
    assert links(tmp_path) == {"web.new": "../nbd1", "web": "../nbd2"}


def test_where_udev_runs_it_is_left_to_udev(tmp_path, monkeypatch):
    monkeypatch.setattr(node_links, "UDEV_CONTROL", str(tmp_path))
    node_links.make("web", "nbd3", [], str(tmp_path / "fvd"))
    assert not (tmp_path / "fvd").exists()


def test_folder_that_cannot_be_made_is_told(tmp_path, caplog):
    (tmp_path / "fvd").touch()
    node_links.make("web", "nbd3", [], str(tmp_path / "fvd"))
    assert "no links" in caplog.text
    node_links.remove("web", "nbd3", str(tmp_path / "fvd"))


def test_name_in_a_backend_identifier():
    assert node_links.name_of("fvd:web.x-1:0000-11") == "web.x-1"
