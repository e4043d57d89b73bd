#!/bin/bash
#SBATCH --job-name=convert
#SBATCH --cpus-per-task=2
#SBATCH --output=%x-%A_%a.out
# Convert a file by the tasks of a Slurm job array, each its own rows, then merge what they wrote:
#
#   job=$(sbatch --parsable --array=0-9 launch/convert_array.sh 10 100000 corpus.jsonl data/parts \
#     --task text --tokenizer gpt2 --max_seq_len 2048)
#   sbatch --dependency=afterok:$job --kill-on-invalid-dep=yes --wrap \
#     ".venv/bin/python src/convert_dataset.py --merge data/parts/* --out_root data/corpus"
#
# TASKS ROWS FILE PARTS OPTIONS...: task n, from 0, converts the n-th ROWS rows of FILE into PARTS/n,
# the last of the TASKS all that are left. The folder that sbatch is called in, with its .venv, is
# seen by all nodes. A task that is submitted again goes on where it was.
set -eu

tasks=$1 rows=$2 file=$3 parts=$4
shift 4
task=$SLURM_ARRAY_TASK_ID
if [ "$task" -ge "$tasks" ]; then
  echo "error: task $task is none of $tasks, which count from 0: sbatch --array=0-$((tasks - 1))" >&2
  exit 2
fi
stop=$(((task + 1) * rows))
if [ "$task" -eq $((tasks - 1)) ]; then stop=""; fi
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
exec python src/convert_dataset.py --splits "train=${file}[$((task * rows)):$stop]" \
  --out_root "$parts/$(printf %05d "$task")" --resume "$@"
