"""What is sent to a remote cluster: a small copy of the code, the pinned packages, a launcher that Ray understands."""

from __future__ import annotations

import json
import logging
import tomllib
import zipfile
from pathlib import Path

import ray
import yaml
from jsonschema import validate
from ray._private.runtime_env.packaging import create_package
from ray.runtime_env import RuntimeEnv

REPOSITORY = Path(__file__).parents[1]
MOST_BYTES = 20_000_000  # the default model is 12 of them, its tokenizer 3


def test_what_a_submitted_job_sends_is_small_and_has_all_programs(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(
        str(REPOSITORY), package, include_gitignore=True, excludes=[".git", ".venv"], logger=logging.getLogger(__name__)
    )
    assert package.stat().st_size < MOST_BYTES
    names = set(zipfile.ZipFile(package).namelist())
    for folder in ("actors", "jobs", "serve", "configs"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".txt") and "__pycache__" not in path.parts:
                assert str(path.relative_to(REPOSITORY)) in names
    assert not any(name.startswith(("tests/", "docs/", "runs/")) for name in names)


def test_nodes_without_our_image_get_the_same_packages() -> None:
    wanted = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (REPOSITORY / "configs" / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line[0] not in "#-"] == wanted
    assert "-c ../constraints.txt" in lines


def test_ray_understands_the_runtime_environment_and_the_launcher() -> None:
    environment = yaml.safe_load((REPOSITORY / "configs" / "runtime_env.yaml").read_text())
    assert RuntimeEnv(**environment)["pip"]["packages"] == environment["pip"]["packages"]
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    validate(yaml.safe_load((REPOSITORY / "configs" / "launcher.yaml").read_text()), schema)
