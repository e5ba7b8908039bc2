# SPDX-License-Identifier: Apache-2.0
"""Every text file: licence line, line length, words that are banned, paths of one machine."""

import re

import pytest

from fvdtest import tree

LINE_MAX = 100
SPDX = "SPDX-License-Identifier: Apache-2.0"
BANNED = re.compile(r"(?<![\w[-])(?:utils|helper|misc|FIXME|XXX|TODO)(?!\w)")
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:[w]ork|[f]arm|[r]oot)/")
BANNED_NAMES = {"utils", "common", "helpers", "misc", "manager", "helper"}
DIRECTIVES = "# cython: language_level"


def texts():
    """All text files but this one, which has to spell what it bans."""
    named = [tree.ROOT / "Makefile", tree.ROOT / ".ci/run"]
    return [*(p for p in tree.files(tree.TEXTS) if p.name != "test_text.py"), *named]


def complaints(text, *, source):
    """What is wrong with a text, one line for each fault."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if source and len(line) > LINE_MAX and not line.startswith(DIRECTIVES):
            found.append(f"line {number}: {len(line)} characters, at most {LINE_MAX}")
        if line != line.rstrip() or "\t" in line and source and not line.startswith("\t"):
            found.append(f"line {number}: white space at the end or a tab inside")
        for match in BANNED.findall(line):
            found.append(f"line {number}: banned word {match!r}")
        if MACHINE_PATH.search(line):
            found.append(f"line {number}: a path of one machine")
    if source and SPDX not in "\n".join(text.splitlines()[:3]):
        found.append("line 1: no SPDX line among the first three")
    return found


@pytest.mark.parametrize("path", texts(), ids=tree.name_of)
def test_text_keeps_the_rules(path):
    found = complaints(path.read_text(), source=path.suffix in tree.SOURCES)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", tree.files({".py", ".pyx", ".pxd"}), ids=tree.name_of)
def test_file_name_says_what_it_holds(path):
    assert path.stem not in BANNED_NAMES
    assert path.name == path.name.lower()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x" * 101, "characters"),
        ("x = 1 ", "white space"),
        ("# FIXME later", "banned"),
        ("import utils", "banned"),
        ("open('/" + "work/x')", "one machine"),
        ("x = 1", "SPDX"),
    ],
)
def test_check_finds_planted_faults(line, words):
    assert any(words in what for what in complaints(line, source=True))
