"""Library chatter off: what is printed is ours, or it is a warning that somebody can act on."""

from __future__ import annotations

import logging
import warnings
from typing import Any


def quiet_trainer(trainer: Any) -> None:
    """Keep Composer from printing hyperparameters of its own; the run folder has the real ones."""
    for destination in trainer.logger.destinations:
        if hasattr(destination, "hparams_already_logged_to_console"):
            destination.hparams_already_logged_to_console = True


def quiet_libraries() -> None:
    """Silence known, harmless warnings of our dependencies; errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for module in ("composer", "streaming", "transformers", "peft", "torch", "torchmetrics"):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
    for name in ("composer", "streaming", "transformers", "torch.distributed", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
