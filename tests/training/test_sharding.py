"""FSDP2 on real ranks over gloo: the numbers of one rank, whatever is trained, and going on."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from composer import Callback
from safetensors.torch import load_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.utils import _to_kwargs
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from overture.config.load import load_config
from overture.config.schema import DOORS
from overture.errors import ConfigError, GuardError
from overture.trained import load_trained
from overture.training import run as recipe
from overture.training import sharding
from runs import assert_same, curve, result

ROOT = Path(__file__).parents[2]
COMPOSER = str(Path(sys.executable).parent / "composer")
COMMON = ("device_train_microbatch_size=2", "progress_bar=false")


def train(ranks: int, folder: Path, *options: str) -> Path:
    """Train, several ranks under the launcher, and return the run folder."""
    if ranks == 1:  # here, as imports take longer than the steps
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            config = load_config([*options[1:], *COMMON, f"run_folder={folder}"], tuple(DOORS))
            assert recipe.train(config, command="python") == 0
        return folder
    command = [COMPOSER, "-n", str(ranks), *options, *COMMON, f"run_folder={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def close(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same losses to rounding, and the same weights in what the runs give."""
    ours, theirs = curve(one), curve(other)
    assert ours.keys() == theirs.keys()
    assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=tolerance)
    (name,) = (path.name for path in (one / "hf").glob("*.safetensors"))
    weights = [load_file(folder / "hf" / name) for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        # Adam makes a step of the size of any gradient, also of one that is rounding.
        assert (tensor - weights[1][key]).abs().max() < 1e-3, key


# Clipping by value, as Adam would not show a gradient that is twice what it should be, nor would
# clipping by norm.
FULL = (
    "main.py", "yamls/smoke/pretrain.yaml", "max_duration=8ba", "eval_interval=4ba",
    "save_interval=2ba", "save_num_checkpoints_to_keep=-1",
    "algorithms.gradient_clipping={clipping_type: value, clipping_threshold: 1.0e-3}",
)  # fmt: skip


@pytest.mark.dist
def test_shards_give_what_one_rank_gives_and_any_number_goes_on(smoke, tmp_path):
    whole = train(1, tmp_path / "whole", *FULL)
    sharded = "fsdp_config.state_dict_type=sharded"
    parts = train(2, tmp_path / "parts", *FULL, sharded)
    close(parts, whole)
    files = {path.name for path in (parts / "checkpoints" / "ba4").iterdir()}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "state.pt", "manifest.json"} == files
    assert not sharding.missing_shards(parts / "checkpoints" / "ba4")
    lacks = shutil.copytree(parts / "checkpoints" / "ba4", tmp_path / "lacks")
    (lacks / "__1_0.distcp").unlink()
    assert sharding.missing_shards(lacks) == {"__1_0.distcp"}
    # Two ranks with shards in their hosts' memory, one, and one without shards go on from the same
    # one; one whose bit flips is found.
    offload = "fsdp_config={state_dict_type: sharded, cpu_offload: true}"
    for name, ranks, options in (
        ("two", 2, (offload, "resume.allow=[fsdp_config]")), ("one", 1, (sharded,)),
        ("plain", 1, ("resume.allow=[fsdp_config]",)),
    ):  # fmt: skip
        folder = tmp_path / name
        shutil.copytree(parts, folder, ignore=shutil.ignore_patterns("result.json", "hf", "ba[68]"))
        if name == "one":
            damaged = folder / "checkpoints" / "ba6" / "__1_0.distcp"
            shutil.copytree(parts / "checkpoints" / "ba6", damaged.parent)
            content = bytearray(damaged.read_bytes())
            content[-100] ^= 1
            damaged.write_bytes(content)
        train(ranks, folder, *FULL, *options)
        close(folder, parts)
        if name == "two":
            assert curve(folder) == curve(parts)  # bit for bit
    assert (tmp_path / "one" / "checkpoints" / "broken-ba6-0").is_dir()
    assert '"LlamaForCausalLM"' in (parts / "hf" / "config.json").read_text()
    # The weights in the shards, put together, are those that the run gives.
    given = load_trained(str(parts)).model.state_dict()
    for name, tensor in load_trained(str(parts / "checkpoints" / "ba8")).model.state_dict().items():
        assert tensor.equal(given[name]), name


@pytest.mark.slow
@pytest.mark.dist
def test_adapters_in_shards(smoke, tmp_path):
    options = ("finetune.py", "yamls/smoke/finetune.yaml", "model.dtype=float32", "lora.dropout=0",
               "max_duration=4ba", "model.activation_checkpointing=true")  # fmt: skip
    whole = train(1, tmp_path / "whole", *options)
    parts = train(2, tmp_path / "parts", *options, "fsdp_config={}")
    close(parts, whole)
    files = {path.name for path in (parts / "checkpoints" / "ba4").iterdir()}
    assert files == {"state.pt", "manifest.json"}  # gathered, as any other
    kept = ("save_interval=2ba", "save_num_checkpoints_to_keep=-1")
    sharded = "fsdp_config.state_dict_type=sharded"
    two = train(2, tmp_path / "two", *options, *kept, sharded)
    close(two, whole)
    for name, more in (("one", sharded), ("plain", "resume.allow=[fsdp_config]")):
        folder = tmp_path / name
        shutil.copytree(two, folder, ignore=shutil.ignore_patterns("result.json", "hf", "ba4"))
        assert (folder / "checkpoints" / "ba2" / "__1_0.distcp").is_file()
        train(1, folder, *options, *kept, more)
        close(folder, whole)


@pytest.mark.slow
@pytest.mark.dist
def test_four_ranks_with_shards_and_without_give_what_one_gives(smoke, tmp_path):
    options = (*FULL, "save_interval=4ba")
    whole = train(1, tmp_path / "whole", *options)
    close(train(4, tmp_path / "plain", *options), whole)
    parts = train(4, tmp_path / "parts", *options, "fsdp_config={}")
    close(parts, whole)
    # Gathered, a checkpoint of four ranks is that of any number, with shards or without.
    for name, ranks, more in (
        ("two", 2, ("fsdp_config={}",)), ("one", 1, ("resume.allow=[fsdp_config]",)),
    ):  # fmt: skip
        folder = tmp_path / name
        shutil.copytree(parts, folder, ignore=shutil.ignore_patterns("result.json", "hf", "ba8"))
        assert (folder / "checkpoints" / "ba4" / "state.pt").is_file()
        train(ranks, folder, *options, *more)
        close(folder, whole)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", ["mlm", "classify", "seq2seq"])
def test_other_tasks_in_shards(name, smoke, tmp_path):
    door = "main.py" if name == "mlm" else "finetune.py"
    hidden = "model.config.hidden_dropout_prob=0.0"
    still = {
        "mlm": (hidden,), "seq2seq": ("generation=null", "model.config.dropout=0.0"),
        "classify": (hidden, "model.config.attention_probs_dropout_prob=0.0"),
    }[name]  # fmt: skip
    clipped = "algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 0.1}"
    options = (door, f"yamls/smoke/{name}.yaml", "max_duration=4ba", "eval_interval=4ba",
               "eval_first=false", clipped, *still)  # fmt: skip
    whole = train(1, tmp_path / "whole", *options)
    close(train(2, tmp_path / "parts", *options, "fsdp_config={}"), whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this process speaks from its GPU alone")
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_shards_in_the_hosts_memory_take_the_same_steps(run, trainable):
    _, there = run("fsdp_config={}", f"trainable={trainable}", "run_name=there")
    policies, shard = [], sharding._shard_and_let_go

    def seen(module, **options):
        policies.append(options["offload_policy"])
        return shard(module, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_shard_and_let_go", seen)
        _, hosts = run("fsdp_config.cpu_offload=true", f"trainable={trainable}", "run_name=hosts")
    assert len(policies) > 2 and {type(policy) for policy in policies} == {CPUOffloadPolicy}
    assert curve(hosts) == curve(there)
    assert_same(hosts, there)


SMALL = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 1}  # fmt: skip


def test_networks_that_cannot_be_sharded_are_refused(tiny_yaml, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny_yaml)
    asks = str(tmp_path / "tiny.yaml"), "fsdp_config.cpu_offload=true"
    config, llama = load_config([*asks], ("instruct",)), LlamaForCausalLM(LlamaConfig(**SMALL))
    sharding.parallelism(config, llama)
    llama.register_buffer("seen", torch.zeros(2))  # which would lie on the GPU
    with pytest.raises(ConfigError, match=r"fsdp_config\.cpu_offload: a Llama\S+ keeps seen with"):
        sharding.parallelism(config, llama)
    mixtral = MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2))
    with pytest.raises(ConfigError, match=r"fsdp_config: \S+\.experts\.0\.w1\.weight gets no grad"):
        sharding.parallelism(config, mixtral)
    for name, p in mixtral.named_parameters():
        p.requires_grad_(".experts." not in name)
    sharding.parallelism(config, mixtral)


def test_there_is_something_to_move_where_a_gpu_would_get_it(run, monkeypatch):
    first = FSDPState._root_pre_forward

    def as_on_a_gpu(self, module, args, kwargs):
        moved, named = _to_kwargs(args, kwargs, self._device, False)
        return first(self, module, moved[0], named[0])

    monkeypatch.setattr(FSDPState, "_root_pre_forward", as_on_a_gpu)
    assert run("fsdp_config={}", "max_duration=1ba")[0] == 0


def test_no_rank_keeps_the_whole_weights_while_they_are_sharded(run, monkeypatch):
    kept, mark = [], sharding.parallelism

    def marked(config, network):
        kept.extend(network.parameters())  # as Composer and the optimizer do
        return mark(config, network)

    monkeypatch.setattr(sharding, "parallelism", marked)
    assert run("fsdp_config={}", "max_duration=1ba")[0] == 0
    assert kept and not sum(p.numel() for p in kept)


@pytest.mark.parametrize("form", ["full", "sharded"])
def test_one_rank_goes_on_bit_for_bit_and_guards_see_shards(run, monkeypatch, form):
    options = ("lora.dropout=0.1", "trainable=lora", "lora.r=4", "save_interval=2ba",
               f"fsdp_config.state_dict_type={form}")  # fmt: skip
    code, whole = run(*options, "run_name=whole")
    assert code == 0
    build = recipe.build_callbacks

    def spoil(self, state, logger):
        if state.timestamp.batch.value == 4:
            grads = [p.grad for p in state.model.parameters() if p.grad is not None]
            grads[0].to_local().view(-1)[0] = math.nan

    fault = type("Fault", (Callback,), {"after_backward": spoil})
    monkeypatch.setattr(recipe, "build_callbacks", lambda config: [*build(config), fault()])
    with pytest.raises(GuardError, match="step 5: a gradient is not finite"):
        run(*options, "run_name=parts")
    monkeypatch.setattr(recipe, "build_callbacks", build)
    code, parts = run(*options, "run_name=parts")
    assert code == 0
    if form == "full":
        assert_same(whole, parts)
    assert curve(whole) == curve(parts)
    # From the weights alone, into a run without shards; not from those of another shape.
    begun = ("trainable=lora", f"load_path={whole}", "load_weights_only=true", "max_duration=1ba")
    asks = ("generation.num_prompts=4", "generation.max_new_tokens=4")
    _, third = run(*begun, "lora.r=4", "run_name=third", *asks)
    start = result(third)["eval_cross_entropy_before"]
    assert start == pytest.approx(result(whole)["eval_cross_entropy"], abs=1e-5)
    with pytest.raises(ConfigError, match=r"load_path: .* is \[4, \d+\] there, but \[8, "):
        run(*begun, "lora.r=8", "resume.allow=[model]", "run_name=other")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.dtype=bfloat16", "trainable=lora"], r"model.dtype: with fsdp_config shards are"),
        (["generation={}"], "generation: needs the whole model on each rank"),
        (["callbacks.early_stop={}"], "callbacks.early_stop.keep_best: needs the whole model"),
        (["precision=amp_fp16"], "precision: amp_fp16"),
        (
            ["fsdp_config.cpu_offload=true", "callbacks.memory_monitor={}"],
            "callbacks.memory_monitor: looks at the GPU that holds the weights",
        ),
        (
            ["fsdp_config.sharding_strategy=FULL_SHARD"],
            "fsdp_config.sharding_strategy: unknown key",
        ),
        (
            ["fsdp_config.state_dict_type=sharded", "save_folder=s3://a/b"],
            "sharded is written to a folder that all nodes share",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(tiny_yaml, tmp_path, options, words):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_yaml)
    with pytest.raises(ConfigError, match=words):
        load_config([str(path), "fsdp_config={}", *options], ("instruct",))
