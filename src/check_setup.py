"""Check this machine: Python, packages, devices, a matrix product and a tiny training step on each.

python src/check_setup.py
"""

import argparse
import sys

from overture.errors import exit_on_error


def main() -> int:
    """Print a line per finding; exit code 2 if something needed is broken."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()

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
