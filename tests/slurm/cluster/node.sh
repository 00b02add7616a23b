#!/usr/bin/env bash
# node.sh NODE HOSTS: one "node", a slurmd in namespaces of its own (unshare --uts --mount --pid --fork).
# Its host name is NODE, and the bind-mounted HOSTS lets the nodes' names resolve in jobs.
# This shell is the first process of the pid namespace: with it every process of the node ends.
set -euo pipefail
hostname "$1"
mount --bind "$2" /etc/hosts
slurmd -D -f "$SLURM_CONF" -N "$1" &
wait $!
