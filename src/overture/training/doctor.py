"""What can be known of a run before it is paid for: a finding on each part, ok, warning or stop."""

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from composer.core import Time

from overture.check import check_data
from overture.config.rules import sharding_problems
from overture.config.schema import Config, FSDPConfig
from overture.data.inspect import ledger_figures, sample_lines, samples
from overture.data.integrity import read_index
from overture.data.schema import INDEX
from overture.data.shards import Split
from overture.errors import OvertureError
from overture.models.build import load_network
from overture.models.trainable import freeze_others
from overture.offline import in_reach
from overture.tokenizer import load_tokenizer
from overture.training import resume
from overture.training.cores import host_memory
from overture.training.network import check_splits
from overture.training.rehearsal import Rehearsal, rehearse, too_large
from overture.training.run_folder import check_run_folder, refuse_lost_run
from overture.training.sharding import layer_kinds, parallelism
from overture.training.tasks import TASKS

ROOT = Path(__file__).parents[3]
PINNED = ("requirements.txt", "requirements-torch2.11.txt")
PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "transformers", "peft", "omegaconf")
GIB = 2**30
SAMPLED = 8 * GIB  # bytes of a split that are read to verify it: half a minute of a slow disk
UNTRIED = "too large to be tried whole, as one process does it: what activations take is not known"
RANKS = tuple(2**n for n in range(11))
STATE = ("weights", "gradients", "optimizer", "moving average")  # what shards divide


class Finding(NamedTuple):
    part: str
    verdict: str  # ok, warning or stop
    text: str
    more: tuple[str, ...] = ()  # lines


def examine(config: Config) -> Iterator[Finding]:
    """Look at a config's data, machine and model; train a few steps of it, and write nothing but
    the shards that are fetched or unpacked for it.

    A part that raises one of our errors is a stop of that text, and what needs it is left out.
    """
    yield Finding("config", "ok", f"{config.task}, run_name {config.run_name}")
    yield from _versions()
    yield _hub(config)
    try:
        yield _run_folder(config)
        check_data(config, SAMPLED)
        yield from _data(config, remote=False)
        room = memory_there()
        held, besides, saved = yield from _weights(config, room)
        if held > room:
            yield from _untried(config, saved)
            return
        # Tried whole, as one process has nobody to share with.
        found = rehearse(replace(config, fsdp_config=None), room)
        yield from _data(config, remote=True)
        yield Finding("model", "ok", config.model.name, tuple(found.described))
        yield Finding("attention", "ok", found.attention)
        yield _step(found)
        yield _memory(config, found, room, besides)
        yield _time(config, found)
        yield _disk(config, found.checkpoint)
    except OvertureError as error:
        yield Finding("run", "stop", str(error))
    except torch.cuda.OutOfMemoryError as error:
        sharded = config.fsdp_config is not None
        verdict, text = ("warning", UNTRIED) if sharded else ("stop", too_large(config))
        yield Finding("memory", verdict, f"{text}; {str(error).splitlines()[0][:120]}")


def _run_folder(config: Config) -> Finding:
    try:
        folder = check_run_folder(config)
        if found := resume.interrupted(config, ours=False):
            return Finding("run folder", "ok", f"the run goes on from {found[0]}")
        refuse_lost_run(config)
    except OvertureError as error:
        return Finding("run folder", "stop", str(error))
    text = f"{folder} {'has no checkpoint here' if folder.exists() else 'is new'}"
    text += f"; {config.save_folder} was not looked at" * ("://" in str(config.save_folder))
    return Finding("run folder", "ok", text)


def _versions() -> Iterator[Finding]:
    here = {}
    for package in PACKAGES:
        try:
            here[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            here[package] = "missing"
    other = {}
    for name in filter(lambda name: (ROOT / name).is_file(), PINNED):
        pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / name).read_text(), re.M))
        other[name] = [f"{p} {v} (tested: {pins.get(p)})" for p, v in here.items()
                       if pins.get(p) != v]  # fmt: skip
    if not all(other.values()):
        yield Finding("versions", "ok", f"torch {here['torch']} and the others as they were tested")
    elif other:
        least = min(other.values(), key=len)
        yield Finding("versions", "warning", f"not as tested: {', '.join(least)}")


def _hub(config: Config) -> Finding:
    wanted = {config.tokenizer_name or config.model.name}
    wanted |= {config.model.name} if config.model.pretrained else set()
    if not (names := sorted(name for name in wanted if not Path(name).exists())):
        return Finding("hub", "ok", "not needed: model and tokenizer are made here or lie here")
    from huggingface_hub import auth_check, constants, model_info

    needed = f"{', '.join(names)} must be in the cache"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", "ok", f"offline, as HF_HUB_OFFLINE says: {needed}")
    if not in_reach(names[0]):
        return Finding("hub", "warning", f"{constants.ENDPOINT} cannot be reached: {needed}")
    for name in names:
        try:
            model_info(name, timeout=5)
            auth_check(name)  # which of a gated one says whether it is open to us
        except Exception as error:  # of requests, urllib3 and the hub, a dozen kinds
            reason = " ".join(str(error).split())[:120]
            return Finding("hub", "warning", f"{name}: {reason}; a copy in the cache would do")
    return Finding("hub", "ok", f"{', '.join(names)}: there")


def _data(config: Config, remote: bool) -> Iterator[Finding]:
    """Look at the splits that lie here, or at those that are fetched, once their index is."""
    name, trained = config.tokenizer_name or config.model.name, config.streams(config.train_loader)
    for split_name, stream, _ in config.splits():
        folder = Path(stream.data_local) / stream.split
        if remote != (stream.data_remote is not None):
            continue
        split, lines = Split(folder), []
        figures = ledger_figures(split)
        shards = read_index(folder / INDEX)
        if stream in trained.values():
            tokenizer = load_tokenizer(name, config.model.trust_remote_code)
            numbers = sorted({0, len(split) // 2, len(split) - 1})
            if remote:  # of the shard that was the first to be fetched
                is_there = (folder / shards[0].raw.name).exists()
                numbers = range(min(3, len(split))) if is_there else ()
            for sample in samples(split, numbers, tokenizer):
                first = sample._replace(documents=sample.documents[:1])
                text = (line[:100] for line in sample_lines(first, colour=False) if line.strip())
                text = [line for line in text if not line.startswith(("  ids", "  lab"))]
                lines += text if len(text) < 10 else [*text[:4], "  ...", *text[-4:]]
        learned = f"; learned: {figures['learned']}" if "trained" in figures["tokens"] else ""
        size = sum((shard.packed or shard.raw).bytes for shard in shards)
        read = f"one shard in {step}" if (step := math.ceil(size / SAMPLED)) > 1 else "all shards"
        read = "shards are hashed as they arrive" if remote else f"{read} verified"
        text = f"{len(split):,} rows, {figures['tokens']} tokens{learned}; {read}"
        yield Finding(f"data, {split_name}", "ok", text, tuple(lines))


def _weights(config: Config, room: int) -> Iterator[Finding]:
    """Return the bytes that a model's weights take, made of nothing; a stop if there is no room.

    Behind them those that a rank with a shard holds besides, and those of a checkpoint without
    adapters.
    """
    name, trust = config.tokenizer_name or config.model.name, config.model.trust_remote_code
    tokenizer = load_tokenizer(name, trust)
    wanted = replace(config.model, pretrained=False, load_in_4bit=False, load_in_8bit=False)
    try:
        network = load_network(wanted, tokenizer, head=TASKS[config.task].head, hollow=True)
    except RuntimeError:  # a model that must see its numbers while it is made
        return 0, 0, 0
    count = sum(p.numel() for p in network.parameters())
    held = sum(p.nbytes for p in network.parameters())
    if config.model.load_in_4bit or config.model.load_in_8bit:  # its tables are left as they are
        ends = (network.get_input_embeddings(), network.get_output_embeddings())
        tables = {p for end in filter(None, ends) for p in end.parameters()}
        held = sum(p.nbytes for p in tables)
        held += (count - sum(p.numel() for p in tables)) // (2 if config.model.load_in_4bit else 1)
    saved = 0
    if config.trainable == "lora":
        network.requires_grad_(False)
    else:
        freeze_others(network, config.trainable, TASKS[config.task].head)
        saved = resume.checkpoint_bytes(config, network)
    if config.trainable == "all":
        held += held + 8 * count  # gradients, and two float32 of Adam's
    if config.fsdp_config is not None:
        parallelism(config, network)
    what = "weights, gradients and optimizer" if config.trainable == "all" else "weights"
    besides = 0 if config.fsdp_config is None else _gathered(config, network)
    if besides:
        yield _shards(what, besides, held, room, _in_hosts(config, network))
    elif held > room:
        need = f"{held / GIB:.1f} GiB, {room / GIB:.1f} are there"
        fault = f"{count:,} parameters: {what} take {need}"
        ways = ["model.dtype=bfloat16"] * (config.trainable == "lora" and wanted.dtype == "float32")
        ways += ["trainable=lora"] * _may_be_lora(config)
        ways.append("or a larger device")
        if not [*sharding_problems(replace(config, fsdp_config=FSDPConfig()))]:
            ways.append("or several, with fsdp_config={}")
            if torch.cuda.is_available():
                ways.append("or the host's memory, with fsdp_config.cpu_offload=true")
        yield Finding("memory", "stop", "; ".join([fault, *ways]))
    return held, besides, saved


def _untried(config: Config, saved: int) -> Iterator[Finding]:
    """Say what can be said of a run whose model is too large to be tried here."""
    name = config.tokenizer_name or config.model.name
    ledgers = check_splits(config, load_tokenizer(name, config.model.trust_remote_code))
    yield from _data(config, remote=True)
    trained = config.streams(config.train_loader)
    if len(trained) == 1:
        ledger = next(iter(ledgers.values()))
        samples, tokens = ledger["samples"], ledger["tokens"]["total"]
        steps, tokens = _length(config, samples, tokens / samples)
        text = f"{steps:,} steps, {tokens:,.0f} tokens; their pace is not known, as none was taken"
        yield Finding("time", "ok", text)
    resume.check_room(config, saved)
    yield _disk(config, saved)


def _may_be_lora(config: Config) -> bool:
    given = config.model.pretrained and config.task != "masked_lm"
    return config.trainable == "all" and given


def _gathered(config: Config, network: torch.nn.Module) -> int:
    """Return the bytes that every rank holds besides its shard.

    A layer's weights are gathered while it computes, and those of the next one ahead; what belongs
    to no layer, as the tables of words, stays from the first forward pass to the end of the step.
    Where all is trained, their gradients are there at its end, and a copy that ranks add up.
    """
    wide = 4 if config.precision == "fp32" else 2
    added = wide if config.fsdp_config.mixed_precision == "PURE" else 4
    kinds = layer_kinds(network)  # a list within a layer is no list of layers
    layers = [module for module in network.modules() if type(module).__name__ in kinds]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    apart = sum(p.numel() for p in network.parameters()) - sum(sizes)
    largest, trained = max(sizes, default=0), config.trainable == "all"
    return max(wide * (2 * largest + apart), (wide + added) * max(largest, apart) * trained)


def _offloaded(config: Config) -> bool:
    """Return whether a rank's shard lies elsewhere than where it computes."""
    return config.fsdp_config.cpu_offload and torch.cuda.is_available()


def _in_hosts(config: Config, network: torch.nn.Module) -> int:
    """Return the bytes that shards take of hosts' memory at their peak, 0 if they are elsewhere.

    Weights and gradients are pinned, of which torch takes a power of two for each. While shards
    are made rank zero has the whole weights too, and to gather a checkpoint those and the
    optimizer's two moments.
    """
    if not _offloaded(config):
        return 0
    sizes = [p.nbytes for p in network.parameters()]
    pinned = sum(1 << (size - 1).bit_length() for size in sizes)
    if config.trainable != "all":
        return pinned + sum(sizes)
    gathered = 3 * sum(sizes) * (config.fsdp_config.state_dict_type == "full")
    return 2 * pinned + 2 * sum(sizes) + gathered


def _shards(what: str, besides: int, held: int, room: int, in_hosts: int = 0) -> Finding:
    shown = ", ".join(f"{held / n / GIB:.1f} on {n}" for n in RANKS[1:])
    text = f"{what} in shards: GiB on each of so many ranks: {shown}; besides {besides / GIB:.1f}"
    if in_hosts:
        text = f"{what} in the hosts' memory: {in_hosts / GIB:.1f} GiB at once, of which this host "
        text += f"has {host_memory() / GIB:.1f} free; {besides / GIB:.1f} on each GPU"
    on_each = 0 if in_hosts else held
    least = next((n for n in RANKS if on_each / n + besides < 0.8 * room), None)
    if least is None:
        return Finding("shards", "stop", f"{text}, of which {room / GIB:.1f} are there: too large")
    text += f"; at least {least} ranks like this device of {room / GIB:.1f} GiB, activations apart"
    if in_hosts > 0.8 * host_memory():
        return Finding("shards", "warning", f"{text}: it takes several hosts, or a larger one")
    if held > room:
        return Finding("shards", "warning", f"{text}; {UNTRIED}")
    return Finding("shards", "ok", text)


def _step(found: Rehearsal) -> Finding:
    if not math.isfinite(found.loss):
        fault = f"the loss is {found.loss}: weights that are broken, or too large for the precision"
        return Finding("step", "stop", fault)
    if found.without:
        shown = ", ".join(found.without[:3]) + ", ..." * (len(found.without) > 3)
        fault = f"no gradient reaches {shown}, or none that is finite"
        return Finding("step", "stop", f"{fault}; leave them out of trainable")
    text = f"forward, backward and optimizer on the longest rows; loss {found.loss:.3f}"
    return Finding("step", "ok", f"{text}; a gradient reaches every trained tensor")


def _memory(config: Config, found: Rehearsal, room: int, besides: int = 0) -> Finding:
    """Judge a microbatch's peak, and name the cheapest changes that would make it fit.

    Where there are shards, `besides` is what a rank holds next to its own.
    """
    alone, ranks = sum(found.parts.values()), max(torch.cuda.device_count(), 1)
    per_rank = max(config.global_train_batch_size // ranks, 1)
    # Where there are several ranks, DDP keeps gradients a second time; each may have fewer rows.
    copy = 0 if config.fsdp_config or ranks == 1 else found.parts["gradients"]
    need = max(alone, alone + copy - max(found.rows - per_rank, 0) * found.per_row)
    predicted = max(need, found.loading)
    lines = [f"  {part:<22} {size / GIB:8.2f} GiB" for part, size in found.parts.items()]
    how = "a whole microbatch took" if found.whole else "foretold from fewer:"
    how = f"{found.rows} rows: {how}"
    if found.loading >= need:
        lines.append(f"  {'at once, when loading':<22} {found.loading / GIB:8.2f} GiB")
        how = f"loading the model, more than {found.rows} rows after it, takes"
    text = f"{how} {predicted / GIB:.2f} GiB, {room / GIB:.1f} are there"
    if copy:
        lines.append(f"  {'more on several ranks':<22} {copy / GIB:8.2f} GiB")
    # A CPU takes more than a few rows foretell, by up to as much again (RESULTS.md).
    share = 0.9 if found.whole or torch.cuda.is_available() else 0.5
    if need < share * room and found.loading < 0.9 * room:
        return Finding("memory", "ok", text, tuple(lines))
    if besides:
        state = sum(found.parts.get(part, 0) for part in STATE)
        rest, offloaded = need - state + besides, _offloaded(config)
        state = 0 if offloaded else state
        for n in RANKS[not offloaded :]:
            if state / n + rest < 0.9 * room:
                text = f"{text}; in shards {(state / n + rest) / GIB:.2f} on each of {n} ranks"
                return Finding("memory", "ok", text, tuple(lines))
    fixed, ways = alone + copy - found.rows * found.per_row, []
    loads = found.loading < 0.9 * room  # what it takes for rows to matter
    fewer = int((0.9 * room - fixed) // max(found.per_row, 1)) * loads
    if config.device_train_microbatch_size == "auto" and fewer > 0:
        text += f"; auto will take {fewer} or so at once"
        return Finding("memory", "ok", text, tuple(lines))
    sizes = range(1, min(fewer, found.rows - 1) + 1)
    if fitting := [n for n in sizes if per_rank % n == 0]:
        ways.append(f"device_train_microbatch_size={fitting[-1]}, at no other cost")
    if loads and not config.model.activation_checkpointing:
        ways.append("model.activation_checkpointing=true, a third more time")
    half = config.model.dtype != "float32" or config.fsdp_config is not None
    if config.trainable == "lora" and not half:
        saved = found.parts["weights"] / 2 / GIB
        ways.append(f"model.dtype=bfloat16, {saved:.1f} GiB less")
    if loads and _may_be_lora(config):
        saved = (found.parts["gradients"] + found.parts["optimizer"]) / GIB
        ways.append(f"trainable=lora, about {saved:.1f} GiB less")
    ways += ["a larger device"] * (not loads)
    verdict = "warning" if predicted <= room else "stop"
    return Finding("memory", verdict, "; or ".join([text, *ways]), tuple(lines))


def _length(config: Config, samples: int, tokens: float) -> tuple[int, float]:
    """Return the steps and tokens of a run over epochs of `samples` with so many tokens each."""
    batch = config.global_train_batch_size
    steps = samples // batch if config.train_loader.drop_last else -(-samples // batch)
    asked = Time.from_timestring(config.max_duration)
    per = {"ep": steps, "ba": 1, "sp": 1 / batch, "tok": 1 / (batch * tokens)}
    count = max(math.ceil(asked.value * per[asked.unit.value] - 1e-6), 1)
    return count, count * batch * tokens


def _time(config: Config, found: Rehearsal) -> Finding:
    count, tokens = _length(config, found.samples, found.tokens)
    micro = config.global_train_batch_size / found.rows  # batches, in each step
    seconds = count * (micro * found.seconds + found.update)
    hours = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"
    hours = hours if seconds > 90 else f"{math.ceil(seconds)} seconds"
    rate = tokens / seconds
    where = "one device" if torch.cuda.is_available() else "this CPU"
    text = f"{count:,} steps, {tokens:,.0f} tokens, {rate:,.0f} a second: {hours} on {where}"
    if torch.cuda.is_available():
        text += f" ({seconds / 3600:.2f} GPU-hours)"
    if config.fsdp_config is not None and _offloaded(config):
        text += " without cpu_offload, which is slower"
    return Finding("time", "ok", f"{text}, evaluations apart, if all rows were as the longest")


def _disk(config: Config, checkpoint: int) -> Finding:
    folder = resume.local_folder(config).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free / GIB
    text = f"{free:.1f} GiB free at {there}, enough for the checkpoints kept"
    each = f"of {checkpoint / GIB:.2f} GiB each" if checkpoint else "which hold adapters alone"
    return Finding("disk", "ok", f"{text}, {each}")


def memory_there() -> int:
    """Return the bytes that are free: of the first GPU, else of this machine or its container."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else host_memory()
