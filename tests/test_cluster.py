"""From annotations to subtitles by `ray job submit` on a cluster of two nodes (make cluster-test)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import two_nodes
import yaml
from training_data import untrained_config

from actors import checkpoint
from actors.config import ModelConfig

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400)]

WHERE = """
import time, ray
ray.init()

@ray.remote(num_cpus=1)
def where():
    time.sleep(1)
    return ray.util.get_node_ip_address()

print("nodes", sorted(set(ray.get([where.remote() for _ in range(2)]))))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[two_nodes.TwoNodes]:
    if problem := two_nodes.missing():
        pytest.fail(f"no cluster can be made here: {problem}")
    with two_nodes.TwoNodes(tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, samples: Path, tiny_configs: dict[str, ModelConfig]) -> Path:
    """The folder that all nodes see: videos with their narrations, models, and what the jobs make."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "videos").mkdir()
    for sample in samples.glob("hands_and_objects*"):
        shutil.copy(sample, folder / "videos")
    settings = {
        "model": untrained_config(tiny_configs["live1plus"]).model_dump(mode="json"),
        "annotations": {"paths": ["videos"]},
        "data": {"folder": "dialogues", "max_frames": 30, "longer": "split", "validation_fraction": 0},
        "store": {"folder": "tokens", "encoder_cpus": 0.5, "encoders": 2},
        "training": {"name": "two", "adapter": {"rank": 4, "alpha": 8}, "max_steps": 2, "batch_size": 2, "workers": 2},
        "evaluation": {"dialogues": "dialogues/train", "allow_seen": True, "max_dialogues": 2, "thresholds": []},
    }
    settings["training"] |= {"cpus_per_worker": 0.5, "folder": f"file://{folder}/runs"}
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_every_job_runs_on_two_nodes(cluster: two_nodes.TwoNodes, shared: Path) -> None:
    settings, root = str(shared / "settings.yaml"), ("--root", str(shared))

    def submit(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = cluster.submit("python", "-m", f"jobs.{job}", *arguments)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:] + cluster.logs()
        return done

    submit("build_dialogues", settings, *root)
    assert list((shared / "dialogues").rglob("*.*"))
    submit("encode_frames", settings, *root)
    submit("train", settings, *root)
    trained = shared / "runs" / "two" / "checkpoint"
    assert checkpoint.load(trained).trained_videos
    own = f"model.checkpoint=file://{trained}"  # by way of fsspec, as from an object store
    submit("evaluate", settings, own, *root)
    results = [json.loads(path.read_text()) for path in (shared / "runs" / "evaluation").glob("*.json")]
    assert results
    video = str(shared / "videos" / "hands_and_objects.mp4")
    submit("narrate", video, settings, own, "--output", str(shared / "said"))
    assert (shared / "said" / "hands_and_objects.srt").is_file()


def test_both_nodes_work(cluster: two_nodes.TwoNodes, shared: Path) -> None:
    (shared / "where.py").write_text(WHERE)
    done = cluster.submit("python", shared / "where.py")
    assert f"nodes ['{cluster.head}', '{cluster.worker}']" in done.stdout, done.stdout + done.stderr


def test_a_stranger_without_the_token_is_turned_away(cluster: two_nodes.TwoNodes) -> None:
    wrong = cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64}
    command = [two_nodes.BIN / "ray", "job", "list", "--address", cluster.dashboard]
    done = subprocess.run(command, env=wrong, capture_output=True, text=True)
    assert done.returncode != 0
