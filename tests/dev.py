#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The one developer command: build, test and inspect the tree.

Run it with the interpreter of the virtual environment: `.venv/bin/python tests/dev.py VERB`.
Responsible for how the tools are called, never for what they check: rules live in pyproject.toml
and in tests/tidy. Standard library only, since it also builds what the rest needs.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fvdengine", "daemon/fvdapi", "daemon/fvdd", "daemon/fvdctl", "tests/lib")
# Sessions beside the first: most of these wait for other programs, most of the others compute.
LATER_DAEMON_TESTS = "tests/daemon/test_[s-z]*.py"
BESIDE = (
    ("tests/daemon", f"--ignore-glob={LATER_DAEMON_TESTS}"),
    ("tests/cli", "tests/interop", "tests/monitoring", "tests/packaging",
     *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(LATER_DAEMON_TESTS))),
)  # fmt: skip
# Every machine has Debian's kernel; the newer one, where it was built, gets its turn in the proof.
FIRST_KERNEL = "debian"
HINT = re.compile(r"performance hint: ([^:\s]+\.(?:pyx|pxd))")
QUIET = re.compile(
    r"_ExperimentalConfiguration|config = read_configuration|^running build_ext|^copying build/"
    r"|^\S*gcc |^Compiling |^\[\d+/\d+\] Cythonizing "
)

# Makes an editable wheel without its extension modules: those are built in place, once.
LINK = """
import sys
from setuptools import Distribution
distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
distribution.ext_modules = []
command = distribution.get_command_obj("editable_wheel")
command.dist_dir = sys.argv[1]
distribution.run_command("editable_wheel")
"""


def say(text: str) -> None:
    print(f"dev: {text}", flush=True)


def run(argv: Sequence[str | Path]) -> int:
    """Run a program in the root of the tree and return its exit status."""
    return subprocess.run([str(word) for word in argv], cwd=ROOT, check=False).returncode


def python(*arguments: str | Path) -> int:
    return run([sys.executable, "-P", *arguments])


def link() -> int:
    """Put the packages of the tree and the programs fvdctl and fvdd into the environment."""
    project = (ROOT / "pyproject.toml").read_bytes()
    wanted = hashlib.sha256(project + str(ROOT).encode()).hexdigest()
    stamp = Path(sys.prefix) / "fvd-linked"
    if stamp.exists() and stamp.read_text() == wanted and (stamp.parent / "bin/fvdctl").exists():
        return 0
    say("linking the packages and programs into the virtual environment")
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", LINK, folder],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if made.returncode or len(wheels) != 1:
            sys.stderr.write(made.stdout + made.stderr)
            return 1
        status = python(
            "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--no-index", "--force-reinstall", wheels[0],
        )  # fmt: skip
    if status == 0:
        stamp.write_text(wanted)
    return status


def forget_generated(source: str) -> None:
    """Remove what was generated from a source, so that the next build reports it again."""
    stem = Path(source).stem
    for pattern in (f"build/temp*/**/{stem}.c", f"cython/fvdcore/{stem}.*.so"):
        for path in ROOT.glob(pattern):
            path.unlink()


def build(arguments: argparse.Namespace) -> int:
    """Build the extension modules in place; only what changed; no performance hint passes.

    --asan, --tsan: a second build with that sanitizer, beside; tests/sanitized.py runs tests in it.
    """
    for kind in ("asan", "tsan"):
        if getattr(arguments, kind, False):
            return python("tests/sanitized.py", "build", kind)
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would spoil each other's files
        return link() or build_extensions(arguments)


def build_extensions(arguments: argparse.Namespace) -> int:
    """What build does once it has the tree for itself."""
    begin = time.monotonic()
    command = [
        sys.executable, "-P", "-W", "ignore", "-c", "import setuptools; setuptools.setup()",
        "build_ext", "--inplace", f"-j{arguments.jobs}",
    ]  # fmt: skip
    hinted: set[str] = set()
    compiled = 0
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            hinted.update(HINT.findall(line))
            compiled += line.startswith("building '")
            if arguments.verbose or not QUIET.search(line):
                sys.stdout.write(line)
                sys.stdout.flush()
    if process.returncode:
        say(f"the build failed (exit status {process.returncode})")
        return process.returncode
    if hinted:
        for source in sorted(hinted):
            forget_generated(source)
        say("a performance hint is an error here; it means a hidden lock of the interpreter:")
        say(" ".join(sorted(hinted)))
        return 1
    what = f"{compiled} extension modules built" if compiled else "extension modules are up to date"
    say(f"{what} ({time.monotonic() - begin:.1f} s)")
    return 0


def pytest(*arguments: str) -> int:
    return python("-m", "pytest", *arguments)


def test(arguments: argparse.Namespace) -> int:
    """All kinds of tests, in three sessions side by side; or the paths given, in one."""
    if arguments.paths:
        return pytest(*arguments.paths, *arguments.rest)
    common = ("-m", "not proof", *arguments.rest)
    others = [f"--ignore={path}" for paths in BESIDE for path in paths if path[0] != "-"]
    with contextlib.ExitStack() as stack:
        sessions = []
        for paths in BESIDE:
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            session = subprocess.Popen(
                [sys.executable, "-P", "-m", "pytest", *paths, *common],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(session.wait)
            stack.callback(session.terminate)  # nothing where it has ended
            sessions.append((paths, session, output))
        status = pytest("tests", *others, "--kernels", FIRST_KERNEL, *common)
        for paths, session, output in sessions:
            say(f"the session beside, {' '.join(paths)}:")
            status |= session.wait()
            output.seek(0)
            sys.stdout.writelines(output)
            sys.stdout.flush()
    return status


def quick(arguments: argparse.Namespace) -> int:
    """Unit, property and tidy tests: a minute or two."""
    kinds = ("tests/unit", "tests/property", "tests/tidy")
    return pytest(*kinds, "-m", "not proof", "-q", *arguments.rest)


def system(arguments: argparse.Namespace) -> int:
    """The kernel tests, inside User Mode Linux."""
    return pytest("tests/kernel", *arguments.rest)


def proof(arguments: argparse.Namespace) -> int:
    """The longer campaigns: everything marked proof; beside it the rest for the newer kernel."""
    # What make test has run is left out: the other kernel tests of Debian's kernel.
    chosen = ("-m", "proof or kernel", "-k", f"proof or not {FIRST_KERNEL}")
    return pytest("tests", *chosen, *arguments.rest)


def sim(arguments: argparse.Namespace) -> int:
    """The simulator: one run (--seed N), or a campaign (--minutes M --scenario S)."""
    return python("tests/sim/main.py", *arguments.rest)


def bench(arguments: argparse.Namespace) -> int:
    """Our servers beside others, as ratios: --quick, --compare FILE, --list, names of jobs."""
    return python("tests/bench/main.py", *arguments.rest)


def fuzz(arguments: argparse.Namespace) -> int:
    """Fuzz a target (image, handshake, transmission) for so many seconds: fuzz image 600."""
    return python("tests/fuzz/main.py", *arguments.rest)


def types(arguments: argparse.Namespace) -> int:
    """Check types with mypy, and the stubs of fvdcore against the compiled module."""
    status = python("-m", "mypy", *[path for path in PACKAGES if (ROOT / path).is_dir()])
    if list((ROOT / "cython/fvdcore").glob("*.pyi")):
        status |= python(
            "-m", "mypy.stubtest", "fvdcore", "--ignore-disjoint-bases", "--ignore-missing-stub"
        )
    return status


def lint(arguments: argparse.Namespace) -> int:
    """Ruff on all Python, and the tidy tests."""
    status = python("-m", "ruff", "check", "fvdengine", "daemon", "tests")
    return status | pytest("tests/tidy", "-q", *arguments.rest)


def purity(arguments: argparse.Namespace) -> int:
    """Prove that the data path's generated C never calls the interpreter."""
    return pytest("tests/tidy/test_core_purity.py", "-q", *arguments.rest)


VERBS = {
    "build": build, "test": test, "quick": quick, "types": types, "lint": lint,
    "purity": purity, "system": system, "proof": proof,
    "sim": sim, "fuzz": fuzz, "bench": bench,
}  # fmt: skip


def main() -> int:
    """Parse the command line; words that are not understood go on to pytest."""
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, action in VERBS.items():
        verb = verbs.add_parser(name, help=(action.__doc__ or "").split("\n")[0])
        if name == "build":
            verb.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1)
            verb.add_argument("-v", "--verbose", action="store_true")
            for kind in ("asan", "tsan"):
                verb.add_argument(f"--{kind}", action="store_true", help="with that sanitizer")
        if name == "test":
            verb.add_argument("paths", nargs="*")
    arguments, rest = parser.parse_known_args()
    arguments.rest = rest
    if rest and arguments.verb in ("build", "types"):
        parser.error(f"{arguments.verb} does not take {' '.join(rest)}")
    return VERBS[arguments.verb](arguments)


if __name__ == "__main__":
    sys.exit(main())
