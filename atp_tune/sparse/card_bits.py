"""What the model card says where weights are rounded to fewer bits."""

from typing import Any

from atp_tune.report.markdown import fenced
from atp_tune.spec.config import Config

FILES = """\
**The rounded weights are stored as floats**: this folder is as large as the dense model's and runs at the same speed.
`atp-tune apply --packed` makes a folder that stores the bits, and `atp-tune export` recipes for engines that do."""
AS_FLOATS, AS_CODES = ", as floats.", ", and stored as codes."


def values(config: Config) -> dict[str, Any]:
    """The values of the template that differ; none where weights are not rounded."""
    if config.bits is None:
        return {}
    if not config.by_bits:
        return {"also": f"Kept weights are rounded to {config.plan.fixed_bits} bits by {_quantizer(config)}{AS_FLOATS}"}
    effective = "" if config.bits.effective is None else f", {config.bits.effective:.2f} with the scales of groups"
    bars = "\n".join(f"block {k:>3}  {b:<4.3g}  {'█' * round(4 * b)}" for k, b in enumerate(config.plan.amounts))
    return {
        "bits": f"{config.bits.nominal:.2f} bits each{effective}",
        "dense_files": FILES,
        "equal": "Every tensor that was not rounded is equal to the dense model's byte for byte.",
        "updated": config.plan.method == "gptq",
        "rounded": not config.plan.is_even,
        "chart": fenced("text", bars),
    }


def facts(config: Config) -> dict[str, str]:
    """The rows of the table of settings."""
    if config.quantize is None or config.bits is None:
        return {}
    settings = "".join(f", {key} = {value}" for key, value in config.quantize.told(_quantizer(config)).items())
    return {"quantizer": f"{_quantizer(config)}{settings}", "bits asked for": f"{config.bits.target:g} a weight"}


def _quantizer(config: Config) -> str:
    return config.quantize.quantizers[0] if config.quantize and not config.by_bits else config.plan.method
