"""Where `rin` starts: a person's packages of our names are told of in one line."""

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_architecture import MODULES, PACKAGES, ROOT

RIN = ROOT / "dashboards" / "rin"
SCRIPT = runpy.run_path(str(RIN))
START = [
    sys.executable,
    "-c",
    f"import sys, runpy; del sys.path[0]; sys.argv[0] = 'rin'; runpy.run_path({str(RIN)!r}, run_name='__main__')",
]


def test_ours_are_no_namesakes() -> None:
    assert tuple(SCRIPT["KNOWN_BY"]) == PACKAGES
    assert all((ROOT / package / f"{module}.py").is_file() for package, module in SCRIPT["KNOWN_BY"].items())
    assert SCRIPT["namesake"]() is None


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("file", ["{}.py", "{}/__init__.py"])
def test_a_person_s_package_or_module_of_one_of_our_names_is_one_line(name: str, file: str, tmp_path: Path) -> None:
    """On PYTHONPATH, and by an empty entry of it in the current directory."""
    mine = tmp_path / file.format(name)
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("")
    for path, here in ((str(tmp_path), ROOT.parent), ("", tmp_path)):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, str(ROOT)])}
        done = subprocess.run([*START, "list"], cwd=here, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        place = mine.parent if file.startswith("{}/") else mine
        assert done.stderr.splitlines() == [
            f"rin: PYTHONPATH: another package named {name} hides ours ({place}); "
            "take its folder off PYTHONPATH, or start rin elsewhere"
        ]


def test_no_other_python_is_started_that_looks_into_the_current_directory_first() -> None:
    """`python -m` does, unless -P says otherwise."""
    started = [line for path in MODULES for line in re.findall(r"sys\.executable, .*", path.read_text())]
    assert len(started) >= 3
    assert [line for line in started if '"-m"' in line and '"-P", "-m"' not in line] == []


def test_the_program_is_a_script_of_the_distribution_and_no_entry_point() -> None:
    """An entry point is a module, of a name that a person may have too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["script-files"] == ["dashboards/rin"]
    assert "scripts" not in project["project"]
    installed = Path(sys.executable).with_name("rin").read_text().partition("\n")
    assert installed[0].startswith("#!/")
    assert installed[2] == RIN.read_text().partition("\n")[2]


def recipe(target: str, **given: str) -> str:
    """What make would run."""
    command = ["make", "-n", "--no-print-directory", target, *(f"{name}={value}" for name, value in given.items())]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout


def test_make_sets_up_what_it_needs_and_the_limit_of_coverage_is_that_of_the_run_that_has_everything() -> None:
    """On a fresh machine `make test` once failed by a limit that only a run with vLLM reaches."""
    fresh = recipe("test", VENV="/nowhere/venv", CI="")
    assert "-m venv /nowhere/venv" in fresh
    assert "vllm" in fresh
    assert "--cov" not in fresh
    counted = recipe("test", VENV="/nowhere/venv", CI="true")
    assert "--cov" in counted
    assert "--cov-fail-under" in counted
    assert recipe("ui", VENV="/nowhere/venv").splitlines()[-1].split() == ["/nowhere/venv/bin/rin", "ui"], "the newest"
