#!/usr/bin/env bash
# Starts N processes of `minitron` on this machine and ends with the first failure's exit code.
#
#   launch/local.sh N VERB ARGUMENTS...        launch/local.sh 4 run recipe.yaml
#
# torchrun starts them as well (torchrun --nproc-per-node N -m minitron_megatron ...), but it answers every failure
# with exit code 1 and a traceback of its own, which hides whose fault it was.
set -u

if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
    echo "usage: launch/local.sh N VERB ARGUMENTS..." >&2
    exit 2
fi
export WORLD_SIZE=$1 LOCAL_WORLD_SIZE=$1 MASTER_ADDR=127.0.0.1
shift
PYTHON=${PYTHON:-python}
MASTER_PORT=${MASTER_PORT:-$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export MASTER_PORT
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > WORLD_SIZE ? cores / WORLD_SIZE : 1))}

ranks=()
stop() { kill -"$1" "${ranks[@]}" 2>/dev/null; }
trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'stop USR1' USR1
for ((rank = 0; rank < WORLD_SIZE; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "$PYTHON" -m minitron_megatron "$@" &
    ranks+=($!)
done

code=0
left=$WORLD_SIZE
while [ "$left" -gt 0 ]; do
    wait -n "${ranks[@]}"
    ended=$?
    alive=0
    for pid in "${ranks[@]}"; do kill -0 "$pid" 2>/dev/null && alive=$((alive + 1)); done
    if [ "$ended" -gt 128 ] && [ "$alive" -eq "$left" ]; then
        continue # a signal ended the wait, not a rank
    fi
    if [ "$ended" -ne 0 ] && [ "$code" -eq 0 ]; then
        code=$ended
        # the others end by themselves where they failed together; where they hang on the dead rank, they are ended
        (sleep "${GRACE_SECONDS:-10}" && stop KILL) &
        reaper=$!
    fi
    left=$alive
done
[ -n "${reaper:-}" ] && kill "$reaper" 2>/dev/null
exit "$code"
