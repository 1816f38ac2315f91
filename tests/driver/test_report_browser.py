"""report.html in headless Chromium: it folds, searches, compares, zooms, leaves the console empty, reads well at 1280 and at 400 pixels.

Skipped where Chromium or selenium is absent; `.ci/run` installs Chromium where it may.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dsc
from dsc.driver.report import page
from dsc.driver.report.programs import unpack
from dsc.schedule.generate import generate
from dsc.schedule.simulate import parse_durations, simulate
from dsc.schedule.timeline import trace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium with chromedriver on this machine")

SECTIONS = ("warnings", "made", "model", "programs", "quantization", "numerics", "memory", "communication", "schedule", "kernels", "files")
WIDE, NARROW = 1280, 400
LIGHT, DARK = "light", "dark"


class Browser:
    """A page in a browser. Whatever it writes to its console is a failure, and so is any address that it asks for."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, file: Path, width: int = WIDE, scheme: str = LIGHT) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == NARROW}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}  # no scrolling goes on while the test clicks
        features = [{"name": name, "value": value} for name, value in media.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(f"file://{file.resolve()}")
        self.quiet()

    def quiet(self) -> None:
        assert self.driver.get_log("browser") == []
        assert self.run("return performance.getEntriesByType('resource').map(one => one.name)") == []

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def press(self, keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(keys)

    def until(self, condition: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 20, 0.05).until(lambda _: self.run(f"return {condition}"), f"never: {condition}")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def full(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section: a quantised program on a mesh with numerics, kernels and a schedule."""
    folder = tmp_path_factory.mktemp("page")
    out = dsc.compile("deepseek-v3-tiny", out=folder / "out", seq=16, recipe="deepseek-v3", mesh="dp=2,ep=2").path
    timeline = simulate(generate("dualpipe", 8, 20), parse_durations("F=1,I=1,W=1,comm=0.1"))
    (out / "plan" / "timeline.json").write_text(json.dumps(trace(timeline)))
    (out / "plan" / "schedule.txt").write_text(str(timeline.schedule))
    kernels = out / "kernels" / "sm_90"
    kernels.mkdir(parents=True)
    facts = {"ops": ["matmul"], "num_warps": 8, "registers": 255, "shared": 49152, "spill_bytes": 64, "matrix": {"HGMMA": 4}}
    (kernels / "matmul.json").write_text(json.dumps(facts))
    other = dsc.compile("deepseek-v3-tiny", out=folder / "other", seq=16, recipe="deepseek-v3").path
    found = dsc.diff(dsc.load(tiny), dsc.load(other)).to_dict()
    file = folder / "report.html"
    file.write_text(page(dsc.load(out), found))
    return file


def test_every_section_renders(browser: Browser, full: Path) -> None:
    browser.open(full)
    names = [section.get_attribute("id") for section in browser.all("main > section")]
    assert names == list(SECTIONS)
    for section in browser.all("main > section"):
        assert section.size["height"] > 60, section.get_attribute("id")
    links = [link.get_attribute("href").rpartition("#")[2] for link in browser.all("nav a")]
    assert links == names
    assert browser.one("#warnings li .flag").text == "warning"


def test_the_model_folds(browser: Browser, full: Path) -> None:
    browser.open(full)
    shown = "return [...document.querySelectorAll('.tree .row')].filter(row => row.checkVisibility()).length"
    before = browser.run(shown)
    browser.one("[data-fold=open]").click()
    whole = browser.run(shown)
    assert whole == len(browser.all(".tree .row")) > before
    browser.one("[data-fold=close]").click()
    closed = browser.run(shown)
    assert closed < before
    summary = browser.one(".tree details details > summary")
    browser.run("arguments[0].focus()", summary)
    browser.press(" ")  # by keyboard
    assert browser.run(shown) > closed
    browser.quiet()


def test_a_program_shows_each_step(browser: Browser, full: Path) -> None:
    browser.open(full)
    packed = json.loads(browser.run("return document.getElementById('programs-data').textContent"))
    for step in (0, 2, len(packed["texts"]) - 1):
        browser.one(f"[data-step='{step}']").click()
        browser.run("for (const details of document.querySelectorAll('.func')) details.open = true")
        browser.until("[...document.querySelectorAll('.func')].every(details => details.rows)")
        browser.run("for (const more of document.querySelectorAll('#ir .more')) more.click()")
        lines = browser.run("return [...document.querySelectorAll('#ir .line > span')].map(line => line.textContent)")
        expected = [line for line in unpack(packed, step).splitlines() if line]
        assert (lines == expected) is True, step
    explained = browser.run("return [...document.querySelectorAll('#ir .to[title]')].map(op => [op.textContent, op.title])")
    assert dict(explained)["matmul"] == " ".join((dsc.ir.core.OPS["matmul"].__doc__ or "").split("\n\n")[0].split())
    browser.quiet()


def test_search_finds_every_line_and_walks_through_them(browser: Browser, full: Path) -> None:
    browser.open(full)
    packed = json.loads(browser.run("return document.getElementById('programs-data').textContent"))
    text = unpack(packed, len(packed["texts"]) - 1)
    expected = sum("scaled_matmul" in line.lower() for line in text.splitlines())
    browser.run("document.body.focus()")
    browser.press("/")
    assert browser.driver.switch_to.active_element.get_attribute("id") == "ir-query"
    browser.press("Scaled_Matmul")
    browser.until("document.getElementById('ir-found').textContent.startsWith('1 of ')")
    assert browser.one("#ir-found").text.startswith(f"1 of {expected} lines in ")
    assert "scaled_matmul" in browser.one("#ir .here").text
    first = browser.one("#ir .here").text
    browser.press("\ue007")  # enter
    assert browser.one("#ir-found").text.startswith(f"2 of {expected} ")
    assert browser.one("#ir .here").text != first
    browser.one("#ir-previous").click()
    assert browser.one("#ir .here").text == first
    assert len(browser.all("#ir .here")) == 1
    assert browser.run(
        "const box = document.querySelector('#ir .here').getBoundingClientRect(); return box.top >= 0 && box.bottom <= innerHeight"
    )
    browser.run("const q = document.getElementById('ir-query'); q.value = 'no such op'; q.dispatchEvent(new Event('input'))")
    browser.until("document.getElementById('ir-found').textContent.startsWith('nothing in ')")
    browser.quiet()


def test_side_by_side_has_both_programs_with_ids_opposite(browser: Browser, full: Path) -> None:
    browser.open(full)
    packed = json.loads(browser.run("return document.getElementById('programs-data').textContent"))
    step = next(i for i, one in enumerate(packed["steps"]) if one["name"] == "quantize-fp8")
    browser.one(f"[data-step='{step}']").click()
    browser.one("[data-view=diff]").click()
    rows = browser.run(
        "return [...document.querySelectorAll('.func')].map(details => [details.firstChild.firstChild.textContent,"
        " details.changes.map(row => [row.a, row.b])])"
    )
    assert rows
    for name, pairs in rows:  # each side read downwards is the function as it was and as it is
        for side, text in ((0, unpack(packed, step - 1)), (1, unpack(packed, step))):
            whole = text if name == "module" else text[text.index(f"func {name}(") :]
            function = whole.splitlines()[:1] if name == "module" else [*whole.split("\n}\n")[0].splitlines(), "}"]
            assert ([pair[side] for pair in pairs if pair[side] is not None] == function) is True, name
        for a, b in pairs:
            if a and b and " @ " in a:
                assert a.rpartition(" @ ")[2] == b.rpartition(" @ ")[2]
        products = [(a, b) for a, b in pairs if b and "= scaled_matmul(" in b]
        assert all(a and "matmul(" in a for a, _ in products)
    assert any("= scaled_matmul(" in (b or "") for _, pairs in rows for _, b in pairs)
    browser.run("document.querySelector('.func').open = true")
    browser.until("document.querySelector('.func').rows")
    assert browser.one(".func .pair .add b").text
    browser.quiet()


def test_a_moved_op_is_said_to_have_moved(browser: Browser, full: Path, tmp_path: Path) -> None:
    """The row of lines that keep their order is the longest one: one op moved is one op moved."""
    source = tmp_path / "a.dsc"
    ops = "".join(f"  %v{i}: f32[4] = silu(%x)  @ m#{i} F\n" for i in range(6))
    source.write_text(f"module {{ stage=traced }}\n\nfunc @main(%x: f32[4]) {{\n{ops}  return %v0, %v1, %v2, %v3, %v4, %v5\n}}\n")
    out = dsc.compile(source, out=tmp_path / "out", passes="simplify").path
    manifest = json.loads((out / "manifest.json").read_text())
    lines = source.read_text().splitlines()
    lines.insert(8, lines.pop(4))
    (out / manifest["passes"][1]["file"]).write_text("\n".join(lines) + "\n")
    file = tmp_path / "page.html"
    file.write_text(page(dsc.load(out)))
    browser.open(file)
    browser.one("[data-view=diff]").click()
    moved = browser.run("return document.querySelector('.func').changes.filter(row => row.moved).map(row => row.a || row.b)")
    assert moved == [lines[8]] * 2
    browser.quiet()


def test_the_timeline_zooms(browser: Browser, full: Path) -> None:
    browser.open(full)
    data = json.loads(browser.run("return document.getElementById('timeline-data').textContent"))
    span = "return document.querySelectorAll('#timeline .span').length"
    whole = browser.run(span)
    assert 0 < whole <= sum(len(row["spans"]) for row in data["rows"]) // 4
    label = "return document.querySelector('#timeline svg').getAttribute('aria-label')"
    before = browser.run(label)
    browser.one("[data-zoom=in]").click()
    assert browser.run(label) != before
    browser.run("document.getElementById('timeline').focus()")
    for key in "++":
        browser.press(key)
    closer = browser.run(span)
    assert 0 < closer < whole
    browser.press("\ue014")  # to the right
    browser.one("[data-zoom=all]").click()
    assert (browser.run(label), browser.run(span)) == (before, whole)
    browser.run("document.querySelector('#timeline .span').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    said = browser.one("#timeline-says").text
    assert data["names"][data["rows"][0]["spans"][2]] in said
    browser.quiet()


def test_memory_says_what_lives_under_the_pointer(browser: Browser, full: Path) -> None:
    browser.open(full)
    points = json.loads(browser.run("return document.getElementById('memory-points').textContent"))
    totals = [sum(column) for column in zip(*points["series"].values(), strict=True)]
    fullest = totals.index(max(totals))
    assert points["places"][fullest] in browser.one("#memory-says").text
    move = "const c = document.getElementById('memory-chart'), b = c.getBoundingClientRect();"
    browser.run(move + "c.dispatchEvent(new PointerEvent('pointermove', {clientX: b.right - 1, clientY: b.top + 9, bubbles: true}))")
    assert points["places"][-1] in browser.one("#memory-says").text
    browser.quiet()


OUTSIDE = """
const own = element => element.closest('.scroll, .box, .picture, #timeline, nav, .skip, .hidden');
return [...document.querySelectorAll('body *')].filter(element => {
  const box = element.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !own(element.parentElement);
}).map(element => element.outerHTML.slice(0, 120));
"""
CONTRAST = """
const numbers = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (; element; element = element.parentElement) {
    const colour = numbers(getComputedStyle(element).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const poor = [];
for (const element of document.querySelectorAll('body *')) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.checkVisibility() || element.closest('script, style, .hidden, .skip, :disabled')) continue;
  const style = getComputedStyle(element);
  const svg = element instanceof SVGElement;
  if (svg && element.classList.contains('words')) continue;
  const [a, b] = [light(numbers(svg ? style.fill : style.color)), light(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${element.outerHTML.slice(0, 100)}`);
}
return poor;
"""


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_it_can_be_read(browser: Browser, full: Path, width: int, scheme: str) -> None:
    """Nothing reaches beyond the screen but what scrolls inside itself, and all text has the contrast that WCAG 2 AA asks for (4.5)."""
    browser.open(full, width, scheme)
    browser.run("for (const details of document.querySelectorAll('details')) details.open = true")
    browser.one("[data-step='2']").click()
    browser.one("[data-view=diff]").click()
    browser.run("for (const details of document.querySelectorAll('.func')) details.open = true")
    browser.until("[...document.querySelectorAll('.func')].every(details => details.rows)")
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(OUTSIDE) == []
    assert browser.run(CONTRAST) == []
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgb()").split(","))) < 3 * 128) == (scheme == DARK)
    browser.quiet()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mode": "train", "recipe": "deepseek-v3", "mesh": "dp=128,ep=64"}], ids=["forward", "train"])
def test_the_671b_page(browser: Browser, tmp_path: Path, options: dict[str, Any]) -> None:
    """At most 5 MB, open in under 2 s."""
    file = dsc.compile("deepseek-v3", out=tmp_path / "out", **options).path / "report.html"
    assert file.stat().st_size <= 5_000_000
    browser.open(file)
    assert browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd") < 2000
