"""Check this machine; with a config, a run of it before it begins, or that a kill changes nothing.

    python src/check_setup.py
    python src/check_setup.py yamls/finetune/quickstart.yaml [a.b=c ...]
    python src/check_setup.py yamls/finetune/quickstart.yaml [a.b=c ...] --prove_resume

The first checks Python, packages, devices, a matrix product and a tiny training step on each. The
second looks at data, model and attention, takes some steps, and foretells memory and time. The
third kills a short run of the config, and compares where it went on to with one left alone.
"""

import argparse
import sys

from overture.config.load import load_config
from overture.config.schema import DOORS, Config
from overture.errors import ConfigError, exit_on_error


def main() -> int:
    """Print a line per finding; exit code 2 if something is broken, 4 if a resume differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="*", help="FILE.yaml and overrides a.b=c")
    parser.add_argument("--prove_resume", action="store_true", help="train briefly, with a kill")
    args = parser.parse_intermixed_args()
    if args.prove_resume and not args.config:
        raise ConfigError("--prove_resume needs a config; without one, the machine is checked")
    config = load_config(args.config, tasks=tuple(DOORS)) if args.config else None
    if args.prove_resume:
        return _prove(config, args.config)
    from overture.training.quiet import quiet_libraries

    quiet_libraries()
    if config:
        return _examine(config)
    from overture.check import check_environment

    broken = 0
    for what, fine, finding in check_environment():
        broken += not fine
        print(f"{'ok  ' if fine else 'STOP'}  {what:<20} {finding}")
    print("everything needed is here" if not broken else f"{broken} of these must be mended first")
    return 2 if broken else 0


def _examine(config: Config) -> int:
    from overture.training.doctor import examine

    found = []
    for finding in examine(config):
        found.append(finding)
        print(finding.part, *finding.more, sep="\n  ", flush=True)
    print()
    for part, verdict, text, _ in found:
        print(f"{verdict.upper() if verdict == 'stop' else verdict:<8}{part:<13}{text}")
    stops = sum(finding.verdict == "stop" for finding in found)
    print("this run can begin" if not stops else f"{stops} of these must be mended first")
    return 2 if stops else 0


def _prove(config: Config, arguments: list[str]) -> int:
    from overture.prove_resume import prove_resume

    for line in prove_resume(config, arguments):
        print(line, flush=True)
    return 0 if line.startswith("identical") else 4


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
