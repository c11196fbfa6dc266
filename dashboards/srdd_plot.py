"""A scan as a picture: the profile of errors at the layers' outputs over depth with its zones, the deadzone of every
place that is really rounded, and what each layer's rounding does to the model where that was scanned.

Bands and bars are 95 % intervals over prompts. What a layer does not have is a gap.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from spaces.config import ConfigError
from trainable.noise import ZONES, zone_layers
from trainable.scan import SITES, THRESHOLDS, Estimate, LayerScan, Scan, score, zones

_GAP = Estimate(value=float("nan"), low=float("nan"), high=float("nan"))
_NAMES = {"qkv": "q, k, v inputs", "o": "o input", "gate_up": "gate, up inputs", "down": "down input"}


def draw(scan: Scan, path: Path) -> None:
    """Raises ConfigError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    functional = all(layer.functional is not None for layer in scan.layers)
    panels = 3 if functional else 2
    figure = Figure(figsize=(10, 1.2 + 2.8 * panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1, sharex=True)
    _profile(axes[0], scan)
    _places(axes[1], scan)
    if functional:
        _effect(axes[2], scan)
    for each in axes:
        each.grid(axis="y", alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    axes[-1].set(xlabel="decoder layer", xlim=(-0.5, scan.depth - 0.5))
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=15))
    mode = f"weights {scan.quant['weights']}, activations {scan.quant['activations']}"
    figure.suptitle(f"{Path(scan.model).name}: {mode}; {scan.prompts} rows, {scan.tokens} tokens ({scan.source})")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"--plot {path}: {error.strerror}; give a file that can be written") from None


def _profile(axes: Any, scan: Scan) -> None:
    """Relative error and deadzone at the outputs; shaded zones by change points, the plan's named above."""
    for name, label, color in (("relative_error", "relative error", "C0"), ("deadzone", "deadzone", "C3")):
        _curve(axes, scan, partial(_at, site="output", name=name), label, color)
        axes.axhline(100 * THRESHOLDS[name][0], color=color, linestyle=":", linewidth=1)
    axes.set_ylim(bottom=0)
    top = axes.get_ylim()[1]
    axes.set(ylabel="% at the layer's output", ylim=(0, 1.2 * top))
    if all("output" in layer.sites for layer in scan.layers):
        for number, (first, last) in enumerate(zones(score(scan, "relative_error"))):
            axes.axvspan(first - 0.5, last + 0.5, color="0.5", alpha=0.14 if number % 2 else 0.05, linewidth=0)
    for name in ZONES if scan.depth >= len(ZONES) else ():
        held = zone_layers(name, scan.depth)
        axes.text(sum(held) / len(held), 1.19 * top, name, ha="center", va="top", fontsize=8, color="0.35")
        if held[0] > 0:
            axes.axvline(held[0] - 0.5, color="0.35", linewidth=0.6, linestyle=(0, (1, 3)))
    axes.set_title(
        "shaded: zones of this profile; named: the plan's; dotted: the plan's thresholds", fontsize=9, loc="left"
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _places(axes: Any, scan: Scan) -> None:
    for number, site in enumerate(SITES[1:]):
        label = _NAMES.get(site, site)
        _curve(axes, scan, partial(_at, site=site, name="deadzone"), label, f"C{number + 4}")
    axes.set(ylabel="deadzone %")
    axes.set_ylim(bottom=0)
    axes.set_title("values rounded to zero, where the arithmetic really rounds", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _effect(axes: Any, scan: Scan) -> None:
    found = [layer.functional.kl_alone for layer in scan.layers if layer.functional is not None]
    values = [one.value for one in found]
    # A bootstrap interval of a skewed mean may lie beside it by a hair; a bar has no negative length.
    ends = [[max(one.value - one.low, 0) for one in found], [max(one.high - one.value, 0) for one in found]]
    axes.bar(range(len(values)), values, yerr=ends, color="C0", width=0.7, error_kw={"linewidth": 0.8, "ecolor": "0.3"})
    axes.set(ylabel="KL, nats per token")
    axes.set_ylim(bottom=0)
    axes.set_title("at the logits, when this layer alone is quantised", fontsize=9, loc="left")


def _at(layer: LayerScan, site: str, name: str) -> Estimate:
    errors = layer.sites.get(site)
    found: Estimate = getattr(errors, name) if errors is not None else _GAP
    return found


def _curve(axes: Any, scan: Scan, of: Callable[[LayerScan], Estimate], label: str, color: str) -> None:
    """In percent."""
    where = [layer.layer for layer in scan.layers]
    found = [of(layer) for layer in scan.layers]
    axes.plot(where, [100 * one.value for one in found], marker="o", markersize=3, label=label, color=color)
    low, high = [100 * one.low for one in found], [100 * one.high for one in found]
    axes.fill_between(where, low, high, color=color, alpha=0.2, linewidth=0)
