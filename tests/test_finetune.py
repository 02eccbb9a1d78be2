"""A folder of videos and texts to a model to serve; and what a folder is told that holds something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.config import ConfigError, load_config
from jobs.finetune import check_videos, finetune


def test_a_folder_without_videos_or_texts_is_told_what_it_lacks(tmp_path: Path, samples: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such folder; give one that holds videos"):
        check_videos(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no video")
    with pytest.raises(ConfigError, match=r"holds no video \(.*\.mp4.*\): nothing to learn from"):
        check_videos(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds 1 videos and no text: put an .srt, .vtt or .jsonl .*a\.srt"):
        check_videos(tmp_path)
    (tmp_path / "a.srt").write_text("")
    check_videos(tmp_path)
    check_videos(samples)


def test_finetuning_ends_before_it_starts_where_the_folder_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path("configs/finetune.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="holds no video"):
        finetune(load_config(file, [f"annotations.paths=[{tmp_path}]"]))
    assert list(tmp_path.iterdir()) == []
