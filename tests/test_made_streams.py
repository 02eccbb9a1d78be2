"""Streams made up by running the encoder's classifier backwards, and the connector that says what it sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from actors.causal_lm import load_tokenizer
from actors.config import ConfigError, FrameConfig, ModelConfig, load_config
from actors.efficientnet import WIDTH, load_embedded
from actors.embedded import embedded_llm
from actors.encoder import FrameEncoder
from actors.turns import Assistant
from jobs.backgrounds import SIDE, TEXT, title_card
from jobs.class_fields import CELLS, Aim, Classifier, Injector, Place, fitted, patches
from jobs.connector_start import start_connector, units
from jobs.dialogue_files import read_dialogues
from jobs.fitted_streams import FittedMaker
from jobs.frame_store import StoreInfo
from jobs.made_streams import Happenings, Material, StreamMaker
from jobs.make_streams import StreamSet, _make_set, make
from jobs.object_names import ELUSIVE

POOLED = (2, 2)
SETTINGS = Path(__file__).parents[1] / "configs" / "default_model.yaml"


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(load_embedded())


@pytest.fixture(scope="module")
def clips(classifier: Classifier) -> torch.Tensor:
    """Views of a cup from all around (6, 16, 49, 320), too near to be recognised."""
    random = np.random.default_rng(0)
    cup = Image.open(Path(__file__).parent / "samples" / "coffee.jpg").convert("RGB").resize((320, 320))
    corners = random.integers(0, 220, (96, 2)).tolist()
    views = [cup.resize((SIDE, SIDE), box=(left, top, left + 100, top + 100)) for left, top in corners]
    return classifier.trunk(torch.from_numpy(np.stack([np.array(view) for view in views]))).unflatten(0, (6, 16))


@pytest.fixture(scope="module")
def injector(classifier: Classifier, clips: torch.Tensor) -> Injector:
    return Injector(classifier, clips.flatten(0, 1))


def picture(samples: Path) -> np.ndarray:
    return np.array(Image.open(samples / "cat.jpg").convert("RGB").resize((SIDE, SIDE)))


def test_tokens_are_those_of_the_frame_encoder(classifier: Classifier, samples: Path) -> None:
    frames = np.stack([picture(samples), title_card(np.random.default_rng(1))])
    model = ModelConfig(
        llm="embedded",
        vision="embedded",
        dtype="float32",
        frames=FrameConfig(resolution_px=SIDE, cls=True, pooled=POOLED),
    )
    expected = FrameEncoder(model, threads=1)(frames).float()
    made = classifier.tokens(classifier.trunk(torch.from_numpy(frames)), POOLED)
    assert torch.allclose(made, expected, atol=0.02)


def test_a_cat_is_named(classifier: Classifier, samples: Path) -> None:
    field = classifier.trunk(torch.from_numpy(picture(samples)[None]))
    sure, place = classifier.named(classifier.features(field).mean(1))
    assert classifier.names[int(place[0])] == "cat"
    assert float(sure[0]) > 0.5


def test_what_is_put_in_is_what_the_classifier_sees(
    classifier: Classifier, injector: Injector, clips: torch.Tensor
) -> None:
    wanted = [classifier.names.index(name) for name in ("banana", "zebra", "school bus", "teapot")]
    classes = torch.tensor([classifier.classes[name][0] for name in wanted])
    generator = torch.Generator().manual_seed(0)
    things = injector.things(classes, generator)
    changed = clips[:4, 0] + 1.5 * things[:, None]
    likely = [
        classifier.logits(classifier.features(fields).mean(1)).log_softmax(-1).gather(1, classes[:, None])
        for fields in (clips[:4, 0], changed)
    ]
    assert bool((likely[1] - likely[0] > 2).all())


def test_patches_are_soft_masks(injector: Injector) -> None:
    masks = patches(50, torch.Generator().manual_seed(3))
    assert masks.shape == (50, CELLS, 1)
    assert float(masks.min()) >= 0
    assert float(masks.max()) <= 1


@pytest.fixture(scope="module")
def maker(classifier: Classifier, injector: Injector, clips: torch.Tensor) -> StreamMaker:
    names = torch.tensor([classifier.names.index(name) for name in ("banana", "zebra", "teapot")])
    classes = torch.tensor([classifier.classes[int(name)][0] for name in names])
    things = injector.things(classes, torch.Generator().manual_seed(1))
    shown = [(TEXT,), (), (), (), (), ()]
    made = StreamMaker(Material(clips.half(), shown, things, names, injector.spread), classifier, POOLED)
    made.by_name = [owned if len(owned) else torch.tensor([0]) for owned in made.by_name]  # three names stand for all
    return made


def test_the_same_seed_makes_the_same_stream(maker: StreamMaker) -> None:
    one, again, other = maker.make(5, 20), maker.make(5, 20), maker.make(6, 20)
    assert one.tokens.shape == (20, 5, WIDTH)
    assert one.tokens.dtype == torch.float16
    assert len(one.shown) == 20
    assert torch.equal(one.tokens, again.tokens)
    assert one.shown == again.shown
    assert not torch.equal(one.tokens, other.tokens)


def test_a_quiet_stream_shows_text_at_most(maker: StreamMaker) -> None:
    for seed in range(5):
        assert set(maker.make(seed, 20, Happenings(quiet=1.0)).shown) <= {None, TEXT}


def test_quiet_scenes_have_no_text(maker: StreamMaker) -> None:
    assert maker.quiet(1, 300).shape == (300, 5, WIDTH)


def test_streams_in_which_nothing_comes_may_be_longer(
    maker: StreamMaker, classifier: Classifier, tmp_path: Path
) -> None:
    info = StoreInfo(fingerprint="made", vision="embedded", fps=2, num_tokens=5, width=WIDTH)
    wanted = StreamSet(streams=12, frames=(8, 10), quiet=0.5, still=(20, 24))
    _make_set(maker, classifier, info, "calm", wanted, 0, 0, tmp_path)
    made = read_dialogues(tmp_path / "dialogues" / "train.jsonl")
    long = [one for one in made if one.frames[1] > 10]
    assert 2 < len(long) < 10
    assert {one.frames[1] for one in made} <= {8, 9, 10, *range(20, 25)}
    said = [turn.content for one in long for turn in one.conversation if isinstance(turn, Assistant) and turn.learn]
    assert all(TEXT in text.lower() for text in said if "comes into view" in text)


@pytest.fixture(scope="module")
def mixer(maker: StreamMaker, clips: torch.Tensor) -> StreamMaker:
    """With one drawn thing, a box, in front of one place."""
    drawn = clips[:1, :4].flip(0) + 3
    both = replace(maker.material, empty=clips[:1, :4].half(), drawn=drawn.half(), drawn_names=["box"])
    made = StreamMaker(both, maker.classifier, POOLED)
    made.by_name = maker.by_name
    return made


def test_drawn_things_are_shown_by_decree_and_alone(mixer: StreamMaker) -> None:
    made = [mixer.make(seed, 40, Happenings(quiet=0)) for seed in range(6)]
    assert any("box" in one.shown for one in made)
    assert all(None in one.shown for one in made)
    assert torch.equal(made[0].tokens, mixer.make(0, 40, Happenings(quiet=0)).tokens)
    assert mixer.material.drawn is not None
    thing = mixer.classifier.tokens(mixer.material.drawn[0].float(), POOLED)[:, 0].mean(0)
    boxes = torch.cat([one.tokens[[name == "box" for name in one.shown], 0] for one in made]).float()
    others = torch.cat([one.tokens[[name is None for name in one.shown], 0] for one in made]).float()
    assert (boxes - thing).norm(dim=1).max() < (others - thing).norm(dim=1).median()


def test_elusive_things_are_never_shown_where_places_look_like_them(mixer: StreamMaker) -> None:
    made = mixer.make(3, 60, Happenings(quiet=0, haunted=1))
    assert not ELUSIVE & set(made.shown)
    assert not torch.equal(made.tokens, mixer.make(3, 60, Happenings(quiet=0)).tokens)


def test_where_only_a_few_come_they_come_again_and_often_beside_one_of_their_kind(mixer: StreamMaker) -> None:
    random = np.random.default_rng(0)
    sets = [mixer._few(random, 4, 0.5) for _ in range(200)]
    assert {len(names) for names in sets} == {2, 3, 4}
    assert {name for names in sets for name in names} <= {*mixer.classifier.names, "box"}
    kinds = [(mixer.kinds.get(first), mixer.kinds.get(second)) for first, second, *_ in sets if first in mixer.kinds]
    assert sum(one == other for one, other in kinds) > len(kinds) / 2
    for seed in range(4):
        shown = mixer.make(seed, 80, Happenings(quiet=0, few=2)).shown
        assert len({name for name in shown if name} - {TEXT, *mixer.kinds.values()}) <= 2


def test_few_things_without_drawings_are_refused() -> None:
    config = load_config(
        SETTINGS, ['streams.sets={"patient": {"streams": 1, "frames": [8, 9], "few": 2, "waiting": 0.5}}']
    )
    with pytest.raises(ConfigError, match=r"streams\.drawings"):
        make(config)


def test_material_of_other_settings_is_refused(tmp_path: Path) -> None:
    there = tmp_path / "material" / "settings.json"
    there.parent.mkdir()
    there.write_text('{"clips": 220, "things": 1, "drawn": 700, "sceneries": 200, "fitted": false, "drawings": false}')
    with pytest.raises(ConfigError, match=r"material was made with streams\.things 1, now 10: set another streams"):
        make(load_config(SETTINGS, [f"streams.folder={tmp_path}"]))


def test_few_things_where_nobody_waits_are_refused() -> None:
    config = load_config(SETTINGS, ['streams.sets={"patient": {"streams": 1, "frames": [8, 9], "few": 2}}'])
    with pytest.raises(ConfigError, match=r"sets\.patient has `few`.*no `waiting`"):
        make(config)


def test_what_is_seldom_recognised_goes_by_its_kind(classifier: Classifier, mixer: StreamMaker) -> None:
    chances = torch.zeros(6, len(classifier.names) + 1)
    chances[:5, classifier.names.index("dog")] = 0.3
    chances[:5, classifier.names.index("wolf")] = 0.3
    assert mixer._called(["cat"], ["cat", *[None] * 5], chances) == ["cat", *["animal"] * 4, None]
    assert mixer._called(["cat"], [*["cat"] * 3, *[None] * 3], chances) == [*["cat"] * 5, None]
    assert mixer._called(["teapot"], [None] * 6, chances) == [None] * 6


def test_a_fitted_thing_is_seen_and_changes_the_features_less_than_its_price_allows(
    classifier: Classifier, injector: Injector, clips: torch.Tensor
) -> None:
    wanted = [classifier.names.index(name) for name in ("banana", "zebra", "school bus", "teapot")]
    aim = torch.stack([torch.eq(classifier.places, place) for place in wanted])[:, None]
    fields, amount = clips[:4, :2], torch.ones(4, 2, CELLS, 1)

    def reached(modesty: float) -> tuple[torch.Tensor, torch.Tensor]:
        target = Aim(aim, torch.full((4,), 0.6), torch.full((4,), modesty))
        things = fitted(classifier, injector.spread, Place(fields, amount), torch.zeros(4, 320), target, steps=40)
        pooled = classifier.features(fields + things[:, None, None]).mean(2)
        chances = classifier.chances(pooled).mean(1)[torch.arange(4), wanted]
        return chances, (pooled - classifier.features(fields).mean(2)).norm(dim=2).mean()

    (sure, near), (unsure, nearer) = reached(1e-3), reached(0.1)
    assert bool((sure > 0.3).all())
    assert float(nearer) < float(near)
    assert float(unsure.mean()) < float(sure.mean())


@pytest.fixture(scope="module")
def fitter(mixer: StreamMaker) -> FittedMaker:
    made = FittedMaker(mixer.material, mixer.classifier, POOLED)
    made.by_name = mixer.by_name
    return made


def test_fitted_things_are_seen_and_called_what_they_are(fitter: FittedMaker) -> None:
    what = Happenings(quiet=0)
    made = [fitter.make(seed, 40, what) for seed in range(4)]
    assert torch.equal(made[1].tokens, fitter.make(1, 40, what).tokens)
    kinds = set(fitter.kinds.values())
    named = 0
    for one in made:
        chances = fitter.classifier.chances(one.tokens[:, 0].float())
        for frame, name in enumerate(one.shown):
            if name in fitter.places and name not in kinds and name != "box":
                named += 1
                assert float(chances[frame, fitter.places[name]]) > 0.1
    assert named > 10


def test_places_that_only_remind_of_something_are_nameless(fitter: FittedMaker) -> None:
    made = [fitter.make(seed, 30, Happenings(quiet=1, haunted=1)) for seed in range(6)]
    assert {name for one in made for name in one.shown} <= {None, TEXT}
    for seed, one in enumerate(made):
        assert not torch.equal(one.tokens, fitter.make(seed, 30, Happenings(quiet=1)).tokens)


def test_what_may_be_either_of_two_goes_by_its_kind(classifier: Classifier, fitter: FittedMaker) -> None:
    chances = torch.zeros(6, len(classifier.names))
    chances[:5, classifier.names.index("cat")] = 0.35
    chances[:5, classifier.names.index("lion")] = 0.3
    assert fitter._called(["cat", "lion"], ["cat"] * 6, chances) == [*["animal"] * 5, None]
    assert fitter._called(["cat"], [*["cat"] * 3, *[None] * 3], chances) == [*["cat"] * 5, None]
    chances[:5, classifier.names.index("cat")] = 0.6
    assert fitter._called(["cat", "lion"], [*["cat"] * 5, None], chances) == [*["cat"] * 5, None]


def test_what_may_be_one_of_many_goes_by_its_kind_unless_one_stands_out(
    classifier: Classifier, fitter: FittedMaker
) -> None:
    chances = torch.zeros(6, len(classifier.names))
    words = ["cat", "lion", "tiger", "wolf"]
    for word in words:
        chances[:5, classifier.names.index(word)] = 0.15
    assert fitter._called(words, [None] * 6, chances) == [*["animal"] * 5, None]
    chances[:5, classifier.names.index("wolf")] = 0.5
    assert fitter._called(words, [*["wolf"] * 5, None], chances) == [*["wolf"] * 5, None]


def test_what_resembles_many_is_seen_as_its_kind_and_as_no_one_of_them(fitter: FittedMaker) -> None:
    what = Happenings(blended=1, blends=(6, 12))
    fields = fitter.material.clips[0, :8].float()
    chances, hedged = list[torch.Tensor](), 0
    for seed in range(6):
        random, numbers = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        changed, words = fitter._come(fields, fitter.places["cat"], what, True, random, numbers)
        assert {fitter.kinds[word] for word in words} == {"animal"}
        chances.append(fitter.classifier.chances(fitter.classifier.features(changed).mean(1))[:, :-1])
        hedged += fitter._called(words, [None] * 8, chances[-1]).count("animal")
    assert hedged > 4
    assert float(torch.stack(chances).max(-1).values.median()) < 0.45


def test_drawn_things_go_by_their_kind_unless_they_are_recognised(classifier: Classifier, fitter: FittedMaker) -> None:
    chances = torch.zeros(8, len(classifier.names))
    chances[2:4, classifier.names.index("cat")] = 0.5
    decided = ["cat", "cat", None, None, "deer", "deer", "key", "key"]
    assert fitter._drawn_called(decided, chances) == ["animal", "animal", None, None, "animal", "animal", "key", "key"]
    assert fitter._drawn_called([None, None, "cat", "cat", *[None] * 4], chances)[2:4] == ["cat", "cat"]


def test_fitted_things_without_drawings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"fitted.*streams\.drawings"):
        make(load_config(SETTINGS, ["streams.fitted=true"]))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return load_tokenizer(embedded_llm())


def test_units_cover_every_name(classifier: Classifier) -> None:
    weight, bias, owner = units(classifier, 576)
    assert weight.shape == (576, WIDTH)
    assert bias.shape == (576,)
    assert set(owner.tolist()) == set(range(len(classifier.names)))
    assert int((owner == classifier.names.index("dog")).sum()) > 1  # 120 breeds
    with pytest.raises(ValueError, match="hidden units"):
        units(classifier, 100)


def test_the_first_connector_puts_a_cat_near_the_word(
    classifier: Classifier, tokenizer: PreTrainedTokenizerFast, samples: Path
) -> None:
    embeddings = torch.randn(49_152, 576, generator=torch.Generator().manual_seed(0))
    connector = nn.Sequential(nn.Linear(WIDTH, 576), nn.GELU(), nn.Linear(576, 576))
    start_connector(connector, classifier, tokenizer, embeddings)
    token = classifier.features(classifier.trunk(torch.from_numpy(picture(samples)[None]))).mean(1)
    out = (connector(token) - connector[2].bias)[0].detach()
    words = {
        name: embeddings[tokenizer(f" {name}", add_special_tokens=False).input_ids].mean(0)
        for name in ("cat", "dog", "car")
    }
    middle = torch.stack(list(words.values())).mean(0)
    near = {name: float(F.cosine_similarity(out, word - middle, dim=0)) for name, word in words.items()}
    assert max(near, key=near.__getitem__) == "cat"
    assert near["cat"] > 0.5
