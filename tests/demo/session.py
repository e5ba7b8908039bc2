#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The demonstration itself: a clone of --base below --store, attached, worked in, checked.

Runs as root where the kernel has nbd: on the machine itself or inside User Mode Linux. Each command
is printed before it runs, so that a reader can repeat it. Numbers go to --results as JSON.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = "127.0.0.1:9810"
NODE = "127.0.0.1:9811"
WATCHER = "127.0.0.1:9812"
SCRAPE_SECONDS = 2
HERE = Path(__file__).resolve().parent
PROMETHEUS = HERE.parents[1] / "packaging/prometheus"
START_SECONDS = 60
COMMAND_SECONDS = 120
PREFETCH_SECONDS = 400
POLL_SECONDS = 0.2
BAR_WIDTH = 40
TERMINAL = os.environ.get("FVD_DEMO_TERMINAL", "1" if sys.stdout.isatty() else "0") == "1"

SHELL_WORK = r"""
set -e
echo "inside: $(. /etc/os-release; echo "$PRETTY_NAME"), $(dpkg-query -W | wc -l) packages"
mkdir -p /tmp/hello/DEBIAN /tmp/hello/usr/share/hello
printf 'Package: hello-clone\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\n' \
  >/tmp/hello/DEBIAN/control
printf 'Description: made inside the clone\n' >>/tmp/hello/DEBIAN/control
head -c 8000000 /dev/urandom >/tmp/hello/usr/share/hello/noise
dpkg-deb --root-owner-group -Znone -b /tmp/hello /tmp/hello.deb
dpkg -i /tmp/hello.deb
dpkg --verify hello-clone
echo "written by a shell in the clone" >/etc/motd
rm -rf /tmp/hello /tmp/hello.deb /usr/share/locale /usr/share/zoneinfo
sync
"""
MOTD = "written by a shell in the clone\n"


class DemoError(Exception):
    """A step did not do what it should; the text says which."""


def show(words: list[str]) -> None:
    text = shlex.join(words)
    print(f"\033[36m$ {text}\033[0m" if TERMINAL else f"$ {text}", flush=True)


def run(*words: object, quiet: bool = False) -> str:
    """Show a command, run it, show what it prints, and return that."""
    argv = [str(word) for word in words]
    if not quiet:
        show(argv)
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise DemoError(f"{shlex.join(argv)}: no end after {COMMAND_SECONDS} s") from error
    if not quiet and done.stdout:
        print(done.stdout, end="", flush=True)
    if done.returncode:
        raise DemoError(f"{shlex.join(argv)}: exit status {done.returncode}\n{done.stderr}")
    return done.stdout


def metric(name: str, **labels: str) -> float:
    """The sum of a metric over the samples that have these labels."""
    with urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    total = 0.0
    for line in text.splitlines():
        sample, _, value = line.rpartition(" ")
        if sample.split("{")[0] == name and all(label in sample for label in wanted):
            total += float(value)
    return total


def demand_bytes() -> float:
    """Bytes read from the base because somebody asked for them."""
    names = ("demand", "cow")
    return sum(metric("fvd_base_bytes_total", reason=name) for name in names)


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[None]:
    """fvdd with a socket and a state directory of its own, stopped at the end."""
    socket, log = folder / "fvdd.sock", folder / "fvdd.log"
    words = ["fvdd", "--socket", str(socket), "--state-dir", str(folder / "state")]
    words += ["--metrics", METRICS]
    os.environ["FVDD_SOCKET"] = str(socket)
    show([*words, "&"])
    with log.open("wb") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run(["fvdctl", "list"], capture_output=True, check=False).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise DemoError("fvdd did not start:\n" + log.read_text())
            time.sleep(POLL_SECONDS)
        yield
    except DemoError as error:
        raise DemoError(f"{error}\n-- fvdd's log:\n{log.read_text()[-3000:]}") from error
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_SECONDS)


def watching(folder: Path) -> Path:
    """The shipped configuration of Prometheus, for this session's addresses, and scraping often."""
    text = (PROMETHEUS / "prometheus.yml").read_text()
    for shipped, ours in (
        ("127.0.0.1:9809", METRICS), ("127.0.0.1:9100", NODE),
        ("fvd.rules.yml", str(PROMETHEUS / "fvd.rules.yml")), (": 15s", f": {SCRAPE_SECONDS}s"),
    ):  # fmt: skip
        text = text.replace(shipped, ours)
    path = folder / "prometheus.yml"
    path.write_text(text)
    return path


@contextlib.contextmanager
def watched(folder: Path, panels: Path | None) -> Iterator[None]:
    """Prometheus scrapes fvdd and node_exporter meanwhile; panels.py asks it before the end."""
    if panels is None:
        yield
        return
    log = (folder / "prometheus.log").open("wb")
    processes = [
        subprocess.Popen(words, stdout=log, stderr=log)
        for words in (
            ["prometheus-node-exporter", "--collector.disable-defaults",
             "--collector.diskstats", f"--web.listen-address={NODE}"],
            ["prometheus", f"--config.file={watching(folder)}", f"--web.listen-address={WATCHER}",
             f"--storage.tsdb.path={folder / 'tsdb'}"],
        )
    ]  # fmt: skip
    try:
        # What happens before the first scrape is in no rate.
        scraped = urllib.parse.urlencode({"query": 'up{job="fvd"} == 1'})
        wait_for_answer(f"http://{WATCHER}/api/v1/query?{scraped}", folder / "prometheus.log")
        begin = time.time()
        yield
        run(sys.executable, "-P", HERE / "panels.py", "ask", WATCHER, begin, time.time(), panels,
            quiet=True)  # fmt: skip
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(START_SECONDS)
        log.close()


def wait_for_answer(url: str, log: Path) -> None:
    """Until a query of Prometheus has a result."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if json.load(answer)["data"]["result"]:
                return
        if time.monotonic() > deadline:
            raise DemoError(f"{url}: no result\n{log.read_text()[-3000:]}")
        time.sleep(POLL_SECONDS)


def lose_worker(point: Path) -> None:
    """Kill the process that serves the device while somebody reads, who sees a pause at most."""
    status = json.loads(run("fvdctl", "status", "demo", "--json", quiet=True))
    reading = subprocess.Popen(["tar", "-cf", "-", "-C", str(point), "usr/bin"],
                               stdout=subprocess.DEVNULL)  # fmt: skip
    run("kill", "-9", status["worker_pid"])
    if reading.wait(COMMAND_SECONDS):
        raise DemoError("a program that was reading saw an error when the worker died")


@contextlib.contextmanager
def mounted(device: str, point: Path) -> Iterator[None]:
    """The device mounted, with what a chroot wants; unmounted in any case."""
    point.mkdir()
    run("mount", device, point)
    run("mount", "-t", "proc", "proc", point / "proc", quiet=True)
    try:
        yield
    finally:
        run("umount", point / "proc", quiet=True)
        run("umount", point)


def wait_for_copy(begin: float) -> float:
    """Draw prefetch as a bar until nothing of the base is left; return the time since begin."""
    deadline = time.monotonic() + PREFETCH_SECONDS
    shown = -1
    while True:
        status = json.loads(run("fvdctl", "status", "demo", "--json", quiet=True))
        state, left = status["prefetch"]["state"], status["base_bytes_left"]
        done = status["local_bytes"] / max(1, status["local_bytes"] + left)
        draw(done, state, shown)
        shown = int(done * 4)
        if left == 0 and state == "done":
            print(end="\n" if TERMINAL else "", flush=True)
            return time.monotonic() - begin
        if state == "failed" or time.monotonic() > deadline:
            raise DemoError(f"prefetch did not end: {status['prefetch']}")
        time.sleep(POLL_SECONDS)


def draw(done: float, state: str, shown: int) -> None:
    """The bar: redrawn in place on a terminal, else one line for each quarter."""
    full = int(done * BAR_WIDTH)
    text = f"prefetch [{'#' * full}{'.' * (BAR_WIDTH - full)}] {done * 100:5.1f} %  {state:8}"
    if TERMINAL:
        print(f"\r{text}", end="", flush=True)
    elif int(done * 4) != shown:
        print(text, flush=True)


def work(point: Path) -> None:
    """What somebody does in a root file system: ask, install, write, delete, look again."""
    run("chroot", point, "dpkg", "--audit")
    show(["chroot", str(point), "/bin/sh"])
    done = subprocess.run(
        ["chroot", str(point), "/bin/sh"], input=SHELL_WORK, capture_output=True, text=True,
        check=False, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
    )  # fmt: skip
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise DemoError(f"the shell in the clone failed:\n{done.stderr}")
    if (point / "etc/motd").read_text() != MOTD or (point / "usr/share/locale").exists():
        raise DemoError("the clone does not show what was written to it")


def demonstrate(base: Path, store: Path, panels: Path | None) -> dict[str, Any]:
    """The whole session; returns the numbers of the summary."""
    image, point = store / "clone.fvd", store / "mount"
    found: dict[str, Any] = {}
    outside = ["--allow-dir", base.parent]
    run("fvdctl", "create", image, "--base", base, "--base-format", "raw", *outside,
        "--copy-on-read", "--prefetch-delay", "off")  # fmt: skip
    with daemon(store), watched(store, panels):
        begin = time.monotonic()
        device = run("fvdctl", "attach", image, "--name", "demo", *outside).strip()
        found["attach_seconds"] = time.monotonic() - begin
        found["device"] = device
        with mounted(device, point):
            found["mount_base_bytes"] = demand_bytes()
            work(point)
            lose_worker(point)
            run("fvdctl", "resize", "demo", "+64M")
            found["work_base_bytes"] = demand_bytes() - found["mount_base_bytes"]
            begin = time.monotonic()
            run("fvdctl", "prefetch", "demo", "start")
            found["copy_seconds"] = wait_for_copy(begin)
            run("fvdctl", "status", "demo")
            show(["fvdctl", "metrics"])
            listed = run("fvdctl", "metrics", quiet=True).splitlines()
            chosen = ("fvd_io_bytes_total", "fvd_base_bytes_total", "fvd_cor_bytes_total")
            print("\n".join(line for line in listed if line.startswith(chosen)), flush=True)
            found["prefetch_bytes"] = metric("fvd_base_bytes_total", reason="prefetch")
        run("e2fsck", "-fn", device)
        run("fvdctl", "detach", "demo")
    run("fvdctl", "info", image, *outside)
    run("fvdctl", "check", image)
    found["clone_disk_bytes"] = image.stat().st_blocks * 512
    found["size_bytes"] = json.loads(run("fvdctl", "info", image, "--json", quiet=True))[
        "size_bytes"
    ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--panels", type=Path)
    arguments = parser.parse_args()
    try:
        found = demonstrate(arguments.base, arguments.store, arguments.panels)
    except DemoError as error:
        sys.exit(f"demo: {error}")
    arguments.results.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
