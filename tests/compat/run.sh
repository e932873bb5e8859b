#!/bin/sh
# Does every family's export load in transformers 4.57.3, which TensorRT-LLM 1.2 pins, with the logits that it has in the
# installed version? Builds an environment beside .venv (a few minutes, network), and prints a line a family. Not part of
# `make test`; recorded in docs/lab-log.md.
set -eu
cd "$(dirname "$0")/../.."
work=${1:-$(mktemp -d)}
python=${PYTHON:-.venv/bin/python}
$python -m pip install --quiet --target "$work/site" 'transformers==4.57.3'
$python tests/compat/logits.py write "$work"
PYTHONPATH=$work/site $python tests/compat/logits.py compare "$work"
