# SPDX-License-Identifier: Apache-2.0
"""The lists of CONTRIBUTING.md, of defects and of complaints, are complete, and every test that
they name exists."""

import re

import pytest

from fvdtest import tree

WANTED = [f"B{number}" for number in range(1, 25)] + [f"S{number}" for number in range(1, 7)]
ROW = re.compile(r"^\| ([BS]\d+) \| [^|]+ \| ([^|]+) \|$", re.MULTILINE)
COMPLAINT = re.compile(r"^\| (\d*) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
LOUDEST = 15
TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")


def rows():
    return dict(ROW.findall((tree.ROOT / "CONTRIBUTING.md").read_text()))


def answered():
    """The rows of the list of complaints: number, complaint, answer, proof."""
    text = (tree.ROOT / "CONTRIBUTING.md").read_text()
    part = text.partition("\n| no. | complaint |")[2].partition("\n\n")[0]
    found = COMPLAINT.findall(part)
    assert len(found) == part.count("\n") - 1, "a row of another form"
    return found


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


def test_each_of_the_loudest_complaints_is_answered():
    assert {int(number) for number, *_ in answered() if number} == set(range(1, LOUDEST + 1))


@pytest.mark.parametrize("row", answered(), ids=lambda row: row[1][:24])
def test_complaint_is_answered_by_tests_that_exist(row):
    _, complaint, answer, proof = row
    assert len(answer) > 20, f"what solves '{complaint}'?"
    assert complaints(proof) == []
    assert TEST.sub("", proof).replace(",", "").strip() == "", "each test by its file and name"
