"""YAML and dotted overrides, merged strictly into the dataclasses of `config/schema.py`.

Every mistake is collected and reported at once, as `FILE: key.path: what is wrong`. Torch is not
imported: the answer to a typo should take less than a second.
"""

import dataclasses
import os
import shlex
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from overture.config.rules import Problem, contradictions, glue_contradictions
from overture.config.schema import NOT_HERE, AlgorithmsConfig, Config, GlueConfig
from overture.config.secrets import learn, redact
from overture.errors import ConfigError, nearest

# What a YAML may read of the environment: places and job numbers.
_ENVIRONMENT = (
    "HOME", "USER", "TMPDIR", "SCRATCH", "HF_HOME", "SLURM_JOB_ID", "SLURM_TMPDIR", "JOB_ID",
    "OVERTURE_DATA",
)  # fmt: skip


def load_config(
    arguments: list[str], tasks: tuple[str, ...], world_size: int | None = None
) -> Config:
    """Return the checked config of `FILE.yaml a.b=c ...`; ConfigError with all that is wrong.

    `world_size` is the number of ranks it is to run on, by default that of this process.
    """
    return check_config(*_read(arguments, "composer main.py|finetune.py"), tasks, world_size)


def load_glue(arguments: list[str]) -> GlueConfig:
    """Return the checked config of a GLUE evaluation; ConfigError with all that is wrong."""
    data, place = _read(arguments, "python src/evaluate_glue.py")
    problems: list[Problem] = []
    config = _build(GlueConfig, data, "", problems)
    if not problems:
        _each_text(config, lambda text, _: text.replace("{run_name}", config.run_name))
    _raise(problems or [*glue_contradictions(config)], place)
    return config


def check_config(
    data: dict[str, Any], place: Callable[[str], str], tasks: tuple, world_size: int | None = None
) -> Config:
    """Return a tree of keys and values as a checked config; `place` says where a key was set."""

    def exported(text: str, key: str) -> str:
        if redact(text, key) != text:
            fault = f"{key} holds a secret, which would stand in every copy of the model"
            problems.append(("model.config", f"{fault}; leave it out"))
        return text

    problems: list[Problem] = []
    config = _build(Config, data, "", problems)
    if not problems:
        _each_text(config.model.config, exported)
    if not problems:
        _each_text(config, lambda text, _: text.replace("{run_name}", config.run_name))
        ranks = world_size or int(os.environ.get("WORLD_SIZE", "1"))
        problems = contradictions(config, tasks, ranks)
    _raise(problems, place)
    return config


def _raise(problems: list[Problem], place: Callable[[str], str]) -> None:
    if problems:
        raise ConfigError("\n  ".join(f"{place(key)}: {key}: {text}" for key, text in problems))


def _read(arguments: list[str], door: str) -> tuple[dict[str, Any], Callable[[str], str]]:
    """Return what a YAML and its overrides say, and a function from a key to where it was set."""
    for named in os.environ.items():
        learn(*named)
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise ConfigError(f"usage: {door} FILE.yaml [key.sub=value ...]")
    path, *overrides = arguments
    data = _merge(path, overrides)
    data.setdefault("run_name", Path(path).stem)

    def place(key: str) -> str:
        key = key.split("[")[0] + "."  # of an item, its list
        for named, _, value in (override.partition("=") for override in overrides):
            within = key.startswith(f"{named}.") and key.split(".")[-2] in value
            if within or f"{named}.".startswith(key):
                return f"command line (over {path})"
        return path

    return data, place


def child_environment(device: int | None, parallel: int) -> dict[str, str]:
    """Return the environment for one of `parallel` processes: with a CUDA device of its own, or
    without one with its share of the cores.
    """
    given = dict(os.environ)
    if device is None:
        threads = max(1, len(os.sched_getaffinity(0)) // parallel)
        return {"OMP_NUM_THREADS": str(threads), **given}
    visible = [name for name in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return given | {"CUDA_VISIBLE_DEVICES": visible[device] if visible else str(device)}


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML text, secrets replaced by `***`."""
    return OmegaConf.to_yaml(OmegaConf.create(_each_text(dataclasses.asdict(config), redact)))


def read_options(
    file: str, known: Iterable[str], apart: dict[str, type]
) -> tuple[list[str], dict[str, Any]]:
    """Return the options of a door that a YAML holds, as arguments, and those set `apart` by type.

    Raises ConfigError: it is no YAML, or has one that is not among the `known`.
    """
    try:
        content = dict(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ConfigError(f"--config {file}: no readable YAML of options ({reason})") from None
    others = {n: content.pop(n) for n, kind in apart.items() if isinstance(content.get(n), kind)}
    flags = []
    for name, value in content.items():
        if name not in known:
            raise ConfigError(f"--config {file}: {name}: no such option{nearest(str(name), known)}")
        values = value if isinstance(value, list) else [value]
        given = (v for v in values if v is not None and v is not False)
        flags += [f"--{name}" if v is True else f"--{name}={v}" for v in given]
    return flags, others


def local_rank() -> int:
    """Return which of this node's training processes this one is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _each_text(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """Return a config tree with every text changed, given its key; dataclasses in place."""
    if dataclasses.is_dataclass(value):
        vars(value).update(_each_text(vars(value), change))
    if isinstance(value, dict):
        return {name: _each_text(item, change, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_each_text(item, change, key) for item in value]
    return change(value, key) if isinstance(value, str) else value


def same_setting(old: dict[str, Any], new: dict[str, Any], key: str) -> bool:
    """Return whether a key says the same; one that an older kit did not know is then at rest."""
    if key not in old or key not in new:
        return not (old.get(key) or new.get(key))
    one, other = old[key], new[key]
    if isinstance(one, dict) and isinstance(other, dict):
        return all(same_setting(one, other, inner) for inner in one.keys() | other.keys())
    return one == other


def command_line(arguments: list[str]) -> str:
    """Return the command that reproduces this process, for the run folder; secrets redacted."""
    ranks, world = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    launcher = ["composer", "-n", ranks] if ranks else ["python"]
    if ranks and world not in (None, ranks):  # this line on each node, with its rank
        launcher += ["--world_size", world]
        for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
            launcher += [f"--{name.lower()}", os.environ.get(name, "0")]
    parts = (argument.partition("=") for argument in arguments)
    shown = [redact(key) + equals + redact(value, key) for key, equals, value in parts]
    return shlex.join(launcher + shown)


def _merge(path: str, overrides: list[str]) -> dict[str, Any]:
    if not Path(path).is_file():
        hint = nearest(path, map(str, Path(path).parent.glob("*.yaml")))
        raise ConfigError(f"{path}: no such config file{hint}")
    if stray := [override for override in overrides if "=" not in override]:
        advice = "an override is written key.sub=value, without dashes"
        raise ConfigError(f"command line: {stray[0]}: {advice}")
    try:
        tree = OmegaConf.load(path)
        if OmegaConf.is_dict(tree):
            OmegaConf.register_resolver("oc.env", _environment, replace=True)
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(overrides))
            tree = OmegaConf.to_container(tree, resolve=True)
            return _each_text(tree, lambda text, key: learn(key, text))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # the YAML parser's own errors carry line and column
        raise ConfigError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    raise ConfigError(f"{path}: expected keys and values at the top level")


def _environment(name: str, *default: str) -> str:
    """Return a variable of the environment for `${oc.env:NAME}`, if it holds no secret."""
    if name not in _ENVIRONMENT:
        raise ValueError(f"oc.env:{name} is not read; allowed: {', '.join(_ENVIRONMENT)}")
    if name not in os.environ and not default:
        raise ValueError(f"oc.env:{name} is not set")
    return os.environ.get(name, *default)


def _build(cls: type, data: Any, prefix: str, problems: list[Problem]) -> Any:
    """Return an instance of a config dataclass, noting every key that does not fit."""
    if not isinstance(data, dict):
        problems.append((prefix.rstrip("."), f"expected keys and values, got {data!r}"))
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        if key in fields:
            values[key] = _convert(value, hints[key], f"{prefix}{key}", problems)
            continue
        # `optimiser.lr=1` should be answered with `optimizer.lr`, not only with its first part.
        inner = list(value)[:1] if isinstance(value, dict) else []
        typed = ".".join(map(str, [key, *inner]))
        reason = NOT_HERE.get(key) if cls is AlgorithmsConfig else None
        hint = f" ({reason})" if reason else _hint(str(key), list(fields), inner)
        problems.append((prefix + typed, "unknown key" + hint))
    for name, f in fields.items():
        required = f.default is f.default_factory is dataclasses.MISSING
        if required and name not in values:
            problems.append((prefix + name, "missing, and it has no default"))
            values[name] = None
    return cls(**values)


def _convert(value: Any, kind: Any, key: str, problems: list[Problem]) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, key, problems)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, key + ".", problems)
    if origin is Literal:
        if value not in arguments:
            problems.append((key, f"unknown value {value!r}" + _hint(str(value), arguments)))
        return value
    if origin is list and isinstance(value, list):
        return [_convert(v, arguments[0], f"{key}[{i}]", problems) for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {k: _convert(v, arguments[1], f"{key}.{k}", problems) for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or kind
    is_stray = isinstance(value, bool) and plain is not bool  # as true is a whole number too
    if plain is Any or (isinstance(value, plain) and not is_stray):
        return value
    problems.append((key, f"expected {_describe(kind)}, got {value!r}"))
    return value


def _convert_union(value: Any, kinds: tuple, key: str, problems: list[Problem]) -> Any:
    if value is None:
        if types.NoneType not in kinds:
            problems.append((key, "expected a value, got nothing"))
        return None
    kinds = tuple(k for k in kinds if k is not types.NoneType)
    for kind in kinds:
        attempt: list[Problem] = []
        converted = _convert(value, kind, key, attempt)
        if not attempt:
            return converted
    expected = " or ".join(map(_describe, kinds))
    problems += attempt if len(kinds) == 1 else [(key, f"expected {expected}, got {value!r}")]
    return value


def _hint(name: str, allowed: typing.Sequence[Any], inner: typing.Sequence[Any] = ()) -> str:
    """Return the nearest allowed name, and all of them where they are few or none is near."""
    match = nearest(name, map(str, allowed))
    listed = f"allowed: {', '.join(map(str, allowed))}"
    if not match:
        return f" ({listed})"
    if inner:
        match = match.replace('"?)', f'.{inner[0]}"?)')
    return match[:-1] + f" {listed})" if len(allowed) <= 12 else match


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    names |= {list: "a list", dict: "keys and values"}
    return names.get(typing.get_origin(kind) or kind, str(kind))
