"""Composer's own callbacks, algorithms and loggers, by the names of the config."""

from __future__ import annotations

import dataclasses
from typing import Any

from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor, MemoryMonitor, RuntimeEstimator, SpeedMonitor
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger

from overture.config.schema import Config
from overture.errors import ConfigError

CALLBACKS = {
    "speed_monitor": SpeedMonitor,
    "lr_monitor": LRMonitor,
    "memory_monitor": MemoryMonitor,
    "runtime_estimator": RuntimeEstimator,
}
ALGORITHMS = {"gradient_clipping": GradientClipping}
# name -> (class, package to install)
LOGGERS: dict[str, tuple[Any, str]] = {
    "tensorboard": (TensorboardLogger, "tensorboard"),
    "wandb": (WandBLogger, "wandb"),
    "mlflow": (MLFlowLogger, "mlflow"),
}


def build_callbacks(config: Config) -> list[Callback]:
    """Return the Composer callbacks that the config switches on."""
    return [
        CALLBACKS[name](**options) for name, options in _switched_on(config.callbacks, CALLBACKS)
    ]


def build_algorithms(config: Config) -> list[Algorithm]:
    """Return the Composer algorithms that the config switches on."""
    return [
        ALGORITHMS[name](**options) for name, options in _switched_on(config.algorithms, ALGORITHMS)
    ]


def build_loggers(config: Config) -> list[LoggerDestination]:
    """Return the loggers that the config switches on.

    Raises:
        ConfigError: the package of a logger is not installed.
    """
    built = []
    for name, options in _switched_on(config.loggers, LOGGERS):
        logger, package = LOGGERS[name]
        if name == "tensorboard":
            options["log_dir"] = options["log_dir"] or f"{config.run_folder}/tensorboard"
        if name == "wandb":
            options = {**options, "name": config.run_name}
        try:
            built.append(logger(**options))
        except ImportError:
            raise ConfigError(f"loggers.{name}: needs `pip install {package}`") from None
    return built


def _switched_on(section: Any, known: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = []
    for name in known:
        options = getattr(section, name)
        if options is not None:
            rows.append((name, dataclasses.asdict(options)))
    return rows
