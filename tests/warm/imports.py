"""First imports of a process of a run: the children of a fork server have them behind them."""

import gc

from minitron_megatron import run  # noqa: F401
from minitron_megatron.parallel import install_cpu_backend

install_cpu_backend()

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.models.gpt  # noqa: E402
import megatron.core.optimizer  # noqa: E402, F401
import torch._dynamo  # noqa: E402, F401  # torch imports it with the first optimizer

import minitron_megatron.report  # noqa: E402, F401

gc.freeze()
