# shellcheck shell=bash
# What batch scripts of tempo-megatron share: `source` it (examples/slurm/), `tempo-megatron submit` writes it into its own.
#
#   tempo_start                  a line about the job; what the save signal does from here on
#   tempo_ranks COMMAND...       one step, a task for each rank, by srun; requeues the job when the run has saved and
#                                stopped (exit code 75), else returns its exit code
#
# Variables, all optional:
#   RANKS_PER_NODE               else one a GPU of the node, else --ntasks-per-node, else 1
#   SAVE_SIGNAL                  as in #SBATCH --signal=B:USR1@LEAD and launch.save_signal; else USR1
#   CONTAINER_IMAGE, CONTAINER_MOUNTS   of pyxis (srun --container-image); mounts are SRC:DST,...
#   SRUN_OPTIONS                 an array of further options of srun
#
# Slurm signals this shell alone (B:). It tells the ranks of its own node: one is enough, all save at the same boundary.
# It requeues the job itself, for a container has no scontrol.

SAVE_SIGNAL=${SAVE_SIGNAL:-USR1}
tempo_step=tempo-ranks        # the name of the ranks' step, by which squeue finds its number
tempo_srun=                   # process id of its srun while there is one
tempo_told=                   # the save signal has come
tempo_ending=                 # TERM has come
tempo_interrupted=            # a trap has interrupted `wait`

# An element of an array is requeued by its own id, not by the array's.
tempo_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
tempo_job=${tempo_job:-$SLURM_JOB_ID}

# No subshell: bash may fail to read a `$(...)` that a trap interrupts.
tempo_say() { printf '%(%F %T)T job %s: %s\n' -1 "$tempo_job" "$*" >&2; }

tempo_ranks_per_node() {
  if [ -n "${RANKS_PER_NODE:-}" ]; then
    echo "$RANKS_PER_NODE"
  elif [ "${SLURM_GPUS_ON_NODE:-0}" != 0 ]; then
    echo "$SLURM_GPUS_ON_NODE"
  else
    echo "${SLURM_NTASKS_PER_NODE:-1}"
  fi
}

tempo_start() {
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR
  tempo_say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST: $SLURM_JOB_NUM_NODES nodes x" \
    "$(tempo_ranks_per_node) ranks, rank 0 on $MASTER_ADDR"
  trap tempo_on_term TERM
  # shellcheck disable=SC2064  # the signal's name is known now
  trap tempo_on_save_signal "$SAVE_SIGNAL"
}

# Slurm sends it to the ranks, too.
tempo_on_term() {
  tempo_interrupted=1
  tempo_ending=1
  tempo_say "TERM (cancelled, preempted or at its limit): the ranks end"
}

# Process ids of this node's ranks: tasks have a LOCALID, their helpers have none.
tempo_pids() {
  local step
  step=$(squeue --noheader --steps --jobs="$tempo_job" --format='%i %j' | awk -v name="$tempo_step" '$2 == name {print $1}')
  [ -z "$step" ] || scontrol listpids "$SLURM_JOB_ID.${step##*.}" 2>/dev/null | awk '$4 ~ /^[0-9]+$/ {print $1}'
}

tempo_on_save_signal() {
  local pids='' tries=0
  tempo_interrupted=1
  [ -z "$tempo_told$tempo_ending" ] || return 0
  tempo_told=1
  if [ -z "$tempo_srun" ]; then
    tempo_say "$SAVE_SIGNAL while no ranks run"
    return 0
  fi
  # srun may not have started its tasks yet
  while pids=$(tempo_pids) && [ -z "$pids" ] && kill -0 "$tempo_srun" 2>/dev/null && [ $((tries += 1)) -le 60 ]; do sleep 1; done
  # shellcheck disable=SC2086  # one word for each
  if [ -n "$pids" ] && kill -s "$SAVE_SIGNAL" $pids 2>/dev/null; then
    tempo_say "$SAVE_SIGNAL passed on to the ranks of $(hostname -s) ($(wc -w <<< "$pids")): they save and stop"
  else
    tempo_say "$SAVE_SIGNAL, but no rank on $(hostname -s) to pass it on to"
  fi
}

tempo_ranks() {
  local ranks code=0 options=()
  [ -z "$tempo_told" ] || tempo_requeue "$SAVE_SIGNAL came before the ranks were started"
  ranks=$(tempo_ranks_per_node)
  options+=(--job-name="$tempo_step" --kill-on-bad-exit=1 --nodes="$SLURM_JOB_NUM_NODES")
  options+=(--ntasks="$((SLURM_JOB_NUM_NODES * ranks))" --ntasks-per-node="$ranks")
  # since Slurm 22.05 srun does not take it from sbatch
  options+=(--cpus-per-task="${SLURM_CPUS_PER_TASK:-$((SLURM_CPUS_ON_NODE > ranks ? SLURM_CPUS_ON_NODE / ranks : 1))}")
  if [ -n "${CONTAINER_IMAGE:-}" ]; then
    options+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD")
    options+=(--container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
  fi
  srun "${options[@]}" ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} "$@" &
  tempo_srun=$!
  # a trap ends `wait`, not srun
  while true; do
    tempo_interrupted=
    code=0
    wait "$tempo_srun" || code=$?
    [ -n "$tempo_interrupted" ] || break
  done
  tempo_srun=
  if [ "$code" = 75 ]; then
    tempo_requeue "the run has saved and stopped"
  elif [ "$code" -ge 128 ] && [ -n "$tempo_told" ] && ! tempo_ends; then
    tempo_requeue "the ranks ended (exit code $code) before they could save, what was saved earlier is complete"
  elif [ "$code" != 0 ]; then
    tempo_say "the ranks ended with exit code $code"
  fi
  return "$code"
}

# Whether Slurm ends this job already: it is cancelled, or requeued by Slurm itself.
tempo_ends() {
  case $(squeue --noheader --jobs="$tempo_job" --format=%T 2>/dev/null) in RUNNING | '') return 1 ;; esac
}

# Does not return: Slurm kills this shell as it requeues the job.
tempo_requeue() {
  if tempo_ends; then
    tempo_say "$1"
  elif [ "${REQUEUE:-1}" = 1 ]; then
    tempo_say "$1: requeued, it goes on from there"
    trap 'exit 75' TERM
    if scontrol requeue "$tempo_job"; then sleep 120 & wait; fi
    tempo_say "Slurm does not requeue it; submit it again, it goes on from what is saved"
  else
    tempo_say "$1; submit it again, it goes on from there"
  fi
  exit 75
}
