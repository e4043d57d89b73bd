"""Prompt templates: how the fields of a record become a prompt and the text to be learned.

A template is a sequence of sections. A section that names an empty field is left out, so one
template serves rows with and without context.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from overture.errors import ConfigError, nearest


@dataclass(frozen=True)
class PromptTemplate:
    """`sections` make the prompt, `response` names the field to be learned after it."""

    sections: tuple[str, ...]
    response: str | None = None  # None: the sections are a plain text, all of it learned
    cut: str | None = None  # the field that may be shortened to make room for the response

    def fields(self) -> dict[str, bool]:
        """Return the fields that the template reads, each with whether it must be filled."""
        found = {}
        for section in self.sections:
            for name in _names(section):
                # The field that may be cut may as well be empty from the start.
                found[name] = name != self.cut and self.response is not None
        if self.response is not None:
            found[self.response] = True
        return found

    def prompt(self, record: dict[str, str]) -> str:
        """Return the text before the response."""
        kept = [s for s in self.sections if all(record.get(n, "").strip() for n in _names(s))]
        return "".join(section.format_map(record) for section in kept)


def _names(section: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(section) if name]


TEMPLATES = {
    # databricks-dolly-15k: the context is optional and may be cut.
    "dolly": PromptTemplate(
        sections=(
            "### Instruction:\n{instruction}\n\n",
            "### Context:\n{context}\n\n",
            "### Response:\n",
        ),
        response="response",
        cut="context",
    ),
    # One text field, as most pretraining corpora have.
    "text": PromptTemplate(sections=("{text}",)),
    # Instruction rows as running text, for pretraining: the same sentences without the markers
    # that fine-tuning introduces. A context is given twice, which teaches a small model to look
    # back and copy within far fewer steps than it needs otherwise.
    "passage": PromptTemplate(
        sections=("{context}\n", "{instruction}\n", "{response}\n", "{context}")
    ),
}


def template(name: str) -> PromptTemplate:
    """Return a built-in template.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in TEMPLATES:
        hint = nearest(name, TEMPLATES) or f" (there are: {', '.join(TEMPLATES)})"
        raise ConfigError(f"--prompt_template {name}: unknown template{hint}")
    return TEMPLATES[name]
