# SPDX-License-Identifier: Apache-2.0
"""The units keep mounted devices alive, offer what the daemon relies on, and satisfy systemd."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fvdtest import tree

UNITS = tree.ROOT / "packaging/systemd"
# Tenths, of 100; what is left is what attaching needs: root, devices, the host's mounts, network.
EXPOSURE_MAX = {"fvdd.service": 58, "fvd@.service": 38}


def settings(name="fvdd.service"):
    """The settings of a unit as {section: [(name, value)]}."""
    found = {}
    section = None
    for line in (UNITS / name).read_text().splitlines():
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = found.setdefault(match.group(1), [])
        elif line and not line.startswith("#"):
            name, _, value = line.partition("=")
            section.append((name, value))
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Type", "notify"),
        ("KillMode", "process"),
        ("RuntimeDirectory", "fvd"),
        ("RuntimeDirectoryPreserve", "yes"),
        ("LimitMEMLOCK", "infinity"),
        ("WatchdogSec", "30"),
        ("OOMScoreAdjust", "-900"),
        ("NoNewPrivileges", "yes"),
    ],
)
def test_service_has(name, value):
    assert (name, value) in settings()["Service"]


def test_service_is_started_again_however_often_it_dies():
    assert ("StartLimitIntervalSec", "0") in settings()["Unit"]
    assert ("Restart", "on-failure") in settings()["Service"]


@pytest.mark.parametrize("name", ["PrivateNetwork", "PrivateMounts", "ProtectSystem", "PrivateTmp"])
def test_service_does_not_hide_the_host(name):
    assert name not in dict(settings()["Service"])


def test_module_options_make_no_device_in_advance():
    text = (tree.ROOT / "packaging/modprobe.d/fvd.conf").read_text()
    assert "options nbd nbds_max=0 max_part=16" in text.splitlines()


@pytest.fixture
def installed(tmp_path):
    """The units as they would be installed, with the programs of this tree."""
    programs = Path(sys.executable).parent
    for unit in UNITS.iterdir():
        text = unit.read_text().replace("/usr/bin/fvd", f"{programs}/fvd")
        (tmp_path / unit.name).write_text(text)
    return tmp_path


def analyze(*words):
    program = shutil.which("systemd-analyze")
    assert program is not None, "install the package systemd"
    return subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )


def test_systemd_understands_the_units(installed):
    names = ["fvdd.service", "fvdd.socket", "fvd@web.service", "fvd.slice"]
    done = analyze("verify", "--man=no", *(installed / name for name in names))
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_finds_a_planted_mistake(installed):
    unit = installed / "fvdd.service"
    unit.write_text(unit.read_text().replace("Type=notify", "Type=notifyy"))
    assert "notifyy" in analyze("verify", "--man=no", unit).stderr


@pytest.mark.parametrize(("name", "most"), EXPOSURE_MAX.items())
def test_exposure_stays_low(installed, name, most):
    done = analyze("security", "--offline=yes", f"--threshold={most}", installed / name)
    assert done.returncode == 0, done.stdout[-200:]


def test_restart_of_the_daemon_detaches_nothing():
    wanted = settings("fvd@.service")["Unit"]
    assert ("Wants", "fvdd.service") in wanted
    assert not {"Requires", "BindsTo", "PartOf"} & {name for name, _ in wanted}


def test_devices_go_down_before_the_daemon_and_after_what_is_mounted_on_them():
    after = dict(settings("fvd@.service")["Unit"])["After"].split()
    assert "fvdd.service" in after
    text = (UNITS / "fvd@.service").read_text()
    assert "x-systemd.requires=fvd@NAME.service" in text
    assert ("DefaultDependencies", "no") in settings("fvd.slice")["Unit"]


def test_socket_belongs_to_the_group():
    socket = settings("fvdd.socket")["Socket"]
    assert ("SocketMode", "0660") in socket
    assert ("SocketGroup", "fvd") in socket
    assert "g fvd -" in (tree.ROOT / "packaging/sysusers.d/fvd.conf").read_text().splitlines()


# udev

RULES = tree.ROOT / "packaging/udev/60-fvd.rules"


def test_every_label_is_there():
    text = RULES.read_text()
    assert set(re.findall(r'GOTO="(\w+)"', text)) == set(re.findall(r'LABEL="(\w+)"', text))


@pytest.mark.parametrize("backend", ["fvd:web:1b2c-77", "fvd:a.b-c_9:00000000-0000"])
def test_name_is_taken_out_of_the_backend_identifier(backend):
    programs = re.findall(r'PROGRAM="([^"]*)"', RULES.read_text())
    assert len(programs) == 2
    for program in programs:
        # As udev does: attributes, then its two escapes.
        command = program.replace("$attr{backend}", backend).replace("$$", "$").replace("%%", "%")
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout == backend.split(":")[1] + "\n"


def test_disks_and_partitions_get_stable_names():
    text = RULES.read_text()
    assert 'SYMLINK+="disk/by-fvd/%c fvd/%c"' in text
    assert 'SYMLINK+="disk/by-fvd/%c-part%n fvd/%c-part%n"' in text
