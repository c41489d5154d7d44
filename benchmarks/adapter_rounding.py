"""How much of a young adapter's share is left in a layer's 16-bit output, as the matrix library of this machine adds it.

  python3 benchmarks/adapter_rounding.py [OUT.json]

A layer's output is about 1, and its adapter's share 3e-4: less than the last bit. For each shape (tokens, out, in) the share that is
found in the output, as the regression of output - rounded product on the share: 1 where the sum is rounded once (or fairly),
less where the product is rounded first. `in place`: as finetune::lora_linear adds; `apart`: as peft does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from finetune import files  # noqa: E402
from finetune.machine import gpus  # noqa: E402
from finetune.run import provenance  # noqa: E402

SHAPES = (
    (64, 192, 256),
    (64, 256, 4096),
    (512, 1024, 4096),
    (1024, 4096, 4096),
    (1024, 4096, 14336),
    (7300, 4096, 4096),
)
RANK, SHARE = 8, 1e-4


def seen(tokens: int, wide: int, deep: int, device: str) -> dict[str, float]:
    """Of the adapter's share, what is found in the output."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * scale).bfloat16()

    x, weight, inner, up = (
        normal(tokens, deep), normal(wide, deep, scale=0.6 * deep**-0.5), normal(tokens, RANK), normal(wide, RANK, scale=SHARE),
    )  # fmt: skip
    share = inner.double() @ up.double().t()
    product = (x.double() @ weight.double().t()).bfloat16().double()
    found = {"in place": (inner @ up.t()).addmm_(x, weight.t()), "apart": x @ weight.t() + inner @ up.t()}
    return {
        how: round(float(((out.double() - product) * share).sum() / share.square().sum()), 2)
        for how, out in found.items()
    }


def main(words: list[str]) -> None:
    """All shapes that this machine computes in reasonable time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = next(iter(gpus.gpus(os.environ)), None)
    shapes = SHAPES if gpu else SHAPES[:3]
    found = dict(
        command="python3 benchmarks/adapter_rounding.py OUT.json", gpu=gpu.name if gpu else None, driver=gpu.driver if gpu else None,
        versions=provenance.versions(), seen={" x ".join(map(str, shape)): seen(*shape, device) for shape in shapes},
    )  # fmt: skip
    if words:
        files.write_json(Path(words[0]), found)
    print(found["seen"])


if __name__ == "__main__":
    main(sys.argv[1:])
