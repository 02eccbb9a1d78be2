"""Where the embedded default's connector starts: it says to the LLM what the encoder's classifier sees.

The connector is a linear layer, GELU, and a linear layer. Its hidden units are made classes of the
encoder's own classifier (logit minus a threshold, so that GELU passes only what is likely), and what a
unit adds to the output is the LLM's own embedding of the class's name. Nothing is trained yet, and a
frame of a dog is already near the word "dog".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from jobs.class_fields import Classifier

THRESHOLD = 4.0  # logits below it are common in frames of anything
TYPICAL = 6.0  # above the threshold, where the classifier is sure
ROUNDS = 20


@torch.no_grad()
def start_connector(
    connector: nn.Sequential, classifier: Classifier, tokenizer: PreTrainedTokenizerFast, embeddings: Tensor
) -> None:
    """Set the weights of `connector`; `embeddings` (V, H) are the LLM's of its input.

    Raises ValueError where the hidden layer is too small for a unit a name.
    """
    first, last = connector[0], connector[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    weight, bias, owner = units(classifier, first.out_features)
    words = torch.stack([_mean_embedding(name, tokenizer, embeddings) for name in classifier.names]).to(last.weight)
    middle = words.mean(0)
    first.weight.copy_(weight)
    first.bias.copy_(bias - THRESHOLD)
    last.weight.copy_(((words - middle) / TYPICAL)[owner].T)
    last.bias.copy_(middle)


def units(classifier: Classifier, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (count, 1280), biases and names (count) of hidden units: means of classes with one name.

    A name of many classes (120 breeds of dog) has several units, each for classes that are alike.
    """
    names = len(classifier.names)
    if count < names:
        raise ValueError(f"{names} names need as many hidden units, the connector has {count}")
    shares = [1] * names
    for _ in range(count - names):
        ratios = [len(classes) / share for classes, share in zip(classifier.classes, shares, strict=True)]
        shares[max(range(names), key=ratios.__getitem__)] += 1
    head = classifier.network.classifier
    weights, biases, owner = [], [], []
    for name, (classes, share) in enumerate(zip(classifier.classes, shares, strict=True)):
        rows = head.weight[classes]
        groups = _alike(rows, min(share, len(classes)))
        for group in range(share):
            members = groups == group % (int(groups.max()) + 1)
            weights.append(rows[members].mean(0))
            biases.append(head.bias[classes][members].mean())
            owner.append(name)
    return torch.stack(weights), torch.stack(biases), torch.tensor(owner)


def _alike(rows: Tensor, groups: int) -> Tensor:
    """The group (R) of each row (R, D), by spherical k-means; no group is empty."""
    directions = F.normalize(rows, dim=1)
    centres = directions[torch.linspace(0, len(rows) - 1, groups).long()]
    for _ in range(ROUNDS):
        group = (directions @ centres.T).argmax(1)
        centres = torch.stack(
            [
                F.normalize(directions[group == g].mean(0), dim=0) if bool((group == g).any()) else centres[g]
                for g in range(groups)
            ]
        )
    present = group.unique()
    return torch.searchsorted(present, group)


def _mean_embedding(name: str, tokenizer: PreTrainedTokenizerFast, embeddings: Tensor) -> Tensor:
    ids = tokenizer(f" {name}", add_special_tokens=False).input_ids
    return embeddings[ids].float().mean(0)
