"""What a client chose for its session: patched, shown back, and kept in Redis for the next gateway."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from actors.config import Fit
from actors.messages import SessionSettings, TolerantSettings
from serve.client_events import ClientError, DropPolicy, SessionPatch
from serve.server_events import SessionInfo, VideoInfo, WindowInfo

SAMPLING = {"temperature", "top_p", "repetition_penalty", "seed"}  # named alike by clients and by the engine


class Preferences(BaseModel):
    """What is chosen at the moment, by any gateway's account. `opened` is Unix time.

    `in_force` are the settings that the model took last: those chosen since, in `changes`, it may yet refuse. Both are
    as of log position `answered`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    settings: TolerantSettings
    in_force: TolerantSettings | None = None
    changes: int | None = None
    answered: int = -1
    include: list[str]
    drop_policy: DropPolicy
    opened: float


def patched(settings: SessionSettings, patch: SessionPatch) -> SessionSettings:
    """`settings` with what `patch` gives. Raises ClientError when they do not fit together."""
    video = patch.video
    window = video.window if video else None
    changes = {
        "instructions": patch.instructions,
        "max_response_tokens": patch.most_tokens,
        **patch.model_dump(include=SAMPLING),
        "threshold": video.threshold if video else None,
        "fps": video.fps if video else None,
        "window_trigger": window.trigger if window else None,
        "window_keep": window.keep if window else None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return SessionSettings.model_validate({**settings.model_dump(), **given})
    except ValidationError as error:
        raise ClientError("bad_value", error.errors()[0]["msg"], "session") from None


def shown(
    session_id: str, model: str, fit: Fit, settings: SessionSettings, include: frozenset[str], drop_policy: DropPolicy
) -> SessionInfo:
    """Settings as clients see them."""
    window = WindowInfo(trigger=settings.window_trigger, keep=settings.window_keep)
    return SessionInfo(
        id=session_id,
        model=model,
        instructions=settings.instructions,
        max_output_tokens=settings.max_response_tokens,
        **settings.model_dump(include=SAMPLING),
        include=sorted(include),
        video=VideoInfo(
            fps=settings.fps,
            threshold=settings.threshold,
            drop_policy=drop_policy,
            fit=fit,
            window=window if window != WindowInfo() else None,
        ),
    )
