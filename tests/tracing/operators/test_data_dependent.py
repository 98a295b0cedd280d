"""Answers of a forward on real values: noted once, replayed on others."""

from __future__ import annotations

import torch

from narrower.tracing.operators.data_dependent import AnswerListener, copy_answer


def test_answers_are_noted_in_order() -> None:
    x = torch.tensor([0.0, 2.0, 0.0, 3.0])
    with AnswerListener() as listener:
        x.nonzero()
        (x + 1).relu()
        float(x.sum())
        x[x > 1]
    places, total, chosen = listener.answers
    assert places.tolist() == [[1], [3]] and total == 5.0 and chosen.tolist() == [2.0, 3.0]


def test_what_the_forward_writes_into_an_answer_is_not_noted() -> None:
    with AnswerListener() as listener:
        torch.tensor([0.0, 2.0]).nonzero().add_(5)
    assert listener.answers[0].tolist() == [[1]]


def test_an_answer_is_a_copy() -> None:
    answer = (torch.zeros(2), [torch.ones(1)], 3)
    copy = copy_answer(answer)
    copy[0].add_(1)
    copy[1][0].add_(1)
    assert answer[0].tolist() == [0, 0] and answer[1][0].tolist() == [1.0] and copy[2] == 3
