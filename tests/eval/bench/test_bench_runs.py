"""Training watched and its figures read: shares of decoding, curves and probes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fwdllama_eval.bench import costs, directions, runs
from fwdllama_eval.bench.measure import Bench

from .conftest import values


def test_decode_share_is_of_all_training_time(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"decode_s": 18.0, "elapsed_s": 20.0}')
    rows = [{"step": 0, "elapsed_s": 5.0, "decode_fraction": 0.8}, {"step": 1, "elapsed_s": 20.0, "decode_fraction": 0.96}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shares = runs.decode_shares(tmp_path)
    assert shares["decode_share"] == 0.9
    assert shares["decode_share_of_steps"] == pytest.approx((5 * 0.8 + 15 * 0.96) / 20)
    assert shares["decode_share_of_worst_step"] == 0.8


@pytest.mark.parametrize(
    ("loss", "seconds"), [(5.0, 0.0), (4.0, 0.0), (3.0, 5.0), (2.0, 10.0), (1.5, 27.5), (1.0, 30.0), (0.9, None)]
)
def test_time_to_a_loss_is_read_between_two_points_of_the_curve(loss: float, seconds: float | None) -> None:
    curve = [(0.0, 4.0), (10.0, 2.0), (20.0, 2.5), (30.0, 1.0)]
    expected = 20.0 + 10.0 * (2.5 - 1.5) / 1.5 if loss == 1.5 else seconds
    assert directions.time_to(curve, loss) == (None if expected is None else pytest.approx(expected))


def test_a_probe_with_the_prompt_kept_decodes_a_fraction_of_the_tokens(bench: Bench) -> None:
    found, prompt_tokens = costs.probe_times(bench.model, bench.train_data, 2, 4)
    size = costs.EXAMPLES
    for times in found.values():
        assert len(times.answer_s) == len(times.all_s) == 8
        assert times.all_tokens - times.answer_tokens == pytest.approx(size * prompt_tokens)
        ratios = sorted(a / b for a, b in zip(times.answer_s, times.all_s, strict=True))
        assert ratios[3] <= times.ratio <= ratios[4]
    assert set(found) == {"whole", "trunk"}


def test_watched_run_begins_with_the_untrained_loss_and_has_every_step(bench: Bench) -> None:
    curve, probes = directions.watched(values(2), bench.model, bench.train_data, bench.fresh("run"))
    assert [len(curve), len(probes)] == [3, 2]
    assert curve[0][0] == 0.0
    assert 5.0 < curve[0][1] < 7.0  # ln(320) and a little
    assert curve[1][0] < curve[2][0]
