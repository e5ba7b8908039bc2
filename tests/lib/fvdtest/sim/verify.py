# SPDX-License-Identifier: Apache-2.0
"""What `fvdctl check` says of an image that a simulated crash left."""

import tempfile
from pathlib import Path

from fvdengine.check import check_image
from fvdengine.errors import EngineError
from fvdengine.findings import Severity
from fvdengine.options import OpenOptions

MEMORY = Path("/dev/shm")


class Verifier:
    """Puts images into files of their own and has them checked; base_length: of its base."""

    def __init__(self, base_length: int) -> None:
        self._base_length = base_length
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._path = Path()

    def _prepare(self) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="fvd-sim-", dir=MEMORY if MEMORY.is_dir() else None
        )
        self._path = Path(self._folder.name)
        with (self._path / "base.raw").open("wb") as base:
            base.truncate(self._base_length)

    def __call__(self, image: bytes, data: bytes | None) -> str:
        """What is corrupt, or nothing."""
        if self._folder is None:
            self._prepare()
        (self._path / "image.fvd").write_bytes(image)
        if data is not None:
            (self._path / "data.raw").write_bytes(data)
        try:
            result = check_image(self._path / "image.fvd", OpenOptions(accept_changed_base=True))
        except EngineError as error:
            return error.message
        return "; ".join(
            f"{finding.code}: {finding.message}"
            for finding in result.findings
            if finding.severity is Severity.CORRUPT
        )

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()
