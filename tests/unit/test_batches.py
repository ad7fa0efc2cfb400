"""The order of the rows."""

from __future__ import annotations

from itertools import chain, islice

from hyperlora.training import global_batches

ROWS, SIZE = 23, 4
PER_EPOCH = ROWS // SIZE


def batches(seed: int, first: int, count: int) -> list[list[int]]:
    return list(islice(global_batches(ROWS, SIZE, seed, first), count))


def test_an_epoch_has_every_row_at_most_once_in_a_drawn_order() -> None:
    epochs = [list(chain.from_iterable(batches(0, n * PER_EPOCH, PER_EPOCH))) for n in range(3)]
    for rows in epochs:
        assert len(rows) == len(set(rows)) == PER_EPOCH * SIZE
        assert set(rows) <= set(range(ROWS))
        assert rows != sorted(rows)
    assert len({tuple(rows) for rows in epochs}) == 3, "every epoch has an order of its own"
    assert batches(1, 0, PER_EPOCH) != batches(0, 0, PER_EPOCH), "and every seed"


def test_starting_in_the_middle_gives_the_rest() -> None:
    whole = batches(0, 0, 3 * PER_EPOCH)
    for first in range(3 * PER_EPOCH):
        assert batches(0, first, 3 * PER_EPOCH - first) == whole[first:]
