"""Composer's own callbacks, algorithms and loggers, by the names of the config."""

import dataclasses
import warnings
from typing import Any

from composer.algorithms import EMA, GradientClipping
from composer.algorithms.low_precision_layernorm import apply_low_precision_layernorm
from composer.callbacks import LRMonitor, MemoryMonitor, RuntimeEstimator, SpeedMonitor
from composer.core import Algorithm, Callback, Event, Precision, State
from composer.loggers import Logger, LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger

from overture.callbacks.guards import gradients_not_finite
from overture.config.schema import Config
from overture.errors import ConfigError
from overture.training.seq_length import LengthWarmup

CALLBACKS = {
    "speed_monitor": SpeedMonitor, "lr_monitor": LRMonitor, "memory_monitor": MemoryMonitor,
    "runtime_estimator": RuntimeEstimator,
}  # fmt: skip


class Average(EMA):
    """EMA of the weights alone, that goes on with another number of ranks too.

    DDP gives the weights other names. Composer's averages buffers as well, which are constants
    here: rounded down to a whole number, a mean of equal positions is another one.
    """

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        prefix = "module." if hasattr(state.model, "module") else ""
        if event in self.move_device_events:
            kept = self.ema_model.named_parameters_dict
            for name in list(kept):
                kept[prefix + name.removeprefix("module.")] = kept.pop(name)
        self._without_buffers()
        super().apply(event, state, logger)
        self._without_buffers()

    def _without_buffers(self) -> None:
        if self.ema_model is not None:
            self.ema_model.named_buffers_dict.clear()


class IdleExperts(Algorithm):
    """Does nothing but let DDP know that experts may meet no token, and so have no gradient."""

    find_unused_parameters = True

    def match(self, event: Event, state: State) -> bool:
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        pass


class Clipping(GradientClipping):
    """Gradient clipping that leaves what is not finite to the guard behind it: clipped by value, an
    Inf would be an ordinary gradient.
    """

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if self.clipping_type != "value" or not gradients_not_finite(state.model):
            super().apply(event, state, logger)


ALGORITHMS = {"gradient_clipping": Clipping, "ema": Average, "seq_length_warmup": LengthWarmup}
LOGGERS = {"tensorboard": TensorboardLogger, "wandb": WandBLogger, "mlflow": MLFlowLogger}


def build_callbacks(config: Config) -> list[Callback]:
    """Return the Composer callbacks that the config switches on."""
    return [CALLBACKS[name](**options) for name, options in _set(config.callbacks, CALLBACKS)]


def build_algorithms(config: Config, network: Any) -> list[Algorithm]:
    """Return the algorithms that the config switches on and that act while a model is trained."""
    trained = (name for name, p in network.named_parameters() if p.requires_grad)
    chosen = dict(_set(config.algorithms, ALGORITHMS))
    if "seq_length_warmup" in chosen:
        chosen["seq_length_warmup"]["max_seq_length"] = config.max_seq_len
    idle = [IdleExperts()] if any(".experts." in name for name in trained) else []
    return [ALGORITHMS[name](**options) for name, options in chosen.items()] + idle


def exchange_modules(network: Any, config: Config, precision: str) -> None:
    """Apply low_precision_layernorm, which exchanges modules before a model is trained, if it is
    switched on; ConfigError if it finds none to exchange.

    `precision` is what Composer trains in: fp32 on a CPU.
    """
    if config.algorithms.low_precision_layernorm is None:
        return
    before = [type(module) for module in network.modules()]
    were = {name: (p.dtype, p.requires_grad) for name, p in network.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says so in its own way
        apply_low_precision_layernorm(network, Precision(precision))
    for name, p in network.named_parameters():  # made anew, they are all trained, in float32
        dtype, trained = were[name]
        p.data = p.data.to(dtype)
        p.requires_grad_(trained)
    if [type(module) for module in network.modules()] == before:
        fault = f"changes nothing in a {type(network).__name__} ({config.model.name})"
        remedy = f"trained in {precision}; leave it out"
        raise ConfigError(f"algorithms.low_precision_layernorm: {fault} {remedy}")


def adopt_average(state: State) -> None:
    """Give a trained model the averaged weights that it was evaluated with, if there are any."""
    for algorithm in state.algorithms:
        if isinstance(algorithm, EMA) and algorithm.ema_started:
            algorithm.get_ema_model(state.model)


def build_loggers(config: Config) -> list[LoggerDestination]:
    """Return the loggers that the config switches on; ConfigError if a package is broken."""
    built = []
    for name, options in _set(config.loggers, LOGGERS):
        if name == "tensorboard":
            options["log_dir"] = options["log_dir"] or f"{config.run_folder}/tensorboard"
        if name == "wandb":
            options["name"] = config.run_name
        try:
            built.append(LOGGERS[name](**options))
        except ImportError as error:
            raise ConfigError(f"loggers.{name}: cannot be imported ({error})") from None
    return built


def _set(section: Any, known: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = dataclasses.asdict(section)
    return [(name, found[name]) for name in known if found[name] is not None]
