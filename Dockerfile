# The image of the cluster scripts, on NVIDIA's PyTorch image, whose torch and Transformer Engine stay:
#
#   docker build --tag minitron .
#
# and one that serves: docker build --target serve --tag minitron-serve .
ARG TRAIN_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG SERVE_IMAGE=nvcr.io/nvidia/tensorrt-llm/release:1.2.1

FROM ${SERVE_IMAGE} AS serve
WORKDIR /opt/minitron
COPY pyproject.toml setup.py README.md LICENSE ./
COPY minitron_megatron minitron_megatron
# trtllm-bench's own torch and transformers stay: nothing that the project needs for training is installed
RUN pip install --no-cache-dir "setuptools>=77" \
    && pip install --no-cache-dir --no-deps --no-build-isolation . \
    && pip install --no-cache-dir "typer>=0.12" "rich>=13" "matplotlib>=3.8" "megatron-core==0.16.1" \
    && useradd --create-home --uid 10001 minitron
USER 10001
WORKDIR /home/minitron
CMD ["minitron", "--help"]

FROM ${TRAIN_IMAGE} AS train
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/minitron
# the image constrains pip to its own versions; its torch is named as installed, so that none replaces it
ENV PIP_CONSTRAINT=""
COPY pyproject.toml setup.py README.md LICENSE ./
COPY minitron_megatron minitron_megatron
RUN pip freeze | grep -iE "^(torch|transformer[-_]engine|triton|numpy)([=@ -]|$)" > /opt/kept.txt \
    && pip install --no-cache-dir --constraint /opt/kept.txt ".[cluster]" \
    && useradd --create-home --uid 10001 minitron
COPY launch launch
COPY slurm slurm
COPY examples examples
USER 10001
WORKDIR /home/minitron
CMD ["minitron", "--help"]
