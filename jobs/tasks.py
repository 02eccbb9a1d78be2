"""What every kind of annotation row becomes: its dialogues, for one video at one rate.

A kind is a name in `VideoAnnotation.kind`. Narrations follow jobs/dialogues.py; the others give scenes,
which get an id, a system prompt, and if asked for, mistakes to learn from (jobs/augmentation.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from actors.turns import Assistant, Stream, System, Turn, User
from jobs import chat, coin, lta, nlq, robustness
from jobs.annotations import VideoAnnotation
from jobs.augmentation import augment
from jobs.clock import Extent
from jobs.dialogues import DataConfig, Dialogue, Narration, narrate
from jobs.livechat import unfit
from jobs.scenes import Scene, clip

NARRATIONS = ("narration", "ego4d_narration", "ego4d_refined_narration")
CHATS = ("chat", "generated_chat", "live_chat", "caption_chat")

Scenes = Callable[[VideoAnnotation, Extent, random.Random], Iterator[Scene]]


def _drawless(scenes: Callable[[VideoAnnotation, Extent], Iterator[Scene]]) -> Scenes:
    return lambda row, video, _rng: scenes(row, video)


SCENES: Mapping[str, Scenes] = {
    **dict.fromkeys(CHATS, chat.scenes),
    "goalstep": _drawless(lambda _row, _video: iter(())),  # of which no step is in the video: nothing was written
    "nlq": nlq.scenes,
    "lta": _drawless(lta.scenes),
    "robustness": _drawless(robustness.scenes),
    **{kind: _drawless(coin.scenes) for kind in coin.KINDS},
}


def dialogues_of(
    row: VideoAnnotation, video: Extent, config: DataConfig, system_prompt: str, split: str = "train", copy: int = 0
) -> Narration:
    """The dialogues of a row. `copy` numbers the times the row is used: each has other draws and ids.

    Only training leaves out what teaches nothing, and makes mistakes.
    """
    if row.kind in NARRATIONS:
        config = config.model_copy(update={"seed": config.seed + copy})
        made = narrate(row, video.num_frames, video.duration, config, system_prompt)
    else:
        made = _of_scenes(row, video, config, system_prompt, split, copy)
    if copy:
        made.dialogues = [d.model_copy(update={"dialogue_id": f"{d.dialogue_id}-copy{copy}"}) for d in made.dialogues]
    if split == "train":
        made.dialogues = [_mistaken(dialogue, config) for dialogue in made.dialogues]
    return made


def copies(row: VideoAnnotation, weight: float, seed: int) -> int:
    """How often a row is used: `weight` times on average, chosen by a hash so that no worker needs to count."""
    whole = math.floor(weight)
    drawn = random.Random(f"{seed} {row.dataset} {row.video_id} {row.part}").random()
    return whole + (drawn < weight - whole)


def _of_scenes(
    row: VideoAnnotation, video: Extent, config: DataConfig, system_prompt: str, split: str, copy: int
) -> Narration:
    made = Narration()
    if row.kind == "generated_chat" and (reason := unfit(row.moments)):
        made.dropped[f"chat {reason}"] += 1
        return made
    name = "-".join(filter(None, [row.video_id, row.kind, row.part]))
    rng = random.Random(f"{config.seed} {name} {copy}")
    for number, scene in enumerate(SCENES[row.kind](row, video, rng)):
        whole = len(scene.turns)
        scene = replace(scene, turns=clip(scene.turns, config.max_frames))
        if split == "train" and not learns(scene.turns):
            made.dropped["nothing to learn"] += 1
            continue
        if len(scene.turns) < whole:
            made.dropped["beyond max_frames"] += 1
        made.dialogues.append(
            Dialogue(
                dialogue_id=f"{name}-{number}",
                task=row.kind,
                video_id=row.video_id,
                video=row.video,
                fps=config.fps,
                frames=scene.frames,
                conversation=(System(content=system_prompt), *scene.turns),
                labels=scene.labels,
            )
        )
    if not made.dialogues and not made.dropped:
        form = " (one begins with the user, after 0 s)" if row.kind in CHATS else ""
        made.dropped[f"no dialogue of this {row.kind}{form} fits into the video"] += 1
    made.used = len(row.moments) if made.dialogues else 0
    if row.kind in CHATS and made.dialogues:
        turns = [turn for dialogue in made.dialogues for turn in dialogue.conversation]
        made.used = min(made.used, sum(isinstance(turn, Assistant | User) for turn in turns))
        if lost := len(row.moments) - made.used:
            made.dropped["no frame of their own in the dialogue"] += lost
    return made


def learns(turns: Sequence[Turn]) -> bool:
    """Whether anything is learned from a conversation."""
    return any(
        turn.learn if isinstance(turn, Assistant) else isinstance(turn, Stream) and turn.num_learned > 0
        for turn in turns
    )


def _mistaken(dialogue: Dialogue, config: DataConfig) -> Dialogue:
    rng = random.Random(f"{config.seed} {dialogue.dialogue_id} mistake")
    if rng.random() >= config.mistakes:
        return dialogue
    return dialogue.model_copy(update={"conversation": augment(dialogue.conversation, rng)})
