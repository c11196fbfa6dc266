"""`python -m tests.benchmarks.models`: what a trial says to every architecture of `tests/zoo.py`, as docs/models.md.

Random models of two layers; a minute on one core. `tests/test_models.py` holds each row to the same table.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

from transformers.utils import logging

from spaces.config import ConfigError
from tests.zoo import ZOO, Row, network_of, trial_of
from trainable.engines.served import measured
from trainable.forward.logps import packs
from trainable.policy.policy import Policy, after_block, any_number, block_of

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_SMALL = 4
"""Outputs of a router in the zoo, at most."""

HEAD = """\
# Which architectures train

Made by `python -m tests.benchmarks.models` from tiny random models (two blocks, hidden size 64) of transformers' own
classes; CI holds every row to it (`tests/test_models.py`). A model that is not here is asked the same questions when a
trial loads it.

**yes**: with nothing quantised, in fp32, training's log-probs and those of generation are within 1e-4 nats of
transformers' own; every weight of the blocks is accounted for; a step in W4A4 with noise on every word of the last
column was made, with full weights and with LoRA; the noise was out again, bit for bit. **refused**: the one line that
is said before step 0, with the remedy where one was tried and helps.

- *quantised*: the share of the text model's block matrices that computes in W4A4. Routers, convolutions and decay rates
  are a larger share of a tiny model than of a real one.
- *left out*: what gets neither few bits nor noise nor adapters, as the receipt names it. Routers and gates that are
  plain linear layers, and linear layers beside the blocks, are quantised like any other (*quantised too*); name them in
  `quant.exclude` to keep them in 16 bits.
- *rows*: completions share one row with their prompt where that was shown to be equal; with rows of their own training
  computes the prompt once for each.
- *noise.modules*: the words that it has targets for, and how many targets a block has (in hybrids on average); `linear`
  is there always. `rmsnorm` are RMSNorms in front of attention and MLP, `post_norm` behind them, `qk_norm` of queries
  and keys; 1 + w: so the gain is stored. In brackets what is no target: LayerNorm, norms without a gain, norms
  elsewhere in a block.
- *vLLM*: whether `rollout.backend=vllm` serves it, as measured with vLLM {vllm} on a CPU on {date}
  (`python -m tests.benchmarks.served`): the gate agreed in W4A4 and with nothing quantised, or what was said instead.
  What is refused here is refused in one line before an engine starts, on a CPU; a variant of a type that is served
  otherwise when the engine starts, or by the gate.

| architecture | trains | vLLM | quantised | left out | rows | noise.modules |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    head = HEAD.format(**measured())
    PAGE.write_text(head + "".join(f"| {' | '.join(_cells(name, row))} |\n" for name, row in ZOO.items()))
    print("wrote docs/models.md")


def _cells(name: str, row: Row) -> Iterator[str]:
    yield name.removesuffix("_eager").removesuffix("_excluded")
    given = [f"model.attention={row.attention}"] if row.attention != "sdpa" else []
    given += [f"quant.exclude=[{', '.join(row.exclude)}]"] if len(row.exclude) > 1 else []
    setting = f"with {' '.join(f'`{one}`' for one in given)}" if given else ""
    try:
        policy = trial_of(row, network_of(row)).policy
    except ConfigError as error:
        yield " ".join(filter(None, ["**refused**", setting])) + f": `{error}`"
        yield from ("", "", "", "", "")
        return
    ours = policy.coverage.weights - _of_other_towers(policy)
    yield " ".join(filter(None, ["yes", setting]))
    yield on_vllm(name)
    yield f"{100 * policy.coverage.quantized / ours:.1f} %".replace("100.0 %", "100 %")
    yield "; ".join([*_left_out(policy), *_small(policy)])
    yield "shared" if packs(policy) else "own"
    yield _norms(policy)


def on_vllm(name: str) -> str:
    """Of an architecture that trains."""
    row = measured()["rows"].get(name)
    return "not tried" if row is None else f"refused: `{row['refused']}`" if row["refused"] else "serves"


def _of_other_towers(policy: Policy) -> int:
    return sum(entry.weights for entry in policy.coverage.left_out if entry.reason == "not of the text model")


def _left_out(policy: Policy) -> Iterator[str]:
    by_reason: dict[str, list[str]] = {}
    for entry in policy.coverage.left_out:
        by_reason.setdefault(entry.reason, []).append(
            after_block(entry.name.replace(".*.", ".0.")).replace(".0.", ".*.")
        )
    for reason, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"`{names[0]}`{more}: {reason}"


def _small(policy: Policy) -> Iterator[str]:
    """Routers, gates, and linear layers beside the blocks."""
    names = [
        any_number(after_block(name))
        for name in policy.quantized
        if block_of(name) is None or policy.linears[name].out_features <= _SMALL
    ]
    if names:
        yield f"*quantised too*: {', '.join(f'`{name}`' for name in dict.fromkeys(names))}"


def _norms(policy: Policy) -> str:
    words = list(policy.norm_targets.values())
    plus = " (1 + w)" if 1.0 in policy.gain_offsets.values() else ""
    ours = ", ".join(f"{word} {words.count(word) / policy.depth:g}" for word in dict.fromkeys(sorted(words)))
    others = [
        f"{kind.removesuffix(', ' + place)}, {'' if place == 'inside' else 'as '}{place}"
        for kind in policy.norm_kinds
        if (place := kind.split(", ")[-1]) not in ("final", "beside")
        and (not kind.startswith("rmsnorm, gain") or place == "inside")
    ]
    return " ".join(filter(None, [ours + (plus if ours else ""), f"[{'; '.join(others)}]" if others else ""]))


if __name__ == "__main__":
    main()
