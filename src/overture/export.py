"""A trained model as a folder in Hugging Face format, safetensors only, that is proven to be it."""

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from overture import hub
from overture.data.schema import folder_aside
from overture.data.shards import Split
from overture.errors import ConfigError, DataError
from overture.generate import AS_IT_IS, GREEDY, encode_prompts, end_tokens
from overture.models.build import position_limit
from overture.models.lora import RECORD
from overture.trained import Trained, ledgers

# The largest difference of any logit, in standard deviations of them all, that is rounding: of
# float32 in another order of sums, of the weights themselves in a half precision.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
SENTENCES = ("The capital of Norway is", "Once upon a time, there was", "2 + 2 =", "東京は日本の")
NEW_TOKENS = 24
MAX_PROMPT = 128  # tokens
# Plain transformers, in a process that knows nothing of this kit.
FRESH = """
import json, sys, torch, transformers
folder, head, dtype, quantised, trust, options, prompts = json.load(sys.stdin)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
load = getattr(transformers, "AutoModelFor" + head).from_pretrained
known = {"dtype": getattr(torch, dtype), "quantization_config": quantised}
model = load(folder, trust_remote_code=trust, **known).eval()
if not quantised:
    model.to("cuda" if torch.cuda.is_available() else "cpu")
answers = []
for ids in prompts:
    ids = torch.tensor([ids], device=model.device)
    if head == "SequenceClassification":
        answers.append((model(ids).logits[0].tolist(), ""))
        continue
    begin = 1 if model.config.is_encoder_decoder else ids.shape[1]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, begin:]
    answers.append((out.tolist(), tokenizer.decode(out, skip_special_tokens=True)))
print(json.dumps(answers))
"""


# How plain transformers load an export: head, as Trained has it, dtype, quantization_config, trust.
Loading = tuple[str, str, dict[str, Any] | None, bool]


def save_model(
    model: Any, tokenizer: Any, folder: Path, trained_on: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Write a model, or the adapters of a PeftModel and what they were `trained_on`, with its
    tokenizer; whole or not at all. `weights` are its state dict, if it holds but shards of them.
    """
    with folder_aside(folder) as aside:
        _write(model, tokenizer, aside, trained_on, weights)


@torch.no_grad()
def export_model(
    trained: Trained, out: Path, merge: bool, dtype: str | None, card: str, trust: bool = False
) -> Loading:
    """Write a model to the folder `out`, with `card` as its README.md; whole or not at all.

    Adapters stay adapters, or are merged into their base. What plain transformers make of the
    folder in a fresh process, with code of its maker's if there is `trust`, is compared with what
    the model does here. Returns how they load it. Raises ConfigError: an argument does not fit the
    model. DataError: the exported model is another one.
    """
    model, tokenizer = trained.model, trained.tokenizer
    if merge and trained.base is None:
        raise ConfigError(f"--merge: {trained.name} has no adapters")
    if dtype and trained.base and not merge:
        raise ConfigError("--dtype is of whole models: give --merge too, or leave it out")
    if merge and not hasattr(model.base_model, "merge_and_unload"):
        raise ConfigError(f"--merge: {trained.name}: its kind of adapters cannot be merged")
    if model.config.model_type == "mosaic_bert":
        fault = "plain transformers have no mosaic_bert, so no folder of theirs can hold it"
        raise ConfigError(f"{trained.name}: {fault}; use it here, as a run")
    classifies = trained.head == "SequenceClassification"
    if classifies and trained.base and not merge:
        fault = "plain transformers cannot know the labels of a classifier's adapters"
        raise ConfigError(f"{trained.name}: {fault}; give --merge")
    bits = getattr(model.config, "quantization_config", None)
    if dtype and bits and not merge:
        fault = f"{trained.name} is quantised, and stays so"
        raise ConfigError(f"--dtype {dtype}: {fault}; leave it out")
    kind = dtype or str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    base = model.get_base_model() if trained.base else model
    # So that plain transformers end where training taught it to.
    if not classifies:
        base.generation_config.eos_token_id = end_tokens(base, tokenizer)
        base.generation_config.pad_token_id = tokenizer.pad_token_id
    prompts = _prompts(trained)
    if merge and getattr(base, "is_quantized", False):
        model = _dequantised(model)
    if merge or dtype:
        model.float()
    asked = [_ask(model, ids) for ids in prompts]
    if merge:
        model = model.merge_and_unload(safe_merge=True)
        for module in model.modules():  # a head that was trained in float32 over half a base
            module._forward_pre_hooks.clear()
        again = (_logits(model, a.prompt, a.ids) for a in asked)
        _compare(again, asked, "float32", "merged, against base and adapters")
    if (merge or dtype) and kind != "float32":
        for weights in model.parameters():  # not buffers: a rounded rotation is another one
            weights.data = weights.data.to(getattr(torch, kind))
        again = (_logits(model, a.prompt, a.ids) for a in asked)
        _compare(again, asked, kind, f"in {kind}, against float32")
    if merge or dtype:  # of what is written, which rounding has made another model
        before, asked = asked, [_ask(model, ids) for ids in prompts]
        if changed := sum(old.ids != new.ids for old, new in zip(before, asked, strict=True)):
            print(f"greedy text of {changed} of {len(asked)} prompts is another one by that")
    with folder_aside(out) as aside:
        _write(model, tokenizer, aside, {} if merge else trained.record)
        (aside / "README.md").write_text(card, encoding="utf-8")
        if torch.cuda.is_available() and (merge or not bits):
            model.to("cpu")  # the fresh process needs the room
            torch.cuda.empty_cache()
        bits = None if merge else bits and bits.to_dict()
        loading = (trained.head, kind, bits, trust)
        answers = _fresh_answers(aside, loading, prompts)
        if classifies:
            logits = [torch.tensor([ids]) for ids, _ in answers]
            _compare(logits, asked, kind, "in a fresh process of plain transformers")
        else:
            may_go_on = trained.base is not None and not merge
            _compare_tokens(asked, answers, BOUNDS[kind] / 2, may_go_on)
    return loading


def encode_test_prompt(trained: Trained, text: str) -> list[int]:
    """Return the ids of a --test_prompt; ConfigError if the model takes none, or no such one."""
    if trained.head == "SequenceClassification":
        raise ConfigError(f"--test_prompt: {trained.name} classifies; ask src/generate_text.py")
    pairs, room = trained.head == "Seq2SeqLM", position_limit(trained.model)
    row, room = ("--test_prompt", {"text": text}), room if pairs else room - NEW_TOKENS
    return encode_prompts([row], AS_IT_IS, trained.tokenizer, room, pairs)[0]


def say(place: str | Path, loading: Loading, prompt: list[int]) -> str:
    """Return what plain transformers answer with the model of a folder, or of a name on the hub."""
    with TemporaryDirectory() as empty:  # where no folder is taken for the name
        within = None if isinstance(place, Path) else empty
        return _fresh_answers(place, loading, [prompt], within)[0][1]


def _dequantised(model: Any) -> Any:
    """Return a PeftModel over the weights that its base in 4 or 8 bits stands for."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapters, config = get_peft_model_state_dict(model), model.peft_config["default"]
    adapted = get_peft_model(model.unload().dequantize(), config)
    set_peft_model_state_dict(adapted, adapters)
    return adapted.eval()


def check_out(out: Path, source: str, overwrite: bool) -> None:
    """Raise ConfigError if a folder is in use that is not to be, or not an export, to replace."""
    if not out.exists():
        return
    if not overwrite:
        raise ConfigError(f"--out {out} is there already; give --overwrite to replace it")
    here, theirs = out.resolve(), Path(source).resolve()
    card = out / "README.md"
    is_export = card.is_file() and hub.WRITER in card.read_text(encoding="utf-8", errors="replace")
    if not is_export or here in (theirs, *theirs.parents):
        raise ConfigError(f"--out {out}: is no earlier export, so it is not replaced; name another")


def _write(
    model: Any, tokenizer: Any, folder: Path, trained_on: dict[str, Any], weights: Any = None
) -> None:
    model.save_pretrained(folder, safe_serialization=True, state_dict=weights)
    tokenizer.save_pretrained(folder)
    if trained_on and (folder / "adapter_config.json").is_file():
        (folder / RECORD).write_text(json.dumps(trained_on, indent=1) + "\n")


def _prompts(trained: Trained) -> list[list[int]]:
    """Return some prompts of the data that a run was evaluated on, or sentences, as ids."""
    room = min(MAX_PROMPT, position_limit(trained.model) - NEW_TOKENS)
    for ledger in reversed(ledgers(trained.run)):
        split, prompts = Split(ledger["folder"]), []
        has_prompts = split.kind != "raw"
        for number in range(min(len(SENTENCES), len(split)) if has_prompts else 0):
            row = split.row(number)
            # Of running text but one token is not learned.
            given = max(8, int(row["loss_mask"].argmax())) if "loss_mask" in row else room
            prompts.append(row["input_ids"][: min(given, room)].tolist())
        if prompts:
            return prompts
    rows, pairs = [("", {"text": t}) for t in SENTENCES], trained.head == "Seq2SeqLM"
    return encode_prompts(rows, AS_IT_IS, trained.tokenizer, room, pairs)


class Asked(NamedTuple):
    """A prompt, and what a model made of it."""

    prompt: list[int]
    ids: list[int]  # greedy, behind the prompt, or what a decoder of its own began with
    begin: int  # of what was made in `ids`
    logits: torch.Tensor  # [ids, vocabulary] float32


def _ask(model: Any, prompt: list[int]) -> Asked:
    given = torch.tensor([prompt], device=model.device)
    if not model.can_generate():
        return Asked(prompt, prompt, 0, _logits(model, prompt, prompt))
    options = {"attention_mask": torch.ones_like(given), "max_new_tokens": NEW_TOKENS, **GREEDY}
    ids = model.generate(input_ids=given, **options)[0].tolist()
    begin = 1 if model.config.is_encoder_decoder else len(prompt)
    return Asked(prompt, ids, begin, _logits(model, prompt, ids))


def _logits(model: Any, prompt: list[int], ids: list[int]) -> torch.Tensor:
    made = torch.tensor([ids], device=model.device)
    given = {"input_ids": made}
    if model.config.is_encoder_decoder:
        source = torch.tensor([prompt], device=model.device)
        given = {"input_ids": source, "decoder_input_ids": made}
    more = {"use_cache": False} if model.can_generate() else {}
    logits = model(**given, **more).logits.float().cpu()
    return logits[0] if model.can_generate() else logits


def _compare(again: Iterable[torch.Tensor], asked: Sequence[Asked], kind: str, what: str) -> None:
    """Say the largest difference of a logit; DataError if it is too large."""
    pairs = zip(again, (one.logits for one in asked), strict=True)
    found = [(now - before).abs().max().item() for now, before in pairs]
    # A classifier has few of them, of which a row may have hardly different ones.
    spreads = [one.logits.std().item() for one in asked if one.logits.shape[0] > 1]
    spread = min(spreads) if spreads else torch.cat([one.logits for one in asked]).std().item()
    print(f"{what}: logits, of a spread of {spread:.2g}, differ by {max(found):.2g} at most")
    bound = BOUNDS[kind] * spread
    if not max(found) <= bound:
        fault = f"logits differ by {max(found):.2g} at most, {bound:.2g} is rounding"
        raise DataError(f"{what}: {fault}; nothing was written")


def _fresh_answers(
    place: str | Path, loading: Loading, prompts: list[list[int]], within: str | None = None
) -> list[tuple]:
    """Return the (ids, text) that plain transformers give for each prompt."""
    options = {"max_new_tokens": NEW_TOKENS, **GREEDY}
    asked = json.dumps([str(place), *loading, options, prompts])
    # -I: neither this folder nor PYTHONPATH, through which it could meet this kit.
    command = [sys.executable, "-I", "-c", FRESH]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, cwd=within)
    if done.returncode:
        killed = f"killed by signal {-done.returncode}, as when memory runs out"
        reason = (done.stderr.strip() or killed).splitlines()[-1][:200]
        raise DataError(f"plain transformers cannot use what was exported ({reason})")
    return json.loads(done.stdout.splitlines()[-1])


def _compare_tokens(
    asked: Sequence[Asked], answers: list, tie: float, may_go_on: bool = False
) -> None:
    """Raise DataError if greedy tokens differ, but where logits here were but a tie apart.

    Answers `may_go_on` behind their end there: adapters have no generation config of their own, so
    that plain transformers know the ends of the base alone.
    """
    made = ties = longer = 0
    for (_, ids, begin, logits), (theirs, _) in zip(asked, answers, strict=True):
        pairs = enumerate(zip(ids[begin:], theirs, strict=False), start=begin - 1)
        place, (one, other) = next((p for p in pairs if p[1][0] != p[1][1]), (len(ids) - 1, (0, 0)))
        if not logits[place, one] - logits[place, other] <= tie * logits.std():
            fault = f"{other} is token {place + 1} there, {one} here"
            raise DataError(f"plain transformers do not give the same text: {fault}")
        over = len(theirs) - len(ids[begin:]) if one == other else 0
        if over < 0 or (over and not may_go_on):
            fault = f"of a prompt they make {len(theirs)} tokens, not {len(ids[begin:])}"
            raise DataError(f"plain transformers do not end where it ends here: {fault}")
        longer += over > 0
        made, ties = made + place + 1 - begin, ties + (one != other)
    parted = f", {ties} of which then part at a tie" if ties else ""
    print(f"a fresh process gives the same {made} greedy tokens on {len(asked)} prompts{parted}")
    if longer:
        print(f"{longer} of them go on there, as the base has another end: give eos_token_id")
