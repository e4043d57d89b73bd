#!/bin/bash
#SBATCH --job-name=convert
#SBATCH --cpus-per-task=2
#SBATCH --output=%x-%A_%a.out
# Convert a file by the tasks of a Slurm job array, each its own rows, then merge what they wrote:
#
#   job=$(sbatch --parsable --array=0-9 launch/convert_array.sh 100000 corpus.jsonl data/parts \
#     --task text --tokenizer gpt2 --max_seq_len 2048)
#   sbatch --dependency=afterok:$job --wrap \
#     "python src/convert_dataset.py --merge data/parts/* --out_root data/corpus"
#
# ROWS FILE PARTS OPTIONS...: task n converts the n-th ROWS rows of FILE into PARTS/n, the last task
# all that are left. The folder that sbatch is called in, with its .venv, is seen by all nodes. A
# task that is queued again goes on where it was.
set -eu

rows=$1 file=$2 parts=$3
shift 3
task=$SLURM_ARRAY_TASK_ID
stop=$(((task + 1) * rows))
if [ "$task" = "$SLURM_ARRAY_TASK_MAX" ]; then stop=""; fi
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
exec python src/convert_dataset.py --splits "train=${file}[$((task * rows)):$stop]" \
  --out_root "$parts/$(printf %05d "$task")" --resume "$@"
