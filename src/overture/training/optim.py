"""Optimizers and learning-rate schedules by name."""

from typing import Any

import torch
from composer import optim
from composer.core import State

from overture.config.schema import OptimizerConfig, SchedulerConfig

OPTIMIZERS = {
    # One kernel for all tensors; about three times as fast as DecoupledAdamW.
    "adamw": lambda groups, **kwargs: torch.optim.AdamW(groups, fused=True, **kwargs),
    "decoupled_adamw": optim.DecoupledAdamW,
}
DECAYS = {
    "linear_decay_with_warmup": optim.LinearWithWarmupScheduler,
    "cosine_with_warmup": optim.CosineAnnealingWithWarmupScheduler,
}


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters; vectors (norms, biases) do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    options = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    return OPTIMIZERS[config.name]([group for group in groups if group["params"]], **options)


def adopt_settings(state: State, groups: list[dict[str, Any]]) -> None:
    """Give an optimizer that has read its state the rates and other settings of `groups`, as they
    were before: they may have been let change, and the state has those of when it was written.
    """
    for group, ours in zip(state.optimizers[0].param_groups, groups, strict=True):
        others = ours.keys() - {"params", "lr", "initial_lr"}
        group.update({name: ours[name] for name in others})
        begun = group.setdefault("initial_lr", group["lr"])
        if begun != ours["lr"]:
            group["lr"] *= ours["lr"] / begun
            group["initial_lr"] = ours["lr"]
    for scheduler in state.schedulers:
        scheduler.base_lrs = [group["initial_lr"] for group in state.optimizers[0].param_groups]
        scheduler._last_lr = [group["lr"] for group in state.optimizers[0].param_groups]


def drop_empty_scaler(state_dict: dict[str, Any]) -> None:
    """Take a scaler of a CPU from a state, as one of a GPU refuses what is empty."""
    if not any(state_dict["state"].get("scaler", {}).values()):
        state_dict["state"].pop("scaler", None)


def build_scheduler(config: SchedulerConfig) -> Any:
    """Return Composer's scheduler of that name."""
    if config.name == "constant_with_warmup":
        return optim.ConstantWithWarmupScheduler(t_warmup=config.t_warmup)
    alpha_f = 0.1 if config.alpha_f is None else config.alpha_f
    return DECAYS[config.name](t_warmup=config.t_warmup, alpha_f=alpha_f)
