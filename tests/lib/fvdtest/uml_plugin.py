# SPDX-License-Identifier: Apache-2.0
"""pytest plugin: run tests inside User Mode Linux and report each as if it had run here.

On the host, tests marked `kernel` (with --uml KERNEL: all selected tests) are not run in this
process. One machine is booted for each kernel, pytest runs there over the same node ids, each
report is written as a line of JSON to a shared folder and replayed here, unchanged, in order. In
the guest (FVD_UML is set) the same plugin writes those lines and adds the kernel's own messages to
failures. What a machine did not report is a failure: nothing passes unseen.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
RUNNER = ROOT / "tests/uml/run.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fvd"
NEW_KERNEL = CACHE / "uml/linux"
MACHINE_SECONDS = 900
PROOF_SECONDS = 4 * 3600
# Of campaigns, as somebody wants them.
SIZES = ("FVD_CRASH_FACTOR", "FVD_ATTACH")
LOG_TAIL = 6000
GUEST_KERNEL = os.environ.get("FVD_UML")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fvd")
    group.addoption(
        "--uml", metavar="KERNEL", help="run all selected tests in this User Mode Linux"
    )
    group.addoption(
        "--kernels",
        default=",".join(kernels()),
        help="User Mode Linux kernels for the tests marked kernel (default: those that are here)",
    )


def kernels() -> list[str]:
    """Debian's kernel always (its absence must fail, not skip), the newer one when built."""
    if GUEST_KERNEL:
        return [GUEST_KERNEL]
    return ["debian", *(["new"] if os.access(NEW_KERNEL, os.X_OK) else [])]


@pytest.fixture(scope="session")
def uml_kernel(request: pytest.FixtureRequest) -> str:
    """The name of the kernel that this test runs under."""
    return str(request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("kernel") is None:
        return
    option = metafunc.config.option
    only = GUEST_KERNEL or option.uml
    names = [only] if only else option.kernels.split(",")
    if "uml_kernel" not in metafunc.fixturenames:
        metafunc.fixturenames.append("uml_kernel")
    metafunc.parametrize("uml_kernel", names, indirect=True, scope="session")


def kernel_of(item: pytest.Item) -> str | None:
    """The machine that a test belongs into, None for those that run here."""
    if GUEST_KERNEL:
        return None
    if item.config.option.uml:
        return str(item.config.option.uml)
    callspec = getattr(item, "callspec", None)
    if item.get_closest_marker("kernel") is None or callspec is None:
        return None
    return str(callspec.params["uml_kernel"])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Guest tests last and by machine: they run together while reports are read in order."""
    if GUEST_KERNEL:
        return
    for item in items:
        if kernel_of(item) is not None:
            item.add_marker(pytest.mark.timeout(0))
    items.sort(key=lambda item: kernel_of(item) or "")


class Machine:
    """One booted kernel that runs a list of tests; reports are read while it goes on."""

    def __init__(self, kernel: str, items: list[pytest.Item]) -> None:
        self.kernel = kernel
        self.folder = Path(tempfile.mkdtemp(prefix="fvd-kernel."))
        self.reports: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.finished: set[str] = set()
        self.log = self.folder / "log"
        is_proof = any(item.get_closest_marker("proof") is not None for item in items)
        seconds = PROOF_SECONDS if is_proof else MACHINE_SECONDS
        (self.folder / "tests").write_text("".join(f"{item.nodeid}\n" for item in items))
        (self.folder / "reports").touch()
        command = [
            sys.executable, "-P", RUNNER, "--kernel", kernel, "--mem", "1G",
            "--timeout", str(seconds), "--store", "3G", "--share", self.folder,
            "--env", f"FVD_UML_REPORTS={self.folder / 'reports'}",
            *(word for name in SIZES if name in os.environ
              for word in ("--env", f"{name}={os.environ[name]}")), "--",
            sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-q",
            "--seed", items[0].config.option.seed,
            f"@{self.folder / 'tests'}",
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.stream: IO[str] = (self.folder / "reports").open()
        self.rest = ""

    def take_lines(self) -> None:
        """Sort what the guest has reported since the last call."""
        text = self.rest + self.stream.read()
        *lines, self.rest = text.split("\n")
        for line in lines:
            entry = json.loads(line)
            if "finished" in entry:
                self.finished.add(entry["finished"])
            else:
                self.reports[entry["nodeid"]].append(entry)

    def wait_for(self, nodeid: str) -> list[dict[str, Any]]:
        """The reports of one test, as soon as it has ended; empty when the machine ended first."""
        while True:
            dead = self.process.poll() is not None
            self.take_lines()
            if nodeid in self.finished:
                return self.reports[nodeid]
            if dead:
                return []
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)

    def why(self) -> str:
        """The last words of a machine that did not report a test."""
        words = self.log.read_text(errors="replace")[-LOG_TAIL:]
        return (
            f"the machine ({self.kernel} kernel) ended with status {self.process.returncode} "
            f"and without a report of this test; its last output:\n{words}"
        )

    def close(self) -> None:
        """End the machine and forget its folder."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)


MACHINES = pytest.StashKey[dict[str, Machine]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Boot all machines that the session needs; they work while the tests of the host run."""
    if session.testsfailed or session.config.option.collectonly:
        return
    wanted: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in session.items:
        name = kernel_of(item)
        if name is not None:
            wanted[name].append(item)
    session.stash[MACHINES] = {name: Machine(name, items) for name, items in wanted.items()}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    kernel = kernel_of(item)
    if kernel is None:
        return None
    begin = time.time()
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    machine = item.session.stash[MACHINES][kernel]
    entries = machine.wait_for(item.nodeid)
    hook = item.config.hook
    for entry in entries:
        report = hook.pytest_report_from_serializable(config=item.config, data=entry)
        item.ihook.pytest_runtest_logreport(report=report)
    if not entries:
        report = pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords=dict.fromkeys(item.keywords, 1),
            outcome="failed",
            longrepr=machine.why(),
            when="call",
            start=begin,
            stop=time.time(),
        )
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    for machine in session.stash.get(MACHINES, {}).values():
        machine.close()


class GuestReporter:
    """In the guest: write each report as a line for the host."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config = config
        self.stream = Path(path).open("a", buffering=1)  # noqa: SIM115

    def write(self, entry: dict[str, Any]) -> None:
        self.stream.write(json.dumps(entry) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            shown = subprocess.run(["dmesg"], capture_output=True, text=True, check=False)
            report.sections.append(("kernel messages", shown.stdout[-2000:]))
        hook = self.config.hook
        self.write(hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write({"finished": nodeid})


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("FVD_UML_REPORTS")
    if GUEST_KERNEL and path:
        subprocess.run(["dmesg", "--clear"], check=True)
        config.pluginmanager.register(GuestReporter(config, path), "fvd-guest-reporter")
