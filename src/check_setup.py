"""Check this machine, and with a config, that a killed run of it goes on bit for bit.

    python src/check_setup.py
    python src/check_setup.py yamls/finetune/quickstart.yaml [a.b=c ...] --prove_resume

The first checks Python, packages, devices, a matrix product and a tiny training step on each.
"""

import argparse
import sys

from overture.config.load import load_config
from overture.config.schema import DOORS
from overture.errors import ConfigError, exit_on_error


def main() -> int:
    """Print a line per finding; exit code 2 if something is broken, 4 if a resume differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="*", help="FILE.yaml and overrides a.b=c")
    parser.add_argument("--prove_resume", action="store_true", help="train briefly, with a kill")
    args = parser.parse_intermixed_args()
    if bool(args.config) != args.prove_resume:
        raise ConfigError("a config and --prove_resume go together; without, see the machine")
    if args.config:
        from overture.prove_resume import prove_resume

        config = load_config(args.config, tasks=tuple(DOORS))
        for line in prove_resume(config, args.config):
            print(line, flush=True)
        return 0 if line.startswith("identical") else 4

    from overture.check import check_environment
    from overture.training.quiet import quiet_libraries

    quiet_libraries()
    broken = 0
    for what, fine, finding in check_environment():
        broken += not fine
        print(f"{'ok  ' if fine else 'STOP'}  {what:<20} {finding}")
    print("everything needed is here" if not broken else f"{broken} of these must be mended first")
    return 2 if broken else 0


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
