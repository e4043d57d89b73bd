"""The masked language model as Composer trains it: the head sees masked positions only."""

from typing import Any

from torch import Tensor

from overture.errors import ConfigError
from overture.models.causal_lm import CausalLM
from overture.models.encoder import encoder_inputs, head_states


class MaskedLM(CausalLM):
    """CausalLM with an encoder: labels are predicted at their own places, through the head's own
    transform, and tokens see all of their document. Takes batches of `data/masking.py`.
    """

    seen, ahead = 1.0, 0

    def _own_logits(self, base: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        theirs = base(input_ids=ids).logits
        return theirs, head_states(base, self._parts["backbone"](input_ids=ids)[0])

    def compile_backbone(self) -> None:
        """Compile the backbone; ConfigError if it unpads, or without a C++ compiler."""
        if getattr(self._parts["backbone"], "reads_documents", False):
            fault = "compile: a mosaic_bert has as many tokens as its batch, each a new graph"
            raise ConfigError(f"{fault}; leave it out")
        super().compile_backbone()

    def _states(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        backbone, starts = self._parts["backbone"], batch["document_starts"]
        counts = batch["num_tokens"], batch["num_spans"]
        inputs = encoder_inputs(backbone, starts, batch["position_ids"], *counts)
        run = self._parts.get("compiled", backbone)
        return run(input_ids=batch["input_ids"], **inputs)[0], batch["labels"]

    def _entering(self, chosen: Tensor) -> Tensor:
        return head_states(self.model, chosen[None])[0]
