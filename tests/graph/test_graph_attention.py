"""The attention kernels: each against SDPA, and attention by its parts."""

from __future__ import annotations

import pytest
import torch

from kvmem.engines.graph.attention.base import kernels
from kvmem.errors import ConfigError


@pytest.mark.parametrize("kernel", ["fa3", "torch_flash"])
@pytest.mark.gpu
def test_kernels_agree_with_sdpa(kernel):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    device, dtype = torch.device("cuda"), torch.bfloat16
    if reason := kernels()[kernel].why_not(device, dtype, 128):
        pytest.skip(f"{kernel} {reason}")
    torch.manual_seed(0)
    for batch, new, rows, lengths in (
        (1, 5, 300, [77]),
        (1, 167, 900, [700]),
        (3, 8, 64, [8, 20, 64]),
        (1, 1, 700, [650]),
    ):
        q = torch.randn(batch, new, 8, 128, device=device, dtype=dtype)
        k, v = (torch.randn(batch, 2, rows, 128, device=device, dtype=dtype) for _ in "kv")
        at = torch.tensor(lengths, device=device, dtype=torch.int32)
        for causal in (True, False):
            ours, ours_lse = kernels()[kernel].attend_lse(q, k, v, at, causal)
            exact, exact_lse = kernels()["sdpa"].attend_lse(q.float(), k.float(), v.float(), at, causal)
            assert (ours.float() - exact).abs().max() < 0.03
            assert (ours_lse - exact_lse).abs().max() < 0.03
        plan = kernels()[kernel].plan(q.to("meta"), k, at)
        for _ in range(3):  # one plan serves many layers
            planned = kernels()[kernel].attend(q, k, v, at, True, plan)
            assert torch.equal(planned, kernels()[kernel].attend(q, k, v, at, True))


def test_attention_by_its_parts_is_attention(setting):
    """Both kernel calls of SDPA agree, and parts joined by their sums are the whole."""
    sdpa = kernels()["sdpa"]
    torch.manual_seed(0)
    q, (k, v) = torch.randn(2, 6, 4, 16), (torch.randn(2, 2, 40, 16) for _ in "kv")
    lengths = torch.tensor([25, 40], dtype=torch.int32)
    for causal in (True, False):
        torch.testing.assert_close(
            sdpa.attend(q, k, v, lengths, causal), sdpa.attend_lse(q, k, v, lengths, causal)[0], atol=1e-5, rtol=1e-5
        )
    whole = sdpa.attend(q[:1], k[:1], v[:1], lengths[:1], True)
    first, first_lse = sdpa.attend_lse(q[:1], k[:1], v[:1], torch.tensor([12]), False)
    rest, rest_lse = sdpa.attend_lse(q[:1], k[:1, :, 12:], v[:1, :, 12:], torch.tensor([13]), True)
    share = torch.sigmoid(first_lse - rest_lse).transpose(1, 2)[..., None]
    torch.testing.assert_close(first * share + rest * (1 - share), whole, atol=1e-5, rtol=1e-5)


def test_a_kernel_that_does_not_run_here_is_refused(open_engine, setting):
    with pytest.raises(ConfigError, match="Did you mean sdpa"):
        open_engine(attention="spda")
    if setting.device == "cpu":
        with pytest.raises(ConfigError, match=r"attention=fa3 does not run here \(fa3: needs a Hopper GPU"):
            open_engine(attention="fa3")
