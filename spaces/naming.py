"""How a configuration is called in a line: of a table, a page, a run in MLflow."""

from spaces.config import TrialConfig


def describe_noise(config: TrialConfig) -> str:
    """`rmsnorm 0.05 -> 0.0005`, with layers, other formats and other rewards where they are not the default."""
    noise, quant = config.noise, f"{config.quant.weights}/{config.quant.activations}"
    suffix = "" if quant == "mxfp4/mxfp4" else f", {quant}"
    suffix += "" if config.grpo.reward == "task" else f", {config.grpo.reward} reward"
    if noise.sigma_start == 0:
        return f"none{suffix}"
    layers = noise.layers if isinstance(noise.layers, str) else f"[{','.join(map(str, noise.layers))}]"
    where = "" if layers == "all" else f" {layers}"
    return f"{'+'.join(noise.modules)}{where} {noise.sigma_start:.3g} -> {noise.sigma_end:.3g}{suffix}"
