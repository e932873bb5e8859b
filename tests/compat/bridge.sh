#!/bin/sh
# Families by Megatron-Bridge's names and settings instead of our rows: a line each. Builds environments beside that of
# `make test-latest` (a minute, network), without what Megatron-Bridge needs to train. Not part of `make test`; recorded
# in docs/lab-log.md.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv-latest/bin/python}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for version in ${VERSIONS:-0.4.2 0.6.2}; do
    $python -m pip install --quiet --no-deps --target "$site/$version" \
        "megatron-bridge==$version" peft einops 'hydra-core==1.3.2' omegaconf 'antlr4-python3-runtime==4.9.3'
    echo "megatron-bridge $version"
    PYTHONPATH=$site/$version $python -W ignore tests/compat/bridge.py
done
