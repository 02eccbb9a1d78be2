"""Streams made up from real backgrounds and things put into them: frame tokens and what is in view.

A stream is a run of scenes. Things come with a cut, fade in or are suddenly there, stay some seconds and
go, or give way to others. Single pictures drop out or flash, which is not worth a word. What is in view
is what the encoder's classifier says of the finished frames, when it agrees with what was put there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from jobs.backgrounds import TEXT
from jobs.class_fields import CELLS, Classifier, ellipses
from jobs.object_names import ELUSIVE, kinds

SURE = 0.45  # a name is in view from this probability on
GAINS = (1.0, 1.4, 1.9)  # how strongly a thing is put in: the least that the classifier recognises
BLEND, BLENDED = 0.55, (1.6,)  # where it need not
RECOGNISED = 0.6
SURE_OF_KIND = 0.55
ALIKE = 0.6  # share of streams of few names in which two are of one kind, if the first is of any


@dataclass(frozen=True)
class Material:
    """What streams are made of: clips (C, L, 49, 320) with the names right for each, and things by name."""

    clips: Tensor
    clip_names: Sequence[tuple[str, ...]]
    things: Tensor
    thing_names: Tensor
    natural: Tensor  # (320, 320): natural variation of a cell
    empty: Tensor | None = None  # (P, L, 49, 320): scenes without, and with, what somebody drew
    drawn: Tensor | None = None
    drawn_names: Sequence[str] = ()


@dataclass(frozen=True)
class Made:
    """A stream: its frame tokens (F, N, 1280) fp16, and the name in view at each frame."""

    tokens: Tensor
    shown: list[str | None]


@dataclass(frozen=True)
class Happenings:
    """What comes in a stream, how often and for how long.

    `quiet` is the share of streams in which nothing comes, `haunted` that of places that look like one of the ELUSIVE:
    nothing is ever said of these where it is not 0. `gap` are frames between two things, `stay` those for which one
    is there, at least and less than. `few` is the most names that come in one stream, over and over, often two of
    one kind; without it any may come. It is for material with drawn things, of which `drawn` is the share of what
    comes. `blended` is the share of fitted things of a kind that may be either of two or, with `blends`, are like that
    many classes of the kind, at least and at most.
    """

    quiet: float = 0.12
    gap: tuple[int, int] = (2, 16)
    stay: tuple[int, int] = (4, 20)
    haunted: float = 0
    few: int | None = None
    drawn: float = 0.5
    blended: float = 0
    blends: tuple[int, int] | None = None


DEFAULT = Happenings()


class StreamMaker:
    """Makes streams; the same seed makes the same stream."""

    sure = SURE

    def __init__(self, material: Material, classifier: Classifier, pooled: tuple[int, int]) -> None:
        self.material = material
        self.kinds = kinds()
        self.classifier = classifier
        self.pooled = pooled
        self.by_name = [(material.thing_names == name).nonzero()[:, 0] for name in range(len(classifier.names))]
        self.places = {name: place for place, name in enumerate(classifier.names)}
        self.drawn_by_name: dict[str, list[int]] = {}
        for number, name in enumerate(material.drawn_names):
            self.drawn_by_name.setdefault(name, []).append(number)

    def make(self, seed: int, length: int, what: Happenings = DEFAULT) -> Made:
        """A stream of `length` frames.

        Where there are drawn things, they come too, and what the classifier does not recognise
        although it is of a kind with what was put there goes by the name of the kind: an "animal".
        """
        if self.material.drawn is not None:
            return self._mixed(seed, length, what)
        random = np.random.default_rng(seed)
        torch_random = torch.Generator().manual_seed(seed)
        fields, allowed = self._background(random, length)
        if random.random() >= what.quiet:
            for start, stop, cut in self._schedule(random, length, what):
                if cut:
                    rest, names = self._background(random, length - start)
                    fields[start:], allowed[start:] = rest, names
                name = int(random.integers(len(self.classifier.names)))
                fields[start:stop] = self._with_thing(fields[start:stop], name, cut, random, torch_random)
                allowed[start:stop] = [{*names, self.classifier.names[name]} for names in allowed[start:stop]]
                self._flash(fields, stop, random, torch_random)
        tokens = self.classifier.tokens(self._noisy(fields, random, torch_random), self.pooled)
        sure, place = self.classifier.named(tokens[:, 0])
        seen = [self.classifier.names[p] if s >= SURE and p >= 0 else None for s, p in zip(sure, place, strict=True)]
        return Made(tokens.half(), [_agreed(name, names) for name, names in zip(seen, allowed, strict=True)])

    def _mixed(self, seed: int, length: int, what: Happenings) -> Made:
        random = np.random.default_rng(seed)
        torch_random = torch.Generator().manual_seed(seed)
        few = self._few(random, what.few, what.drawn) if what.few is not None else []
        haunted = what.haunted
        fields, allowed = self._background(random, length)
        if haunted:
            self._haunt(fields, haunted, random, torch_random)
        decided = list[str | None]([None] * length)
        put = list[tuple[int, int, list[str]]]()
        before = 0
        for start, stop, cut in self._schedule(random, length, what) if random.random() >= what.quiet else ():
            one = few[int(random.integers(len(few)))] if few else None
            if self._is_drawn(one, random, what.drawn):
                self._draw(fields, allowed, decided, (before if not cut else start, start, stop), random, one)
                if haunted:
                    decided[start:stop] = [None if name in ELUSIVE else name for name in decided[start:stop]]
            else:
                if cut:
                    fields[start:], allowed[start:] = self._background(random, length - start)
                    if haunted:
                        self._haunt(fields[start:], haunted, random, torch_random)
                name = int(random.integers(len(self.classifier.names))) if one is None else self.places[one]
                fields[start:stop], words = self._come(
                    fields[start:stop],
                    name,
                    what if one is None else replace(what, blended=0),
                    cut,
                    random,
                    torch_random,
                )
                if not haunted or words[0] not in ELUSIVE:
                    allowed[start:stop] = [{*names, *words} for names in allowed[start:stop]]
                    put.append((start, stop, words))
                self._flash(fields, stop, random, torch_random)
            before = stop
        tokens = self.classifier.tokens(self._noisy(fields, random, torch_random), self.pooled)
        chances = self.classifier.chances(tokens[:, 0])[:, :-1]
        sure, place = chances.max(-1)
        seen = [self.classifier.names[p] if s >= self.sure else None for s, p in zip(sure.tolist(), place, strict=True)]
        shown = [_agreed(name, names) for name, names in zip(seen, allowed, strict=True)]
        for start, stop, words in put:
            shown[start:stop] = self._called(words, shown[start:stop], chances[start:stop])
        decided = self._drawn_called(decided, chances)
        return Made(tokens.half(), [name or agreed for name, agreed in zip(decided, shown, strict=True)])

    def _few(self, random: np.random.Generator, most: int, drawn: float) -> list[str]:
        """Two to `most` names, of the classifier and of what is drawn; the second often of the first one's kind."""
        either = (self.classifier.names, sorted(self.drawn_by_name))
        count = int(random.integers(2, most + 1))
        few = [str(random.choice(either[random.random() < drawn])) for _ in range(count)]
        kind = self.kinds.get(few[0])
        alike = [name for name in sorted({*either[0], *either[1]}) if kind and self.kinds.get(name) == kind]
        if alike and random.random() < ALIKE:
            few[1] = str(random.choice(alike))
        return few

    def _is_drawn(self, name: str | None, random: np.random.Generator, drawn: float) -> bool:
        """By chance, for a name that there is in both ways or None."""
        if name is None or (name in self.places and name in self.drawn_by_name):
            return bool(random.random() < drawn)
        return name in self.drawn_by_name

    def _draw(
        self,
        fields: Tensor,
        allowed: list[set[str]],
        decided: list[str | None],
        place: tuple[int, int, int],
        random: np.random.Generator,
        name: str | None,
    ) -> None:
        """Put in a drawn thing at [start, stop); its place without it is there from `before`, and after it or a cut."""
        assert self.material.empty is not None
        assert self.material.drawn is not None
        owned = range(len(self.material.drawn)) if name is None else self.drawn_by_name[name]
        number = owned[int(random.integers(len(owned)))]
        empty, drawn = self.material.empty[number].float(), self.material.drawn[number].float()
        before, start, stop = place
        phase = int(random.integers(len(empty)))
        around = torch.cat([torch.arange(len(empty)), torch.arange(len(empty) - 2, 0, -1)])
        at = around[(phase + torch.arange(len(fields))) % len(around)]
        fields[before:start] = empty[at[before:start]]
        fields[start:stop] = drawn[at[start:stop]]
        allowed[before:stop] = [set()] * (stop - before)
        decided[before:stop] = [None] * (start - before) + [self.material.drawn_names[number]] * (stop - start)
        if random.random() < 0.7:
            fields[stop:] = empty[at[stop:]]
            allowed[stop:] = [set()] * (len(fields) - stop)

    def _haunt(self, fields: Tensor, share: float, random: np.random.Generator, torch_random: torch.Generator) -> None:
        """Make a place look like one of the elusive things, as places out of focus do."""
        if random.random() < share:
            name = int(random.choice([place for place, name in enumerate(self.classifier.names) if name in ELUSIVE]))
            fields[:] = self._with_thing(fields, name, True, random, torch_random)

    def _relative(self, word: str, random: np.random.Generator) -> Tensor | None:
        """Sometimes something of the same kind, to be blended with: what comes is then hard to tell from either."""
        kind = self.kinds.get(word)
        if kind is None or random.random() < 0.35:
            return None
        of_kind = self._of_kind(kind)
        owned = self.by_name[of_kind[int(random.integers(len(of_kind)))]]
        return self.material.things[owned[int(random.integers(len(owned)))]].float()

    def _of_kind(self, kind: str) -> list[int]:
        """The places of all names of that kind."""
        return [place for place, name in enumerate(self.classifier.names) if self.kinds.get(name) == kind]

    def _come(
        self,
        fields: Tensor,
        name: int,
        what: Happenings,
        cut: bool,
        random: np.random.Generator,
        torch_random: torch.Generator,
    ) -> tuple[Tensor, list[str]]:
        """The fields with a thing of that name, and the words for what it may be; `what` is for fitted things."""
        word = self.classifier.names[name]
        relative = self._relative(word, random)
        return self._with_thing(fields, name, cut, random, torch_random, relative), [word]

    def _drawn_called(self, decided: list[str | None], chances: Tensor) -> list[str | None]:
        """What drawn things are called at each frame, given their names, None elsewhere: those names."""
        return decided

    def _called(self, words: Sequence[str], seen: Sequence[str | None], chances: Tensor) -> list[str | None]:
        """What a thing that was put in is called while it is there: its name if it is often seen, else its kind.

        `chances` (F, names) are those of the names at each frame.
        """
        word = words[0]
        kind = self.kinds.get(word)
        if kind is None:
            return list(seen)
        of_kind = self._of_kind(kind)
        likely = (chances[:, of_kind].sum(1) >= SURE_OF_KIND).tolist()
        called = word if sum(name == word for name in seen) > len(seen) / 3 else kind
        return [name or (called if alike else None) for name, alike in zip(seen, likely, strict=True)]

    def quiet(self, seed: int, length: int) -> Tensor:
        """Frame tokens (length, N, 1280) fp16 of scenes without anything that has a name, each for a minute or more."""
        random = np.random.default_rng(seed)
        nameless = [number for number, names in enumerate(self.material.clip_names) if not names]
        parts, made = [], 0
        while made < length:
            clip = self.material.clips[nameless[int(random.integers(len(nameless)))]].float()
            count = min(length - made, int(random.integers(120, 600)))
            there_and_back = torch.cat([clip, clip.flip(0)[1:-1]])
            noise = torch.from_numpy(random.standard_normal((count, 1, clip.shape[-1]))).float()
            fields = there_and_back[torch.arange(count) % len(there_and_back)]
            fields = fields + float(random.choice((0, 0.03, 0.08))) * noise @ self.material.natural.T
            parts.append(self.classifier.tokens(fields, self.pooled).half())
            made += count
        return torch.cat(parts)

    def _background(self, random: np.random.Generator, length: int) -> tuple[Tensor, list[set[str]]]:
        """Fields (length, 49, 320) of clips one after another, each there and back, and their right names."""
        fields, names = [], list[set[str]]()
        while len(names) < length:
            number = int(random.integers(len(self.material.clips)))
            clip = self.material.clips[number].float()
            there_and_back = torch.cat([clip, clip.flip(0)[1:-1]])
            count = min(length - len(names), int(random.integers(6, 60)))
            at = (int(random.integers(len(clip))) + torch.arange(count)) % len(there_and_back)
            fields.append(there_and_back[at])
            names += [set(self.material.clip_names[number])] * count
        return torch.cat(fields), names

    def _schedule(self, random: np.random.Generator, length: int, what: Happenings) -> list[tuple[int, int, bool]]:
        """When things are there, [start, stop), and whether they come with a cut."""
        stays, at = [], int(random.integers(0, 10))
        while at < length - 2:
            stop = min(length, at + int(random.integers(*what.stay)))
            stays.append((at, stop, random.random() < 0.5))
            at = stop + (0 if random.random() < 0.3 else int(random.integers(*what.gap)))
        return stays

    def _with_thing(
        self,
        fields: Tensor,
        name: int,
        cut: bool,
        random: np.random.Generator,
        torch_random: torch.Generator,
        relative: Tensor | None = None,
    ) -> Tensor:
        """The fields with a thing of that name, as strong as it must be to be recognised, or half a `relative`."""
        count = len(fields)
        owned = self.by_name[name]
        thing = self.material.things[owned[int(random.integers(len(owned)))]].float()
        if relative is not None:
            thing = (thing + relative) * BLEND
        strength, amount = self._there(count, cut, random, torch_random)
        placed = strength[:, None, None] * amount * thing
        for gain in GAINS if relative is None else BLENDED:
            changed = fields + gain * placed
            sure, place = self.classifier.named(self.classifier.features(changed).mean(1))
            if float(sure[place == name].sum()) >= RECOGNISED * count:
                break
        return changed

    @staticmethod
    def _there(
        count: int, cut: bool, random: np.random.Generator, torch_random: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """How strongly a thing is there at each frame (count), and where in the grid (count, 49, 1)."""
        centre = torch.from_numpy(
            3
            + 1.2 * random.standard_normal((1, 2))
            + np.linspace(0, 1, count)[:, None] * (random.standard_normal((1, 2)) * random.choice((0, 0.8)))
        ).float()
        radius = torch.from_numpy(np.repeat(random.uniform(1.4, 4, (1, 2)), count, axis=0)).float()
        amount = (0.5 + torch.rand(1, CELLS, 1, generator=torch_random)) * ellipses(centre, radius)
        strength = torch.ones(count)
        ramp = 1 if cut else int(random.integers(1, 4))
        strength[: min(ramp, count)] = torch.arange(1.0, ramp + 1)[:count] / ramp
        if count > 6 and random.random() < 0.15:
            strength[int(random.integers(4, count - 1))] = 0
        wobble = 1 + 0.08 * torch.randn(count, generator=torch_random)
        return strength * wobble, amount

    def _noisy(self, fields: Tensor, random: np.random.Generator, torch_random: torch.Generator) -> Tensor:
        """Fields (F, 49, C) with noise of each frame's own, alike in all its cells; often none."""
        natural = self.material.natural
        noise = torch.randn(len(fields), 1, len(natural), generator=torch_random) @ natural.T
        return fields + float(random.choice((0, 0.03, 0.08))) * noise

    def _flash(self, fields: Tensor, at: int, random: np.random.Generator, torch_random: torch.Generator) -> None:
        """Sometimes a single picture of something else, soon after `at`."""
        at += int(random.integers(1, 4))
        if at < len(fields) and random.random() < 0.12:
            other = int(random.integers(len(self.classifier.names)))
            fields[at : at + 1] = self._with_thing(fields[at : at + 1], other, True, random, torch_random)


def _agreed(seen: str | None, allowed: set[str]) -> str | None:
    """What counts as in view: what the classifier sees, where that is right, else a title card's text."""
    if seen in allowed:
        return seen
    return TEXT if TEXT in allowed else None
