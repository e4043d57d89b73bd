"""The config of MosaicBERT, as config.json has it."""

from typing import Any

from transformers import PretrainedConfig

SHAPE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072,  # of the gated linear unit, which has two such inputs
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": None,  # default: hidden_dropout_prob
    "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip


class MosaicBertConfig(PretrainedConfig):
    """Shape of a MosaicBERT (Portes et al. 2023, 2312.17482); the defaults are those of its base.

    `vocab_size` of a new one is rounded up to a multiple of 64, as matrix products want it. There
    is no limit of positions: ALiBi knows distances only.
    """

    model_type = "mosaic_bert"

    def __init__(self, vocab_size: int = 30522, **more: Any) -> None:
        super().__init__(**{**SHAPE, **more})
        is_saved = "transformers_version" in more  # with whatever size its weights have
        self.vocab_size = vocab_size if is_saved else -(-vocab_size // 64) * 64
