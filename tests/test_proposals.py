"""Coordinates of a space, its grid, quasi-random points: what a method proposes, whatever is known."""

import json
import math
from itertools import pairwise

import pytest
from scipy.stats import qmc

from search.coordinates import coordinates, decode, encode
from search.proposals import GRID_LEVELS, SEARCHERS, every, lattice
from spaces.library import SPACES, Choice, Dimension, Float, Int, Space, When
from tests.searches import choices, cliff, drive, outcome, searcher, trees

CONDITIONAL = Space(
    name="conditional",
    description="",
    dimensions=(
        Dimension(key="noise.schedule", domain=Choice(options={"constant": "constant", "log": "log"})),
        Dimension(key="noise.num_stages", domain=Int(low=2, high=4), when=When(parent="noise.schedule", value="log")),
        Dimension(key="noise.modules", domain=Choice(options={"rmsnorm": ["rmsnorm"], "linear": ["linear"]})),
        Dimension(
            key="noise.sigma_start",
            domain=Float(low=0.005, high=0.1, log=True),
            when=When(parent="noise.modules", value="rmsnorm"),
        ),
        Dimension(
            key="noise.sigma_start",
            domain=Float(low=0.002, high=0.02, log=True),
            when=When(parent="noise.modules", value="linear"),
        ),
    ),
)


@pytest.mark.parametrize("name", SEARCHERS)
def test_a_conditional_dimension_is_drawn_only_under_its_condition(name: str) -> None:
    search = searcher(CONDITIONAL, searcher=name, trials=14)
    drive(search, lambda s: outcome(0.5))
    for arm in search.arms[1:]:
        assert ("noise.num_stages|log" in arm.params) == (arm.params["noise.schedule"] == "log")
        assert f"noise.sigma_start|{arm.params['noise.modules']}" in arm.params
        assert sum(name.startswith("noise.sigma_start") for name in arm.params) == 1


def test_dimensions_of_one_key_share_a_coordinate() -> None:
    assert [len(c.dimensions) for c in coordinates(CONDITIONAL)] == [1, 1, 1, 2]
    place = {c.name: c.middle for c in coordinates(CONDITIONAL)} | {"noise.modules": "linear"}
    assert decode(CONDITIONAL, place)["noise.sigma_start|linear"] == pytest.approx(math.sqrt(0.002 * 0.02))


@pytest.mark.parametrize(("beyond", "end"), [(1.4, 0.02), (-0.3, 0.002)])
def test_a_proposal_beyond_a_range_is_moved_to_its_end(beyond: float, end: float) -> None:
    place = {c.name: c.middle for c in coordinates(CONDITIONAL)} | {
        "noise.modules": "linear",
        coordinates(CONDITIONAL)[3].name: beyond,
    }
    assert decode(CONDITIONAL, place)["noise.sigma_start|linear"] == end


@pytest.mark.parametrize("space", [*SPACES.values(), CONDITIONAL], ids=lambda space: space.name)
def test_every_configuration_survives_the_way_to_coordinates_and_back(space: Space) -> None:
    search = searcher(space, searcher="random", trials=30)
    drive(search, lambda s: outcome(0.5))
    proposed = [arm for arm in search.arms if arm.origin != "control"]
    assert len(proposed) > 10
    for arm in proposed:
        assert decode(space, encode(space, arm.params)) == pytest.approx(dict(arm.params))


def test_the_grid_is_every_combination_once_with_both_ends() -> None:
    found = [dict(params) for params in lattice(SPACES["sigma"], GRID_LEVELS)]
    assert len(found) == 2 * GRID_LEVELS * GRID_LEVELS
    assert len({json.dumps(p, sort_keys=True) for p in found}) == len(found)
    for module, (low, high) in {"rmsnorm": (0.005, 0.1), "linear": (0.002, 0.02)}.items():
        sigmas = sorted({p[f"noise.sigma_start|{module}"] for p in found if p["noise.modules"] == module})
        assert (sigmas[0], sigmas[-1]) == (low, high)
        assert all(b / a == pytest.approx((high / low) ** 0.25) for a, b in pairwise(sigmas)), "evenly on a log scale"


def test_the_grid_of_a_conditional_space_has_no_value_where_there_is_no_dimension() -> None:
    found = list(lattice(CONDITIONAL, GRID_LEVELS))
    assert len(found) == (1 + 3) * 2 * GRID_LEVELS


def test_the_beginning_of_the_grid_is_spread_out() -> None:
    """Against the plain order, whose first ten of fifty know one module kind and two values of sigma_start."""
    first = list(lattice(SPACES["sigma"], GRID_LEVELS))[:10]
    assert {p["noise.modules"] for p in first} == {"rmsnorm", "linear"}
    assert len({p["noise.sigma_end"] for p in first}) == GRID_LEVELS
    assert (
        len({round(encode(SPACES["sigma"], p)[coordinates(SPACES["sigma"])[1].name], 9) for p in first}) == GRID_LEVELS
    )


def test_a_finite_space_can_be_listed_and_a_real_number_cannot() -> None:
    rows = every(choices(grpo__steps=3, grpo__prompts=4))
    assert rows is not None
    assert len(list(rows)) == 12
    assert every(SPACES["sigma"]) is None


def test_quasi_random_points_are_more_even_than_random_ones() -> None:
    """By scipy's discrepancy of the coordinates."""
    space = Space(
        name="square",
        description="",
        dimensions=(
            Dimension(key="noise.sigma_start", domain=Float(low=0.01, high=0.1)),
            Dimension(key="noise.sigma_end", domain=Float(low=0.0001, high=0.001)),
        ),
    )

    def discrepancy(name: str) -> float:
        search = searcher(space, searcher=name, trials=33)
        drive(search, lambda s: outcome(0.5))
        return float(qmc.discrepancy([list(encode(space, arm.params).values()) for arm in search.arms[1:]]))

    assert discrepancy("qmc") < discrepancy("random") / 3


@pytest.mark.parametrize("name", ["random", "qmc"])
def test_a_long_search_does_not_run_dry(name: str) -> None:
    assert len(drive(searcher(searcher=name, trials=130), lambda s: outcome(0.5))) == 130


def test_another_seed_draws_other_configurations() -> None:
    for name in ("random", "qmc", "gp"):
        one, other = searcher(searcher=name, seed=1), searcher(searcher=name, seed=2)
        drive(one, cliff)
        drive(other, cliff)
        assert not set(trees(one.arms[1:])) & set(trees(other.arms[1:])), name
