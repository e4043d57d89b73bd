"""Job scripts: what reaches the launcher word by word, what is refused, signals."""

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from overture.errors import ConfigError
from overture.launch import SCHEDULERS, Job, render, submit

ROOT = Path(__file__).parents[1]
SMOKE = "yamls/smoke/finetune.yaml"
FOUR = ["global_train_batch_size=4", "device_train_microbatch_size=2"]
EIGHT = ["device_train_microbatch_size=1"]  # up to eight ranks
HOSTS = {"slurm": None, "sge": None, "ssh": ["user@first", "second"]}
EVIL = 'it\'s "$(touch broken)" `touch broken`; touch broken & {x} \\ *'

# Stands where composer would: notes its words, starts one rank, returns the rank's code.
LAUNCHER = f"""#!{sys.executable}
import os, pathlib, subprocess, sys
here = pathlib.Path(__file__).parent
node = sys.argv[sys.argv.index("--node_rank") + 1]
(here / f"words{{node}}").write_text("\\0".join(sys.argv[1:]))
lines = "\\0".join(f"{{k}}={{v}}" for k, v in os.environ.items())
(here / f"environment{{node}}").write_text(lines)
rank = pathlib.Path(__file__).with_name("rank.py")
sys.exit(subprocess.run([sys.executable, rank]).returncode if rank.exists() else 0)
"""
# As a rank of ours does: it hears USR1 although the launcher was started deaf to it.
RANK = """
import pathlib, signal, sys, time
def stop(*_):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
pathlib.Path(__file__).with_name("ready").touch()
time.sleep(60)
"""


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder that is first on PATH, beside whose Python a launcher lies."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "composer", LAUNCHER)
    monkeypatch.setattr("overture.launch.sys.executable", str(folder / "python"))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run(script: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash"], input=script, cwd=cwd, capture_output=True, text=True, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip


FORMS = {
    "slurm": {"nodes": 2, "time": "24:00:00", "partition": "gpu", "account": "me"},
    "sge": {"nodes": 2, "time": "0:10:00", "resource": "rt_F", "queue": "all.q", "group": "gaa1"},
    "ssh": {"nodes": 2, "hosts": ["a", "me@b"]},
}


@pytest.mark.parametrize("scheduler", FORMS)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "all"])
def test_scripts_pass_the_shell_and_shellcheck(scheduler, plain, tmp_path):
    job = Job(scheduler, gpus=2, **FORMS[scheduler])
    if not plain:
        (tmp_path / "a b.sif").touch()
        job.container, job.scratch = str(tmp_path / "a b.sif"), Path("/scratch/$USER")
        job.modules = ["cuda/12.6", "python/3.11"]
    script = render([SMOKE, *EIGHT, f"run_folder=runs/{EVIL}"], job)
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "-"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("scheduler", FORMS)
def test_every_word_arrives_as_it_was_written(scheduler, programs, tmp_path, monkeypatch):
    # A folder, a YAML's name, a value and the run folder that would each break out of a quote.
    here = tmp_path / EVIL.replace("/", "")
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copy(ROOT / SMOKE, here / "a' b.yaml")
    arguments = ["a' b.yaml", *FOUR, "run_name=r", f"run_folder={EVIL}/{{run_name}}"]
    job = Job(scheduler, nodes=2, hosts=HOSTS[scheduler], scratch=here / "scratch")
    script = render(arguments, job)
    # Where the scheduler would run something on a node, it is run here.
    program(programs / "ssh", '#!/bin/bash\nexec env -i PATH="$PATH" "${@: -2}"\n')
    srun = '#!/bin/bash\nfor node in 0 1; do SLURM_NODEID=$node "${@: -3}" || exit; done\n'
    program(programs / "srun", srun)
    program(programs / "scontrol", "#!/bin/bash\necho first; echo second\n")
    (tmp_path / "hosts").write_text("first 2 all.q\nsecond 2 all.q\nfirst 1 all.q\n")
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x[1-2]", "JOB_ID": "7"}
    given |= {"PE_HOSTFILE": str(tmp_path / "hosts"), "HF_TOKEN": "hf_a'b $c"}
    monkeypatch.delenv("HF_HOME", raising=False)
    done = run(script, here, **given)
    assert done.returncode == 0, done.stderr + done.stdout
    assert not list(tmp_path.rglob("broken"))
    for node in (0, 1):
        words = (programs / f"words{node}").read_text().split("\0")
        assert words[words.index(str(ROOT / "finetune.py")) + 1 :] == arguments
        options = dict(zip(words[0:14:2], words[1:14:2], strict=True))
        assert options["-n"] == "1"
        assert (options["--world_size"], options["--node_rank"]) == ("2", str(node))
        assert options["--master_addr"] == "first"
        assert 20000 <= int(options["--master_port"]) < 32000
        logs = here / EVIL / "r" / "logs"
        assert here / options["--stdout"].format(rank=1) == logs / "rank1.out"
        assert (logs / f"rank{node}.err").exists()
        lines = (programs / f"environment{node}").read_text().split("\0")
        found = dict(line.split("=", 1) for line in lines)
        assert found["HF_TOKEN"] == "hf_a'b $c"
        assert found["HF_HOME"] == str(here / "scratch" / "huggingface")
        assert Path(found["TMPDIR"]).parent == here / "scratch"
    assert list((here / "scratch").iterdir()) == [here / "scratch" / "huggingface"]
    assert "hf_a" not in script


@pytest.mark.parametrize(
    ("first", "second", "code"), [(75, 137, 75), (5, 137, 5), (0, 137, 137), (0, 0, 0)]
)
def test_slurm_queues_again_where_the_first_node_has_saved(first, second, code, programs, tmp_path,
                                                           monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / SMOKE, tmp_path / "x.yaml")
    rank = 'import sys\nsys.exit({} if node == "0" else {})\n'
    head = LAUNCHER.partition("rank = ")[0]
    program(programs / "composer", head + rank.format(first, second))
    # As it does, it returns the highest code of all.
    srun = 'for node in 0 1; do SLURM_NODEID=$node "${@: -3}"; c=$?; ((c > m)) && m=$c; done'
    program(programs / "srun", f"#!/bin/bash\nm=0\n{srun}\nexit $m\n")
    program(programs / "scontrol", '#!/bin/bash\n[ "$1" = show ] && echo a || echo "$@" > asked\n')
    script = render(["x.yaml", *FOUR, "run_name=r"], Job("slurm", nodes=2))
    done = run(script, tmp_path, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="x[1-2]")
    assert done.returncode == code, done.stdout + done.stderr
    assert (tmp_path / "asked").exists() == (code == 75)
    assert not list((tmp_path / "runs" / "r" / "logs").glob("code*"))


def test_container_is_told_what_it_sees(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "over ture.sif").touch()
    shutil.copy(ROOT / SMOKE, "a.yaml")
    job = Job("slurm", container="over ture.sif", scratch=Path("/scratch/me"))
    line = next(x for x in render(["a.yaml"], job).splitlines() if x.startswith("launcher="))
    words = shlex.split(line.removeprefix("launcher=(").removesuffix(")"))
    assert words[:3] == ["apptainer", "exec", "--nv"]
    bound = {words[i + 1] for i, word in enumerate(words) if word == "--bind"}
    assert bound == {str(tmp_path), str(ROOT), "/scratch/me"}
    image = words.index(str(tmp_path / "over ture.sif"))
    assert words[image - 2 : image] == ["--pwd", str(tmp_path)]
    # What is started in it is as deaf as it has to be, though apptainer undoes that.
    say = 'kill -TERM $$; kill -USR1 $$; echo "$@"'
    inside = [*words[image + 1 : -1], "bash", "-c", say, "x", "still", "here"]
    done = subprocess.run(inside, capture_output=True, text=True, timeout=30)
    assert (words[-1], done.stdout) == ("composer", "still here\n")


def test_directives_say_what_was_asked_for():
    asked = {"time": "0:04:00", "partition": "gpu", "account": "me"}
    slurm = render([SMOKE, *EIGHT], Job("slurm", 2, 4, **asked, option=["--mem=0", "-C a100"]))
    for directive in ("nodes=2", "gpus-per-node=4", "time=0:04:00", "partition=gpu", "account=me",
                      "mem=0", "signal=B:USR1@120"):  # fmt: skip
        assert f"\n#SBATCH --{directive}\n" in slurm
    assert "\n#SBATCH -C a100\n" in slurm
    sge = render([SMOKE, *EIGHT], Job("sge", 2, 4, time="24:00:00", resource="rt_F", group="gaa1"))
    for directive in ("-l rt_F=2", "-l h_rt=24:00:00", "-N run-finetune"):
        assert f"\n#$ {directive}\n" in sge
    assert f"\npatience={24 * 3600 - 300}\n" in sge
    assert "gaa1" not in sge  # it goes to qsub


def test_config_is_checked_for_its_ranks(run_door):
    done = run_door("src/launch_job.py", SMOKE, "optimiser.lr=1", "--scheduler", "slurm")
    assert done.returncode == 2
    assert 'optimiser.lr: unknown key (did you mean "optimizer.lr"?)' in done.stderr
    assert not done.stdout
    done = run_door("src/launch_job.py", SMOKE, "--scheduler", "sge", "--nodes", 3, "--gpus", 4)
    assert done.returncode == 2
    assert "global_train_batch_size: 8 cannot be divided evenly over 12 ranks" in done.stderr


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (Job("slurm", partition="a\n#SBATCH --uid=0"), "--partition: 'a\\n#SBATCH"),
        (Job("slurm", account="$(id)"), "--account: '$(id)' is not a name"),
        (Job("slurm", option=["--mem=1;id"]), "--option: '--mem=1;id' is not"),
        (Job("slurm", option=["mem=1"]), "--option: 'mem=1' is not"),
        (Job("slurm", option=["--nodes=4"]), "--option: --nodes is set by the script"),
        (Job("slurm", option=["-N 4"]), "--option: -N is set by the script"),
        (Job("sge", option=["-l mem=1G,h_rt=9:00:00"]), "--option: mem=1G,h_rt= is set by"),
        (Job("sge", option=["-r n"]), "--option: -r is set by the script"),
        (Job("sge", notice=600), "--notice: says how long before --time"),
        (Job("slurm", time="0:00:00"), "--time: '0:00:00' is not hours:minutes:seconds"),
        (Job("slurm", resource="rt_F"), "--resource: slurm has no such thing (only sge)"),
        (Job("sge", partition="gpu"), "--partition: sge has no such thing (only slurm)"),
        (Job("sge", time="1-00:00:00"), "--time: '1-00:00:00' is not hours:minutes:seconds"),
        (Job("ssh", nodes=2, hosts=["a"]), "--hosts: names 1 hosts, but --nodes is 2"),
        (Job("ssh", hosts=["-oProxyCommand=id"]), "--hosts: '-oProxyCommand=id' is not a name"),
        (Job("slurm", nodes=0), "--nodes: must be at least 1"),
        (Job("slurm", modules=["a\nb"]), "cannot be printed"),
        (Job("slurm", container="no.sif"), "--container: no.sif: no such image"),
    ],
)
def test_jobs_that_cannot_be(job, said):
    arguments = [SMOKE, "global_train_batch_size=4", "device_train_microbatch_size=1"]
    with pytest.raises(ConfigError, match=re.escape(said)):
        render(arguments, job)


def test_newline_in_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"run_folder: \$HOME/x: write out what a \$ stands for"):
        render([SMOKE, "run_folder=$HOME/x"], Job("sge"))
    with pytest.raises(ConfigError, match="cannot be printed"):
        render([SMOKE, "run_folder=a\n#$ -o /x"], Job("sge"))


def test_no_secret_gets_into_a_script():
    with pytest.raises(ConfigError, match="a secret would stand in the script"):
        render([SMOKE, "data_remote=s3://user:correcthorse@host/x"], Job("slurm"))


@pytest.mark.parametrize("scheduler", ["slurm", "sge"])
def test_submit_hands_over_what_was_shown(scheduler, run_door, tmp_path, monkeypatch):
    name = SCHEDULERS[scheduler][1]
    program(tmp_path / name, f'#!/bin/bash\necho "given:$*"\ncat > {tmp_path}/seen\n')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    out, group = tmp_path / "job.sh", ["--group", "gaa1"] if scheduler == "sge" else []
    command = ["src/launch_job.py", SMOKE, "--scheduler", scheduler, *group]
    shown = run_door(*command)
    assert shown.returncode == 0, shown.stderr
    assert f"that is done by: {name} {'-g gaa1 ' if group else ''}FILE" in shown.stderr
    assert not (tmp_path / "seen").exists()
    done = run_door(*command, "--out", out, "--submit")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").read_text() == out.read_text() == done.stdout == shown.stdout
    assert done.stderr.splitlines()[-1] == f"given:{'-g gaa1' if group else ''}"
    again = run_door(*command, "--out", out)
    assert again.returncode == 2
    assert "is there already" in again.stderr
    program(tmp_path / name, "#!/bin/bash\nexit 1\n")  # then nothing is in the way of the next try
    refused = run_door(*command, "--out", tmp_path / "other.sh", "--submit")
    assert (refused.returncode, (tmp_path / "other.sh").exists()) == (2, False)
    nowhere = run_door(*command, "--out", tmp_path / "no" / "job.sh")
    assert nowhere.returncode == 2
    assert "cannot be written (No such file or directory)" in nowhere.stderr


def test_submit_without_a_scheduler_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        submit("", Job("slurm"))
    program(tmp_path / "sbatch", "#!/bin/sh\necho 'error: no such partition' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="sbatch refused: error: no such partition"):
        submit("", Job("slurm"))
    with pytest.raises(ConfigError, match="ssh has no queue"):
        submit("", Job("ssh"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 99), (signal.SIGTERM, 99), (signal.SIGUSR2, 75)]
)
def test_job_asked_to_stop_runs_again_unless_it_was_deleted(number, code, programs, tmp_path):
    # As Grid Engine does it: to all of the group. 99 is its code for: run this job again.
    (programs / "rank.py").write_text(RANK)
    script = tmp_path / "job.sh"
    script.write_text(render([SMOKE, f"run_folder={tmp_path}/run"], Job("sge", time="1:00:00")))
    environment = {**os.environ, "JOB_ID": "7", "PE_HOSTFILE": ""}
    process = subprocess.Popen(["bash", script], env=environment, start_new_session=True)
    deadline = time.monotonic() + 20
    while not (programs / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, number)
    assert process.wait(timeout=20) == code
    time.sleep(0.5)
    command = ["ps", "-eo", "pgid=,stat=,args="]  # the sleep of the timer must not be there
    left = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not [x for x in left.splitlines() if x.split()[0] == str(process.pid) and " Z" not in x]


def test_other_exit_codes_come_through(programs, tmp_path):
    (programs / "rank.py").write_text("import sys; sys.exit(3)")
    script = render([SMOKE, f"run_folder={tmp_path}/run"], Job("sge"))
    assert run(script, tmp_path, JOB_ID="7", PE_HOSTFILE="").returncode == 3
    script = render([SMOKE, *FOUR], Job("sge", nodes=2))
    done = run(script, tmp_path, JOB_ID="7", PE_HOSTFILE="")
    assert done.returncode == 2
    assert "2 nodes were asked for, but this job has 1" in done.stdout


def test_apptainer_image_is_that_of_the_dockerfile():
    docker = (ROOT / "Dockerfile").read_text()
    apptainer = (ROOT / "launch" / "apptainer.def").read_text()
    assert re.search(r"^FROM (\S+)", docker, re.M)[1] in apptainer
    ours = " ".join(apptainer.split()).replace("{{ PINS }}", '"$PINS"')
    for command in re.findall(r"(?:apt-get|/opt/venv/bin/\w+|python3 -m venv)[^&\\;]+", docker):
        assert " ".join(command.split()) in ours, command


def test_commands_of_the_page_render(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "clusters.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^ *(python src/launch_job.py .*)$", text, re.M)
    assert len(commands) >= 4
    for command in commands:
        line = re.sub(r"--container \S+|--out \S+|--submit", "", command)
        line = line.replace("python", sys.executable, 1)
        done = run(f"{line} > /dev/null", ROOT, SCRATCH="/scratch/me")
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_a_variable_that_is_not_set_is_no_scratch_disk(run_door):
    done = run_door("src/launch_job.py", SMOKE, "--scheduler", "slurm", "--scratch", "")
    assert done.returncode == 2
    assert "--scratch: is empty; is the variable set" in done.stderr
