# Every target depends on venv. `make quickstart` and `make test` are all a newcomer needs.
SHELL := /bin/bash
PYTHON ?= python3
# Two sets of pins, an environment for each; SECURITY.md says when to take which.
TORCH ?= 2.7
PINS_2.7 := requirements.txt
PINS_2.11 := requirements-torch2.11.txt
PINS := $(PINS_$(TORCH))
ifeq ($(PINS),)
$(error TORCH=$(TORCH): there are pins for TORCH=2.7 (the default) and TORCH=2.11)
endif
VENV := .venv$(if $(filter 2.11,$(TORCH)),-torch2.11)
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := true
# Without compiled modules an import of Composer takes 13 seconds, with them 6.
export PYTHONDONTWRITEBYTECODE :=
# Streaming and the hub's client are quiet on their own; TensorFlow, found by accident, is not.
export TF_CPP_MIN_LOG_LEVEL := 3

# make dolly
MODEL ?= meta-llama/Llama-3.2-1B
DATA ?= databricks/databricks-dolly-15k
NAME ?= dolly
CONFIG ?= yamls/finetune/dolly.yaml

.PHONY: venv quickstart dolly glue-smoke test test-all faults benchmark lint audit requirements clean

venv: $(VENV)/.installed data/smoke/.written

# The pins are complete, so nothing is resolved; Composer's metadata would refuse torch 2.11.
$(VENV)/.installed: $(PINS) requirements-dev.txt requirements-uv.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "error: Python 3.10 to 3.12 is needed; name one with make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	@command -v uv >/dev/null || \
	  "$(BIN)/python" -m pip install --quiet --require-hashes -r requirements-uv.txt
	uv pip install --quiet --require-hashes --no-deps --python "$(BIN)/python" -r $(PINS) \
	  -r requirements-dev.txt
	@touch $@

# A tokenizer and a few shards for yamls/smoke; the conversions share the two cores.
SMOKE := python src/convert_dataset.py --dataset embedded --max_rows 400 --test_fraction 0.1 \
  --tokenizer data/smoke/tokenizer --max_seq_len 128 --overwrite
data/smoke/.written: $(VENV)/.installed
	@echo "writing data/smoke ..."
	@python src/train_tokenizer.py --input embedded --vocab_size 1024 --prompt_template dolly \
	  --out data/smoke/tokenizer --overwrite > /dev/null
	@{ $(SMOKE) --task text --prompt_template passage --out_root data/smoke/text && \
	  $(SMOKE) --task classify --field text=instruction label=category --stratify category \
	  --out_root data/smoke/classify; } > /dev/null & text=$$!; \
	  $(SMOKE) --task instruct --out_root data/smoke/instruct > /dev/null && \
	  $(SMOKE) --task seq2seq --prompt_template dolly --out_root data/smoke/seq2seq > /dev/null && \
	  wait $$text
	@touch $@

# From nothing to a fine-tuned model: its folders are written anew each time.
QUICK := data/quickstart
quickstart: venv
	@rm -rf $(QUICK) runs/quickstart-base runs/quickstart
	@echo "== 1/4 corpus, tokenizer and shards"
	python src/convert_dataset.py --dataset embedded --task jsonl --test_fraction 0.1 --out_root $(QUICK)
	python src/train_tokenizer.py --input $(QUICK)/train.jsonl --vocab_size 1800 \
	  --eval_input $(QUICK)/test.jsonl --prompt_template dolly --out $(QUICK)/tokenizer
	@set -x; python src/convert_dataset.py --splits train=$(QUICK)/train.jsonl test=$(QUICK)/test.jsonl \
	  --task text --prompt_template passage --tokenizer $(QUICK)/tokenizer --max_seq_len 128 \
	  --out_root $(QUICK)/text > $(QUICK)/text.log & text=$$!; \
	  set -x; python src/convert_dataset.py --splits train=$(QUICK)/train.jsonl test=$(QUICK)/test.jsonl \
	  --task instruct --tokenizer $(QUICK)/tokenizer --max_seq_len 128 \
	  --out_root $(QUICK)/instruct > $(QUICK)/instruct.log && wait $$text
	@grep -h samples $(QUICK)/text.log $(QUICK)/instruct.log
	@echo "== 2/4 pretraining the base model"
	composer main.py yamls/pretrain/quickstart.yaml
	@echo "== 3/4 LoRA to the loss target"
	composer finetune.py yamls/finetune/quickstart.yaml
	@echo "== 4/4 done: open runs/quickstart/report.html"

# The same way on databricks-dolly-15k. Families that cannot keep packed documents apart say so;
# they need CONVERT_FLAGS="--packing none". TRAIN_FLAGS are overrides of the YAML.
dolly: venv
	@! test -f runs/$(NAME)/result.json || \
	  { echo "error: runs/$(NAME) is there: give another NAME=..., or delete it"; exit 2; }
	python src/convert_dataset.py --dataset $(DATA) --task instruct --tokenizer $(MODEL) \
	  --test_fraction 0.1 --max_seq_len 512 --out_root data/$(NAME) --overwrite $(CONVERT_FLAGS)
	composer finetune.py $(CONFIG) run_name=$(NAME) model.name=$(MODEL) data_local=data/$(NAME) $(TRAIN_FLAGS)

# Both kinds of BERT pretrained for a few steps, and the eight tasks of GLUE in small from each.
GLUE := yamls/glue/smoke.yaml
glue-smoke: venv
	@rm -rf data/glue/smoke-* runs/smoke-hf_bert runs/smoke-mosaic_bert runs/glue/smoke-*
	python tests/glue_files.py data/smoke/glue
	set -e; for model in hf_bert mosaic_bert; do \
	  composer main.py yamls/smoke/mlm.yaml model.name=$$model run_name=smoke-$$model; \
	  python src/evaluate_glue.py $(GLUE) run_name=smoke-$$model finetune.model.name=runs/smoke-$$model; \
	done

# Most of a test is starting something, so that tests run side by side, with a core each.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -q -n auto --maxprocesses 4 --dist worksteal
test: venv
	$(PYTEST) -m "not slow and not gpu"

test-all: venv
	$(PYTEST)

# Faults injected into real runs, and a table of what came of them; FULL=1 can be interrupted.
faults: venv
	PYTHONPATH=src:tests python -m faults $(if $(FULL),--full)

# OVERTURE_DATA names the real datasets; --search looks for the peers' best batch sizes again.
benchmark: venv
	uv pip install --quiet --python "$(BIN)/python" -r requirements-benchmark.txt
	python benchmarks/finetune_throughput.py $(BENCHMARK_FLAGS)
	python benchmarks/pretrain_throughput.py $(BENCHMARK_FLAGS)
	python benchmarks/ablation.py
	python benchmarks/bert_throughput.py

lint: venv
	ruff check .
	ruff format --check .

# Every pin against the holes that are known. A waiver is a line: ID, the day it was written, the
# day it ends, the reason. AUDIT_FLAGS="-s osv" asks another service than the default.
PIP_AUDIT := pip-audit --strict --require-hashes --disable-pip --progress-spinner off
WAIVERS := audit-waivers.txt
TODAY = $(shell date +%F)
DAY := /^20[0-9][0-9]-[01][0-9]-[0-3][0-9]$$/
audit: venv
	@waived=$$(awk '/^(#|$$)/ { next } { wrong = "" } \
	  $$3 < "$(TODAY)" { wrong = "its day is over" } \
	  NF < 4 || $$1 !~ /^(CVE|GHSA|PYSEC)-/ || $$2 !~ $(DAY) || $$3 !~ $(DAY) { \
	    wrong = "a waiver is ID, day written, day it ends, reason" } \
	  wrong { printf "error: $(WAIVERS):%d: %s: %s\n", NR, wrong, $$0 > "/dev/stderr"; bad = 2 } \
	  { print "--ignore-vuln " $$1 } END { exit bad }' $(WAIVERS)) || exit 2; \
	for pins in $(PINS_2.7) $(PINS_2.11) requirements-dev.txt requirements-uv.txt; do \
	  echo "== $$pins"; $(PIP_AUDIT) -r $$pins $$waived $(AUDIT_FLAGS) || failed=1; \
	done; exit $${failed:-0}

# All pins from the .in files. They stay as they are where they can; FLAGS=--upgrade moves all of
# them, FLAGS="--upgrade-package NAME" one. The set for torch 2.11 begins from the other's.
COMPILE := uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-header \
  --no-annotate
requirements: venv
	echo uv | $(COMPILE) $(FLAGS) - -o requirements-uv.txt
	$(COMPILE) $(FLAGS) requirements.in -o $(PINS_2.7)
	$(COMPILE) $(FLAGS) requirements-dev.in -o requirements-dev.txt
	cp $(PINS_2.7) $(PINS_2.11)
	$(COMPILE) requirements.in --override requirements-torch2.11.in -o $(PINS_2.11)

# What make has written itself; data and runs of yours stay.
clean:
	rm -rf .venv .venv-torch2.11 data/smoke $(QUICK) runs/quickstart-base runs/quickstart
