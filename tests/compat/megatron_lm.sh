#!/bin/sh
# Does Megatron-LM itself load the export of every family, with the flags beside it, as the model that it is? Its own
# argument parser, model builder and loader run on a CPU; a line a family. MEGATRON_LM names a work tree of
# https://github.com/NVIDIA/Megatron-LM; without it nothing is run. READER is a Python with torch, transformers, einops
# and triton that the source wants: 0.19 and later 3.12, 0.16 the one of .venv with triton beside it. Not part of
# `make test`; recorded in docs/versions.md.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
writer=${PYTHON:-.venv/bin/python}
$writer -W ignore tests/compat/megatron_lm.py write "$work"
${READER:-$writer} -W ignore tests/compat/megatron_lm.py read "$work"
