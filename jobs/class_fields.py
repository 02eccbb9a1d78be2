"""Things to be seen without a picture of them: the encoder's own classifier, run backwards.

The embedded encoder ends in a grid of 7 x 7 cells of 320 channels (its trunk), a head that makes 1,280
of them, and a linear classifier of 1,000 classes. To put a thing into a real scene's grid, the cells of
a patch are moved along the directions in which real cells vary, just as far as the classifier needs to
be sure of the class. The result is labelled by the classifier, as real frames are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actors.efficientnet import EfficientNetLite0
from jobs.object_names import object_names

NATURAL = 2e-3  # the price of a change that real cells seldom show
GRID = 7
CELLS = GRID * GRID


class Classifier:
    """The encoder from its trunk's cells on: tokens, and the names it gives them with their probabilities."""

    def __init__(self, network: EfficientNetLite0) -> None:
        self.network = network.requires_grad_(False)
        assert network.head.bias is not None
        self._head = network.head.weight.flatten(1).T.contiguous(), network.head.bias
        names = object_names()
        self.names = sorted({name for name in names if name is not None})
        places = {name: place for place, name in enumerate(self.names)}
        self.places = torch.tensor([len(self.names) if name is None else places[name] for name in names])
        self.classes = [[c for c, n in enumerate(names) if n == name] for name in self.names]

    def trunk(self, frames: Tensor) -> Tensor:
        """Frames (B, 224, 224, 3) uint8 to fields (B, 49, 320)."""
        pixels = (frames.permute(0, 3, 1, 2).float() - 127) / 128
        with torch.no_grad():
            return self.network.trunk(pixels.contiguous(memory_format=torch.channels_last)).flatten(2).mT

    def features(self, fields: Tensor) -> Tensor:
        """Fields (..., 49, 320) to the encoder's grid (..., 49, 1280)."""
        weight, bias = self._head
        return F.relu6(fields @ weight + bias)

    def tokens(self, fields: Tensor, pooled: tuple[int, int]) -> Tensor:
        """Fields (B, 49, 320) to frame tokens (B, 1 + h * w, 1280), as FrameEncoder makes them of pixels."""
        grid = self.features(fields).mT.unflatten(2, (GRID, GRID))
        parts = F.adaptive_avg_pool2d(grid, pooled).flatten(2).mT
        return torch.cat([grid.mean(dim=(2, 3))[:, None], parts], dim=1)

    def logits(self, token: Tensor) -> Tensor:
        """A frame's first token (..., 1280) to logits of the classes (..., 1000)."""
        return self.network.classifier(token)

    def chances(self, token: Tensor) -> Tensor:
        """Probabilities (..., names + 1) of the names for each token (..., 1280); the last is of the nameless."""
        probabilities = self.logits(token).softmax(-1)
        totals = probabilities.new_zeros(*token.shape[:-1], len(self.names) + 1)
        return totals.index_add_(-1, self.places, probabilities)

    def named(self, token: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest name (...) of each token (..., 1280) and its probability; place -1 for the nameless."""
        best, place = self.chances(token).max(-1)
        return best, torch.where(place == len(self.names), -1, place)


class Injector:
    """Puts classes into fields; `scenes` (B, 49, 320) are real ones, whose cells say what is natural."""

    def __init__(self, classifier: Classifier, scenes: Tensor) -> None:
        self.classifier = classifier
        self.scenes = scenes
        cells = scenes.flatten(0, 1)
        self.mean = cells.mean(0)
        covariance = torch.cov(cells.T) + 1e-3 * cells.var(0).mean() * torch.eye(cells.shape[1])
        values, vectors = torch.linalg.eigh(covariance)
        self.spread = vectors * values.clamp_min(0).sqrt()

    def things(self, classes: Tensor, generator: torch.Generator, steps: int = 20) -> Tensor:
        """For each class (B) a thing (B, 320): what to add to the cells of a patch.

        Found by gradient on random scenes, in coordinates in which natural variation is round.
        """
        count = len(classes)
        fields, weights = self.scene(count, generator), patches(count, generator)
        sure = 0.6 + 0.35 * torch.rand(count, generator=generator)
        amount = 0.5 + torch.rand(count, CELLS, 1, generator=generator)
        shift = torch.zeros(count, fields.shape[-1], requires_grad=True)
        optimizer = torch.optim.Adam([shift], lr=0.35)
        for _ in range(steps):
            moved = fields + (shift @ self.spread.T)[:, None] * amount * weights
            logits = self.classifier.logits(self.classifier.features(moved).mean(1))
            chosen = logits.log_softmax(-1).gather(1, classes[:, None])[:, 0]
            loss = torch.relu(sure.log() - chosen).sum() + NATURAL * shift.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return (shift @ self.spread.T).detach()

    def modest_things(self, classes: Tensor, generator: torch.Generator) -> Tensor:
        """As `things`, each with a look of its own, with a price on what it does to the pooled features."""
        count = len(classes)
        fields, weights = self.scene(count, generator), patches(count, generator)
        sure = 0.6 + 0.35 * torch.rand(count, generator=generator)
        amount = (0.5 + torch.rand(count, CELLS, 1, generator=generator)) * weights
        modesty = 10 ** -(2 + torch.rand(count, generator=generator))
        look = torch.rand(count, 1, generator=generator) * torch.randn(count, fields.shape[-1], generator=generator)
        wanted = F.one_hot(classes, self.classifier.network.classifier.out_features).bool()[:, None]
        place = Place(fields[:, None], amount[:, None])
        return fitted(self.classifier, self.spread, place, look @ self.spread.T, Aim(wanted, sure, modesty), steps=40)

    def scene(self, count: int, generator: torch.Generator) -> Tensor:
        """Random real fields (count, 49, 320)."""
        return self.scenes[torch.randint(len(self.scenes), (count,), generator=generator)]


class Place(NamedTuple):
    """Where things are put: fields (B, F, 49, 320) of some frames, and how much of a thing goes into each cell."""

    fields: Tensor
    amount: Tensor  # (B, F, 49, 1)


class Aim(NamedTuple):
    """What the classifier is to see: K names with equal shares of the probability `sure` (B).

    `wanted` (B, K, 1000) are the classes of each, `modesty` (B) is the price of changing the frame beyond that.
    """

    wanted: Tensor
    sure: Tensor
    modesty: Tensor


def fitted(
    classifier: Classifier, spread: Tensor, place: Place, start: Tensor, aim: Aim, steps: int, rate: float = 0.25
) -> Tensor:
    """Things (B, 320), changed so that the classifier sees them in their places.

    By gradient from `start` (B, 320), in the coordinates `spread` (320, 320) in which natural variation is round. What
    the change does to the pooled features has its price: without it they grow to several times those of photographs,
    and dozens of classes get logits that a photograph has for a few.
    """
    change = torch.zeros(start.shape, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=rate)
    before = classifier.features(place.fields).mean(2)
    share = aim.sure / aim.wanted.shape[1]
    for _ in range(steps):
        thing = start + change @ spread.T
        pooled = classifier.features(place.fields + thing[:, None, None] * place.amount).mean(2)
        chances = classifier.logits(pooled).log_softmax(-1)[:, :, None]
        chosen = chances.masked_fill(~aim.wanted[:, None], -torch.inf).logsumexp(-1)
        lacking = torch.relu(share.log()[:, None, None] - chosen).mean((1, 2))
        price = aim.modesty * (pooled - before).square().sum(2).mean(1)
        loss = (lacking + price).sum() + NATURAL * change.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (start + change @ spread.T).detach()


def patches(count: int, generator: torch.Generator) -> Tensor:
    """Soft ellipses (count, 49, 1) in 0..1: where in the grid things are."""
    centre = 3 + 1.2 * torch.randn(count, 2, generator=generator)
    radius = 1.2 + 2.8 * torch.rand(count, 2, generator=generator)
    return ellipses(centre, radius)


def ellipses(centre: Tensor, radius: Tensor) -> Tensor:
    """Soft ellipses (B, 49, 1) with centres and radii (B, 2) in cells."""
    along = torch.arange(float(GRID))
    rows = ((along - centre[:, :1]) / radius[:, :1]).square()
    columns = ((along - centre[:, 1:]) / radius[:, 1:]).square()
    return torch.sigmoid(4 * (1 - rows[:, :, None] - columns[:, None, :])).flatten(1)[..., None]
