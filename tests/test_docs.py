"""What README and docs/ say is there: files and headings that they link to, commands and settings that they show."""

import io
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
import typer.core
from pydantic import BaseModel
from typer._click import exceptions

from dashboards.cli import app
from search import tolerance
from search.finding import VERDICTS, FindingVerdict
from search.report import screening
from search.store import StudyConfig
from spaces.config import TrialConfig
from spaces.reading import flatten_fields
from tests.benchmarks import reference
from trainable.collapse_rules import RULES, WORDS
from trainable.failure import FAILURES
from trainable.metrics import ENTROPY, GIBBERISH, GROUPS, METRICS, REWARD, ROLLOUT_KL, SIGMA, UNITS
from trainable.outcome import STATUSES, CollapseVerdict, Effect, Status, StepReport

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them; a heading that occurs again gets a number."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


def broken(page: Path) -> list[str]:
    """Links and images of a page that lead nowhere in the repository."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, heading = target.partition("#")
        if re.match(r"[a-z]+:", place):
            continue
        there = page.parent / place if place else page
        if not there.exists() or (heading and heading not in anchors(there)):
            lost.append(target)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_and_image_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert broken(page) == []


def test_a_link_to_nothing_is_found(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("# Two words\n[a](b.md) [b](#two-words) [c](#three) ![d](e.png) [f](https://x.org) [g](a.md#h)")
    assert broken(page) == ["b.md", "#three", "e.png", "a.md#h"]


def test_every_page_is_listed_where_a_reader_looks_for_it() -> None:
    index = ROOT / "docs" / "README.md"
    listed = set(re.findall(r"\]\(([^)#]+\.md)\)", index.read_text(encoding="utf-8")))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} | {"cluster/README.md"}


@pytest.mark.parametrize("package", ["spaces", "trainable", "search", "dashboards"])
def test_every_module_stands_in_the_file_tree(package: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^{package}/ .*\n((?:  .*\n)+)", text, re.MULTILINE)
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    assert modules - set(re.findall(r"\w+", section)) == set(), "a line in docs/architecture.md says what it is for"


def shown(text: str) -> Iterator[tuple[str, bool]]:
    """Every rin command of a page, and whether it is whole: in a block, not named within a sentence."""
    text = text.replace("\\\n", " ")
    for block in re.findall(r"^```(?:sh|text)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            for command in re.split(r"\s+#|;|\|", line.removeprefix("$ "))[: 1 + line.count(";")]:
                if re.match(r"rin [a-z]", command.strip()):
                    yield command.strip(), True
    for line in re.findall(r"^    (rin .*)$", text, re.MULTILINE):
        yield re.split(r"\s+#", line)[0].strip(), True
    for command in re.findall(r"`(rin [a-z][^`]*)`", text):
        yield re.split(r"\s+\\?\|", command)[0], False


APP = typer.main.get_command(app)
COMMANDS = sorted({(named(page), *each) for page in PAGES for each in shown(page.read_text(encoding="utf-8"))})


def parse(line: str) -> None:
    """Options and arguments are read and checked; nothing runs. Raises UsageError."""
    command = APP
    words = [word for word in shlex.split(line)[1:] if word != "..."]
    while isinstance(command, typer.core.TyperGroup) and words:
        name = words.pop(0)
        if name not in command.commands:
            raise exceptions.UsageError(f"no command {name}")
        command = command.commands[name]
    command.make_context(command.name, words)


@pytest.mark.parametrize(("page", "line", "whole"), COMMANDS, ids=[f"{page}: {line}" for page, line, _ in COMMANDS])
def test_every_rin_command_is_one_that_rin_reads(page: str, line: str, whole: bool) -> None:
    try:
        parse(line)
    except (exceptions.MissingParameter, exceptions.BadOptionUsage, exceptions.NoArgsIsHelpError):
        assert not whole


def test_commands_that_rin_does_not_know_are_found() -> None:
    block = "```sh\nrin list; rin sweep --runz 3   # no\nrin status | head\n```\n"
    text = f"{block}and `rin report`, `rin sweep \\| head`\n\n    rin srdd x  # y\n"
    found = [("rin list", True), ("rin sweep --runz 3", True), ("rin status", True), ("rin srdd x", True)]
    assert list(shown(text)) == [*found, ("rin report", False), ("rin sweep", False)]
    with pytest.raises(exceptions.UsageError, match="runz"):
        parse("rin sweep --runz 3")
    with pytest.raises(exceptions.UsageError, match="no command swep"):
        parse("rin swep")


def test_every_setting_that_a_page_sets_is_one_of_a_trial() -> None:
    known = set(flatten_fields(TrialConfig))
    given = {key for page in PAGES for key in re.findall(r"--set '?([a-z_0-9.]+)=", page.read_text(encoding="utf-8"))}
    assert given - known == {"dotted"} & given
    assert len(given) > 20


def test_the_reference_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "reference.md").read_text(encoding="utf-8") == reference.page(), "run `make reference`"


def test_every_status_verdict_and_rule_that_a_user_meets_has_a_meaning() -> None:
    assert tuple(STATUSES) == get_args(Status)
    assert tuple(VERDICTS) == get_args(FindingVerdict)
    assert list(WORDS) == ["nonfinite", "filter_rejection", *RULES]
    text = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("reference", "glossary"))
    words = [*STATUSES, *VERDICTS, *map(screening, VERDICTS), *WORDS, *FAILURES, *get_args(tolerance.Status)]
    assert [word for word in words if f"`{word}`" not in text] == []


def test_every_metric_has_a_unit_and_a_group_that_says_when_it_is_logged() -> None:
    assert {name.split("/")[0] for name in METRICS} == set(GROUPS)
    assert set(UNITS) <= set(METRICS)


@pytest.mark.parametrize(
    "model",
    [
        *(part for _, _, part in reference.trial_parts()),
        *sorted(reference.LINKED, key=lambda one: one.__name__),
        StudyConfig,
    ],
)
def test_every_key_of_a_file_is_told_what_it_means(model: type[BaseModel]) -> None:
    bare = [name for name, field in model.model_fields.items() if not field.description and name != "kind"]
    assert bare == [], "a string under the field says it"


def test_the_ladder_of_sigmas_is_read_from_what_a_trial_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/examples/sigma_ladder.py: a row per stage, the mean over the weights that got noise in it."""
    signals = {SIGMA: 0.1, REWARD: 0.25, ENTROPY: 1.5, GIBBERISH: 0.05, ROLLOUT_KL: 2.0}
    healthy = CollapseVerdict(collapsed=False)
    steps = [
        StepReport(
            step=k, sigma=0.1 * k, signals=signals, verdict=healthy, seconds=1.0, samples=(), time_ms=0
        ).as_tree()
        for k in (0, 1)
    ]
    shared: dict[str, Any] = {"stage": 1, "step": 1, "layer": 0, "kind": "linear", "nominal": 0.1, "changed": 0.5}
    noised = [Effect(name=str(x), applied=x, applied_relative=2 * x, **shared) for x in (0.08, 0.12)]
    lines = [*steps, {"receipt": {"effects": [asdict(effect) for effect in noised]}}]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{json.dumps(line)}\n" for line in lines)))
    runpy.run_path(str(ROOT / "docs" / "examples" / "sigma_ladder.py"))
    head, quiet, noisy = capsys.readouterr().out.splitlines()
    assert head.split() == ["sigma", "applied", "dose", "changed", "reward", "entropy", "gibberish", "KL"]
    assert quiet.split() == ["0", "0.0000", "0.0%", "0.0%", "0.250", "1.500", "5.0%", "2"]
    assert noisy.split() == ["0.1", "0.1000", "20.0%", "50.0%", "0.250", "1.500", "5.0%", "2"]
