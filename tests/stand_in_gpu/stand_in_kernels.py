"""torch's CUDA operators, answered by those of the CPU in the same memory.

With `cudart.c` in the place of CUDA's libraries, torch finds a GPU, allocates, copies and waits by
its own code; but that has no kernels. Here each operator gets one of Python instead, which runs the
CPU's on the memory of its tensors. So a whole run takes its route for a GPU: which device a tensor
is on, autocast, streams, the allocator, autograd, FSDP2 and DDP are real; NCCL is gloo, and the
numbers, the speed and what Triton compiles are not those of a GPU.
"""

import ctypes
import faulthandler
import warnings
from collections.abc import Callable
from typing import Any

import stand_in_flash as flash
import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_map

# What torch does to tensors without a kernel.
OWN = {
    "as_strided", "empty", "empty_strided", "is_pinned", "is_set_to", "new_empty_strided",
    "record_stream", "resize_", "set_", "unfold", "view", "view_as_complex", "view_as_real",
    "_local_scalar_dense", "_pin_memory", "_reshape_alias", *flash.OPERATORS,
}  # fmt: skip
# Those that take tensors of several devices, on a GPU too.
MIXED = {"copy_", "index", "index_put_", "_index_put_impl_", "_foreach_norm"}
LIBRARIES = []  # would take their operators with them


class MixedDevices(RuntimeError):
    """What a GPU would refuse: tensors of it and of the host together."""


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor of the CPU in the memory of one of the GPU."""
    size, place = tensor.untyped_storage().nbytes(), tensor.untyped_storage().data_ptr()
    if not size or not place:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    memory = torch.frombuffer((ctypes.c_char * size).from_address(place), dtype=torch.uint8)
    alias = torch.empty(0, dtype=tensor.dtype).set_(
        memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
    )
    alias = alias.conj() if tensor.is_conj() else alias
    return torch._neg_view(alias) if tensor.is_neg() else alias


def on_gpu(tensor: Tensor) -> Tensor:
    """Return a copy on the GPU, with the same strides."""
    made = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cuda")
    _move(tensor, made)
    return made


def _move(source: Tensor, target: Tensor) -> None:
    if source.numel():
        steps = zip(source.size(), source.stride(), strict=True)
        reach = 1 + sum((size - 1) * stride for size, stride in steps)
        ctypes.memmove(target.data_ptr(), source.data_ptr(), reach * source.element_size())


def answered(function: Any, name: str, mixed: bool = False) -> Callable[..., Any]:
    """Return what runs an operator of the CPU on tensors of the GPU.

    Raises MixedDevices where others than single numbers are on the CPU, unless it is `mixed`.
    """
    declared = function._schema.arguments

    def run(*args: Any, **kwargs: Any) -> Any:
        places, aliases = [], {}  # of each tensor; of its alias: both, and the shape before

        def convert(value: Any) -> Any:
            if isinstance(value, Tensor):
                places.append((value.device.type, value.dim()))
                if value.is_cuda:
                    alias = on_cpu(value)
                    aliases[id(alias)] = alias, value, alias.shape
                    return alias
            if isinstance(value, torch.device):
                return torch.device("cpu")
            return None if isinstance(value, torch.Generator) else value

        args, kwargs = tree_map(convert, (args, kwargs))
        if aliases and any(kind == "cpu" and dim for kind, dim in places) and not mixed:
            raise MixedDevices(f"{name}: tensors on the GPU and the CPU: {places}")
        into = name.endswith("_") or name == "index"
        if aliases and places[0][0] == "cpu" and into and name != "copy_":
            raise MixedDevices(f"{name}: a tensor of the CPU is changed by the GPU: {places}")
        kwargs.pop("pin_memory", None)
        call = function
        numbers = (a for a, of in zip(args, declared, strict=False) if "Tensor" in str(of.type))
        if any(isinstance(a, int | float) for a in numbers):  # of which the dispatcher made tensors
            call = function._overloadpacket
        found = call(*args, **kwargs)
        for alias, tensor, shape in aliases.values():
            if alias.shape != shape:  # an output that was given another shape
                tensor.resize_(alias.shape)
                _move(alias, tensor)

        def back(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return aliases[id(value)][1] if id(value) in aliases else on_gpu(value)

        return tree_map(back, found)

    return run


def collective(function: Any) -> Callable[..., Any]:
    """Return what runs a collective of gloo on tensors of the GPU, and waits for it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        aliases = {}

        def convert(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_cuda:
                alias = on_cpu(value)
                aliases[id(alias)] = value
                return alias
            if isinstance(value, Tensor) and distributed_c10d.get_backend() == "nccl":
                raise MixedDevices(f"{function}: NCCL is given a tensor of the CPU")
            return value

        def back(value: Any) -> Any:
            if isinstance(value, torch.ScriptObject):
                torch._C._distributed_c10d.Work.unbox(value).wait()
            return aliases.get(id(value), value)

        args, kwargs = tree_map(convert, (args, kwargs))
        return tree_map(back, function(*args, **kwargs))

    return run


def install() -> None:
    """Give torch's operators for CUDA their answers, and NCCL's name to gloo."""
    faulthandler.enable()  # where a kernel was launched all the same
    names = [name for name in torch._C._dispatch_get_all_op_names()
             if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]  # fmt: skip
    aten, c10d = (torch.library.Library(of, "IMPL") for of in ("aten", "c10d"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a kernel already
        for full in [*names, "aten::copy_"]:
            of, name = full.split("::")
            base, _, overload = name.partition(".")
            if of == "c10d":
                c10d.impl(name, collective(getattr(torch.ops.c10d, base).default), "CUDA")
            elif of == "aten" and base not in OWN and "cudnn" not in base:
                function = getattr(getattr(torch.ops.aten, base), overload or "default")
                aten.impl(name, answered(function, base, base in MIXED), "CUDA")
        for name, function in flash.OPERATORS.items():
            aten.impl(name, function, "CUDA")
    LIBRARIES.extend((aten, c10d))
    for enable in ("flash", "mem_efficient", "cudnn"):  # SDPA of plain operators is left
        getattr(torch.backends.cuda, f"enable_{enable}_sdp")(False)
    asked, begin = {}, distributed_c10d.init_process_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        asked["backend"] = backend
        begin("gloo", *args, **kwargs)

    for module in (torch.distributed, distributed_c10d):
        module.init_process_group = init_process_group
        module.get_backend = lambda group=None: asked["backend"]
