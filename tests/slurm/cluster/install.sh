#!/usr/bin/env bash
# Install the Slurm daemons and munge where they are missing (Debian and Ubuntu, as root).
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
packages=(slurmctld slurmd slurm-client munge)
missing=()
for program in munged slurmctld slurmd sbatch; do
  command -v "$program" >/dev/null || missing+=("$program")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "error: ${missing[*]} not installed; as root: apt-get install ${packages[*]} (or your system's Slurm and munge)" >&2
  exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"
