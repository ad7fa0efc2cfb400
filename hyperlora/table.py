"""All trials of a search as one flat table: CSV for people, Parquet for programs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet


def table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Columns in the order in which they first appear; what a row lacks is null.

    A column whose values are of several types becomes text.
    """
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        kinds = {type(v) for v in values if v is not None}
        mixed = len(kinds) > 1 and not kinds <= {int, float}
        columns[name] = pa.array([None if v is None else str(v) if mixed else v for v in values])
    return pa.table(columns)


def files(rows: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """``trials.csv`` and ``trials.parquet``, by name."""
    whole = table(rows)
    parquet, text = io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(whole, parquet)
    pyarrow.csv.write_csv(whole, text)
    return {"trials.csv": text.getvalue(), "trials.parquet": parquet.getvalue()}
