# SPDX-License-Identifier: Apache-2.0
"""What users install: a source archive that builds, and a wheel that works without the tree."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from fvdtest import tree

BUILD_SECONDS = 400
# What a clean checkout does not have.
MADE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)


def run(*words, **options):
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True, text=True, check=False, timeout=BUILD_SECONDS, **options,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.proof
@pytest.mark.timeout(BUILD_SECONDS)
def test_wheel_built_from_the_source_archive_works(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tree.ROOT, copy, ignore=MADE)
    build = (sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", tmp_path)
    run(*build, "--sdist", copy)
    (archive,) = tmp_path.glob("fvd-*.tar.gz")
    pip = (sys.executable, "-P", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, archive)
    (wheel,) = tmp_path.glob("fvd-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fvdengine/FORMAT.md" in names
    assert "fvdcore/py.typed" in names
    assert any(name.startswith("fvdcore/device.") and name.endswith(".so") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "cython/", "packaging/"))]

    site = tmp_path / "site"
    run(*pip, "install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
    script = "import fvdcore, fvdengine, fvdd, fvdctl; print(fvdcore.__file__)"
    where = run(
        sys.executable, "-P", "-c", script,
        env=os.environ | {"PYTHONPATH": str(site)}, cwd=tmp_path,
    )  # fmt: skip
    assert where.strip() == str(site / "fvdcore/__init__.py")
    made = run(
        sys.executable, "-P", "-m", "fvdctl", "create", "x.fvd", "10M",
        env=os.environ | {"PYTHONPATH": str(site)}, cwd=tmp_path,
    )  # fmt: skip
    assert "x.fvd" in made
