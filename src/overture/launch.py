"""Job scripts for clusters: a template of launch/ and a config that was checked for its ranks.

What a user wrote reaches a script in two ways only: as shell words, quoted, and in directives of
the scheduler, where nothing is allowed that could end them.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overture.config.load import load_config
from overture.config.schema import DOORS, Config
from overture.config.secrets import redact
from overture.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCHEDULERS = {"slurm": ("#SBATCH", "sbatch"), "sge": ("#$", "qsub"), "ssh": ("", "bash")}
NOTICE = 300  # seconds before the time limit at which the ranks are asked to save
# What each option becomes; where a scheduler has no form of it, it is refused.
_DIRECTIVES = {
    "time": {"slurm": "--time={}", "sge": "-l h_rt={}"},
    "partition": {"slurm": "--partition={}"}, "account": {"slurm": "--account={}"},
    "queue": {"sge": "-q {}"}, "resource": {"sge": "-l {}={nodes}"},
    "group": {"sge": ""}, "hosts": {"ssh": ""},  # the group is of qsub, not of the script
}  # fmt: skip
# What a job script says itself.
_OURS = {
    "slurm": r"--(nodes|ntasks|gpus(?!-)|time(?!-)|requeue|no-requeue|signal)\b|-[NntG](?![a-z-])",
    "sge": r"-(r|notify)$|(.*,)?[hs]_rt=",
}
_WORD = re.compile(r"[\w.,:=/+%*@~^-]+")


@dataclass
class Job:
    """Where a config is to run; the door has the meaning of each option."""

    scheduler: str
    nodes: int = 1
    gpus: int = 1
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    queue: str | None = None
    resource: str | None = None
    group: str | None = None
    hosts: list[str] | None = None
    notice: int | None = None
    option: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    scratch: Path | None = None
    container: str | None = None  # a file, or an address as docker://...


def render(arguments: list[str], job: Job) -> str:
    """Return the script that runs `FILE.yaml a.b=c ...` as a job.

    Raises ConfigError for all that is wrong with the config on this many ranks, else for all that
    is wrong with the job.
    """
    ranks = max(1, job.nodes * job.gpus)
    config = load_config(arguments, tuple(DOORS), world_size=ranks)
    problems = list(_problems([*arguments, config.run_folder], job))
    if re.search(r"\$\{?\w", config.run_folder):  # expanded in the job, but for the logs
        problems.append(f"run_folder: {config.run_folder}: write out what a $ stands for")
    if problems:
        raise ConfigError("\n  ".join(problems))
    mark, _ = SCHEDULERS[job.scheduler]
    set_here = {name: value for name in _DIRECTIVES if (value := getattr(job, name)) is not None}
    forms = {name: _DIRECTIVES[name][job.scheduler] for name in set_here}
    options = [forms[n].format(set_here[n], nodes=job.nodes) for n in forms if forms[n]]
    notice = NOTICE if job.notice is None else job.notice
    notice = min(notice, _seconds(job.time) // 2) if job.time else notice
    parts = {
        "name": config.run_name, "nodes": str(job.nodes), "gpus": str(job.gpus),
        "notice": str(notice),
        "options": "".join(f"\n{mark} {option}" for option in [*options, *job.option]),
        "variables": _variables(arguments, config, job, notice),
        "node": (ROOT / "launch" / "node.sh").read_text("utf-8").rstrip(),
    }  # fmt: skip
    template = (ROOT / "launch" / f"{job.scheduler}.sh").read_text("utf-8")
    script = re.sub(r"@([a-z]+)@", lambda found: parts[found[1]], template)
    if redact(script) != script:
        fault = "a secret would stand in the script; give it in the environment, which jobs inherit"
        raise ConfigError(f"command line: {fault}")
    return script


def submit_command(job: Job) -> list[str]:
    """Return the command that hands a script, named behind it or on its input, to the scheduler."""
    group = ["-g", job.group] if job.group else []
    return [SCHEDULERS[job.scheduler][1], *group]


def submit(script: str, job: Job) -> str:
    """Hand a script to the scheduler and return its answer; ConfigError if it refuses."""
    program, *options = submit_command(job)
    if job.scheduler == "ssh":
        raise ConfigError("--submit: ssh has no queue; write the script with --out and run it")
    try:
        done = subprocess.run([program, *options], input=script, capture_output=True, text=True)
    except FileNotFoundError:
        advice = "write the script with --out, and submit it where there is one"
        raise ConfigError(f"--submit: no {program} on this machine; {advice}") from None
    if done.returncode:
        raise ConfigError(f"--submit: {program} refused: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def _problems(texts: list[str], job: Job) -> Iterator[str]:
    for name in ("nodes", "gpus", "notice"):
        number = getattr(job, name)
        if number is not None and number < 1:
            yield f"--{name}: must be at least 1"
    if job.notice is not None and not (job.scheduler == "slurm" or job.time):
        yield "--notice: says how long before --time the ranks are asked, and there is none"
    for name, forms in _DIRECTIVES.items():
        value = getattr(job, name)
        if value is None:
            continue
        if job.scheduler not in forms:
            yield f"--{name}: {job.scheduler} has no such thing (only {', '.join(forms)})"
        for word in [value] if isinstance(value, str) else value:
            if not _WORD.fullmatch(word) or word.startswith("-"):
                yield f"--{name}: {word!r} is not a name that can stand in a job script"
    is_time = job.time is None or re.fullmatch(r"\d{1,4}:[0-5]\d:[0-5]\d", job.time)
    if not is_time or (job.time and not _seconds(job.time)):
        yield f"--time: {job.time!r} is not hours:minutes:seconds, as in 24:00:00"
    if job.scheduler == "ssh" and len(job.hosts or []) != job.nodes:
        yield f"--hosts: names {len(job.hosts or [])} hosts, but --nodes is {job.nodes}"
    for option in job.option:
        if job.scheduler == "ssh":
            yield "--option: ssh has none"
        if not option.startswith("-") or not all(map(_WORD.fullmatch, option.split(" "))):
            yield f"--option: {option!r} is not an option that can stand in a job script"
        for word in option.split(" "):
            if own := re.match(_OURS.get(job.scheduler, "(?!)"), word):
                yield f"--option: {own[0]} is set by the script: --nodes, --gpus, --time, --notice"
    if job.container and "://" not in job.container and not Path(job.container).is_file():
        yield f"--container: {job.container}: no such image (launch/apptainer.def makes one)"
    for text in [*texts, *job.modules, str(job.scratch), str(Path.cwd())]:
        if not text.isprintable():
            yield f"command line: {text!r} holds a character that cannot be printed"


def _variables(arguments: list[str], config: Config, job: Job, notice: int) -> str:
    """Return the assignments that a template begins with, each value quoted for the shell."""
    here = Path.cwd()
    logs = f"{config.run_folder}/logs"
    launcher = [str(Path(sys.executable).parent / "composer")]
    if job.container:
        seen = [here, ROOT, *([job.scratch.absolute()] if job.scratch else [])]
        binds = [word for path in dict.fromkeys(seen) for word in ("--bind", str(path))]
        image = job.container if "://" in job.container else str(Path(job.container).absolute())
        launcher = ["apptainer", "exec", "--nv", *binds, "--pwd", str(here), image]
        # Apptainer hands signals on, and undoes that its child is deaf to them (node.sh).
        launcher += ["bash", "-c", 'trap "" USR1 USR2 TERM INT; exec "$@"', "composer", "composer"]
    values: dict[str, Any] = {
        "directory": here, "logs": logs,
        # Composer fills in {rank}; other braces are the path's own.
        "rank_logs": logs.replace("{", "{{").replace("}", "}}") + "/rank{rank}",
        "nodes": job.nodes, "gpus": job.gpus, "launcher": launcher,
        "command": [ROOT / DOORS[config.task], *arguments], "modules": job.modules,
        "scratch": job.scratch.absolute() if job.scratch else "",
    }  # fmt: skip
    if job.scheduler == "sge":  # seconds until the ranks are asked, if there is a limit
        values |= {"patience": _seconds(job.time) - notice if job.time else 0, "deleted": ""}
    if job.scheduler == "ssh":
        values["hosts"] = job.hosts
    lists = {n: f"({shlex.join(map(str, v))})" for n, v in values.items() if isinstance(v, list)}
    quoted = {name: shlex.quote(str(value)) for name, value in values.items()} | lists
    return "\n".join(f"{name}={value}" for name, value in quoted.items())


def _seconds(time: str) -> int:
    hours, minutes, seconds = map(int, time.split(":"))
    return 3600 * hours + 60 * minutes + seconds
