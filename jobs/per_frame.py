"""A model of the objective `per_frame`, graded like one that streams.

The streaming metrics ask for logits over a dialogue as it streams. Here the same dialogue is read as such a model
learned it, every silent frame with its stock reply (actors/objective.py), and the logits are put where the metrics
look: staying silent is beginning the stock reply.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from actors.dialogue import GENERATION_POINT, Template
from actors.objective import STOCK_REPLY
from jobs.metrics import Forward


@dataclass
class PerFrameForward:
    """`forward` of the model, as a Forward over streaming dialogues. Needs a template with a separator."""

    forward: Forward
    template: Template

    def __call__(self, input_ids: Tensor, frames: Tensor, positions: Tensor) -> Tensor:
        """Logits (P, V) for streaming ids (T,); at frames the scores of silence and stock reply are exchanged.

        A decision and the first word of an answer are one place here. An answer is given where the decision was
        to speak, so its first word is not the stock reply's.
        """
        read = self.read(input_ids.tolist())
        asked = positions.tolist()
        places = torch.tensor([read.decided.get(position, read.place[position]) for position in asked])
        ascending, order = places.unique(return_inverse=True)
        logits = self.forward(torch.tensor(read.ids), frames, ascending)[order].clone()
        rows = torch.tensor([row for row, position in enumerate(asked) if position in read.decided], dtype=torch.long)
        silence, stock = self.template.silence_id, self._ids(" " + STOCK_REPLY)[0]
        logits[rows[:, None], torch.tensor([silence, stock])] = logits[rows[:, None], torch.tensor([stock, silence])]
        begin = set(read.decided.values())
        answers = [position not in read.decided and read.place[position] in begin for position in asked]
        logits[torch.tensor(answers, dtype=torch.bool), stock] = -torch.inf
        return logits

    def read(self, streaming: list[int]) -> Read:
        """Streaming ids as the model learned them."""
        template = self.template
        ask = self._ids("]\n" + GENERATION_POINT)
        stock = [*self._ids(" " + STOCK_REPLY), template.eos_id, *self._ids("\n[")]
        read = Read()
        for position, token in enumerate(streaming):
            after_frame = position > 0 and streaming[position - 1] == template.frame_id
            if after_frame and token == template.silence_id:  # stayed silent: a turn in the separator's place
                read.decided[position - 1] = len(read.ids) + len(ask) - 1
                read.place[position] = len(read.ids)
                read.ids += ask + stock
                continue
            if after_frame and streaming[position : position + len(ask)] == ask:
                read.decided[position - 1] = len(read.ids) + len(ask) - 1
            read.place[position] = len(read.ids)
            read.ids.append(token)
        if streaming and streaming[-1] == template.frame_id:
            read.decided[len(streaming) - 1] = len(read.ids) + len(ask) - 1
            read.ids += ask
        return read

    def _ids(self, text: str) -> list[int]:
        return [token.id for token in self.template.plain.encode(text)]


@dataclass
class Read:
    """Ids; where each streaming position is among them (`place`), and where the one at a frame is `decided`."""

    ids: list[int] = field(default_factory=list)
    place: dict[int, int] = field(default_factory=dict)
    decided: dict[int, int] = field(default_factory=dict)
