#!/usr/bin/env bash
# One node's part of a Slurm job: MINITRON_GPUS processes of `minitron` (by default 8). Called by srun once per node.
set -u
export NODES=$SLURM_NNODES NODE_RANK=$SLURM_NODEID
exec "$(dirname "$0")/local.sh" "${MINITRON_GPUS:-8}" "$@"
