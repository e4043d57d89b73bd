"""MosaicBERT (Portes et al. 2023, 2312.17482): a BERT built to be trained fast.

As in BERT (Devlin et al. 2018, 1810.04805), but with ALiBi in place of position embeddings, gated
linear units, LayerNorm in bfloat16 where autocast is, and no arithmetic on padding between the
embedding and the head: hidden states are those of the tokens end to end, [1, total, width]. Where
no kernel takes documents so (`model.attention` of sdpa or eager, CUDA without flash-attn), they are
[rows, tokens, width] and attention has a mask.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import modeling_outputs as outputs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models import auto
from transformers.utils import can_return_tuple

from overture.models.attention import attention, takes_rows_end_to_end
from overture.models.mosaic_bert.unpadding import keep_padding, starts_of, unpad

SHAPE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072,  # of the gated linear unit, which has two such inputs
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0,
    "classifier_dropout": None,  # default: hidden_dropout_prob
    "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0,
}  # fmt: skip


class MosaicBertConfig(PretrainedConfig):
    """Shape of a MosaicBERT, as config.json has it; the defaults are those of its base.

    `vocab_size` of a new one is rounded up to a multiple of 64, as matrix products want it. There
    is no limit of positions: ALiBi knows distances only.
    """

    model_type = "mosaic_bert"

    def __init__(self, vocab_size: int = 30522, **more: Any) -> None:
        super().__init__(**{**SHAPE, **more})
        is_saved = "transformers_version" in more  # with whatever size its weights have
        self.vocab_size = vocab_size if is_saved else -(-vocab_size // 64) * 64


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Return the slope of each head (Press et al. 2021, 2108.12409): 2 ** -(8 / heads), its powers.

    Where heads are no power of two, the series of the next lower one is filled up with every other
    slope of the next higher one's, as in the paper's own code.
    """
    lower = 2 ** int(math.log2(heads))
    series, finer = ([2 ** (-8 * (i + 1) / n) for i in range(n)] for n in (lower, 2 * lower))
    return (*series, *finer[: 2 * (heads - lower) : 2])


class LowPrecisionLayerNorm(nn.LayerNorm):
    """LayerNorm that under bfloat16 autocast reads and writes bfloat16; sums are float32 anyway.

    In float16, whose range is small, and without autocast it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        kind, low = x.device.type, torch.bfloat16
        if not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) != low:
            return super().forward(x)
        with torch.autocast(kind, enabled=False):
            weight, bias = self.weight.to(low), self.bias.to(low)
            return F.layer_norm(x.to(low), self.normalized_shape, weight, bias, self.eps)


class Embeddings(nn.Module):
    """Words and token types; places are left to ALiBi."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = LowPrecisionLayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Return [..., width] of ids [...]."""
        kinds = self.token_type_embeddings
        of_kind = kinds.weight[0] if token_type_ids is None else kinds(token_type_ids)
        return self.dropout(self.norm(self.word_embeddings(input_ids) + of_kind))


class Attention(nn.Module):
    """Bidirectional attention with ALiBi, through the one seam to kernels."""

    is_causal = False

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        if width % self.heads:
            raise ValueError(f"hidden_size {width} is no multiple of {self.heads} heads")
        self.config, self.slopes = config, alibi_slopes(self.heads)
        self.projection = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return [rows, tokens, width] of the like."""
        parts = self.projection(x).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in parts)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        how = {"slopes": self.slopes, "implementation": self.config._attn_implementation}
        mixed, _ = attention(self, query, key, value, mask, dropout, **how)
        return self.dense(mixed.flatten(2))


class GatedLinearUnit(nn.Module):
    """GeGLU (Shazeer 2020, 2002.05202): W (dropout(gelu(G x) * U x)), G and U in one product."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.gated = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gated(x).chunk(2, -1)
        return self.dense(self.dropout(F.gelu(gate) * up))


class Layer(GradientCheckpointingLayer):
    """Attention, then the gated linear unit, each added to what came in and normalised."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(config), GatedLinearUnit(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        norms = (LowPrecisionLayerNorm(config.hidden_size, config.layer_norm_eps) for _ in range(2))
        self.attention_norm, self.mlp_norm = norms

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.mlp_norm(x + self.mlp(x))


class MosaicBertPreTrainedModel(PreTrainedModel):
    """What the model and its heads share, as transformers wants it."""

    config_class = MosaicBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012, as transformers has it
    _supports_sdpa = _supports_attention_backend = True
    reads_documents = True  # takes `document_starts`
    accepts_loss_kwargs = False  # transformers' Trainer would send some with every batch


class MosaicBertModel(MosaicBertPreTrainedModel):
    """The encoder, with BERT's pooler for classification."""

    def __init__(self, config: MosaicBertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        width = config.hidden_size
        self.pooler = nn.Linear(width, width) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, document_starts: Tensor | None = None,
        num_tokens: int | None = None, num_documents: int | None = None,
    ) -> outputs.BaseModelOutputWithPooling:  # fmt: skip
        """Return the hidden states [rows, tokens, width], zeros or noise for padding.

        Args:
            input_ids, token_type_ids: [rows, tokens] int64.
            attention_mask: [rows, tokens], 1 for a token, as Hugging Face has it.
            document_starts: [rows, tokens] int32 in its place, as batches of ours have it.
            num_tokens, num_documents: with them, how many there are.
        """
        if document_starts is None:
            document_starts = starts_of(attention_mask, input_ids.shape).to(input_ids.device)
        kind, weight = input_ids.device.type, self.embeddings.word_embeddings.weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        size = self.config.hidden_size // self.config.num_attention_heads
        if takes_rows_end_to_end(self.config._attn_implementation, weight.device, dtype, size):
            tokens = unpad(document_starts, num_tokens, num_documents)
        else:
            tokens = keep_padding(document_starts)
        kinds = None if token_type_ids is None else tokens.take(token_type_ids)
        hidden = self.embeddings(tokens.take(input_ids), kinds)
        for layer in self.layers:
            hidden = layer(hidden, tokens.mask)
        hidden = tokens.put_back(hidden)
        pooled = None if self.pooler is None else torch.tanh(self.pooler(hidden[:, 0]))
        return outputs.BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


class MosaicBertForMaskedLM(MosaicBertPreTrainedModel):
    """With BERT's head for masked tokens, whose output embedding is the input's."""

    _tied_weights_keys = ["decoder.weight"]  # noqa: RUF012

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.bert = MosaicBertModel(config, add_pooling_layer=False)
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.decoder = value

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, labels: Tensor | None = None, **more: Any,
    ) -> outputs.MaskedLMOutput:  # fmt: skip
        """Return logits [rows, tokens, vocabulary], and the mean loss of `labels` if they are given
        ([rows, tokens] int64, -100 for none); `more` is for the model.
        """
        hidden = self.bert(input_ids, attention_mask, token_type_ids, **more).last_hidden_state
        logits = self.decoder(self.norm(F.gelu(self.transform(hidden))))
        size = self.config.vocab_size
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=size)
        return outputs.MaskedLMOutput(loss=loss, logits=logits)


class MosaicBertForSequenceClassification(MosaicBertPreTrainedModel):
    """With a class, or for one label a number, from each row's first token."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MosaicBertModel(config)
        chosen = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if chosen is None else chosen)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, labels: Tensor | None = None, **more: Any,
    ) -> outputs.SequenceClassifierOutput:  # fmt: skip
        """Return logits [rows, labels], and the loss of `labels` [rows] if they are given."""
        more = {name: value for name, value in more.items() if value is not None}  # peft's
        pooled = self.bert(input_ids, attention_mask, token_type_ids, **more).pooler_output
        logits, loss = self.classifier(self.dropout(pooled)), None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        return outputs.SequenceClassifierOutput(loss=loss, logits=logits)


def register_mosaic_bert() -> None:
    """Let transformers' Auto classes know `mosaic_bert`, as often as one likes."""
    auto.AutoConfig.register(MosaicBertConfig.model_type, MosaicBertConfig, exist_ok=True)
    auto.AutoModel.register(MosaicBertConfig, MosaicBertModel, exist_ok=True)
    auto.AutoModelForMaskedLM.register(MosaicBertConfig, MosaicBertForMaskedLM, exist_ok=True)
    of_rows = auto.AutoModelForSequenceClassification
    of_rows.register(MosaicBertConfig, MosaicBertForSequenceClassification, exist_ok=True)
