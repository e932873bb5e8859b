#!/usr/bin/env bash
# Runs a command in the project's image, with what is there: docker, enroot or apptainer.
#
#   launch/container.sh minitron run recipe.yaml
#
# MINITRON_IMAGE names the image: a tag for docker, a .sqsh file for enroot, a .sif file for apptainer. This folder is
# where it is, inside as outside; MINITRON_MOUNTS adds more, as FROM:TO,FROM:TO.
set -eu
image=${MINITRON_IMAGE:?name the image in MINITRON_IMAGE}
IFS=, read -r -a mounts <<<"$PWD:$PWD${MINITRON_MOUNTS:+,$MINITRON_MOUNTS}"
flags=()
if command -v docker >/dev/null; then
    for mount in "${mounts[@]}"; do flags+=(--volume "$mount"); done
    # processes of one node share memory with each other, and NCCL pins it
    exec docker run --rm --gpus all --ipc=host --ulimit memlock=-1 --workdir "$PWD" "${flags[@]}" "$image" "$@"
elif command -v enroot >/dev/null; then
    for mount in "${mounts[@]}"; do flags+=(--mount "$mount"); done
    # shellcheck disable=SC2016 # the inner shell expands it
    exec enroot start --rw "${flags[@]}" "$image" sh -c 'cd "$1" && shift && exec "$@"' sh "$PWD" "$@"
elif command -v apptainer >/dev/null; then
    for mount in "${mounts[@]}"; do flags+=(--bind "$mount"); done
    exec apptainer exec --nv --pwd "$PWD" "${flags[@]}" "$image" "$@"
fi
echo "None of docker, enroot and apptainer is here. Install one, or run without a container: launch/local.sh" >&2
exit 2
