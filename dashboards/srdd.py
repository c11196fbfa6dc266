"""`rin srdd`: a scan as a table, with its zones, its worst layers, and what it would buy to do without some errors.

`trainable/srdd.py` says what the numbers of places are, `sensitivity.py` those of functions. A row is a layer: errors
at its output, as in the plan, the deadzone of every place that is really rounded, then what the layer does.

NaN rule: what is not known is a dash in the table, and null in JSON.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from dashboards.srdd_plan import TEXT_TOKENS, Plan
from spaces.config import ConfigError
from trainable.engines.engine import Request
from trainable.policy.embedded import Progress
from trainable.policy.loading import load_policy
from trainable.policy.policy import Policy, deployed
from trainable.rollout import encode_prompts, generate
from trainable.scan import SITES, Estimate, LayerScan, Purchase, Scan, kl_per_bit, score, statuses, worst, zones
from trainable.sensitivity import with_sensitivities
from trainable.srdd import scan_policy
from trainable.tasks.table import build_task
from trainable.tasks.task import Task

_WORST = 5
_BOUGHT = 12
"""Purchases in the table; all are in the JSON."""


# --- plan -> scan -----------------------------------------------------------------------------------------------------


def measure(plan: Plan, progress: Progress) -> Scan:
    """Raises ConfigError for a model or a task that cannot be had, and for a text that is none."""
    config = plan.config
    policy = load_policy(config.model, config.quant, plan.seed)
    task = build_task(config.task)
    if task.foreign is not None:
        task.foreign.open()
    try:
        rows = _rows(plan, policy, task)
        scan = scan_policy(
            policy,
            rows,
            model=config.model,
            quant=config.quant,
            source=plan.source,
            seed=plan.seed,
            progress=progress,
        )
        if not plan.functional:
            return scan
        return with_sensitivities(scan, policy, rows, task=task, config=config, progress=progress)
    finally:
        if task.foreign is not None:
            task.foreign.close()


def _rows(plan: Plan, policy: Policy, task: Task) -> list[list[int]]:
    """Token ids."""
    config = plan.config
    if plan.text is not None:
        return _rows_of_text(plan, policy)
    questions = task.sample(plan.prompts, seed=plan.seed, step=0, batch=0)
    prompts = encode_prompts(policy, questions, config.task, config.rollout.max_prompt_tokens)
    if not plan.completions:
        return prompts
    request = Request(
        prompts=prompts,
        group_size=1,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        batch_size=config.rollout.batch_size,
        draw=("srdd", "completions", plan.seed),
    )
    with deployed(policy):
        sampled = generate(policy, request)
    return [[*prompt, *completion.ids] for prompt, (completion,) in zip(prompts, sampled, strict=True)]


def _rows_of_text(plan: Plan, policy: Policy) -> list[list[int]]:
    """From its beginning, cut every so many tokens."""
    assert plan.text is not None
    try:
        text = plan.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {plan.text}: cannot be read ({error}); give a file of plain text") from None
    tokenizer: Any = policy.tokenizer
    ids = tokenizer(text)["input_ids"][: plan.prompts * TEXT_TOKENS]
    rows = [ids[start : start + TEXT_TOKENS] for start in range(0, len(ids), TEXT_TOKENS)]
    if len(ids) < 2 or set(ids) <= {tokenizer.unk_token_id, tokenizer.pad_token_id}:
        raise ConfigError(f"--text {plan.text}: holds no text that the model's tokenizer can spell; give another file")
    return [row for row in rows if len(row) > 1]


# --- scan -> text -----------------------------------------------------------------------------------------------------


def lines(scan: Scan, plan: Plan) -> Iterator[str]:
    """Everything, in order."""
    yield (
        f"{plan.model}: rounding errors of {scan.depth} layers, {plan.config.quant.mode}, scale rule "
        f"{plan.config.quant.scale_rule}; {scan.prompts} rows, {scan.tokens} tokens ({scan.source}), seed {scan.seed}"
    )
    functional = all(layer.functional is not None for layer in scan.layers)
    yield from table(scan, functional)
    yield ""
    yield from STATIC_LEGEND.splitlines()
    yield from FUNCTIONAL_LEGEND.splitlines() if functional else ()
    yield from _conclusion(scan, functional)
    if scan.bought:
        yield ""
        yield from purchases(scan.bought)


def table(scan: Scan, functional: bool) -> Iterator[str]:
    """A header of two lines, then a line for each layer."""
    yield f"{'':5s} {'at the output':^35s} {'deadzone % at':^40s}" + (
        " the model and its learning" if functional else ""
    )
    head = f"{'layer':>5s} {'error%':>7s}{'dead%':>7s}{'sat%':>7s}{'SQNR':>7s}{'token':>7s} "
    head += "".join(f"{site:>8s}" for site in SITES[1:])
    if functional:
        head += f" {'KL alone (95 %)':>25s}{'all but':>9s}{'fisher':>9s}{'cosine':>7s}{'norm':>6s}{'codes%':>8s}"
    yield head
    for layer in scan.layers:
        yield _line(layer, functional)


def _line(layer: LayerScan, functional: bool) -> str:
    output = layer.sites.get("output")
    shares = output and (output.relative_error, output.deadzone, output.saturation)
    decibels = output and (output.sqnr_db, output.sqnr_token_db)
    text = f"{layer.layer:>5d} "
    text += "".join(f"{_share(value):>7s}" for value in shares or (None,) * 3)
    text += "".join(f"{_number(value, '.1f'):>7s}" for value in decibels or (None,) * 2) + " "
    dead = [errors.deadzone if (errors := layer.sites.get(site)) else None for site in SITES[1:]]
    text += "".join(f"{_share(value):>8s}" for value in dead)
    found = layer.functional
    if not functional or found is None:
        return text
    alone = found.kl_alone
    interval = f"{_number(alone, '.2g')} ({alone.low:.2g} to {alone.high:.2g})" if math.isfinite(alone.low) else ""
    return text + (
        f" {interval or _number(alone, '.2g'):>25s}{_number(found.kl_all_but, '.3g'):>9s}"
        f"{_number(found.fisher, '.2g'):>9s}{_number(found.cosine, '.3f'):>7s}{_number(found.norm_ratio, '.2f'):>6s}"
        f"{_share(found.survival, '.2f'):>8s}"
    )


def _number(estimate: Estimate | None, form: str) -> str:
    return "-" if estimate is None or not math.isfinite(estimate.value) else format(estimate.value, form)


def _share(estimate: Estimate | None, form: str = ".1f") -> str:
    """In percent."""
    return "-" if estimate is None or not math.isfinite(estimate.value) else format(100 * estimate.value, form)


STATIC_LEGEND = """\
error: mean of |q - x| / |x|; dead: rounded to zero; sat: blocks beyond their grid; SQNR in dB, of all tokens and of a
token (median, first tokens apart). The output itself is not rounded; the places beside it are."""
FUNCTIONAL_LEGEND = """\
KL in nats per token at the logits, this layer alone quantised, and all but it; fisher: what one backward pass foresees
of it; cosine and norm: the layer's quantised gradient beside the unquantised one; codes: weights whose code one GRPO
step changes."""


def _conclusion(scan: Scan, functional: bool) -> Iterator[str]:
    kinds = ["relative_error", "deadzone", "sqnr"]
    known = [kind for kind in kinds if all("output" in layer.sites for layer in scan.layers)]
    known += [f"deadzone@{site}" for site in SITES[1:5] if all(site in layer.sites for layer in scan.layers)]
    for kind in [*known, *(("kl", "kl_all_but", "fisher") if functional else ())]:
        try:
            yield f"worst by {kind:17s} {', '.join(map(str, worst(scan, min(_WORST, scan.depth), kind)))}"
        except ConfigError as error:  # a score that is not finite somewhere
            yield str(error)
    if "relative_error" in known:
        cuts = zones(score(scan, "relative_error"))
        yield f"zones of the error's profile: {', '.join(f'{first}-{last}' for first, last in cuts)}"
        beyond = {
            name: [layer.layer for layer in scan.layers if statuses(layer.sites["output"])[name] != "ok"]
            for name in statuses(scan.layers[0].sites["output"])
        }
        yield "beyond the plan's thresholds: " + ", ".join(
            f"{name} in {len(layers)} of {scan.depth}" for name, layers in beyond.items()
        )


def purchases(bought: Sequence[Purchase]) -> Iterator[str]:
    """The best, and what costs nothing."""
    yield "what it would buy (bits per operand of a multiplication, KL saved in nats per token at the logits):"
    yield f"{'change':32s}{'weight':>8s}{'input':>8s} {'KL saved (95 %)':>30s}{'per bit':>10s}"
    shown = [one for place, one in enumerate(bought) if place < _BOUGHT or math.isinf(kl_per_bit(one))]
    for one in shown:
        saved, ratio = one.kl_saved, kl_per_bit(one)
        interval = f" ({saved.low:.2g} to {saved.high:.2g})" if math.isfinite(saved.low) else ""
        per_bit = "free" if math.isinf(ratio) else f"{ratio:.2g}"
        yield (
            f"{one.what:32s}{one.weight_bits:>8.2f}{one.activation_bits:>8.2f} "
            f"{f'{saved.value:.3g}{interval}':>30s}{per_bit:>10s}"
        )
    if len(shown) < len(bought):
        yield f"{len(bought) - len(shown)} more: --json"
