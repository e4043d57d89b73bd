"""The encoder-decoder as Composer trains it: logits at labels only, as in the other models."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from overture.errors import ConfigError
from overture.flops import training_flops
from overture.models.causal_lm import CausalLM
from overture.models.encoder import states_of_head
from overture.models.trainable import numbers

# What else bends greedy answers, where a model's own generation config has it: bart-base lets no
# three pieces come twice, which of a language in pieces of bytes is often one letter.
UNBENT = {
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "repetition_penalty": 1.0,
    "min_length": 0,
}  # fmt: skip


class Seq2SeqLM(CausalLM):
    """CausalLM with an encoder before it: a label is predicted from the whole source and from the
    labels before it. Takes batches of `data/collate.py`.

    `smoothing` is the share of the truth that training spreads over all pieces evenly (Szegedy et
    al. 2015, 1512.00567, section 7); evaluation measures plain cross-entropy.
    """

    ahead = 0

    def __init__(self, *args: Any, smoothing: float = 0.0) -> None:
        super().__init__(*args)
        self.smoothing = smoothing
        base = self._parts["base"]
        self._weights = [_weights(side) for side in (base.get_encoder(), base.get_decoder())]
        names = ("encoder_layers", "num_layers"), ("decoder_layers", "num_decoder_layers")
        known = [[getattr(base.config, name, None) for name in of] for of in names]
        self._layers = [next(filter(None, sizes)) for sizes in known]

    @property
    def _head(self) -> Any:
        """The output embedding, with what the family adds to its logits."""
        head, added = self._parts["head"], getattr(self._parts["base"], "final_logits_bias", None)
        bias = [x.flatten() for x in (head.bias, added) if x is not None]
        return SimpleNamespace(weight=head.weight, bias=sum(bias) if bias else None)

    def _own_logits(self, base: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        given = {"input_ids": ids, "decoder_input_ids": ids.flip(1), "use_cache": False}
        return base(**given).logits, states_of_head(base, **given)

    def _states(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        source, target = (max(batch[name]) for name in ("source_room", "target_room"))
        labels = batch["labels"][:, :target]
        base = self._parts["base"]
        hidden = states_of_head(
            base,
            input_ids=batch["input_ids"][:, :source],
            attention_mask=batch["attention_mask"][:, :source],
            decoder_input_ids=base.prepare_decoder_input_ids_from_labels(labels=labels),
            use_cache=False,
        )
        return hidden, labels

    def flops_of(self, batch: dict[str, Any]) -> float:
        """Return the training FLOPs of a batch, over real tokens only.

        What the decoder makes of the source's states counts as if these were as many as labels.
        """
        targets = batch["num_labels"]
        sources = [n - labels for n, labels in zip(batch["num_tokens"], targets, strict=True)]
        (inward, outward), (layers, above) = self._weights, self._layers
        _, head, _, width = self._shape
        squares = 2.0 * sum(n**2 for n in sources)
        crossed = sum(n * (n + 2.0 * m) for n, m in zip(targets, sources, strict=True))
        count, labels, frozen = sum(sources), sum(targets), self._frozen
        encoder = training_flops(inward, 0, frozen, count, 0, layers, width, squares)
        decoder = training_flops(outward, head, frozen, labels, labels, above, width, crossed)
        return encoder + decoder


def _weights(side: nn.Module) -> int:
    """Return the weights in matrix products of an encoder or a decoder, without its adapters."""
    linear = {n: m for n, m in side.named_modules() if isinstance(m, nn.Linear)}
    return sum(numbers(m.weight) for name, m in linear.items() if "lora_" not in name)


def begin_as_trained(model: Any, targets: list[list[int]], special: set[int]) -> dict[str, Any]:
    """Let generation begin as the decoder does in training, and return what that takes of its
    config: mBART begins with a language code or the end, of which its own config knows nothing.

    Args:
        model: of transformers.
        targets: ids of some labels, of every stream of the data.
        special: ids; one that all targets begin with is put there in generation too.

    Raises:
        ConfigError: its decoder begins with a word of the target, which would give that away.
    """
    rows = [torch.tensor([ids]) for ids in targets]
    first = {model.prepare_decoder_input_ids_from_labels(labels=row)[0, 0].item() for row in rows}
    if len(first) > 1:
        fault = f"the decoder of a {type(model).__name__} begins with a token of each target"
        raise ConfigError(
            f"tokenizer_name: {fault}, as its end and its padding are one token, or targets end "
            "otherwise; use a tokenizer with a pad token of its own"
        )
    codes = {ids[0] for ids in targets}
    begins = {"decoder_start_token_id": first.pop(), **UNBENT}
    begins["forced_bos_token_id"] = codes.pop() if len(codes) == 1 and codes <= special else None
    model.generation_config.update(**begins, _from_model_config=False)
    for known in begins.keys() - {"decoder_start_token_id"}:  # what is saved takes it from here
        if getattr(model.config, known, None) is not None:
            setattr(model.config, known, None)
    return begins


def refuse_unknown_family(model: Any) -> None:
    """Raise ConfigError for an encoder-decoder that does not name its parts as the others do."""
    parts = ("prepare_decoder_input_ids_from_labels", "get_encoder", "get_decoder")
    known = hasattr(model.config, "hidden_size") and all(hasattr(model, part) for part in parts)
    if not known or getattr(model.config, "num_experts", None):
        fault = f"a {type(model).__name__} cannot be trained by task: seq2seq"
        raise ConfigError(f"model.name: {fault}; T5, BART, mBART, Marian and their kind can")
