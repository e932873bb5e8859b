# What every job does: "$@" is a recipe, or a verb and a recipe, with its options. Sourced by the sbatch scripts.
# shellcheck shell=bash

case "${1:-}" in
    "") echo "usage: sbatch slurm/run.sbatch [VERB] RECIPE [OPTIONS...]" >&2; exit 2 ;;
    run | prepare | correct | score | search | prune | distill | baseline | evaluate | export) ;;
    *) set -- run "$@" ;;
esac

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
# the port: below those that Linux gives to outgoing connections, of which one could hold it
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# kernels of one layer are issued in the order in which they are called, so that tensor-parallel communication starts
# before the matrix multiplication that it hides behind (Megatron-LM's scripts set it)
export CUDA_DEVICE_MAX_CONNECTIONS=1
# memory that segments of unlike sizes would waste goes back: teacher and student take turns
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# tensors of a collective are kept by reference rather than by the allocator's streams, which holds them longer
export TORCH_NCCL_AVOID_RECORD_STREAMS=1

container=()
if [ -n "${MINITRON_IMAGE:-}" ]; then
    container=(--container-image="$MINITRON_IMAGE" --container-mounts="${MINITRON_MOUNTS:-$PWD:$PWD}" --container-workdir="$PWD")
fi

mkdir -p logs
srun --kill-on-bad-exit=1 --open-mode=append --output="logs/%x-%j-node%n.log" "${container[@]}" launch/node.sh "$@" &
step=$!
# Slurm's warning comes to this shell alone (B:), and srun hands it on to the processes
warned=
trap 'warned=yes; kill -USR1 "$step" 2>/dev/null' USR1
trap 'kill -TERM "$step" 2>/dev/null' TERM
while
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null # a trapped signal ends the wait, not the step
do :; done

# back into the queue after a warning, when all was saved (75; the first node to leave may take the others along: 137 and
# 143 say so), or where a rank had stopped (76; thrice, for what always stops there is a fault): scancel is to end a job,
# and Slurm itself takes back what it preempts
again=
case "$code" in
    75 | 137 | 143) again=$warned ;;
    76) [ "${SLURM_RESTART_COUNT:-0}" -ge 3 ] || again=yes ;;
esac
if [ -n "$again" ]; then
    job=$SLURM_JOB_ID
    # a task of an array has a name of its own
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    scontrol requeue "$job" || true
fi
exit "$code"
