# SPDX-License-Identifier: Apache-2.0
"""Compile the probe modules of this folder into build/probes, only what changed.

A probe (probe_*.pyx) cimports the engine's C functions exactly as another module of the engine
would and shows them to Python, so no test code ships and no function is made public for tests. A
probe is out of date when its source, a declaration of the engine or this file changed.

Beside an engine built with a sanitizer the probes are built with it, too, into a folder of their
own: the sanitizer of threads has to see what they do with the engine's words.

Run it alone to see a compiler's messages: `.venv/bin/python -P tests/native/build.py [sim_]`.
"""

import fcntl
import hashlib
import importlib
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENGINE = ROOT / "cython"
# What tests/sanitized.py adds; not FVD_STEPS, or the simulator's own atomic operations were steps.
SANITIZER = os.environ.get("FVD_SANITIZER", "").split()
OUTPUT = ROOT / (f"build/{os.environ['FVD_STEPPED']}" if SANITIZER else "build") / "probes"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
JOBS = 2
TIME_LIMIT = 240
C_FLAGS = (
    "-shared", "-fPIC", "-O1", "-fno-strict-aliasing", "-Wall", "-Wno-unused-function",
    "-D_GNU_SOURCE",
)  # fmt: skip


class ProbeError(Exception):
    """A probe does not compile; the message is the compiler's."""


def sources_of(kind: str = "") -> list[Path]:
    """The probes and the parts of the simulator, or only those whose names begin so."""
    found = [*HERE.glob("probe_*.pyx"), *HERE.glob("sim_*.pyx")]
    return sorted(path for path in found if path.stem.startswith(kind))


def declarations(kind: str) -> bytes:
    """Digest of everything that all probes, or all parts of the simulator, depend on."""
    digest = hashlib.sha256(sys.version.encode())
    shared = [*ENGINE.glob("fvdcore/*.pxd"), *ENGINE.glob("fvdcore/*.h"),
              *HERE.glob(f"{kind}*.pxd")]  # fmt: skip
    for path in sorted([*shared, Path(__file__).resolve()]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def run(argv: list[str]) -> None:
    """Run a compiler in the root of the tree."""
    done = subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    if done.returncode:
        raise ProbeError(f"{' '.join(argv)}\n{done.stdout}{done.stderr}")


def compile_probe(source: Path, shared: bytes) -> bool:
    """Compile one probe unless it is up to date; whether it was compiled."""
    target = OUTPUT / (source.stem + SUFFIX)
    stamp = OUTPUT / f"{source.stem}.digest"
    wanted = hashlib.sha256(shared + source.read_bytes()).hexdigest()
    if target.exists() and stamp.exists() and stamp.read_text() == wanted:
        return False
    generated = OUTPUT / f"{source.stem}.c"
    fresh = OUTPUT / f"{source.stem}.new"
    run(
        [sys.executable, "-P", "-m", "cython", "-3", "-I", str(ENGINE), "-I", str(HERE)]
        + ["-o", str(generated), str(source)]
    )
    includes = [sysconfig.get_path("include"), str(ENGINE / "fvdcore"), str(OUTPUT)]
    speed = ["-O2"] if source.stem.startswith("sim_") else []
    run(
        ["gcc", *C_FLAGS, *speed, *SANITIZER, *(f"-I{folder}" for folder in includes)]
        + [str(generated), "-o", str(fresh)]
    )
    fresh.replace(target)  # never into a file that a running test has mapped
    stamp.write_text(wanted)
    return True


def build(kind: str = "") -> list[str]:
    """Bring all probes (of a kind) up to date; the names of those that were compiled."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    sources = sources_of(kind)
    with (OUTPUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of the tests at once
        shared = {kind: declarations(kind) for kind in ("probe_", "sim_")}
        with ThreadPoolExecutor(JOBS) as pool:
            compiled = list(pool.map(
                lambda path: compile_probe(path, shared[path.stem.partition("_")[0] + "_"]),
                sources,
            ))  # fmt: skip
    return [path.stem for path, fresh in zip(sources, compiled, strict=True) if fresh]


def load(kind: str = "") -> SimpleNamespace:
    """All probe modules (of a kind), built, by short name: load().bitmap is probe_bitmap."""
    build(kind)
    if str(OUTPUT) not in sys.path:
        sys.path.append(str(OUTPUT))
    names = [path.stem for path in sources_of(kind)]
    modules = {name.removeprefix("probe_"): importlib.import_module(name) for name in names}
    return SimpleNamespace(**modules)


if __name__ == "__main__":
    try:
        print("built:", *build(*sys.argv[1:2]) or ["nothing, all is up to date"])
    except ProbeError as error:
        sys.exit(str(error))
