"""Rows per second from Dolly to shards: ours, the common way, and the bare tokenizer.

    OVERTURE_DATA=... python benchmarks/convert_throughput.py --repeats 3

All three see the same rows and GPT-2's tokenizer, each measurement in a fresh process ("cold"). One
process may use the tokenizer's own threads, as a user has it; of two, each has one. Timed is the
work, from the file on disk to shards on disk (the bare tokenizer: from texts in memory to ids in
memory), not the imports, which are reported apart. Ours packs, checks and divides besides; the
common way is `datasets.map` example by example, then MDSWriter. `--rows N` measures instead the
peak memory of ours on N generated rows.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
METHODS = ("bare", "common", "ours")
MAX_SEQ_LEN = 2048
HASHES = ["sha256", "xxh64"]
STATE: dict[str, Any] = {}  # what forked workers find


def texts(row: dict[str, str]) -> tuple[str, str]:
    """Return prompt and response of a row, as the `dolly` template has them."""
    context = f"### Context:\n{row['context']}\n\n" if row["context"] else ""
    prompt = f"### Instruction:\n{row['instruction']}\n\n{context}### Response:\n"
    return prompt, row["response"]


def bare(source: str, tokenizer: str, processes: int, _: Path) -> float:
    """Return seconds for the tokenizer alone, in batches of 1,000 rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    pairs = [texts(json.loads(line)) for line in Path(source).read_text().splitlines()]
    columns = [list(column) for column in zip(*pairs, strict=True)]
    batches = [column[i : i + 1000] for i in range(0, len(pairs), 1000) for column in columns]
    STATE.update(tokenizer=tokenizer, batches=batches)
    if processes == 1:
        start = time.perf_counter()
        list(map(count_ids, range(len(batches))))
        return time.perf_counter() - start
    # Forked workers have tokenizer and texts already, and give back one number a batch.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.map(len, [[]] * processes)
        start = time.perf_counter()
        pool.map(count_ids, range(len(batches)), chunksize=1)
        return time.perf_counter() - start


def count_ids(number: int) -> int:
    """Return how many ids a batch of texts becomes."""
    ids = STATE["tokenizer"](STATE["batches"][number], add_special_tokens=False)["input_ids"]
    return sum(map(len, ids))


def common(source: str, tokenizer: str, processes: int, folder: Path) -> float:
    """Return seconds for `datasets.map` over examples, then MDSWriter."""
    import datasets
    import numpy as np
    from streaming import MDSWriter
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    datasets.disable_progress_bars()

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, response = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts(row))
        ids = (prompt + response + [tokenizer.eos_token_id])[:MAX_SEQ_LEN]
        return {"input_ids": ids, "loss_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}

    start = time.perf_counter()
    table = datasets.load_dataset("json", data_files=source, split="train", cache_dir=folder / "c")
    table = table.map(
        tokenize, remove_columns=table.column_names, num_proc=processes if processes > 1 else None
    )
    columns = {"input_ids": "ndarray:uint16", "loss_mask": "ndarray:uint8"}
    with MDSWriter(out=str(folder / "out"), columns=columns, hashes=HASHES) as writer:
        for row in table:
            ids, mask = np.array(row["input_ids"], np.uint16), np.array(row["loss_mask"], np.uint8)
            writer.write({"input_ids": ids, "loss_mask": mask})
    return time.perf_counter() - start


def ours(source: str, tokenizer: str, processes: int, folder: Path) -> float:
    """Return seconds for the converter."""
    import streaming  # noqa: F401
    import transformers  # noqa: F401

    from overture.data.conversion import Conversion, Origin
    from overture.data.convert import convert
    from overture.tokenizer import load_tokenizer

    load_tokenizer(tokenizer)
    job = Conversion(
        origins={"train": Origin(source)},
        task="instruct",
        out_root=str(folder / "out"),
        tokenizer=tokenizer,
        max_seq_len=MAX_SEQ_LEN,
        processes=processes,
    )
    start = time.perf_counter()
    convert(job, say=lambda _: None)
    return time.perf_counter() - start


def measure(method: str, source: str, tokenizer: str, processes: int) -> dict[str, float]:
    """Run one measurement in a process of its own and return seconds and peak memory."""
    command = [sys.executable, __file__, "--one", method, source, tokenizer, str(processes)]
    # One process may use the tokenizer's threads; several have one thread each.
    threads = "true" if processes == 1 else "false"
    environment = os.environ | {"TOKENIZERS_PARALLELISM": threads, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def one(method: str, source: str, tokenizer: str, processes: int) -> None:
    """Measure in this process and print the result as JSON."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seconds = globals()[method](source, tokenizer, processes, Path(folder))
    whole = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "with_imports": whole, "peak_mib": peak}))


def gpt2(data: Path, folder: Path) -> str:
    """Write GPT-2's tokenizer in Hugging Face format and return its folder."""
    from transformers import GPT2TokenizerFast

    files = [str(data / "tokenizers" / "gpt2" / name) for name in ("encoder.json", "vocab.bpe")]
    GPT2TokenizerFast(vocab_file=files[0], merges_file=files[1]).save_pretrained(folder)
    return str(folder)


def generate(path: Path, rows: int) -> str:
    """Write Dolly-shaped rows, all different, and return the path."""
    with path.open("w") as file:
        for i in range(rows):
            row = {"instruction": f"What is {i} plus {i % 7}?", "context": "", "response": str(i)}
            file.write(json.dumps(row) + "\n")
    return str(path)


def main() -> None:
    """Measure, print a table, write benchmarks/results/convert_throughput.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="measure memory instead")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(*args.one[:3], int(args.one[3]))
        return
    data = Path(os.environ["OVERTURE_DATA"])
    out = ROOT / "benchmarks" / "results" / "convert_throughput.json"
    results = json.loads(out.read_text()) if out.exists() else {"program": "convert_throughput"}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = gpt2(data, Path(folder) / "gpt2")
        if args.rows:
            results["memory"] = {
                str(rows): measure(
                    "ours", generate(Path(folder) / "rows.jsonl", rows), tokenizer, 1
                )
                for rows in args.rows
            }
            print(json.dumps(results["memory"], indent=1))
        else:
            results["speed"] = compare(str(data / "dolly/databricks-dolly-15k.jsonl"), tokenizer,
                                       args.repeats)  # fmt: skip
    results["environment"] = environment()
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["environment"]), out.relative_to(ROOT), sep="\n")


def compare(source: str, tokenizer: str, repeats: int) -> list[dict[str, object]]:
    """Return medians and ratios for one and two processes, methods taking turns."""
    count = len(Path(source).read_bytes().splitlines())
    table = []
    for processes in (1, 2):
        runs: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for _ in range(repeats):
            for method in METHODS:
                runs[method].append(measure(method, source, tokenizer, processes))
        speed = {m: count / statistics.median(r["seconds"] for r in runs[m]) for m in METHODS}
        row = {
            "processes": processes,
            "rows_per_second": {m: round(speed[m]) for m in METHODS},
            "ours_to_bare": round(speed["ours"] / speed["bare"], 3),
            "ours_to_common": round(speed["ours"] / speed["common"], 2),
            "runs": runs,
        }
        print({k: v for k, v in row.items() if k != "runs"}, flush=True)
        table.append(row)
    return table


def environment() -> dict[str, object]:
    """Return the machine and the versions that matter here."""
    import platform
    from importlib.metadata import version

    names = ("tokenizers", "transformers", "datasets", "mosaicml-streaming", "numpy")
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
         if x.startswith("model name")), platform.processor(),
    )  # fmt: skip
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


if __name__ == "__main__":
    main()
