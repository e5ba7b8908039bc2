# SPDX-License-Identifier: Apache-2.0
"""QEMU as the peer of a prefetching device: a qcow2 clone of an NBD export with a block-stream job.

The program is qemu-storage-daemon (Debian package qemu-system-common), spoken to by QMP."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from fvdtest.nbd_client import NbdClient

PROGRAM = "qemu-storage-daemon"
START_SECONDS = 20.0


class BlockStream:
    """A running clone of nbd://host:port; `job` copies the rest of it in the background."""

    def __init__(
        self, folder: Path, host: str, port: int, *, job: bool, program: str = PROGRAM
    ) -> None:
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing: install the Debian package qemu-system-common")
        image, self.socket, control = folder / "clone.qcow2", folder / "qemu", folder / "qmp"
        for path in (image, self.socket, control):
            path.unlink(missing_ok=True)
        far = f"nbd://{host}:{port}"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", far, image], check=True
        )
        self.process = subprocess.Popen(
            [
                program, "--chardev", f"socket,id=c,path={control},server=on,wait=off",
                "--monitor", "chardev=c", "--blockdev",
                f"driver=nbd,node-name=far,read-only=on,server.type=inet,server.host={host},"
                f"server.port={port}",
                "--blockdev", f"driver=file,node-name=file,filename={image}",
                "--blockdev", "driver=qcow2,node-name=top,file=file,backing=far",
                "--nbd-server", f"addr.type=unix,addr.path={self.socket}",
                "--export", "type=nbd,id=e,node-name=top,name=,writable=on",
            ]
        )  # fmt: skip
        self.control = self._control(control)
        self.ask("qmp_capabilities")
        if job:
            self.ask("block-stream", **{"job-id": "stream", "device": "top"})

    def _control(self, path: Path) -> Any:
        """The monitor, once it listens."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(str(path))
            except OSError:
                sock.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.02)  # until it listens
                continue
            stream = sock.makefile("rw")
            sock.close()
            stream.readline()  # its greeting
            return stream

    def ask(self, command: str, **arguments: object) -> Any:
        """What it returns; RuntimeError where it refuses."""
        self.control.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.control.flush()
        while True:
            answer = json.loads(self.control.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def connect(self) -> socket.socket:
        """A client in the transmission phase, with simple replies."""
        return NbdClient.attach(f"nbd+unix:///?socket={self.socket}").sock

    def fetched(self) -> int:
        """Bytes that the job is past."""
        jobs = self.ask("query-block-jobs")
        return int(jobs[0]["offset"]) if jobs else 0

    def close(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        self.control.close()
