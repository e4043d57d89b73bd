"""Rebuild the report page of a run from its run folder, and print its summary.

python src/report_run.py runs/NAME
"""

import argparse
import sys
from pathlib import Path

from overture.errors import exit_on_error
from overture.report import build_report, load_run, summary_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_folder", type=Path, help="the folder of a run that ended: runs/NAME")
    folder = parser.parse_args().run_folder
    page = build_report(folder)
    print("\n".join(summary_lines(load_run(folder).result)))
    print(f"{'report':<20}{page}")


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
