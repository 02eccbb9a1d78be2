"""What the video of an annotation row has: looked up in the file, once a process; a remote one is fetched for it."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

from actors.remote import RemoteError
from actors.video import VideoError, VideoInfo, probe
from jobs.annotations import VideoAnnotation
from jobs.clock import Extent
from jobs.dataset_files import FEATURES_SUFFIX
from jobs.remote_files import local_copy


def extent_of(annotation: VideoAnnotation, fps: float) -> Extent:
    """What the row's video has, if it is about one. Raises VideoError for one that is missing or damaged."""
    return _extent(annotation.video, fps) if annotation.video else Extent(0, fps, 0)


@lru_cache(maxsize=4096)
def _extent(path: str, fps: float) -> Extent:
    if Path(path).suffix == FEATURES_SUFFIX:
        from jobs.features import features_extent  # torch, which only this needs

        return features_extent(Path(path), fps)
    try:
        with local_copy(path) as file:
            info = probe(file)
    except RemoteError as error:
        raise VideoError(str(error)) from None
    return Extent(frames_in(info, fps), fps, info.duration)


def frames_in(info: VideoInfo, fps: float) -> int:
    """How many frames the grid 0, 1/fps, ... has up to the video's last picture, at least.

    At the very end times may be off by rounding: then a frame less, never one more.
    """
    return max(1, math.floor((info.last - 1e-3) * fps) + 1)
