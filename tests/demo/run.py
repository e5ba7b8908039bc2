#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`make run`: a thin clone of a real Debian root file system, attached, used, checked.

Builds the base once (cached outside the tree), chooses where a /dev/nbdN can be had (this kernel,
else User Mode Linux), lets session.py do the same commands there, and proves at the end that the
base did not change by a bit.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fvd"
SUITE = "bookworm"
BASE_SIZE = "1536M"
STORE_SIZE = "3G"
MACHINE_MEMORY = "1G"
SESSION_SECONDS = "600"


def say(text: str) -> None:
    print(f"\033[1m==> {text}\033[0m" if sys.stdout.isatty() else f"==> {text}", flush=True)


def run(*words: object, check: bool = True) -> int:
    """Run a program, its output to the terminal; leave with its status when it fails."""
    status = subprocess.run([str(word) for word in words], check=False).returncode
    if check and status:
        sys.exit(f"demo: {words[0]} failed with exit status {status}")
    return status


def mirrors() -> list[str]:
    """Debian mirrors to ask: the one this machine's apt uses, then the usual one."""
    usual = "http://deb.debian.org/debian"
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(CREATED_BY) $(ORIGIN) $(REPO_URI)"],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in listed.stdout.splitlines():
        kind, origin, uri = [*line.split(), "", ""][:3]
        if kind == "Packages" and origin == "Debian" and "security" not in uri:
            return list(dict.fromkeys([uri.rstrip("/"), usual]))
    return [usual]


def bootstrap(target: Path) -> None:
    """Install a minimal Debian into a folder, with mmdebstrap or, failing that, debootstrap."""
    for mirror in mirrors():
        if shutil.which("mmdebstrap"):
            words: Sequence[object] = (
                "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", SUITE, target, mirror,
            )  # fmt: skip
            if run(*words, check=False) == 0:
                return
            shutil.rmtree(target, ignore_errors=True)
        if run("debootstrap", "--variant=minbase", SUITE, target, mirror, check=False) == 0:
            return
        shutil.rmtree(target, ignore_errors=True)
    sys.exit("demo: neither mmdebstrap nor debootstrap could install Debian; is there a network?")


def base_image(fresh: bool) -> Path:
    """A Debian root file system as a raw ext4 image; made once."""
    path = CACHE / "demo" / f"debian-{SUITE}-{BASE_SIZE}.ext4"
    if path.exists() and not fresh:
        say(f"the base is there already: {path}")
        return path
    say(f"building a Debian {SUITE} root file system, once: {path}")
    if os.geteuid() != 0:
        sys.exit("demo: building a root file system needs root")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="base.") as scratch:
        tree, image = Path(scratch) / "tree", Path(scratch) / "image"
        bootstrap(tree)
        run("mkfs.ext4", "-q", "-F", "-L", "golden", "-d", tree, image, BASE_SIZE)
        image.rename(path)
    return path


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kernel_has_nbd() -> bool:
    """Whether this machine's own kernel can give us a /dev/nbdN."""
    if os.geteuid() != 0:
        return False
    if not Path("/sys/module/nbd").is_dir() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", "nbd", "nbds_max=0", "max_part=16"], check=False)
    return Path("/sys/module/nbd").is_dir()


def session(base: Path, results: Path, place: str, asked: Path | None) -> int:
    """Run the session here or in User Mode Linux; the commands are the same."""
    words: list[object] = [sys.executable, "-P", HERE / "session.py", "--base", base]
    words += ["--results", results]
    if asked is not None:
        words += ["--panels", asked]
    if place == "host":
        with tempfile.TemporaryDirectory(prefix="fvd-demo.") as store:
            return run(*words, "--store", store, check=False)
    terminal = "1" if sys.stdout.isatty() else "0"
    columns = shutil.get_terminal_size((100, 40)).columns
    return run(
        sys.executable, "-P", ROOT / "tests/uml/run.py", "--quiet", "--kernel", place,
        "--mem", MACHINE_MEMORY, "--timeout", SESSION_SECONDS, "--store", STORE_SIZE,
        "--share", results.parent, "--env", f"FVD_DEMO_TERMINAL={terminal}",
        "--env", f"COLUMNS={columns}", "--",
        *words, "--store", "/run/store", check=False,
    )  # fmt: skip


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""


def summary(found: dict[str, Any], where: str, base: Path, before: str, after: str) -> None:
    """One screen: what was done and what it cost."""
    kept = "unchanged" if before == after else "CHANGED"
    rows = [
        ("base", f"{base.name}, {size(found['size_bytes'])}, never written to"),
        ("kernel", where),
        ("time to attach", f"{found['attach_seconds']:.2f} s until {found['device']} was ready"),
        ("read from base at mount", size(found["mount_base_bytes"])),
        ("read from base by the work", size(found["work_base_bytes"])),
        ("time to full copy", f"{found['copy_seconds']:.1f} s; prefetch read "
                              f"{size(found['prefetch_bytes'])}"),
        ("clone on disk", f"{size(found['clone_disk_bytes'])} of {size(found['size_bytes'])}"),
        ("file system check", "clean"),
        ("fvdctl check", "clean"),
        ("checksum of the base", f"{after[:16]}... {kept}"),
    ]  # fmt: skip
    say("summary")
    for name, value in rows:
        print(f"    {name:27} {value}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fresh-base", action="store_true", help="build the base anew")
    parser.add_argument("--kernel", help="User Mode Linux kernel: debian or new (default: any)")
    parser.add_argument("--panels", type=Path, metavar="FOLDER",
                        help="draw every panel of the dashboards from this session")
    arguments = parser.parse_args()
    os.environ["PATH"] = f"{ROOT}/.venv/bin:{os.environ['PATH']}"
    base = base_image(arguments.fresh_base)
    before = checksum(base)
    if arguments.kernel is None and kernel_has_nbd():
        place, where = "host", f"this machine's, {os.uname().release}"
    else:
        place = arguments.kernel or ("new" if os.access(CACHE / "uml/linux", os.X_OK) else "debian")
        where = f"User Mode Linux ({place})"
        say("this kernel has no nbd driver: the same commands run inside User Mode Linux")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fvd-demo.") as folder:
        results = Path(folder) / "results.json"
        asked = results.with_name("panels.json") if arguments.panels else None
        status = session(base, results, place, asked)
        if status:
            sys.exit(f"demo: the session failed with exit status {status}")
        found = json.loads(results.read_text())
        if asked is not None:
            status = run(sys.executable, "-P", HERE / "panels.py", "draw", asked, arguments.panels,
                         check=False)  # fmt: skip
    after = checksum(base)
    summary(found, where, base, before, after)
    if before != after:
        sys.exit("demo: the base has changed, which must never happen")
    say(f"done in {time.monotonic() - begin:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
