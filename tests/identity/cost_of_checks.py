"""What the check of an open model costs an answer.

python -m tests.identity.cost_of_checks             SmolLM2-135M, on the CPU
python -m tests.identity.cost_of_checks qwen3-8b    random weights of a published shape, on the GPU

Prints the microseconds of one check, and the share of a 40 ms answer that its checks take. An answer checks twice:
in `get_cache` and in `generate`.
"""

from __future__ import annotations

import sys
import timeit

import torch
from transformers import AutoModelForCausalLM

from kvmem.cache import ModelWatch
from kvmem.models import loading

CHECKS_PER_ANSWER = 2
ANSWER_S = 0.040


def main(shapes: list[str]) -> None:
    if shapes:
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(loading.shape_config(shapes[0]), dtype=torch.bfloat16)
    else:
        model = loading.load("smollm2-135m", torch.device("cpu"), torch.float32).model
    watch = ModelWatch(model)
    seconds = min(timeit.repeat(watch.changed, number=500, repeat=9)) / 500
    tensors = len(list(model.parameters()))
    print(f"{seconds * 1e6:.0f} µs a check ({tensors} parameters); {CHECKS_PER_ANSWER} checks are", end=" ")
    print(f"{100 * CHECKS_PER_ANSWER * seconds / ANSWER_S:.2f}% of a {ANSWER_S * 1e3:.0f} ms answer")


if __name__ == "__main__":
    main(sys.argv[1:])
