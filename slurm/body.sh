# Common part of all jobs, sourced by the sbatch scripts. "$@" is [COMMAND] RECIPE [OPTIONS...].
# shellcheck shell=bash

case "${1:-}" in
    "") echo "usage: sbatch slurm/run.sbatch [COMMAND] RECIPE [OPTIONS...]" >&2; exit 2 ;;
    run | prepare | calibrate | correct | score | search | prune | distill | baseline | evaluate | export) ;;
    *) set -- run "$@" ;;
esac

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# a port below Linux's ephemeral ports, so that no outgoing connection holds it
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

container=()
if [ -n "${MINITRON_IMAGE:-}" ]; then
    container=(--container-image="$MINITRON_IMAGE" --container-mounts="${MINITRON_MOUNTS:-$PWD:$PWD}" --container-workdir="$PWD")
fi

mkdir -p logs
srun --kill-on-bad-exit=1 --open-mode=append --output="logs/%x-%j-node%n.log" "${container[@]}" launch/node.sh "$@" &
step=$!
# Slurm sends its warning only to this shell (B:); srun forwards it to the processes
warned=
trap 'warned=yes; kill -USR1 "$step" 2>/dev/null' USR1
trap 'kill -TERM "$step" 2>/dev/null' TERM
while
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null # a trapped signal ends the wait, not the step
do :; done

# Requeue the job after a warning, when the ranks have saved (75; or 137 and 143, if the first node to exit took the
# others down), and after a hang (76; at most three times). Do not requeue after scancel; Slurm requeues preempted jobs
# itself.
again=
case "$code" in
    75 | 137 | 143) again=$warned ;;
    76) [ "${SLURM_RESTART_COUNT:-0}" -ge 3 ] || again=yes ;;
esac
if [ -n "$again" ]; then
    job=$SLURM_JOB_ID
    # the task of an array has its own id
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    scontrol requeue "$job" || true
fi
exit "$code"
