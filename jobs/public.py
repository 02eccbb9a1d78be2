"""Public datasets by name: which reader, which files, which videos, and how much of it in the mixture.

annotations:
  datasets:
    narration: {format: ego4d_narration, path: ego4d/v2/annotations, videos: ego4d/v2/full_scale}
    chat: {format: chat, path: ego4d/v2/annotations, videos: ego4d/v2/full_scale, weight: 2}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from jobs.annotations import AnnotationError, DatasetConfig, VideoAnnotation
from jobs.captions import read_captions
from jobs.chat import read_chats, read_generated_chats
from jobs.coin import KINDS, read_coin
from jobs.dataset_files import find_video
from jobs.ego4d import read_narration_streams, read_narrations, read_refined_narrations
from jobs.goalstep import read_goalstep
from jobs.lta import read_lta, read_lta_test
from jobs.nlq import read_nlq
from jobs.robustness import read_robustness

Reader = Callable[[Path], Iterator[VideoAnnotation]]

READERS: Mapping[str, Reader] = {
    "ego4d_narration": read_narrations,
    "ego4d_narration_stream": read_narration_streams,
    "ego4d_refined_narration": read_refined_narrations,
    "chat": read_chats,
    "generated_chat": read_generated_chats,
    "goalstep": read_goalstep,
    "nlq": read_nlq,
    "lta": read_lta,
    "lta_test": read_lta_test,
    **{kind: partial(read_coin, kind) for kind in KINDS},
    "captions": read_captions,
    "robustness": read_robustness,
}


def read_dataset(name: str, dataset: DatasetConfig) -> Iterator[VideoAnnotation]:
    """The rows of a dataset, each with the path of its video, whether that is there or not.

    Raises AnnotationError for a missing or damaged file.
    """
    where = f"annotations.datasets.{name}"
    videos = Path(dataset.videos)
    if not videos.is_dir() and dataset.format != "robustness":
        raise AnnotationError(
            f"{where}.videos: {videos} is no folder: put the dataset's videos there, named by id, or the features "
            "(.pt) that the public reference makes of them"
        )
    try:
        for row in READERS[dataset.format](Path(dataset.path)):
            if not row.video and row.kind != "robustness":
                found = find_video(videos, row.video_id) or videos / f"{row.video_id}.mp4"
                row = row.model_copy(update={"video": str(found)})
            yield row.model_copy(update={"dataset": name})
    except AnnotationError as error:
        raise AnnotationError(f"{where}: {error}") from None
    except ValidationError as error:
        raise AnnotationError(f"{where}: a row cannot be used: {error.errors()[0]['msg']}") from None
