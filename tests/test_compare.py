"""Several runs on one page: differences, curves and answers against the files they came from."""

import json
import re
import shutil

import pytest
import yaml

from browser import check_charts, drawn, height_of, needs_chromium
from overture.compare import compare_runs, differences
from overture.errors import ConfigError


@pytest.fixture
def folders(tmp_path):
    made = []
    for number, name in enumerate(("one", "other")):
        folder = tmp_path / name
        folder.mkdir()
        result = {"run_name": name, "status": "target_reached", "target": 0.5, "seed": 17,
                  "eval_cross_entropy": 0.4 + number, "time_to_train_seconds": 10.0}  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        config = {"run_name": name, "optimizer": {"lr": 0.1 + number, "name": "adamw"}}
        config |= {"lora": {"r": 8}} if number else {"lora": None}
        (folder / "config.yaml").write_text(json.dumps(config))
        records = [{"kind": "train", "step": s, "loss": 2.0 - s / 10, "tokens_per_second": 100.0}
                   for s in range(1, 5)]  # fmt: skip
        records += [
            {"kind": "eval", "step": 2, "cross_entropy": 1.9 + number},
            {"kind": "eval", "step": 4, "cross_entropy": 0.4 + number},
            {"kind": "event", "step": 3, "what": f"skipped a step of {name}"},
        ]
        sample = {"mean": 3.0, "of": 9, "pieces": [["Why? ", None], [f"<i>{name}", 3.0]]}
        (folder / "token_losses.jsonl").write_text(json.dumps(sample) + "\n")
        machine = {"versions": {"torch": "2.7.0"}, "devices": [f"card {number}"],
                   "data": [{"split": "train", "rows": 7 + number}]}  # fmt: skip
        (folder / "environment.json").write_text(json.dumps(machine))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        of_this = {"before": f"b{number}", "after": f"y{number}"}
        answers = [{"prompt": "<b>same</b>", "expected": "x", "before": "alike", "after": "x"},
                   {"prompt": "other", "expected": "y", **of_this},
                   {"prompt": f"only {name}", "expected": "z", "after": "z"}]  # fmt: skip
        text = "".join(json.dumps(a) + "\n" for a in answers)
        (folder / "generations.jsonl").write_text(text)
        made.append(folder)
    return made


def test_what_differs_is_shown_and_nothing_else(folders, tmp_path):
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    assert list(differences(configs)) == [
        ["lora.r", "", "8"], ["optimizer.lr", "0.1", "1.1"],
    ]  # fmt: skip
    page = tmp_path / "page.html"
    compare_runs(folders, page)
    text = page.read_text()
    assert "optimizer.lr" in text and "optimizer.name" not in text
    assert "0.4000" in text and "1.4000" in text


def test_each_chart_has_a_curve_of_each_run(folders, tmp_path):
    page = tmp_path / "page.html"
    compare_runs(folders, page)
    curves = re.findall(r'<polyline points="([^"]*)" class="(run\d) ?\w*" data-name="(\w+)"',
                        page.read_text())  # fmt: skip
    assert [(c, n) for _, c, n in curves] == [("run0", "one"), ("run1", "other")] * 3
    assert [len(points.split()) for points, _, _ in curves] == [2, 2, 4, 4, 4, 4]


def test_answers_that_differ_come_first_and_text_stays_text(folders, tmp_path):
    page = tmp_path / "page.html"
    compare_runs(folders, page)
    text = page.read_text()
    assert text.index("<span>y0</span>") < text.index("<span>y1</span>") < text.index("&lt;b&gt;")
    assert "only one" not in text and "<b>same" not in text
    assert text.count("<span>alike</span>") == text.count("<span>b0 | b1</span>") == 1
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")


def test_a_run_that_was_asked_nothing_takes_no_answers_away(folders, tmp_path):
    (folders[1] / "generations.jsonl").unlink()
    page = tmp_path / "page.html"
    compare_runs(folders, page)
    text = page.read_text()
    assert "<span>y0</span>" in text and "only one" in text
    third = shutil.copytree(folders[0], tmp_path / "third")
    (third / "generations.jsonl").write_text(
        '{"prompt": "<b>same</b>", "before": "", "after": "x"}\n'
        '{"prompt": "other", "before": "", "after": "y2"}\n'
    )
    compare_runs([folders[0], folders[1], third], page)
    text = page.read_text()
    assert text.index("<span>y2</span>") < text.index("<span>alike | (empty)</span>")


def test_losses_of_regressions_have_their_unit(folders, tmp_path):
    for folder, scores in zip(folders, ({"pearson": 0.5}, {}), strict=True):
        outcome = json.loads((folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps(outcome | {"metrics": scores}))
    page = tmp_path / "page.html"
    compare_runs(folders, page)
    assert "cross-entropy (nats per label) or squared error" in page.read_text()


def test_machines_data_events_and_losses_are_beside_each_other(folders, tmp_path):
    page = tmp_path / "page.html"
    compare_runs(folders, page)
    text = page.read_text()
    for number, name in enumerate(("one", "other")):
        assert f"[&#34;card {number}&#34;]" in text and f"<td>{7 + number}</td>" in text
        assert f"<td>skipped a step of {name}</td>" in text
        assert f'title="3.000 nats" style="--wrong: 95%">&lt;i&gt;{name}</b>' in text
    assert "versions" not in text


def test_refusals(folders, tmp_path, run_door):
    with pytest.raises(ConfigError, match="named twice"):
        compare_runs([folders[0], folders[0]], tmp_path / "p.html")
    with pytest.raises(ConfigError, match="7 runs, but a page has room for 6"):
        compare_runs([folders[0]] * 7, tmp_path / "p.html")
    done = run_door("src/report_run.py", folders[0], tmp_path / "none")
    assert (done.returncode, "no readable result.json" in done.stderr) == (2, True)
    done = run_door("src/report_run.py", folders[0], "--out", tmp_path / "p.html")
    assert (done.returncode, "--out is of several runs" in done.stderr) == (2, True)
    done = run_door("src/report_run.py", *folders[:2], "--out", tmp_path / "no" / "p.html")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "p.html: cannot be made (No such file or directory)" in done.stderr
    assert not (tmp_path / "p.html").exists()


@needs_chromium
@pytest.mark.parametrize("look", [(390,), (1000, "--force-dark-mode")], ids=["phone", "dark"])
def test_a_browser_shows_every_figure(folders, tmp_path, run_door, look):
    done = run_door("src/report_run.py", *folders, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    found = drawn(tmp_path / "page.html", *look)
    check_charts(found)
    assert [[curve["name"] for curve in figure["curves"]] for figure in found["figures"]] == [
        ["one", "other"]
    ] * 3
    held_out, train, _ = found["figures"]
    heights = [(top + bottom) / 2 for _, top, _, bottom in held_out["dots"]]
    assert heights == pytest.approx([height_of(held_out, v) for v in (1.9, 0.4, 2.9, 1.4)], abs=2)
    assert train["curves"][0]["box"][1] == pytest.approx(height_of(train, 1.9), abs=2)
    outcomes, configs, around, answers = found["tables"]
    assert ["eval cross-entropy", "0.4000", "1.4000"] in outcomes
    assert configs[1:] == [["lora.r", "–", "8"], ["optimizer.lr", "0.1", "1.1"]]
    assert around[1:] == [["data.train.rows", "7", "8"], ["devices", '["card 0"]', '["card 1"]']]
    assert answers[1:] == [["other", "y", "b0 | b1", "y0", "y1"],
                           ["<b>same</b>", "x", "alike", "x", "x"]]  # fmt: skip
    folded = ["What one still gets wrong", "What other still gets wrong", "Events of one",
              "Events of other"]  # fmt: skip
    assert found["headings"][-4:] == folded
