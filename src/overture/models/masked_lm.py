"""The masked language model as Composer trains it: the head sees masked positions only."""

from typing import Any

import torch
from torch import Tensor

from overture.errors import ConfigError
from overture.models.causal_lm import CausalLM
from overture.models.encoder import encoder_inputs, head_states
from overture.models.loss import cross_entropy_at, label_positions


class MaskedLM(CausalLM):
    """CausalLM with an encoder: labels are predicted at their own places, through the head's own
    transform, and tokens see all of their document. Takes batches of `data/masking.py`.
    """

    seen = 1.0

    def _own_logits(self, base: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        theirs = base(input_ids=ids).logits
        return theirs, head_states(base, self._parts["backbone"](input_ids=ids)[0])

    def compile_backbone(self) -> None:
        """Compile the backbone; ConfigError if it unpads, or without a C++ compiler."""
        if getattr(self._parts["backbone"], "reads_documents", False):
            fault = "compile: a mosaic_bert has as many tokens as its batch, each a new graph"
            raise ConfigError(f"{fault}; leave it out")
        super().compile_backbone()

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the sum `loss`, `token_losses` [labels] and `rows` [labels], the row of each."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._cpu_autocast):
            backbone, starts = self._parts["backbone"], batch["document_starts"]
            counts = batch["num_tokens"], batch["num_spans"]
            hidden = self._parts.get("compiled", backbone)(
                input_ids=batch["input_ids"],
                **encoder_inputs(backbone, starts, batch["position_ids"], *counts),
            )[0]
            count = sum(batch["num_labels"])
            places, targets = label_positions(batch["labels"], count, ahead=0)
            chosen = hidden.flatten(0, 1).index_select(0, places)[None]
            states = head_states(self.model, chosen)[0]
            total, losses = cross_entropy_at(states, self._parts["head"], targets, count=count)
        rows = places[:count] // batch["labels"].shape[1]
        return {"loss": total, "token_losses": losses, "rows": rows}
