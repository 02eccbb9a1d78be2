"""From logits to a decision at a frame or to the next token of a response."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.messages import SessionSettings
from actors.session import Decision

GREEDY = 1e-5  # below this temperature probabilities overflow, and the likeliest token has them all
LARGEST = 1e30  # of a score
FEW = 512


def decide(logits: torch.Tensor, silence_id: int) -> list[Decision]:
    """One decision per row of `logits` (R, V): P(silent) by softmax, and whether silence is the argmax.

    VideoLLM-online, section 3.3; the threshold is applied by the session.
    """
    logits = logits.float()
    silence = logits[:, silence_id]
    p_silent = (silence - logits.logsumexp(-1)).exp()
    wins = logits.argmax(-1) == silence_id
    others = logits.clone()
    others[:, silence_id] = -torch.inf
    margin = (silence - others.amax(-1)).abs()
    columns = torch.stack([p_silent, wins.float(), margin]).tolist()
    return [Decision(p, w > 0.5, m) for p, w, m in zip(*columns, strict=True)]


def sample(logits: torch.Tensor, settings: SessionSettings, said: Sequence[int], step: tuple[int, int]) -> int:
    """The next token of a response from `logits` (V,): greedy at temperature 0 or nearly 0, else by top-p.

    `said` are the response's tokens so far (for the repetition penalty); `step` is (number of the
    response, number of the token): together with the session's seed it fixes the draw, so a
    response that is taken over by another replica goes on as it would have.
    """
    scores = logits.float()
    if settings.repetition_penalty != 1.0 and said:
        seen = torch.tensor(sorted(set(said)), device=scores.device)
        scores = scores.clone()
        values = scores[seen]
        penalty = settings.repetition_penalty
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty).clamp(-LARGEST, LARGEST)
    if settings.temperature < GREEDY:
        return int(scores.argmax())
    generator = torch.Generator().manual_seed(hash((settings.seed, *step)) & 0x7FFFFFFFFFFFFFFF)
    probabilities = torch.softmax(scores / settings.temperature, -1)
    if settings.top_p >= 1:  # nothing is cut off, so that nothing need be sorted: a tenth of a millisecond, not fifteen
        sums = probabilities.double().cumsum(0)
        drawn = sums[-1:] * float(torch.rand((), dtype=torch.double, generator=generator))
        return min(int(torch.searchsorted(sums, drawn, right=True)), len(sums) - 1)
    ordered, ids = _most_likely(probabilities.cpu(), settings.top_p)
    outside = ordered.cumsum(0) - ordered >= settings.top_p
    outside[0] = False  # also where top_p is less than float32 can tell from 0
    ordered[outside] = 0.0
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])


def _most_likely(probabilities: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely tokens in order, at least so many that they have `mass`; all are sorted only if they must."""
    few = probabilities.topk(min(FEW, len(probabilities)))
    if float(few.values.sum()) >= mass:
        return few.values, few.indices
    every = probabilities.sort(descending=True)
    return every.values, every.indices
