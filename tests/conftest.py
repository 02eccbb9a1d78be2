"""What all tests share: an environment without network or usage reports, and the sample videos.

The environment is set before any test module imports ray, torch or transformers.
"""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # single node: bind and advertise 127.0.0.1 only
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
}

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of the sample videos with their narrations."""
    return SAMPLES


@pytest.fixture(scope="session")
def sample_video(samples: Path) -> Path:
    """The sample with shot changes: the Big Buck Bunny trailer."""
    return samples / "big_buck_bunny_trailer.mp4"
