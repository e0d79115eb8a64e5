"""Teachers whose class scores do not mean what they should are told from good ones."""

import re

import pytest
import torch

from diffkd.features.outputs import are_probabilities
from diffkd.report.suspicion import suspicions


def scores_of(answers, classes=10):
    torch.manual_seed(0)
    return torch.randn(len(answers), classes) + 20 * torch.nn.functional.one_hot(answers, classes)


LABELS = torch.arange(200) % 10


def test_a_good_teacher_is_not_suspected():
    assert not list(suspicions(scores_of(LABELS), LABELS))
    assert not list(suspicions(scores_of(LABELS), None))


def test_classes_in_another_order():
    chance, permuted = suspicions(scores_of((LABELS * 3 + 1) % 10), LABELS)
    assert "right on 0.0 % of 200 test pictures: chance is 10.0 %" in chance
    assert "right on 100.0 %, not on 0.0 %: its classes seem permuted" in permuted


def test_some_classes_in_another_order():
    swapped = torch.tensor([1, 0, 3, 2, 4, 5, 6, 7, 8, 9])
    (permuted,) = suspicions(scores_of(swapped[LABELS]), LABELS)
    assert "right on 100.0 %, not on 60.0 %" in permuted


@pytest.mark.parametrize(("share", "said"), [(0.9, []), (0.52, ["chance"]), (0.1, ["chance", "permuted"])])
def test_two_classes(share, said):
    labels = torch.arange(200) % 2
    right = torch.rand(200, generator=torch.Generator().manual_seed(0)) < share
    found = list(suspicions(scores_of(torch.where(right, labels, 1 - labels), 2), labels))
    assert len(found) == len(said)
    assert all(word in line for word, line in zip(said, found, strict=True))


def test_one_answer_for_all_is_chance_however_often_it_is_right():
    labels = (torch.arange(200) % 10 == 0).long()
    (chance,) = suspicions(scores_of(torch.zeros(200, dtype=torch.long), 2), labels)
    assert "right on 90.0 % of 200 test pictures: chance is 90.0 %" in chance
    (chance,) = suspicions(scores_of(torch.ones(200, dtype=torch.long), 2), labels)
    assert "right on 10.0 % of 200 test pictures: chance is 10.0 %" in chance


def test_a_teacher_at_chance_is_not_called_permuted():
    answers = torch.randint(10, (200,), generator=torch.Generator().manual_seed(1))
    (chance,) = suspicions(scores_of(answers), LABELS)
    assert "chance" in chance
    assert not list(suspicions(scores_of(answers[:20]), LABELS[:20]))


def test_probabilities_are_told_from_scores():
    assert are_probabilities(scores_of(LABELS).softmax(1))
    assert not are_probabilities(scores_of(LABELS) + 1)


def test_check_says_it_of_a_teacher_that_is_given(diffkd, tiny, tmp_path):
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "from diffkd.models.simple import SimpleCNN\n"
        "def net(num_classes=10):\n"
        "    return nn.Sequential(SimpleCNN(4, 1, num_classes), nn.Softmax(1))\n"
    )
    words = ["teacher.model=own.py:net", "method=kd", "taps={'': ''}"]
    status, out, err = diffkd("check", tiny, *words)
    assert status == 0, err
    assert "teacher: warning: its scores are probabilities" in out
    assert re.search(r"task.cross_entropy +│ +[\d.]+ │ yes +│ +1 │", out), "each loss's pull, as a share"
