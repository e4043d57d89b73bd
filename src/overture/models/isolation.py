"""The proof on the model itself that a token sees what it may: not ahead, no other document, no
padding.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from overture.errors import ConfigError
from overture.models.attention import BLOCK, document_mask
from overture.models.encoder import encoder_inputs

SHORT = 24  # tokens of the rows that are padded


def proven(prove: Callable[..., None], packed: bool) -> str:
    """Return in words what one of the proofs below has shown."""
    unseen = ["a later one"] * (prove is prove_isolation) + ["another document"] * packed
    unseen += ["padding"] * (prove is not prove_isolation)
    return f"tried on this model and device: no token sees {' or '.join(unseen)}"


def in_evaluation(ask: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function ask its model without dropout and gradients, and leave it as it was."""

    @wraps(ask)
    @torch.no_grad()
    def asked(model: Any, *args: Any, **kwargs: Any) -> Any:
        was_training = model.training
        model.eval()
        try:
            return ask(model, *args, **kwargs)
        finally:
            model.train(was_training)

    return asked


@in_evaluation
def prove_isolation(model: Any, vocab_size: int, longest: int, packed: bool) -> None:
    """Raise ConfigError if a token sees what comes after it or, where `packed`, another document.

    Kernels are handed the documents in ways that a family may ignore, silently. The model is one of
    transformers', where it will be trained; it takes `longest` tokens, of ids below `vocab_size`.
    """
    length = min(2 * BLOCK + 40, longest)  # more than a block, so that borders of blocks count
    first = length // 3 if packed else 0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (1, length), generator=generator).to(model.device)
    places = torch.arange(length, device=model.device)
    starts = torch.where(places < first, 0, first)

    def logits(begin: int) -> Tensor:
        mask = document_mask(model, (starts[None, begin:] - begin).to(torch.int32))
        return model(
            input_ids=ids[:, begin:], position_ids=(places - starts)[None, begin:],
            attention_mask=mask, use_cache=False,
        ).logits  # fmt: skip

    together, alone = logits(0)[:, first:], logits(first)
    later = max(length // 8, 1)
    ids[:, -later:] = (ids[:, -later:] + 1) % vocab_size
    earlier = logits(first)
    name = type(model).__name__
    if _shifts(earlier[:, :-later], alone[:, :-later]):
        fault = f"tokens of a {name} see what comes after them"
        raise ConfigError(f"model.name: {fault}; try model.attention=eager")
    if _shifts(together, alone):
        fault = f"packed documents see each other in a {name}"
        raise ConfigError(f"model.name: {fault}; convert the data again with --packing none")


def _shifts(logits: Tensor, alone: Tensor) -> bool:
    """Return whether a token's logits are other ones than alone, beyond rounding."""
    moved = (logits - alone).float().square().mean(-1).sqrt().max().item()
    # A leak shifts them by about their own spread; rounding to bfloat16 by 3 steps of the type in
    # 16 layers, by more in more. The greatest of millions of logits would say less.
    return not moved <= max(0.02, 8 * _rounding(alone)) * alone.float().std().item()


def _rounding(logits: Tensor) -> float:
    """Return the step of the type that logits were computed in, which may have been widened."""
    kind, step = logits.device.type, torch.finfo(logits.dtype).eps
    if torch.is_autocast_enabled(kind):
        step = max(step, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    return step


@in_evaluation
def prove_encoder(model: Any, vocab_size: int, longest: int, packed: bool) -> None:
    """Raise ConfigError if an encoder's tokens see padding or, where `packed`, another document.

    Takes what `prove_isolation` takes. A document is asked alone, as its family knows it, and in a
    row with padding and another document, as it will be trained.
    """
    length = min(2 * BLOCK + 40, longest)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (1, length), generator=generator).to(model.device)
    first, end = length // 3, length - max(length // 8, 1)

    def logits(begin: int) -> Tensor:
        """Return those of the document from `first` to `end` in the row that starts at `begin`."""
        places = torch.arange(begin, length, device=model.device)
        starts = torch.where(places < first, 0, first - begin).masked_fill_(places >= end, -1)
        positions = places - begin - starts.clamp(min=0)
        spans = 2 + (begin < first)
        row = {"num_tokens": [end - begin], "num_spans": [spans]}
        given = encoder_inputs(model, starts[None].to(torch.int32), positions[None], **row)
        return model(input_ids=ids[:, begin:], **given).logits[:, first - begin : end - begin]

    def shifts(begin: int) -> bool:
        try:
            return _shifts(logits(begin), alone)
        except (RuntimeError, TypeError, ValueError, IndexError):  # it takes no such mask
            return True

    name = type(model).__name__
    every = torch.ones(1, end - first, dtype=torch.long, device=model.device)
    alone = model(input_ids=ids[:, first:end], attention_mask=every).logits
    if shifts(first):
        fault = f"padding changes what the tokens of a {name} become"
        raise ConfigError(f"model.name: {fault}; try model.attention=sdpa")
    if packed and shifts(0):
        fault = f"packed documents see each other in a {name}"
        raise ConfigError(f"model.name: {fault}; convert the data again with --packing none")


@in_evaluation
def prove_padding(model: Any, vocab_size: int, longest: int, packed: bool) -> None:
    """Raise ConfigError if padding behind a row changes what a model with a head makes of it, or if
    a decoder sees the labels to come. Arguments as for `prove_isolation`; rows are never packed.
    """
    room, padding = min(2 * SHORT, longest), model.config.pad_token_id
    short = min(SHORT, room - 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (2, 4, room), generator=generator).to(model.device)
    source, target = ids.masked_fill_(ids == padding, (padding + 1) % vocab_size)
    mask, decodes = torch.ones_like(source), model.config.is_encoder_decoder
    mask[:, short:], source[:, short:] = 0, padding

    def logits(of_source: int, of_target: int) -> Tensor:
        """Return those of the row, or of the first `short` places of what is decoded."""
        given = {"input_ids": source[:, :of_source], "attention_mask": mask[:, :of_source]}
        if not decodes:
            return model(**given).logits
        given |= {"decoder_input_ids": target[:, :of_target], "use_cache": False}
        return model(**given).logits[:, :short]

    alone, padded, longer = logits(short, short), logits(room, short), logits(short, room)
    bound = max(1e-3, 16 * _rounding(alone)) * alone.abs().max().item()
    name = type(model).__name__
    for others, fault in {
        padded: f"padding changes what a {name} makes of a row",
        longer: f"tokens of a {name}'s decoder see what comes after them",
    }.items():
        if not (others - alone).abs().max().item() <= bound:
            raise ConfigError(f"model.name: {fault}; try model.attention=eager")
