#!/usr/bin/env bash
# Runs a command in the project's image, with docker, enroot or apptainer, whichever is installed.
#
#   launch/container.sh minitron run recipe.yaml
#
# MINITRON_IMAGE names the image: a tag for docker, a .sqsh file for enroot, a .sif file for apptainer. The current folder
# is mounted at the same path; MINITRON_MOUNTS adds other mounts, as FROM:TO,FROM:TO. docker runs it as you, so that files
# are yours, with the current folder as home, where caches of downloads stay.
set -eu
image=${MINITRON_IMAGE:?set it to the image}
IFS=, read -r -a mounts <<<"$PWD:$PWD${MINITRON_MOUNTS:+,$MINITRON_MOUNTS}"
flags=()
if command -v docker >/dev/null; then
    for mount in "${mounts[@]}"; do flags+=(--volume "$mount"); done
    # ranks of one node use shared memory, and NCCL pins it
    flags+=(--user "$(id -u):$(id -g)" --env HOME="$PWD" --env USER="$(id -un)")
    exec docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --workdir "$PWD" "${flags[@]}" "$image" "$@"
elif command -v enroot >/dev/null; then
    for mount in "${mounts[@]}"; do flags+=(--mount "$mount"); done
    # shellcheck disable=SC2016 # the inner shell expands it
    exec enroot start --rw "${flags[@]}" "$image" sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" "$@"
elif command -v apptainer >/dev/null; then
    for mount in "${mounts[@]}"; do flags+=(--bind "$mount"); done
    exec apptainer exec --nv --pwd "$PWD" "${flags[@]}" "$image" "$@"
fi
echo "docker, enroot and apptainer are not installed. Install one of them, or run without a container: launch/local.sh" >&2
exit 2
