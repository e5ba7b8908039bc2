# SPDX-License-Identifier: Apache-2.0
"""The shape of the tree: fixed top level, no package where a root is, Cython house rules."""

import re

import pytest

from fvdtest import tree

TOP_FOLDERS = {".ci", "cython", "daemon", "fvdengine", "packaging", "tests"}
SOURCE_ROOTS = ("cython", "daemon", "packaging", "tests")
DIRECTIVES = (
    "# cython: language_level=3, cdivision=True, boundscheck=False, wraparound=False, "
    "initializedcheck=False, auto_pickle=False, freethreading_compatible=True"
)
LAYER_FIVE = {"device", "errors", "image_file", "privileges", "remote", "sums", "__init__"}
BANNED_CYTHON = [
    (re.compile(r"^\s*cpdef\b", re.M), "cpdef"),
    (re.compile(r"^\s*include\s+[\"']", re.M), "include"),
    (re.compile(r"\bexcept\s*\*"), "except *"),
    (re.compile(r"^\s*with gil\b|\bwith gil:", re.M), "with gil"),
    (re.compile(r"^\s*DEF\s+\w", re.M), "DEF"),
]


def without_comments(text):
    return re.sub(r"#.*", "", text)


def cython_complaints(text):
    """Constructs of a Cython source that the house does not use."""
    bare = without_comments(text)
    return [name for pattern, name in BANNED_CYTHON if pattern.search(bare)]


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_source_root_is_no_package(root):
    assert list((tree.ROOT / root).glob("__init__.*")) == []


def test_top_level_has_only_the_agreed_folders():
    made = {"build", "dist", "__pycache__"}
    seen = {p.name for p in tree.ROOT.iterdir() if p.is_dir()}
    strange = {n for n in seen - TOP_FOLDERS - made if not n.startswith(".")}
    assert {n for n in strange if not n.endswith(".egg-info")} == set()


@pytest.mark.parametrize("path", tree.files({".pyx"}, "cython", "tests/native"), ids=tree.name_of)
def test_directives_are_the_same_everywhere(path):
    head = path.read_text().splitlines()[:2]
    assert DIRECTIVES in head


@pytest.mark.parametrize("path", tree.files({".pyx"}, "cython"), ids=tree.name_of)
def test_compiled_module_declares_itself(path):
    if path.stem not in LAYER_FIVE:
        assert path.with_suffix(".pxd").exists(), f"{path.name} has no .pxd"


@pytest.mark.parametrize("path", tree.files({".pyx", ".pxd"}, "cython"), ids=tree.name_of)
def test_cython_source_keeps_to_the_house_subset(path):
    found = cython_complaints(path.read_text())
    if path.stem in LAYER_FIVE:
        found = [name for name in found if name != "with gil"]
    assert found == []


def test_shipped_python_never_imports_names_of_our_folders():
    for path in tree.files({".py"}, "daemon", "fvdengine", "cython"):
        tops = {name.split(".")[0] for name in tree.imports(path, "package")}
        assert not tops & {"cython", "packaging", "tests"}, tree.name_of(path)


@pytest.mark.parametrize("path", tree.files({".py"}), ids=tree.name_of)
def test_module_says_what_it_is_for(path):
    text = path.read_text()
    if text.strip():
        assert re.search(r'^(?:#.*\n|\s*\n)*"""\S', text), "no docstring at the top"


@pytest.mark.parametrize("name", [name for _, name in BANNED_CYTHON])
def test_subset_check_finds_planted_faults(name):
    planted = {
        "cpdef": "cpdef int f():",
        "include": 'include "x.pxi"',
        "except *": "cdef int f() except *:",
        "with gil": "    with gil:",
        "DEF": "DEF N = 3",
    }
    assert cython_complaints(planted[name]) == [name]
