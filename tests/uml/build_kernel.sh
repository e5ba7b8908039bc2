#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Build a small, newer kernel for the kernel tests from Debian's own linux-source package, into
# ${XDG_CACHE_HOME:-~/.cache}/fvd/uml/linux. The package is fetched with a private configuration of
# apt, so the sources of this machine stay as they are. Five to ten minutes on two processors.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fvd/uml
config=$here/kernel.config
suites=(trixie-backports trixie bookworm-backports bookworm)

say() { printf 'uml-kernel: %s\n' "$*"; }

wanted=$(sha256sum <"$config" | cut -d' ' -f1)
if [ -x "$cache/linux" ] && [ "$(cat "$cache/config.sha256" 2>/dev/null)" = "$wanted" ]; then
  say "already built: $cache/linux ($("$cache/linux" --version)); remove it to build again"
  exit 0
fi

need=()
for package in gcc libc6-dev make bc bison flex xz-utils binutils; do
  [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] ||
    need+=("$package")
done
if [ ${#need[@]} -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ]; then
    say "missing packages; run as root: apt-get install --no-install-recommends ${need[*]}"
    exit 1
  fi
  say "installing with apt-get: ${need[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq </dev/null
  apt-get install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${need[@]}" \
    </dev/null >/dev/null
fi

mkdir -p "$cache"
scratch=$(mktemp -d "$cache/build.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# The mirror that this machine uses for Debian, else the usual one.
mirror=$(apt-get indextargets --format '$(CREATED_BY) $(ORIGIN) $(REPO_URI)' 2>/dev/null |
  awk '$1 == "Packages" && $2 == "Debian" && $3 !~ /security/ {print $3; exit}')
mirror=${mirror:-http://deb.debian.org/debian}
mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial"
private=(
  -o "Dir::Etc::SourceList=$scratch/sources.list" -o Dir::Etc::SourceParts=-
  -o "Dir::State::Lists=$scratch/lists" -o "Dir::Cache=$scratch/cache"
  -o APT::Get::List-Cleanup=0 -o APT::Sandbox::User=root -o APT::Default-Release=
)

find_source() {
  local suite=$1
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" \
    >"$scratch/sources.list"
  apt-get "${private[@]}" update -qq </dev/null >&2 || return 1
  apt-cache "${private[@]}" pkgnames linux-source- | grep -E '^linux-source-[0-9]+\.[0-9]+$' |
    sort -V | tail -n 1
}

package=
for suite in "${suites[@]}"; do
  say "looking for linux-source in $suite at $mirror"
  package=$(find_source "$suite") || true
  [ -n "$package" ] && break
done
if [ -z "$package" ]; then
  say "no linux-source package found in: ${suites[*]}"
  exit 1
fi

say "fetching $package"
(cd "$scratch" && apt-get "${private[@]}" download -qq "$package" </dev/null)
dpkg-deb --extract "$scratch/$package"_*.deb "$scratch/package"
mkdir "$scratch/linux"
tar -xf "$scratch/package/usr/src/$package.tar.xz" -C "$scratch/linux" --strip-components=1
rm -rf "$scratch/package"

say "building with $(nproc) jobs"
build=(make -C "$scratch/linux" ARCH=um "-j$(nproc)")
log=$scratch/log
if ! { "${build[@]}" allnoconfig KCONFIG_ALLCONFIG="$config" && "${build[@]}" linux; } \
  >"$log" 2>&1 </dev/null; then
  tail -n 40 "$log"
  say "the build failed"
  exit 1
fi
strip -o "$cache/linux.new" "$scratch/linux/linux"
mv "$cache/linux.new" "$cache/linux"
printf '%s\n' "$wanted" >"$cache/config.sha256"
say "built $cache/linux ($("$cache/linux" --version))"
