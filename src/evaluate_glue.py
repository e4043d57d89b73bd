"""Fine-tune and evaluate a model on GLUE.

    python src/evaluate_glue.py yamls/glue/hf-bert-base-uncased.yaml [a.b=c ...]

Each task is converted once and runs as `finetune.py` once for each seed; what is finished is kept,
so that the same command goes on. Exit codes: 0 done, 2 config or data paths, 75 asked to stop, else
that of the first job that failed.
"""

import sys

from overture.config.load import load_glue
from overture.errors import exit_on_error


def main(arguments: list[str]) -> int:
    config = load_glue(arguments)
    from overture.training.glue import evaluate  # imports torch, so after the config is known good

    return evaluate(config)


if __name__ == "__main__":
    sys.exit(exit_on_error(lambda: main(sys.argv[1:])))
