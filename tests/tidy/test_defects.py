# SPDX-License-Identifier: Apache-2.0
"""The list of defects in CONTRIBUTING.md is complete, and every test that it names exists."""

import re

import pytest

from fvdtest import tree

WANTED = [f"B{number}" for number in range(1, 25)] + [f"S{number}" for number in range(1, 7)]
ROW = re.compile(r"^\| ([BS]\d+) \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")


def rows():
    return dict(ROW.findall((tree.ROOT / "CONTRIBUTING.md").read_text()))


def complaints(proof):
    """What is wrong with the last column of a row."""
    named = TEST.findall(proof)
    if not named:
        return [] if proof.startswith("cannot occur: ") and len(proof) > 40 else ["no proof"]
    return [
        f"{file} has no {name}"
        for file, name in named
        if not (tree.ROOT / file).exists()
        or not re.search(rf"^def {name}\(", (tree.ROOT / file).read_text(), re.MULTILINE)
    ]


def test_list_is_complete():
    assert list(rows()) == WANTED


@pytest.mark.parametrize("defect", WANTED)
def test_defect_has_a_test_that_exists(defect):
    assert complaints(rows()[defect]) == []


@pytest.mark.parametrize(
    "proof",
    ["", "we are careful", "cannot occur: no", "tests/tidy/test_defects.py::test_nothing_like_it",
     "tests/none.py::test_x"],
)  # fmt: skip
def test_check_finds_planted_faults(proof):
    assert complaints(proof) != []
