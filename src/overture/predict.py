"""What a classifier makes of texts: a label with its probability, or for a regression a number."""

from collections.abc import Sequence
from typing import Any

import torch

from overture.data.encode import Tokens
from overture.data.prompts import PromptTemplate

# The fields of --task classify. A second text is optional, and so is the label that is expected.
ROW = PromptTemplate(("{text}", " | {text_pair}"), response="label", cut="text_pair")


@torch.no_grad()
def predict(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, Any]], batch: int, room: int
) -> list[tuple[str, float | None]]:
    """Return the likeliest label of each row and its probability, or a number and None.

    `rows` have `text`, and perhaps `text_pair`; they are encoded as in training, and cut to `room`
    tokens. `model` is of transformers, or a PeftModel over one. What is made of a row does not
    depend on `batch`, how many are asked at once.
    """
    tokens, names = Tokens(tokenizer), model.config.id2label
    encoded, long = [], 0
    for row in rows:
        pair = [tokens.border + row["text_pair"]] if row.get("text_pair") else []
        found = dict(tokens.call(row["text"], *pair))
        if len(found["input_ids"]) > room:
            long += 1
            found = dict(tokens.call(row["text"], *pair, truncation=True, max_length=room))
        encoded.append(found)
    if long:
        print(f"{long:,} rows were cut to {room:,} tokens")
    takes = {"input_ids", "attention_mask"}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        takes.add("token_type_ids")
    guesses: list[tuple[str, float | None]] = [("", None)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]["input_ids"]))
    for begin in range(0, len(order), batch):
        numbers = order[begin : begin + batch]
        few = [{n: ids for n, ids in encoded[i].items() if n in takes} for i in numbers]
        given = tokenizer.pad(few, padding_side="right", return_tensors="pt").to(model.device)
        logits = model(**given).logits.float().cpu()
        for number, row in zip(numbers, logits, strict=True):
            if len(row) == 1:
                guesses[number] = (f"{row.item():.4f}", None)
            else:
                most = int(row.argmax())
                guesses[number] = (names[most], row.softmax(-1)[most].item())
    return guesses
