"""The pages in headless Chromium at three widths, in light and dark, by axe's accessibility rules too.

Pictures of all pages are kept in `runs/screenshots`.
"""

from __future__ import annotations

import base64
import json
import math
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.report import StudyTable, compare_runs, study_page, write_report
from minitron_megatron.report.plots import DepthCurves, plot_study
from tests.report.test_compared import run_of

webdriver = pytest.importorskip("selenium.webdriver")
WIDTHS = {"phone": 400, "tablet": 800, "desktop": 1440}
PAGES = ("run", "comparison", "study")
SCREENSHOTS = Path(__file__).parents[2] / "runs" / "screenshots"
FIGURES = """
return [...document.querySelectorAll("figure")].map((figure) => {
  const charts = [...figure.querySelectorAll(".chart")];
  const read = (chart, name) => (chart.querySelector(name) || {textContent: ""}).textContent;
  const names = (chart, side) => {  // an axis of names says what it is without a label
    const tick = read(chart, `.${side}tick`);
    return read(chart, `.${side}title`) || (isNaN(tick[0]) ? tick : "");
  };
  return {
    caption: figure.querySelector("figcaption").textContent,
    told: figure.querySelector(".charts, img").getAttribute("aria-label") || figure.querySelector("img").alt,
    titles: charts.map((chart) => chart.previousElementSibling.textContent),
    axes: charts.flatMap((chart) => [names(chart, "x"), names(chart, "y")]),
    inside: figure.scrollWidth <= figure.clientWidth,
    cut: charts.flatMap((chart) => [...chart.querySelectorAll(".annotation, .xtitle, .xtick")].filter((text) =>
      text.getBoundingClientRect().right > chart.getBoundingClientRect().right + 1).map((text) => text.textContent)),
  };
});
"""


RULES = "axe.run({exclude: ['.chart']}, {preload: false}).then(arguments[arguments.length - 1])"
"""All of axe's rules; a chart's inside is one image to a screen reader."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    found.set_script_timeout(300)
    yield found
    found.quit()


@pytest.fixture
def pages(
    tmp_path: Path, metrics: list[Any], summary: list[Any], scores: Any, plan: Any, margins: Any
) -> dict[str, Path]:
    pairs = {"preference_accuracy": 0.7, "preference_margin": 1.5, "kl_to_reference": 0.4}
    metrics += [
        {"stage": "align-2", "done": done, "total": 4, "unit": "steps", "pairs": 16 * done, "loss": 0.5}
        | {f"{kind}{name}": at + done / 100 for name, at in pairs.items() for kind in ("", "validation_")}
        for done in range(1, 5)
    ]
    run = run_of(tmp_path / "run", metrics, summary, 2.8093)
    (run / "recipe.yaml").write_text("prune:\n  ffn: 24\n" + "data:\n  sources: [" + "/a/long/path" * 20 + "]\n")
    (run / "search").mkdir()
    (run / "search" / "table.json").write_text(json.dumps(search_table()))
    depth = DepthCurves("loss", 2.7, {1: {0: 4.0, 1: 3.0, 2: 2.9, 3: 3.1}})
    other = run_of(tmp_path / "other", metrics, summary, 2.9)
    compared = {run: {"prune": {"ffn": 24}}, other: {"prune": {"ffn": 48}}}
    table = study_table()
    return {
        "run": write_report(run, scores=scores, plan=plan, margins=margins, depth=depth),
        "comparison": compare_runs(compared, tmp_path / "both"),
        "study": written(tmp_path / "study.html", study_page(table, plot_study(table, tmp_path / "study.png"))),
    }


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def search_table() -> dict[str, Any]:
    candidates = [
        {"name": f"ffn {ffn}", "sizes": {"ffn": ffn}, "layers": None, "costs": {"params": 10_000 * ffn}, "score": None}
        | {"after_cut": 9 / place, "loss": 3 / place, "curve": {"2": 4 / place, "4": 3 / place}}
        | {"front": place != 2, "winner": place == 3}
        for place, ffn in enumerate((16, 24, 32), 1)
    ]
    return {"candidates": candidates, "by": "loss", "costs": ["params"], "settled": [[2, 0.5], [4, 1.0]]}


def study_table() -> StudyTable:
    compared = {"values": [2.1, 2.2], "mean": 2.15, "spread": 0.1, "difference": 0.0, "signs": (1, 1), "p": 1.0}
    arm = {"parameters": 2_210_000, "tokens": 196_608, "flops": 10**15, "teacher_flops": 10**14}
    arms = [
        {"arm": name, **arm, "measures": {"after": compared | {"printed": 2.1}}, "curve": {8: 3.0 + at, 16: 2.0 + at}}
        for at, name in enumerate(("KL", "KL + cross-entropy"))
    ]
    verdict = {"measure": "after", "order": [["KL"], ["KL + cross-entropy"]], "holds": 1, "reversed": 0, "mixed": 0}
    told = {"study": "losses", "title": "Losses", "claim": "Forward KL alone is best.", "paper": "[A] Table 15"}
    measured = {"measures": {"after": "held-out loss (nats per token)"}, "arms": arms, "verdicts": [verdict]}
    return told | measured | {"model": "teacher", "model_hash": "0" * 64, "seeds": [1, 2], "flips": []}  # type: ignore


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_pages_are_whole_readable_and_accessible(browser: Any, pages: dict[str, Path], dark: bool) -> None:
    axe = (files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8")
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for device, width in list(WIDTHS.items())[: 1 if dark else None]:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for name in PAGES[: 1 if dark else None]:
            browser.get(pages[name].as_uri())
            where = f"{name} on a {device}"
            assert browser.get_log("browser") == [], where
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width, where
            assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0, where
            figures = browser.execute_script(FIGURES)
            assert figures, where
            for figure in figures:
                assert figure["inside"] and figure["told"] == figure["caption"] != "", (where, figure)
                assert figure["cut"] == [], where
                assert all(figure["titles"]) and all(figure["axes"]), (where, figure)
            if device == "phone":  # the rules ask about nothing that depends on the width
                browser.execute_script(axe)
                found = browser.execute_async_script(RULES)
                problems = [(each["id"], each["nodes"][0]["html"][:200]) for each in found["violations"]]
                assert problems == [], where
            keep_picture(browser, width, SCREENSHOTS / f"{name}-{device}{'-dark' if dark else ''}.png")


def keep_picture(browser: Any, width: int, path: Path) -> None:
    height = min(browser.execute_script("return document.documentElement.scrollHeight"), 12_000)
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))


def test_a_chart_shows_the_value_under_the_pointer(browser: Any, pages: dict[str, Path], metrics: list[Any]) -> None:
    browser.get(pages["run"].as_uri())
    point = "const panel = document.querySelectorAll('.chart')[arguments[0]];"
    titles = browser.execute_script(
        "return [...document.querySelectorAll('.charts p')].map((title) => title.textContent)"
    )
    where = titles.index("Validation loss")
    browser.execute_script(point + "Plotly.Fx.hover(panel, [{curveNumber: 0, pointNumber: 1}])", where)
    text = browser.execute_script(point + "return panel.querySelector('.hoverlayer').textContent", where)
    seen = [line for line in metrics if line["stage"] == "correct" and "validation_loss" in line][1]
    assert f"{seen['validation_loss']:.3f}"[:4] in text and not math.isnan(seen["validation_loss"]), text
