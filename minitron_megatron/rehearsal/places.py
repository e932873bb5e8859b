"""Lines of code that an operation comes from, and the kind of bytes that it allocates."""

from __future__ import annotations

import linecache
import sys
from types import CodeType, FrameType
from typing import NamedTuple

import torch

__all__ = ["ACTIVATIONS", "Place", "Places"]

ACTIVATIONS = "activations"
PACKAGE, MEGATRON = "minitron_megatron/", "megatron/core/"
BUFFERS = "megatron/core/distributed/param_and_grad_buffer.py"
"""mcore's flat buffers of weights and gradients; the line that allocates one names it."""

BETWEEN = ("rehearsal/", "parallel/kernels.py")
"""Files that stand between an operation and the line that it comes from."""
KINDS = (
    (PACKAGE + "losses/", "", "loss"),
    (PACKAGE + "distill/objective.py", "prepare", "teacher"),
    (PACKAGE + "parallel/collectives.py", "", "communication"),
    (MEGATRON + "tensor_parallel/mappings.py", "", "communication"),
    (MEGATRON + "pipeline_parallel/p2p_communication.py", "", "communication"),
    (MEGATRON + "optimizer/", "", "optimizer"),
    ("torch/optim/", "", "optimizer"),
)
"""(part of a file's path, function, kind): the innermost frame that matches decides; no match means activations."""


class _Code(NamedTuple):
    """Facts of a function that hold for all its lines."""

    ours: str
    """Path inside the package; empty for other code."""
    megatron: str
    kind: str
    buffer: bool


class Place(NamedTuple):
    line: str
    """Innermost line of this package, or of megatron-core and the line of this package that leads to it."""
    kind: str


class Places:
    """Finds places by the Python frames, and in a backward pass by the forward operation that it belongs to."""

    def __init__(self) -> None:
        self._known: dict[CodeType, _Code] = {}
        self._forward: dict[int, str] = {}
        """Autograd's sequence number of a node -> line of its forward operation."""

    def here(self) -> Place:
        """Return the place of the operation that is being run."""
        found = self._walk(sys._getframe(1))
        node = torch._C._current_autograd_node()
        if node is None or node.name().startswith("CheckpointFunction"):  # recomputation is a forward pass again
            if torch.is_grad_enabled():
                self._forward[torch.autograd._get_sequence_nr()] = found.line
            return found
        line = self._forward.get(node._sequence_nr() + 1) or found.line
        return Place(f"backward of {line}", found.kind)

    def _walk(self, frame: FrameType | None) -> Place:
        ours = megatron = kind = ""
        while frame is not None and not (ours and kind):
            code = self._known.get(frame.f_code) or self._learn(frame.f_code)
            if code.ours and not ours:
                ours = f"{code.ours}:{frame.f_lineno}"
            if code.megatron and not ours and not megatron:
                megatron = f"megatron {code.megatron}:{frame.f_lineno}"
            if code.buffer and not kind:
                kind = _buffer(frame)
            kind = kind or code.kind
            frame = frame.f_back
        line = f"{megatron} < {ours}" if megatron and ours else megatron or ours or "torch"
        return Place(line, kind or ACTIVATIONS)

    def _learn(self, code: CodeType) -> _Code:
        path = code.co_filename
        own = PACKAGE in path and not any(PACKAGE + each in path for each in BETWEEN)
        kind = next((kind for part, name, kind in KINDS if part in path and name in ("", code.co_name)), "")
        megatron = path.rpartition(MEGATRON)[2] if MEGATRON in path else ""
        found = _Code(path.rpartition(PACKAGE)[2] if own else "", megatron, kind, path.endswith(BUFFERS))
        self._known[code] = found
        return found


def _buffer(frame: FrameType) -> str:
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return "weights" if "self.param_data =" in text else "gradients" if "self.grad_data =" in text else ""
