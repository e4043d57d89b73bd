"""Every kind of file, read back as records: the same rows in each, by an independent count."""

import csv
import datetime
import gzip
import io
import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from overture.data.conversations import as_threads
from overture.data.conversion import Conversion, Origin, parse_origins
from overture.data.convert import convert, open_rows
from overture.data.prompts import parse_template
from overture.data.readers import MAX_ROW_BYTES, Format, Malformed
from overture.data.sources import _hub_source, open_source
from overture.errors import ConfigError

ROWS = [
    {"question": "who?", "answer": 'she said "no"'},
    {"question": "ü, é, 質問", "answer": "two words"},
    {"question": "a  b", "answer": "“quoted”"},
]


def records(name, split="train", **form):
    return [record for _, record in open_source(str(name), split, Format(**form)).read()]


def as_csv(delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def as_tsv():
    lines = [f"{r['question']}\t{r['answer']}\n" for r in ROWS]
    return "question\tanswer\n" + "".join(lines)


CONTENT = {
    "jsonl": "".join(json.dumps(r) + "\n" for r in ROWS),
    "ndjson": "\ufeff" + "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS),
    "json": json.dumps(ROWS),
    "lines.json": "".join(json.dumps(r) + "\n" for r in ROWS),
    "data.json": json.dumps({"version": "1", "data": ROWS}),
    "csv": "\ufeff" + as_csv(),
    "tsv": "\ufeff" + as_tsv().replace("\n", "\r\n"),
}


def test_jsonl_is_written_of_what_json_has_no_word_for(tmp_path):
    row = {"instruction": "a", "response": "b", "day": datetime.date(2026, 11, 29)}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "day.parquet")
    half = {"instruction": "a", "context": "", "response": "b", "tags": ["\ud800"]}
    (tmp_path / "half.jsonl").write_text(json.dumps(half) + "\n")
    origins = {n: Origin(str(tmp_path / n)) for n in ("day.parquet", "half.jsonl")}
    convert(Conversion(origins, "jsonl", str(tmp_path / "out")), lambda _: None)
    day, again = (json.loads((tmp_path / "out" / f"{n}.jsonl").read_text()) for n in origins)
    assert (day["day"], again) == ("2026-11-29", half)


def test_a_folder_with_brackets_in_its_name_is_no_pattern(tmp_path):
    (tmp_path / "data[v2]").mkdir()
    (tmp_path / "data[v2]" / "rows.jsonl").write_text(CONTENT["jsonl"])
    assert records(tmp_path / "data[v2]") == ROWS


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_text_formats_give_the_same_rows(tmp_path, kind, packed):
    path = tmp_path / f"rows.{kind}{packed}"
    data = CONTENT[kind].encode()
    if packed == ".gz":
        data = gzip.compress(data)
    path.write_bytes(data)
    if packed == ".zst":
        path.unlink()
        with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(path), "wb"), "zstd") as file:
            file.write(data)
    assert records(path) == ROWS


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert records(tmp_path / "rows.parquet") == ROWS
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"bad.parquet: cannot be read as Parquet"):
        records(tmp_path / "bad.parquet")


def test_tables_without_a_header(tmp_path):
    (tmp_path / "a.tsv").write_text('x1\t"0\ta said "b\n')
    found = records(tmp_path / "a.tsv", columns=("id", "label", "text"))
    assert found == [{"id": "x1", "label": '"0', "text": 'a said "b'}]


def test_plain_text_by_file_line_and_block(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n\n \nthree\n")
    assert records(tmp_path / "a.txt") == [{"text": "one\ntwo\n\n \nthree\n"}]
    lines = records(tmp_path / "a.txt", text_rows="line")
    assert [r["text"] for r in lines] == ["one", "two", "three"]
    source = open_source(str(tmp_path / "a.txt"), form=Format(text_rows="block"))
    blocks = [(place.line, r["text"]) for place, r in source.read()]
    assert blocks == [(1, "one\ntwo"), (5, "three")]


def test_folders_and_patterns(tmp_path):
    for name, number in (("train.jsonl", 0), ("dev.jsonl", 1), ("more/extra.jsonl", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(ROWS[number]) + "\n")
    assert records(tmp_path) == [ROWS[0]]
    assert records(tmp_path, "dev") == [ROWS[1]]
    assert records(tmp_path, "more") == [ROWS[2]]
    assert records(tmp_path / "more") == [ROWS[2]]
    source = open_source(str(tmp_path / "*.jsonl"))
    assert [str(place) for place, _ in source.read()] == [
        f"line 1 of {tmp_path / name}" for name in ("dev.jsonl", "train.jsonl")
    ]
    assert len(source.fingerprint["files"]) == 2
    with pytest.raises(ConfigError, match="has no files for split 'test'; there are"):
        records(tmp_path, "test")
    with pytest.raises(ConfigError, match="is not divided: its only split is train, not dev"):
        records(tmp_path / "train.jsonl", "dev")
    with pytest.raises(ConfigError, match="no such file"):
        records(tmp_path / "*.csv")
    with pytest.raises(ConfigError, match="--columns names those of csv and tsv files"):
        records(tmp_path, columns=("a",))
    with pytest.raises(ConfigError, match="--text_rows is for txt files"):
        records(tmp_path, text_rows="line")
    with pytest.raises(ConfigError, match="--data_subset and --revision are for hub names"):
        open_source(str(tmp_path), subset="en")
    (tmp_path / "x.docx").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"x.docx: no reader for this kind of file"):
        records(tmp_path / "x.docx")


def test_two_aligned_files(tmp_path):
    (tmp_path / "a.en").write_text("one\ntwo\n")
    (tmp_path / "a.ja").write_text("一\n二\n")
    pair = f"{tmp_path / 'a.en'},{tmp_path / 'a.ja'}"
    assert records(pair) == [
        {"source": "one", "target": "一"}, {"source": "two", "target": "二"}
    ]  # fmt: skip
    (tmp_path / "a.ja").write_text("一\n")
    with pytest.raises(ConfigError, match=r"a.ja ends earlier than the other"):
        records(pair)
    with pytest.raises(ConfigError, match=r"b.ja: no such file"):
        records(f"{tmp_path / 'a.en'},{tmp_path / 'b.ja'}")


def test_squad_is_recognised_by_its_nesting(tmp_path):
    answers = [{"text": "a", "answer_start": 0}, {"text": "b", "answer_start": 1}]
    questions = [
        {"id": "1", "question": "q", "answers": answers},
        {"id": "2", "question": "r", "answers": [], "is_impossible": True},
    ]
    article = {"title": "t", "paragraphs": [{"context": "c", "qas": questions}]}
    (tmp_path / "s.json").write_text(json.dumps({"data": [article, {"paragraphs": [{}]}]}))
    found = records(tmp_path / "s.json")
    common = {"title": "t", "context": "c"}
    assert found[0] == {"id": "1", "question": "q", "answer": "a", "answers": ["a", "b"], **common}
    assert found[1] == {"id": "2", "question": "r", "answer": "", "answers": [], **common}
    assert found[2].reason == "not_squad"


def test_broken_rows_are_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"a": "1"}\n{"a": \n[1]\n{"a": "\xff"}\n\n{"a": "' + b"x" * MAX_ROW_BYTES + b'"}\n'
        b'{"a": "2"}\n'
    )
    rows = list(open_source(str(path)).read())
    found = [(p.line, r.reason if isinstance(r, Malformed) else r) for p, r in rows]
    assert found == [
        (1, {"a": "1"}), (2, "not_json"), (3, "not_object"), (4, "invalid_utf8"), (6, "too_large"),
        (7, {"a": "2"}),
    ]  # fmt: skip
    (tmp_path / "a.tsv").write_bytes(b"a\tb\n1\t2\n1\n1\t\xff\n3\t4\n")
    assert [r if isinstance(r, dict) else r.reason for r in records(tmp_path / "a.tsv")] == [
        {"a": "1", "b": "2"}, "wrong_columns", "invalid_utf8", {"a": "3", "b": "4"},
    ]  # fmt: skip
    (tmp_path / "a.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ConfigError, match="the column 'a' is there twice in line 1"):
        records(tmp_path / "a.csv")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": "1"}\n' * 99)[:-9])
    with pytest.raises(ConfigError, match=r"a.jsonl.gz: cannot be read"):
        records(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.json").write_text("[1, 2")
    with pytest.raises(ConfigError, match=r"a.json: is not valid JSON"):
        records(tmp_path / "a.json")


def test_a_text_file_that_is_no_document_is_not_read_whole(tmp_path):
    with (tmp_path / "big.txt").open("wb") as file:
        file.truncate(MAX_ROW_BYTES + 1)
    (row,) = records(tmp_path / "big.txt")
    assert row.reason == "too_large"
    assert "--text_rows line or block" in row.detail


def test_slices():
    assert parse_origins("c4", ["train_small=train[:100000]", "val=validation", "test"]) == {
        "train_small": Origin("c4", "train", 0, 100_000),
        "val": Origin("c4", "validation"),
        "test": Origin("c4", "test"),
    }
    assert parse_origins(None, ["a=x.jsonl[5:]"]) == {"a": Origin("x.jsonl", "train", 5)}
    for bad in (["a=train[5:5]"], ["=x"], ["a=x", "a=y"]):
        with pytest.raises(ConfigError, match="--splits"):
            parse_origins("c4", bad)


def test_slice_stops_before_what_it_does_not_want(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "1"}\n{"a": "2"}\n{"a": "3"}\nbroken\n')
    source = open_source(str(path)).rows(1, 3)
    assert [record for _, record in source.read()] == [{"a": "2"}, {"a": "3"}]


@pytest.mark.parametrize("section", ["{a:d}", "{a}{}", "{a!x}", "{a.b}", "{a"])
def test_a_template_that_no_row_can_fill_in(section):
    with pytest.raises(ConfigError, match=r"t\.yaml: a section cannot be filled in"):
        parse_template({"sections": [section], "response": "b"}, "t.yaml")


def test_hub_reader_streams_and_is_kept(tmp_path):
    # The hub's own loader on a local copy of a hub repository.
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), tmp_path / "set" / "train-00000-of-00001.parquet"
    )
    source = _hub_source(str(tmp_path / "set"), "train", None, None)
    kept = source.kept(tmp_path / "kept.jsonl")
    assert [record for _, record in source.read()] == ROWS
    (tmp_path / "set" / "train-00000-of-00001.parquet").unlink()
    assert [record for _, record in kept.read()] == ROWS
    assert len(kept.fingerprint["sha256"]) == 64
    later = source.kept(tmp_path / "kept.jsonl", 40)  # of rows 40 and on
    assert [place.line for place, _ in later.read()] == [41, 42, 43]


def message(name, parent, role, text, rank=None):
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank}


def test_threads_of_a_tree(tmp_path):
    path = tmp_path / "tree.jsonl"
    tree = [
        message("a", None, "prompter", "A"),
        message("b", "a", "assistant", "B", 1),
        message("c", "a", "assistant", "C", 0),
        message("d", "b", "prompter", "D"),
        message("e", "d", "assistant", "E"),
        message("x", "gone", "assistant", "X"),
        message("b", "a", "assistant", "again"),
    ]
    path.write_text("".join(json.dumps(m) + "\n" for m in tree))

    def threads(which):
        rows = [r for _, r in as_threads(open_source(str(path)), which).read()]
        bad = [r.reason for r in rows if isinstance(r, Malformed)]
        good = [r["messages"] for r in rows if isinstance(r, dict)]
        return ["".join(m["content"] for m in messages) for messages in good], bad

    assert threads("all") == (["AC", "ABDE"], ["duplicate_id", "orphan"])
    assert threads("best")[0] == ["AC"]
    job = Conversion({"train": Origin(str(path), "train", 0, 4)}, "chat", str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"tree\.jsonl: a slice would cut conversation trees"):
        open_rows(job, "train", tmp_path)
    job = replace(job, origins={"train": Origin(str(path))}, max_rows=3)
    assert len([*open_rows(job, "train", tmp_path).read()]) == 3  # an id twice, an orphan, a thread


def test_command_line_names_what_is_not_there(run_door):
    done = run_door("src/convert_dataset.py", "--list_templates")
    assert done.returncode == 0
    assert "dolly: reads instruction, [context], response" in done.stdout
    assert "jsquad: reads title, [context], question, answer" in done.stdout
    done = run_door("src/convert_dataset.py", "--dataset", "x.jsonl", "--out_root", "y")
    assert (done.returncode, done.stderr) == (2, "error: --task is missing (see --help)\n")


def test_folders_as_the_hub_has_them(tmp_path):
    for name, row in {
        "train-00000-of-00002": 0,
        "train-00001-of-00002": 1,
        "test-00000": 2,
    }.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(ROWS[row]) + "\n")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "train-0.jsonl").write_text(json.dumps(ROWS[2]) + "\n")
    (tmp_path / "LICENSE.txt").write_text("free")
    assert records(tmp_path) == ROWS[:2]
    assert records(tmp_path, "test") == ROWS[2:]
    for path in (tmp_path / "data").glob("train*"):
        path.unlink()
    with pytest.raises(
        ConfigError, match=r"has no files for split 'train'; there are:.*test-00000"
    ):
        records(tmp_path)
    (tmp_path / "data" / "test-00000.jsonl").rename(tmp_path / "data" / "rows.jsonl")
    with pytest.raises(ConfigError, match=r"holds .* say which with a pattern"):
        records(tmp_path)


def test_splits_are_words_in_names_too(tmp_path):
    for name, row in (("my_train.jsonl", 0), ("my_Dev.jsonl", 1), ("constraint.jsonl", 2)):
        (tmp_path / name).write_text(json.dumps(ROWS[row]) + "\n")
    assert records(tmp_path) == [ROWS[0]]
    assert records(tmp_path, "dev") == [ROWS[1]]
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[2]) + "\n")
    assert records(tmp_path) == [ROWS[2]]  # which is called so before anything else
    for name in ("my_train.jsonl", "train.jsonl"):
        (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=r"no files for split 'train'; there are:.*name a patt"):
        records(tmp_path)
    (tmp_path / "my_Dev.jsonl").rename(tmp_path / "night train.jsonl")  # one alone is but a word
    assert records(tmp_path) == [ROWS[2], ROWS[1]]


@pytest.mark.parametrize("name", ["embedded", "*.jsonl", "a.txt,b.txt"])
def test_what_is_not_divided_has_no_other_split(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for file in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / file).write_text("{}\n")
    with pytest.raises(ConfigError, match="is not divided: its only split is train, not test"):
        open_source(name, "test")
    with pytest.raises(ConfigError, match="--data_subset and --revision are for hub names"):
        open_source(name, subset="x")
    with pytest.raises(ConfigError, match="--dataset is empty"):
        open_source("")


def test_a_quotation_that_never_ends_is_no_cell(tmp_path):
    lines = ["a,b", *(f"{i},x" for i in range(30)), '31,"open', *(f"{i},x" for i in range(99))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"opens in or after line 32 is never closed"):
        records(tmp_path / "t.csv")


def test_a_bad_question_costs_no_other(tmp_path):
    good = [{"id": str(i), "question": "q", "answers": [{"text": "a"}]} for i in range(9)]
    article = {"paragraphs": [{"context": "c", "qas": [good[0], {"id": "x"}, *good[1:]]}, 5]}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [article, {}]}))
    found = records(tmp_path / "squad.json")
    assert [r["id"] for r in found if not isinstance(r, Malformed)] == [g["id"] for g in good]
    assert [r.reason for r in found if isinstance(r, Malformed)] == ["not_squad"] * 3


@pytest.mark.parametrize("kind", ["jsonl.gz", "json", "parquet"])
def test_broken_files_get_a_sentence(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    whole = gzip.compress(b'{"a": "b"}\n' * 5000)
    content = {
        "jsonl.gz": whole[:20] + bytes(255 - x for x in whole[20:40]) + whole[40:],
        "json": b"[" * 100_000,
        "parquet": b"PAR1" + b"x" * 50,
    }
    path.write_bytes(content[kind])
    with pytest.raises(ConfigError, match=rf"t\.{kind}: (cannot be read|is not valid)"):
        records(path)
    (tmp_path / "u.txt").write_text("a\n" * 5000)
    path.rename(tmp_path / "t.txt.gz")
    if kind == "jsonl.gz":
        with pytest.raises(ConfigError, match="cannot be read"):
            records(f"{tmp_path / 't.txt.gz'},{tmp_path / 'u.txt'}")


def test_messages_that_no_way_leads_to_are_counted(tmp_path):
    parents = {"a": None, "b": "a", "c": "gone", "d": "c", "x": "y", "y": "x", "z": ["a"]}
    roles = {"a": "prompter"}
    rows = [message(name, parents[name], roles.get(name, "assistant"), name) for name in parents]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [r for _, r in as_threads(open_source(str(tmp_path / "t.jsonl")), "all").read()]
    assert [r.reason for r in found if isinstance(r, Malformed)] == ["orphan"] * 5
    assert len(found) == 6
