# SPDX-License-Identifier: Apache-2.0
"""Files, functions, nesting and parameter lists stay small enough to read at once."""

import ast
import re

import pytest

from fvdtest import tree

FILE_MAX = 600
FUNCTION_MAX = 60
CYTHON_FUNCTION_MAX = 70
NESTING_MAX = 4
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
CYTHON_FUNCTION = re.compile(r"^(\s*)(?:cdef|cpdef|def|async def)\s[^=]*?(\w+)\s*\(")


def depth_of(node):
    """How deep blocks nest below a node; an elif is no deeper than its if."""
    deepest = 0
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, field, []):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                continue
            chained = field == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            here = 1 if isinstance(child, BLOCKS) and not chained else 0
            deepest = max(deepest, here + depth_of(child))
    return deepest


def python_complaints(text):
    """Functions of a Python source that are too long or too deep."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = (node.end_lineno or 0) - node.lineno + 1
        if length > FUNCTION_MAX:
            found.append(f"{node.name} has {length} lines, at most {FUNCTION_MAX}")
        if depth_of(node) > NESTING_MAX:
            found.append(f"{node.name} nests {depth_of(node)} deep, at most {NESTING_MAX}")
    return found


def cython_complaints(text):
    """Functions of a Cython source that are too long."""
    found = []
    lines = text.splitlines()
    for start, line in enumerate(lines):
        match = CYTHON_FUNCTION.match(line)
        if match is None:
            continue
        indent, name = match.groups()
        end = start
        closing = True
        for number in range(start + 1, len(lines)):
            row = lines[number]
            if not row.strip():
                continue
            deeper = row.startswith(indent + " ") or (closing and row.startswith(indent + ")"))
            if not deeper:
                break
            end = number
        if end - start + 1 > CYTHON_FUNCTION_MAX:
            found.append(f"{name} has {end - start + 1} lines, at most {CYTHON_FUNCTION_MAX}")
    return found


@pytest.mark.parametrize("path", tree.files(tree.SOURCES), ids=tree.name_of)
def test_file_is_short_enough(path):
    assert len(path.read_text().splitlines()) <= FILE_MAX


@pytest.mark.parametrize("path", tree.files({".py"}), ids=tree.name_of)
def test_python_functions_are_short_and_shallow(path):
    assert python_complaints(path.read_text()) == []


@pytest.mark.parametrize("path", tree.files({".pyx"}), ids=tree.name_of)
def test_cython_functions_are_short(path):
    assert cython_complaints(path.read_text()) == []


def test_checks_find_planted_faults():
    long = "def f():\n" + "    x = 1\n" * 60
    nested = "".join("    " * depth + "if x:\n" for depth in range(1, 6))
    deep = "def f():\n" + nested + "    " * 6 + "y()\n"
    assert "60" in python_complaints(long)[0]
    assert "nests 5" in python_complaints(deep)[0]
    core = "cdef int f(int a,\n           int b) noexcept nogil:\n" + "    a = b\n" * 70
    assert "f has 72 lines" in cython_complaints(core)[0]
    assert cython_complaints("cdef int f() noexcept nogil:\n    pass\n" * 80) == []
