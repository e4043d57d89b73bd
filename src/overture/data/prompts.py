"""Prompt templates: how the fields of a record become a prompt and the text to be learned.

A template is a sequence of sections. A section that names an empty field is left out, so one
template serves rows with and without context.
"""

import string
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from overture.errors import ConfigError, nearest


@dataclass(frozen=True)
class PromptTemplate:
    """`sections` make the prompt, `response` names the field to be learned after it."""

    sections: tuple[str, ...]
    response: str | None = None  # None: the sections are a plain text, all of it learned
    cut: str | None = None  # the field that may be shortened to make room for the response

    def fields(self) -> dict[str, bool]:
        """Return the fields that the template reads, each with whether it must be filled."""
        names = dict.fromkeys(name for section in self.sections for name in _names(section))
        # The field that may be cut may as well be empty from the start; not if it is all there is.
        found = {n: len(names) == 1 or (n != self.cut and self.response is not None) for n in names}
        if self.response is not None:
            found[self.response] = True
        return found

    def prompt(self, record: dict[str, str]) -> str:
        """Return the text before the response."""
        kept = [s for s in self.sections if all(record.get(n, "").strip() for n in _names(s))]
        return "".join(section.format_map(record) for section in kept)


@cache
def _names(section: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(section) if name]


def chat_templates() -> dict[str, str]:
    """Return the built-in chat templates, Jinja, by name."""
    return _built_in()["chat_templates"]


@cache
def templates() -> dict[str, PromptTemplate]:
    """Return the built-in prompt templates by name."""
    made = _built_in()["templates"].items()
    return {k: PromptTemplate(**{**v, "sections": tuple(v["sections"])}) for k, v in made}


@cache
def _built_in() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def template(name: str) -> PromptTemplate:
    """Return a built-in template, or the one in a YAML file; ConfigError if there is none."""
    if name in templates():
        return templates()[name]
    path, known = Path(name), ", ".join(templates())
    if not path.is_file():
        hint = nearest(name, templates()) or f" (there are: {known}, or a YAML file)"
        raise ConfigError(f"--prompt_template {name}: unknown template{hint}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML ({' '.join(str(error).split())[:120]})") from None
    return parse_template(content, str(path))


def chat_template(name: str, option: str = "--prompt_template") -> str:
    """Return a built-in chat template, or the content of a Jinja file; else raise ConfigError."""
    if name in chat_templates():
        return chat_templates()[name]
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{option} {name}: is no text in UTF-8") from None
    except OSError:
        known = f"there are: {', '.join(chat_templates())}, or a Jinja file"
        raise ConfigError(f"{option} {name}: unknown chat template ({known})") from None


def parse_template(content: Any, place: str) -> PromptTemplate:
    """Return the template that a YAML file, or a part of one, holds; ConfigError if it does not."""

    def refuse(why: str) -> ConfigError:
        parts = "sections (texts with {field} in them), response and cut (names of fields)"
        return ConfigError(f"{place}: {why}; a template has {parts}")

    known = [f.name for f in fields(PromptTemplate)]
    if not isinstance(content, dict) or not isinstance(content.get("sections"), list):
        raise refuse("has no list of sections")
    for key, value in content.items():
        if key not in known:
            raise refuse(f"unknown key {key!r}{nearest(str(key), known)}")
        if key != "sections" and not isinstance(value, (str, type(None))):
            raise refuse(f"{key} is no text")
    try:
        made = PromptTemplate(**{**content, "sections": tuple(map(str, content["sections"]))})
        made.prompt(dict.fromkeys(made.fields(), "x"))
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise refuse(f"a section cannot be filled in ({error})") from None
    if any(made.response in _names(section) for section in made.sections):
        raise refuse(f"a section holds {made.response}, which is to be learned behind the prompt")
    if not [n for n in made.fields() if n != made.response]:
        raise refuse("no section names a field")
    if made.cut is not None and made.cut not in made.fields():
        raise refuse(f"cut names {made.cut!r}, which no section holds")
    return made


def list_templates() -> list[str]:
    """Return lines that show every built-in template, with the fields it reads."""
    shown = {}
    for name, one in templates().items():
        needed = ", ".join(n if must else f"[{n}]" for n, must in one.fields().items())
        learned = f"{{{one.response}}}" if one.response else "(all of it is learned)"
        shown[f"{name}: reads {needed}"] = "".join(one.sections) + learned
    for name, text in chat_templates().items():
        shown[f"{name} (--task chat): reads messages"] = text
    return [f"{head}\n{indent(text, '    ', bool)}\n" for head, text in shown.items()]
