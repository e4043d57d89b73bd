"""The pins: each with its hashes, both sets alike but for torch's own; waivers that end."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHS_OWN = re.compile(r"torch|torchvision|triton|setuptools|(nvidia|cuda)-.*")
DEFAULT, LATER = "requirements.txt", "requirements-torch2.11.txt"
COMPILED = [DEFAULT, LATER, "requirements-dev.txt", "requirements-uv.txt"]


def pins(name: str) -> dict[str, set[tuple[str, ...]]]:
    """Return (version, marker, hashes...) of each package of a compiled file."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for line in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
        pin, *hashes = re.split(r"\s+--hash=", line.strip())
        package, version, marker = re.fullmatch(r"([\w.-]+)==([\w.]+)(?: ; (.+))?", pin).groups()
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", h) for h in hashes), pin
        found.setdefault(package, set()).add((version, marker or "", *sorted(hashes)))
    return found


def wanted(name: str) -> dict[str, str]:
    """Return the version of each package of an .in file, empty where none is named."""
    lines = (ROOT / name).read_text().splitlines()
    lines = [x for x in lines if x and not x.startswith(("#", "-c"))]
    return {re.split(r"==|\[", x)[0]: x.partition("==")[2] for x in lines}


def make(*arguments: str) -> subprocess.CompletedProcess:
    command = ["make", "--no-print-directory", *arguments]  # also below another make
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", COMPILED)
def test_every_pin_has_hashes_and_nothing_else_is_in_the_file(name):
    assert pins(name)


def test_both_sets_are_alike_but_for_torchs_own():
    default, later = (
        {k: v for k, v in pins(name).items() if not TORCHS_OWN.fullmatch(k)}
        for name in (DEFAULT, LATER)
    )
    assert default == later


@pytest.mark.parametrize("name", [DEFAULT, LATER])
def test_pins_of_the_development_tools_are_the_same(name):
    used, tools = pins(name), pins("requirements-dev.txt")
    for package in used.keys() & tools.keys():
        assert {v for v, *_ in tools[package]} <= {v for v, *_ in used[package]}, package


@pytest.mark.parametrize(
    ("sources", "name"),
    [
        (["requirements.in"], DEFAULT),
        (["requirements.in", "requirements-torch2.11.in"], LATER),
        (["requirements-dev.in"], "requirements-dev.txt"),
    ],
)
def test_compiled_files_follow_their_sources(sources, name):
    compiled = pins(name)
    for package, version in {k: v for s in sources for k, v in wanted(s).items()}.items():
        assert {v for v, *_ in compiled[package]} == {version} or not version, package


def test_an_unknown_set_is_one_sentence():
    done = make("TORCH=2.9", "venv")
    assert done.returncode == 2
    assert "TORCH=2.9: there are pins for TORCH=2.7 (the default) and TORCH=2.11" in done.stderr
    assert not done.stdout


def audit(waivers: Path, auditor: str, today: str) -> subprocess.CompletedProcess:
    variables = [f"WAIVERS={waivers}", f"PIP_AUDIT={auditor}", f"TODAY={today}"]
    return make("--old-file=venv", "audit", *variables)


def test_audit_takes_the_waivers_and_asks_for_every_file():
    done = audit(ROOT / "audit-waivers.txt", "echo", "2026-11-22")
    assert done.returncode == 0, done.stderr
    for name in COMPILED:
        assert re.search(rf"^-r {re.escape(name)} --ignore-vuln CVE-", done.stdout, re.MULTILINE)
    assert audit(ROOT / "audit-waivers.txt", "false", "2026-11-22").returncode == 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("CVE-1-1 2026-01-01 2026-02-28 old", "its day is over"),
        ("CVE-1-1 2026-01-01 2026-03-01", "a waiver is ID"),
        ("CVE-1-1 2026-01-01 soon for a reason", "a waiver is ID"),
        ("--help 2026-01-01 2026-03-01 for a reason", "a waiver is ID"),
    ],
)
def test_a_waiver_that_ended_or_is_incomplete_stops_the_audit(tmp_path, line, complaint):
    path = tmp_path / "waivers.txt"
    path.write_text(f"# comment\n\nCVE-1-0 2026-01-01 2026-03-01 its last day\n{line}\n")
    done = audit(path, "echo", "2026-03-01")
    assert done.returncode == 2
    assert f"{path}:4: {complaint}" in done.stderr
    assert "requirements" not in done.stdout
