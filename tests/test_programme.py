"""A programme is data that is checked before anything runs: the plan's own, and one line for each mistake."""

from copy import deepcopy
from typing import Any

import pytest

from spaces.config import MODES, ConfigError
from spaces.points import POINTS
from spaces.programme import (
    Condition,
    digest,
    load_programme,
    programme_yaml,
    programmes,
    read_condition,
    read_programme,
    shipped_text,
)
from spaces.reading import merge, parse_yaml, read_config
from spaces.workloads import WORKLOADS

SMALL: dict[str, Any] = {
    "name": "small",
    "experiments": {
        "first": {"point": "e13m-rmsnorm", "tests": ["H1a"], "confidence": 0.5},
        "other": {"point": "e13i-v2"},
        "second": {"settings": {"noise": {"layers": "middle"}}},
    },
    "hypotheses": {
        "H1": {
            "question": "which?",
            "alternatives": {"H1a": {"says": "the first", "better": "first", "than": "other", "confidence": 0.5}},
        }
    },
    "phases": [
        {
            "name": "one",
            "run": ["first", "other"],
            "then": [
                {"when": {"helps": "first"}, "because": "it helps", "go": "two"},
                {"because": "nothing helps", "go": "end"},
            ],
        },
        {
            "name": "two",
            "run": ["second"],
            "base": "one",
            "then": [
                {"when": {"gain": {"of": "second", "over": "base", "above": 1.0}}, "because": "worth it", "go": "A"},
                {"because": "not worth it", "go": "end"},
            ],
        },
    ],
    "scenarios": {"A": {"title": "good", "when": {"helps": "first"}, "says": "it helps"}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """SMALL with another value at `phases.0.then.0.go`; a list grows by one where the place is its end."""
    tree = deepcopy(SMALL)
    node: Any = tree
    *parents, leaf = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    if isinstance(node, list) and int(leaf) == len(node):
        node.append(value)
    else:
        node[int(leaf) if isinstance(node, list) else leaf] = value
    return tree


@pytest.mark.parametrize("name", programmes())
def test_what_is_shipped_is_read_and_comes_back_the_same_from_its_own_yaml(name: str) -> None:
    programme = load_programme(name)
    again = read_programme(parse_yaml(programme_yaml(programme), "again"), "again")
    assert again == programme
    assert digest(again) == digest(programme)
    assert read_programme(parse_yaml(shipped_text(name), name), name) == programme


def test_the_plan_has_its_experiments_confidences_and_thresholds() -> None:
    plan = load_programme("plan")
    for name, experiment in plan.experiments.items():
        assert experiment.confidence == POINTS[name].confidence, name
    assert {h: tuple(a.confidence for a in plan.hypotheses[h].alternatives.values()) for h in plan.hypotheses} == {
        "H1": (0.7, 0.6),
        "H2": (0.55, 0.45),
        "H3": (0.65, 0.35),
        "H4": (0.7, 0.4, 0.3),
        "H5": (0.5, 0.6),
    }
    success = plan.experiments["e13j-variable"].success
    assert success is not None
    assert (success.minimum, success.good, success.excellent) == (2.6, 3.6, 4.6)
    assert set(plan.scenarios) == set("ABCDE")
    assert plan.table is not None
    assert set(plan.table.sigmas) <= set(MODES)


@pytest.mark.parametrize("name", ["e13i-high", "e13i-low", "e13j-variable"])
def test_over_the_global_noise_of_phase_1_the_later_experiments_are_the_plans_points(name: str) -> None:
    work = WORKLOADS["embedded"].settings
    below = merge(work, POINTS["e13i-baseline"].settings)
    assert read_config(merge(below, load_programme("plan").experiments[name].tree)) == read_config(
        merge(work, POINTS[name].settings)
    )


MISTAKES = [
    ("experiments.first.point", "e13m-rmsnrm", "experiments.first.point=e13m-rmsnrm: unknown point; did you mean e13m"),
    ("experiments.first.settings", {"noise": {"layers": "all"}}, "experiments.first: give one of point and settings"),
    ("experiments.second.settings", {"noise": {"sigma_strt": 0.1}}, "unknown setting; did you mean noise.sigma_start?"),
    ("experiments.second.settings", {"seed": 3}, "the programme gives every trial its own (--seed, --cpus)"),
    ("experiments.second.tests", ["H1c"], "experiments.second.tests=H1c: unknown alternative; did you mean H1a?"),
    ("experiments.control", {"point": "e14"}, "control: is a name that is taken"),
    ("experiments.third", {"point": "e14"}, "experiments.third: runs in no phase"),
    ("experiments.first.expected", [2.0, 1.0], "the lower end comes first"),
    (
        "experiments.first.success",
        {"minimum": 1.0, "good": 1.0, "excellent": 2.0},
        "experiments.first.success: thresholds overlap: minimum=1 good=1",
    ),
    ("success", {"fair": 2.0, "fine": 1.0}, "success.fine=1: thresholds overlap: fair begins at 2"),
    ("hypotheses.H1.alternatives.H1a.than", "nobody", "H1a.than=nobody: unknown experiment; did you mean"),
    ("hypotheses.H1.alternatives.H1a.confidence", 1.5, "hypotheses.H1.alternatives.H1a.confidence=1.5"),
    ("replicates", {"looks": [2, 4]}, "looks=2,4: name growing numbers of replicates from 3 on"),
    ("phases.0.run", ["first", "otter"], "phases.one.run=otter: unknown experiment; did you mean other?"),
    ("phases.0.then.0.go", "too", "phases.one.then.0.go=too: unknown phase or scenario; did you mean two?"),
    ("phases.0.then.0.go", "end", "phases.two: is never reached: no rule goes to it"),
    ("phases.0.then.0.go", "one", "phases.one.then.0.go=one: is a cycle: one does not come after one"),
    ("phases.1.then.0.go", "one", "phases.two.then.0.go=one: is a cycle"),
    ("phases.1.base", "two", "phases.two.base=two: is a cycle: two does not come before two"),
    ("phases.0.then.0.skip", "nobody", "phases.one.then.0.skip=nobody: unknown experiment"),
    ("phases.0.then.0.when", {"help": "first"}, "phases.0.then.0.when: help: unknown word; did you mean helps?"),
    ("phases.0.then.0.when", {"helps": "frist"}, "when.helps=frist: unknown experiment; did you mean first?"),
    ("phases.0.then.0.when", {"helps": "second"}, "when.helps=second: cannot have run by then; ask about one of first"),
    ("phases.0.then.0.when", {"beats": "first"}, "beats=first: write it as beats: [NAME, OTHER]"),
    ("phases.0.then.0.when", {"beats": ["first", "base"]}, "first has no base"),
    ("phases.0.then.0.when", {"gain": {"of": "first"}}, "write it as gain: {of: NAME, over: OTHER"),
    ("phases.0.then.0.when", {"gain": {"of": "first", "abov": 1}}, "gain.abov: unknown word; did you mean above?"),
    ("phases.0.then.0.when", {"every": "hellps"}, "every=hellps: write it as every: one of helps"),
    ("phases.0.then.0.when", {"undecided": "first"}, "phases.two.base=one: may have no winner when phases.one.then.0"),
    ("phases.0.then.1.go", "two", "phases.two.base=one: may have no winner when phases.one.then.1 goes there"),
    ("phases.0.then.1.when", {"hurts": "first"}, "phases.one.then.1: is the last rule and has a condition"),
    ("phases.0.then.2", {"because": "again", "go": "end"}, "phases.one.then.1: holds always, so the rules after it"),
    (
        "phases.1.then.1",
        {"when": {"gain": {"of": "second", "over": "base", "above": 0.5}}, "because": "some", "go": "end"},
        "phases.two.then.1",
    ),
    ("stop", [{"because": "enough", "go": "end"}], "stop.0: needs a condition"),
    ("phasis", [], "unknown key phasis=[]; did you mean"),
    ("table", {"point": "e14", "sigmas": {"W4A5": [0.1]}}, "table.sigmas.W4A5: unknown mode; did you mean W4A"),
]


@pytest.mark.parametrize(("path", "value", "said"), MISTAKES)
def test_what_could_not_be_carried_out_is_one_line_with_key_and_remedy(path: str, value: Any, said: str) -> None:
    read_programme(SMALL, "small.yaml")
    with pytest.raises(ConfigError) as told:
        read_programme(changed(path, value), "small.yaml")
    assert str(told.value).startswith("small.yaml: ")
    assert said in str(told.value)
    assert "\n" not in str(told.value)


def test_thresholds_of_two_rules_may_touch_and_not_overlap() -> None:
    def with_rules(above: float, below: float) -> dict[str, Any]:
        gains: list[dict[str, Any]] = [{"above": above}, {"below": below}]
        rules = [{"when": {"gain": {"of": "second", "over": "base"} | g}, "because": "", "go": "end"} for g in gains]
        return changed("phases.1.then", [*rules, {"because": "", "go": "end"}])

    read_programme(with_rules(1.0, 1.0), "small.yaml")
    with pytest.raises(ConfigError, match=r"phases.two.then.1.when: thresholds overlap: second gains below 1.5 points"):
        read_programme(with_rules(1.0, 1.5), "small.yaml")


def test_a_condition_is_written_as_it_is_read() -> None:
    tree = {"all": [{"not": {"beats": ["a", "base"]}}, {"any": [{"every": "fails"}, {"helps": "b"}]}]}
    condition = read_condition(tree)
    assert condition.tree() == tree
    assert condition.words() == "not (a beats base) and (every experiment fails or b helps)"
    assert read_condition({"gain": {"of": "a", "above": 1}}) == Condition(word="gain", names=("a", "control"), above=1)


def test_a_programme_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match="PROGRAM=plam: unknown programme; choose plan or a YAML file"):
        load_programme("plam")


def test_every_comparison_counts_once_towards_the_level() -> None:
    pairs = load_programme("plan").comparisons()
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) == 21
    assert ("e13i-targeted", "e13i-baseline") in pairs or ("e13i-baseline", "e13i-targeted") in pairs


def test_what_chooses_a_winner_over_a_base_counts_towards_the_level_also_where_no_rule_names_it() -> None:
    unnamed = changed("phases.1.then", [{"because": "that was it", "go": "end"}])
    assert ("second", "base") in read_programme(unnamed, "mine").comparisons()
