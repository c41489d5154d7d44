"""bitsandbytes' optimizer waits for the GPU after each tensor: how often, and what a step takes with and without.

usage: python bitsandbytes-optimizer-waits.py      (bitsandbytes 0.50.2, torch 2.11; exits 1 where the fault shows)
"""

import sys
import time

import bitsandbytes
import torch
from bitsandbytes.optim import optimizer

if not torch.cuda.is_available():
    sys.exit("no CUDA GPU: nothing to see")
TENSORS, STEPS = 448, 20  # of the adapter of an 8B model: 7 layers' A and B in 32 blocks

parameters = [torch.nn.Parameter(torch.randn(16, 4096, device="cuda")) for _ in range(TENSORS)]
for parameter in parameters:
    parameter.grad = torch.randn_like(parameter)
adam = bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4)
waits, real = 0, getattr(optimizer, "sync_gpu", None)
if real is None:
    sys.exit("this version has no sync_gpu: mended")


def counted(tensor: torch.Tensor) -> None:
    global waits
    waits += 1
    real(tensor)


def step_ms(wait) -> float:  # type: ignore[no-untyped-def]
    optimizer.sync_gpu = wait
    adam.step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(STEPS):
        adam.step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / STEPS


with_waits, without = step_ms(counted), step_ms(lambda tensor: None)
each = waits // (STEPS + 1)
print(f"{each} waits a step for {TENSORS} tensors: {with_waits:.1f} ms a step with them, {without:.1f} ms without")
sys.exit(each >= TENSORS)
