"""Composer's own callbacks, algorithms and loggers, by the names of the config."""

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
# Each is named like the package that it needs.
LOGGERS = {"tensorboard": TensorboardLogger, "wandb": WandBLogger, "mlflow": MLFlowLogger}


def build_callbacks(config: Config) -> list[Callback]:
    """Return the Composer callbacks that the config switches on."""
    return [CALLBACKS[name](**options) for name, options in _set(config.callbacks, CALLBACKS)]


def build_algorithms(config: Config) -> list[Algorithm]:
    """Return the Composer algorithms that the config switches on."""
    return [ALGORITHMS[name](**options) for name, options in _set(config.algorithms, ALGORITHMS)]


def build_loggers(config: Config) -> list[LoggerDestination]:
    """Return the loggers that the config switches on; ConfigError if one's package is missing."""
    built = []
    for name, options in _set(config.loggers, LOGGERS):
        if name == "tensorboard":
            options["log_dir"] = options["log_dir"] or f"{config.run_folder}/tensorboard"
        if name == "wandb":
            options["name"] = config.run_name
        try:
            built.append(LOGGERS[name](**options))
        except ImportError:
            raise ConfigError(f"loggers.{name}: needs `pip install {name}`") from None
    return built


def _set(section: Any, known: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = dataclasses.asdict(section)
    return [(name, found[name]) for name in known if found[name] is not None]
