"""The report page: built from a synthetic run folder, then parsed and compared with its files."""

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from browser import browse, check_charts, drawn, height_of, needs_chromium
from overture.errors import ConfigError
from overture.report import build_report, load_run, summary_lines

DOOR = Path(__file__).parents[1] / "src" / "report_run.py"
VOID = {"meta", "br", "input"}
HOSTILE = '<script>alert("x")</script><img src="http://example.org/x.png"> & more'
RESULT = {
    "run_name": "dolly-<b>lora</b>",
    "status": "target_reached",
    "target": 1.5,
    "eval_cross_entropy": 1.4375,
    "eval_perplexity": 4.21015625,
    "eval_cross_entropy_before": 3.90625,
    "time_to_train_seconds": 723.4,
    "steps": 80,
    "tokens_seen": 1638400,
    "label_tokens_seen": 704512,
    "tokens_per_second": 4098.25,
    "label_tokens_per_second": 1798.5,
    "seed": 17,
    "metrics": {
        "exact_match_before": 0.046875,
        "exact_match_after": 0.703125,
        "exact_match_prompts": 256,
        "rouge_l": 0.4125,
    },
}


class Page(HTMLParser):
    """A strict reader: every tag must close in order; keeps what the tests look at."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, tag: str, style: str | None = None) -> list[dict]:
        classes = [(t, a, (a.get("class") or "").split()) for t, a in self.tags]
        return [a for t, a, words in classes if t == tag and (style is None or style in words)]

    def curve(self, name: str) -> list[tuple[float, float]]:
        (line,) = [a for a in self.all("polyline") if a["data-name"] == name]
        return [tuple(map(float, point.split(","))) for point in line["points"].split()]

    def values(self) -> list[str]:
        return [a["value"] for a in self.all("data")]


def train_record(step: int, **changes) -> dict:
    record = {"kind": "train", "step": step, "seconds": 2.0 * step, "tokens": 512 * step}
    record |= {"label_tokens": 220 * step, "loss": 4 - step / 40, "learning_rate": 1e-3}
    record |= {"tokens_per_second": 4000.0 + step, "label_tokens_per_second": 1700.0}
    return record | {"padding_share": 0.02, "data_wait_share": 0.01, "mfu": None} | changes


def eval_record(step: int, loss: float) -> dict:
    record = {"kind": "eval", "step": step, "seconds": 2.0 * step, "cross_entropy": loss}
    return record | {"perplexity": math.exp(loss)}


def write_lines(path: Path, records: list[dict], tail: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


@pytest.fixture
def folder(tmp_path):
    """A full run folder: 20 training records, 3 evals, 3 generations."""
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    trains = [train_record(step) for step in range(4, 84, 4)]
    evals = [eval_record(0, 3.90625), eval_record(40, 2.25), eval_record(80, 1.4375)]
    write_lines(tmp_path / "metrics.jsonl", [*evals[:1], *trains[:10], evals[1], *trains[10:]])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evals[2]) + "\n")
    (tmp_path / "config.yaml").write_text(f"run_name: dolly\nnote: '{HOSTILE}'\n")
    environment = {"command": "python finetune.py x.yaml 'a.b=<c>'", "versions": {"torch": "2.7.0"}}
    split = {"split": "train_loader", "source": "a<b>.jsonl", "sha256": "0123456789abcdef",
             "rows": 13509, "samples": 6865, "tokens": 3492719}  # fmt: skip
    environment |= {"devices": ["cpu"], "data": [split, split | {"sha256": None}]}
    (tmp_path / "environment.json").write_text(json.dumps(environment))
    row = {"prompt": HOSTILE, "expected": "7", "before": None, "after": "7"}
    row |= {"exact_before": False, "exact_after": True}
    odd = {"prompt": "odd \ud83d", "expected": "", "before": "100% %s {x}", "after": "b"}
    write_lines(tmp_path / "generations.jsonl", [row, odd, {**row, "exact_before": True}])
    pieces = [["Where?", None], [" <b>Here", 0.25], [".", 3.0]]
    write_lines(tmp_path / "token_losses.jsonl", [{"mean": 1.625, "of": 60, "pieces": pieces}])
    return tmp_path


def test_what_the_data_were_is_on_the_page(folder):
    page = Page(build_report(folder))
    assert "a<b>.jsonl 0123456789ab 13,509 6,865 3,492,719" in " ".join(page.text.split())
    assert "3492719" in [a.get("value") for a in page.all("data")]


def test_tokens_stand_on_red_as_they_are_unlikely(folder):
    page = Page(build_report(folder))
    assert "among the first 60" in page.text and "1.625 nats per label" in page.text
    spans = [a for a in page.all("b") if "style" in a]
    assert [a["style"] for a in spans] == ["--wrong: 22%", "--wrong: 95%"]  # 1 - exp(-loss)
    assert spans[1]["title"] == "3.000 nats" and "Where? <b>Here." in page.text


def test_a_chart_can_be_drawn_wider_over_one_scale(folder):
    page = Page(build_report(folder))
    choices = [(a["name"], a["value"]) for a in page.all("input")]
    assert choices == [(n, v) for n in ("Loss", "Throughput", "Schedule") for v in "1248"]
    assert [a["value"] for a in page.all("input") if "checked" in a] == ["1"] * 3
    fine = page.all("text", "fine")
    assert len(fine) > 2 * (len(page.all("text", "x")) - len(fine))


def test_every_curve_has_its_points(folder):
    page = Page(build_report(folder))
    assert "Events" not in page.text and page.all("line", "event") == []
    assert len(page.curve("train loss")) == 20
    assert len(page.curve("eval cross-entropy")) == len(page.all("circle", "dots")) == 3
    assert len(page.curve("all tokens")) == len(page.curve("label tokens")) == 20
    assert len(page.curve("learning rate")) == 20
    assert page.curve("eval cross-entropy")[0][0] == 0
    assert page.curve("train loss")[0][0] == pytest.approx(5)  # step 4 of 80
    assert page.curve("train loss")[-1][0] == 100
    for title in ("optimizer step", "cross-entropy (nats per label)", "tokens per second"):
        assert title in page.text


def test_heights_agree_with_the_axis(folder):
    page = Page(build_report(folder))
    first_chart = page.all("line", "grid")[
        : [t["y1"] for t in page.all("line", "grid")].index("0.000%") + 1
    ]
    (low, bottom), (high, top) = [
        (float(tick["data-y"]), float(tick["y1"].rstrip("%")))
        for tick in (first_chart[0], first_chart[-1])
    ]

    def height(value):
        return pytest.approx(bottom + (value - low) * (top - bottom) / (high - low), abs=0.01)

    (target,) = page.all("line", "target")
    assert (bottom, top) == (100, 0)
    assert float(target["y1"].rstrip("%")) == height(1.5) and target["y1"] == target["y2"]
    assert "target 1.5" in page.text
    assert [y for _, y in page.curve("eval cross-entropy")] == [
        *map(height, (3.90625, 2.25, 1.4375))
    ]


def test_numbers_are_those_of_the_result(folder):
    page = Page(build_report(folder))
    flat = {**RESULT, **RESULT["metrics"]}
    numbers = {str(value) for value in flat.values() if isinstance(value, int | float)}
    assert numbers <= set(page.values())
    for shown in ("1.4375", "4.21", "12 min 3 s", "4,098", "1,798", "4.7% → 70.3%", "1,638,400"):
        assert shown in page.text
    assert "target reached" in page.text and page.all("b", "good")
    assert "padding 2.0%, waiting for data 1.0%." in page.text  # and no MFU, which is null


def test_hostile_text_stays_text_and_nothing_is_fetched(folder):
    path = build_report(folder)
    page = Page(path)
    assert page.text.count(HOSTILE) == 3  # two prompts and the config
    assert "dolly-<b>lora</b>" in page.text and "a.b=<c>" in page.text
    assert not {"script", "img", "link", "iframe", "image", "use"} & {tag for tag, _ in page.tags}
    links = [a for _, a in page.tags if {"src", "href", "xlink:href", "srcset"} & set(a)]
    style = path.read_text(encoding="utf-8").split("<style>")[1].split("</style>")[0]
    assert links == [] and "url(" not in style and "@import" not in style
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]


def test_generations_mark_exact_answers(folder):
    page = Page(build_report(folder))
    assert len(page.all("b", "exact")) == page.text.count("✓ exact") == 3
    assert "Of these 3, exact before training 1, after 2." in page.text
    assert "100% %s {x}" in page.text


def test_long_tables_are_folded_and_long_curves_keep_their_spike(folder):
    losses = [99.0 if step == 7777 else 2.0 for step in range(10_000)]
    records = [train_record(step, loss=loss) for step, loss in enumerate(losses)]
    write_lines(folder / "metrics.jsonl", records + [eval_record(step, 2.0) for step in range(13)])
    page = Page(build_report(folder))
    curve = page.curve("train loss")
    assert len(curve) <= 2000 and sum(y < 5 for _, y in curve) == 1
    assert "1 more" in page.text and len(page.all("table", "numbers")) == 2


def test_a_killed_and_resumed_run(folder):
    records = [train_record(step) for step in (1, 2, 3)]
    again = [train_record(2, loss=3.0), train_record(3, loss=float("nan")), train_record(4)]
    write_lines(folder / "metrics.jsonl", records, tail='{"kind": "tra')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n" + "".join(json.dumps(record) + "\n" for record in again) + '{"step"')
    run = load_run(folder)
    assert [record["step"] for record in run.train] == [1, 2, 3, 4]
    assert run.train[1]["loss"] == 3.0
    page = Page(build_report(folder))
    assert len(page.curve("train loss")) == 3 and "nan" not in page.text.lower()
    assert "Unreadable lines of metrics.jsonl, skipped: 2." in page.text
    assert "Training records without a finite loss, not drawn: 1." in page.text


def test_events_are_marked_in_the_loss_chart_and_listed(folder):
    events = [(24, "a spike"), (24, "a spike"), (40, HOSTILE), (40, "a skip"), (900, "too late")]
    with (folder / "metrics.jsonl").open("a") as file:
        for step, what in events:
            file.write(json.dumps({"kind": "event", "step": step, "what": what}) + "\n")
        file.write('{"kind": "event"}\n')
    (folder / "result.json").write_text(json.dumps(RESULT | {"status": "failed", "error": "why"}))
    page = Page(build_report(folder))
    marks = page.all("line", "event")
    assert [mark["x1"] for mark in marks] == ["30.000%", "50.000%", "50.000%"]  # of 80 steps
    assert all(mark["x1"] == mark["x2"] for mark in marks)
    assert "Events" in page.text and "step 24: a spike" in page.text and "step 40:" in page.text
    assert {"24", "40", "900"} <= set(page.values())
    assert len(page.all("table", "events")) == 1
    assert page.all("p", "bad") and "why" in page.text


def test_what_was_done_again_is_not_what_was_done_first(folder):
    steps = [train_record(step) for step in range(1, 101)]
    evals = [eval_record(50, 3.0), eval_record(100, 9.0)]
    resumed = {"kind": "event", "step": 50, "what": "resumed"}
    write_lines(folder / "metrics.jsonl", [*steps, *evals, resumed, train_record(51, loss=0.5)])
    run = load_run(folder)
    assert [record["step"] for record in run.train] == [*range(1, 52)]
    assert [record["step"] for record in run.evals] == [50] and run.train[-1]["loss"] == 0.5


def test_what_stopped_a_run_is_marked_behind_its_last_loss(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        for step, what in ((81, "the loss is not finite"), (200, "of another run")):
            file.write(json.dumps({"kind": "event", "step": step, "what": what}) + "\n")
    page = Page(build_report(folder))
    assert [mark["x1"] for mark in page.all("line", "event")] == ["100.000%"]


def test_losses_of_regressions_are_not_called_cross_entropies(folder):
    (folder / "result.json").write_text(json.dumps(RESULT | {"metrics": {"pearson": 0.5}}))
    page = Page(build_report(folder))
    assert "eval loss before" in page.text and "eval cross entropy" not in page.text
    assert any(line.startswith("eval loss  ") for line in summary_lines(
        RESULT | {"metrics": {"pearson": 0.5}}
    ))  # fmt: skip


def test_of_answers_that_were_not_asked_before_nothing_is_said(folder):
    write_lines(folder / "generations.jsonl", [{"prompt": "p", "after": "x", "exact_after": True}])
    assert "Of these 1, exact after 1." in Page(build_report(folder)).text


def test_only_result_json_is_required(tmp_path):
    empty = dict.fromkeys(RESULT) | {"run_name": "bare", "status": "failed"}
    (tmp_path / "result.json").write_text(json.dumps(empty))
    page = Page(build_report(tmp_path))
    assert page.all("polyline") == [] and page.all("table") == [] and page.all("pre") == []
    assert "target–" in page.text and page.all("b", "bad")
    assert "None" not in page.text and "null" not in page.text
    assert summary_lines(empty) == [f"{'status':<20}failed", f"{'target':<20}none"]


@pytest.mark.parametrize("kind", ["train", "eval"])
@pytest.mark.parametrize("target", [None, 1.5, 3.0])
def test_a_single_point_is_drawn(tmp_path, kind, target):
    (tmp_path / "result.json").write_text(json.dumps(RESULT | {"target": target}))
    record = eval_record(0, 3.0) if kind == "eval" else train_record(1, loss=3.0)
    write_lines(tmp_path / "metrics.jsonl", [record])
    page = Page(build_report(tmp_path))
    assert len(page.all("circle")) == (1 if kind == "eval" else 4)
    assert len(page.all("line", "target")) == (target is not None)


def test_the_page_is_replaced_whole(folder):
    first = build_report(folder).read_text(encoding="utf-8")
    assert build_report(folder).read_text(encoding="utf-8") == first
    assert build_report(folder) == folder / "report.html"
    assert not list(folder.glob("*.part"))


def test_summary_is_short_and_aligned():
    lines = summary_lines(RESULT)
    assert len(lines) <= 12 and max(map(len, lines)) < 60
    assert len({len(line) - len(line[20:]) for line in lines}) == 1
    assert f"{'eval cross-entropy':<20}3.9062 -> 1.4375" in lines
    assert f"{'exact match':<20}4.7% -> 70.3%" in lines
    assert f"{'time to train':<20}12 min 3 s (723.4 s)" in lines


@pytest.mark.parametrize("text", [None, "{", "[1]"])
def test_a_folder_without_a_result_is_a_config_error(tmp_path, text):
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(ConfigError, match=r"no readable result\.json"):
        build_report(tmp_path)
    assert not list(tmp_path.glob("report*"))


def test_a_run_that_was_killed_has_a_page(tmp_path):
    line = {"kind": "train", "step": 3, "seconds": 1.0, "loss": 2.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "unfinished" in build_report(tmp_path).read_text()


def test_the_door(folder, tmp_path_factory):
    done = subprocess.run([sys.executable, DOOR, folder], capture_output=True, text=True)
    assert done.returncode == 0 and str(folder / "report.html") in done.stdout
    assert all(line in done.stdout for line in summary_lines(RESULT))
    empty = tmp_path_factory.mktemp("empty")
    refused = subprocess.run([sys.executable, DOOR, empty], capture_output=True, text=True)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert str(empty) in refused.stderr and "Traceback" not in refused.stderr


@needs_chromium
@pytest.mark.parametrize("look", [(390,), (1000, "--force-dark-mode")], ids=["phone", "dark"])
def test_a_browser_shows_every_figure(folder, look):
    found = drawn(build_report(folder), *look)
    check_charts(found)
    assert found["page"] == ("rgb(21, 24, 28)" if len(look) > 1 else "rgb(255, 255, 255)")
    numbers = {name: text for name, text, _ in found["numbers"]}
    assert numbers == {
        "status": "target reached", "seconds to train": "723.4", "eval cross entropy": "1.4375",
        "eval cross entropy before": "3.9062", "target": "1.5000", "eval perplexity": "4.21",
        "steps": "80", "tokens seen": "1,638,400", "label tokens seen": "704,512",
        "tokens/s": "4,098", "label tokens/s": "1,798", "seed": "17",
        "exact match": "4.7% → 70.3%", "rouge_l": "0.4125",
    }  # fmt: skip
    loss, speed, rate = found["figures"]
    named = [[curve["name"] for curve in figure["curves"]] for figure in (loss, speed, rate)]
    assert named == [["train loss", "eval cross-entropy"], ["all tokens", "label tokens"],
                     ["learning rate"]]  # fmt: skip
    heights = [(top + bottom) / 2 for _, top, _, bottom in loss["dots"]]
    held_out = [height_of(loss, value) for value in (3.90625, 2.25, 1.4375)]
    assert heights == pytest.approx(held_out, abs=2)
    (target,) = [at[1] for style, at in loss["lines"] if style == "target"]
    assert target == pytest.approx(height_of(loss, 1.5), abs=2)
    assert found["headings"] == [
        "Evaluations, latest first", "Generations on held-out prompts", "What it still gets wrong",
        "Data", "Command", "Config", "Machine",
    ]  # fmt: skip
    evals, answers, splits = found["tables"]
    assert [row[:3] for row in evals[1:]] == [
        ["80", "160.0", "1.4375"], ["40", "80.0", "2.2500"], ["0", "0.0", "3.9062"],
    ]  # fmt: skip
    assert answers[1] == [HOSTILE, "7", "–", "✓ exact 7"]
    assert answers[2][1:] == ["(empty)", "100% %s {x}", "b"] and splits[1][3] == "13,509"
    (here, faint), (dot, red) = found["red"]
    assert (here, dot) == (" <b>Here", ".") and len({faint, red, found["page"]}) == 3


@needs_chromium
def test_a_browser_prints_it(folder):
    browse(build_report(folder), f"--print-to-pdf={folder / 'print.pdf'}")
    assert (folder / "print.pdf").stat().st_size > 20_000
