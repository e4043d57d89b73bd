"""LoRA adapters through peft, in float32 over a base of any type (Hu et al. 2021, 2106.09685)."""

from __future__ import annotations

from typing import Any

from overture.errors import ConfigError


def add_lora(
    model: Any, r: int, alpha: float, dropout: float, target_modules: str | list[str]
) -> Any:
    """Return the model as a PeftModel with fresh adapters; everything else is frozen.

    Raises:
        ConfigError: `target_modules` names no module of this model.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        # peft casts the adapters of a half-precision base to float32 (autocast_adapter_dtype).
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"lora.target_modules: {' '.join(str(error).split())[:200]}") from None
