"""The page of a sweep: the answer first, whatever lies in its folder, and in a real browser without a network."""

import json
import math
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dashboards import page as page_module
from dashboards.cli import app
from dashboards.figures import Figure
from dashboards.page import FIRST, left_behind, page, read_material, sections_of, write_page
from search.arms import read_arms
from search.confirm import planned_confirmation
from search.store import PAGE_FILE, StudyConfig, save_study_config
from spaces.errors import ConfigError
from tests.browser import Browser, browser
from tests.drawn_sweeps import drawn_sweep, steps_of
from tests.written_sweeps import attempt, make_arm, outcome, scores, study, write_sweep, write_trial

__all__ = ["browser"]  # a fixture
BROKEN = ("grpo/reward", "gen/entropy", "gen/length", "rollout_corr/kl")
HELD = ("</html>", 'id="answer"')


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    return drawn_sweep(tmp_path_factory.mktemp("store"))


def words(html: str) -> str:
    """What a reader reads."""
    body = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


def page_of(config: StudyConfig) -> str:
    """Of a sweep none of whose parts failed."""
    html = page(read_material(config))
    assert "could not be" not in words(html).replace("could not be compared", "")
    assert all(part in html for part in HELD)
    return html


def test_the_answer_stands_first_with_its_interval_and_how_far_anything_was_looked_at(config: StudyConfig) -> None:
    said = words(page_of(config))
    answer = said[: said.index("Differences to the control")]
    assert "Does noise help? Undecided" in answer
    assert re.search(r"The candidate is c01 .*: \+8.2 points \[-2.6, \+19.1\] against control, over 3 pairs", answer)
    assert "needs about 1 more replicate" in answer
    assert "Looked at: up to 29 steps; noise on" in answer
    assert "rmsnorm up to sigma 0.0607 (applied: up to" in answer


def test_the_page_needs_nothing_else(config: StudyConfig) -> None:
    html = page_of(config)
    head = html[: html.index('<script type="application/json"')]
    assert not re.search(r"(src|href)=[\"'](?!#|data:,)", head)
    assert len(html) < 8 * 2**20
    assert html.count("plotly.js v") == 1
    held = html.partition('<script type="application/json" id="figures">')[2].partition("</script>")[0]
    assert "<" not in held, "whatever a label holds, it ends no script"
    assert len(json.loads(held)) == html.count('class="figure')


def test_a_sweep_that_helps_says_that_it_is_not_confirmed_and_its_confirmation_says_more(tmp_path: Path) -> None:
    base = study(tmp_path, replicates=8, trials=2)
    arms = [make_arm(base, "control"), make_arm(base, "better")]
    write_sweep(base, arms, {"control": [200, 204] * 4, "better": [260, 263] * 4})
    assert "It looks so where it holds, not confirmed" in words(page_of(base))
    confirmation, again = planned_confirmation(base, (5, 8))
    again = [replace(arm, config=arm.config) for arm in again]
    write_sweep(confirmation, again, {"control": [200, 204, 201, 207, 203], "better": [260, 263, 255, 260, 262]})
    drawn = {figure.name: figure for figure in sections_figures(base)}
    (first, *_) = [note["text"] for note in drawn["forest"].layout["annotations"]]
    assert first.startswith("<b>better, its confirmation</b>"), "above what the sweep itself saw"
    assert "with fresh seeds (5 pairs)" in first.replace("<br>", " ")
    for one in (base, confirmation):
        said = words(page_of(one))
        assert "Does noise help? Yes where it holds: a collapse risk is not excluded" in said
        assert "with fresh seeds (5 pairs)" in said


def sections_figures(config: StudyConfig) -> list[Figure]:
    sections = sections_of(read_material(config))
    return [figure for section in sections for block in section.blocks for figure in block.figures]


def all_collapsed(store: Path) -> StudyConfig:
    config = study(store, trials=2)
    write_sweep(
        config, [make_arm(config, "control"), make_arm(config, "a")], {"control": [200], "a": [("collapsed", 9)]}
    )
    return config


def one_trial(store: Path) -> StudyConfig:
    config = study(store, trials=1)
    write_sweep(config, [make_arm(config, "a")], {"a": [200]})
    return config


def nothing_yet(store: Path) -> StudyConfig:
    config = study(store)
    save_study_config(config)
    return config


def not_a_number(store: Path) -> StudyConfig:
    config = drawn_sweep(store, arms=3, replicates=1)
    arm = read_arms(config)[1]
    reports = [
        replace(one, signals={name: math.nan if name in BROKEN else value for name, value in one.signals.items()})
        for one in steps_of(arm, random.Random(0))
    ]
    ended = replace(outcome(arm, 0, 0), eval=scores([0] * 400, math.nan))
    write_trial(config, arm, 0, ended, reports=reports)
    return config


def unfinished(store: Path) -> StudyConfig:
    config = study(store, trials=2, replicates=2)
    write_sweep(
        config, [make_arm(config, "control"), make_arm(config, "a")], {"control": [200, None], "a": [210, None]}
    )
    return config


def failed(store: Path) -> StudyConfig:
    config = study(store, trials=2)
    arms = [make_arm(config, "control"), make_arm(config, "a")]
    write_sweep(config, arms, {"control": [200]})
    write_trial(config, arms[1], 0, None, attempts=[attempt(ended="error", reason="CUDA <out> of memory")])
    return config


def unicode(store: Path) -> StudyConfig:
    config = study(store, trials=2, name="s", settings={"eval": {"questions": 400}, "task": {"options": {}}})
    arms = [make_arm(config, "control"), make_arm(config, "a")]
    write_sweep(config, arms, {"control": [200]})
    text = "</script><b>größer 数学 \u2028 \x07"
    reports = steps_of(arms[1], random.Random(0))
    reports = [replace(r, samples=tuple(replace(s, completion=text, prompt=text) for s in r.samples)) for r in reports]
    write_trial(config, arms[1], 0, outcome(arms[1], 0, 9, "collapsed", rule="<entropy> größer"), reports=reports)
    return config


ODD = {
    all_collapsed: "All of the 1 configurations with noise that ended collapsed",
    one_trial: "No control has ended with an accuracy",
    nothing_yet: "No arm has been written down yet",
    not_a_number: "Looked at",
    unfinished: "2 trials have no outcome yet",
    failed: "Failed, which says nothing about noise: trials of a",
    unicode: "größer 数学",
}


@pytest.mark.parametrize("make", ODD, ids=lambda make: make.__name__)
def test_a_page_of_odd_data_says_what_is_odd(tmp_path: Path, make: Any) -> None:
    html = page_of(make(tmp_path))
    assert ODD[make] in words(html)
    assert "<b>größer" not in html


def test_an_ablation_says_what_the_winner_loses_without_each_change(tmp_path: Path) -> None:
    config = study(tmp_path, kind="ablation", parent="p", replicates=3, trials=3)
    arms = [make_arm(config, "control"), make_arm(config, "w", origin="winner")]
    arms.append(make_arm(config, "w-without-layers", origin="ablation"))
    write_sweep(config, arms, {"control": [200] * 3, "w": [220, 222, 221], "w-without-layers": [201, 203, 200]})
    said = words(page_of(config))
    assert "The winner with one change at a time taken back" in said
    assert re.search(r"w-without-layers: \+0.3 points against control", said)


@pytest.mark.slow
def test_a_page_of_300_trials_of_60_steps_is_below_8_mib(tmp_path: Path) -> None:
    config = drawn_sweep(tmp_path, arms=100, replicates=3, steps=60, questions=2048)
    html = page_of(config)
    assert len(html.encode()) < 8 * 2**20
    assert html.count('class="figure"') > 100


def test_the_page_holds_no_password(config: StudyConfig) -> None:
    open_to = config.model_copy(update={"tracking_uri": "http://me:canary-4711@127.0.0.1:9"})
    html = page_of(open_to)
    assert "127.0.0.1:9" in html
    assert "canary" not in html


def test_a_part_that_fails_is_a_line_in_its_place(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> None:
        raise ZeroDivisionError("by <nothing>")

    monkeypatch.setitem(page_module.SECTIONS, "Pareto front", fails)
    said = words(page(read_material(config)))
    assert "This part could not be made (ZeroDivisionError: by &lt;nothing&gt;)" in said
    assert "How to reproduce it" in said


def test_a_sweep_never_fails_by_its_page_and_says_why_there_is_none(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, written = left_behind(config)
    assert (written, line) == (True, f"  {config.folder.local / PAGE_FILE}   # the page of it")
    monkeypatch.setattr(page_module, "answer_of", lambda *_: 1 / 0)
    line, written = left_behind(config)
    assert (written, line) == (False, "no page was written (ZeroDivisionError: division by zero)")


def test_html_stands_alone_or_before_a_file(config: StudyConfig, tmp_path: Path) -> None:
    place, file = ["--store", config.store], tmp_path / "x.html"
    for arguments, where in (
        (["s", "--html", *place], config.folder.local / PAGE_FILE),
        ([*place, "--html", "s"], config.folder.local / PAGE_FILE),
        (["s", "--html", str(file), *place], file),
    ):
        result = CliRunner().invoke(app, ["report", *arguments])
        assert (result.exit_code, result.output) == (0, f"page: {where}\n")
        assert where.read_text().endswith("</html>\n")
    with pytest.raises(ConfigError, match=r"--html .*/none/x.html: No such file or directory; give a file in a folder"):
        write_page(config, tmp_path / "none" / "x.html")


@pytest.mark.parametrize("damage", ["version", "arm"])
def test_a_sweep_that_cannot_be_read_has_a_page_that_says_so(tmp_path: Path, damage: str) -> None:
    config = all_collapsed(tmp_path)
    if damage == "version":
        tree = json.loads(config.folder.read("study.json") or b"")
        config.folder.write("study.json", json.dumps({**tree, "version": 1}))
    else:
        (config.folder / "arms").write("0000.json", "{")
    result = CliRunner().invoke(app, ["report", "s", "--html", "--store", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    said = words((tmp_path / "s" / PAGE_FILE).read_text())
    assert "This sweep cannot be read" in said
    assert {"version": "written by version 1", "arm": "0000.json: is damaged"}[damage] in said


def test_figures_without_a_browser_are_one_line(config: StudyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    result = CliRunner().invoke(app, ["report", "s", "--figures", "f", "--store", config.store])
    assert re.match("--figures f: needs a Chromium to draw with; apt-get install chromium, or", str(result.exception))


@pytest.mark.slow
def test_figures_are_written_as_png_and_svg(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one section: a picture takes half a second."""
    config = study(tmp_path, replicates=3, trials=2)
    write_sweep(config, [make_arm(config, "control"), make_arm(config, "a")], {"control": [200] * 3, "a": [210] * 3})
    forest = {"Differences": page_module.SECTIONS["Differences to the control"]}
    monkeypatch.setattr(page_module, "SECTIONS", forest)
    result = CliRunner().invoke(app, ["report", "s", "--figures", str(tmp_path / "f"), "--store", str(tmp_path)])
    assert (result.exit_code, result.output) == (0, f"figures: 2 files in {tmp_path / 'f'}\n")
    assert (tmp_path / "f" / "forest.png").read_bytes().startswith(b"\x89PNG")
    assert "points of accuracy" in (tmp_path / "f" / "forest.svg").read_text()


@pytest.fixture(scope="module")
def opened(config: StudyConfig, browser: Browser) -> Browser:
    """Without a network, everything folded open."""
    write_page(config)
    for domain in ("Runtime", "Log", "Network"):
        browser.call(f"{domain}.enable")
    off = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.call("Network.emulateNetworkConditions", **off)
    return browser


CONTRAST = """
(() => {
  const parts = (color) => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = (color) => parts(color).slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const over = (top, bottom) => {
    const [r, g, b, a = 1] = parts(top), under = parts(bottom);
    return `rgb(${[r, g, b].map((c, n) => a * c + (1 - a) * under[n])})`;
  };
  const ground = (node) => {
    const chain = [];
    for (let at = node; at; at = at.parentElement) chain.unshift(getComputedStyle(at).backgroundColor);
    return chain.reduce((below, color) => (parts(color)[3] === 0 ? below : over(color, below)), "rgb(255,255,255)");
  };
  const low = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || ["SCRIPT", "STYLE"].includes(node.tagName) || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), drawn = node.closest("svg");
    const ink = light(drawn ? style.fill : style.color);
    const grounds = [ground(drawn ? drawn.parentElement : node)];
    if (drawn) document.querySelectorAll(".shapelayer path").forEach((path) => {
      const fill = getComputedStyle(path);
      const color = fill.fill.replace("rgb(", "rgba(").replace(")", `, ${fill.fillOpacity})`);
      const box = path.getBoundingClientRect(), text = node.getBoundingClientRect();
      const inside = box.left < text.right && box.right > text.left && box.top < text.bottom && box.bottom > text.top;
      if (inside && Number(fill.fillOpacity) > 0) grounds.push(over(color, grounds[0]));
    });
    for (const color of grounds) {
      const both = [ink, light(color)].sort((a, b) => a - b), ratio = (both[1] + 0.05) / (both[0] + 0.05);
      if (ratio < 4.5) low.push([node.textContent.slice(0, 40), ratio.toFixed(2), color]);
    }
  }
  return low;
})()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_browser_draws_every_figure_without_network_errors_or_a_horizontal_scroll(
    opened: Browser, config: StudyConfig, scheme: str, width: int
) -> None:
    opened.events.clear()
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.call("Emulation.setDeviceMetricsOverride", **screen)
    opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    place = (config.folder.local / PAGE_FILE).as_uri()
    opened.open(place, f"location.href === '{place}' && document.readyState === 'complete'")
    opened.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true)); drawAll()")
    boxes, drawn = opened.evaluate(
        "[boxes.length, document.querySelectorAll('.figure .cartesianlayer > .subplot').length]"
    )
    assert boxes == drawn > FIRST
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("boxes.every((box) => box.querySelector('svg').clientWidth <= box.clientWidth)")
    assert opened.evaluate(CONTRAST) == [], "axe-core leaves text out that lies on a shape"
    assert opened.violations() == []
    told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert [event for event in opened.events if event["method"] in told] == []
    asked = {
        event["params"]["request"]["url"] for event in opened.events if event["method"] == "Network.requestWillBeSent"
    }
    assert asked <= {place, "data:,"}


@pytest.mark.slow
def test_paper_has_every_figure_that_is_not_folded_and_none_wider_than_it(opened: Browser, config: StudyConfig) -> None:
    place = (config.folder.local / PAGE_FILE).as_uri()
    opened.call("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)
    opened.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    opened.open(f"{place}#print", "document.readyState === 'complete' && location.hash === '#print'")
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    shown = "boxes.filter((box) => box.offsetWidth)"
    widths = opened.evaluate(f"{shown}.map((box) => [box.querySelector('svg').clientWidth, box.clientWidth])")
    assert len(widths) > FIRST
    assert all(drawn <= box for drawn, box in widths)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 718
    assert opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
