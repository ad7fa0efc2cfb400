"""Rows that the project makes itself: word problems, entailment pairs, and text to pretrain a small model on.

Everything follows from a seed through ``random.Random.random``, the one method whose sequence Python promises to keep.
Training and held-out rows never share a question: the hash of a question decides which side it is on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeVar

Split = Literal["train", "heldout"]
Row = dict[str, str]
T = TypeVar("T")

NAMES = ["Ada", "Ben", "Cora", "Dan", "Eva", "Finn", "Gwen", "Hugo", "Iris", "Jack", "Kate", "Leo"]
THINGS = ["apples", "books", "coins", "cards", "cups", "eggs", "hats", "keys", "lamps", "nuts", "pens", "rings"]
LARGEST = 20
LABELS = ("entailment", "not_entailment")
#: Rows that can be asked for. Far more exist; the limit keeps a typing error from running for hours.
LIMITS: dict[Split, int] = {"train": 100_000, "heldout": 10_000}
#: How far apart the two numbers of an entailment pair are at most: the smaller, the less the first one tells alone.
_MARGIN = 3
#: One question in this many is held out.
_HELDOUT_SHARE = 8


def word_problems(n: int, seed: int, split: Split) -> list[Row]:
    """Arithmetic word problems of two steps with a worked solution, in the form of GSM8K (arXiv 2110.14168).

    Returns:
        ``n`` different rows with ``question`` and ``answer``; an answer reads ``4 + 3 = 7, 7 - 2 = 5 #### 5``.

    Raises:
        ValueError: ``n`` is negative or above ``LIMITS[split]``, or there is no such split.
    """
    return _distinct(n, f"word problems {seed} {split}", split, lambda rng, _place: _problem(rng))


def entailment_pairs(n: int, seed: int, split: Split) -> list[Row]:
    """Pairs of sentences in the form of RTE: does the first entail the second?

    The first says how many things someone has, the second that they are more than some number. The second sentences of
    both labels are drawn alike, so that it alone tells nothing; the first alone tells the label of 61 % at most.

    Returns:
        ``n`` different rows with ``sentence1``, ``sentence2`` and ``label`` (one of :data:`LABELS`; the counts of the
        two differ by one at most).

    Raises:
        ValueError: ``n`` is negative or above ``LIMITS[split]``, or there is no such split.
    """
    rows = _distinct(n, f"entailment {seed} {split}", split, lambda rng, place: _pair(rng, LABELS[place % 2]))
    return _shuffled(random.Random(f"order {seed} {split}"), rows)


def pretraining_text(n: int, seed: int) -> list[str]:
    """``n`` documents for the small base model: stories with sums, replies and comparisons in the words of the tasks.

    None holds the prompt or the answer format of :func:`word_problems`, which are left to fine-tuning, and none tells
    the story of a held-out row.

    Raises:
        ValueError: ``n`` is negative.
    """
    if n < 0:
        raise ValueError(f"n is {n}, allowed: 0 or more")
    rng = random.Random(f"pretraining {seed}")
    kinds = [_told_story] * 5 + [_told_replies, _told_list] + [_told_comparison] * 2 + [_told_numbers]
    return [_pick(rng, kinds)(rng) for _ in range(n)]


# -------------------------------------------------------------------- drawing


def _below(rng: random.Random, n: int) -> int:
    return int(rng.random() * n)


def _between(rng: random.Random, first: int, last: int) -> int:
    return first + _below(rng, last - first + 1)


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    return items[_below(rng, len(items))]


def _shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    mixed = list(items)
    for last in range(len(mixed) - 1, 0, -1):
        other = _below(rng, last + 1)
        mixed[last], mixed[other] = mixed[other], mixed[last]
    return mixed


def _some(rng: random.Random, items: Sequence[T], n: int) -> list[T]:
    """``n`` different items in random order."""
    left = list(items)
    return [left.pop(_below(rng, len(left))) for _ in range(n)]


def _split_of(question: str) -> Split:
    first = hashlib.sha256(question.encode()).digest()[0]
    return "heldout" if first % _HELDOUT_SHARE == 0 else "train"


# -------------------------------------------------------------------- rows


class _Story(NamedTuple):
    """Someone's things, counted over some changes: ``sums[k]`` is what ``changes[k]`` does to the count."""

    name: str
    thing: str
    opening: str
    changes: list[str]
    sums: list[str]
    counts: list[int]

    @property
    def have(self) -> int:
        return self.counts[-1]

    @property
    def asked(self) -> str:
        return f"How many {self.thing} does {self.name} have now?"

    @property
    def question(self) -> str:
        return " ".join([self.opening, *self.changes, self.asked])


def _distinct(n: int, seed: str, split: Split, draw: Callable[[random.Random, int], Row]) -> list[Row]:
    """``n`` different rows of one split; ``draw`` gets the place that its row will have."""
    if split not in LIMITS:
        raise ValueError(f"split is {split!r}, allowed: {', '.join(LIMITS)}")
    if not 0 <= n <= LIMITS[split]:
        raise ValueError(f"n is {n}, allowed: 0 to {LIMITS[split]:,} {split} rows")
    rng = random.Random(seed)
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < n:
        row = draw(rng, len(rows))
        question = row.get("question") or row["sentence1"]
        whole = f"{question} {row.get('sentence2')}"
        if _split_of(question) == split and whole not in seen:
            seen.add(whole)
            rows.append(row)
    return rows


def _problem(rng: random.Random) -> Row:
    story = _story(rng, 2)
    return {"question": story.question, "answer": f"{', '.join(story.sums)} #### {story.have}"}


def _pair(rng: random.Random, label: str) -> Row:
    name, other = _some(rng, NAMES, 2)
    thing = _pick(rng, THINGS)
    limit = _between(rng, _MARGIN + 1, LARGEST - _MARGIN)
    have = limit + (_between(rng, 1, _MARGIN) if label == LABELS[0] else -_between(rng, 0, _MARGIN - 1))
    return {
        "sentence1": f"{name} has {have} {thing} from {other}.",
        "sentence2": f"{name} has more than {limit} {thing}.",
        "label": label,
    }


def _story(rng: random.Random, steps: int) -> _Story:
    name, other = _some(rng, NAMES, 2)
    thing = _pick(rng, THINGS)
    counts = [_between(rng, 2, LARGEST // 2)]
    story = _Story(name, thing, f"{name} has {counts[0]} {thing}.", [], [], counts)
    for _ in range(steps):
        sentence, sign, number = _change(rng, name, other, thing, story.have)
        now = story.have + number if sign == "+" else story.have - number
        story.changes.append(sentence)
        story.sums.append(f"{story.have} {sign} {number} = {now}")
        counts.append(now)
    return story


def _change(rng: random.Random, name: str, other: str, thing: str, have: int) -> tuple[str, str, int]:
    """A sentence that changes how many things ``name`` has, its sign and its number."""
    if have > 3 and (have > LARGEST - 2 or rng.random() < 0.5):
        number = _between(rng, 2, min(9, have - 2))
        texts = (
            f"{name} gives {number} {thing} to {other}.",
            f"{name} loses {number} {thing}.",
            f"{name} sells {number} {thing}.",
            f"{name} drops {number} {thing}.",
        )
        return _pick(rng, texts), "-", number
    number = _between(rng, 2, min(9, LARGEST - have))
    texts = (
        f"{name} gets {number} {thing} from {other}.",
        f"{name} finds {number} {thing}.",
        f"{name} buys {number} {thing}.",
        f"{name} makes {number} {thing}.",
    )
    return _pick(rng, texts), "+", number


# -------------------------------------------------------------------- pretraining


def _told_story(rng: random.Random) -> str:
    """A story whose count is worked out after every change or at the end."""
    steps = _between(rng, 1, 3)
    while _split_of((story := _story(rng, steps)).question) == "heldout":
        pass
    now = [f"Now {story.name} has {count} {story.thing}." for count in story.counts[1:]]
    if rng.random() < 0.45:
        lines = zip(story.changes, story.sums, now, strict=True)
        return " ".join([story.opening, *(f"{change} {total}. {then}" for change, total, then in lines)])
    # The rule between story and sums is a token that fine-tuning can reuse; so is the line that asks.
    asked = f" {story.asked}" if rng.random() < 0.7 else ""
    join = _pick(rng, ("\n", " ## ", "\n## "))
    return f"{' '.join([story.opening, *story.changes])}{asked}{join}{', '.join(story.sums)} ## {now[-1]}"


def _told_replies(rng: random.Random) -> str:
    """Who has what, then questions about it with their replies."""
    facts = [
        (name, _between(rng, 2, LARGEST), thing)
        for name, thing in zip(_some(rng, NAMES, 2), _some(rng, THINGS, 2), strict=True)
    ]
    lines = [" and ".join(f"{name} has {number} {thing}" for name, number, thing in facts) + "."]
    for _ in range(_between(rng, 4, 7)):
        name, number, thing = _pick(rng, facts)
        replies = (
            f"How many {thing} does {name} have? {number}.",
            f"What does {name} have? {number} {thing}.",
            f"Who has {thing}? {name}.",
        )
        lines.append(_pick(rng, replies))
    return "\n".join(lines)


def _told_comparison(rng: random.Random) -> str:
    """Two people's numbers of one thing, compared in several ways."""
    name, other = _some(rng, NAMES, 2)
    thing = _pick(rng, THINGS)
    a, b = _some(rng, range(1, LARGEST + 1), 2)
    if rng.random() < 0.5:
        b = _pick(rng, [k for k in range(max(1, a - 4), min(LARGEST, a + 4) + 1) if k != a])
    more, fewer = ("more", "fewer") if a > b else ("fewer", "more")
    lines = [
        f"{name} has {more} {thing} than {other}.",
        f"{other} has {fewer} {thing} than {name}.",
        f"{name} has {more} than {b} {thing}.",
        f"{other} has {fewer} than {a} {thing}.",
    ]
    told = [f"{name} has {a} {thing}.", f"{other} has {b} {thing}."]
    return " ".join([*_shuffled(rng, told), *_shuffled(rng, lines)])


def _told_list(rng: random.Random) -> str:
    """Who has how many, told again in another order: what teaches the model to look a name up."""
    names = _some(rng, NAMES, _between(rng, 3, 5))
    lines = [f"{name} {_between(rng, 2, 9)}" for name in names]
    return " ".join(f"{', '.join(_shuffled(rng, lines))}." for _ in range(3))


def _told_numbers(rng: random.Random) -> str:
    """Sums, numbers in order, and comparisons."""
    kind = _below(rng, 4)
    if kind == 0:
        first = _between(rng, 0, LARGEST - 5)
        return ", ".join(str(k) for k in range(first, first + _between(rng, 4, 6))) + "."
    if kind == 1:
        lines = []
        for _ in range(_between(rng, 2, 5)):
            a, b = _some(rng, range(LARGEST + 1), 2)
            lines.append(f"{a} is {'more' if a > b else 'less'} than {b}.")
        return " ".join(lines)
    sums = []
    for _ in range(_between(rng, 4, 8)):
        small, large = sorted((_between(rng, 1, 9), _between(rng, 1, LARGEST)))
        if rng.random() < 0.5:
            sums.append(f"{large} - {small} = {large - small}")
        else:
            sums.append(f"{large} + {small} = {large + small}")
    return ", ".join(sums) + "."
