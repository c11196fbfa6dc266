"""The house keeps its order: imports point left, tables and the configuration's choices name the same things."""

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from search import objectives, proposals, store
from spaces import config, formats
from trainable import noise, quantization

ROOT = Path(__file__).parents[1]
PACKAGES = ("spaces", "trainable", "search", "dashboards")  # left to right
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Who may import what: the heavy libraries by the packages (or the one file) that are there for them.
HEAVY = {
    "torch": ("trainable/", "search/", "dashboards/"),
    "transformers": ("trainable/", "search/", "dashboards/"),
    "ray": ("trainable/ray_trainable.py", "search/", "dashboards/"),
    "mlflow": ("search/", "dashboards/"),
    "optuna": ("search/", "dashboards/"),
    "rich": ("dashboards/",),
    "typer": ("dashboards/",),
    "plotly": ("dashboards/",),
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield node.module
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            argument = node.args[0]
            yield argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else ""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_walk_sees_all_four_packages_and_imports_inside_functions() -> None:
    assert {relative(path).split("/")[0] for path in MODULES} == set(PACKAGES)
    assert "peft" in imports(ROOT / "trainable/model.py")  # written inside a function
    assert "ray.tune" in imports(ROOT / "trainable/ray_trainable.py") or "ray" in imports(ROOT / "trainable/ray_trainable.py")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_left(path: Path) -> None:
    place = PACKAGES.index(relative(path).split("/")[0])
    to_the_right = {name for name in imports(path) if name.split(".")[0] in PACKAGES[place + 1 :]}
    assert to_the_right == set()
    assert not any(name.split(".")[0] == "tests" for name in imports(path))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    used = {name.split(".")[0] for name in imports(path)}
    assert [library for library in used & set(HEAVY) if not relative(path).startswith(HEAVY[library])] == []


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_package_files_hold_a_docstring_only(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert len(tree.body) == 1, path
        assert ast.get_docstring(tree), path


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_opens_with_its_lesson(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), relative(path)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()


def test_the_four_names_belong_to_this_distribution_alone() -> None:
    owners = importlib.metadata.packages_distributions()
    assert {name: sorted(set(owners.get(name, []))) for name in PACKAGES} == {name: ["rin-search"] for name in PACKAGES}


def test_only_the_trial_knows_the_method_that_learns() -> None:
    """What generates, measures or judges reads episodes and log-probs, whichever method learns from them."""
    assert [relative(path) for path in MODULES if "trainable.grpo" in imports(path)] == ["trainable/trial.py"]


def test_records_of_a_rollout_are_read_without_torch() -> None:
    asked = "import sys, trainable.episode; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "False"


def test_what_reads_a_sweep_and_what_judges_it_need_neither_torch_nor_ray() -> None:
    modules = "arms", "report", "evidence", "objectives", "proposals", "statistics", "power", "sequential"
    code = f"import sys, {', '.join(f'search.{name}' for name in modules)}; print({{'torch', 'ray', 'mlflow'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


# A table and the Literal of the configuration that chooses from it.
CONTRACTS: list[tuple[dict[str, Any], Any]] = [
    (formats.FORMATS, config.Format),
    (quantization.SCALE_RULES, config.ScaleRule),
    (noise.SCHEDULES, config.Schedule),
    (noise.ZONES, config.Zone),
    (proposals.SEARCHERS, store.SearcherName),
    (objectives.OBJECTIVES, store.ObjectiveName),
]


@pytest.mark.parametrize(("table", "choices"), CONTRACTS, ids=["FORMATS", "SCALE_RULES", "SCHEDULES", "ZONES", "SEARCHERS", "OBJECTIVES"])
def test_a_table_and_the_configuration_name_the_same_choices_in_the_same_order(table: dict[str, Any], choices: Any) -> None:
    assert tuple(table) == get_args(choices)
