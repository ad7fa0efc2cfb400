"""Rows of a recipe: generated, from files, or from the hub."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

import fsspec
from datasets import ClassLabel, load_dataset
from datasets.exceptions import DatasetsError

from hyperlora.config import DataConfig, Problem, RecipeError, first_line, template_columns
from hyperlora.tasks import generated

Row = dict[str, Any]
GENERATED_ROWS = {"train": 4000, "heldout": 200}
#: Characters of a line: one that is longer has lost its line ends.
LONGEST_LINE = 4 * 1024 * 1024
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")


@dataclass
class Part:
    """What reading all rows of one part has told.

    Attributes:
        rows: how many there are.
        labels: those of a classification.
        sha256: over the rows in their order.
    """

    rows: int = 0
    labels: set[str] = field(default_factory=set)
    sha256: str = ""


Parts = Literal["train", "eval"]
PARTS: tuple[Parts, ...] = get_args(Parts)


def survey(data: DataConfig, kind: str, parts: Sequence[Parts] = PARTS) -> dict[Parts, Part]:
    """Read every row of these parts once, and keep none.

    Raises:
        RecipeError: naming the file and line, what was found and what is allowed; problems of both parts at once.
    """
    problems: list[Problem] = []
    found = {part: Part() for part in parts}
    for part, content in found.items():
        digest = hashlib.sha256()
        try:
            for row in read_rows(data, kind, part):
                content.rows += 1
                digest.update(_hashed(row))
                if kind == "classification":
                    content.labels.add(str(row[data.label]))
        except RecipeError as error:
            problems += error.problems
        content.sha256 = digest.hexdigest()
    if problems:
        raise RecipeError(problems)
    return found


def same_rows(data: DataConfig, kind: str, part: Parts, surveyed: Part) -> Iterator[Row]:
    """The rows of one part once more, for whoever keeps what comes of them under what :func:`survey` has told.

    Raises:
        RecipeError: they are not those any more, as the last of them or an unknown label tells; or as
            :func:`read_rows`.
    """
    allowed = "rows that stay as they are while they are read; these have changed meanwhile: start again"
    changed = RecipeError([Problem(f"data.{part}", getattr(data, part) or data.source, allowed)])
    digest = hashlib.sha256()
    for row in read_rows(data, kind, part):
        if kind == "classification" and str(row[data.label]) not in surveyed.labels:
            raise changed
        digest.update(_hashed(row))
        yield row
    if digest.hexdigest() != surveyed.sha256:
        raise changed


def _hashed(row: Row) -> bytes:
    """What of a row its part's SHA-256 is over; an image, which no task reads, is told by another address each time."""
    told = json.dumps(row, sort_keys=True, default=lambda value: _ADDRESS.sub("", str(value)))
    return told.encode() + b"\n"


def read_rows(data: DataConfig, kind: str, part: Parts) -> Iterator[Row]:
    """The rows of one part, one after the other.

    Raises:
        RecipeError: when the row comes up that is wrong; or there is none, or they cannot be read.
    """
    name, limit = getattr(data, part), getattr(data, f"{part}_rows")
    texts = _columns(data, kind)
    labels = [data.label] if kind == "classification" else []
    number = 0
    for number, row in enumerate(islice(_source(data, part, labels), limit), 1):
        wrong = _row_problem(row, texts, labels)
        if wrong is not None:
            allowed = f"columns {', '.join(texts + labels)}; row {number} {wrong}"
            raise RecipeError([Problem(f"data.{part}", name, allowed)])
        yield row
    if not number:
        raise RecipeError([Problem(f"data.{part}", name, "at least one row")])


def _source(data: DataConfig, part: Parts, labels: list[str]) -> Iterable[Row]:
    name, limit = getattr(data, part), getattr(data, f"{part}_rows")
    if data.source in ("word-problems", "entailment"):
        make = generated.word_problems if data.source == "word-problems" else generated.entailment_pairs
        split: generated.Split = "train" if part == "train" else "heldout"
        try:
            return make(limit or GENERATED_ROWS[split], data.seed, split)
        except ValueError as error:
            raise RecipeError([Problem(f"data.{part}_rows", limit, str(error))]) from error
    if data.source == "hub":
        try:
            rows = load_dataset(data.root, data.subset, split=name, revision=data.revision)
        except (OSError, ValueError, DatasetsError) as error:
            at = f" at revision {data.revision}" if data.revision else ""
            allowed = f"the hub name of a data set with split {name!r}{at} ({first_line(error)})"
            raise RecipeError([Problem("data.root", data.root, allowed)]) from error
        if labels and isinstance(rows.features.get(labels[0]), ClassLabel):  # whose -1 stands for none
            rows = rows.filter(lambda label: label != -1, input_columns=labels)
        return rows
    return _read(f"{str(data.root).rstrip('/')}/{name}", f"data.{part}", data)


def _row_problem(row: Any, texts: list[str], labels: list[str]) -> str | None:
    """What is wrong with a row that needs these columns; None for a good one."""
    if not isinstance(row, dict):
        return f"is no object with columns, but {type(row).__name__}"
    if None in row:  # where csv.DictReader puts what no column has a name for
        return f"has {len(row) - 1 + len(row[None])} values for {len(row) - 1} columns"
    missing = [column for column in texts + labels if row.get(column) is None]
    if missing:
        return f"lacks {', '.join(missing)}, it has {', '.join(str(c) for c, v in row.items() if v is not None)}"
    for column in texts:
        value = row[column]
        if not isinstance(value, str):
            return f"has no text in {column}, but {type(value).__name__}"
        if "\0" in value:
            return f"has a NUL character in {column}"
        try:
            value.encode()
        except UnicodeEncodeError:
            return f"has half a surrogate pair in {column}"
    for column in labels:
        value = row[column]
        if not isinstance(value, str | int) or value == "":
            return f"has no label in {column}: a text or a whole number, found {value!r}"
    return None


def _columns(data: DataConfig, kind: str) -> list[str]:
    """The columns that hold text."""
    if kind == "classification":
        return [data.text, *([data.text_pair] if data.text_pair else [])]
    if kind in ("generation", "completion"):
        return [data.prompt, data.completion]
    return list(dict.fromkeys(template_columns(data)))


def _read(uri: str, field: str, data: DataConfig) -> Iterator[Row]:
    def refused(allowed: str) -> RecipeError:
        return RecipeError([Problem(field, uri, allowed)])

    # Files from Windows begin with a mark that is no part of the first column's name.
    encoding = "utf-8-sig" if codecs.lookup(data.encoding).name == "utf-8" else data.encoding
    try:
        with fsspec.open(uri, "r", encoding=encoding, newline="") as stream:
            if data.format == "json":
                content = json.load(stream)
                if not isinstance(content, list):
                    raise ValueError(f"a list of rows, found {type(content).__name__}")
                yield from content
            else:
                yield from _rows(stream, data)
    except FileNotFoundError:
        raise refused("allowed: an existing file") from None
    except OSError as error:
        raise refused(f"allowed: a file that can be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise refused(f"text in data.encoding={data.encoding} ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise refused(f"allowed: {data.format} (nested too deeply)") from error
    except (ValueError, csv.Error) as error:
        raise refused(f"allowed: {data.format} ({error})") from error
    except Exception as error:  # of a store's own library
        raise refused(f"allowed: a file that can be read ({type(error).__name__}: {error})") from error


def _bounded(stream: Any) -> Iterator[str]:
    """The lines of a text file."""
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise ValueError(f"line {number} is longer than {LONGEST_LINE:,} characters")
        yield line


def _rows(stream: Any, data: DataConfig) -> Iterator[Row]:
    lines = _bounded(stream)
    if data.format in ("tsv", "csv"):
        yield from _table(lines, data.format)
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if data.format == "label-text":
            label, _, text = line.strip().partition(" ")
            if not text:
                raise ValueError(f"line {number} has no text after its label")
            yield {data.label: label, data.text: text}
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        yield row


def _table(lines: Iterable[str], kind: str) -> Iterator[Row]:
    # GLUE's files carry unpaired quotation marks: in TSV a quote is a character like any other.
    reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if kind == "tsv" else csv.DictReader(lines)
    try:
        names = list(reader.fieldnames or [])
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"the header names {', '.join(repeated)} twice")
        yield from reader
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num + 1}: {error}") from error
