"""The offline instruction corpus of the quickstart: Dolly-shaped rows from a small grammar.

Every response is copied or composed from its prompt, or states a record of a table, and each record
is asked in many phrasings. A held-out row is therefore answerable from the other rows: exact match
on held-out prompts measures what a model of a few million parameters has learned. The price is
narrowness: under 1,000 words, and one answer per record. `embedded.yaml` explains the notation.
"""

import random
import re
from collections.abc import Iterator, Sequence
from itertools import chain, permutations, product, zip_longest
from pathlib import Path
from typing import Any

import yaml

KEYS = ("instruction", "context", "response", "category")
MAX_MISSES = 5_000  # so many repeated prompts in a row: the grammar counts as used up

Prompted = Sequence[str]  # instruction, context, response


def _tables(words: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the tables by name: those of the YAML and those computed from them."""
    tables = {k: list(t.items()) if isinstance(t, dict) else t for k, t in words["tables"].items()}
    animals, countries, opposites = (tables[k] for k in ("animals", "countries", "opposites"))
    days, numbers = words["pools"]["day"], words["numbers"]
    cycles = (days, [month[0] for month in tables["months"]], words["seasons"])
    tables["neighbours"] = [(c[i - 1], name) for c in cycles for i, name in enumerate(c)]
    tables["sums"] = [
        (numbers[a], f"{sign} {numbers[b]}", f"{verb} {numbers[b]}", numbers[n])
        for a, b in product(range(2, 11), range(1, 4))
        for sign, verb, n in (("plus", "buys", a + b), ("minus", "sells", a - b))
        if n > 1
    ]
    days = days * 2  # so that days[i + n] is n days after days[i]
    shifts = product(range(7), (("before", 5), ("after", 2)))
    tables["shifts"] = [(f"two days {way} {days[i]}", days[i + n]) for i, (way, n) in shifts]
    tables["spans"] = [(days[i], days[i + n], numbers[n]) for i in range(7) for n in range(2, 7)]
    tables["sizes"] = [(a[0], b[0]) for i, a in enumerate(animals) for b in animals[i + 4 :]]
    tables["capitals"] = [country[1:] for country in countries]
    tables["continents"] = [(c[0], c[2]) for c in countries] + tables["capitals"]
    tables["opposites_both_ways"] = opposites + [(b, a) for a, b in opposites]
    pairs = product(permutations(tables["reviews"], 2), ((1, "Positive"), (2, "Negative")))
    tables["remarks"] = [(f"{a[0]} {a[n]} and {b[0]} {b[n]}", mood) for (a, b), (n, mood) in pairs]
    tables |= {f"{k}s": [a for a in animals if a[1] == k] for k in ("mammal", "bird", "insect")}
    for name, table, i in ("class", animals, 1), ("leg", animals, 4), ("capital", countries, 1):
        pairs = [(r, table[k - n][i]) for k, r in enumerate(table) for n in (0, 3, 7)]
        guesses = [(r[0], guess, "Yes" if guess == r[i] else "No", r[i]) for r, guess in pairs]
        tables[f"{name}_guesses"] = guesses
    return tables


def _filled(template: str, *record: str, **slots: str) -> str:
    """Return the template as a text on one line, its articles right and its first letter large."""
    text = " ".join(template.format(*record, **slots).split())
    text = re.sub(r"\b[Aa] (?=[A-Z])", "", text)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[:1].upper() + text[1:]


class _Grammar:
    """The contents of `embedded.yaml`, and its kinds of prompt, of which only `listed` ends."""

    def __init__(self, rng: random.Random):
        words = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
        self.rng, self.words, self.tables = rng, words, _tables(words)
        names = {name: [record[0] for record in table] for name, table in self.tables.items()}
        self.groupings = [{k: names[t] for k, t in g.items()} for g in words["groupings"]]
        self.pools = {k: names[p] if isinstance(p, str) else p for k, p in words["pools"].items()}

    def slots(self, template: str) -> dict[str, str]:
        slots = {"name": ""}
        for slot in dict.fromkeys(re.findall(r"{([a-z_]+)", template)):
            slots[slot], slots[f"{slot}2"] = self.rng.sample(self.pools[slot], 2)
        return slots | {"She": self.words["tables"]["people"].get(slots["name"], "")}

    def listed(self, entries: list[dict[str, Any]]) -> Iterator[Prompted]:
        answers: dict[str, str] = {}
        for entry in entries:
            for record, ask in product(self.tables[entry["table"]], entry["ask"]):
                question, answer = (_filled(t, *record) for t in (ask, entry["response"]))
                answers[question] = answer if answers.get(question, answer) == answer else "-"
        openers = self.words["openers"]
        rows = [(o + q, "", a) for q, a in answers.items() if "-" not in q + a for o in openers]
        self.rng.shuffle(rows)
        yield from rows

    def drawn(self, entry: dict[str, Any]) -> Iterator[Prompted]:
        table = self.tables[entry["table"]] if "table" in entry else [()]
        while True:
            record, ask = self.rng.choice(table), self.rng.choice(entry["ask"])
            slots = self.slots(ask + entry["response"])
            yield [_filled(t, *record, **slots) for t in (ask, "", entry["response"])]

    def grouped(self, entry: dict[str, Any]) -> Iterator[Prompted]:
        sample = self.rng.sample
        while True:
            groups = self.rng.choice(self.groupings)
            kind, other = sample(list(groups), 2)
            ours, theirs = sample(groups[kind], 2), sample(groups[other], 2)
            four = sample(ours + theirs, 4)
            name, name2, odd = *ours, theirs[0]
            slots = {"kind": kind, "other": other, "name": name, "odd": odd}
            slots["four"] = ", ".join(four)
            slots["two"] = " or a ".join(sample([name, odd], 2))
            slots["kinds"] = " or a ".join(sample([kind, other], 2))
            slots["three"] = ", a ".join(sample([name, name2, odd], 3))
            slots["ours"] = ", ".join(sorted(ours, key=four.index))
            slots["theirs"] = ", ".join(sorted(theirs, key=four.index))
            yield [_filled(t, **slots) for t in (entry["ask"], "", entry["response"])]

    def story(self, part: str) -> Iterator[Prompted]:
        choice, words = self.rng.choice, self.words
        while True:
            story = choice(words["stories"])
            instruction, response = choice(words["summarise"]), story["summary"]
            if part == "questions":
                question, response = choice(list(story["questions"].items()))
                instruction = choice(words["read"]) + question
            elif part == "fields":
                fields = self.rng.sample(list(story["fields"].items()), choice([1, 2]))
                wanted = " and ".join(f"the {name}" for name, _ in fields)
                instruction = choice(words["extract"]).format(wanted)
                response = "; ".join(f"{name}: {value}" for name, value in fields)
            slots = self.slots(" ".join(story["texts"]))
            yield [_filled(t, **slots) for t in (instruction, choice(story["texts"]), response)]


def generate_rows(num_rows: int = 12_000, seed: int = 17) -> list[dict[str, str]]:
    """Return `num_rows` rows in the layout of databricks-dolly-15k, shuffled.

    No two rows share (instruction, context), also after lower-casing and folding of white space;
    rows are the same on every Python version. ValueError if the grammar cannot write so many.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, not {num_rows}.")
    grammar = _Grammar(random.Random(seed))
    words = grammar.words
    rows: list[dict[str, str]] = []
    seen = {""}  # the prompt of the filler that stands in for a used-up kind
    counts = {category: num_rows * share // 100 for category, share in words["shares"].items()}
    counts["open_qa"] += num_rows - sum(counts.values())
    for category, count in counts.items():
        left, misses = count, 0
        kinds = [getattr(grammar, k)(arg) for kind in words[category] for k, arg in kind.items()]
        for row in chain.from_iterable(zip_longest(*kinds, fillvalue=("", ""))):
            if left == 0 or misses > MAX_MISSES:
                break
            prompt = " ".join(f"{row[0]} {row[1]}".lower().split())
            if prompt in seen:
                misses += 1
                continue
            seen.add(prompt)
            rows.append(dict(zip(KEYS, (*row, category), strict=True)))
            left, misses = left - 1, 0
        if left:
            fault = f"num_rows={num_rows} needs {count} different {category} rows"
            has = f"the grammar has only about {count - left}"
            raise ValueError(f"{fault}, but {has}; ask for fewer rows.")
    grammar.rng.shuffle(rows)
    return rows
