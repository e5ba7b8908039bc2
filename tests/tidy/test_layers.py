# SPDX-License-Identifier: Apache-2.0
"""Imports follow tests/tidy/layers.toml: in Python and in Cython sources alike."""

import sys
import tomllib
from pathlib import Path

import pytest

from fvdtest import tree

TABLE = tomllib.loads((Path(__file__).with_name("layers.toml")).read_text())
LAYERS = TABLE["fvdcore"]["layers"]
RANK = {
    name: (depth, place) for depth, layer in enumerate(LAYERS) for place, name in enumerate(layer)
}
FACE = len(LAYERS) - 1
HOMES = {
    "fvdcore": "cython/fvdcore",
    "fvdengine": "fvdengine",
    "fvdapi": "daemon/fvdapi",
    "fvdd": "daemon/fvdd",
    "fvdctl": "daemon/fvdctl",
}
COMPILED_HOME = tree.ROOT / HOMES["fvdcore"]
CYTHON_OWN = {"libc", "posix", "cpython", "cython"}


def core_complaints(name, imported):
    """What a module of fvdcore imports against the layers."""
    if name not in RANK:
        return [f"{name} is in no layer of layers.toml"]
    wrong = []
    for module in sorted(imported):
        top, _, rest = module.partition(".")
        other = rest.split(".")[0]
        if top == "fvdcore":
            if other != name and other in RANK and RANK[other] > RANK[name]:
                wrong.append(f"{name} uses {other}, which lies above it")
            if other and other not in RANK:
                wrong.append(f"{name} uses {other}, which is in no layer")
        elif top not in CYTHON_OWN and RANK[name][0] < FACE:
            wrong.append(f"{name} imports {module}: no Python below layer {FACE}")
        elif top not in CYTHON_OWN and top not in sys.stdlib_module_names:
            wrong.append(f"{name} imports {module}, which is not the standard library")
    return wrong


def part_of(module, package):
    """The part of a package that a module belongs to: fvdd.devices.registry is devices."""
    words = module.split(".")
    return words[1] if len(words) > 1 and words[0] == package else None


def package_complaints(package, module, imported):
    """What a Python module imports against the tables of packages and parts."""
    part = part_of(module, package)
    allowed = set(TABLE["packages"][package])
    allowed = set(TABLE.get("inside_packages", {}).get(package, {}).get(part, allowed))
    inside = TABLE["inside"].get(package, {})
    operations = TABLE["operations"].get(package, {"names": [], "exceptions": {}})
    wrong = []
    for name in sorted(imported):
        top = name.split(".")[0]
        other = part_of(name, package)
        if top in TABLE["forbidden"].get(package, []):
            wrong.append(f"{module} must not use {top}")
        elif top == package:
            if part in inside and other not in (None, part, *inside[part]) and other in inside:
                wrong.append(f"{module}: {part} may not use {other}")
            names = operations["names"]
            permitted = operations["exceptions"].get(part, [])
            if part in names and other in names and other not in (part, *permitted):
                wrong.append(f"{module}: operations do not import each other ({other})")
        elif top not in allowed and top not in sys.stdlib_module_names:
            wrong.append(f"{module} imports {name}")
    return wrong


def core_sources():
    return [p for p in tree.files({".pyx", ".pxd"}, HOMES["fvdcore"]) if p.stem != "__init__"]


def python_sources():
    found = []
    for package, home in HOMES.items():
        base = tree.ROOT / home
        for path in tree.files({".py"}, home):
            words = [package, *path.relative_to(base).with_suffix("").parts]
            found.append((package, ".".join(words), path))
    return found


@pytest.mark.parametrize("path", core_sources(), ids=tree.name_of)
def test_core_module_uses_only_what_lies_below(path):
    assert core_complaints(path.stem, tree.imports(path, "fvdcore")) == []


@pytest.mark.parametrize(
    ("package", "module", "path"), python_sources(), ids=[name for _, name, _ in python_sources()]
)
def test_python_module_imports_only_what_its_package_may(package, module, path):
    home = module if path.stem == "__init__" else module.rpartition(".")[0]
    imported = tree.imports(path, home.removesuffix(".__init__"))
    assert package_complaints(package, module.removesuffix(".__init__"), imported) == []


@pytest.mark.parametrize(
    ("name", "source", "words"),
    [
        ("bitmap", "from fvdcore.journal cimport journal_t", "lies above"),
        ("bitmap", "from .image cimport (image_t,\n  image_open)", "lies above"),
        ("bitmap", "from . cimport atomics, device", "lies above"),
        ("bitmap", "import os", "no Python below"),
        ("device", "import fvdengine", "not the standard library"),
        ("device", "from fvdcore.nothing cimport x", "in no layer"),
        ("surprise", "", "in no layer"),
    ],
)
def test_core_check_finds_planted_faults(name, source, words):
    found = core_complaints(name, tree.cython_imports(source, "fvdcore"))
    assert any(words in line for line in found), found


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("fvdengine.info", "import fvdd.app", "imports fvdd.app"),
        ("fvdengine.info", "def f():\n    import requests", "imports requests"),
        ("fvdengine.info", "import asyncio", "must not use asyncio"),
        ("fvdengine.info", "from fvdengine import check", "do not import each other"),
        ("fvdd.worker.main", "from fastapi import FastAPI", "imports fastapi"),
        ("fvdd.attach.export", "from fvdd.devices import registry", "may not use devices"),
        ("fvdctl.main", "from fvdcore import Device", "imports fvdcore"),
    ],
)
def test_package_check_finds_planted_faults(module, source, words):
    package, home = module.split(".")[0], module.rpartition(".")[0]
    found = package_complaints(package, module, tree.python_imports(source, home))
    assert any(words in line for line in found), found
