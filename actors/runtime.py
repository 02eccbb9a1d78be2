"""What a program decides about its own process before the real work: environment and threads.

Knows nothing of Ray beyond the names of its environment variables, so that `jobs` and `serve`,
which never meet, start Ray with the same settings.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

LOCAL_RAY: Mapping[str, str] = {
    # 0 = a node of one machine: bind and advertise 127.0.0.1 only, instead of every interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Token authentication is Ray's default since 2.60 and makes job submission fail without a token.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
}


def local_ray_environment() -> None:
    """Set what a Ray that lives and dies with this program needs; what the user has set stays.

    Call it before Ray is imported: Ray reads some of these variables only then.
    """
    for name, value in LOCAL_RAY.items():
        os.environ.setdefault(name, value)


def limit_threads(threads: int) -> None:
    """Let torch use `threads` threads in this process.

    Spinning OpenMP threads of two actors on the same cores slow each other down more than tenfold,
    so every actor says how many it wants; one is right unless it has cores of its own.
    """
    torch.set_num_threads(threads)


def native_dtype(wanted: torch.dtype, device: torch.device | str) -> torch.dtype:
    """`wanted`, or float32 on a CPU that can only imitate bfloat16, which makes it about six times slower."""
    native = torch.device(device).type != "cpu" or (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return wanted if native else torch.float32
