"""The trainings that a scan is held against: each layer and zone in 16 bits, and noise in one zone at a time.

A row per run is appended to a file as the run ends, so that a killed measurement goes on where it was. A row belongs to
its configuration and to the code that made it (sources of `spaces` and `trainable`, versions of the libraries): what
another code made is run again and never read. Each run has one thread, so its numbers do not depend on how many
run beside it.

Lifts go with `control`, noise with `control-resample`: a control shares seeds and filter policy. A zone of one layer is
that layer, lifted once.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from spaces.cache import cache_folder
from spaces.config import TrialConfig
from spaces.reading import as_tree, read_config
from trainable.noise import ZONES, zone_layers
from trainable.trial import run_trial

ROOT = Path(__file__).parents[2]
CONTROL, FILTERED = "control", "control-resample"
COST_SIGMA = 0.05
"""Of the first noisy stage; the last one's is a hundredth, as in the plan's baseline. What it costs in one zone is
measured with all seeds."""
STAIRS = 8
STAIR = 2**0.5
"""A zone's tolerance is looked for by the up-and-down method (Dixon & Mood 1948): the first run at COST_SIGMA, each
next one with the next seed and a stair higher after a run that held, lower after one that broke. That puts the runs
where half of them break, which is what is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Example: Wanted(arm="lift-3", config=TrialConfig(quant={"skip_layers": [3]}, ...))."""

    arm: str
    config: TrialConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A run that is over; accuracies are shares of the selection questions."""

    key: str
    code: str
    arm: str
    seed: int
    sigma: float
    """`noise.sigma_start`; 0 of a lift and of a control."""
    outcome: str
    rule: str
    steps: int
    accuracy: float
    """Greedy in the deployed precision: a lifted layer stays in 16 bits."""
    accuracy_bf16: float
    """Of the unquantised twin: what was learned, whatever it is deployed in."""
    accuracy_start: float
    accuracy_bf16_start: float
    seconds: float


def lift_arm(layers: Sequence[int]) -> str:
    return "lift-" + "-".join(str(layer) for layer in layers)


def noise_arm(zone: str, sigma: float) -> str:
    return f"noise-{zone}-{sigma:g}"


def lifts(quiet: Mapping[str, Any], depth: int) -> list[Wanted]:
    arms = dict.fromkeys([*((layer,) for layer in range(depth)), *(zone_layers(zone, depth) for zone in ZONES)])
    return [
        Wanted(arm=CONTROL, config=read_config(quiet)),
        *(
            Wanted(arm=lift_arm(layers), config=read_config(quiet, [f"quant.skip_layers={list(layers)}"]))
            for layers in arms
        ),
    ]


def noisy(quiet: Mapping[str, Any], zone: str, sigma: float) -> Wanted:
    noise = {"sigma_start": sigma, "sigma_end": sigma / 100, "layers": zone, "modules": ["linear"]}
    config = read_config({**quiet, "noise": noise}, ["grpo.filter_groups=resample"])
    return Wanted(arm=noise_arm(zone, sigma), config=config)


def next_sigma(climbed: Iterable[Row]) -> float:
    """Of a zone's next run on its stairs, after those so far."""
    return float(f"{COST_SIGMA * STAIR ** sum(-1 if row.outcome == 'collapsed' else 1 for row in climbed):.4g}")


def measure(settings: Mapping[str, Any], depth: int, seeds: int, run: Callable[[list[Wanted]], list[Row]]) -> list[Row]:
    """Seed by seed, with the stairs between, so that what a stopped measurement has is balanced; `settings` lie under
    every run. A run that is wanted twice is there once."""
    rows: list[Row] = []
    climbed: dict[str, list[Row]] = {zone: [] for zone in ZONES}

    def quiet(seed: int) -> dict[str, Any]:
        return {**settings, "seed": seed, "threads": 1, "noise": {"sigma_start": 0.0}}

    for number in range(max(seeds, STAIRS // 2)):
        if number < seeds:
            filtered = Wanted(arm=FILTERED, config=read_config(quiet(number), ["grpo.filter_groups=resample"]))
            rows += run([*lifts(quiet(number), depth), filtered])
            rows += run([noisy(quiet(number), zone, COST_SIGMA) for zone in ZONES])
        for stair in (2 * number, 2 * number + 1):
            if stair < STAIRS:
                higher = run([noisy(quiet(stair), zone, next_sigma(climbed[zone])) for zone in ZONES])
                for zone, row in zip(ZONES, higher, strict=True):
                    climbed[zone].append(row)
                rows += higher
    return list({row.key: row for row in rows}.values())


def code_version() -> str:
    """Of all that a trial's numbers depend on besides its configuration."""
    digest = hashlib.sha256()
    sources = (path for package in ("spaces", "trainable") for path in (ROOT / package).rglob("*"))
    for path in sorted(path for path in sources if path.suffix in (".py", ".cpp", ".cu")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(" ".join(version(name) for name in ("torch", "numpy", "transformers")).encode())
    return digest.hexdigest()[:12]


def key_of(config: TrialConfig, code: str) -> str:
    return hashlib.sha256(f"{code} {json.dumps(as_tree(config), sort_keys=True)}".encode()).hexdigest()[:16]


def run_one(wanted: Wanted, code: str) -> Row:
    loop = run_trial(wanted.config)
    while True:
        try:
            next(loop)
        except StopIteration as end:
            outcome = end.value
            break
    scores = outcome.eval
    return Row(
        key=key_of(wanted.config, code),
        code=code,
        arm=wanted.arm,
        seed=wanted.config.seed,
        sigma=wanted.config.noise.sigma_start,
        outcome=outcome.outcome,
        rule=outcome.rule,
        steps=outcome.step,
        accuracy=scores.accuracy,
        accuracy_bf16=scores.accuracy_bf16,
        accuracy_start=scores.accuracy_start,
        accuracy_bf16_start=scores.accuracy_bf16_start,
        seconds=outcome.seconds,
    )


def rows_file() -> Path:
    return cache_folder() / "science" / "scan-runs.jsonl"


def read_rows(path: Path, code: str) -> dict[str, Row]:
    """Rows of this code by key. The line that a kill cut off is no row, and is run again."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last line's end was cut off
    rows = [Row(**json.loads(line)) for line in lines if line]
    return {row.key: row for row in rows if row.code == code}


class Runner:
    """Runs what is not in the file of rows, and writes it there. Use as a context: it holds worker processes."""

    def __init__(self, path: Path, workers: int, said: Callable[[Row], None] = lambda row: None) -> None:
        self.code = code_version()
        self.known = read_rows(path, self.code)
        self.said = said
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.file = path.open("r+b", buffering=0)
        self.file.seek(path.read_bytes().rfind(b"\n") + 1)  # over a line that a kill cut off
        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.file.close()

    def __call__(self, wanted: list[Wanted]) -> list[Row]:
        """The rows of all that is wanted, in its order."""
        keys = [key_of(run.config, self.code) for run in wanted]
        missing = {key: run for key, run in zip(keys, wanted, strict=True) if key not in self.known}
        for future in as_completed([self.pool.submit(run_one, run, self.code) for run in missing.values()]):
            row = future.result()
            self.file.write(json.dumps(asdict(row)).encode() + b"\n")
            os.fsync(self.file.fileno())
            self.known[row.key] = row
            self.said(row)
        return [self.known[key] for key in keys]
