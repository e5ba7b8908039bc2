#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# First process inside User Mode Linux. The host's root is the root here, read-only; the job
# folder (kernel command line: job=PATH) holds what run.py asks for: cmd, env, shares, and takes
# out and rc.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts devpts /dev/pts -o ptmxmode=666
for stream in stdin:0 stdout:1 stderr:2; do
  ln -sfn "/proc/self/fd/${stream#*:}" "/dev/${stream%:*}"
done
ln -sfn /proc/self/fd /dev/fd
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
for word in $(</proc/cmdline); do
  case $word in job=*) job=${word#job=} ;; esac
done
mount -t tmpfs run /run -o mode=755
mkdir -p /run/lock /run/job
mount -t hostfs job /run/job -o "$job"
for folder in /tmp /var/tmp /mnt; do
  [ -d $folder ] && mount -t tmpfs tmp $folder -o mode=1777
done
chmod 755 /mnt
while read -r share; do
  mkdir -p "$share" && mount -t hostfs share "$share" -o "$share"
done </run/job/shares
# modprobe looks below /lib/modules, Debian's User Mode Linux keeps its modules elsewhere.
release=$(uname -r)
# The driver's words on the kernel's command line, which a module does not see; the last one counts.
nbd=$(tr ' ' '\n' </proc/cmdline | sed -n 's/^nbd\.//p')
if [ -d "/usr/lib/uml/modules/$release" ]; then
  if [ -d /lib/modules ]; then
    mount -t tmpfs modules /lib/modules
    ln -s "/usr/lib/uml/modules/$release" "/lib/modules/$release"
    modprobe nbd $nbd
  else
    insmod "/usr/lib/uml/modules/$release/kernel/drivers/block/nbd.ko" $nbd
  fi
fi
ip link set lo up
if [ -f /run/job/store ]; then
  mkdir -p "$(cat /run/job/store)"
  mount /dev/ubda "$(cat /run/job/store)"
fi
set -a
. /run/job/env
set +a
cd "${UML_DIRECTORY:-/}" || exit 1
setsid -w bash /run/job/cmd </dev/null >/run/job/out 2>&1
echo $? >/run/job/rc.part
mv /run/job/rc.part /run/job/rc
# The runner kills the machine as soon as it sees rc; waiting here keeps the kernel from panicking.
sleep 60
