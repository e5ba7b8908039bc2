# SPDX-License-Identifier: Apache-2.0
"""Every module has a test file of its name, or says which other test proves it."""

import tomllib
from pathlib import Path

import pytest

from fvdtest import tree

ELSEWHERE = tomllib.loads(Path(__file__).with_name("tested_elsewhere.toml").read_text())
HOMES = {
    "fvdcore": "cython/fvdcore",
    "fvdengine": "fvdengine",
    "fvdapi": "daemon/fvdapi",
    "fvdd": "daemon/fvdd",
    "fvdctl": "daemon/fvdctl",
}


def modules():
    """Names and packages of all modules that do something."""
    found = {}
    for package, home in HOMES.items():
        for path in tree.files({".py", ".pyx"}, home):
            inside = path.relative_to(tree.ROOT / home).with_suffix("")
            if not path.stem.startswith("__"):
                found[".".join([package, *inside.parts])] = package
    return found


def has_test_of_its_own(module, package):
    name = f"test_{module.rpartition('.')[2]}.py"
    return (tree.ROOT / "tests/unit" / package / name).exists()


@pytest.mark.parametrize(("module", "package"), sorted(modules().items()))
def test_module_is_proved_somewhere(module, package):
    if module in ELSEWHERE:
        assert (tree.ROOT / ELSEWHERE[module]).exists()
    else:
        assert has_test_of_its_own(module, package), f"tests/unit/{package} has none for {module}"


def test_table_names_only_modules_that_exist():
    assert set(ELSEWHERE) <= set(modules())


def test_module_without_a_test_is_noticed():
    assert not has_test_of_its_own("fvdd.nothing_like_it", "fvdd")
