#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Prepare a Debian 12 machine for building, running and testing fvd: Debian packages, the virtual
# environment .venv with what pyproject.toml asks for. Installs only what is missing and prints
# what it does. Arguments: further Debian packages, for what only some need. The extension modules
# are built afterwards by tests/dev.py build.
set -euo pipefail
cd "$(dirname "$0")/.."

# One line per purpose.
packages=(
  python3 python3-venv python3-dev gcc libc6-dev make ca-certificates
  iproute2 kmod mount procps psmisc util-linux xz-utils
  e2fsprogs xfsprogs fdisk
  qemu-utils nbdkit nbdkit-plugin-python python3-boto3 nbd-client
  libnbd-bin python3-libnbd file fio strace valgrind
  mmdebstrap debootstrap debian-archive-keyring
  libseccomp2 libgnutls30 openssl
  user-mode-linux lvm2 systemd udev
  prometheus prometheus-node-exporter chromium-headless-shell
  "$@"
)

say() { printf 'setup: %s\n' "$*"; }

missing=()
if command -v dpkg-query >/dev/null; then
  for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing+=("$package")
  done
else
  say "this machine has no dpkg; fvd is developed on Debian 12. Needed are the programs of:"
  say "  ${packages[*]}"
  command -v python3 >/dev/null || exit 1
fi

if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    say "these packages are missing and only root can install them. Run as root:"
    say "  apt-get install --no-install-recommends ${missing[*]}"
    exit 1
  fi
  say "installing with apt-get: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq </dev/null
  apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" \
    </dev/null >/dev/null
fi

if [ -d .venv ] && ! .venv/bin/python -P -c 'import pip' 2>/dev/null; then
  say "the virtual environment .venv does not work here, making it anew"
  rm -rf .venv
fi
if [ ! -d .venv ]; then
  say "making the virtual environment .venv"
  /usr/bin/python3 -m venv .venv
fi

# pip of Debian 12 knows no dependency groups, so their lines are read from pyproject.toml here.
wanted=$(.venv/bin/python -P - <<'PY'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
groups = project.get("dependency-groups", {})
lines = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
for name in ("test", "dev"):
    lines += [line for line in groups.get(name, []) if isinstance(line, str)]
print("\n".join(dict.fromkeys(lines)))
PY
)
stamp=.venv/fvd-requirements
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  say "installing the Python requirements into .venv: $(tr '\n' ' ' <<<"$wanted")"
  mapfile -t requirements <<<"$wanted"
  .venv/bin/python -P -m pip install --quiet --disable-pip-version-check "${requirements[@]}"
  printf '%s\n' "$wanted" >"$stamp"
fi
say "ready"
