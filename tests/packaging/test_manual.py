# SPDX-License-Identifier: Apache-2.0
"""fvdd(8), to which units and messages point, says what fvdd knows and is installed with it."""

import re
import subprocess
import sys
import tomllib
from dataclasses import fields

from fvdd.config import Config, parse
from fvdd.main import _parser
from fvdtest import tree

PAGE = tree.ROOT / "packaging/man/fvdd.8"


def plain(text):
    return text.replace(r"\-", "-").replace(r"\(dq", '"')


def test_every_key_is_there_with_its_default():
    sections = re.split(r"^\.SS ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    told = {}
    for section in sections:
        name = section.partition("]")[0].removeprefix("[")
        entries = re.findall(r'^\.BR (\w+) " = (.*)"$', section, flags=re.MULTILINE)
        told[name] = tomllib.loads("\n".join(f"{key} = {plain(value)}" for key, value in entries))
    default = Config()
    assert parse(told) == default
    for section in fields(Config):
        known = {entry.name for entry in fields(getattr(default, section.name))}
        assert set(told[section.name]) == known


def test_every_option_is_there():
    known = {name for action in _parser()._actions for name in action.option_strings}
    text = PAGE.read_text().partition(".SH OPTIONS")[2].partition(".SH CONFIGURATION")[0]
    told = {plain(name) for name in re.findall(r"^\.BI (\S+)", text, flags=re.MULTILINE)}
    assert told == known - {"-h", "--help"}


def test_it_is_installed_where_man_looks(tmp_path):
    script = "import setuptools; setuptools.setup()"
    words = ("-c", script, "-q", "install_data", "--install-dir", str(tmp_path))
    subprocess.run([sys.executable, *words], cwd=tree.ROOT, check=True, timeout=60)
    assert (tmp_path / "share/man/man8/fvdd.8").read_bytes() == PAGE.read_bytes()
    for unit in sorted((tree.ROOT / "packaging/systemd").iterdir()):
        for name in re.findall(r"man:(\S+)\((\d)\)", unit.read_text()):
            assert (PAGE.parent / ".".join(name)).exists()
