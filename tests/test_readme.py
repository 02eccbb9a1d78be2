"""The README names every module, and only what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("package", ["actors", "jobs", "serve"])
def test_readme_names_every_module(package: str) -> None:
    table = README.split(f"| {package}/ | |\n")[1].split("\n\n")[0]
    named = re.findall(r"`(\w+\.py)`", "".join(line.split("|")[1] for line in table.splitlines()))
    modules = [path.name for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"]
    assert sorted(named) == sorted(modules)


def test_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
