"""Make the pictures of docs/report.md again: parts of the report of the 671B model, compiled for a training step in FP8 on a mesh.

    python docs/pictures.py

It needs the extra `test`, and chromium with chromedriver on the PATH.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from base64 import b64decode
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

import dsc

DOCS = Path(__file__).resolve().parent
WIDTH = 1280
COLOURS = 128
"""Of a picture: text and flat areas need no more, and the file is a third."""


def main() -> None:
    """Compile, open, and write docs/report.png and docs/report-steps.png."""
    with tempfile.TemporaryDirectory() as scratch:
        options = {"mode": "train", "recipe": "deepseek-v3", "mesh": "dp=128,ep=64"}
        words = (word for name, value in options.items() for word in (f"--{name}", value))
        command = ("dsc", "compile", "deepseek-v3", "-o", "out", *words)
        page = dsc.compile("deepseek-v3", out=Path(scratch) / "out", command=command, **options).path / "report.html"
        browser = chromium(Path(scratch) / "profile")
        try:
            browser.get(page.as_uri())
            save(browser, "report.png", from_="header", to="#model")
            browser.execute_script(CHANGES)
            save(browser, "report-steps.png", from_="#programs", to="#programs")
        finally:
            browser.quit()


CHANGES = """
document.querySelectorAll('[data-step]')[4].click();
document.querySelector('[data-view=diff]').click();
const layer = [...document.querySelectorAll('.func')].find(func => func.textContent.startsWith('@decoder_layer_fwd'));
layer.open = true;
layer.ready();
for (const other of [...document.querySelectorAll('.func')]) if (other !== layer && other.textContent.startsWith('@m')) other.remove();
"""


def chromium(profile: Path) -> Any:
    """A browser without a window, as wide as the pictures."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    size = {"width": WIDTH, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]})
    return browser


def save(browser: Any, name: str, from_: str, to: str) -> None:
    """The page between the top of one element and the bottom of another."""
    place = "const box = document.querySelector(arguments[0]).getBoundingClientRect(); return [box.top + scrollY, box.bottom + scrollY]"
    top, bottom = browser.execute_script(place, from_)[0] - 12, browser.execute_script(place, to)[1] + 12
    clip = {"x": 0, "y": max(0, top), "width": WIDTH, "height": bottom - max(0, top), "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip})
    picture = Image.open(io.BytesIO(b64decode(shot["data"]))).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    picture.save(DOCS / name, optimize=True)
    print(f"{name}: {picture.width} x {picture.height}, {(DOCS / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
