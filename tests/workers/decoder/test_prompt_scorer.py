"""What is scored of prompts: the same in blocks of any size, for several prompts at once, and beside sums."""

from __future__ import annotations

import pytest
import torch

from lamina_workers.decoder.logprobs import PromptScores, PromptTokens, RowLogprobs
from lamina_workers.decoder.prompt_scores import PromptScorer

VOCABULARY, WIDTH, TOKENS = 70, 8, 12
HIDDEN = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
HEAD = torch.randn(WIDTH, VOCABULARY, generator=torch.Generator().manual_seed(2))
ASKED = [PromptTokens(0, 3, 4, (1, 2, 3, 4), 2), PromptTokens(5, 0, 2), PromptTokens(8, 9, 3, (0, 0, 69), 0)]


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_scores_do_not_depend_on_blocks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina_workers.decoder.prompt_scores._BLOCK", rows * VOCABULARY + 1)
    scorer = PromptScorer(ASKED, VOCABULARY, torch.device("cpu"))
    assert scorer.rows.tolist() == [0, 1, 2, 3, 5, 6, 8, 9, 10]
    hidden, sizes = HIDDEN[scorer.rows], list[int]()

    def logits(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return hidden[part] @ HEAD

    scorer.score(logits, hidden)
    assert max(sizes) <= rows
    assert sum(sizes) == 7  # the head is not computed for sums
    first, summed, last = scorer.scores
    assert [each.start for each in scorer.scores] == [3, 0, 9]
    assert torch.allclose(torch.tensor(summed.hidden), HIDDEN[5:7].sum(0))
    assert summed.logprobs == ()
    whole = (HIDDEN @ HEAD).log_softmax(-1)
    for part, scores in ((ASKED[0], first), (ASKED[2], last)):
        for at, target, report, rank in zip(
            range(part.first, TOKENS), part.targets, scores.logprobs, scores.ranks, strict=False
        ):
            assert report.chosen == pytest.approx(float(whole[at, target]), abs=1e-5)
            assert rank == int((whole[at] > whole[at, target]).sum()) + 1
            assert [token for token, _ in report.top] == whole[at].topk(part.top).indices.tolist()


def test_other_ranks_make_the_same_calls_and_have_no_log_probabilities() -> None:
    scorer = PromptScorer(ASKED, VOCABULARY, torch.device("cpu"))
    calls = list[int]()
    scorer.score(lambda part: calls.append(len(part)), HIDDEN[scorer.rows])
    assert calls == [7]
    assert [len(each.logprobs) for each in scorer.scores] == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    assert PromptScores(0, (RowLogprobs(-1.0, ()),), (1,)).finite
    assert not PromptScores(0, (RowLogprobs(-1.0, ()), RowLogprobs(bad, ())), (1, 1)).finite
    assert not PromptScores(0, hidden=(0.0, bad)).finite
