"""Import at once the modules that a run imports first: a fork server's children have that behind them."""

import gc

import torch

from minitron_megatron import run  # noqa: F401
from minitron_megatron.parallel import install_cpu_backend

torch.set_num_threads(1)
install_cpu_backend()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402, F401

gc.freeze()
