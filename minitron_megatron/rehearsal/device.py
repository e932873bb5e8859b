"""A GPU that is not there: every tensor on `cuda` is fake, and every operation on one is checked and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork, PythonCallbackWork
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from .clock import NODE, Clock
from .fault import DeviceFault
from .kernels import attention_choice, attention_flops
from .ledger import Ledger
from .memo import Call, Cost, Known, Memo, call_of
from .operations import (
    DYNAMIC,
    INDEXING,
    JOINS,
    NCCL_DTYPES,
    NO_KERNEL,
    PRODUCTS,
    PUT,
    Args,
    Kwargs,
    bytes_of,
    group_of,
    has_mask,
    is_itself,
    name_of,
    starts_early,
)
from .places import Places
from .values import Values, mutated

__all__ = ["Device"]

P = ParamSpec("P")
R = TypeVar("R")

aten = torch.ops.aten
ASKS_DEVICE = torch.ops.prim.device.default
MOST_FP64 = 2**22
"""Numbers of a float64 tensor above which it is a fault: activations are never of 8 bytes a number on purpose."""


class _Fakes(FakeTensorMode):
    """torch's mode, which must not touch this machine's CUDA."""

    avoid_device_init = True  # type: ignore[assignment]


class Device(TorchDispatchMode):
    """Mode under which `cuda:0` is fake and the CPU is real. Numbers on the GPU are unknown, but for `Values`."""

    def __init__(self, ledger: Ledger, clock: Clock, places: Places) -> None:
        super().__init__()
        self.ledger, self.clock, self.places = ledger, clock, places
        self.values = Values()
        self.fakes = _Fakes(allow_non_fake_inputs=True)
        self.memo = Memo(self.fakes, clock)
        self.backends: dict[str, str] = {}
        """Name of each process group -> its backend on a GPU: `nccl`, `gloo` or `both`."""
        self.reduces_by: object = dist.ReduceOp.SUM
        """Operation of the all-reduce that is being run."""
        self._inside = False
        """Whether a kernel of several operations is being run, which is counted as a whole."""

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        if func is ASKS_DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        call = call_of(func, args, kwargs)
        known = None if call is None else self.memo.find(call)
        if call is not None and known is not None and self.values.some_unknown(call.inputs):
            return self._repeat(known, call.inputs)
        leaves = tree_leaves((args, kwargs))
        fakes = any(isinstance(each, FakeTensor) for each in leaves)
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs, leaves, fakes)
        target = kwargs.get("device")
        if not fakes and (target is None or torch.device(target).type != "cuda"):
            return func(*args, **{**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs)
        if func is aten._local_scalar_dense.default:
            return self._item(args[0])
        if func is aten._fused_sdp_choice.default:
            return attention_choice(*args)
        if func is aten.equal.default:
            self.waits_for("equal")
            return True
        if func is aten.is_pinned.default:
            return False
        self._check(func, args, leaves)
        if func in DYNAMIC or (func is aten.index.Tensor and has_mask(args[1])):
            return self._dynamic(func, args, kwargs)
        if func in PUT and has_mask(args[1]):
            return self._run(func, self._put(args), kwargs)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return self._to_host(args[0], args[1])
        return self._run(func, args, kwargs, call)

    def _run(self, func: OpOverload, args: Args, kwargs: Kwargs, call: Call | None = None) -> object:
        """Run an operation on fake tensors, count it, carry known values along, and remember the call."""
        try:
            with self.fakes:
                out = func(*args, **kwargs)
        except RuntimeError as error:
            if "device" not in str(error) and "dtype" not in str(error):
                raise
            raise DeviceFault(f"{name_of(func)} at {self.places.here().line}: {str(error).splitlines()[0]}") from error
        cost = self._count(func, args, kwargs, out)
        self.values.carry(func, args, kwargs, out)
        if call is not None:
            self.memo.learn(call, func, args, kwargs, out, cost)
        if isinstance(out, (list, tuple)):
            return type(out)(map(self._landed, out)) if type(out) in (list, tuple) else out
        return self._landed(out)

    def _repeat(self, known: Known, inputs: Sequence[FakeTensor]) -> object:
        """Return and count what an operation returned before; at least one input's numbers are unknown."""
        made = self.memo.made(known, inputs)
        if self._inside:
            for at in known.news:
                self.values.renew(made[at])
        elif known.news or known.cost:
            place = self.places.here()
            for at in known.news:
                self.ledger.allocate(made[at], lambda: place)
                self.values.renew(made[at])
            if known.cost:
                self._book(known.cost, place.line)
        for at in known.written:
            self.values.forget(inputs[at])
        return known.container(made) if known.container else made[0]

    def one_kernel(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return a function that torch.compile makes one kernel of: it reads its arguments and writes its results once.

        What is on the CPU runs as it is.
        """

        def run(*args: P.args, **options: P.kwargs) -> R:
            inputs = [each for each in args if isinstance(each, FakeTensor)]
            if not inputs or self._inside:
                return function(*args, **options)
            self._inside = True
            try:
                out = function(*args, **options)
            finally:
                self._inside = False
            self._count_kernel(f"compiled {function.__name__}", inputs, tree_leaves(out))
            return out

        return run

    def _count_kernel(self, name: str, inputs: Sequence[FakeTensor], results: Sequence[FakeTensor]) -> None:
        place = self.places.here()
        for each in results:
            self.ledger.allocate(each, lambda: place)
        touched = sum(map(bytes_of, (*inputs, *results)))
        resource, seconds = self.clock.operation(name, 0, touched, results[0].dtype)
        self._book(Cost(name, 0, touched, resource, seconds), place.line)

    # ---- faults that torch's fake mode lets pass

    def _check(self, func: OpOverload, args: Args, leaves: Sequence[object]) -> None:
        name, tensors = name_of(func), [each for each in leaves if isinstance(each, Tensor)]
        if name in INDEXING and not isinstance(args[0], FakeTensor):
            if any(isinstance(each, FakeTensor) for each in args[1]):
                self._fault("a tensor on the CPU is indexed by one on the GPU")
        elif name in PRODUCTS and len({each.dtype for each in tensors}) > 1:
            self._fault(f"{name} of {' and '.join(sorted({str(each.dtype) for each in tensors}))}")
        elif name in JOINS and len({isinstance(each, FakeTensor) for each in tensors}) > 1:
            self._fault(f"{name} of tensors on the CPU and on the GPU")

    def _fault(self, what: str) -> None:
        raise DeviceFault(f"{what}, at {self.places.here().line}".replace("torch.", ""))

    # ---- numbers

    def waits_for(self, why: str) -> str:
        """Count a wait of the host for the device; return its line."""
        line = self.places.here().line
        self.ledger.section.waits[f"{why} at {line}"] += 1
        return line

    def _item(self, tensor: FakeTensor) -> float:
        self.waits_for("item")
        found = self.values.of(tensor)
        if found is not None:
            return found.item()
        return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1

    def _as_index(self, index: object) -> list[object]:
        """Return a mask as the positions that are true; of an unknown one all are."""
        if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return [index]
        found = self.values.of(index)
        found = torch.ones(index.shape, dtype=torch.bool) if found is None else found
        return [self._fake(each.contiguous()) for each in found.nonzero(as_tuple=True)]

    def _put(self, args: Args) -> Args:
        """Return the arguments of an index_put by a mask with positions; one number fills without a wait."""
        if args[2].numel() > 1 or isinstance(args[2], FakeTensor):
            self.waits_for("mask")
        return args[0], [part for each in args[1] for part in self._as_index(each)], *args[2:]

    def _dynamic(self, func: OpOverload, args: Args, kwargs: Kwargs) -> object:
        self.waits_for(name_of(func))
        if func is aten.index.Tensor:
            return self._run(func, (args[0], [part for each in args[1] for part in self._as_index(each)]), kwargs)
        if func is aten.masked_select.default:
            return self._run(aten.index.Tensor, (args[0].expand_as(args[1]), self._as_index(args[1])), {})
        found = self.values.of(args[0])
        found = torch.ones(args[0].shape, dtype=args[0].dtype) if found is None else found
        out = func(found, *args[1:], **kwargs)
        return tree_map(lambda each: self._fake(each) if isinstance(each, Tensor) else each, out)

    def _fake(self, value: Tensor) -> FakeTensor:
        """Return a tensor on the GPU with known values."""
        with self.fakes:
            made = cast(FakeTensor, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
        self.ledger.allocate(made, self.places.here)
        self.values.renew(made)
        self.values.set(made, value)
        return made

    def _to_host(self, target: Tensor, source: FakeTensor) -> Tensor:
        self.waits_for("copy to the host")
        found = self.values.of(source)
        return target.fill_(1) if found is None else target.copy_(found)

    def _landed(self, value: object) -> object:
        """Return a result on the CPU as a real tensor, and any other as it is."""
        if not isinstance(value, FakeTensor) or value.device.type != "cpu":
            return value
        self.waits_for("copy to the host")
        found = getattr(value, "known_values", None)
        return torch.ones(value.shape, dtype=value.dtype) if found is None else found.clone()

    # ---- counting

    def _count(self, func: OpOverload, args: Args, kwargs: Kwargs, out: object) -> Cost | None:
        """Count what an operation allocated and cost; return its cost, None: it started no kernel."""
        results = [each for each in tree_leaves(out) if isinstance(each, FakeTensor) and each.device.type == "cuda"]
        here = cache(self.places.here)
        for each in results:
            if each.device.index not in (None, 0):
                self._fault(f"a tensor on {each.device}, and this rank's device is cuda:0")
            if each.dtype == torch.float64 and each.numel() > MOST_FP64 and not self.ledger.wants_float64:
                self._fault(f"a float64 tensor of {list(each.shape)}")
            if self._inside or self.ledger.allocate(each, here):
                self.values.renew(each)
        cost = self._cost(func, args, kwargs, out, results)
        if cost and not self._inside:
            self._book(cost, here().line)
        return cost

    def _cost(
        self, func: OpOverload, args: Args, kwargs: Kwargs, out: object, results: Sequence[FakeTensor]
    ) -> Cost | None:
        name, written = name_of(func), mutated(func, args, kwargs)
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, FakeTensor)]
        old = {each.untyped_storage()._cdata for each in inputs}
        is_view = not written and all(each.untyped_storage()._cdata in old for each in results)
        if name in NO_KERNEL or not (results or written) or is_view or (name == "copy_" and is_itself(*args[:2])):
            return None
        reads = 0 if name in ("zero_", "fill_") else sum(map(bytes_of, inputs))
        touched, flops = reads + sum(map(bytes_of, results or written)), self._flops(func, args, kwargs, out)
        resource, seconds = self.clock.operation(name, flops, touched, (results or written)[0].dtype)
        return Cost(name, flops, touched, resource, seconds)

    def _book(self, cost: Cost, line: str) -> None:
        section = self.ledger.section
        section.kernels[cost.name] += 1
        section.touched[cost.name] += cost.touched
        section.flops[cost.name] += cost.flops
        section.seconds[line] += cost.seconds
        section.by_resource[cost.resource] += cost.seconds
        self.ledger.spend(cost.seconds)

    def _flops(self, func: OpOverload, args: Args, kwargs: Kwargs, out: object) -> int:
        packet = func._overloadpacket
        if "attention" in packet.__name__:
            return attention_flops(packet.__name__, args)
        counter = flop_registry.get(packet)
        return counter(*args, **kwargs, out_val=out) if counter else 0

    # ---- collectives

    def _collective(
        self, func: OpOverload, args: Args, kwargs: Kwargs, leaves: Sequence[object], fakes: bool
    ) -> object:
        name, tensors = name_of(func).rstrip("_"), [each for each in leaves if isinstance(each, Tensor)]
        group = next((found for each in leaves if (found := group_of(each)) is not None), None)
        size, backend = (group.size(), self.backends.get(group.group_name, "both")) if group else (1, "both")
        if tensors and name != "barrier":
            self._check_collective(name, tensors, backend)
        sent = max(map(bytes_of, tensors), default=0)
        if name in ("allgather", "gather", "scatter", "alltoall"):
            sent = sum(map(bytes_of, (each for each in tree_leaves(args[0]) if isinstance(each, Tensor))))
            if fakes and name == "allgather":  # NCCL gathers into one flat tensor first
                self.ledger.hold(sent)
        wait = None
        if size > 1 and (fakes or name in ("send", "recv")):
            wait = self._count_collective(f"{name} in {size}", sent, size)
        later = wait if wait and fakes and starts_early(func, args, kwargs) else None
        if wait and not later:
            wait()
        if not fakes:
            return func(*args, **kwargs)
        self._spread(name, size, args, tensors)
        work = (PythonCallbackWork(later) if later else FakeWork()).boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _check_collective(self, name: str, tensors: Sequence[Tensor], backend: str) -> None:
        hosts = [not isinstance(each, FakeTensor) for each in tensors]
        if any(hosts) and not all(hosts):
            self._fault(f"{name} of tensors on the CPU and on the GPU")
        if all(hosts) and backend == "nccl":
            self._fault(f"{name} of a tensor on the CPU in a group of NCCL")
        if not any(hosts) and backend == "gloo":
            self._fault(f"{name} of a tensor on the GPU in a group of gloo")
        for each in tensors if not any(hosts) else ():
            if each.dtype not in NCCL_DTYPES:
                self._fault(f"{name} of {each.dtype}, which NCCL does not have")
            if not each.is_contiguous():
                self._fault(f"{name} of a tensor {list(each.shape)} that is not contiguous")

    def _count_collective(self, name: str, sent: int, size: int) -> Callable[..., bool]:
        """Count a collective and start it; return a function that waits for it, of which only the wait takes time."""
        section, line = self.ledger.section, self.places.here().line
        section.calls[name] += 1
        section.sent[name] += sent
        network = "links" if size <= NODE else "network between nodes"
        ended = self.ledger.start_collective(network, self.clock.collective(name.split()[0], sent, size))

        def wait(_: object = None) -> bool:
            seconds = ended()
            self.ledger.section.by_resource["communication"] += seconds
            self.ledger.section.seconds[f"{name}, {line}"] += seconds
            return True

        return wait

    def _spread(self, name: str, size: int, args: Args, tensors: Sequence[Tensor]) -> None:
        """Keep known values known: the other ranks are taken to have the same."""
        if name == "broadcast":
            return
        if name == "allreduce":
            for each in tensors:
                value = self.values.of(each)
                if value is not None and self.reduces_by == dist.ReduceOp.SUM and value.dtype != torch.bool:
                    value.mul_(size)
            return
        part = self.values.of(args[1]) if name == "_allgather_base" else None
        if part is not None:
            whole = part.repeat(size, *(1 for _ in part.shape[1:])).reshape(args[0].shape)
            self.values.renew(args[0])
            self.values.set(args[0], whole)
            return
        for each in tensors:
            if isinstance(each, FakeTensor):
                self.values.forget(each)
