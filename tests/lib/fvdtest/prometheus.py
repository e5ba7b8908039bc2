# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus server, and a real node_exporter, as tests use them."""

from __future__ import annotations

import json
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from fvdtest.daemon import wait_until

ANSWER_SECONDS = 20.0
SCRAPE_SECONDS = 1
# As packaging/prometheus/prometheus.yml has it: instance is the host without the port.
HOST_ALONE = [
    {"source_labels": ["__address__"], "regex": r"(.*):\d+", "target_label": "instance"}
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:
        return str(answer.read().decode())


class Process:
    """A server process that is ready when its address answers; killed at the end."""

    def __init__(self, argv: list[str], url: str, log: Path) -> None:
        self.url = url
        self.log_path = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=log.parent
            )

    def __enter__(self) -> Any:
        wait_until(self._is_ready, f"{self.url} to answer")
        return self

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self.log_path.read_text()
        try:
            fetch(self.url)
        except OSError:
            return False
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()


class NodeExporter(Process):
    """node_exporter with a /proc that has nbd devices, and a folder for textfiles."""

    def __init__(self, folder: Path, *, devices: int = 4) -> None:
        proc = folder / "proc"
        proc.mkdir()
        lines = [
            f"  43 {number} nbd{number} 10 0 80 5 10 0 80 5 0 7 10 0 0 0 0 0 0\n"
            for number in range(devices)
        ]
        (proc / "diskstats").write_text("".join(lines))
        self.textfiles = folder / "textfiles"
        self.textfiles.mkdir()
        self.address = f"127.0.0.1:{free_port()}"
        argv = [
            "prometheus-node-exporter", "--collector.disable-defaults",
            "--collector.diskstats", "--collector.textfile",
            f"--collector.textfile.directory={self.textfiles}",
            f"--path.procfs={proc}", f"--web.listen-address={self.address}",
        ]  # fmt: skip
        super().__init__(argv, f"http://{self.address}/metrics", folder / "node_exporter.log")


class Prometheus(Process):
    """A Prometheus that scrapes these targets every second and evaluates these rules."""

    def __init__(self, folder: Path, targets: dict[str, str], rules: Path | None = None) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        config = {
            "global": {
                "scrape_interval": f"{SCRAPE_SECONDS}s",
                "evaluation_interval": f"{SCRAPE_SECONDS}s",
            },
            "rule_files": [str(rules)] if rules is not None else [],
            "scrape_configs": [
                {
                    "job_name": job,
                    "static_configs": [{"targets": [target]}],
                    "relabel_configs": HOST_ALONE,
                }
                for job, target in targets.items()
            ],
        }
        path = folder / "prometheus.json"
        path.write_text(json.dumps(config))  # YAML is what it wants, and JSON is YAML
        argv = [
            "prometheus", f"--config.file={path}", f"--storage.tsdb.path={folder / 'tsdb'}",
            f"--web.listen-address={self.address}", "--log.level=warn",
        ]  # fmt: skip
        super().__init__(argv, f"http://{self.address}/-/ready", folder / "prometheus.log")

    def api(self, path: str, **arguments: str) -> Any:
        """The data of an answer; an error of Prometheus is an AssertionError with its words."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            answer = json.loads(fetch(url))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{arguments}: {error.read().decode()}") from error
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an expression now: metric (labels) and value."""
        return list(self.api("query", query=expr)["result"])

    def value(self, expr: str) -> float:
        """The value of an expression with exactly one sample."""
        (sample,) = self.query(expr)
        return float(sample["value"][1])
