"""What Tab offers behind `rin`, by the protocol that the shells' scripts speak."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer

from dashboards import cli, completion
from search.export import EXPORTS
from search.trash import delete
from spaces.config import TrialConfig
from spaces.library import SPACES
from spaces.reading import flatten_fields
from tests import processes
from tests.written_sweeps import make_arm, study, write_sweep

RIN = Path(sys.executable).parent / "rin"


def offered(line: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For the word that ends the line; none of its own where the line ends in a space."""
    words = line.split()
    monkeypatch.setenv(completion.ASKED, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(words) - (not line.endswith(" "))))
    done = processes.rin(cwd=cwd)
    assert (done.code, done.err) == (0, "")
    return done.out.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a store, another one, and one sweep in the trash."""
    for store, name in (("runs", "one"), ("runs", "two"), ("runs", "gone"), ("other", "three")):
        config = study(tmp_path / store, name=name, trials=2)
        arms = [make_arm(config, "control"), make_arm(config, "c01", origin="searcher")]
        write_sweep(config, arms, {})
        if name == "gone":
            delete(config)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rin st", ["status"]),
        ("rin status ", ["one", "two"]),
        ("rin status t", ["two"]),
        ("rin report one ", ["one", "two"]),
        ("rin status --store other ", ["three"]),
        ("rin sweep --store other --from ", ["three"]),
        ("rin sweep --ablate o", ["one"]),
        ("rin status --store s3://bucket/runs ", []),
        ("rin status --store nowhere ", []),
        ("rin restore ", ["gone"]),
        ("rin note tw", ["two"]),
        ("rin export one --arm ", ["c01"]),
        ("rin confirm --arm ", []),
        ("rin sweep ", list(SPACES)),
        ("rin plan w4", ["w4a4", "w4a8", "w4a16"]),
        ("rin sweep --workload ti", ["tiny"]),
        ("rin sweep --points control,e13m", ["control,e13m-rmsnorm"]),
        ("rin trial e13m", ["e13m-rmsnorm"]),
        ("rin sweep --set noise.si", ["noise.sigma_start=", "noise.sigma_end="]),
        ("rin trial control --set ", [f"{key}=" for key in flatten_fields(TrialConfig)]),
        ("rin sweep --objective p", ["pass@"]),
        ("rin export --to ", [*EXPORTS, "checkpoint"]),
        ("rin report --h", ["--html", "--help"]),
        ("rin export --output ", []),  # a file, which the shell completes
    ],
)
def test_tab_offers_the_words_that_the_place_takes(
    line: str, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offered(line, folder, monkeypatch) == words


def test_every_row_of_the_table_belongs_to_a_parameter_and_every_set_and_name_has_one() -> None:
    rows, missing = set(), []

    def walk(command: Any, path: str = "") -> None:
        for parameter in command.params:
            flag = max(parameter.opts, key=len)
            name = flag if flag.startswith("-") else flag.upper()
            rows.update({name, f"{path}{name}"} & completion.WORDS.keys())
            if name in ("--set", "NAME", "--workload") and "shell_complete" not in vars(parameter):
                missing.append(f"{path}{name}")
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{path}{name} ")

    walk(completion.offering(typer.main.get_command(cli.app)))
    assert (rows, missing) == (set(completion.WORDS), [])


@pytest.mark.parametrize(("shell", "said"), [("zsh", '"two"'), ("fish", "two")])
def test_zsh_and_fish_are_answered_in_their_own_way(
    shell: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(completion.ASKED, f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "rin status t")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    done = processes.rin(cwd=folder)
    assert (done.code, said in done.out, "one" in done.out) == (0, True, False)


@pytest.mark.slow
def test_bash_completes_by_the_script_that_is_installed_within_a_moment(folder: Path) -> None:
    environment = {**os.environ, "HOME": str(folder), "PATH": f"{RIN.parent}:{os.environ['PATH']}"}
    installed = subprocess.run(
        [str(RIN), "--install-completion", "bash"],
        env={**environment, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert installed.returncode == 0, installed.stderr
    script = folder / ".bash_completions" / "rin.sh"
    assert str(script) in (folder / ".bashrc").read_text()
    ask = f"source {script}; COMP_WORDS=(rin status t); COMP_CWORD=2; _rin_completion rin; echo ${{COMPREPLY[@]}}"
    before = time.process_time(), os.times().children_user
    done = subprocess.run(
        ["bash", "-c", ask], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout.strip(), done.stderr) == ("two", "")
    assert os.times().children_user - before[1] < 2, "seconds of CPU, at each Tab"
