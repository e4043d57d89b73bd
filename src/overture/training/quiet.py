"""Library chatter off: what is printed is ours, or it is a warning that somebody can act on."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Silence known, harmless warnings of our dependencies; errors stay."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    for name in ("composer", "streaming", "transformers", "torch.distributed", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
