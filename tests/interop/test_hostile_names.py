# SPDX-License-Identifier: Apache-2.0
"""Names in images are somebody else's text: terminals and logs get them without effect."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fvdtest.model import MIB
from fvdtest.serve import FVDCTL, refused

from .conftest import create

NAME = "b\x1b]0;owned\x07\x1b[31m\nnext.raw"


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """An image whose base has a name that would act on a terminal; the base is gone."""
    base = tmp_path / NAME
    base.write_bytes(b"x" * MIB)
    image = create(tmp_path / "image.fvd", base=str(base))
    base.unlink()
    return image


def test_serve_says_it_without_acting(hostile: Path, tmp_path: Path) -> None:
    said = refused(hostile, "--socket", str(tmp_path / "nbd.sock"))
    assert "owned" in said
    assert "\x1b" not in said
    assert "\x07" not in said
    assert len(said.splitlines()) <= 2


@pytest.mark.parametrize("verb", ["map", "info", "check"])
def test_offline_verbs_say_it_without_acting(hostile: Path, verb: str) -> None:
    done = subprocess.run(
        [*FVDCTL, verb, str(hostile)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "owned" in done.stdout + done.stderr
    assert not {"\x1b", "\x07"} & set(done.stdout + done.stderr)
