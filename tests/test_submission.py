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
MOST_BYTES = 2_000_000  # of all but the default model, which has 15.5 million more


def test_what_a_submitted_job_sends_is_small_and_has_all_programs(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    create_package(
        str(REPOSITORY), package, include_gitignore=True, excludes=[".git", ".venv"], logger=logging.getLogger(__name__)
    )
    sent = zipfile.ZipFile(package).infolist()
    assert sum(one.file_size for one in sent if not one.filename.startswith("configs/embedded_model/")) < MOST_BYTES
    assert package.stat().st_size < MOST_BYTES + 16_000_000
    names = {one.filename for one in sent}
    for folder in ("actors", "jobs", "serve", "configs"):
        for path in (REPOSITORY / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".txt") and "__pycache__" not in path.parts:
                assert str(path.relative_to(REPOSITORY)) in names
    assert not any(name.startswith(("tests/", "docs/", "runs/")) for name in names)


def test_every_program_is_said_how_to_submit_or_why_not() -> None:
    told = (REPOSITORY / "docs" / "clusters.md").read_text()
    programs = [
        path.stem for path in (REPOSITORY / "jobs").glob("*.py") if '__name__ == "__main__"' in path.read_text()
    ]
    assert len(programs) >= 15
    for program in programs:
        assert f"submit jobs.{program} " in told or f"`jobs.{program}`" in told, program


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
