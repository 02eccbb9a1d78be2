"""Made-up streams whose things look to the classifier as photographs do: less sure, and of few classes at once.

Things out of `Injector.things` are far from photographs: their pooled features are several times as large, and
dozens of classes get logits that a photograph has for a few. Here every thing is fitted into its place in its
stream, with a price on what it does to the pooled features. What the classifier cannot tell goes by its kind,
drawn things too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jobs.class_fields import Aim, Place, fitted
from jobs.drawn_things import drawn_kinds
from jobs.made_streams import RECOGNISED, SURE, Happenings, StreamMaker
from jobs.object_names import ELUSIVE

SEEN = 0.25  # a name is in view from this probability on, where the thing was put there
AIMS = (0.3, 0.95)  # how sure the classifier is made of a thing, as it is of those in photographs
HINTS = (0.05, 0.25)  # how sure of what a place only reminds of
LOOK = 0.6  # how much of a thing is brought along; the rest is found where it is put
FIT_STEPS = 14
GAINS = (1.0, 1.3, 1.7)  # how strongly a thing is put in: the least that the classifier recognises
SURE_OF_KIND = 0.4


class FittedMaker(StreamMaker):
    """Makes streams with drawn things and fitted ones, out of material with `Injector.modest_things`."""

    sure = SEEN

    def _come(
        self,
        fields: Tensor,
        name: int,
        what: Happenings,
        cut: bool,
        random: np.random.Generator,
        torch_random: torch.Generator,
    ) -> tuple[Tensor, list[str]]:
        kind = self.kinds.get(self.classifier.names[name])
        if kind is None or not what.blended or random.random() >= what.blended:
            places = [name]
            changed = self._with_any(fields, places, cut, random, torch_random)
        elif what.blends is None:
            of_kind = self._of_kind(kind)
            places = [name, of_kind[int(random.integers(len(of_kind)))]]
            changed = self._with_any(fields, places, cut, random, torch_random)
        else:
            classes = self._some_of_kind(kind, what.blends, random)
            places = sorted({int(self.classifier.places[one]) for one in classes})
            changed = self._with_any(fields, places, cut, random, torch_random, classes=classes)
        return changed, [self.classifier.names[place] for place in places]

    def _some_of_kind(self, kind: str, count: tuple[int, int], random: np.random.Generator) -> list[int]:
        """Classes, not names: what resembles many animals resembles many breeds of dogs."""
        all_of_kind = sorted(one for place in self._of_kind(kind) for one in self.classifier.classes[place])
        wanted = int(random.integers(count[0], count[1] + 1))
        return [int(one) for one in random.choice(all_of_kind, min(wanted, len(all_of_kind)), replace=False)]

    def _called(self, words: Sequence[str], seen: Sequence[str | None], chances: Tensor) -> list[str | None]:
        """What a thing that was put in is called while it is there.

        That is its name if it is often seen, which then stays while the classifier gives it half of SEEN. What may be
        one of several `words` of a kind goes by its kind, unless the classifier is sure of one of them.
        """
        word = max(words, key=lambda one: sum(name == one for name in seen))
        chance = chances[:, self.places[word]]
        kind = self.kinds.get(word) if len(words) > 1 else None
        if kind is not None and float(chance.median()) < SURE:
            of_kind = self._of_kind(kind)
            likely = chances[:, of_kind].sum(1) >= SURE_OF_KIND
            return [kind if there else None for there in likely.tolist()]
        if sum(name == word for name in seen) > len(seen) / 3:
            return [word if there else name for name, there in zip(seen, (chance >= SEEN / 2).tolist(), strict=True)]
        return list(seen)

    def _drawn_called(self, decided: list[str | None], chances: Tensor) -> list[str | None]:
        """Drawn things go by their kind, if they have one, unless the classifier sees in most frames what they are."""
        called, start = list(decided), 0
        of_kind = drawn_kinds()
        while start < len(decided):
            name, stop = decided[start], start
            while stop < len(decided) and decided[stop] == name:
                stop += 1
            if name is not None and name in of_kind:
                place = self.places.get(name)
                told = place is not None and float(chances[start:stop, place].median()) >= SEEN
                called[start:stop] = [name if told else of_kind[name]] * (stop - start)
            start = stop
        return called

    def _haunt(self, fields: Tensor, share: float, random: np.random.Generator, torch_random: torch.Generator) -> None:
        """Make a place look like one of the elusive things, as places out of focus do, or a little like anything."""
        if random.random() >= share:
            return
        elusive = random.random() < 0.5
        names = [place for place, name in enumerate(self.classifier.names) if not elusive or name in ELUSIVE]
        name = int(random.choice(names))
        fields[:] = self._with_any(fields, [name], True, random, torch_random, AIMS if elusive else HINTS)

    def _with_thing(
        self,
        fields: Tensor,
        name: int,
        cut: bool,
        random: np.random.Generator,
        torch_random: torch.Generator,
        relative: Tensor | None = None,
    ) -> Tensor:
        assert relative is None
        return self._with_any(fields, [name], cut, random, torch_random)

    def _with_any(
        self,
        fields: Tensor,
        names: Sequence[int],
        cut: bool,
        random: np.random.Generator,
        torch_random: torch.Generator,
        aims: tuple[float, float] = AIMS,
        classes: Sequence[int] = (),
    ) -> Tensor:
        """The fields with a thing of that name, or one that may be one of several, fitted into its place.

        With `classes` it looks as much like each of them; without, like each of the names.
        """
        count = len(fields)
        looks = [int(self.by_name[name][int(random.integers(len(self.by_name[name])))]) for name in names]
        look = LOOK * self.material.things[looks].float().mean(0)
        strength, amount = self._there(count, cut, random, torch_random)
        some = [count // 3, 2 * count // 3]
        if classes:
            wanted = F.one_hot(torch.tensor(classes), len(self.classifier.places)).bool()[None]
        else:
            wanted = torch.stack([torch.eq(self.classifier.places, name) for name in names])[None]
        aim = Aim(wanted, torch.tensor([random.uniform(*aims)]), torch.tensor([10 ** -random.uniform(2, 3)]))
        place = Place(fields[some][None], amount[some][None])
        thing = fitted(self.classifier, self.material.natural, place, look[None], aim, FIT_STEPS)
        placed = strength[:, None, None] * amount * thing
        for gain in GAINS if aims == AIMS and not classes else (1.0,):
            changed = fields + gain * placed
            _, seen = self.classifier.named(self.classifier.features(changed).mean(1))
            if float(torch.isin(seen, torch.tensor(names)).sum()) >= RECOGNISED * count:
                break
        return changed
