"""benchmarks.tiny_model.places: what its made-up videos tell and ask, and that each answer is there to be read."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tiny_model.places import KEYS, VALUES, WHERE, video


@pytest.mark.parametrize("where", WHERE)
def test_every_question_has_one_answer_in_an_earlier_frame(where: str) -> None:
    frames, rows, cols = shape = (5, 3, 4)
    keys, values, targets, positions = video(where, shape, 3, torch.Generator().manual_seed(1))
    assert keys.shape == values.shape == targets.shape == positions.shape[1:] == (3, 60) and int(keys.max()) < KEYS
    assert positions[:, 0, 13].tolist() == [1, 0, 1]
    for b in range(3):
        told = (values[b] < VALUES).nonzero().flatten().tolist()
        assert [n // (rows * cols) for n in told] == list(range(frames))  # one a frame
        assert (len({n % (rows * cols) for n in told}) == 1) == (where == "fixed")
        answers = {int(keys[b, n]): (n // (rows * cols), int(values[b, n])) for n in told}
        assert len(answers) == frames
        for n, target in enumerate(targets[b].tolist()):
            asks = n // (rows * cols) > 0 and n not in told
            assert (target >= 0) == asks
            if asks:
                frame, value = answers[int(keys[b, n])]
                assert frame < n // (rows * cols) and value == target
