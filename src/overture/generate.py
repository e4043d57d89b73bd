"""What a trained model makes of prompts: in batches, on a stream, or in a conversation."""

import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from composer.utils import dist, get_device
from jinja2 import TemplateError
from tqdm import tqdm

from overture.data import convert
from overture.data.conversion import Conversion
from overture.data.encode import InstructEncoder, Tokens, missing_bos
from overture.data.encode_pairs import Seq2SeqEncoder
from overture.data.examine import dropped, examine
from overture.data.prompts import PromptTemplate, parse_template, templates
from overture.data.schema import write_aside
from overture.errors import ConfigError, GuardError
from overture.models.build import position_limit
from overture.models.isolation import in_evaluation
from overture.models.lora import merge_where_exact
from overture.models.seq2seq import UNBENT
from overture.predict import ROW, predict
from overture.talk import Rows, Talk, encode_conversations
from overture.trained import Trained, ledgers
from overture.training.cores import has_gpu

GREEDY = {
    "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, **UNBENT,
}  # fmt: skip
WRITING = {"max_new_tokens": 64, "num_beams": 1, "stop": []}  # what the door gives by itself
AS_IT_IS = PromptTemplate(("{text}",))  # of a --prompt; what spells a special token in it is one


@in_evaluation
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], batch: int, title: str = "",
    stop: Sequence[str] = (), enough: Callable[[], bool] = bool, **options: Any,
) -> tuple[list[str], int]:  # fmt: skip
    """Return the continuation of each prompt as text, and the number of tokens made for them all.

    Args:
        model: of transformers.
        tokenizer: its own; what it or the model's generation config calls an end is one.
        prompts: ids, without padding.
        batch: how many prompts to go on with at once; greedy answers do not depend on it but where
            rounding decides, as it often does in a half precision.
        title: of the progress bar that long work has.
        stop: texts before which an answer ends.
        enough: asked before each batch whether to leave it at what there is, the others empty.
        options: of transformers' `generate`; greedy where they do not say otherwise.
    """
    known = {"eos_token_id": end_tokens(model, tokenizer), "pad_token_id": tokenizer.pad_token_id}
    marks = tokenizer.get_added_vocab()  # which the text of an answer does not show
    drawn = UNBENT if options.get("do_sample") else {}  # then its own settings hold
    options = {**{k: v for k, v in GREEDY.items() if k not in drawn}, **known, **options}
    ends = {*(options["eos_token_id"] or ()), *(marks[x] for x in stop if x in marks)}
    options["eos_token_id"] = sorted(ends) or None
    over = torch.tensor([*(options["eos_token_id"] or []), tokenizer.pad_token_id])
    texts, made = [""] * len(prompts), 0
    # On the left, so that answers start together; a decoder of its own starts anew.
    apart = model.config.is_encoder_decoder
    side = {"padding_side": "right" if apart else "left", "return_tensors": "pt"}
    # Prompts of like length together: less padding, and the answers go back to their places.
    # The longest first, as they are what memory may not suffice for.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    for numbers in tqdm(batches, desc=title, unit=" batches", delay=2, leave=False):
        if enough():
            break
        ids = {"input_ids": [prompts[i] for i in numbers]}
        given = tokenizer.pad(ids, return_attention_mask=True, **side).to(model.device)
        begin = 1 if apart else given["input_ids"].shape[1]
        options |= {"stopping_criteria": _stopping(tokenizer, stop, begin)} if stop else {}
        new = model.generate(**given, **options)[:, begin:].cpu()
        is_over = torch.isin(new, over).long()
        made += int((is_over.cumsum(1) == is_over).sum())  # up to the first end of each
        found = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(numbers, found, strict=True):
            for end in stop:
                text = text.split(end)[0]
            texts[i] = text
    return texts, made


def _stopping(tokenizer: Any, stop: Sequence[str], begin: int) -> Any:
    """Return what ends a row once a text stands in what was made of it: transformers' own looks at
    the prompt too, and knows no text whose last character is several tokens.
    """

    def has_one(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        made = tokenizer.batch_decode(ids[:, begin:], skip_special_tokens=True)
        return torch.tensor([any(x in text for x in stop) for text in made], device=ids.device)

    return [has_one]


def end_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """Return the ids that end an answer: the tokenizer's, and those that the model came with.

    BERT's kind has a [SEP] in the place of an end, as the encoders of data have it.
    """
    ours = tokenizer.eos_token_id
    ours = tokenizer.sep_token_id if ours is None else ours
    theirs = model.generation_config.eos_token_id
    theirs = theirs if isinstance(theirs, list) else [theirs]
    return sorted({ours, *theirs} - {None}) or None


def encode_prompts(
    rows: Rows, template: PromptTemplate, tokenizer: Any, room: int, pairs: bool = False
) -> list[list[int]]:
    """Return the ids of prompts as training meets them; `pairs` is of encoder-decoders.

    Where one does not fit in `room`, the field that the template allows is cut, as in training;
    raises ConfigError if it does not even so.
    """
    tokens = convert.template_tokens(tokenizer, template, specials=template is AS_IT_IS)
    of_task = Seq2SeqEncoder if pairs else InstructEncoder
    encoder = of_task(tokens, template, None, "truncate_prompt")
    prompts, cut = [], Counter()
    for place, record in rows:
        ids = encoder.prompt_ids(template.prompt(record))
        bos = tokens.bos[:0] if pairs else missing_bos(tokens.bos, ids)
        fitted = encoder.fit_prompt(record, ids, room - len(bos), cut)
        if fitted is None or not len(bos) + len(fitted):
            fault = f"a prompt of {len(ids):,} tokens, but the model's positions take 1 to {room:,}"
            raise ConfigError(f"{place}: {fault}" + " before the answer" * (not pairs))
        prompts.append([*bos.tolist(), *map(int, fitted)])
    if cut["truncated"]:
        print(f"{cut['truncated']:,} prompts were cut to fit")
    return prompts


def read_rows(
    job: Conversion, template: PromptTemplate | str | None, sample: int | None, seed: int
) -> tuple[Rows, PromptTemplate | str | None]:
    """Return the rows of a dataset, or some drawn by a seed, and the template that suits them.

    Raises ConfigError: no such data, or they lack a field of the template.
    """
    with TemporaryDirectory() as kept:
        source = convert.open_rows(job, "train", Path(kept))
        if template is None:
            template = convert.choose_template(job, source)
            for name in (name for name, one in templates().items() if one == template):
                print(f"{source.name}: by the prompt template {name}")
        fields = convert.task_fields(job, template)
        answered = getattr(template, "response", None)  # not so of the template of a chat
        kinds = {name: kind for name, kind in fields.kinds.items() if name != answered}
        if template is ROW:
            kinds["label"] = "optional label"
        fields = replace(fields, kinds=kinds, learned=())
        found = examine(source, fields, job.max_rejected)
        convert.check_names(job, fields, found)
        sound = np.flatnonzero(found.fates == 0).tolist()
        if sample is not None:
            sound = random.Random(seed).sample(sound, min(sample, len(sound)))
        chosen, rows = set(sound), []
        for number, (place, record) in enumerate(source.read()):
            if number in chosen:
                rows.append((f"{source.name}: {place}", fields.read(record, known=True)))
    lost = Counter(found.reasons[fate] for fate in found.fates if fate)
    print(f"{source.name}: {len(rows):,} of {found.rows:,} rows{dropped(lost)}")
    return rows, template


def chat(model: Any, tokenizer: Any, room: int, **options: Any) -> None:
    """Talk in the terminal, by the tokenizer's chat template, until the input ends.

    Raises ConfigError: it has none, or a text has no `room`.
    """
    encoder = Talk(Tokens(tokenizer, specials=True), None, None, "drop")
    messages: list[dict[str, str]] = []
    with suppress(EOFError):
        while True:
            messages.append({"role": "user", "content": input("> ")})
            try:
                ids, ends = encoder.asked("--chat", messages, room)
            except TemplateError as error:
                raise ConfigError(f"--chat: the chat template fails: {error}") from None
            ends = sorted({*(end_tokens(model, tokenizer) or ()), *ends})
            (said,), _ = answer(model, tokenizer, [ids], 1, eos_token_id=ends, **options)
            if "streamer" not in options:
                print(said)
            messages.append({"role": "assistant", "content": said})


def join_ranks(ranks: int, has_data: bool, device_map: str | None) -> None:
    """Let the processes of a launcher share the rows of a dataset; ConfigError without one."""
    if ranks == 1:
        return
    if not has_data or device_map:
        fault = f"{ranks} ranks share the rows of --data, each with a model of its own"
        raise ConfigError(f"{fault}; leave the launcher, or --device_map, out")
    has_gpu()
    kinds = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [kind.allow_tf32 for kind in kinds]
    dist.initialize_dist(get_device(None), timeout=7 * 86_400)  # one rank's share may take longer
    for kind, allowed in zip(kinds, before, strict=True):  # Composer switches them on
        kind.allow_tf32 = allowed


def answer_together(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], *how: Any, **options: Any
) -> tuple[list[str], int]:
    """Return on every rank what `answer` does of all prompts, of which each rank does a share."""
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    mine = answer(model, tokenizer, prompts[rank::ranks], *how, **options)
    texts, parts = [""] * len(prompts), dist.all_gather_object(mine)
    for share, (found, _) in enumerate(parts):
        texts[share::ranks] = found
    return texts, sum(made for _, made in parts)


def generate(
    trained: Trained, asked: Conversion | list[str], template: Any, sample: int | None, seed: int,
    batch: int, out: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Answer prompts or the rows of a dataset, to the terminal or to a file of JSON lines; without
    any, talk. The `options` are those of `answer`; raises ConfigError as the functions above do.
    """
    from transformers import TextStreamer

    model, tokenizer = trained.model, trained.tokenizer
    if trained.head == "SequenceClassification":
        return _label(trained, asked, template, (sample, seed), batch, out, options)
    torch.manual_seed(seed)
    positions, longest = position_limit(model), options["max_new_tokens"]
    pairs = model.config.is_encoder_decoder
    if positions + pairs <= longest:  # a decoder of its own has them for the answer alone
        raise ConfigError(f"--max_new_tokens {longest}: the model has {positions:,} positions")
    room = positions if pairs else positions - longest
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    of_data = isinstance(asked, Conversion)
    talks = not asked or (of_data and asked.task == "chat")
    known = ledgers(trained.run)
    learned = next((ledger["template"] for ledger in known), None)
    if talks:
        if pairs:
            raise ConfigError(f"--chat: {trained.name} has an encoder; it answers a --prompt alone")
        learned = learned if isinstance(learned, str) else tokenizer.chat_template
        tokenizer.chat_template = template or learned
    if not asked:
        shown = {} if options["stop"] else {"streamer": streamer}  # which would show the end too
        merge_where_exact(model, positions)
        return chat(model, tokenizer, room, **shown, **options)
    usual = None
    if isinstance(learned, dict):
        usual = parse_template(learned, f"{trained.run}: the template of its data")
    if of_data:
        template = template or usual
        if trained.run and not (known or template or talks):
            fault = f"the data of {trained.run} is not where it was, so its template is not known"
            raise ConfigError(f"--data: {fault}; name it by --prompt_template")
        rows, template = read_rows(asked, template, sample, seed)
    else:
        if template is None and usual and _is_a_frame(usual):
            names = [name for name, one in templates().items() if one == usual]
            how = names[0] if names else "FILE, the YAML that its data were converted with"
            said = f"the prompt goes in as it is; as in training: --prompt_template {how}"
            print(said, file=sys.stderr)
        template = template or AS_IT_IS
        rows = _typed(asked, template)
    if talks:
        prompts, rows, ends = encode_conversations(rows, tokenizer, room)
        options["eos_token_id"] = sorted({*(end_tokens(model, tokenizer) or ()), *ends})
    else:
        prompts = encode_prompts(rows, template, tokenizer, room, pairs)
    alone = len(rows) == 1 and options["num_beams"] == 1
    streamed = alone and not (out or options["stop"] or pairs)
    options |= {"streamer": streamer} if streamed else {}
    differ = merge_where_exact(model, positions)
    begin = time.perf_counter()
    texts, made = answer_together(model, tokenizer, prompts, batch, "answers", **options)
    seconds = time.perf_counter() - begin
    if dist.get_global_rank():
        return
    shown = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    answers = []
    for prompt, (_, record), text in zip(shown, rows, texts, strict=True):
        expected = record.get("response" if talks else template.response)
        answers.append({"prompt": prompt, "expected": expected, "answer": text})
    if out:
        _write(out, answers)
    elif not streamed:
        between = "\n-> " if pairs else ""
        for row in answers:  # in one piece, as a secret could span both
            print(f"{row['prompt']}{between}{row['answer']}\n")
    rate = f"{made:,} tokens in {seconds:.1f} s, {made / seconds:,.1f} tokens/s"
    if differ is not None:
        rate += f"; adapters merged in memory, logits differ by {differ:.0e} of their spread"
    print(f"{len(texts):,} answers{f' in {out}' if out else ''}: {rate}")


def _label(
    trained: Trained, asked: Conversion | list[str], template: Any, drawn: tuple, batch: int,
    out: Path | None, options: dict[str, Any],
) -> None:  # fmt: skip
    if template or options != WRITING or not asked or getattr(asked, "task", "") == "chat":
        fault = f"{trained.name} classifies: it takes no --chat, no template and no option of text"
        raise ConfigError(f"{fault} that is written; give --prompt or --data alone")
    rows = read_rows(asked, ROW, *drawn)[0] if isinstance(asked, Conversion) else _typed(asked, ROW)
    longest = [ledger["max_seq_len"] for ledger in ledgers(trained.run)]  # as in training
    room = min(position_limit(trained.model), *longest[:1], 2**31)
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    share = [row for _, row in rows[rank::ranks]]
    mine = predict(trained.model, trained.tokenizer, share, batch, room)
    found: list[Any] = [None] * len(rows)
    for number, part in enumerate(dist.all_gather_object(mine)):
        found[number::ranks] = part
    if rank:
        return
    answers = []
    for (_, row), (label, probability) in zip(rows, found, strict=True):
        content = {"prompt": ROW.prompt(row), "expected": row.get("label") or None}
        answers.append(content | {"answer": label, "probability": probability})
        if not out:
            sure = "" if probability is None else f" ({probability:.1%})"
            print(f"{content['prompt']} -> {label}{sure}")
    if out:
        _write(out, answers)
    print(f"{len(answers):,} rows{f' in {out}' if out else ''}")


def _is_a_frame(template: PromptTemplate) -> bool:
    """Return whether a template puts words around the one text that it needs, for an answer."""
    needed = [n for n, must in template.fields().items() if must and n != template.response]
    bare = re.fullmatch(r"\{\w+\}", "".join(template.sections))
    return template.response is not None and len(needed) == 1 and not bare


def _typed(texts: list[str], template: PromptTemplate) -> Rows:
    """Return prompts as rows, each text in the one field that the template needs."""
    fields = template.fields().items()
    needed = [name for name, must in fields if must and name != template.response]
    if len(needed) != 1:
        fault = f"the template reads {', '.join(needed)}: give rows that have these with --data"
        raise ConfigError(f"--prompt_template: {fault}")
    return [("--prompt", {needed[0]: text}) for text in texts]


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    try:
        write_aside(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise GuardError(f"--out {out}: cannot be written ({error}); nothing is there") from None
