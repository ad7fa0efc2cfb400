"""Rows of a recipe: generated, from files, or from the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from typing import Any

import fsspec
from datasets import load_dataset

from hyperlora.config import DataConfig, Problem, RecipeError
from hyperlora.tasks import generated

Row = dict[str, Any]
GENERATED_ROWS = {"train": 4000, "heldout": 200}


def load_rows(data: DataConfig, kind: str) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows.

    Raises:
        RecipeError: naming the file and line, what was found and what is allowed; problems of both parts at once.
    """
    problems: list[Problem] = []
    parts: list[list[Row]] = []
    for part, rows in (("train", data.train_rows), ("eval", data.eval_rows)):
        try:
            parts.append(_load_part(data, kind, part, rows))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return parts[0], parts[1]


def _load_part(data: DataConfig, kind: str, part: str, limit: int | None) -> list[Row]:
    if data.source in ("word-problems", "entailment"):
        make = generated.word_problems if data.source == "word-problems" else generated.entailment_pairs
        split: generated.Split = "train" if part == "train" else "heldout"
        return make(limit or GENERATED_ROWS[split], data.seed, split)
    name = getattr(data, part)
    if data.source == "hub":
        rows = [dict(row) for row in load_dataset(data.root, data.subset, split=name)]
    else:
        rows = _read(f"{str(data.root).rstrip('/')}/{name}", f"data.{part}", data)
    if not rows:
        raise RecipeError([Problem(f"data.{part}", name, "at least one row")])
    wanted = _columns(data, kind)
    for number, row in enumerate(rows, 1):
        missing = [c for c in wanted if row.get(c) is None]
        if missing:
            allowed = f"columns {', '.join(wanted)}; row {number} lacks {', '.join(missing)}, it has {', '.join(row)}"
            raise RecipeError([Problem(f"data.{part}", name, allowed)])
    return rows[:limit]


def _columns(data: DataConfig, kind: str) -> list[str]:
    if kind == "classification":
        return [data.text, *([data.text_pair] if data.text_pair else []), data.label]
    if kind == "generation":
        return [data.prompt, data.completion]
    return [c for c, used in ((data.prompt, "{prompt}"), (data.completion, "{completion}")) if used in data.template]


def _read(uri: str, field: str, data: DataConfig) -> list[Row]:
    try:
        with fsspec.open(uri, "r", encoding=data.encoding, newline="") as stream:
            if data.format == "json":
                content = json.load(stream)
                if not isinstance(content, list):
                    raise ValueError(f"a list of rows, found {type(content).__name__}")
                return content
            return list(_lines(stream, data))
    except FileNotFoundError:
        raise RecipeError([Problem(field, uri, "allowed: an existing file")]) from None
    except UnicodeDecodeError as error:
        allowed = f"text in data.encoding={data.encoding} ({error.reason} at byte {error.start})"
        raise RecipeError([Problem(field, uri, allowed)]) from error
    except (ValueError, csv.Error) as error:
        raise RecipeError([Problem(field, uri, f"allowed: {data.format} ({error})")]) from error


def _lines(stream: Any, data: DataConfig) -> Iterator[Row]:
    if data.format in ("tsv", "csv"):
        # GLUE's files carry unpaired quotation marks: in TSV a quote is a character like any other.
        if data.format == "tsv":
            yield from csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            yield from csv.DictReader(stream)
        return
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        if data.format == "label-text":
            label, _, text = line.strip().partition(" ")
            yield {data.label: label, data.text: text}
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        yield row
