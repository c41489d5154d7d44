"""bitsandbytes on a CPU with AVX512-BF16: one pass in evaluation mode takes a 4-bit layer its gradient for good.

usage: python bitsandbytes-cpu-packing.py      (bitsandbytes 0.50.2, torch 2.11; exits 1 where the fault shows)
"""

import sys

import bitsandbytes
import torch
from bitsandbytes.functional import has_avx512bf16

if not has_avx512bf16():
    sys.exit("this CPU has no AVX512-BF16 (or the library was built without it): nothing to see")
torch.manual_seed(0)
layer = bitsandbytes.nn.Linear4bit(256, 192, bias=False, compute_dtype=torch.float32, quant_type="nf4")
layer = layer.to("cpu")  # packs the weights in 4 bits


def reached() -> bool:
    """Whether the input gets a gradient through the layer, in training mode."""
    x = torch.randn(4, 256, requires_grad=True)
    out = layer.train()(x)
    if out.requires_grad:
        out.sum().backward()
    return x.grad is not None and bool(x.grad.abs().sum() > 0)


before = reached()
with torch.no_grad():
    layer.eval()(torch.randn(4, 256))  # as a generated answer, or an evaluation
try:
    after, why = reached(), ""
except Exception as error:
    after, why = False, f" ({type(error).__name__}: {str(error).splitlines()[0]})"
print(f"the input gets a gradient: before an evaluation {before}, after it {after}{why}")
sys.exit(before and not after)
