#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every panel of the shipped dashboards, filled from what sampler.py kept and drawn as a picture.

A real Prometheus gets the samples (promtool makes its blocks of them) and evaluates each panel's
expressions over the time of the session. Makes panels.html, panels.png (with a headless Chromium)
and panels.json in a folder; says which panels have no series, and fails if there is any.
"""

import argparse
import html
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ("fvd-fleet", "fvd-device")
RATE_INTERVAL = "10s"
PLACES = {"$instance": ".*", "$device": ".*", "$image": ".*", "$__rate_interval": RATE_INTERVAL}
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$")
START_SECONDS = 60
WIDTH, HEIGHT, COLUMNS = 380, 90, 4
COLOURS = ("#27c", "#c62", "#2a7", "#a3c", "#b92", "#299", "#c37", "#666")


def say(text: str) -> None:
    print(f"panels: {text}", flush=True)


def backfill(samples: Path, text: Path) -> tuple[float, float]:
    """Write the samples as OpenMetrics with times; their first and last time."""
    times = []
    with text.open("w") as out:
        for line in samples.read_text().splitlines():
            sample = json.loads(line)
            times.append(sample["time"])
            target = f'job="{sample["job"]}",instance="{sample["instance"]}"'
            up = 0 if sample["text"] is None else 1
            out.write(f"up{{{target}}} {up} {sample['time']:.3f}\n")
            for one in (sample["text"] or "").splitlines():
                if (match := SAMPLE.match(one)) is not None:
                    name, labels, value = match.groups()
                    inside = f"{labels},{target}" if labels else target
                    out.write(f"{name}{{{inside}}} {value} {sample['time']:.3f}\n")
        out.write("# EOF\n")
    if not times:
        sys.exit("panels: nothing was sampled")
    return times[0], times[-1]


class Server:
    """A Prometheus over these blocks."""

    def __init__(self, folder: Path) -> None:
        config = folder / "empty.yml"
        config.write_text("{}\n")
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.address = f"127.0.0.1:{sock.getsockname()[1]}"
        self.log = folder / "prometheus.log"
        words = [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={self.address}", "--storage.tsdb.retention.time=100y",
        ]  # fmt: skip
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=out)

    def wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=5).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"panels: prometheus did not start\n{self.log.read_text()}")
                time.sleep(0.1)

    def query(self, expr: str, begin: float, end: float) -> list[dict[str, Any]]:
        words = urllib.parse.urlencode({"query": expr, "start": begin, "end": end, "step": "1s"})
        address = f"http://{self.address}/api/v1/query_range?{words}"
        with urllib.request.urlopen(address, timeout=START_SECONDS) as answer:
            return list(json.load(answer)["data"]["result"])


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in DASHBOARDS:
        made = json.loads((ROOT / f"packaging/grafana/{name}.json").read_text())
        for panel in made["panels"]:
            if panel["type"] != "row":
                yield name, panel


def filled(expr: str) -> str:
    for place, value in PLACES.items():
        expr = expr.replace(place, value)
    return expr


def numbers(series: dict[str, Any]) -> list[tuple[float, float]]:
    pairs = [(float(at), float(value)) for at, value in series["values"]]
    return [(at, value) for at, value in pairs if math.isfinite(value)]


def picture(title: str, found: list[list[tuple[float, float]]], begin: float, end: float) -> str:
    """One panel: its lines over the whole time, from 0 (or the least) to the largest value."""
    values = [value for line in found for _, value in line]
    low, high = min([0.0, *values]), max([0.0, *values])
    span = (high - low) or 1.0
    lines = []
    for number, line in enumerate(found):
        points = " ".join(
            f"{(at - begin) / max(end - begin, 1) * WIDTH:.1f},"
            f"{HEIGHT - 2 - (value - low) / span * (HEIGHT - 4):.1f}"
            for at, value in line
        )
        colour = COLOURS[number % len(COLOURS)]
        lines.append(f'<polyline fill="none" stroke="{colour}" points="{points}"/>')
    shown = f"{len(found)} series, 0 to {high:.4g}" if values else f"{len(found)} series, no number"
    return (
        f"<figure><figcaption>{html.escape(title)}<small>{shown}</small></figcaption>"
        f'<svg width="{WIDTH}" height="{HEIGHT}">{"".join(lines)}</svg></figure>'
    )


def document(drawn: list[str]) -> str:
    return (
        '<!DOCTYPE html><meta charset="utf-8"><title>fvd panels</title><style>'
        "body{font:12px sans-serif;margin:8px;background:#fff}"
        f"main{{display:grid;grid-template-columns:repeat({COLUMNS},{WIDTH + 10}px)}}"
        "figure{margin:4px}svg{border:1px solid #ccc}figcaption{white-space:nowrap;"
        "overflow:hidden}small{float:right;color:#777}</style><main>" + "\n".join(drawn) + "</main>"
    )


def shoot(page: Path, picture: Path, count: int) -> None:
    rows = -(-count // COLUMNS)
    size = f"{COLUMNS * (WIDTH + 10) + 20},{rows * (HEIGHT + 30) + 20}"
    browser = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if browser is None:
        sys.exit("panels: there is no chromium to draw with; packaging/setup.sh installs it")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             f"--user-data-dir={profile}", f"--window-size={size}", f"--screenshot={picture}",
             page.resolve().as_uri()],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip


def evaluate(samples: Path, out: Path) -> list[dict[str, Any]]:
    """Draw all panels; what each of them has."""
    found, drawn = [], []
    with tempfile.TemporaryDirectory(prefix="fvd-panels.") as name:
        folder = Path(name)
        text = folder / "samples.txt"
        begin, end = backfill(samples, text)
        words = ["promtool", "tsdb", "create-blocks-from", "openmetrics", text, folder / "tsdb"]
        subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)
        server = Server(folder)
        try:
            server.wait()
            for dashboard, panel in panels():
                lines = [
                    numbers(series)
                    for target in panel["targets"]
                    for series in server.query(filled(target["expr"]), begin, end)
                ]
                highest = max((value for line in lines for _, value in line), default=None)
                found.append({
                    "dashboard": dashboard, "panel": panel["title"], "series": len(lines),
                    "points": sum(map(len, lines)), "highest": highest,
                })  # fmt: skip
                drawn.append(picture(panel["title"], lines, begin, end))
        finally:
            server.process.kill()
            server.process.wait()
    (out / "panels.html").write_text(document(drawn))
    (out / "panels.json").write_text(json.dumps(found, indent=1) + "\n")
    shoot(out / "panels.html", out / "panels.png", len(drawn))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("samples", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = evaluate(arguments.samples, arguments.out)
    empty = [one["panel"] for one in found if not one["series"]]
    silent = [one["panel"] for one in found if one["series"] and not one["points"]]
    still = [one["panel"] for one in found if one["points"] and not one["highest"]]
    say(f"{len(found)} panels, {len(found) - len(empty)} have series: {arguments.out}/panels.png")
    say(f"zero all the time, because nothing of the kind happened: {', '.join(still) or 'none'}")
    say(f"no number, since nothing was measured: {', '.join(silent) or 'none'}")
    if empty:
        say(f"WITHOUT SERIES: {', '.join(empty)}")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
