"""The watchdog in real processes: what hangs is killed, with evidence; what is quiet is left alone."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PRELUDE = """
import json, os, sys, time
from trainable.disk import watchdog
from trainable.disk.watchdog import Watchdog

def on_hang(phase, seconds, stacks):
    open("hang.json", "w").write(json.dumps({"phase": phase, "seconds": seconds, "stacks": stacks}))

def on_beat():
    open("beats", "a").write("x")
"""
NEVER_RELEASES_THE_LOCK = "import re; re.match('(a+)+$', 'a' * 200 + 'b')"


def child(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + script], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_phase_that_never_ends_is_killed_after_its_evidence_was_written(tmp_path: Path) -> None:
    done = child(
        tmp_path,
        """
def a_lost_file_server():
    time.sleep(3600)

dog = Watchdog(0.3, on_hang, on_beat)
dog.enter("load")
dog.enter("rollout")
a_lost_file_server()
""",
    )
    assert done.returncode == -signal.SIGKILL
    evidence = json.loads((tmp_path / "hang.json").read_text())
    assert evidence["phase"] == "rollout"
    assert evidence["seconds"] > 0.3
    assert "a_lost_file_server" in evidence["stacks"]


def test_a_call_that_never_gives_the_lock_back_is_ended_by_the_backstop_with_its_stack(tmp_path: Path) -> None:
    done = child(
        tmp_path,
        f"""
def an_endless_c_call():
    {NEVER_RELEASES_THE_LOCK}

watchdog.BACKSTOP_SECONDS = 0.5
dog = Watchdog(0.5, on_hang, on_beat)
dog.enter("rollout")
an_endless_c_call()
""",
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr
    assert "an_endless_c_call" in done.stderr
    assert not (tmp_path / "hang.json").exists(), "the watching thread could not run, so this was the backstop"


def test_the_backstop_works_where_stderr_has_no_file_descriptor(tmp_path: Path) -> None:
    """As in a process whose output somebody captures."""
    done = child(
        tmp_path,
        f"""
import io
sys.stderr = io.StringIO()
watchdog.BACKSTOP_SECONDS = 0.5
dog = Watchdog(0.5, on_hang, on_beat)
dog.enter("rollout")
{NEVER_RELEASES_THE_LOCK}
""",
    )
    assert (done.returncode, "Timeout" in done.stderr) == (1, True)


def test_a_quiet_phase_is_never_killed_however_long_it_is(tmp_path: Path) -> None:
    done = child(
        tmp_path,
        """
watchdog.BACKSTOP_SECONDS = 0.2
dog = Watchdog(0.2, on_hang, on_beat)
time.sleep(1)          # before the first phase
dog.enter("update")
dog.enter("")          # between two steps
time.sleep(2)
print("alive")
""",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
    assert not (tmp_path / "hang.json").exists()


def test_each_phase_has_the_whole_limit_for_itself(tmp_path: Path) -> None:
    done = child(
        tmp_path,
        """
watchdog.BACKSTOP_SECONDS = 0.1
dog = Watchdog(1.5, on_hang, on_beat)
for step in range(6):
    dog.enter("rollout")
    time.sleep(0.5)
print("alive")
""",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


def test_nothing_is_killed_after_stop(tmp_path: Path) -> None:
    done = child(
        tmp_path,
        """
watchdog.BACKSTOP_SECONDS = 0.1
dog = Watchdog(0.3, on_hang, on_beat)
dog.enter("rollout")
dog.stop()
time.sleep(1.5)
print("alive")
""",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr
    assert not (tmp_path / "hang.json").exists()


def test_beats_come_in_busy_and_quiet_phases_and_end_with_stop(tmp_path: Path) -> None:
    done = child(
        tmp_path,
        """
watchdog.BEAT_SECONDS = 0.0
def beats():
    return os.path.getsize("beats") if os.path.exists("beats") else 0

dog = Watchdog(4.0, on_hang, on_beat)
for phase in ("", "rollout"):
    dog.enter(phase)
    before, deadline = beats(), time.monotonic() + 60
    while beats() == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        dog.enter(phase)
dog.stop()
before = beats()
time.sleep(2.5)
assert beats() == before
""",
    )
    assert done.returncode == 0, done.stderr


def test_a_hang_whose_evidence_cannot_be_written_is_killed_all_the_same(tmp_path: Path) -> None:
    done = child(
        tmp_path,
        """
def full(phase, seconds, stacks):
    raise OSError("No space left on device")

dog = Watchdog(0.3, full, on_beat)
watchdog.BACKSTOP_SECONDS = 1.0
dog.enter("rollout")
time.sleep(60)
print("alive")
""",
    )
    assert done.returncode != 0
    assert "alive" not in done.stdout
