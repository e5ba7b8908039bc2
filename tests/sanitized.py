#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The engine built with an instrument: address and undefined behaviour, threads, coverage.

    tests/sanitized.py build asan|tsan|gcov     build what changed, into build/KIND
    tests/sanitized.py test KIND [PATH...]      run tests with that build; a report ends them;
                                                default: SUITES
    tests/sanitized.py lines [-v]               after tests with gcov: what never ran

The engine of the tree is left alone: a build comes first in the path of what it runs. A sanitizer's
library is in our own interpreters only (lib/instrument), not in the programs that tests start
beside them. Standard library only.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "cython/fvdcore"
GENERATED = ROOT / "build/instrumented"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
STEPS = ["-DFVD_STEPS"]  # so that the simulator runs these builds too
SANITIZERS = {
    # Fields of the format are packed; what Cython generates reads them where they lie.
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize=alignment",
             "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "tsan": ["-fsanitize=thread", "-fno-omit-frame-pointer"],
    "gcov": [],
}  # fmt: skip
FLAGS = {
    "asan": ["-O1", *STEPS, *SANITIZERS["asan"]],
    "tsan": ["-O1", *STEPS, *SANITIZERS["tsan"]],
    "gcov": ["-O0", *STEPS, "--coverage"],
}
SUPPRESSIONS = ROOT / "tests/tsan.supp"
INSTRUMENT = ROOT / "tests/lib/instrument"
# What runs the engine and its server without the simulator's gate.
UNGATED = ("tests/unit/fvdcore",)  # tests/interop when it is named
SUITES = {
    "asan": UNGATED, "tsan": UNGATED, "gcov": ("tests/unit/fvdcore", "tests/property", "tests/sim"),
}  # fmt: skip
# Limits of time and size do not hold; and the engine of the tests has steps.
LIMITS = (
    "--ignore=tests/unit/fvdcore/test_costs.py",
    "--deselect=tests/unit/fvdcore/test_replay.py::"
    "test_a_journal_full_of_records_of_the_whole_base_takes_no_time",
    "--deselect=tests/sim/test_sim.py::"
    "test_an_engine_whose_atomic_operations_are_no_steps_is_refused",
)
# Workers are not confined here (lib/instrument).
UNCONFINED = ("--ignore=tests/interop/test_confinement.py",)
LEFT_OUT = {
    "asan": (*LIMITS, *UNCONFINED),
    # It keeps the signal back that a test of privileges sends to a thread that waits.
    "tsan": (*LIMITS, *UNCONFINED, "--deselect=tests/unit/fvdcore/test_privileges.py"),
    "gcov": LIMITS,
}
PRELOAD = {"asan": ("libasan.so", "libubsan.so"), "tsan": ("libtsan.so",), "gcov": ()}
# What is no statement of a function: it runs, if at all, when the module is loaded.
HEADS = re.compile(r"(cdef|cpdef|def|class|ctypedef|from|import|cimport|@|#|\"\"\")")


def run(
    argv: list[str | Path], folder: Path = ROOT, environment: dict[str, str] | None = None
) -> str:
    """Run a compiler or reader; what it prints."""
    done = subprocess.run(
        [str(word) for word in argv], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, argv))}\n{done.stdout}{done.stderr}")
    return done.stdout


def stale(stamp: Path, digest: str) -> bool:
    """Was this made from something else?"""
    return not stamp.exists() or stamp.read_text() != digest


def declarations() -> bytes:
    """Digest of what every module depends on."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted([*ENGINE.glob("*.pxd"), *ENGINE.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.digest()


def build_module(kind: str, source: Path, shared: bytes) -> bool:
    """Compile one module unless it is up to date; whether it was compiled."""
    folder = ROOT / "build" / kind / "fvdcore"
    digest = hashlib.sha256(shared + source.read_bytes()).hexdigest()
    generated = GENERATED / f"{source.stem}.c"
    if stale(generated.with_suffix(".digest"), digest):
        run([sys.executable, "-P", "-m", "cython", "-3", "--line-directives",
             source.relative_to(ENGINE.parent), "-o", generated], ENGINE.parent)  # fmt: skip
        generated.with_suffix(".digest").write_text(digest)
    stamp = folder / f"{source.stem}.digest"
    if not stale(stamp, digest):
        return False
    stamp.unlink(missing_ok=True)
    part = folder / f"{source.stem}.o"
    common = ["gcc", "-g", "-fPIC", "-fno-strict-aliasing", "-D_GNU_SOURCE", "-w", *FLAGS[kind]]
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{ENGINE}"]
    run([*common, *includes, "-c", generated, "-o", part], ENGINE.parent)
    extra = sorted(ENGINE.glob(f"{source.stem}_impl.c"))
    target = folder / f"{source.stem}{SUFFIX}"
    target.unlink(missing_ok=True)
    run([*common, *includes, "-shared", part, *extra, "-o", target], ENGINE.parent)
    stamp.write_text(digest)
    return True


def build(kind: str) -> None:
    """Bring the engine built with an instrument up to date."""
    folder = ROOT / "build" / kind / "fvdcore"
    folder.mkdir(parents=True, exist_ok=True)
    GENERATED.mkdir(parents=True, exist_ok=True)
    for path in ENGINE.iterdir():
        link = folder / path.name
        if path.suffix in (".py", ".pxd", ".pyi", ".h") and not link.exists():
            link.symlink_to(path)
    shared = declarations()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        done = list(pool.map(lambda path: build_module(kind, path, shared),
                             sorted(ENGINE.glob("*.pyx"))))  # fmt: skip
    print(f"sanitized: {sum(done)} modules built for {kind}", flush=True)


def interpreter(kind: str) -> str:
    """What runs Python with the sanitizer's library, which has to be there before all others."""
    libraries = [run(["gcc", f"-print-file-name={name}"]).strip() for name in PRELOAD[kind]]
    if not libraries:
        return sys.executable
    path = ROOT / "build" / kind / "python"
    words = f'LD_PRELOAD="{" ".join(libraries)}" exec {shlex.quote(sys.executable)} "$@"'
    path.write_text(f"#!/bin/sh\n{words}\n")
    path.chmod(0o755)
    return str(path)


def reports_of(kind: str) -> Path:
    """Where each process with a report leaves it, whatever becomes of what it prints."""
    folder = ROOT / "build" / kind / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tell_reports(kind: str) -> int:
    """Print the reports; how many there are."""
    found = sorted(reports_of(kind).iterdir())
    for path in found:
        print(f"{path.name}:\n{path.read_text(errors='replace')}", flush=True)
    print(f"sanitized: {len(found)} reports of {kind}", flush=True)
    return len(found)


def environment(kind: str) -> dict[str, str]:
    """What makes programs use the build, and a report fatal."""
    reports = reports_of(kind)
    options = f"halt_on_error=1:exitcode=66:abort_on_error=1:log_path={reports / 'report'}"
    return {
        **os.environ, "PYTHONPATH": f"{ROOT / 'build' / kind}:{INSTRUMENT}", "FVD_STEPPED": kind,
        "FVD_INTERPRETER": interpreter(kind),
        "FVD_SANITIZER": " ".join(SANITIZERS[kind]), "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": f"{options}:detect_leaks=0",
        "UBSAN_OPTIONS": f"{options}:print_stacktrace=1",
        "TSAN_OPTIONS": f"{options}:ignore_noninstrumented_modules=1:suppressions={SUPPRESSIONS}",
    }  # fmt: skip


def test(kind: str, arguments: list[str]) -> int:
    """Run pytest with the build."""
    build(kind)
    wanted = environment(kind)
    suites = [word for word in arguments if word.startswith("tests/")] or SUITES[kind]
    if not all(path.startswith("tests/interop") for path in suites):
        run([sys.executable, "-P", "tests/native/build.py"], ROOT, wanted)
    seconds = ["-o", "timeout=600"]  # everything takes longer
    argv = [wanted["FVD_INTERPRETER"], "-P", "-m", "pytest", "-q", *seconds, *LEFT_OUT[kind],
            *(arguments or SUITES[kind])]  # fmt: skip
    for path in reports_of(kind).iterdir():
        path.unlink()
    status = subprocess.run(argv, cwd=ROOT, env=wanted, check=False).returncode
    return 1 if tell_reports(kind) else status


# -- coverage ----------------------------------------------------------------------------------


def statements(source: Path) -> set[int]:
    """The lines that may hold a statement of a function."""
    return {
        number
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if line.startswith("    ") and not HEADS.match(line.lstrip())
    }


def counted(data: Path) -> dict[str, dict[int, int]]:
    """How often each statement of each source ran, by what one module's counters say."""
    said = run(["gcov", "--json-format", "--stdout", data.name], data.parent)
    lines: dict[str, dict[int, int]] = defaultdict(dict)
    for document in said.splitlines():
        for file in json.loads(document)["files"]:
            source = ENGINE / Path(file["file"]).name
            if source.suffix not in (".pyx", ".pxd") or not source.exists():
                continue
            wanted = statements(source)
            for line in file["lines"]:
                number = line["line_number"]
                if number in wanted:
                    lines[source.name][number] = lines[source.name].get(number, 0) + line["count"]
    return lines


def uncovered() -> tuple[int, dict[str, list[int]]]:
    """How many lines there are, and those that never ran."""
    total: dict[str, dict[int, int]] = defaultdict(dict)
    for data in sorted((ROOT / "build/gcov/fvdcore").glob("*.gcda")):
        for name, lines in counted(data).items():
            for number, count in lines.items():
                total[name][number] = total[name].get(number, 0) + count
    silent = {
        name: sorted(number for number, count in lines.items() if not count)
        for name, lines in total.items()
    }
    return sum(map(len, total.values())), silent


def show(verbose: bool) -> None:
    """Print what share of the lines ran, and what did not."""
    count, silent = uncovered()
    missing = sum(map(len, silent.values()))
    for name, lines in sorted(silent.items(), key=lambda item: -len(item[1])):
        if lines:
            print(f"{name}: {len(lines)}" + (f" {lines}" if verbose else ""))
    share = 100 * (count - missing) / max(count, 1)
    print(f"{count - missing} of {count} lines ran: {share:.1f} %")


def main(arguments: list[str]) -> int:
    """See the module's text."""
    verb, kind, rest = arguments[0], arguments[1] if len(arguments) > 1 else "", arguments[2:]
    if verb == "lines":
        show("-v" in arguments)
        return 0
    if kind not in FLAGS or verb not in ("build", "test"):
        raise SystemExit(__doc__)
    if verb == "test":
        return test(kind, rest)
    build(kind)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
