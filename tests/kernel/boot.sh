#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# First process of its own process and mount namespaces: becomes systemd, with the units of this
# tree, a table of devices and a line of fstab. Called as: boot.sh WORK UNITS RULES PROGRAMS, where
# WORK holds the image. Everything that is mounted here ends with the namespace.
set -e
work=$1 units=$2 rules=$3 programs=$4
mount -t proc proc /proc
# A /run of its own: what systemd and udev leave there must not look alive to later tests.
mount -t tmpfs run "$work/mnt"
mkdir "$work/mnt/store"
mount --bind /run/store "$work/mnt/store"
mount -n --move "$work/mnt" /run
mount -t cgroup2 cgroup /sys/fs/cgroup
cp -a /etc "$work/etc"
mount --bind "$work/etc" /etc
rm -rf /etc/systemd/system /etc/fstab
mkdir -p /etc/systemd/system /etc/fvd
for unit in "$units"/*; do
  sed "s|/usr/bin/fvd|$programs/fvd|" "$unit" >"/etc/systemd/system/${unit##*/}"
done
cd /etc/systemd/system
# Nothing of the host but the way to its targets.
for unit in systemd-sysusers systemd-tmpfiles-setup systemd-tmpfiles-setup-dev systemd-sysctl \
  systemd-random-seed systemd-update-utmp systemd-binfmt systemd-modules-load \
  systemd-journal-flush systemd-machine-id-commit systemd-firstboot ldconfig; do
  ln -s /dev/null "$unit.service"
done
grep -q ^fvd: /etc/group || echo fvd:x:990: >>/etc/group  # what packaging/sysusers.d asks for
echo "web  $work/web.fvd  -" >/etc/fvd/fvdtab
printf '[daemon]\nmetrics = "off"\n' >/etc/fvd/fvdd.toml  # the port may be that of another fvdd
mkdir -p /etc/udev/rules.d
cp "$rules"/*.rules /etc/udev/rules.d
options=_netdev,x-systemd.requires=fvd@web.service
echo "/dev/disk/by-fvd/web  $work/mnt  ext4  $options  0  0" >/etc/fstab
cat >proof.target <<UNIT
[Unit]
Requires=proof.service remote-fs.target
Wants=limit.service
AllowIsolate=yes
UNIT
# Where the proof does not even begin: say why, and end.
cat >limit.service <<UNIT
[Service]
ExecStart=/bin/sh -c 'sleep 200; systemctl --no-pager list-jobs; \
  systemctl --no-pager status --all fvdd.socket fvdd.service fvd@web.service proof.service; \
  systemctl --no-block start poweroff.target'
StandardOutput=append:$work/proof.log
StandardError=inherit
UNIT
cat >proof.service <<UNIT
[Unit]
RequiresMountsFor=$work/mnt
After=remote-fs.target fvdd.service
[Service]
Type=oneshot
ExecStart=/bin/bash $work/proof.sh
ExecStopPost=-/bin/systemctl --no-pager status fvdd.service fvd@web.service
ExecStopPost=/bin/systemctl --no-block start poweroff.target
StandardOutput=append:$work/proof.log
StandardError=inherit
TimeoutStartSec=180
UNIT
exec env -i PATH="$PATH" /lib/systemd/systemd --unit=proof.target
