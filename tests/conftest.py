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
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # `ray start --block` would wait 30 s for nobody
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # every checkpoint waits for the next look at its worker: 2 s else
}

import secrets
import signal
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import redis
import torch

from actors import checkpoint
from actors.bus import Bus, BusConfig
from actors.config import FrameConfig, ModelConfig
from actors.redis_server import RedisServer

torch.set_num_threads(1)
# A shell that starts tests in the background has SIGINT ignored, and every program they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("any_machine", deadline=None)  # speed is no fact that a test states
hypothesis.settings.load_profile("any_machine")

SAMPLES = Path(__file__).parent / "samples"
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of the sample videos with their narrations."""
    return SAMPLES


@pytest.fixture(scope="session")
def sample_video(samples: Path) -> Path:
    """The sample with shot changes: the Big Buck Bunny trailer."""
    return samples / "big_buck_bunny_trailer.mp4"


def unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """All of the archive's files, with the safe filter where this Python has one: 3.11.2 of Debian 12 does not."""
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
    else:
        archive.extractall(folder)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The public reference's tiny models: folders llm_VERSION, adapter_VERSION (live1, live1plus) and siglip."""
    folder = tmp_path_factory.mktemp("tiny_models")
    with tarfile.open(GOLDEN / "tiny" / "models.tar.xz") as archive:
        unpack(archive, folder)
    return folder


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Invented annotations and features in the layout of COIN and Ego4D, which golden samples were built from."""
    folder = tmp_path_factory.mktemp("datasets")
    with tarfile.open(GOLDEN / "data" / "datasets.tar.xz") as archive:
        unpack(archive, folder)
    return folder / "datasets"


@pytest.fixture(scope="session")
def ego4d(datasets: Path) -> Path:
    """The annotations of the invented Ego4D."""
    return datasets / "ego4d" / "v2" / "annotations"


@pytest.fixture(scope="session")
def tiny_configs(tiny_models: Path) -> dict[str, ModelConfig]:
    """Settings of the tiny models `live1` and `live1plus`, with the reference's adapter as checkpoint."""
    frames = {
        "live1": FrameConfig(resolution_px=32),
        "live1plus": FrameConfig(resolution_px=32, pooled=(3, 3), separator=","),
    }
    return {
        version: ModelConfig(
            llm=str(tiny_models / f"llm_{version}"),
            vision=str(tiny_models / "siglip"),
            frames=frames[version],
            dtype="float32",
            checkpoint=str(tiny_models / f"adapter_{version}"),
        )
        for version in frames
    }


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_configs: dict[str, ModelConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours made of the tiny live1plus model: any process can `checkpoint.load` it."""
    folder = tmp_path_factory.mktemp("tiny_checkpoint") / "live1plus"
    checkpoint.save(folder, checkpoint.load(tiny_configs["live1plus"], merged=False), ["tiny_world"])
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_configs: dict[str, ModelConfig], tiny_checkpoint: Path) -> dict[str, object]:
    """The `model` section of a settings file for a checkpoint that is quick."""
    return {**tiny_configs["live1plus"].model_dump(mode="json"), "checkpoint": str(tiny_checkpoint)}


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """Address of one real server for all tests; each test takes a `prefix` of its own."""
    with RedisServer() as url:
        yield url


@pytest.fixture
async def connect(redis_url: str) -> AsyncIterator[Callable[..., Awaitable[Bus]]]:
    """`await connect(lease_ms=100, ...)`: another process's bus on this test's own session log."""
    prefix, made = f"test-{secrets.token_hex(4)}:", list[Bus]()

    async def one_more(url: str = redis_url, **settings: object) -> Bus:
        made.append(await Bus.connect(BusConfig.model_validate({"prefix": prefix, "partitions": 4} | settings), url))
        return made[-1]

    yield one_more
    for bus in made:
        await bus.close()


@pytest.fixture
async def bus(connect: Callable[..., Awaitable[Bus]]) -> Bus:
    """A bus of default settings."""
    return await connect()


@pytest.fixture
def lose_replies() -> Callable[[Bus], None]:
    """`lose_replies(bus)`: the first try of every script reaches Redis, but its reply does not come back."""

    def break_scripts(bus: Bus) -> None:
        for name, script in bus._scripts.items():
            tried: set[tuple[object, ...]] = set()

            async def lossy(keys, args, run=script, tried=tried):
                result = await run(keys=keys, args=args)
                if (call := (*keys, *args)) not in tried:
                    tried.add(call)
                    raise redis.exceptions.TimeoutError("no reply")
                return result

            bus._scripts[name] = lossy

    return break_scripts


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests, marked `anyio`, run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray of two logical CPUs for all tests that need one; `jobs` in this process use it."""
    import ray

    from jobs.cluster import connect

    connect(num_cpus=2)
    yield
    ray.shutdown()
