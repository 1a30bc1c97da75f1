"""The limit, compared with independent counts: the modules of real architectures, loops, and published figures."""

from __future__ import annotations

import dataclasses
from time import perf_counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.hardware.layout import Hardware
from experiments.performance_model.calibration import calibrate, datasheet
from experiments.performance_model.predictor import Layout
from experiments.performance_model.roofline import DenseShape, Rates, Roofline, least_flop, prefill_bytes, prefill_flop
from kvmem.engines.huggingface import HFBackend
from kvmem.errors import ConfigError, ModelError
from kvmem.models import loading

H100 = Rates(788e12, 3.01e12, "bfloat16", "measured")
H100_LIMIT_MS = {  # (context, query) tokens of Qwen3-8B
    (583, 167): 5.06,
    (583, 303): 5.51,
    (583, 953): 17.55,
    (2773, 167): 5.17,
    (2773, 303): 6.00,
    (2773, 953): 19.11,
    (6064, 167): 5.33,
    (6064, 303): 6.75,
    (6064, 953): 21.46,
}
H800X4 = Hardware(
    name="h800x4", gpu="NVIDIA H800", gpus=4, tensor_parallel=4, peak_tflops={"bfloat16": 989.4}, bandwidth_gb_s=3350
)
SHAPES = st.builds(
    DenseShape,
    hidden=st.just(64),
    intermediate=st.just(96),
    heads=st.just(4),
    kv_heads=st.just(2),
    head_dim=st.just(16),
    vocab=st.just(99),
    windows=st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=3).map(tuple),
)
TOKENS = st.integers(1, 20)
SMOLLM2 = Roofline(H100, loading.shape_config("smollm2-135m"))
assert SMOLLM2.shape  # read once, outside the time that hypothesis measures


@pytest.mark.parametrize("cell", H100_LIMIT_MS)
def test_the_limits_of_qwen3_8b_on_an_h100(cell: tuple[int, int]) -> None:
    context_tokens, query_tokens = cell
    roofline = Roofline(H100, loading.shape_config("qwen3-8b"))
    limit_ms = 1e3 * roofline.limit_s(query_tokens, context_tokens)
    assert limit_ms == pytest.approx(H100_LIMIT_MS[cell], rel=0.03)
    # our count leaves out work of the last layer that the published count includes
    assert limit_ms <= H100_LIMIT_MS[cell] + 0.01
    whole_ms = 1e3 * max(
        prefill_flop(roofline.shape, query_tokens, context_tokens) / H100.flop_per_s,
        prefill_bytes(roofline.shape, query_tokens, context_tokens, 2) / H100.bytes_per_s,
    )
    assert whole_ms == pytest.approx(H100_LIMIT_MS[cell], rel=0.002)


@pytest.mark.parametrize(("tokens", "limit_ms"), [(4000, 147), (6000, 225)])
def test_the_limits_of_qwen2_5_72b_on_four_h800(tokens: int, limit_ms: float) -> None:
    roofline = Roofline(datasheet(H800X4, "bfloat16"), loading.shape_config("qwen2.5-72b"))
    assert 1e3 * roofline.limit_s(tokens, 0) == pytest.approx(limit_ms, rel=0.02)


@pytest.mark.parametrize("shape", loading.shapes())
def test_every_shape_is_covered(shape: str) -> None:
    config = loading.shape_config(shape)
    assert DenseShape.of(config).layers == config.num_hidden_layers


@pytest.mark.parametrize(("shape", "billions"), [("qwen3.5-9b", 8.95), ("qwen3.5-27b", 26.90)])
def test_a_hybrid_reads_its_weights_and_the_states(shape: str, billions: float) -> None:
    counted = DenseShape.of(loading.shape_config(shape))
    assert (counted.weights + counted.vocab * counted.hidden) / 1e9 == pytest.approx(billions, rel=2e-3)
    without = dataclasses.replace(counted, linear=dataclasses.replace(counted.linear, state_bytes=0))
    for new, cached, times in ((100, 0, 1), (100, 1000, 2)):
        states = prefill_bytes(counted, new, cached, 2) - prefill_bytes(without, new, cached, 2)
        assert states == times * counted.state_bytes > 0


def test_what_a_hybrids_memory_takes_is_predicted() -> None:
    backend = HFBackend(loading.load("random:tiny_qwen3_5", torch.device("cpu"), torch.bfloat16))
    item = backend.build("The library opens at nine and closes at six.")
    layout = Layout(DenseShape.of(backend.model_config), H800X4)
    assert layout.memory_bytes(len(item.metadata.tokens.token_ids)) == item.metadata.kv_bytes
    assert layout.bytes_a_memory > 0


@pytest.mark.parametrize("shape", ["tiny", "tiny_llama"])
def test_the_flop_of_a_forward_pass_equal_those_that_torch_counts(shape: str) -> None:
    """torch counts attention without the causal mask, so that part is replaced by the causal count."""
    config = loading.shape_config(shape)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        model(torch.arange(40)[None], logits_to_keep=1)
    dense = DenseShape.of(config)
    square = 4 * dense.heads * dense.head_dim * 40 * 40 * len(dense.windows)
    triangle = 4 * dense.heads * dense.head_dim * 40 * 41 // 2 * len(dense.windows)
    # torch also counts the table of the rotary embedding: one product of head_dim / 2 for each token.
    assert counted.get_total_flops() - square + triangle == pytest.approx(
        prefill_flop(dense, 40), abs=2 * 40 * dense.head_dim
    )


def attended_by_loop(window: int | None, query_tokens: int, cached_tokens: int) -> int:
    positions = range(cached_tokens, cached_tokens + query_tokens)
    return sum(min(position + 1, window or position + 1) for position in positions)


@given(SHAPES, TOKENS, st.integers(0, 20))
def test_attention_counts_match_a_loop_over_the_tokens(
    shape: DenseShape, query_tokens: int, cached_tokens: int
) -> None:
    products = 2 * query_tokens * len(shape.windows) * shape.layer_weights + 2 * shape.vocab * shape.hidden
    pairs = sum(attended_by_loop(window, query_tokens, cached_tokens) for window in shape.windows)
    assert prefill_flop(shape, query_tokens, cached_tokens) == products + 4 * shape.heads * shape.head_dim * pairs


@given(SHAPES, TOKENS, TOKENS)
def test_a_prefill_in_two_parts_does_the_same_work_and_is_never_faster(
    shape: DenseShape, first: int, second: int
) -> None:
    head = 2 * shape.vocab * shape.hidden
    parts = prefill_flop(shape, first) + prefill_flop(shape, second, first) - head
    assert parts == prefill_flop(shape, first + second)
    assert least_flop(shape, first + second) < parts
    assert least_flop(shape, 1, first) == prefill_flop(shape, 1, first)


@given(st.integers(1, 2000), st.integers(0, 8000))
def test_the_limit_grows_with_both_lengths(query_tokens: int, cached_tokens: int) -> None:
    limit_s = SMOLLM2.limit_s(query_tokens, cached_tokens)
    assert limit_s <= SMOLLM2.limit_s(query_tokens + 1, cached_tokens)
    assert limit_s < SMOLLM2.limit_s(query_tokens, cached_tokens + 1)
    assert 0 < SMOLLM2.mfu(query_tokens, 0, limit_s) < 1.1  # the whole work over the time of the least work


def test_a_window_bounds_what_is_read() -> None:
    full = DenseShape.of(loading.shape_config("tiny"))
    sliding = dataclasses.replace(full, windows=(128,) * len(full.windows))
    kv_bytes_a_token = 2 * full.kv_heads * full.head_dim * len(full.windows) * 4
    assert prefill_bytes(full, 1, 1000, 4) - prefill_bytes(sliding, 1, 1000, 4) == kv_bytes_a_token * (1000 - 127)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "starcoder2"])
def test_experts_and_mlps_without_a_gate_are_refused_by_name(architecture: str) -> None:
    with pytest.raises(ModelError, match=f"It counts .* weights in this {architecture}, whose products have"):
        DenseShape.of(AutoConfig.for_model(architecture))


def test_a_dtype_without_a_peak_is_refused() -> None:
    with pytest.raises(ConfigError, match="hardware=h800x4 has no peak rate for float32"):
        datasheet(H800X4, "float32")


def test_calibration_measures_plausible_rates() -> None:
    """On any machine: plausible rates, and a limit that a prefill of the same model does not beat."""
    config = loading.shape_config("tiny")
    rates = calibrate(config, torch.float32, torch.device("cpu"))
    assert 1e8 < rates.flop_per_s < 1e14 and 1e8 < rates.bytes_per_s < 1e13
    assert rates.dtype == "float32" and "CPU threads" in rates.how
    loaded = loading.load("random:tiny", torch.device("cpu"))
    ids_BT = torch.randint(0, 1000, (1, 512))
    with torch.inference_mode():
        loaded.model(ids_BT, logits_to_keep=1)
        started = perf_counter()
        loaded.model(ids_BT, logits_to_keep=1)
        seconds = perf_counter() - started
    assert Roofline(rates, config).limit_s(512, 0) < seconds


def test_the_best_of_two_calibrations() -> None:
    best = H100.best(Rates(700e12, 3.2e12, "bfloat16", "again"))
    assert (best.flop_per_s, best.bytes_per_s, best.how) == (788e12, 3.2e12, "measured | again")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_calibration_on_a_gpu_stays_below_the_stated_peak() -> None:
    rates = calibrate(loading.shape_config("qwen3-8b"), torch.bfloat16, torch.device("cuda"))
    assert 10e12 < rates.flop_per_s < 2500e12 and 200e9 < rates.bytes_per_s < 9e12
