"""Conversations as training has them, up to the answer that is asked for."""

from collections import Counter
from typing import Any

import numpy as np
from jinja2 import TemplateError

from overture.data.encode import Tokens, missing_bos
from overture.data.encode_chat import ChatEncoder
from overture.data.examine import dropped
from overture.errors import ConfigError

Rows = list[tuple[Any, dict[str, Any]]]  # where each stands, and the record


class Talk(ChatEncoder):
    """Encodes conversations that are to be answered."""

    LEARNS = False

    def asked(
        self, place: Any, messages: list[dict[str, str]], room: int
    ) -> tuple[list[int], list[int]]:
        """Return the ids of a conversation up to the next answer, and what is known to end one.

        As training has them, or, where the template writes earlier turns anew, as it has it. The
        oldest turns go, as in training; ConfigError if there is no `room` even so. TemplateError is
        how a template says that it does not take them.
        """
        while True:
            ids, ends = self._ids(messages)
            system = messages[:1] if messages[0]["role"] == "system" else []
            if len(ids) <= room:
                return ids, ends
            if len(messages) - len(system) <= 2:
                fault = f"{len(ids):,} tokens, but there is room for {room:,}"
                raise ConfigError(f"{place}: {fault}")
            messages = [*system, *messages[len(system) + 2 :]]

    def _ids(self, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        said = {"role": "assistant", "content": "."}
        parts = self.parts([*messages, said])
        texts = [text for text, _ in parts or [(self.render(messages, True), False)]]
        given = self.tokens.ids(texts[:-1] if parts else texts)
        last = self.parts([messages[-1], said])  # of which no earlier turn can be written anew
        ends = [int(self.tokens.ids([last[-1][0]])[0][-1])] if last else []
        return np.concatenate([missing_bos(self.tokens.bos, given[0]), *given]).tolist(), ends


def chat_ends(tokenizer: Any) -> list[int]:
    """Return what ends an answer by the chat template of a tokenizer, as far as that shows."""
    talk = Talk(Tokens(tokenizer, specials=True), None, None, "drop")
    return talk.asked("", [{"role": "user", "content": "a"}], 2**31)[1]


def encode_conversations(
    rows: Rows, tokenizer: Any, room: int
) -> tuple[list[list[int]], Rows, list[int]]:
    """Return the ids of conversations up to their last answer, the rows, and what ends an answer.

    Rows in which a text spells a special token, or that the template refuses, are left out, as in
    training.
    """
    encoder = Talk(Tokens(tokenizer, specials=True), None, None, "drop")
    prompts, kept, ends, lost = [], [], set(), Counter()
    for place, record in rows:
        *messages, last = record["messages"]
        if any(encoder.tokens.special.search(m["content"]) for m in messages):
            lost["special_token_in_text"] += 1
            continue
        try:
            ids, end = encoder.asked(place, messages, room)
        except TemplateError:
            lost["template_refuses"] += 1
            continue
        prompts.append(ids)
        kept.append((place, {"response": last["content"]}))
        ends |= {*end}
    if not kept:
        raise ConfigError(f"--data: no conversation can be asked{dropped(lost)}")
    if lost:
        print(f"asked: {len(kept):,} rows{dropped(lost)}")
    return prompts, kept, sorted(ends)
