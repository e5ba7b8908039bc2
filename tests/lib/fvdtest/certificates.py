# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests of TLS, made by openssl, in the directories that NBD programs expect."""

from __future__ import annotations

import subprocess
from pathlib import Path

CA_EXTENSIONS = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")


def openssl(*words: str | Path) -> None:
    """Run openssl; a failure shows what it says."""
    subprocess.run(
        ["openssl", *map(str, words)], check=True, capture_output=True, text=True, timeout=60
    )


class Authority:
    """A certificate authority that signs for one server (127.0.0.1) and its clients."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.certificate = folder / "ca-cert.pem"
        self._key = folder / "ca-key.pem"
        extensions = [word for text in CA_EXTENSIONS for word in ("-addext", text)]
        openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
            "-keyout", self._key, "-out", self.certificate, *extensions,
        )  # fmt: skip

    def sign(self, role: str, *, days: int = 2) -> Path:
        """A directory with ca-cert.pem, ROLE-cert.pem and ROLE-key.pem; role: server or client."""
        folder = self.folder / f"{role}-{days}"
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes(self.certificate.read_bytes())
        key, request = folder / f"{role}-key.pem", folder / "request.pem"
        openssl(
            "req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN=localhost/O={role}",
            "-keyout", key, "-out", request,
        )  # fmt: skip
        extensions = folder / "extensions"
        extensions.write_text(
            "basicConstraints=critical,CA:FALSE\n"
            "keyUsage=critical,digitalSignature,keyEncipherment\n"
            f"extendedKeyUsage={role}Auth\n"
            "subjectAltName=DNS:localhost,IP:127.0.0.1\n"
        )
        openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key,
            "-CAcreateserial", "-days", str(days), "-extfile", extensions,
            "-out", folder / f"{role}-cert.pem",
        )  # fmt: skip
        return folder
