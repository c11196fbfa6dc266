"""A candidate's configuration, taken away: a YAML file that runs again, or what another trainer understands.

What a candidate is, and what must be known of it, says `search/arms.py`; how another trainer says a setting,
`search/dialects.py`. What a trainer has no key for stands as a comment in its file: there it would be dropped in
silence.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pydantic import BaseModel

from search.arms import Candidate
from search.dialects import FIXED, ROWS, local
from search.foreign import SYSTEMS, System, option_names
from spaces.config import ConfigError, TrialConfig
from spaces.reading import as_tree, dump_yaml
from spaces.uses import idle, setting


def to_yaml(candidate: Candidate) -> str:
    """`rin trial --config` repeats the trial from this text alone."""
    study, arm, control = candidate.study, candidate.arm, candidate.control
    refuse_rules(candidate.config)
    followed = arm.results[0].receipt.followed if 0 in arm.results else ()
    runs, beside = _mean(candidate.accuracies), _mean(candidate.control_accuracies)
    apart = "not known" if candidate.difference is None else f"{100 * candidate.difference:+.2f} points"
    return dump_yaml(
        as_tree(candidate.config),
        comment=(
            f"candidate of {study.kind} {study.name}: {arm.name}\n"
            f"{study.measure} on the {candidate.config.eval.split} questions: {runs}; {control.name}: {beside}; "
            f"paired difference {apart}\n"
            f"{candidate.caveat}\n"
            f"{''.join(f'{one}{chr(10)}' for one in followed)}"
            "repeat its first replicate: rin trial --config FILE"
        ),
    )


def refuse_rules(config: TrialConfig) -> None:
    """Raises ConfigError for what only a trial turns into numbers: no other program scans."""
    for key in config.rules:
        raise ConfigError(
            f"{key}={setting(config, key)}: no trial of this arm has ended, and so none has told what it took from its "
            "scan; rin resume runs it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """A configuration in another trainer's words."""

    system: System
    options: Mapping[str, Any]
    without: tuple[str, ...]
    """`setting=value` of whatever it has no key for."""
    notes: tuple[str, ...]
    """What differs in spite of a key."""

    def comments(self) -> Iterator[str]:
        yield from (f"# no key for: {setting}" for setting in self.without)
        yield from (f"# note: {note}" for note in self.notes)


def translate(config: TrialConfig, system: System) -> Translation:
    refuse_rules(config)
    names = option_names(system)
    said, without, notes = dict(FIXED[system]), list[str](), list[str]()
    for key, value in _settings(config, system):
        cell = ROWS[key].cell(system)(config, value) if key in ROWS else None
        if cell is None:
            without.append(f"{key}={_plain(value) if isinstance(value, BaseModel) else value}")
            continue
        for option, given in cell.options.items():
            assert said.setdefault(option, given) == given, f"{option} is said twice: {said[option]} and {given}"
            assert names.knows(option) or option.startswith(SCRIPT), option
        notes += [f"{key}: {cell.note}"] if cell.note and f"{key}: {cell.note}" not in notes else []
    return Translation(system=system, options=said, without=tuple(without), notes=tuple(notes))


def to_verl(config: TrialConfig, system: System = "verl") -> str:
    """Override lines for hydra; the noise first."""
    names, said = option_names(system), translate(config, system)
    entry = "recipe.dapo.main_dapo" if system == "verl" else "verl.trainer.main_ppo"
    lines = [f"{names.override(option)}={_hydra(value)}" for option, value in said.options.items()]
    lines.sort(key=lambda line: "noise_injection" not in line)
    return _text(
        f"# for {names.origin}",
        f"# python3 -m {entry} $(grep -v '^#' FILE)    and your data files, reward, GPUs and micro-batch sizes",
        *lines,
        *said.comments(),
    )


def to_qerl(config: TrialConfig) -> str:
    """Arguments of its qerl.py."""
    said = translate(config, "qerl")
    return _text(
        f"# for {option_names('qerl').origin}",
        "# python qerl.py $(grep -v '^#' FILE)    and your --dataset and --output_dir",
        *(f"--{option} {value}" for option, value in said.options.items()),
        *said.comments(),
    )


def to_nemo_rl(config: TrialConfig) -> str:
    """A configuration file over its example for GRPO."""
    said, tree = translate(config, "nemo-rl"), dict[str, Any](defaults="grpo_math_1B.yaml")
    for option, value in said.options.items():
        *sections, last = option.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    comment = (
        f"for {option_names('nemo-rl').origin}\n"
        "in examples/configs: python examples/run_grpo.py --config FILE    and your data and environment"
    )
    return dump_yaml(tree, comment=comment) + _text(*said.comments())


def to_trl(config: TrialConfig) -> str:
    """A script: its GRPOConfig, and the lines that bring our quantisation, noise and collapse rules."""
    said = translate(config, "trl")
    parts: dict[str, dict[str, Any]] = {"GRPOConfig": {}}
    for option, value in said.options.items():
        called, _, name = option.rpartition(".")
        parts.setdefault(called or "GRPOConfig", {})[name] = value
    model = parts.pop("from_pretrained", {})
    named = model.pop("pretrained_model_name_or_path", None)
    loaded = f"AutoModelForCausalLM.from_pretrained({named or 'MODEL'!r}, dtype={model['dtype']!r})"
    overlong, rows = parts.get("overlong"), parts.get("load_dataset")
    imports, functions = _reward_lines(parts.get("rewards", {}).get("functions", ()))
    yours = [name for name, given in (("reward", functions), ("train_dataset", rows)) if not given]
    served = parts.get("for_vllm")
    asked = [*(functions or ["reward"]), *([_call("get_soft_overlong_punishment", overlong, "")] if overlong else [])]
    return _text(
        f"# for {option_names('trl').origin}",
        *(["import runpy", ""] if any("runpy" in name for name in functions) else []),
        *(["from datasets import load_dataset"] if rows else []),
        *(["from peft import LoraConfig"] if "LoraConfig" in parts else []),
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if served else ''}",
        "from trl import GRPOConfig, GRPOTrainer",
        *(["from trl.rewards import get_soft_overlong_punishment"] if overlong else []),
        "",
        *([f"from my_task import {', '.join(yours)}  # yours"] if yours else []),
        *imports,
        "from trainable.library import CollapseConfig, NoiseConfig, QuantConfig, RinCallback, "
        f"{'for_vllm, ' if served else ''}quantize",
        "",
        f"args = {_call('GRPOConfig', parts['GRPOConfig'])}",
        *([f"train_dataset = {_call('load_dataset', rows)}"] if rows else []),
        f"model = {loaded}",
        f"quantize(model, {_call('QuantConfig', parts['QuantConfig'])})",
        *(
            [
                f"tokenizer = AutoTokenizer.from_pretrained({named or 'MODEL'!r})",
                f"for_vllm(model, tokenizer, {served['folder']!r})",
            ]
            if served
            else []
        ),
        *([f"adapters = {_call('LoraConfig', parts['LoraConfig'])}"] if "LoraConfig" in parts else []),
        f"noise = {_call('NoiseConfig', parts['NoiseConfig'])}",
        f"collapse = {_call('CollapseConfig', parts['CollapseConfig'])}",
        "trainer = GRPOTrainer(",
        "    model=model,",
        "    args=args,",
        f"    reward_funcs=[{', '.join(asked)}],",
        "    train_dataset=train_dataset,",
        *(["    processing_class=tokenizer,"] if served else []),
        *(["    peft_config=adapters,"] if "LoraConfig" in parts else []),
        ")",
        "rin = RinCallback(noise, collapse).attach(trainer)",
        "trainer.train()",
        *said.comments(),
    )


def _reward_lines(written: Sequence[str]) -> tuple[list[str], list[str]]:
    """FILE.py:FUNCTION and PACKAGE.MODULE:FUNCTION -> imports, and how each is called."""
    imports, names = list[str](), list[str]()
    for source, _, function in (one.rpartition(":") for one in written):
        if source.endswith(".py"):
            names.append(f"runpy.run_path({source!r})[{function!r}]")
        else:
            imports.append(f"from {source} import {function}")
            names.append(function)
    return imports, names


def _call(name: str, arguments: Mapping[str, Any], indent: str | None = None) -> str:
    """Python that makes such a record; on lines of their own unless `indent` says otherwise."""
    given = [f"{key}={_plain(value)!r}" for key, value in arguments.items()]
    if indent is not None:
        return f"{name}({', '.join(given)})"
    return "\n".join([f"{name}(", *(f"    {line}," for line in given), ")"])


def _plain(value: Any) -> Any:
    """Lists and dicts in place of tuples and records; a configuration takes them."""
    if isinstance(value, BaseModel):
        return as_tree(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _text(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)


def _hydra(value: Any) -> str:
    """As hydra reads it on a command line; quoted where it would end a value."""
    if isinstance(value, list | tuple):
        return f"[{','.join(_hydra(item) for item in value)}]"
    if value is None:
        return "null"
    text = str(value)
    return text if re.fullmatch(r"[\w/.\-+:@%~]+", text) else "'" + text.replace("'", "\\'") + "'"


def _settings(config: TrialConfig, system: System) -> Iterator[tuple[str, Any]]:
    """Every setting that has an effect here, by its dotted key; those of this machine only where somebody set them."""
    plain, nothing = TrialConfig(), idle(config) - {"noise.sigma_start"}  # which says whether there is noise at all
    nothing |= {"model.recipe"} if config.model.recipe is None else set()
    nothing |= {"rollout.correction_cap"} if config.rollout.correction == "none" else set()
    for name in TrialConfig.model_fields:
        part = getattr(config, name)
        for key in type(part).model_fields if isinstance(part, BaseModel) else [""]:
            value, usual = (getattr(getattr(of, name), key) if key else getattr(of, name) for of in (config, plain))
            dotted = f"{name}.{key}" if key else name
            here = dotted in ROWS and ROWS[dotted].cell(system) is local
            if dotted not in nothing and not (here and value == usual):
                yield dotted, value


def _mean(accuracies: Sequence[float]) -> str:
    if not accuracies:
        return "no outcome"
    return (
        f"{fmean(accuracies):.4f} ({'mean of ' if len(accuracies) > 1 else ''}{len(accuracies)} "
        f"replicate{'s'[: len(accuracies) > 1]})"
    )


SCRIPT = (
    "from_pretrained.",
    "load_dataset.",
    "rewards.",
    "for_vllm.",
    "LoraConfig.",
    "QuantConfig.",
    "NoiseConfig.",
    "CollapseConfig.",
    "overlong.",
)
"""What a TRL script calls beside GRPOConfig."""

EXPORTS: dict[str, Callable[[Candidate], str]] = {
    "yaml": to_yaml,
    "verl": lambda candidate: to_verl(candidate.config),
    "verl-upstream": lambda candidate: to_verl(candidate.config, "verl-upstream"),
    "trl": lambda candidate: to_trl(candidate.config),
    "qerl": lambda candidate: to_qerl(candidate.config),
    "nemo-rl": lambda candidate: to_nemo_rl(candidate.config),
}
assert {"yaml", *SYSTEMS} == EXPORTS.keys()
