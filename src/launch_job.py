"""Write the script that runs a config on a cluster, after checking the config; submit it if asked.

    python src/launch_job.py yamls/x.yaml [a.b=c ...] --scheduler slurm --nodes 2 --gpus 8 \
        --time 24:00:00 --partition gpu --scratch /scratch/$USER --submit

The script goes to the terminal, and nowhere else without --out. docs/clusters.md has examples.
"""

import argparse
import sys
from pathlib import Path

from overture.data.schema import write_aside
from overture.errors import ConfigError, exit_on_error
from overture.launch import SCHEDULERS, Job, render, submit, submit_command


def _folder(text: str) -> Path:
    if not text:
        raise ConfigError("--scratch: is empty; is the variable set that it was taken from?")
    return Path(text)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("config", nargs="+", help="FILE.yaml and overrides a.b=c")
    add("--scheduler", choices=list(SCHEDULERS), required=True)
    add("--nodes", type=int, default=1)
    add("--gpus", type=int, default=1, help="of each node; each gets one rank")
    add("--time", metavar="H:MM:SS", help="limit; ranks save before it and the job goes on anew")
    add("--notice", type=int, help="seconds before it in which a run has to save; default 300")
    add("--partition", help="slurm: where to queue")
    add("--account", help="slurm: who pays")
    add("--queue", help="sge: where to queue")
    add("--resource", help="sge: kind of node, as in -l rt_F=NODES")
    add("--group", help="sge: who pays, as in qsub -g GROUP")
    add("--hosts", nargs="+", help="ssh: the nodes, the first of which all can reach by this name")
    what = "one more of the scheduler, as in --option=--mem=0 or --option='-pe mpi 2'"
    add("--option", action="append", default=[], help=what)
    add("--modules", nargs="+", default=[], help="environment modules to load on the nodes")
    add("--scratch", type=_folder, help="for TMPDIR and, unless it is set, HF_HOME")
    add("--container", metavar="IMAGE.sif", help="run in it, with Apptainer")
    add("--out", type=Path, metavar="FILE", help="write the script there")
    add("--submit", action="store_true", help="hand it to sbatch or qsub")
    options = vars(parser.parse_intermixed_args())
    arguments, out, wanted = (options.pop(name) for name in ("config", "out", "submit"))
    if out and out.exists():
        raise ConfigError(f"--out: {out} is there already; delete it, or choose another name")
    job = Job(**options)
    script = render(arguments, job)
    print(script, end="")
    if out:
        try:
            write_aside(out, script)
        except OSError as error:
            raise ConfigError(f"--out: {out} cannot be written ({error.strerror})") from None
        print(f"{out}: written", file=sys.stderr)
    if wanted:
        try:
            print(submit(script, job), file=sys.stderr)
        except ConfigError:
            if out:
                out.unlink()  # so that it is not in the way of the next try
            raise
    else:
        command = " ".join([*submit_command(job), str(out or "FILE")])
        print(f"not submitted; that is done by: {command}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(exit_on_error(main))
