"""Floating-point operations: how many a token needs, and how many a device can do. Their ratio over time is MFU.

Invariant: only work that the model needs is counted. Nothing done twice (a replayed step, recomputed activations) and
nothing skipped (the masked half of causal attention) changes the figure, so it compares between implementations.
Source: Chowdhery et al. 2022 (PaLM), appendix B, which takes 6 N + 12 L H Q T for a token. Peaks are the vendor's data
sheets, dense (no 2:4 sparsity).
"""

from __future__ import annotations

import re

from elastic_lm.model.spec import ModelSpec

TERA = 1e12

# Words of a device's name -> TFLOP/s in bf16 (tensor cores, fp32 accumulation) and fp32, by NVIDIA's data sheets and
# white papers. The longest row that fits wins. None: no units for it, so there is no peak to be measured by. fp32 is
# without TF32, which is a precision of its own here.
PEAKS: dict[tuple[str, ...], tuple[float | None, float]] = {
    ("B200",): (2250.0, 75.0),
    ("H200",): (989.4, 67.0),
    ("H200", "NVL"): (835.5, 60.0),
    ("GH200",): (989.4, 67.0),
    ("H100",): (989.4, 67.0),  # SXM
    ("H100", "PCIE"): (756.0, 51.0),
    ("H100", "NVL"): (835.5, 60.0),
    ("A100",): (312.0, 19.5),  # SXM and PCIe alike
    ("A40",): (149.7, 37.4),
    ("A10",): (125.0, 31.2),
    ("L40S",): (362.0, 91.6),
    ("L40",): (181.0, 90.5),
    ("L4",): (121.0, 30.3),
    ("V100",): (None, 15.7),  # SXM2
    ("V100", "PCIE"): (None, 14.0),
    ("RTX", "A6000"): (154.8, 38.7),
    ("RTX", "5090"): (209.5, 104.8),
    ("RTX", "4090"): (165.2, 82.6),
    ("RTX", "3090"): (71.0, 35.6),
}
OTHER_CHIPS = {"MIG", "LAPTOP", "D", "TI"}  # a slice, or a chip that shares a name with a row and is another one


def training_flops_per_token(spec: ModelSpec, sequence_length: int, predicted: float = 1.0) -> int:
    """Forward and backward of one token in a sequence of this length.

    6 for each element of a matrix that the token is multiplied by (2 forward, 4 backward), the head included whether tied
    or not; looking up an embedding is no product. Attention adds 12 x layers x width x sequence_length.
    `predicted`: the share of tokens that the objective predicts; the others need no head.
    """
    spared = round((1 - predicted) * spec.head_parameters)
    return 6 * (spec.matmul_parameters - spared) + 12 * spec.num_layers * spec.width * sequence_length


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak of one device per second. None when the device or the precision is not known.

    fp16 is as fast as bf16 and TF32 half as fast, on every device of the table that has units for bf16 (its data sheet).

    Args: `device_name` as CUDA tells it, e.g. "NVIDIA H100 80GB HBM3".
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    fitting = [row for row in PEAKS if words.issuperset(row)]
    if not fitting or words & OTHER_CHIPS:
        return None
    bf16, fp32 = PEAKS[max(fitting, key=len)]
    low = None if bf16 is None else {"bf16": bf16, "fp16": bf16, "tf32": bf16 / 2}.get(precision)
    peak = fp32 if precision == "fp32" else low
    return None if peak is None else peak * TERA
