"""Machine of a rehearsal: one rank of any world, with a GPU that is not there and peers that nobody starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import bias
from torch.utils._pytree import tree_map

from ..errors import TopologyError
from ..gpus import GPUS
from ..model import fused_swiglu
from ..parallel import has_cpu_backend, kernels
from .clock import NODE, Clock
from .device import Device
from .fault import DeviceFault
from .kernels import LowerRight, fused_attention, fused_rms_norm
from .ledger import Ledger
from .places import Places
from .stand_in import cuda_stand_in

__all__ = ["rehearsed_rank"]

T = TypeVar("T")

SWIGLU = ("swiglu", "swiglu_back", "weighted_swiglu", "weighted_swiglu_back")
"""mcore's functions of SwiGLU that it compiles."""
CUDNN_VERSION = 91900
"""cuDNN that torch 2.13 brings, at least: the one whose attention it takes by itself."""


class Patch(NamedTuple):
    """Attribute of a module or class, and its value inside a rehearsal."""

    owner: object
    name: str
    value: object


@contextmanager
def rehearsed_rank(
    rank: int, world: int, *, gpu: str = "H100", ledger: Ledger | None = None, fused: bool = True
) -> Iterator[Ledger]:
    """Be one rank of a world inside the context: CUDA is there, its tensors are fake, and collectives reach nobody.

    Yields the ledger of what the rank does. fused: take CUDA's kernels for attention, RMSNorm and SwiGLU; otherwise
    torch's plain definitions. Raises TopologyError in a process that has run on the CPU backend, or in a world.
    """
    if has_cpu_backend() or dist.is_initialized():
        raise TopologyError("a rehearsal needs a process of its own, and this one has run on the CPU. Start another.")
    ledger = ledger or Ledger()
    places = Places()
    device = Device(ledger, Clock(GPUS[gpu]), places)
    with ExitStack() as stack:
        stack.enter_context(cuda_stand_in())
        _patch(stack, [*_cuda(device, gpu), *_distributed(device), *_tensors(device)])
        if fused:
            _patch(stack, _kernels(device))
        _join(rank, world)
        stack.callback(dist.destroy_process_group)
        # torch.tensor(..., device="cuda") is then made on the CPU, and moved by an operation that the mode sees
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        with device:
            yield ledger


def _patch(stack: ExitStack, patches: Sequence[Patch]) -> None:
    """Set attributes, until the stack is left."""
    for owner, name, value in patches:
        stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _join(rank: int, world: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


class _Stream:
    """Stream or event; nothing is ever in flight."""

    cuda_stream, device = 0, torch.device("cuda", 0)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def record_event(self, event: object = None) -> _Stream:
        return _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 1.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _returns(value: T) -> Callable[..., T]:
    return lambda *args, **kwargs: value


def _cuda(device: Device, gpu: str) -> list[Patch]:
    """Return the patches of torch.cuda, which would ask the driver."""
    ledger, state, nothing = device.ledger, torch.get_rng_state(), _returns(None)
    memory, (major, minor) = ledger.limit or 80 * 2**30, GPUS[gpu].capability
    sizes = {"total_memory": memory, "multi_processor_count": 132, "warp_size": 32}
    about = SimpleNamespace(name=gpu, major=major, minor=minor, **sizes)
    generator = SimpleNamespace(
        set_state=nothing, get_state=lambda: state.clone(), manual_seed=nothing, initial_seed=_returns(0)
    )
    answers: dict[str, object] = {
        "_lazy_init": nothing,
        "_lazy_call": lambda function, **_: function(),
        "is_available": _returns(True),
        "is_initialized": _returns(True),
        "init": nothing,
        "device_count": _returns(NODE),
        "current_device": _returns(0),
        "set_device": nothing,
        "synchronize": lambda *_, **__: device.waits_for("torch.cuda.synchronize"),
        "current_stream": _returns(_Stream()),
        "default_stream": _returns(_Stream()),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": _returns(nullcontext()),
        "set_stream": nothing,
        "device": _returns(nullcontext()),
        "memory_allocated": lambda *_: ledger.now,
        "memory_reserved": lambda *_: ledger.now,
        "max_memory_allocated": lambda *_: ledger.section.peak,
        "max_memory_reserved": lambda *_: ledger.section.peak,
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "mem_get_info": lambda *_: (memory - ledger.now, memory),
        "get_device_name": _returns(gpu),
        "get_device_capability": _returns((major, minor)),
        "get_device_properties": _returns(about),
        "is_bf16_supported": _returns(True),
        "is_current_stream_capturing": _returns(False),
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda *_, **__: state.clone(),
        "set_rng_state": nothing,
        "default_generators": (generator,),
    }
    return [
        *(Patch(torch.cuda, name, answer) for name, answer in answers.items()),
        Patch(torch.cuda.random, "get_rng_state", answers["get_rng_state"]),
        Patch(torch.backends.cudnn, "version", _returns(CUDNN_VERSION)),
    ]


def _distributed(device: Device) -> list[Patch]:
    """Return the patches of torch.distributed: objects of other ranks are like this one's, and groups cost nothing."""
    new_group = dist.new_group
    all_reduce: Callable[..., object] = dist.all_reduce

    def make_group(
        ranks: Sequence[int] | None = None, timeout: object = None, backend: str | None = None, *_: object, **__: object
    ) -> object:
        group = new_group(ranks, backend="fake")
        name = getattr(group, "group_name", None)
        if name is not None:  # a group of other ranks has none
            device.backends[name] = "nccl" if backend == "fake" else backend or "both"
        return group

    def reduce(tensor: Tensor, op: object = dist.ReduceOp.SUM, *args: object, **options: object) -> object:
        device.reduces_by = op
        return all_reduce(tensor, op, *args, **options)

    def gather(value: T, out: list[T] | None = None, *_: object, **__: object) -> None:
        if out is not None:
            out[:] = [value] * len(out)

    def scatter(out: list[T], values: Sequence[T] | None, *_: object, **__: object) -> None:
        if values:
            out[0] = values[0]

    return [
        Patch(dist, "new_group", make_group),
        Patch(dist, "all_reduce", reduce),
        Patch(dist, "all_gather_object", lambda out, value, *_, **__: gather(value, out)),
        Patch(dist, "broadcast_object_list", _returns(None)),
        Patch(dist, "gather_object", gather),
        Patch(dist, "scatter_object_list", scatter),
    ]


def _tensors(device: Device) -> list[Patch]:
    """Return the patches of what reads a tensor's numbers by a way that no mode sees."""
    tensor, numpy, tolist = torch.tensor, torch.Tensor.numpy, torch.Tensor.tolist
    generator = torch.Generator

    def make(data: object, *args: Any, **options: Any) -> Tensor:
        if isinstance(data, (list, tuple)):
            data = tree_map(lambda x: x.item() if isinstance(x, FakeTensor) and x.dim() == 0 else x, data)
        return tensor(data, *args, **options)

    def to_numpy(self: Tensor, *, force: bool = False) -> NDArray:
        if isinstance(self, FakeTensor):
            raise DeviceFault(f".numpy() of a tensor on the GPU, at {device.places.here().line}")
        return numpy(self, force=force)

    class OnHost(generator):  # type: ignore[misc, valid-type]
        def __new__(cls, device: object = "cpu") -> Any:
            return generator.__new__(generator, "cpu")  # type: ignore[call-arg]

    return [
        Patch(torch, "tensor", make),
        Patch(torch, "Generator", OnHost),
        Patch(torch, "compile", lambda function=None, **_: function or (lambda wrapped: wrapped)),
        Patch(torch.Tensor, "numpy", to_numpy),
        Patch(torch.Tensor, "tolist", lambda self: tolist(self.cpu() if isinstance(self, FakeTensor) else self)),
        Patch(torch.Tensor, "record_stream", lambda self, stream: None),
    ]


def _kernels(device: Device) -> list[Patch]:
    """Return the patches of kernels; mcore is imported for them, and compiles nothing: torch.compile is patched."""
    functional, swiglu, places = torch.nn.functional, fused_swiglu(), device.places
    return [
        *(Patch(swiglu, name, device.one_kernel(getattr(swiglu, name))) for name in SWIGLU),
        Patch(kernels, "compiled", device.one_kernel),
        Patch(bias, "causal_lower_right", LowerRight),
        Patch(
            functional, "scaled_dot_product_attention", fused_attention(functional.scaled_dot_product_attention, places)
        ),
        Patch(functional, "rms_norm", fused_rms_norm(functional.rms_norm, places)),
    ]
