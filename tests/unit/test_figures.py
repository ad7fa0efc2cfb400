"""Tables and labels of a finished run."""

from __future__ import annotations

import numpy as np

from hyperlora.figures import rank_table, shortest_labels, smooth


def module(name: str, layer: int | None, part: str, rank: int) -> dict:
    return {"name": name, "layer": layer, "part": part, "rank": rank}


def test_rank_table_places_every_module_by_layer_and_name() -> None:
    modules = [
        module("h.0.attn.q_proj", 0, "attn.q_proj", 3),
        module("h.0.attn.k_proj", 0, "attn.k_proj", 0),
        module("h.1.attn.k_proj", 1, "attn.k_proj", 5),
        module("pooler.dense", None, "pooler.dense", 7),
    ]
    for order in (modules, modules[::-1]):
        rows, columns, table = rank_table({"modules": order})
        at = {(r, c): int(table[i, j]) for i, r in enumerate(rows) for j, c in enumerate(columns)}
        assert rows == ["other", "0", "1"]
        assert {k: v for k, v in at.items() if v >= 0} == {
            ("0", "q"): 3,
            ("0", "k"): 0,
            ("1", "k"): 5,
            ("other", "pooler"): 7,
        }


def test_labels_are_short_and_distinct() -> None:
    bert = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert shortest_labels(bert) == ["query", "attention.output", "intermediate", "output"]
    assert shortest_labels(["a.q_proj", "a.q"]) == ["a.q_proj", "a.q"]


def test_moving_average_keeps_length_and_mean_of_a_line() -> None:
    line = np.arange(10.0)
    np.testing.assert_allclose(smooth(line, 5)[2:-2], line[2:-2])
    assert len(smooth(line, 100)) == 10
    np.testing.assert_allclose(smooth(np.ones(7), 3), 1)
