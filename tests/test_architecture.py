"""The house keeps its order: imports point left, tables and the configuration's choices name the same things."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from search import objectives, proposals, store
from spaces import config, formats
from trainable import negative_controls, noise, quantization

ROOT = Path(__file__).parents[1]
PACKAGES = ("spaces", "trainable", "search", "dashboards")  # left to right
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Who may import what: the heavy libraries by the packages (or the one file) that are there for them.
HEAVY = {
    "torch": ("trainable/", "search/", "dashboards/"),
    "transformers": ("trainable/", "search/", "dashboards/"),
    "ray": ("trainable/ray_trainable.py", "trainable/ray_ranks.py", "search/", "dashboards/"),
    "mlflow": ("search/", "dashboards/"),
    "optuna": ("search/", "dashboards/"),
    "rich": ("dashboards/",),
    "typer": ("dashboards/",),
    "plotly": ("dashboards/",),
    "pandas": ("dashboards/",),
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
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            argument = node.args[0]
            yield argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else ""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_walk_sees_all_four_packages_and_imports_inside_functions() -> None:
    assert {relative(path).split("/")[0] for path in MODULES} == set(PACKAGES)
    assert "peft" in imports(ROOT / "trainable/policy/loading.py")  # written inside a function
    assert "ray.tune" in imports(ROOT / "trainable/ray_trainable.py") or "ray" in imports(
        ROOT / "trainable/ray_trainable.py"
    )


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


# What other libraries keep to themselves, by the file that touches it: names beginning with `_`, and those of INSIDE. A
# version of theirs may take any of it away, so each is pinned in pyproject.toml and lies where one reader finds it. The
# table may only shrink.
INSIDE = {"ray.tune.execution", "ray.tune.utils", "ray.dashboard", "vllm.distributed", "vllm.model_executor", "vllm.v1"}
INSIDE |= {"engine_core", "hf_quantizer", "mlflow.sharedViewState", "mlflow.loggedArtifacts"}
PRIVATE: dict[str, set[str]] = {
    "dashboards/mlflow_views.py": {"mlflow.sharedViewState"},
    "search/checkpoint_export.py": {"hf_quantizer"},
    "search/ray_internals.py": {"ray._private", "ray.tune.execution", "_do_request"},
    "search/smooth_gp.py": {"_rng"},
    "search/tracking.py": {"mlflow.loggedArtifacts"},
    "trainable/counting.py": {
        "_fused_adamw_",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_attention_math",
        "torch.utils._python_dispatch",
        "torch.utils._pytree",
    },
    "trainable/engines/vllm.py": {"engine_core", "vllm.distributed", "vllm.model_executor", "vllm.v1"},
    "trainable/again.py": {"_version"},
    "trainable/inside_trl.py": {
        "_generate",
        "_get_per_token_logps_and_entropies",
        "_last_loaded_step",
        "_metrics",
        "_step",
    },
    "trainable/layers/experts.py": {"_apply_gate"},
    "trainable/policy/attention.py": {"_attn_implementation"},
}


def private(path: Path) -> set[str]:
    """What a file takes from inside other libraries; `_names` that it defines itself are its own."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{node.attr}"
    } & {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    used: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for name in (f"{origin}{alias.name}" for alias in node.names):
                parts = name.split(".")
                used |= {module for module in INSIDE if f"{name}.".startswith(f"{module}.")}
                used |= {".".join(parts[: depth + 1]) for depth, part in enumerate(parts) if hidden(part)}
        elif isinstance(node, ast.Attribute) and (node.attr in INSIDE or (hidden(node.attr) and node.attr not in own)):
            used.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            name = ast.unparse(node.args[1]).strip("'")
            used |= {name} if name in INSIDE or (hidden(name) and name not in own) else set()
        elif isinstance(node, ast.keyword) and node.arg is not None and hidden(node.arg):
            used.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            used |= {tag for tag in INSIDE if tag.startswith("mlflow.") and node.value.startswith(tag)}
    return used


def hidden(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_what_others_keep_to_themselves_is_touched_where_the_table_says(path: Path) -> None:
    assert private(path) - PRIVATE.get(relative(path), set()) == set()


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import ray._private.services", {"ray._private"}),
        ("from ray._private import ray_constants", {"ray._private"}),
        ("from ray.tune.execution import class_cache", {"ray.tune.execution"}),
        ("import ray.tune.execution.class_cache", {"ray.tune.execution"}),
        ("from ray import tune", set()),
        (
            "from search.cluster import _taken",
            {"search.cluster._taken"},
        ),  # our own modules have secrets from each other, too
        ("cluster._taken()", {"_taken"}),
        ("client._do_request()", {"_do_request"}),
        ("getattr(client, '_do_request')", {"_do_request"}),
        ("load(_attn_implementation='sdpa')", {"_attn_implementation"}),
        ("self._x = 1\nprint(self._x)", set()),
        ("other._x = 1", {"_x"}),
        ("def _f(): ...\nmodule._f()", set()),
        ("engine.engine_core", {"engine_core"}),
        ("TAG = f'mlflow.sharedViewState.{key}'", {"mlflow.sharedViewState"}),
        ("x.__dict__", set()),
    ],
)
def test_the_walk_finds_what_is_private(line: str, found: set[str], tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(line)
    assert private(tmp_path / "module.py") == found


def test_what_is_taken_from_inside_ray_is_there() -> None:
    """Two of them are written to: a new name of Ray's would be written to without effect."""
    from ray._private import ray_constants
    from ray.job_submission import JobSubmissionClient
    from ray.tune.execution import class_cache

    source = inspect.getsource(class_cache)  # and not its value, from which other tests have taken the keys
    assert len(re.findall(r"\bENV_VARS_TO_PROPAGATE\b", source)) > 1
    assert all(key in source for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)
    assert ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR == "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    assert callable(JobSubmissionClient._do_request)


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
    """What generates, measures or judges reads episodes and log-probs, whichever method learns from them. A scan of
    what a step leaves behind makes one, and what a step holds is counted on one."""
    learning = ["trainable/footprint.py", "trainable/trial.py", "trainable/update_side.py"]
    assert [relative(path) for path in MODULES if "trainable.grpo" in imports(path)] == learning


@pytest.mark.slow
def test_records_of_a_rollout_are_read_without_torch() -> None:
    asked = "import sys, trainable.episode; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "False"


@pytest.mark.slow
def test_what_reads_a_sweep_and_what_judges_it_need_neither_torch_nor_ray() -> None:
    modules = "arms", "report", "evidence", "objectives", "proposals", "statistics", "power", "sequential", "confirm"
    code = (
        f"import sys, dashboards.report_text, dashboards.frames, {', '.join(f'search.{name}' for name in modules)}; "
        "print({'torch', 'ray', 'mlflow', 'sklearn'} & set(sys.modules))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )


@pytest.mark.slow
def test_who_drives_a_sweep_never_imports_torch(tmp_path: Path) -> None:
    """Its trials' processes do, and the one that builds what all of them build."""
    code = """
import sys
import dashboards.live, dashboards.sweep_cli, dashboards.sweep_text, search.confirm, search.followup
from search.lineup import fixed_arms
from search.plan import plan_study
from search.preflight import check_sources
from search.store import StudyConfig, default_tracking_uri
from search.study import run_study
from spaces.library import SPACES

study = StudyConfig(name="s", space=SPACES["sigma"], store=sys.argv[1], tracking_uri=default_tracking_uri(sys.argv[1]))
check_sources(study, fixed_arms(study))
plan_study(study, 2)
print({"torch", "transformers"} & set(sys.modules))
"""
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


# A table and the Literal of the configuration that chooses from it.
CONTRACTS: list[tuple[dict[str, Any], Any]] = [
    (formats.FORMATS, config.Format),
    (quantization.SCALE_RULES, config.ScaleRule),
    (noise.SCHEDULES, config.Schedule),
    (noise.ZONES, config.Zone),
    (negative_controls.REWARDS, config.LearnedFrom),
    (proposals.SEARCHERS, store.SearcherName),
    (objectives.OBJECTIVES, store.ObjectiveName),
]


@pytest.mark.parametrize(
    ("table", "choices"),
    CONTRACTS,
    ids=["FORMATS", "SCALE_RULES", "SCHEDULES", "ZONES", "REWARDS", "SEARCHERS", "OBJECTIVES"],
)
def test_a_table_and_the_configuration_name_the_same_choices_in_the_same_order(
    table: dict[str, Any], choices: Any
) -> None:
    assert tuple(table) == get_args(choices)


METRIC = re.compile(r"(rin|grpo|filter|gen|rollout_corr|eval|perf)/[a-z_0-9]+")


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_metrics_are_spelled_where_their_meaning_stands(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    spelled = {found[0] for node in constants if id(node) not in prose and (found := METRIC.search(node.value))}
    assert spelled == set() or relative(path).endswith("/metrics.py")


def test_every_signal_has_one_name_and_every_name_a_meaning() -> None:
    from dataclasses import fields

    from trainable.metrics import METRICS
    from trainable.signals import NAMES, Signals

    assert set(NAMES) == {field.name for field in fields(Signals)} - {"rewards"}
    assert len(set(NAMES.values())) == len(NAMES)
    assert all(METRICS.values())


def test_no_module_imports_itself_through_others() -> None:
    """Imports at the top of modules; those inside functions and under TYPE_CHECKING may point anywhere to the left."""

    def top(path: Path) -> set[str]:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found = {node.module for node in body if isinstance(node, ast.ImportFrom) and node.module}
        found |= {
            f"{node.module}.{name.name}" for node in body if isinstance(node, ast.ImportFrom) for name in node.names
        }
        return found | {name.name for node in body if isinstance(node, ast.Import) for name in node.names}

    names = {relative(path).removesuffix(".py").replace("/", "."): path for path in MODULES}
    arrows = {name: top(path) & names.keys() - {name} for name, path in names.items()}
    while free := [name for name, to in arrows.items() if not to]:
        arrows = {name: to - set(free) for name, to in arrows.items() if name not in free}
    assert arrows == {}


def test_every_package_is_in_the_distribution() -> None:
    """setuptools is given a list; a folder that it lacks is missing after an installation, and one too many ends it."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {relative(path.parent).replace("/", ".") for path in MODULES if path.name == "__init__.py"}
    assert sorted(listed) == sorted(folders)
    assert all((ROOT / folder.replace(".", "/") / "py.typed").exists() for folder in folders)


def test_a_sweep_is_told_on_one_page() -> None:
    """It is what everybody reads first, and what every change would like to add a few lines to."""
    assert len((ROOT / "search" / "study.py").read_text().splitlines()) < 200


def programs_as_text() -> Iterator[tuple[str, str]]:
    """What tests give to another Python: texts at the top of a file that begin with an import."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                    if text.lstrip().startswith(("import ", "from ")):
                        yield f"{relative(path)}:{name}", text


@pytest.mark.parametrize(("name", "program"), programs_as_text())
def test_programs_kept_as_text_know_every_name_they_use(name: str, program: str) -> None:
    """No linter looks into a string: a line that an editor's replacement put there is found here, before it is run."""
    ruff = [Path(sys.executable).with_name("ruff"), "check", "--isolated", "--quiet", "--select", "F821", "-"]
    found = subprocess.run(ruff, input=program, capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"{name}: {found.stdout}"
