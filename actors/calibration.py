"""When a checkpoint should speak: the threshold that validation data chose, kept in its folder.

`calibration.json` is written after training, by the evaluation that tried the thresholds, and read with the
checkpoint: sessions whose settings name no threshold get this one. It belongs to one model: weights, frames
and system prompt are in the fingerprint.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from actors.cache import write_whole
from actors.config import Section
from actors.parts import CheckpointError

log = logging.getLogger(__name__)

CALIBRATION_FILE = "calibration.json"


class Calibration(Section):
    """What `calibration.json` holds: the threshold, how it was chosen, and on which data.

    `value` is the `metric` that it reached on dialogues with `data_digest`, where a response belonged to a
    label from `before_s` before to `after_s` after it.
    """

    format_version: Literal[1] = 1
    fingerprint: str
    threshold: float = Field(ge=0, allow_inf_nan=False)
    metric: str
    value: float = Field(allow_inf_nan=False)
    before_s: float
    after_s: float
    data: str
    data_digest: str
    num_dialogues: int
    fps: float


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Into a checkpoint's folder, whole or not at all. Raises CheckpointError where that cannot be written."""
    try:
        write_whole(folder / CALIBRATION_FILE, [calibration.model_dump_json(indent=2), "\n"])
    except OSError as error:
        raise CheckpointError(f"the threshold cannot be stored in {folder}: {error}") from None


def read_calibration(folder: Path, fingerprint: str) -> Calibration | None:
    """What is known of the model with that fingerprint; None without a file, or with one of another model.

    Raises CheckpointError for a damaged file.
    """
    path = folder / CALIBRATION_FILE
    try:
        calibration = Calibration.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "JSON"
        raise CheckpointError(
            f"{path} is damaged: {where}: {problem['msg']}; delete it, and run jobs.evaluate with "
            "evaluation.calibrate=true to have it again"
        ) from None
    if calibration.fingerprint != fingerprint:
        found = calibration.fingerprint
        log.warning("%s is of model %s, this one is %s: its threshold is not used", path, found, fingerprint)
        return None
    return calibration
