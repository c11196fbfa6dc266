"""The scan: what rounding to few bits does to each layer of a model, at each place where it happens (SRDD).

    find the sites                      by data flow (`policy/sites.py`): output, qkv, o, gate_up, down
    for each prompt, unquantised        each site's tensor is rounded as the layer there would round it, compared with
                                        itself, and reduced to a few sums before the next layer runs
    for each layer                      the same of its weights
    over prompts                        means, with bootstrap intervals

The errors are those of each place alone, in an unquantised model: what one layer's error does to the next is the
functional part's matter. Operands are the very ones of the trial (`quantization.Operand`), so every format, scale rule
and rotation is scanned as it computes; `output`, which no layer rounds, is rounded as an input would be.

The first four numbers are those of the plan's scanner, prompt by prompt, then averaged: with q what x became,
relative error = mean |q - x| / (|x| + 1e-10), deadzone = share of |x| > 1e-10 with |q| < 1e-10, SQNR = 10 log10
(sum x^2 / sum (q - x)^2). A value that is rounded to zero has a relative error of 1, hence relative error = deadzone +
(1 - deadzone) r, r being that of the others: the two move together. Saturation is not the plan's, which counts values
near the largest of the tensor, but blocks with a value beyond their grid. Under a rotation q is turned back, so that
these numbers are about x itself. Turned back, what was rounded to zero is 0 no longer: the deadzone all but goes
(0.130 to 0.017 of Gaussian values with one channel in a hundred 8 times as large) and SQNR rises (16.7 to 19.0 dB),
while a small value gets its share of the error of all others, and the relative error says nothing.

The split of the error's energy follows arXiv 2605.20402 (Li, Wu, Shen, "Decomposing MXFP4 quantization error for LLM
RL"). Let Q* round with the ideal scale of a block, its largest magnitude over the grid's largest value, unrounded.
Element by element

    q - x  =  [q - Q*]  +  [Q* - x where Q* = 0]  +  [Q* - x elsewhere]
              scale bias    deadzone                 grid

exactly. The parts are not orthogonal (scale bias makes up for some of the grid's error), so their energies do not add
up to that of the whole: the paper's own are 1.73 + 0.03 + 0.70. Here the share of a part is its scalar product with the
whole error over the error's energy, which is its Shapley value in that energy, half of each cross term to either side.
The shares add up to 1; one that is negative makes up for the others. They are computed where rounding happens, under a
rotation on turned operands. The share of the scale does not forecast what better scales would save: it is nearly all of
the energy whenever a block's scale is not the ideal one, because the roundings of two grids have little in common.

Left out: errors that add up from layer to layer; batching of prompts, because then padding and an expert's rows could
not be told from tokens of another prompt.

Shapes: R = rows (tokens), n = width, B = blocks of a row, K = elements of a block.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spaces.config import ConfigError, ModelConfig, QuantConfig
from spaces.formats import FORMATS
from spaces.reading import as_tree
from trainable.hadamard import rotate
from trainable.hashing import stable_hash
from trainable.policy.embedded import Progress
from trainable.policy.policy import Policy, decoder_blocks, unquantized, unshared
from trainable.policy.sites import BlockSites, find_sites
from trainable.quantization import Arithmetic, Operand, ideal_quantize
from trainable.scan import Estimate, LayerScan, Scan, SiteErrors

_TINY = 1e-10  # of the plan's scanner
_RESAMPLES = 1000
_PIECE = 1 << 18
"""Elements that are compared at once."""
_SUMS = ("elements", "blocks", "relative", "flushed", "saturated", "signal", "noise", "scale_bias", "dead", "grid")

_Sites = dict[str, SiteErrors]


# --- one tensor -------------------------------------------------------------------------------------------------------


def row_sums(x: Tensor, operand: Operand) -> Tensor:
    """What rounding does to each row of x [R, n]: sums [R, 10] in fp64, by _SUMS, on the CPU."""
    element = FORMATS[operand.format].element
    assert element is not None, "what is not rounded has no errors"
    limit = operand.step(x) * (element.largest / element.smallest_step)  # the grid's largest value, [R, n]
    rows = max(1, _PIECE // x.shape[-1])
    pieces = zip(*(torch.split(tensor, rows) for tensor in (x, operand.of(x), limit)), strict=True)
    return torch.cat([_sums(some, rounded, largest, operand) for some, rounded, largest in pieces]).cpu()


def _sums(x: Tensor, rounded: Tensor, limit: Tensor, operand: Operand) -> Tensor:
    exact, block = x.float(), FORMATS[operand.format].block
    turned = rotate(x).float() if operand.hadamard else exact
    q = (rotate(rounded) if operand.hadamard else rounded).float()
    size, whole = exact.abs(), rounded.float() - turned  # the error where it is made
    ideal = ideal_quantize(turned, operand.format)
    rest, lost = ideal - turned, ideal == 0
    columns = (
        torch.ones_like(exact),
        torch.ones_like(exact) / block,
        (q - exact).abs() / (size + _TINY),
        ((size > _TINY) & (q.abs() < _TINY)).float(),
        (turned.abs() > limit).view(len(x), -1, block).any(-1).float(),
        turned.square(),
        whole.square(),
        (rounded.float() - ideal) * whole,
        torch.where(lost, rest, 0.0) * whole,
        torch.where(lost, 0.0, rest) * whole,
    )
    return torch.stack([column.sum(-1, dtype=torch.float64) for column in columns], -1)


def numbers(sums: Tensor, first: Sequence[int] = ()) -> dict[str, float]:
    """Those of SiteErrors for one prompt, from its rows' sums [R, 10]; `first`: rows of its first token."""
    total = dict(zip(_SUMS, sums.sum(0).tolist(), strict=True))
    rows = sums.numpy()
    is_first = np.isin(np.arange(len(rows)), first)
    with np.errstate(divide="ignore", invalid="ignore"):
        decibels = 10 * np.log10(rows[:, 5] / rows[:, 6])  # of each row
    others = decibels[~is_first & (rows[:, 5] != 0)]  # a row of zeros has none
    noise, signal = np.float64(total["noise"]), np.float64(total["signal"])
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "relative_error": total["relative"] / total["elements"],
            "deadzone": total["flushed"] / total["elements"],
            "saturation": total["saturated"] / total["blocks"],
            "sqnr_db": float(10 * np.log10(signal / noise)),
            "sqnr_token_db": float(np.median(others)) if len(others) else float("nan"),
            "sqnr_first_token_db": float(decibels[is_first].mean()) if len(first) else float("nan"),
            "nmse": float(noise / signal),
            **{name: float(total[name] / noise) for name in ("scale_bias", "dead", "grid")},
        }


def errors_of(prompts: Sequence[Mapping[str, float]], seed: int, first: bool) -> SiteErrors:
    """Means over prompts. `first`: their first tokens are known."""
    return _record({name: estimate([prompt[name] for prompt in prompts], seed) for name in prompts[0]}, first)


def _record(estimates: dict[str, Estimate], first: bool) -> SiteErrors:
    of_first = estimates.pop("sqnr_first_token_db")
    return SiteErrors(**estimates, sqnr_first_token_db=of_first if first else None)


def estimate(values: Sequence[float], seed: int) -> Estimate:
    """Mean over prompts and its 95 % interval, from resampled prompts: the same ones for all numbers of a scan."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Estimate(value=mean, low=float("nan"), high=float("nan"))
    drawn = np.random.default_rng(stable_hash("srdd", seed, n)).integers(0, n, (_RESAMPLES, n))
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(np.asarray(values)[drawn].mean(1), (0.025, 0.975))
    return Estimate(value=mean, low=float(low), high=float(high))


def exactly(value: float) -> Estimate:
    """What does not hang on prompts."""
    return Estimate(value=value, low=value, high=value)


# --- a model ----------------------------------------------------------------------------------------------------------


def scan_policy(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    model: ModelConfig,
    quant: QuantConfig,
    source: str = "prompts",
    seed: int = 0,
    progress: Progress | None = None,
) -> Scan:
    """Scan a policy that was loaded by this `model` and `quant`, on rows of token ids. Raises ConfigError where nothing
    is quantised."""
    if not Arithmetic.of(quant).quantizes:
        raise ConfigError(
            "quant.weights=none, quant.activations=none: nothing is quantised and there is nothing to scan; "
            "choose a format"
        )
    started, told = time.perf_counter(), progress or (lambda done, total, what: None)
    sites = find_sites(policy)
    steps = len(prompts) + policy.depth
    inputs = _Inputs(policy, quant, sites)
    for number, prompt in enumerate(prompts):
        told(number, steps, "prompts")
        inputs.read(prompt)
    found = [inputs.errors(layer, seed) for layer in range(policy.depth)]
    for layer in range(policy.depth):
        told(len(prompts) + layer, steps, "weights")
        if weights := _weight_errors(policy, sites[layer]):
            found[layer]["weights"] = weights
    told(steps, steps, "done")
    return Scan(
        model=model.name,
        fingerprint=fingerprint(policy),
        quant=as_tree(quant),
        depth=policy.depth,
        source=source,
        prompts=len(prompts),
        tokens=sum(map(len, prompts)),
        seed=seed,
        seconds=time.perf_counter() - started,
        layers=tuple(
            LayerScan(layer=layer, sites=errors, missing=_missing(policy, quant, sites[layer], errors))
            for layer, errors in enumerate(found)
        ),
    )


class _Inputs:
    """What is rounded at each site while prompts run, reduced at once: of a tensor only the sums of its rows stay,
    until its prompt has been read."""

    def __init__(self, policy: Policy, quant: QuantConfig, sites: Sequence[BlockSites]) -> None:
        self.policy = policy
        self.rows: dict[tuple[int, str], list[tuple[Tensor, bool]]] = {}  # of the prompt that runs
        self.prompts: dict[tuple[int, str], list[dict[str, float]]] = {}
        self.firsts: dict[tuple[int, str], bool] = {}
        self.hooks: list[tuple[nn.Module, int, str, Operand]] = []
        behind = Arithmetic.of(quant).input
        for layer, (block, found) in enumerate(zip(decoder_blocks(policy), sites, strict=True)):
            self.hooks.append((block, layer, "output", behind))
            for site in ("qkv", "o", "gate_up", "down"):
                for group in getattr(found, site):
                    # Layers that read one tensor may round it differently: quant.exclude names layers, not tensors.
                    operands = {policy.linears[name].arithmetic.input: name for name in group}
                    for operand, name in operands.items():
                        self.hooks.append((policy.linears[name], layer, site, operand))
        self.hooks = [hook for hook in self.hooks if FORMATS[hook[3].format].element is not None]

    @torch.no_grad()
    def read(self, prompt: Sequence[int]) -> None:
        with ExitStack() as stack:
            stack.enter_context(unquantized(self.policy))
            stack.enter_context(unshared(self.policy))
            for module, layer, site, operand in self.hooks:
                hook = self._hook((layer, site), operand, len(prompt), of_input=site != "output")
                stack.callback(module.register_forward_hook(hook).remove)
            ids = torch.tensor([list(prompt)], device=self.policy.device)
            self.policy.network.get_decoder()(input_ids=ids, use_cache=False)
        for key, pieces in self.rows.items():
            starts = np.cumsum([0, *(len(sums) for sums, _ in pieces)])
            first = [int(start) for start, (_, known) in zip(starts, pieces, strict=False) if known]
            self.firsts[key] = self.firsts.get(key, True) and all(known for _, known in pieces)
            self.prompts.setdefault(key, []).append(numbers(torch.cat([sums for sums, _ in pieces]), first))
        self.rows = {}

    def _hook(self, key: tuple[int, str], operand: Operand, tokens: int, *, of_input: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            x = args[0] if of_input else output[0] if isinstance(output, tuple) else output
            if x.numel() and x.shape[-1] % FORMATS[operand.format].block == 0:
                known = tuple(x.shape[:-1]) == (1, tokens)
                sums = row_sums(x.detach().reshape(-1, x.shape[-1]), operand)
                self.rows.setdefault(key, []).append((sums, known))

        return hook

    def errors(self, layer: int, seed: int) -> _Sites:
        return {
            site: errors_of(prompts, seed, self.firsts[of_layer, site])
            for (of_layer, site), prompts in self.prompts.items()
            if of_layer == layer
        }


@torch.no_grad()
def _weight_errors(policy: Policy, sites: BlockSites) -> SiteErrors | None:
    """Of all weights of a block that are quantised."""
    linears = [policy.linears[name] for name in sites.names()]
    pieces = [
        row_sums(linear.weight.detach(), linear.arithmetic.weight)
        for linear in linears
        if FORMATS[linear.arithmetic.weights].element is not None
    ]
    if not pieces:
        return None
    return _record({name: exactly(value) for name, value in numbers(torch.cat(pieces)).items()}, first=False)


def _missing(policy: Policy, quant: QuantConfig, sites: BlockSites, errors: _Sites) -> dict[str, str]:
    """Why a site has no numbers."""
    missing = {}
    for site in ("output", "qkv", "o", "gate_up", "down", "weights"):
        if site in errors:
            continue
        names = list(sites.names()) if site == "weights" else [n for g in getattr(sites, site, ()) for n in g]
        if site == "output" or (names and quant.activations == "none" and site != "weights"):
            fits = "not quantised" if quant.activations == "none" else "its width is no multiple of a block"
            missing[site] = f"quant.activations={quant.activations}: {fits}"
        elif not names:
            missing[site] = "no such projection was found; there are " + ", ".join(sites.names())
        elif quant.weights == "none" and site == "weights":
            missing[site] = "quant.weights=none: not quantised"
        elif any(policy.linears[name].arithmetic.quantizes for name in names):
            missing[site] = "no token went there"
        else:
            missing[site] = "at 16 bits, by quant.exclude or quant.skip_layers"
    return missing


def fingerprint(policy: Policy) -> str:
    """Of its weights, the head's too: equal ones have equal scans."""
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in policy.network.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
