"""Rows that the project makes itself: word problems, entailment pairs, and text to pretrain a small model on.

Everything follows from a seed through ``random.Random``. Training and held-out rows never share a question: the hash of
a question decides which side it is on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Literal

Split = Literal["train", "heldout"]
Row = dict[str, str]

_NAMES = "Ada Ben Cora Dan Eva Finn Gwen Hugo Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tess Walt"
_THINGS = "apples books coins cards cups eggs hats keys kites lamps nuts pears pens plums rings shells"
NAMES, THINGS = _NAMES.split(), _THINGS.split()
PLACES = ["box", "bag", "basket", "drawer", "jar"]
LARGEST = 20


def word_problems(count: int, seed: int, split: Split) -> list[Row]:
    """Arithmetic word problems of two steps with a worked solution, in the form of GSM8K (arXiv 2110.14168).

    Returns:
        ``count`` different rows with ``question`` and ``answer``; an answer reads ``4 + 3 = 7, 7 - 2 = 5 #### 5``.

    Raises:
        ValueError: ``count`` different rows cannot be found.
    """
    return _distinct(count, f"word problems {seed} {split}", split, _problem, lambda row: row["question"])


def entailment_pairs(count: int, seed: int, split: Split) -> list[Row]:
    """Pairs of sentences in the form of RTE: does the first entail the second?

    Returns:
        ``count`` different rows with ``sentence1``, ``sentence2`` and ``label`` (``entailment`` or
        ``not_entailment``, alternating before a shuffle, so that both are equally frequent).

    Raises:
        ValueError: ``count`` different rows cannot be found.
    """
    labels = iter(range(10**9))
    rows = _distinct(
        count,
        f"entailment {seed} {split}",
        split,
        lambda rng: _pair(rng, next(labels) % 2 == 0),
        lambda row: row["sentence1"],
    )
    random.Random(f"order {seed} {split}").shuffle(rows)
    return rows


def pretraining_text(count: int, seed: int) -> list[str]:
    """Documents for the small base model: stories with sums, counts and comparisons in the words of the tasks.

    They hold neither the prompt nor the answer format of :func:`word_problems`, which a base model has to learn.
    """
    rng = random.Random(f"pretraining {seed}")
    kinds = rng.choices((_story, _sums, _holdings), weights=(4, 1, 2), k=count)
    return [kind(rng) for kind in kinds]


def _distinct(
    count: int, seed: str, split: Split, make: Callable[[random.Random], Row], key: Callable[[Row], str]
) -> list[Row]:
    rng, misses = random.Random(seed), 0
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < count:
        row = make(rng)
        text = key(row)
        if _split_of(text) == split and text not in seen:
            seen.add(text)
            rows.append(row)
            misses = 0
            continue
        misses += 1
        if misses > 10_000:
            raise ValueError(f"only {len(rows)} different {split} rows can be made, not {count}")
    return rows


def _split_of(text: str) -> Split:
    return "heldout" if hashlib.sha256(text.encode()).digest()[0] < 32 else "train"


# -------------------------------------------------------------------- word problems


def _problem(rng: random.Random) -> Row:
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    start = rng.randint(2, LARGEST // 2)
    sentences = [f"{name} has {start} {thing}."]
    have, worked = start, []
    for _ in range(2):
        sentence, sign, number = _change(rng, name, other, thing, have)
        sentences.append(sentence)
        now = have + number if sign == "+" else have - number
        worked.append(f"{have} {sign} {number} = {now}")
        have = now
    question = f"{' '.join(sentences)} How many {thing} does {name} have now?"
    return {"question": question, "answer": f"{', '.join(worked)} #### {have}"}


def _change(rng: random.Random, name: str, other: str, thing: str, have: int) -> tuple[str, str, int]:
    """A sentence that changes how many things ``name`` has, its sign and its number."""
    if have > 3 and (have > LARGEST - 2 or rng.random() < 0.5):
        number = rng.randint(2, min(9, have - 2))
        texts = (
            f"{name} gives {number} {thing} to {other}.",
            f"{name} loses {number} {thing}.",
            f"{name} sells {number} {thing}.",
            f"{other} takes {number} {thing} from {name}.",
        )
        return rng.choice(texts), "-", number
    number = rng.randint(2, min(9, LARGEST - have))
    texts = (
        f"{other} gives {number} {thing} to {name}.",
        f"{name} finds {number} {thing}.",
        f"{name} buys {number} {thing}.",
        f"{name} takes {number} {thing} from {other}.",
    )
    return rng.choice(texts), "+", number


# -------------------------------------------------------------------- entailment


def _facts(rng: random.Random) -> list[tuple[str, int, str, str]]:
    """Three holders with different numbers of different things in different places."""
    people, things, places = rng.sample(NAMES, 3), rng.sample(THINGS, 3), rng.sample(PLACES, 3)
    return list(zip(people, rng.sample(range(2, 10), 3), things, places, strict=True))


def _fact(name: str, number: int, thing: str, place: str) -> str:
    return f"{name} has {number} {thing} in a {place}"


def _pair(rng: random.Random, entailed: bool) -> Row:
    facts = _facts(rng)
    told = ", ".join(_fact(*f) for f in facts[:2]) + f" and {_fact(*facts[2])}."
    return {"sentence1": told, "sentence2": _claim(rng, facts, entailed), "label": _label(entailed)}


def _label(entailed: bool) -> str:
    return "entailment" if entailed else "not_entailment"


def _claim(rng: random.Random, facts: list[tuple[str, int, str, str]], true: bool) -> str:
    """A sentence about one holder. A false one borrows a number, thing or place of another holder of the same facts,
    so that nothing but the first sentence tells the two apart."""
    name, number, thing, place = facts[rng.randrange(3)]
    other = rng.choice([f for f in facts if f[0] != name])
    kind = rng.randrange(3)
    if kind == 0:
        return f"{name} has {number if true else other[1]} {thing}."
    if kind == 1:
        return f"{name} has {thing if true else other[2]}."
    return f"The {thing} of {name} are in a {place if true else other[3]}."


# -------------------------------------------------------------------- pretraining


def _story(rng: random.Random) -> str:
    """A story in which a number of things changes and every new number is told."""
    name, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    have = rng.randint(2, LARGEST // 2)
    lines = [f"{name} has {have} {thing}."]
    for _ in range(rng.randint(1, 4)):
        sentence, sign, number = _change(rng, name, other, thing, have)
        now = have + number if sign == "+" else have - number
        lines.append(f"{sentence} {have} {sign} {number} = {now}. Now {name} has {now} {thing}.")
        have = now
    return " ".join(lines)


def _sums(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(3, 8)):
        first, second = rng.randint(1, LARGEST), rng.randint(1, 9)
        if rng.random() < 0.5 and first > second:
            lines.append(f"{first} - {second} = {first - second}")
        else:
            lines.append(f"{first} + {second} = {first + second}")
    return ", ".join(lines) + "."


def _holdings(rng: random.Random) -> str:
    """Who has what, then claims about it that are called right or wrong."""
    facts = _facts(rng)
    told = ", ".join(_fact(*f) for f in facts[:2]) + f" and {_fact(*facts[2])}."
    claims = []
    for _ in range(rng.randint(1, 4)):
        true = rng.random() < 0.5
        claims.append(f"{_claim(rng, facts, true)} That is {'right' if true else 'wrong'}.")
    return " ".join([told, *claims])
