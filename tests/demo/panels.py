#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Every panel of the shipped dashboards, evaluated by a Prometheus and drawn as a picture.

`ask` evaluates each panel's expressions over a time, at a Prometheus that scraped meanwhile: the
one that session.py has beside the demonstration. `draw` makes panels.html, panels.png (with a
headless Chromium) and panels.json of the answers in a folder; says which panels have no series, and
fails if there is any. Two steps, because a browser is too much for User Mode Linux.
"""

import argparse
import html
import json
import math
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ("fvd-fleet", "fvd-device")
RATE_INTERVAL = "20s"
PLACES = {"$instance": ".*", "$device": ".*", "$image": ".*", "$__rate_interval": RATE_INTERVAL}
ANSWER_SECONDS = 60
STEP_SECONDS = 2
WIDTH, HEIGHT, COLUMNS = 380, 90, 4
COLOURS = ("#27c", "#c62", "#2a7", "#a3c", "#b92", "#299", "#c37", "#666")


def say(text: str) -> None:
    print(f"panels: {text}", flush=True)


def query(address: str, expr: str, begin: float, end: float) -> list[dict[str, Any]]:
    """The series of an expression over this time."""
    words = {"query": expr, "start": begin, "end": end, "step": STEP_SECONDS}
    url = f"http://{address}/api/v1/query_range?{urllib.parse.urlencode(words)}"
    with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
        return list(json.load(answer)["data"]["result"])


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in DASHBOARDS:
        made = json.loads((ROOT / f"packaging/grafana/{name}.json").read_text())
        for panel in made["panels"]:
            if panel["type"] != "row":
                yield name, panel


def filled(expr: str) -> str:
    for place, value in PLACES.items():
        # Where one device is chosen, it is whichever there is.
        expr = expr.replace(f'="{place}"', f'=~"{value}"').replace(place, value)
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


def ask(address: str, begin: float, end: float) -> dict[str, Any]:
    """What a Prometheus has for all panels."""
    answers = [
        {
            "dashboard": dashboard, "panel": panel["title"],
            "lines": [
                numbers(series)
                for target in panel["targets"]
                for series in query(address, filled(target["expr"]), begin, end)
            ],
        }
        for dashboard, panel in panels()
    ]  # fmt: skip
    return {"begin": begin, "end": end, "panels": answers}


def draw(asked: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    """Draw all panels; what each of them has."""
    found, drawn = [], []
    for one in asked["panels"]:
        lines = one["lines"]
        highest = max((value for line in lines for _, value in line), default=None)
        found.append({
            "dashboard": one["dashboard"], "panel": one["panel"], "series": len(lines),
            "points": sum(map(len, lines)), "highest": highest,
        })  # fmt: skip
        drawn.append(picture(one["panel"], lines, asked["begin"], asked["end"]))
    (out / "panels.html").write_text(document(drawn))
    (out / "panels.json").write_text(json.dumps(found, indent=1) + "\n")
    shoot(out / "panels.html", out / "panels.png", len(drawn))
    return found


def report(found: list[dict[str, Any]], out: Path) -> int:
    """Say what there is; the exit status."""
    empty = [one["panel"] for one in found if not one["series"]]
    silent = [one["panel"] for one in found if one["series"] and not one["points"]]
    still = [one["panel"] for one in found if one["points"] and not one["highest"]]
    say(f"{len(found)} panels, {len(found) - len(empty)} have series: {out}/panels.png")
    say(f"zero all the time, because nothing of the kind happened: {', '.join(still) or 'none'}")
    say(f"no number, since nothing was measured: {', '.join(silent) or 'none'}")
    if empty:
        say(f"WITHOUT SERIES: {', '.join(empty)}")
    return 1 if empty else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    asking = verbs.add_parser("ask", help="evaluate the panels at a Prometheus")
    asking.add_argument("address", metavar="HOST:PORT")
    asking.add_argument("begin", type=float, help="seconds since the epoch")
    asking.add_argument("end", type=float)
    asking.add_argument("file", type=Path, help="where the answers go")
    drawing = verbs.add_parser("draw", help="draw the answers")
    drawing.add_argument("file", type=Path)
    drawing.add_argument("out", type=Path, help="a folder")
    arguments = parser.parse_args()
    if arguments.verb == "ask":
        asked = ask(arguments.address, arguments.begin, arguments.end)
        arguments.file.write_text(json.dumps(asked))
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    return report(draw(json.loads(arguments.file.read_text()), arguments.out), arguments.out)


if __name__ == "__main__":
    sys.exit(main())
