"""The config of MosaicBERT, as config.json has it."""

from typing import Any

from transformers import PretrainedConfig


class MosaicBertConfig(PretrainedConfig):
    """Shape of a MosaicBERT (Portes et al. 2023, 2312.17482); the defaults are those of its base.

    `vocab_size` of a new one is rounded up to a multiple of 64, as matrix products want it. There
    is no limit of positions: ALiBi knows distances only.
    """

    model_type = "mosaic_bert"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,  # of the gated linear unit, which has two such inputs
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.0,
        classifier_dropout: float | None = None,  # default: hidden_dropout_prob
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        pad_token_id: int = 0,
        **more: Any,
    ) -> None:
        super().__init__(pad_token_id=pad_token_id, **more)
        is_saved = "transformers_version" in more  # with whatever size its weights have
        self.vocab_size = vocab_size if is_saved else -(-vocab_size // 64) * 64
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
