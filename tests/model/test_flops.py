"""Operations per token, worked by hand; peaks of devices, by the names that CUDA tells."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic_lm.model.flops import peak_flops, training_flops_per_token
from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec

# Width 4, 2 layers, vocabulary 10, feed-forward width 16. A block's matrices: 3 x 4 x 4 (queries, keys, values) + 4 x 4 (back)
# + 2 x 4 x 16 (feed-forward) = 192. Head: 4 x 10 = 40. Two blocks and the head: 424. Attention: 12 x 2 x 4 = 96 a position.
SMALL = ModelSpec(vocab_size=10, num_layers=2, num_heads=2, width=4, max_tokens=8, activation="gelu")


def test_token_costs_six_for_each_matrix_element_and_attention_by_length() -> None:
    assert training_flops_per_token(SMALL, 8) == 6 * 424 + 96 * 8
    assert training_flops_per_token(SMALL, 1) == 6 * 424 + 96


@pytest.mark.parametrize("changes", [{"tied": False}, {"position": "learned"}, {"bias": True}, {"norm": "layernorm"}])
def test_what_is_no_matrix_product_costs_nothing(changes: dict[str, object]) -> None:
    """An untied head is the same product as a tied one; positions, biases and norms are sums."""
    changed = replace(SMALL, **changes)  # type: ignore[arg-type]
    assert training_flops_per_token(changed, 8) == training_flops_per_token(SMALL, 8)


def test_tokens_that_are_not_predicted_need_no_head() -> None:
    assert training_flops_per_token(SMALL, 8, predicted=0.25) == training_flops_per_token(SMALL, 8) - 6 * 30


def test_swiglu_has_three_matrices() -> None:
    """8/3 x 4 rounded up to 16 columns: 3 x 4 x 16 in place of 2 x 4 x 16, in each of two blocks."""
    swiglu = replace(SMALL, activation="swiglu")
    assert training_flops_per_token(swiglu, 8) == training_flops_per_token(SMALL, 8) + 6 * 2 * 64


def test_gpt2_costs_what_the_literature_says() -> None:
    """124M parameters without its 0.8M positions: 6 x 123.5M + 12 x 12 x 768 x 1024 = 854 MFLOP."""
    spec = ModelSpec(vocab_size=50_257, max_tokens=1024, **PRESETS["gpt2"].shape)
    assert training_flops_per_token(spec, 1024) == 6 * (12 * 12 * 768**2 + 50_257 * 768) + 12 * 12 * 768 * 1024
    assert training_flops_per_token(spec, 1024) == pytest.approx(0.854e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835.5e12, 60e12),
        ("NVIDIA H200", 989.4e12, 67e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("Tesla V100-PCIE-32GB", None, 14e12),
    ],
)
def test_peak_is_the_data_sheets(name: str, bf16: float | None, fp32: float) -> None:
    assert peak_flops(name, "bf16") == pytest.approx(bf16)
    assert peak_flops(name, "fp32") == pytest.approx(fp32)


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "",
        "AMD EPYC 9554",
        "NVIDIA A10G",  # another chip than the A10
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",  # a slice has a slice of the peak
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_peak_of_an_unknown_device_is_none(name: str) -> None:
    assert peak_flops(name, "bf16") is None


def test_fp16_is_as_fast_as_bf16_and_tf32_half_as_fast() -> None:
    """H100 SXM, A100: 494.7 and 156 TFLOP/s of TF32 by their data sheets, without sparsity. V100 has no TF32."""
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp16") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA H100 80GB HBM3", "tf32") == pytest.approx(494.7e12)
    assert peak_flops("NVIDIA A100-SXM4-40GB", "tf32") == pytest.approx(156e12)
    assert peak_flops("Tesla V100-SXM2-16GB", "tf32") is None


def test_peak_in_an_unknown_precision_is_none() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp8") is None
