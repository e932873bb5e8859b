#!/usr/bin/env bash
# Starts N processes of `minitron` on this machine and exits with the first failure's exit code. GRACE_SECONDS (10)
# after that failure it kills the remaining processes.
#
#   launch/local.sh N COMMAND ARGUMENTS...        launch/local.sh 4 run recipe.yaml
#
# For a run over several nodes set NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (launch/node.sh).
#
# torchrun works too (torchrun --nproc-per-node N -m minitron_megatron ...), but it turns every failure into exit code 1
# and a traceback of its own, which hides the cause.
set -u

if [ $# -lt 2 ] || ! [ "$1" -gt 0 ] 2>/dev/null; then
    echo "usage: launch/local.sh N COMMAND ARGUMENTS..." >&2
    exit 2
fi
NODE_RANK=${NODE_RANK:-0}
export WORLD_SIZE=$(($1 * ${NODES:-1})) LOCAL_WORLD_SIZE=$1 MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
shift
PYTHON=${PYTHON:-python}
# a free port below Linux's ephemeral ports, so that no outgoing connection takes it before rank 0 listens
MASTER_PORT=${MASTER_PORT:-$("$PYTHON" - <<'PORT'
import random
import socket
import sys

for port in random.sample(range(20000, 30000), 100):
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        refused = error
    else:
        print(port)
        break
else:
    sys.exit(f"launch/local.sh: none of a hundred ports from 20000 to 29999 could be opened ({refused}). Set MASTER_PORT.")
PORT
)} || exit 2
export MASTER_PORT
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > LOCAL_WORLD_SIZE ? cores / LOCAL_WORLD_SIZE : 1))}

declare -A alive=()
stop() { [ "${#alive[@]}" -eq 0 ] || kill -"$1" "${!alive[@]}" 2>/dev/null; }
trap 'stop INT' INT
trap 'stop TERM' TERM
trap 'stop USR1' USR1
for ((rank = 0; rank < LOCAL_WORLD_SIZE; rank++)); do
    RANK=$((NODE_RANK * LOCAL_WORLD_SIZE + rank)) LOCAL_RANK=$rank "$PYTHON" -m minitron_megatron "$@" &
    alive[$!]=$rank
done

grace=${GRACE_SECONDS:-10}
code=0
while [ "${#alive[@]}" -gt 0 ]; do
    ended=
    wait -n -p ended "${!alive[@]}"
    status=$?
    ended=${ended:-} # bash unsets it if no rank ended
    if [ -z "$ended" ]; then # a signal ended the wait, and bash may have missed a rank that ended meanwhile
        for pid in "${!alive[@]}"; do
            kill -0 "$pid" 2>/dev/null || ended=$pid
        done
        [ -n "$ended" ] || continue
        wait "$ended"
        status=$?
    fi
    unset "alive[$ended]"
    if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
        code=$status
        # ranks that failed together end by themselves; a rank that waits for a dead one is killed
        { trap 'kill "$nap"' TERM; sleep "$grace" & nap=$!; wait "$nap" && stop KILL; wait; } >/dev/null 2>&1 &
        reaper=$!
    elif [ "$code" -eq 1 ] && [ "$status" -gt 1 ] && [ "$status" -ne 137 ]; then
        code=$status # a rank that lost another one exits with 1; this rank's code tells the cause
    fi
done
if [ -n "${reaper:-}" ]; then
    kill "$reaper" 2>/dev/null
    wait "$reaper" 2>/dev/null # it also ends its own sleep
fi
# other nodes may still be saving; Slurm kills them when this node's process ends
[ "$code" -eq 0 ] || [ "${NODES:-1}" -eq 1 ] || sleep "$grace"
exit "$code"
