"""Conversations to token documents: the assistant's turns are learned, all else is given.

The chat template is asked for the conversation up to each turn of the assistant. What it adds for
the turn itself, up to the last special token in it, is learned: the answer and its end. Parts are
tokenised apart, so that borders are exact and equal to what generation will meet.
"""

from collections import Counter
from datetime import date
from typing import Any

import numpy as np
from jinja2 import TemplateError

from overture.data.encode import Encoder, Found, Records, Tokens, missing_bos, token_document
from overture.errors import ConfigError

Messages = list[dict[str, str]]
Parts = list[tuple[np.ndarray, bool]]  # ids, whether they are learned
DAY = date(2024, 7, 26)  # which Llama 3's template has where there is no clock
_PROBE = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))] * 2


class ChatEncoder(Encoder):
    """Encodes records with `messages`; `template` is Jinja, None for the tokenizer's own.

    The tokenizer takes special tokens as such: the template writes them. `truncate_prompt` leaves
    out the oldest turns after the system message. ConfigError if no template can be learned from.
    """

    LEARNS = True

    def __init__(self, tokens: Tokens, template: str | None, *limits: Any) -> None:
        own = tokens.tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own  # of several by name
        super().__init__(tokens, template or own, *limits)
        if not self.template:
            fault = f"{tokens.tokenizer.name_or_path}: the tokenizer has no chat template"
            raise ConfigError(f"{fault}; name one with --prompt_template (see --list_templates)")
        try:
            probed = self.parts(_PROBE)
        except Exception as error:  # Jinja raises its own kinds, and templates raise theirs
            raise ConfigError(f"the chat template fails: {error}") from None
        if probed is None and self.LEARNS:
            ends = "ends no answer with a special token, so a model could not learn to stop"
            turns = "writes earlier turns otherwise once later ones follow"
            fault = f"the chat template {ends}, or it {turns}"
            raise ConfigError(f"{fault}; name another with --prompt_template")

    def documents(self, records: Records, notes: Counter[str]) -> Found:
        parts = [self._checked_parts(record["messages"]) for record in records]
        texts = [text for part in parts if not isinstance(part, str) for text, _ in part]
        ids = iter(self.tokens.ids(texts))
        for record, part in zip(records, parts, strict=True):
            if isinstance(part, str):
                yield part
            else:
                tokenised = [(next(ids), learned) for _, learned in part]
                yield self._fit(record["messages"], tokenised, notes)

    def _checked_parts(self, messages: Messages) -> list[tuple[str, bool]] | str:
        if any(self.tokens.special.search(m["content"]) for m in messages):
            return "special_token_in_text"
        if not all(m["content"].strip() for m in messages if m["role"] == "assistant"):
            return "empty_response"
        try:
            return self.parts(messages) or "template_rewrites"
        except TemplateError:  # which is how a template says that it does not take this one
            return "template_refuses"

    def parts(self, messages: Messages) -> list[tuple[str, bool]] | None:
        """Return (text, learned) parts, or None if the template does not go on as it began."""
        parts: list[tuple[str, bool]] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            given = self.render(messages[:number], True)
            whole = self.render(messages[: number + 1], False)
            ends = [match.end() for match in self.tokens.special.finditer(whole, len(given))]
            if not (given.startswith(done) and whole.startswith(given) and ends):
                return None
            parts += [(given[len(done) :], False), (whole[len(given) : ends[-1]], True)]
            done = whole[: ends[-1]]
        return parts

    def render(self, messages: Messages, answer_next: bool) -> str:
        """Return a conversation as the template has it, on the same day whenever it is asked."""
        options = {"tokenize": False, "add_generation_prompt": answer_next}
        options["strftime_now"] = DAY.strftime
        apply = self.tokens.tokenizer.apply_chat_template
        return apply(messages, chat_template=self.template, **options)

    def _fit(self, messages: Messages, parts: Parts, notes: Counter[str]) -> list[Any] | str:
        cut = False
        while True:
            bos = missing_bos(self.tokens.bos, parts[0][0])
            if len(bos) + sum(len(ids) for ids, _ in parts) <= self.max_seq_len:
                notes["truncated"] += cut
                return [token_document([(bos, False), *parts])]
            system = messages[:1] if messages[0]["role"] == "system" else []
            if self.overflow != "truncate_prompt" or len(messages) - len(system) <= 2:
                return "too_long"
            messages, cut = [*system, *messages[len(system) + 2 :]], True
            found = self.parts(messages)
            if found is None:
                return "template_rewrites"
            ids = self.tokens.ids([text for text, _ in found])
            parts = [(one, learned) for one, (_, learned) in zip(ids, found, strict=True)]
