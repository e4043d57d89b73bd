"""Models with a head on whole rows, as Composer trains them: classes, or a number."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from composer.models import HuggingFaceModel, huggingface
from torch import Tensor
from torchmetrics import Metric

from overture.flops import training_flops
from overture.models.loss import TokenCrossEntropy
from overture.models.scores import EvalScore, choose_scores
from overture.models.trainable import numbers


class Classifier(HuggingFaceModel):
    """Takes batches of `data/collate.py`. The loss of a row is its cross-entropy in nats, or its
    squared error for regression, which a head of one output is. `scores` are names of
    `models/scores.py`, None for all that fit; ConfigError if one does not.
    """

    def __init__(
        self, model: Any, tokenizer: Any, eval_samples: int | None, cpu_autocast: bool = False,
        scores: list[str] | None = None,
    ) -> None:  # fmt: skip
        # Composer asks whether this is one of transformers' causal models by importing them all.
        huggingface._is_registered_causal_lm = lambda _: False
        super().__init__(model, tokenizer=tokenizer, metrics=[], eval_metrics=[])
        outputs = model.config.num_labels
        self._regression = outputs == 1
        chosen = choose_scores(scores, self._regression)
        if eval_samples:
            scored = {n: EvalScore(score, eval_samples, outputs) for n, score in chosen.items()}
            self.val_metrics = {"TokenCrossEntropy": TokenCrossEntropy(eval_samples), **scored}
        self._cpu_autocast = cpu_autocast  # Composer's amp_bf16 does nothing without CUDA
        self._takes = {"input_ids", "attention_mask"}
        if getattr(model.config, "type_vocab_size", 0) > 1:  # of one type all are 0
            self._takes |= {"token_type_ids"} & self.model_forward_args
        self._options = {"use_cache": False} if "use_cache" in self.model_forward_args else {}
        embeddings = model.get_input_embeddings().weight
        self._frozen = not embeddings.requires_grad
        sizes = {n: numbers(p) for n, p in model.named_parameters() if p is not embeddings}
        self._weights = sum(size for name, size in sizes.items() if "lora_" not in name)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which most of the arithmetic is done."""
        return torch.bfloat16 if self._cpu_autocast else self.model.dtype

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Return what is trained alone, where not all is: adapters, and the head beside them.

        Composer would keep the adapters only, and forget the head.
        """
        found = torch.nn.Module.state_dict(self, *args, **options)
        names = {name for name, p in self.named_parameters() if p.requires_grad}
        trained = {options.get("prefix", "") + name for name in names}
        if any(not p.requires_grad for p in self.parameters()):
            for name in found.keys() - trained:
                del found[name]
        return found

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return `losses` [rows], with gradient, and `outputs` [rows, classes or 1] float32."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self._cpu_autocast):
            given = {name: batch[name] for name in self._takes}
            outputs = self.model(**given, **self._options).logits
        outputs, labels = outputs.float(), batch["labels"]
        if self._regression:
            losses = (outputs[:, 0] - labels) ** 2
        else:
            losses = F.cross_entropy(outputs, labels, reduction="none")
        return {"losses": losses, "outputs": outputs.detach()}

    def loss(self, outputs: dict[str, Tensor], batch: Any) -> Tensor:
        """Return the mean over the rows of a microbatch."""
        return outputs["losses"].mean()

    def update_metric(self, batch: Any, outputs: dict[str, Tensor], metric: Metric) -> dict:
        if isinstance(metric, TokenCrossEntropy):  # a row has one label
            rows = torch.arange(len(batch["labels"]), device=batch["labels"].device)
            metric.update(outputs["losses"].detach(), rows, batch["sample_ids"])
        else:
            metric.update(outputs["outputs"], batch["labels"], batch["sample_ids"])
        return {}

    def flops_of(self, batch: Mapping[str, Any]) -> float:
        """Return the training FLOPs of a batch, over real tokens only."""
        config, lengths = self.model.config.get_text_config(), batch["num_tokens"]
        seen = 1.0 if any(getattr(m, "is_causal", False) for m in self.model.modules()) else 2.0
        squares = seen * sum(length**2 for length in lengths)
        shape = config.num_hidden_layers, config.hidden_size
        return training_flops(self._weights, 0, self._frozen, sum(lengths), 0, *shape, squares)
