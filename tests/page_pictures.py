"""Pictures of the page for docs/page.md: `python tests/page_pictures.py URL VIDEO`, with a server at URL.

The file is watched as a person would, with a question in its midst; then the page is taken as a desktop and a
phone show it, and in the dark.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from browser import Tab, chromium

ASKED_AT_S = 12
SHOWN_AT_S = 18
QUESTION = "What do you see?"
FOLDER = Path(__file__).parents[1] / "docs"


def watch(tab: Tab, video: Path) -> None:
    """Play a file beyond the moment that is shown, and ask something on the way."""
    tab.click("input[value=file]")
    tab.choose_file("#file", video)
    tab.click("#start")
    tab.until(f"document.getElementById('player').currentTime > {ASKED_AT_S}", deadline_s=600)
    tab.click("#question")
    tab.type(QUESTION)
    tab.key("Enter", "\r")
    tab.until(f"document.getElementById('player').currentTime > {SHOWN_AT_S}", deadline_s=600)
    tab.run("document.getElementById('player').pause()")


def main(url: str, video: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile) / "browser") as tab:
        tab.size(1280, 860)
        tab.open(url)
        tab.picture(folder / "page_start.png")
        watch(tab, Path(video))
        tab.run("scrollTo(0, 0)")
        tab.picture(folder / "page.png")
        tab.prefer(prefers_color_scheme="dark")
        tab.picture(folder / "page_dark.png")
        tab.size(360, 740, phone=True)
        tab.picture(folder / "page_phone_dark.png")
        tab.prefer(prefers_color_scheme="light")
        tab.picture(folder / "page_phone.png")
        tab.run("scrollTo(0, 720)")
        tab.picture(folder / "page_phone_below.png")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else FOLDER)
