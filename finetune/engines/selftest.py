"""The self-test's part that needs torch. It runs in a process of its own: bitsandbytes ends the process where a kernel is missing.

`main` runs the named tests in this order and prints one line of JSON for each. SELFTEST_GPU is
set where CUDA works, and SELFTEST_CARDS names two GPUs where there are two.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from finetune import console
from finetune.errors import MachineError
from finetune.machine.selftest import results

TEST = 1024  # numbers on a side of a matrix
# of the distance from the reference, relative to its length: bfloat16 keeps 8 bits, 0.4 % of a number
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # the QLoRA paper's appendix E
FLASH = (8, 0)  # the oldest capability with kernels for bfloat16 and for rows end to end
RANKS_WAIT = 90  # seconds for two processes to import torch and to meet


def near(found: torch.Tensor, expected: torch.Tensor, what: str, bound: float) -> float:
    """The relative distance. Raises MachineError where it is above `bound`, or not a number."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    distance = float((found - expected).norm() / expected.norm())
    if not distance <= bound:
        raise MachineError(
            f"{what} differs from the reference by {distance:.2g} ({bound:.2g} is allowed): wrong numbers. Run it again; if it stays, "
            "the card or its memory is faulty (dmesg, nvidia-smi -q -d ECC): take another machine"
        )
    return distance


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float32 on the CPU, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dtype() -> torch.dtype:
    """The type that training computes in here."""
    if device() == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= FLASH else torch.float16


def libraries() -> str:
    import bitsandbytes
    import transformers

    if os.environ.get("SELFTEST_GPU") and not torch.cuda.is_available():
        raise MachineError("CUDA starts, and torch finds no GPU: torch is not built for CUDA, or for a newer driver")
    words = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}"
    )
    return f"{words}; kernels for {', '.join(torch.cuda.get_arch_list())}" if device() == "cuda" else words


def products() -> str:
    """A matrix product in each type that is used, against float64."""
    a, b = drawn(TEST, TEST), drawn(TEST, TEST, seed=1)
    exact, said = a.double() @ b.double(), []
    for kind in dict.fromkeys((torch.float32, dtype())):
        found = a.to(device(), kind) @ b.to(device(), kind)
        said.append(f"{str(kind).removeprefix('torch.')} {near(found, exact, f'a product in {kind}', NEAR[kind]):.1g}")
    return f"relative distance from float64: {', '.join(said)}"


def gpu_memory() -> str:
    """Nearly all of the GPU's free memory is written and read."""
    free, total = torch.cuda.mem_get_info()
    piece, pieces = 2**28, list[torch.Tensor]()
    pattern = torch.arange(piece // 4, dtype=torch.int32, device="cuda")
    for index in range(int(0.9 * free) // piece - 2):
        pieces.append(pattern + index)
    wrong = sum(int((found != pattern + index).count_nonzero()) for index, found in enumerate(pieces))
    if wrong:
        raise MachineError(
            f"{wrong:,} of the numbers written to the GPU's memory came back wrong; take another machine"
        )
    return f"{len(pieces) * piece / 2**30:.0f} GiB written and read; {free / 2**30:.1f} of {total / 2**30:.1f} GiB were free"


@triton.jit  # type: ignore[untyped-decorator]
def _add(a, b, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # triton reads the types
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    tl.store(out + at, tl.load(a + at, mask=there) + tl.load(b + at, mask=there), mask=there)


def triton_kernel() -> str:
    """A kernel that is compiled here, with the C compiler of this machine."""
    a, b = drawn(100_003).cuda(), drawn(100_003, seed=1).cuda()
    out = torch.empty_like(a)
    _add[(triton.cdiv(len(a), 1024),)](a, b, out, len(a), BLOCK=1024)
    near(out, a + b, "a Triton kernel", 0.0)
    return f"triton {triton.__version__}: compiled and right"


def nf4() -> str:
    """4-bit weights, made and read back by bitsandbytes, against a few lines of torch."""
    from bitsandbytes import functional

    weights = drawn(256, 512)
    blocks = weights.view(-1, 64)
    absmax = blocks.abs().amax(1, keepdim=True)
    code = torch.tensor(NF4)
    expected = code[((blocks / absmax)[..., None] - code).abs().argmin(-1)] * absmax
    packed, state = functional.quantize_4bit(weights.to(device()), quant_type="nf4", blocksize=64)
    found = functional.dequantize_4bit(packed, state)
    distance = near(found.view(-1, 64), expected, "a weight in NF4", 1e-3)
    return f"{weights.numel():,} weights in 4 bits and back, distance {distance:.1g}"


def attention() -> str:
    """Attention of rows that lie end to end, with its gradients, against float64 on the CPU."""
    if torch.cuda.get_device_capability() < FLASH:
        return "not used on this GPU: its kernel needs compute capability 8.0"
    from finetune.engines.compiled import attention as compiled

    sizes, heads, shared, width = [70, 1, 129], 4, 2, 64
    ends = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    exact = [
        drawn(1, h, sum(sizes), width, seed=h + n).double().requires_grad_()
        for n, h in enumerate((heads, shared, shared))
    ]
    used = [part.detach().to("cuda", torch.bfloat16).requires_grad_() for part in exact]
    query, key, value = used
    rest = dict(cu_seqlens=ends, cu_seqlens_k=ends, longest=max(sizes))
    out, _ = compiled.varlen(torch.nn.Identity(), query, key, value, None, **rest)
    rows = zip(*(part.split(sizes, 2) for part in exact), strict=True)
    expected = torch.cat(
        [torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in rows], 2
    ).transpose(1, 2)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    distance = near(out, expected, "attention", NEAR[torch.bfloat16])
    for name, a, b in zip(("query", "key", "value"), used, exact, strict=True):
        near(a.grad, b.grad, f"attention's gradient of the {name}", 0.05)
    return f"{len(sizes)} rows end to end, forward and backward, distance {distance:.1g}"


def model() -> str:
    """Loss and gradients of a small Llama with an adapter, as a run here computes them, against float64 on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    compiled = device() == "cuda" and torch.cuda.get_device_capability() >= FLASH
    sizes = dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = LlamaConfig(vocab_size=512, max_position_embeddings=512, **sizes)
    torch.manual_seed(0)
    weights = LlamaForCausalLM(config).state_dict()
    rows = [dict(input_ids=ids, labels=ids) for ids in (torch.randint(3, 500, (n,)).tolist() for n in (40, 61, 128))]

    def adapted(place: str, kind: torch.dtype) -> Any:
        from peft import LoraConfig, get_peft_model

        base = LlamaForCausalLM(config)
        base.load_state_dict(weights)
        made: Any = get_peft_model(base.to(kind).requires_grad_(False), LoraConfig(r=8, target_modules="all-linear"))
        for index, (_, parameter) in enumerate(sorted((n, p) for n, p in made.named_parameters() if p.requires_grad)):
            parameter.data = drawn(*parameter.shape, seed=index).to(parameter.dtype) * 0.1
        return made.to(place).train()

    exact = adapted("cpu", torch.float64)
    expected = _update(exact, rows, torch.float64)
    used = adapted(device(), dtype() if compiled else torch.float32)
    loss = _compiled(used, rows) if compiled else _update(used, rows, dtype())
    away = abs(loss - expected) / expected
    if not away < 0.01:
        raise MachineError(
            f"the loss is {loss:.5f}, and the reference says {expected:.5f}: wrong numbers; take another machine"
        )
    found, wanted = (
        torch.cat([p.grad.flatten().double().cpu() for _, p in sorted(m.named_parameters()) if p.requires_grad])
        for m in (used, exact)
    )
    distance = near(found, wanted, "the gradient", 0.1)
    way = "compiled" if compiled else "uncompiled"
    return f"{way}, loss {loss:.4f} (reference {expected:.4f}), distance of the gradients {distance:.1g}"


def _update(used: Any, rows: list[dict[str, list[int]]], kind: torch.dtype) -> float:
    """The mean loss of the rows by transformers and peft alone, one after the other; its gradients stay in the model."""
    total, count = 0.0, sum(len(row["labels"]) - 1 for row in rows)
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=used.device)
        with torch.autocast(used.device.type, kind, enabled=kind in (torch.bfloat16, torch.float16)):
            logits = used(input_ids=ids).logits[0, :-1]
        logits = logits.double() if kind is torch.float64 else logits.float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    return total


def _compiled(used: Any, rows: list[dict[str, list[int]]]) -> float:
    """The same on the compiled path, as one piece."""
    from finetune.engines.compiled import path

    count = torch.tensor(sum(len(row["labels"]) - 1 for row in rows), device="cuda")
    with path.applied(used, len(rows), max(len(row["labels"]) for row in rows)) as packed:
        loss = packed.loss(rows, count)
        loss.backward()
    return float(loss.detach())


def all_reduce() -> str:
    """A sum over two cards, each in a process of its own."""
    cards = os.environ["SELFTEST_CARDS"]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", __name__]
        environ = {**os.environ, "CUDA_VISIBLE_DEVICES": cards}
        pipe = subprocess.PIPE
        ranks = [
            subprocess.Popen([*words, str(rank), f"{folder}/meet"], env=environ, stdout=pipe, stderr=pipe, text=True)
            for rank in (0, 1)
        ]
        try:
            answers = [process.communicate(timeout=RANKS_WAIT) for process in ranks]
        except subprocess.TimeoutExpired:
            raise MachineError(f"NCCL: the cards {cards} did not answer each other within {RANKS_WAIT} s") from None
        finally:
            for process in ranks:
                process.kill()
                process.wait()
    if any(process.returncode for process in ranks):
        said = [line for _, error in answers for line in error.splitlines() if line.strip()]
        raise MachineError(f"NCCL over the cards {cards}: {said[-1] if said else 'ended without a word'}")
    return f"cards {cards}: {answers[0][0].strip()}"


def _rank(rank: int, meet: str) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", init_method=f"file://{meet}", rank=rank, world_size=2)
    numbers = torch.full((2**26,), float(rank + 1), device="cuda")
    torch.distributed.all_reduce(numbers)
    torch.cuda.synchronize()
    if not bool((numbers == 3).all()):
        raise SystemExit("the sum is wrong")
    if rank == 0:
        print(f"{numbers.nbytes / 2**20:.0f} MiB summed")
    torch.distributed.destroy_process_group()


TESTS: dict[str, Callable[[], str]] = {
    "libraries": libraries, "products": products, "GPU memory": gpu_memory, "Triton": triton_kernel, "bitsandbytes": nf4,
    "attention": attention, "model": model, "NCCL": all_reduce,
}  # fmt: skip


def main(words: list[str]) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not come between the lines
    console.hush()
    torch.set_num_threads(1)  # small products: many threads would wait for each other
    for result in results({name: TESTS[name] for name in words}):
        print(json.dumps(dataclasses.asdict(result)), file=out, flush=True)
        if device() == "cuda":
            torch.cuda.empty_cache()
    os._exit(0)  # torch's compiling processes take seconds to end


if __name__ == "__main__":  # one of the two processes of `all_reduce`
    _rank(int(sys.argv[1]), sys.argv[2])
