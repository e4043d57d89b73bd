"""How encoders are asked: what keeps documents apart in them, and their heads on few states."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from overture.models.attention import document_mask


def encoder_inputs(
    model: Any, starts: Tensor, position_ids: Tensor, num_tokens: Sequence[int],
    num_spans: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Return what to give an encoder beside its ids, so that a token sees its own document only.

    The `model` is of transformers, or its base; `starts` are the `document_starts` of a batch,
    [rows, tokens] int32, and the rest is of the batch too.
    """
    padded = sum(count < starts.shape[1] for count in num_tokens)
    documents, spans = sum(num_spans) - padded, sum(num_spans)
    if getattr(model, "reads_documents", False):
        counts = {"num_tokens": sum(num_tokens), "num_documents": documents}
        return {"document_starts": starts, **counts}
    if (mask := document_mask(model, starts, spans)) is not None:
        return {"attention_mask": mask, "position_ids": position_ids}
    if documents == len(starts):  # one a row, as any family knows it
        return {"attention_mask": (starts >= 0).long()}
    sees = starts[:, :, None] == starts[:, None, :]
    return {"attention_mask": sees.long(), "position_ids": position_ids}


def head_states(model: Any, hidden: Tensor) -> Tensor:
    """Return what enters a model's output embedding, [..., width], of its base's states, the like.

    Families do different things between the two; so the model itself is run, its base giving
    these states and its output embedding letting through what it is given.
    """
    from transformers.modeling_outputs import BaseModelOutput

    base, head = model.base_model, model.get_output_embeddings()
    base.forward = lambda *_, **__: BaseModelOutput(last_hidden_state=hidden)
    head.forward = lambda states: states
    try:
        return model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=hidden.device)).logits
    finally:
        del base.forward, head.forward


def states_of_head(model: Any, **given: Any) -> Tensor:
    """Return what enters the output embedding of a model that is `given` this, [..., width].

    As in `head_states` the model itself is run; its output embedding keeps what it is handed.
    """
    head, kept = model.get_output_embeddings(), []

    def keep(states: Tensor) -> Tensor:
        kept.append(states)
        return states.new_zeros(1, 1, 1)

    head.forward = keep
    try:
        model(**given)
    finally:
        del head.forward
    return kept[0]
