"""What a model under training is worth on dialogues it does not learn: losses and the streaming metrics.

Teacher-forced, as in jobs/metrics.py: at every frame the model's decision, in every answer its next token.
Workers share the dialogues and all get the same result.
"""

from __future__ import annotations

import random

import torch
import torch.distributed

from actors.model import VideoLLM
from jobs.dataset import DatasetError, TrainingSet
from jobs.metrics import Reply, evaluate, forward_of, summarize
from jobs.plan import Pick


class Validation:
    """`data` with at most `limit` of its dialogues that teach anything, the same at every time.

    `idle` of those that were drawn, and are left out, teach nothing. Raises DatasetError where all do.
    """

    def __init__(self, data: TrainingSet, limit: int, seed: int = 0, rank: int = 0, workers: int = 1) -> None:
        self.data = data
        drawn = random.Random(seed).sample(range(len(data)), len(data))
        indices, idle = list[int](), 0
        for index in drawn:
            if data.teaches(index):
                indices.append(index)
            else:
                idle += 1
            if len(indices) == limit:
                break
        if not indices:
            raise DatasetError(f"none of {len(data)} dialogues to validate on has anything to learn")
        self.dialogues, self.idle = len(indices), idle
        self.share = indices[rank::workers]
        self.workers = workers

    @torch.no_grad()
    def of(self, model: VideoLLM) -> dict[str, float | None]:
        """The metrics of `model`, which is left in eval mode."""
        model.eval()
        sums = [0.0, 0.0, 0.0, 0.0, 0.0]
        graded: list[list[Reply]] = []
        weight = model.config.stream_loss_weight
        for index in self.share:
            samples = self.data.packed([Pick(index, 0)], (weight, weight))
            device = model.device
            loss = model.packed_loss(samples.packed.to(device), samples.frames.to(device), samples.weights.to(device))
            found = [*(float(part) for part in loss), samples.text_labels, samples.stream_labels]
            sums = [total + one for total, one in zip(sums, found, strict=True)]
            sample = self.data[index]
            graded.append(evaluate(forward_of(model), self.data.template, sample.rendered, sample.frames))
        everyone = [(sums, graded)] * self.workers
        if self.workers > 1:
            torch.distributed.all_gather_object(everyone, (sums, graded))
        weighted, text, stream, text_labels, stream_labels = (
            sum(p) for p in zip(*(s for s, _ in everyone), strict=True)
        )
        streaming = summarize([replies for _, share in everyone for replies in share], self.data.store.info.fps)
        return {
            "loss": weighted / (text_labels + stream_labels),
            "text_loss": text / text_labels if text_labels else None,
            "stream_loss": stream / stream_labels if stream_labels else None,
            "lm_ppl": streaming.lm_ppl,
            "time_diff": streaming.time_diff,
            "fluency": streaming.fluency,
            "lm_correctness": streaming.lm_correctness,
        }
