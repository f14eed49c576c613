#!/bin/bash
# The first process of a virtual machine of a sandbox; the namespaces around it are its own.
#   machine.sh NAME ROOT DEVICES    DEVICES: whether /dev/shm and /proc are its own, too
name=$1 root=$2 devices=$3
trap 'exit 0' TERM
hostname "$name" && mount --bind "$root/hosts" /etc/hosts || exit 1
if [ "$devices" = yes ]; then
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm && mount -t proc proc /proc || exit 1
fi
: >"$root/run/$name.ready"
# Waiting lets dead orphans go, too.
while :; do
    sleep 3600 &
    wait $!
done
