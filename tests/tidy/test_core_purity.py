# SPDX-License-Identifier: Apache-2.0
"""The data path never calls the interpreter: read from the C that Cython generated.

`noexcept nogil` is a promise about callers and no proof about bodies: a call that may raise, a
function pointer without `noexcept`, an assert all take the interpreter's lock quietly. So each C
function made from a `cdef` function of layers 0 to 4 is searched for what does that.
"""

import re
import tomllib
from pathlib import Path

import pytest

from fvdtest import tree

TABLE = tomllib.loads(Path(__file__).with_name("layers.toml").read_text())
PURE = {name for layer in TABLE["fvdcore"]["layers"][:-1] for name in layer}
INTERPRETER = re.compile(
    r"PyGILState_\w+|PyEval_\w+|__Pyx_WriteUnraisable|__Pyx_AddTraceback|ErrOccurredWithGIL"
    r"|PyErr_\w+|Py_X?(?:INC|DEC)REF|__Pyx_X?(?:DECREF|GOTREF|GIVEREF)|PyObject_\w+"
    r"|PyThreadState_Get"
)
FUNCTION = re.compile(r"^[A-Za-z_][^;\n]*?(__pyx_f_\w+)\([^;{]*\)\s*\{\n(.*?)^\}", re.M | re.S)


def impure_functions(generated):
    """Functions of generated C that touch the interpreter: {name: what it calls}."""
    found = {}
    for name, body in FUNCTION.findall(generated):
        hits = set(INTERPRETER.findall(re.sub(r"/\*.*?\*/", "", body, flags=re.S)))
        if hits:
            found[name] = sorted(hits)
    return found


def function_count(generated):
    return len(FUNCTION.findall(generated))


def pure_sources():
    return [p for p in tree.files({".pyx"}, "cython/fvdcore") if p.stem in PURE]


@pytest.mark.parametrize("source", pure_sources(), ids=tree.name_of)
def test_generated_code_never_calls_the_interpreter(source):
    made = sorted(
        (tree.ROOT / "build").glob(f"temp*/**/fvdcore/{source.stem}.c"),
        key=lambda path: path.stat().st_mtime,
    )
    assert made, "not built: run .venv/bin/python tests/dev.py build"
    generated = made[-1].read_text()
    assert made[-1].stat().st_mtime >= source.stat().st_mtime, "the build is older than the source"
    assert function_count(generated) > 0
    assert impure_functions(generated) == {}


def test_check_finds_planted_faults():
    clean = "static int __pyx_f_a_b(int x) {\n  /* PyErr_Occurred() */\n  return x;\n}\n"
    taken = "static int __pyx_f_a_c(int x) {\n  PyGILState_Ensure();\n  return x;\n}\n"
    assert impure_functions(clean + taken) == {"__pyx_f_a_c": ["PyGILState_Ensure"]}
    assert function_count(clean + taken) == 2
