#!/usr/bin/env bash
# A chain of jobs, one for each configuration: each begins when the one before it has ended well, and is cancelled with it.
# Options are sbatch's, for all of them; run it in the repository:
#
#     examples/slurm/chain.sh --partition=h100 configs/aime/qwen3-8b/rlvr.yaml configs/aime/qwen3-8b/tempo.yaml
#     examples/slurm/chain.sh --nodes=4 rlvr.yaml tempo.yaml rollout.kv_cache_gib=24
set -euo pipefail

options=() configs=() overrides=()
for word in "$@"; do
  case $word in -*) options+=("$word") ;; *=*) overrides+=("$word") ;; *) configs+=("$word") ;; esac
done
if [ ${#configs[@]} = 0 ]; then
  echo "usage: examples/slurm/chain.sh [--sbatch-option...] CONFIG... [key=value...]" >&2
  exit 2
fi
after=()
for config in "${configs[@]}"; do
  id=$(sbatch --parsable ${after[@]+"${after[@]}"} ${options[@]+"${options[@]}"} \
    "$(dirname "$0")/train.sbatch" "$config" ${overrides[@]+"${overrides[@]}"})
  id=${id%%;*}
  echo "job $id: $config${after[0]+, ${after[0]#--dependency=}}"
  after=(--dependency="afterok:$id" --kill-on-invalid-dep=yes)
done
