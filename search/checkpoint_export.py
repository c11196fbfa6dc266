"""The candidate's model, taken away: a folder that transformers and vLLM load, with how it computes and what it scores.

    choose     the candidate, the one that `--to yaml` takes; of its replicates the one with the median final accuracy
               (of an even number the lower of the two in the middle, of equals the first): the best one would be the
               luckiest one
    rebuild    the policy of its configuration with the weights that the trial ended with; adapters are merged into the
               base
    write      FOLDER: transformers' files with the clean master, unquantised; rin_quantization.json: how each linear
               layer computes; trial.yaml: the trial's configuration
    pack       FOLDER/packed: the same with MXFP4 weights, where that format can hold them (`trainable/packing.py`)
    measure    the trial's own questions once more: does the folder answer as the trial did, and what do other programs'
               scale rules cost

Full weights are proven: what was written is loaded again and must give the trial's answers, question by question.
Adapters are not the same after merging: in training the base alone was quantised and they ran beside it, afterwards
their sum is. So the answers are compared before merging, which proves base and adapters, and the accuracy after merging
is told beside it. A difference is told and nothing is refused: on another kind of machine a few answers differ by
rounding.

A head that computes in few bits is untied from its embedding, which does not: engines hold tied weights once.

The table of scale rules keeps the weights as packed and changes the rule of the inputs alone, because that is what a
program does that loads the packed form.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from search.arms import Candidate, trial_folder
from spaces.config import ConfigError, ModelConfig, TrialConfig
from spaces.reading import as_tree, dump_yaml
from trainable.disk.checkpoint import load_final
from trainable.disk.folder import Folder
from trainable.disk.trial_folder import FINAL_FILE, OUTCOME_FILE
from trainable.engines.engine import CONFIG_FILE, quantization_tree
from trainable.evaluation import Evaluation, evaluate
from trainable.outcome import Outcome
from trainable.packing import no_packed_form, pack_checkpoint, uneven_blocks
from trainable.policy.embedded import Progress
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, computing
from trainable.quantization import UNQUANTIZED, Arithmetic
from trainable.tasks.table import build_task

PACKED, TRIAL_FILE = "packed", "trial.yaml"
WHO = {
    "mxfp4": {
        "none": "vLLM before Blackwell (Marlin kernel; it warns)",
        "floor": "",
        "even": "transformers (compressed-tensors); vLLM --linear-backend emulation",
        "rceil": "vLLM on Blackwell (FlashInfer)",
    },
    "none": {
        "none": "transformers (compressed-tensors); vLLM before Blackwell (Marlin kernel)",
        "floor": "",
        "even": "vLLM --linear-backend emulation",
        "rceil": "vLLM on Blackwell (FlashInfer)",
    },
}
"""By the trial's format of inputs: which program quantises those of the packed form by which scale rule (`none`: not at
all). From the source of vLLM 0.32 and compressed-tensors 0.17 and 0.20; FlashInfer's rule from its documentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The trial that is exported."""

    candidate: Candidate
    replicate: int
    folder: Folder
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleAccuracy:
    """Greedy accuracy with the weights as packed and inputs by one scale rule."""

    rule: str
    trained: bool
    """The rule (or 16 bits) that the trial computed with."""
    by_dtype: dict[str, float]
    """Of everything around the packed weights: the trial's dtype, and bfloat16, the packed form's."""


def export_checkpoint(
    candidate: Candidate, folder: Path, say: Callable[[str], None] = print, progress: Progress | None = None
) -> None:
    """Write the folder and tell what was found.

    Raises ConfigError for a folder that holds something, and for a trial whose weights are missing or damaged.
    """
    _check_empty(folder)
    source = _median_trial(candidate)
    config, weights = source.outcome.config, _final_weights(source)
    with _threads(config.threads):
        policy = load_policy(config.model, config.quant, config.seed, progress)
        _restore(source, policy, weights)
        merging = config.model.adapter == "lora"
        proof = _evaluate(policy, config) if merging else None
        table = quantization_tree(policy.linears, synced=False)
        _make(folder)
        _write_plain(policy, folder, table)
        (folder / TRIAL_FILE).write_text(dump_yaml(as_tree(config)), encoding="utf-8")
        layers = {name: linear.arithmetic for name, linear in policy.linears.items()}
        alone = _only_here(policy)
        why_not = no_packed_form(Arithmetic.of(config.quant) if policy.quantized else UNQUANTIZED) or alone
        del policy
        if not why_not:
            pack_checkpoint(folder, folder / PACKED)
        uneven = [] if why_not else uneven_blocks(layers)
        say(f"wrote {folder}" + (f" and {folder / PACKED}" if not why_not else f"; no packed form: {why_not}"))
        if uneven:
            say(
                f"stock vLLM cannot load the packed form: it computes {uneven[0]} as one layer, "
                "and this arm quantises a part of it"
            )

        loaded = _evaluate(load_policy(_model_in(folder, config), config.quant, config.seed), config)
        found = [*_proof_lines(source.outcome, proof or loaded, merging=merging)]
        if merging:
            found.append(
                f"accuracy with the adapters merged into the base and quantised with it: {loaded.accuracy:.4f}"
            )
        _write_readme(folder, source, alone, why_not, uneven, found)
        for line in found:
            say(line)
        if not why_not:
            accuracies = _markdown(measure_rules(folder, config), config)
            _write_readme(folder, source, alone, why_not, uneven, found, accuracies)
            for line in accuracies:
                say(line)


# --- choose and rebuild -----------------------------------------------------------------------------------------------


def _median_trial(candidate: Candidate) -> Source:
    """Raises ConfigError for an arm of which no replicate completed."""
    arm = candidate.arm
    completed = [(run.eval.accuracy, number) for number, run in arm.results.items() if run.outcome == "completed"]
    if not completed:
        raise ConfigError(
            f"--arm {arm.name}: no replicate of it completed, so there is no model to export; name another arm"
        )
    _, replicate = sorted(completed)[(len(completed) - 1) // 2]
    folder = trial_folder(candidate.study, arm.name, replicate)
    return Source(candidate=candidate, replicate=replicate, folder=folder, outcome=arm.results[replicate])


def _final_weights(source: Source) -> dict[str, Tensor]:
    """Raises ConfigError, with the way to get them, when they are not there."""
    try:
        return load_final(source.folder)
    except ConfigError:  # of another version; a ValueError, too
        raise
    except ValueError as error:
        study = source.candidate.study
        raise ConfigError(
            f"{source.folder.uri}/{FINAL_FILE}: {error}; to run this trial again and keep its weights, remove "
            f"{source.folder.uri}/{OUTCOME_FILE} and then: {study.go_on} --store {study.store}"
        ) from None


def _restore(source: Source, policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Put the final weights into the policy. Raises ConfigError when they are another model's."""
    parameters = policy.trainable()
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in parameters.items()}
    if shapes != {name: (weight.shape, weight.dtype) for name, weight in weights.items()}:
        place, model = f"{source.folder.uri}/{FINAL_FILE}", source.outcome.config.model
        raise ConfigError(f"{place}: does not fit model.name={model.name}; use the model that the sweep was run with")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


# --- write ------------------------------------------------------------------------------------------------------------


def _check_empty(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"--output {folder}: exists and is no empty folder; give a new one, or remove it")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {folder}: {error.strerror}; give a folder that can be made") from None


def _write_plain(policy: Policy, folder: Path, table: Mapping[str, Any]) -> None:
    network: Any = policy.model
    if hasattr(network, "merge_and_unload"):
        network = network.merge_and_unload()
    head = policy.linears.get("lm_head")
    if head is not None and head.weight is network.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        network.config.tie_word_embeddings = False
    # Of what was read from a GGUF file: plain by now, and transformers would not write it.
    if getattr(network, "hf_quantizer", None) is not None:
        network.hf_quantizer = None
        del network.config.quantization_config
    network.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    (folder / CONFIG_FILE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


# --- measure ----------------------------------------------------------------------------------------------------------


def measure_rules(folder: Path, config: TrialConfig) -> list[RuleAccuracy]:
    """Accuracy of a written folder under each scale rule of the inputs, its weights on the grid that was trained."""
    trained = "none" if config.quant.activations == "none" else config.quant.scale_rule
    rules = list(dict.fromkeys((*WHO["mxfp4"], trained)))
    model = _model_in(folder, config)
    master = load_policy(model, config.quant, config.seed)
    weights = {name: master.linears[name].quantized_weight() for name in master.quantized}
    measured: dict[str, dict[str, float]] = {rule: {} for rule in rules}
    for dtype in dict.fromkeys((model.dtype, "bfloat16")):
        policy = load_policy(model.model_copy(update={"dtype": dtype}), config.quant, config.seed)
        for name, weight in weights.items():
            linear = policy.linears[name]
            linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
        for rule in rules:
            inputs = UNQUANTIZED if rule == "none" else Arithmetic(weights="none", activations="mxfp4", scale_rule=rule)
            with computing(policy, inputs):
                measured[rule][dtype] = _evaluate(policy, config).accuracy
    return [RuleAccuracy(rule=rule, trained=rule == trained, by_dtype=measured[rule]) for rule in rules]


def _model_in(folder: Path, config: TrialConfig) -> ModelConfig:
    return ModelConfig(name=str(folder.absolute()), dtype=config.model.dtype, attention=config.model.attention)


def _evaluate(policy: Policy, config: TrialConfig) -> Evaluation:
    task = build_task(config.task)
    return evaluate(policy, task, task.held_out(config.eval.split, config.eval.questions, config.eval.draw), config)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """As many as the trial had: sums depend on it."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


# --- tell -------------------------------------------------------------------------------------------------------------


def _proof_lines(outcome: Outcome, found: Evaluation, *, merging: bool) -> Iterator[str]:
    asked = outcome.eval.correct
    same = sum(one == other for one, other in zip(found.correct, asked, strict=True))
    what = "base and adapters, before merging," if merging else "the folder"
    yield f"{what} answered {same} of {len(asked)} questions as the trial did (accuracy {found.accuracy:.4f})"
    if same < len(asked):
        yield (
            "the weights are those that the trial kept; another machine, "
            "torch version or engine that generated there rounds otherwise"
        )


def _markdown(rows: Sequence[RuleAccuracy], config: TrialConfig) -> list[str]:
    """A table, which a terminal shows as well."""
    dtypes = list(rows[0].by_dtype)
    lines = [f"| inputs | {' | '.join(dtypes)} | who computes so |", f"|---|{'---|' * len(dtypes)}---|"]
    who_computes = WHO[config.quant.activations]
    for row in rows:
        accuracies = " | ".join(f"{row.by_dtype[dtype]:.4f}" for dtype in dtypes)
        who = "; ".join(filter(None, ["**as trained**" if row.trained else "", who_computes.get(row.rule, "")]))
        lines.append(f"| {'16 bits' if row.rule == 'none' else 'MXFP4, ' + row.rule} | {accuracies} | {who} |")
    return lines


def _write_readme(
    folder: Path,
    source: Source,
    alone: str,
    why_not: str,
    uneven: Sequence[str],
    found: Sequence[str],
    accuracies: Sequence[str] = ("(The export was interrupted before it was measured.)",),
) -> None:
    candidate, config = source.candidate, source.outcome.config
    runs, control = candidate.accuracies, candidate.control_accuracies
    asked = f"{len(source.outcome.eval.correct)} questions of the split `{config.eval.split}`"
    packing = f"There is none: {why_not}."
    if not why_not:
        split = UNEVEN.format(layer=uneven[0]) if uneven else ""
        packing = PACKING.format(split=split, config=config, asked=asked, accuracies="\n".join(accuracies))
    text = README.format(
        source=source,
        candidate=candidate,
        outcome=source.outcome,
        config=config,
        asked=asked,
        completed=len(runs),
        mean=fmean(runs),
        beside=f"{fmean(control):.4f}" if control else "no outcome",
        arithmetic=Arithmetic.of(config.quant),
        trial=TRIAL_FILE,
        found="\n".join(f"- {line}" for line in found),
        served=f"No other program computes with it as training did: {alone}.\n" if alone else SERVED,
        packing=packing,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _only_here(policy: Policy) -> str:
    """Why no other program computes with the folder in few bits as training did; else empty."""
    names = [name for name in policy.rearranged if name in policy.quantized]
    return f"{names[0]} lies otherwise in files than where it is quantised" if names else ""


SERVED = """\
Quantised as in training, in vLLM with the plug-in that comes with rin-search:

```sh
vllm serve FOLDER --quantization rin
```
"""

README = """\
# {candidate.study.name}: {candidate.arm.name}, replicate {source.replicate}

The model of an arm of the {candidate.study.kind} `{candidate.study.name}`, written by
`rin export {candidate.study.name} --to checkpoint`; {candidate.caveat}.

| | |
|---|---|
| arm | {candidate.arm.name} ({candidate.arm.origin}) |
| replicate | {source.replicate}, seed {config.seed}: the one with the median final accuracy of {completed} |
| step | {outcome.step} of {config.grpo.steps} |
| accuracy of that trial | {outcome.eval.accuracy:.4f}, greedy, {config.quant.mode}, {asked} |
| mean {candidate.study.measure} of the arm, of {candidate.control.name} | {mean:.4f}, {beside} |
| quantisation | {arithmetic} |
| configuration | `{trial}`; to train it again: `rin trial --config {trial}` |

{found}

## Load it

The clean, unquantised weights; `rin_quantization.json` says how each linear layer computes:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)  # unquantised
```

{served}
## The packed form

{packing}
"""

PACKING = """\
`packed/` holds the same model in compressed-tensors' `mxfp4-pack-quantized`: weights as 4-bit codes with the trial's
own scales, equal to those of training bit for bit, everything else in bfloat16. No plug-in is needed:

```sh
vllm serve FOLDER/packed
```

```python
model = AutoModelForCausalLM.from_pretrained("FOLDER/packed")  # pip install compressed-tensors
```

{split}The packed form says how weights are quantised and **not by which scale rule inputs are**: each program that
loads it has one of its own (`even` or `rceil`), and this trial's was `{config.quant.scale_rule}`. vLLM goes by the
weights alone: it quantises the inputs of a W4A16 model as well where its kernel can, leaves those of a W4A4 model at 16
bits where it cannot, and has no MXFP4 kernel for CPUs.

Greedy accuracy on the same {asked}, weights as packed, measured when this was written:

{accuracies}"""

UNEVEN = """\
Stock vLLM cannot load it: it computes `{layer}` as one layer, and this arm quantises a part of it. transformers can.

"""
