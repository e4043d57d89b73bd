"""The causal language model as Composer trains it: logits at label positions only."""

import inspect
import shutil
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from composer.models import HuggingFaceModel, huggingface
from torch import Tensor
from torchmetrics import Metric

from overture.errors import ConfigError
from overture.flops import training_flops
from overture.models.attention import document_mask, hide_from_compiler
from overture.models.loss import TokenCrossEntropy, cross_entropy_at, label_positions
from overture.models.trainable import numbers


class CausalLM(HuggingFaceModel):
    """Takes batches of `data/collate.py`. The training loss is the mean over the label tokens of a
    microbatch; Composer, accumulating on tokens, weights these to the mean over the global batch.
    """

    seen = 0.5  # share of its document that a token sees
    ahead = 1  # places from the state that predicts a label to that label's own
    smoothing = 0.0  # of the truth, in training

    def __init__(
        self, model: Any, tokenizer: Any, eval_samples: int | None, cpu_autocast: bool = False
    ) -> None:
        metrics = [TokenCrossEntropy(eval_samples)] if eval_samples else []
        # Composer asks whether this is one of transformers' causal models by importing them all.
        huggingface._is_registered_causal_lm = lambda _: True
        super().__init__(model, tokenizer=tokenizer, metrics=[], eval_metrics=metrics)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # Through attributes, not sub-modules: the same weights must not be registered twice.
        backbone = base.base_model if base.base_model is not base else base.get_decoder()
        self._parts = {"base": base, "backbone": backbone, "head": base.get_output_embeddings()}
        takes = inspect.signature(backbone.forward).parameters.values()  # Mamba has no positions
        self._is_placed = any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in takes)
        config = base.config.get_text_config()
        divided = getattr(config, "logits_scaling", None)  # Granite divides, Cohere multiplies
        self._scale = 1 / divided if divided else getattr(config, "logit_scale", None) or 1.0
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._shape = _shape(base, config)
        self._cpu_autocast = cpu_autocast  # Composer's amp_bf16 does nothing without CUDA
        self._frozen = not base.get_input_embeddings().weight.requires_grad
        if base.device.type != "meta":
            self._prove_logits(base)

    @torch.no_grad()
    def _prove_logits(self, base: Any) -> None:
        """Raise ConfigError unless what is made of the backbone's states are its own logits."""
        was_training, ids = base.training, torch.arange(8, device=base.device)[None]
        base.eval()
        theirs, hidden = self._own_logits(base, ids)
        base.train(was_training)
        head, same = self._head, False  # its own forward may do more than the loss will
        if hidden.shape[-1] == head.weight.shape[-1]:
            ours = F.linear(hidden, head.weight, head.bias) * self._scale
            if self._softcap:
                ours = self._softcap * torch.tanh(ours / self._softcap)
            rounding = max(1e-4, 16 * torch.finfo(ours.dtype).eps)  # of sums in another order
            same = (ours - theirs).abs().max().item() <= rounding * theirs.abs().max().item()
        if not same:
            fault = f"the logits of a {type(base).__name__} are not simply those of its output head"
            what = "so its loss would be another one here; this family is not supported"
            raise ConfigError(f"model.name: {fault}, {what}")

    def _own_logits(self, base: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return a model's own logits, and the states that enter its output head here."""
        theirs = base(input_ids=ids, use_cache=False).logits
        return theirs, self._parts["backbone"](input_ids=ids, use_cache=False)[0]

    def compile_backbone(self) -> None:
        """Compile the backbone, but not for generation; ConfigError without a C++ compiler."""
        if not (shutil.which("g++") or shutil.which("clang++")):
            raise ConfigError("compile: torch.compile needs a C++ compiler; install g++")
        hide_from_compiler()
        self._parts["compiled"] = torch.compile(self._parts["backbone"], dynamic=False)

    def uncompile(self) -> None:
        """Take the backbone as it is again, as for batches of another shape."""
        self._parts.pop("compiled", None)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which most of the arithmetic is done."""
        return torch.bfloat16 if self._cpu_autocast else self._head.weight.dtype

    @property
    def _head(self) -> Any:
        return self._parts["head"]

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the sum `loss`, `token_losses` [labels] and `rows` [labels], the row of each."""
        smoothing, count = self.smoothing if self.training else 0.0, sum(batch["num_labels"])
        with torch.autocast("cpu", torch.bfloat16, enabled=self._cpu_autocast):
            hidden, labels = self._states(batch)
            places, targets = label_positions(labels, count, self.ahead)
            chosen = self._entering(hidden.flatten(0, 1).index_select(0, places))
            rules = self._scale, self._softcap, count, smoothing
            total, losses = cross_entropy_at(chosen, self._head, targets, *rules)
        return {"loss": total, "token_losses": losses, "rows": places[:count] // labels.shape[1]}

    def _states(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the last hidden states [rows, tokens, width] and the labels [rows, tokens]."""
        backbone, starts = self._parts["backbone"], batch["document_starts"]
        bounds = sum(batch["num_spans"]), max(batch["longest"])
        places = {"position_ids": batch["position_ids"]} if self._is_placed else {}
        hidden = self._parts.get("compiled", backbone)(
            input_ids=batch["input_ids"], **places,
            attention_mask=document_mask(backbone, starts, *bounds), use_cache=False,
        )[0]  # fmt: skip
        return hidden, batch["labels"]

    def _entering(self, chosen: Tensor) -> Tensor:
        """Return what enters the output embedding of some of these states, [labels, width]."""
        return chosen

    def loss(self, outputs: dict[str, Tensor], batch: Any) -> Tensor:
        """Return the mean over the label tokens of a microbatch; 0 where it has none.

        A loss is good for one backward pass, and takes itself out of `outputs`: it lets go of its
        graph then, as Composer holds both until the next step has replaced them. The small pieces
        of an old graph would keep the freed blocks between them from being joined for the next.
        """
        loss = outputs.pop("loss") / max(len(outputs["token_losses"]), 1)
        if loss.requires_grad:
            kept = ref(loss)  # not the loss, which would hold itself in a circle

            def let_go(_: Tensor) -> None:
                if kept() is not None:
                    kept().detach_()

            loss.register_hook(let_go)
        return loss

    def update_metric(self, batch: Any, outputs: dict[str, Tensor], metric: Metric) -> dict:
        metric.update(outputs["token_losses"], outputs["rows"], batch["sample_ids"])
        return {}

    def flops_of(self, batch: dict[str, Tensor]) -> float:
        """Return the training FLOPs of a batch, over real tokens only."""
        tokens, labels = sum(batch["num_tokens"]), sum(batch["num_labels"])
        # A token's place in its document, plus one half, sums up to half the length squared.
        places = torch.arange(batch["labels"].shape[1]) - batch["document_starts"].cpu()
        squares = 2 * float((places + 0.5)[batch["document_starts"].cpu() >= 0].sum())
        squares *= self.seen / 0.5
        weights, head, layers, width = self._shape
        return training_flops(weights, head, self._frozen, tokens, labels, layers, width, squares)


def _shape(model: Any, config: Any) -> tuple[int, int, int, int]:
    """Return (weights in matrix products, those of the head, layers, attention width)."""
    head = model.get_output_embeddings().weight
    tables = (m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding))
    apart = {id(head), *map(id, tables)}  # counted apart, or looked up
    sizes = {n: numbers(p) for n, p in model.named_parameters() if id(p) not in apart}
    weights = sum(size for name, size in sizes.items() if "lora_" not in name)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next(filter(None, (getattr(config, name, None) for name in names)), None)
    if experts:  # only some of them see a token
        idle = 1 - getattr(config, "num_experts_per_tok", experts) / experts
        weights -= int(idle * sum(size for name, size in sizes.items() if ".experts." in name))
    heads = getattr(config, "num_attention_heads", 0)  # none in a state-space model
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    return weights, head.numel(), config.num_hidden_layers, heads * head_size
