"""Rebuild the report page of a run and print its summary; of several, a page of them side by side.

python src/report_run.py runs/NAME
python src/report_run.py runs/ONE runs/OTHER [--out comparison.html]
"""

import argparse
import sys
from pathlib import Path

from overture.compare import compare_runs
from overture.errors import ConfigError, exit_on_error
from overture.report import build_report, load_run, summary_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs: runs/NAME")
    parser.add_argument("--out", type=Path, help="of several: the page; default: comparison.html")
    args = parser.parse_args()
    if args.out and len(args.runs) == 1:
        raise ConfigError("--out is of several runs; a run's page is its own report.html")
    several = len(args.runs) > 1
    page = args.out or (Path("comparison.html") if several else args.runs[0] / "report.html")
    try:
        compare_runs(args.runs, page) if several else build_report(args.runs[0])
    except OSError as error:
        raise ConfigError(f"{page}: cannot be made ({error.strerror})") from None
    if not several:
        print("\n".join(summary_lines(load_run(args.runs[0]).result)))
    print(f"{'comparison' if several else 'report':<20}{page}")


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
