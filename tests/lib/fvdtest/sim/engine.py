# SPDX-License-Identifier: Apache-2.0
"""The engine as the simulator runs it: the same sources, whose atomic operations are steps.

Where threads meet without a lock no gate is passed, so an engine built with FVD_STEPS (atomics.h)
calls the simulator's scheduler before each atomic operation. Only modules that have any are built,
beside the others; what is generated from them is the tree's.
"""

import ctypes
import fcntl
import hashlib
import importlib
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
ENGINE = ROOT / "cython/fvdcore"
OUTPUT = ROOT / "build/stepped"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
TIME_LIMIT = 240
JOBS = 2
MODULES = (
    "bitmap", "changes", "chunk_table", "commit", "copy_on_read", "crew", "data_area",
    "discard_path", "dispatch", "execute", "fetch", "image", "journal", "page_copies", "parking",
    "pipeline", "places", "prefetch", "quiescence", "read_path", "resize", "write_path",
)  # fmt: skip
FLAGS = ("-shared", "-fPIC", "-O1", "-fno-strict-aliasing", "-D_GNU_SOURCE", "-DFVD_STEPS", "-w")


class BuildError(Exception):
    """The engine does not compile; the message is the compiler's."""


def compile_module(generated: Path, target: Path, *extra: Path) -> None:
    """Make a module of what Cython generated."""
    target.unlink(missing_ok=True)  # never into a file that a running test has mapped
    argv = ["gcc", *FLAGS, f"-I{sysconfig.get_path('include')}", f"-I{ENGINE}", generated, *extra]
    done = subprocess.run(
        [*map(str, argv), "-o", str(target)],
        cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise BuildError(done.stderr)


def generated_from(module: str) -> Path:
    """The C source that the tree's own module was made of."""
    found = sorted(ROOT.glob(f"build/temp*/cython/fvdcore/{module}.c"))
    if len(found) != 1:
        raise BuildError(f"{module}.c stands {len(found)} times in build: run tests/dev.py build")
    return found[0]


def build_module(module: str, folder: Path) -> None:
    """Compile a module unless it is up to date."""
    source = generated_from(module)
    digest = hashlib.sha256(source.read_bytes() + Path(__file__).read_bytes())
    for path in sorted(ENGINE.glob("*.h")):
        digest.update(path.read_bytes())
    stamp = folder / f"{module}.digest"
    target = folder / f"{module}{SUFFIX}"
    if stamp.exists() and stamp.read_text() == digest.hexdigest() and not target.is_symlink():
        return
    stamp.unlink(missing_ok=True)
    compile_module(source, target)
    stamp.write_text(digest.hexdigest())


def link_others(source: Path, folder: Path, own: tuple[str, ...]) -> None:
    """All modules that are not the folder's own are those of another one."""
    for path in source.iterdir():
        link = folder / path.name
        wanted = path.suffix in (".so", ".py", ".pxd", ".h")
        if path.suffix == ".so" and path.name.split(".")[0] in own:
            wanted = False
        if wanted and not (link.is_symlink() and link.readlink() == path):
            link.unlink(missing_ok=True)
            link.symlink_to(path)


@cache
def build() -> Path:
    """Bring it up to date, once a process; a folder for PYTHONPATH."""
    folder = OUTPUT / "fvdcore"
    folder.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        link_others(ENGINE, folder, MODULES)
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(lambda module: build_module(module, folder), MODULES))
    return OUTPUT


def environment() -> dict[str, str]:
    """What makes a program run it, unless it was told to run another build with steps."""
    if os.environ.get("FVD_STEPPED"):
        return {}
    return {"PYTHONPATH": str(build()), "FVD_STEPPED": "1"}


def own_steps(address: int) -> None:
    """Let every module call this function before an atomic operation."""
    for name in MODULES:
        module = importlib.import_module(f"fvdcore.{name}")
        library = ctypes.CDLL(str(module.__file__))
        try:
            step = ctypes.c_void_p.in_dll(library, "fvd_step")
        except ValueError:
            raise BuildError(f"{module.__file__} was built without FVD_STEPS") from None
        step.value = address
