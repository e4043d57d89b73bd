"""Fine-tune on MDS shards: `composer finetune.py yamls/finetune/quickstart.yaml [a.b=c ...]`.

Exit codes: 0 done, 2 config or data paths, 3 loss target missed, 4 data failed verification,
5 stopped by a guard, 75 preempted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from overture.check import check_data
from overture.config.load import command_line, load_config
from overture.errors import exit_on_error


def main(arguments: list[str]) -> int:
    """Train as the YAML says and return the process's exit code."""
    config = load_config(arguments, tasks=("instruct", "chat", "seq2seq", "classify"))
    check_data(config)
    print(f"{config.run_name}: config and data fit; loading torch and Composer ...", flush=True)
    from overture.training.run import train  # imports torch, so after the config is known good

    return train(config, command=command_line(["finetune.py", *arguments]))


if __name__ == "__main__":
    sys.exit(exit_on_error(lambda: main(sys.argv[1:]), trains=True))
