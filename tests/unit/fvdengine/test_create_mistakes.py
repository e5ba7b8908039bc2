# SPDX-License-Identifier: Apache-2.0
"""Create: what a beginner gets wrong is answered by name, with what to do instead."""

import pytest

from fvdengine.create import create_image
from fvdengine.errors import EngineError, InvalidOption
from fvdengine.options import CreateOptions


@pytest.mark.parametrize(
    ("name", "options", "option"),
    [
        ("", {"size": 4096}, "the image"),
        ("folder", {"size": 4096, "force": True}, "the image"),
        ("x.fvd", {"base": "folder"}, "--base"),
        ("x.fvd", {"base": "/etc"}, "--base"),
        ("x.fvd", {"base": ""}, "--base"),
        ("x.fvd", {"size": 4096, "data_file": "folder"}, "--data-file"),
    ],
)
def test_folders_and_empty_names_are_refused_by_name(tmp_path, monkeypatch, name, options, option):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidOption, match="a directory|is empty") as caught:
        create_image(name, CreateOptions(**options))
    assert caught.value.message.startswith(option)
    assert "Name a file" in caught.value.hint or "name of a file" in caught.value.hint
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]


def test_values_that_do_not_fit_are_named_by_their_options(tmp_path, base):
    with pytest.raises(InvalidOption) as caught:
        create_image(tmp_path / "x.fvd", CreateOptions(base=str(base), prefetch_max_read_kb=5000))
    assert "--prefetch-max-read is below --prefetch-min-read (5120)" in caught.value.message
    assert "--prefetch-min-read that fit together" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({}, "the size is missing", "such as 20G"),
        ({"base_format": "fvd"}, "is not an FVD image", "Leave --base-format out"),
        (
            {"compact": True, "storage_grow_unit": 512},
            r"--storage-grow-unit is below --chunk-size \(1048576\)", "fit together",
        ),
    ],
)  # fmt: skip
def test_mistakes_of_a_beginner_are_answered(tmp_path, base, options, words, hint):
    if options:
        options = {"base": str(base), **options}
    with pytest.raises(EngineError, match=words) as caught:
        create_image(tmp_path / "x.fvd", CreateOptions(**options))
    assert hint in caught.value.hint
    assert not (tmp_path / "x.fvd").exists()
