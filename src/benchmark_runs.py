"""Time to train over seeds by MLPerf's rule, every run checked, and machines side by side.

    python src/benchmark_runs.py yamls/finetune/quickstart.yaml [a.b=c ...] --seeds 5
    python src/benchmark_runs.py --compare runs/benchmark-a runs/benchmark-b

The same command keeps finished runs and goes on with the others. Exit codes: 0 the figure holds, 2
config, 3 it does not (said why), 4 a log is damaged, 5 a run broke off, 75 asked to stop.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from overture.config.load import load_config
from overture.config.schema import DOORS
from overture.data.schema import write_aside
from overture.errors import EXIT_TARGET_MISSED, ConfigError, exit_on_error

ROOT = Path(__file__).parents[1]
REFERENCES = ROOT / "benchmarks" / "reference"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="*", help="FILE.yaml with a loss target, overrides a.b=c")
    parser.add_argument("--seeds", type=int, default=5, help="runs, from the config's seed upward")
    parser.add_argument("--out", type=Path, help="default: runs/benchmark-<run_name>")
    python = shlex.quote(sys.executable)
    parser.add_argument("--launch", default=python, help="such as 'composer -n 8'")
    parser.add_argument("--reference", type=Path, help="benchmark.json to hold convergence against")
    parser.add_argument("--price", type=float, help="of an hour of the machine")
    parser.add_argument("--compare", type=Path, nargs="+", help="earlier ones: folders, files")
    args = parser.parse_intermixed_args()
    if bool(args.config) == bool(args.compare):
        raise ConfigError("give a config to run, or --compare and folders")
    given = {n for n, v in vars(args).items() if v not in (None, [], parser.get_default(n))}
    if args.compare and (more := given - {"compare"}):
        raise ConfigError(f"--compare takes folders alone, and no --{min(more)}")
    if args.seeds < 3:
        raise ConfigError(f"--seeds: {args.seeds}, but the fastest and the slowest are dropped: 3")
    config = load_config(args.config, tuple(DOORS)) if args.config else None
    if config and config.callbacks.loss_target is None:
        raise ConfigError("callbacks.loss_target: a time to train needs one")
    from overture import benchmark  # with torch, once the config is known good

    if not config:
        print("\n".join(benchmark.table([benchmark.stored_in(place) for place in args.compare])))
        return 0
    name, how = config.run_name, benchmark.setting(config)
    stored = args.reference or REFERENCES / f"{name}.json"
    reference = benchmark.stored(stored) if args.reference or stored.is_file() else None
    other = benchmark.other_setting(reference, how) if reference else "there is none"
    if other and args.reference:
        raise ConfigError(f"--reference {stored}: {other}; samples to a target do not compare")
    if other:  # of those that are shipped
        print(f"convergence is held against no reference: {other}")
        reference = None
    if reference:
        benchmark.check_reference(reference, args.seeds)
    out, runs = args.out or Path("runs") / f"benchmark-{name}", []
    command = [*shlex.split(args.launch), str(ROOT / DOORS[config.task]), *args.config]
    seeds = range(config.seed, config.seed + args.seeds)
    for seed in seeds:
        benchmark.check_kept(out / f"seed-{seed}", config)
    for seed, folder in benchmark.run_seeds(command, name, seeds, out):
        runs.append(benchmark.outcome(seed, folder, config.global_train_batch_size))
        said = f"target in {s:.1f} s" if (s := runs[-1]["seconds"]) else "target missed"
        print(f"seed {seed}: {said}, {runs[-1]['samples']:,} samples", flush=True)
    folders = [out / f"seed-{seed}" for seed in seeds]
    wrong = [*benchmark.faults_of_set(folders)]
    result = benchmark.summary(name, how, runs, wrong, folders[0], reference, args.price)
    write_aside(out / "benchmark.json", json.dumps(result, indent=1) + "\n")
    print("\n".join([*benchmark.table([result]), *result["faults"], f"in {out}/benchmark.json"]))
    return 0 if result["valid"] else EXIT_TARGET_MISSED


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
