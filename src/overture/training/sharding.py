"""A model in shards: each rank keeps a part of weights, gradients and optimizer (FSDP2).

Composer's FSDP2 on its own would shard a model as one piece, and leave our forward pass, which goes
to the backbone and not through the model, without its weights. Only rank zero reads a model's
weights; the others make it of nothing (the meta device) and are sent their shards.
"""

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from composer.core import State
from composer.devices import DeviceGPU
from composer.distributed import fsdp2, prepare_distributed
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn import ModuleList

from overture.config.schema import Config
from overture.errors import ConfigError

COMPOSERS_SYNC = prepare_distributed.sync_module_states
PREFIX = "model."  # of weights in the shards
METADATA = ".metadata"  # of torch's distributed checkpoints: which shard is in which file


def parallelism(config: Config, network: Any) -> ParallelismConfig | None:
    """Return how Composer is to shard a network, by its layers, whose list is marked in it.

    Raises ConfigError for a model without a list of layers, which would be one piece.
    """
    if config.fsdp_config is None:
        return None
    if not (kinds := layer_kinds(network)):
        fault = f"a {type(network).__name__} does not say which of its modules are layers"
        raise ConfigError(f"fsdp_config: {fault}; leave it out")
    for name, p in network.named_parameters():
        if p.requires_grad and re.search(r"\.experts\.\d+\.", name):
            fault = f"{name} gets no gradient on a rank that sends it no token, and FSDP2 would add"
            raise ConfigError(f"fsdp_config: {fault} others in its place; leave experts out")
    for module in network.modules():
        module._fsdp_wrap = type(module).__name__ in kinds
    network._fsdp_wrap = True
    fsdp2.fully_shard, prepare_distributed.sync_module_states = _shard_and_let_go, COMPOSERS_SYNC
    # Composer's own sharded checkpoints hold its clocks too, and load on as many ranks only.
    options = vars(config.fsdp_config) | {"state_dict_type": "full"}
    if options.pop("cpu_offload"):
        _refuse_buffers(network)
        policy = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        fsdp2.fully_shard = partial(_shard_and_let_go, offload_policy=policy)
        prepare_distributed.sync_module_states = _send_to_hosts
    return ParallelismConfig(fsdp2=FSDP2Config(**options))


def speak_from_hosts() -> None:
    """Let ranks with GPUs send each other what lies in their hosts' memory too: by gloo."""
    DeviceGPU.dist_backend = "cuda:nccl,cpu:gloo"


def _refuse_buffers(network: Any) -> None:
    """Raise ConfigError for buffers that are kept with the weights: torch reads a state of one
    device alone.
    """
    weights = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    if kept := sorted(network.state_dict().keys() - weights):
        fault = f"a {type(network).__name__} keeps {kept[0]} with its weights, but on the GPU"
        raise ConfigError(f"fsdp_config.cpu_offload: {fault}; leave it out")


def _send_to_hosts(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Send the ranks their shards, as Composer does, but into their hosts' memory: from a GPU torch
    would refuse them. Buffers, which are in no shard, go to the device.
    """
    model.to("cpu") if dist.get_global_rank() == 0 else model.to_empty(device="cpu")
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    states.set_model_state_dict(model, weights, options=options)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer = buffer.to(_device())
            dist.broadcast(buffer, src=0)


def _device() -> torch.device:
    """Return where this rank computes, whatever its shards lie on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _shard_and_let_go(module: Any, **options: Any) -> Any:
    """Shard a module as torch does, and let go of its whole weights, of which a rank has its shard
    now. Composer keeps them by name, and the optimizer too, until the last module is sharded: on a
    GPU, where torch has moved them, rank zero would have to hold the whole model.
    """
    whole = [p for p in module.parameters() if not isinstance(p, DTensor)]
    sharded = fully_shard(module, **options)
    for p in whole:
        p.data = p.data.new_empty(0)
    return sharded


def layer_kinds(network: Any) -> set[str]:
    """Return the classes of a model's layers, of those transformers keep together on a device."""
    named = {*(getattr(network.base_model, "_no_split_modules", None) or ()),
             *(getattr(network, "_no_split_modules", None) or ())}  # fmt: skip
    layers = [m for stack in network.modules() if isinstance(stack, ModuleList) for m in stack]
    return {type(m).__name__ for m in layers} & named


def gather_in_forward(model: Any) -> None:
    """Let a ComposerModel's forward pass gather the weights that belong to no layer."""
    root, own = model.model, model.forward
    if not isinstance(root, FSDPModule):
        return
    faults = []  # of ranks but the first
    for name, module in root.named_modules():
        # Left behind on the meta device: transformers keep the frequencies of rotation twice.
        if "original_inv_freq" in vars(module):
            module.original_inv_freq = module.inv_freq
        held = {key: value for key, value in vars(module).items() if torch.is_tensor(value)}
        faults += [f"{name}.{key}" for key, value in held.items() if value.is_meta]
    if found := next(filter(None, dist.all_gather_object(faults)), None):
        fault = f"a {type(root).__name__} has tensors that cannot be sent ({found[0]})"
        raise ConfigError(f"fsdp_config: {fault}; leave it out")
    given: list[Any] = []
    # Not as an argument: FSDP2 would round labels that are numbers to the type of the weights. But
    # with one, or on a GPU it fails, where it moves arguments.
    root.forward_of_batch = lambda _: own(given.pop())
    register_fsdp_forward_method(root, "forward_of_batch")

    def forward(batch: Any) -> Any:
        given.append(batch)
        return root.forward_of_batch(None)

    model.forward = forward
    if (times := _times_too_large()) != 1:
        own_loss = model.loss

        def loss(outputs: Any, batch: Any) -> torch.Tensor:
            found = own_loss(outputs, batch)
            if found.requires_grad:
                found.register_hook(lambda gradient: gradient / times)
            return found

        model.loss = loss


def _times_too_large() -> float:
    """Return how many times too large a mean over the ranks is: gloo, asked for one, gives the sum,
    and says nothing. Adam would hardly show it in gradients; clipping, and other optimizers, would.
    """
    ones = torch.ones(dist.get_world_size(), device=_device())
    mean = ones.new_empty(1)
    torch.distributed.reduce_scatter_tensor(mean, ones, op=torch.distributed.ReduceOp.AVG)
    return mean.item()


def whole_weights(network: Any) -> dict[str, torch.Tensor] | None:
    """Return the state dict of a sharded network on rank zero, on the CPU; None of another one.

    All ranks take part.
    """
    if not isinstance(network, FSDPModule):
        return None
    options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, seen = states.get_model_state_dict(network, options=options), set()
    for name, p in network.named_parameters(remove_duplicate=False):
        if p in seen:  # tied, and written once
            weights.pop(name, None)
        seen.add(p)
    return weights


def rest_of_state(state: State) -> dict[str, Any]:
    """Return what Composer keeps of a state, but for its weights and its optimizer."""
    every = state.serialized_attributes
    state.serialized_attributes = [n for n in every if n not in ("model", "optimizers")]
    try:
        return state.state_dict()
    finally:
        state.serialized_attributes = every


def save_shards(state: State, folder: Path) -> None:
    """Write this rank's shards of weights and optimizer; all ranks take part.

    Raises OSError if any of them could not.
    """
    model, optimizer = states.get_state_dict(state.model, state.optimizers)
    try:
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:  # not even an Exception
        raise OSError(" ".join(str(error).split())[-300:]) from None


def missing_shards(folder: Path) -> set[str]:
    """Return the files of a checkpoint in shards that are not in its folder."""
    known = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
    return {of.relative_path for of in known} - {path.name for path in folder.iterdir()}


def load_shards(state: State, folder: Path, weights_only: bool, strict: bool) -> None:
    """Read what this rank holds of weights and optimizer from the shards of any number of ranks."""
    options = states.StateDictOptions(strict=strict)
    if weights_only:
        model = states.get_model_state_dict(state.model)
        dcp.load({"model": model}, checkpoint_id=folder)
        states.set_model_state_dict(state.model, model, options=options)
        return
    model, optimizer = states.get_state_dict(state.model, state.optimizers)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    states.set_state_dict(
        state.model, state.optimizers, model_state_dict=model, optim_state_dict=optimizer,
        options=options,
    )  # fmt: skip


def shard_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the names and shapes of the weights in the shards of a checkpoint."""
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name.removeprefix(PREFIX): list(of.size) for name, of in known.items()
            if name.startswith(PREFIX)}  # fmt: skip


def whole_from_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights in the shards of a checkpoint, put together on the CPU."""
    known = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(of.size, dtype=of.properties.dtype)
        for name, of in known.items() if name.startswith(PREFIX)
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it loads in a single process
        dcp.load(weights, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
