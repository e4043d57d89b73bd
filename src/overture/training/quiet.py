"""Library chatter and idle work off: what is printed is ours, or somebody can act on it."""

import logging
import warnings
from typing import Any

from composer.utils import collect_env

from overture.training.cores import processor


def quiet_trainer(trainer: Any) -> None:
    """Keep Composer from printing hyperparameters of its own; the run folder has the real ones."""
    for destination in trainer.logger.destinations:
        if hasattr(destination, "hparams_already_logged_to_console"):
            destination.hparams_already_logged_to_console = True


def quiet_libraries() -> None:
    """Silence known, harmless warnings of our dependencies; errors stay."""
    collect_env.get_cpu_model = processor  # Composer's way times the clock: a second
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for module in ("composer", "streaming", "transformers", "peft", "torch", "torchmetrics"):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
    libraries = ("composer", "streaming", "transformers", "torch.distributed", "peft")
    for name in (*libraries, "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
