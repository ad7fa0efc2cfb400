"""Times of steps side by side: what is refused before anything is measured."""

from __future__ import annotations

import pytest

from benchmarks import step_time


@pytest.mark.parametrize("rounds", ["0", "20", "50"])
def test_rounds_without_an_interval_are_refused_before_they_are_measured(
    rounds: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """One ratio of twenty steps has none."""
    monkeypatch.setattr("sys.argv", ["step_time", "quickstart", "--rounds", rounds])
    monkeypatch.setattr(step_time, "measure", lambda *arguments: {"lora": {"mean": 1.0, "low": None, "high": None}})
    with pytest.raises(SystemExit) as refused:
        step_time.main()
    assert refused.value.code == 2
    assert f"--rounds {rounds}: 40 or a higher multiple of 20" in capsys.readouterr().err
