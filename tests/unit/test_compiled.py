"""The packed path: the same numbers as transformers + peft, row by row. Here on a CPU, uncompiled; in tests/gpu on a GPU, as it trains there."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from finetune.engines import plain as engine
from finetune.engines import precision
from finetune.engines.compiled import attention, cross_entropy
from finetune.engines.compiled import path as compiled
from finetune.settings import Settings
from finetune.training import plan, probe

KINDS = ["llama", "qwen2", "qwen3"]
COMMON = 40  # tokens that all rows begin with


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """tests/gpu runs the same tests with another."""
    monkeypatch.setattr(attention, "varlen_attn", tiny.varlen_attention)
    return "cpu"


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = dict(head_dim=16) if request.param == "qwen3" else {}
    return tiny.model(tmp_path_factory.mktemp(request.param), request.param, **extra)


def adapted(folder: Path, device: str, dtype: torch.dtype, dropout: float = 0.0, **options: Any) -> Any:
    """The model with an adapter that does something: LoRA begins with B = 0. options: of from_pretrained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **options)
    base.requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=targets))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(device)
    return model.train()


def rows(count: int = 8, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of different lengths with a common beginning, some of whose labels are left out of the loss."""
    generator = torch.Generator().manual_seed(seed)
    beginning, made = torch.randint(3, 900, (COMMON,), generator=generator).tolist(), []
    for index in range(count):
        ids = [*beginning, *torch.randint(3, 900, (1 + 13 * index,), generator=generator).tolist()]
        skipped = [0 if place < COMMON else index % 5 for place in range(len(ids))]
        labels = [
            -100 if place % 5 == skip else token for place, (token, skip) in enumerate(zip(ids, skipped, strict=True))
        ]
        made.append(dict(input_ids=ids, labels=labels))
    return made


def labels_of(some: list[dict[str, list[int]]]) -> int:
    return sum(label != -100 for row in some for label in row["labels"][1:])


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """On a GPU the attention's gradients are else added up in changing order."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def packed_run(
    model: Any,
    some: list[dict[str, list[int]]],
    size: int,
    device: str,
    on_host: bool = False,
    common: int = COMMON,
    dequantized: bool = False,
) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one update in pieces of `size` rows."""
    count, total = torch.tensor(labels_of(some), device=device), 0.0
    model.zero_grad()
    with compiled.applied(model, len(some), 200, device, common) as packed:
        packed.place_embedding(on_host)
        assert packed.dequantize(dequantized) == dequantized
        for piece in plan.pieces(some, size):
            loss = packed.loss(piece, count)
            loss.backward()
            total += float(loss.detach())
    return total, [p.grad.detach().float().cpu().clone() for p in model.parameters() if p.requires_grad]


def reference(
    folder: Path, some: list[dict[str, list[int]]], dtype: torch.dtype = torch.float32
) -> tuple[float, list[torch.Tensor]]:
    """The same on a CPU by transformers and peft alone, one row at a time; in bfloat16 under autocast, as trl does it."""
    model = adapted(folder, "cpu", dtype)
    total = 0.0
    for row in some:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        labels = torch.tensor(row["labels"][1:])
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / labels_of(some)
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters() if p.requires_grad]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative distance of a gradient tensor from the one expected."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("common", [0, COMMON])
def test_loss_and_gradients_are_those_of_a_float32_reference(folder: Path, device: str, common: int) -> None:
    expected, exact = reference(folder, rows())
    if device == "cpu":
        loss, gradients = packed_run(adapted(folder, device, torch.float32), rows(), 8, device, common=common)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert distance(gradients, exact) < 1e-4
    loss, gradients = packed_run(adapted(folder, device, torch.bfloat16), rows(), 8, device, common=common)
    _, rounded = reference(folder, rows(), torch.bfloat16)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert distance(gradients, exact) < 1.5 * distance(rounded, exact)  # no farther than bfloat16 itself takes it


def test_an_update_is_the_same_in_any_pieces(folder: Path, device: str) -> None:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = adapted(folder, device, dtype)
    loss, gradients = packed_run(model, rows(), 8, device)
    for size in (4, 2, 1):
        other, others = packed_run(model, rows(), size, device)
        assert other == pytest.approx(loss, rel=1e-5 if device == "cpu" else 1e-3)
        assert distance(others, gradients) < (1e-4 if device == "cpu" else 2e-2)


def test_a_row_changes_no_other_row_s_loss(folder: Path, device: str) -> None:
    model = adapted(folder, device, torch.float32 if device == "cpu" else torch.bfloat16)
    some = rows()
    other = [dict(row) for row in some]
    other[3] = {name: [*column[:COMMON], *[5] * len(column[COMMON:])] for name, column in some[3].items()}
    one = torch.tensor(1, device=device)

    def alone(all_rows: list[dict[str, list[int]]], kept: int) -> float:
        masked = [row if i == kept else dict(row, labels=[-100] * len(row["labels"])) for i, row in enumerate(all_rows)]
        with torch.no_grad():
            return float(packed.loss(masked, one))

    with compiled.applied(model, len(some), 200, device, COMMON) as packed:
        before, after = ([alone(which, kept) for kept in range(8)] for which in (some, other))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 3 + [False] + [True] * 4


@pytest.mark.parametrize("common", [0, COMMON])
def test_each_row_s_measured_loss_is_that_of_a_float32_reference(folder: Path, device: str, common: int) -> None:
    """Also of rows that do not begin as the trained ones do: shorter than the shared prefix, or with other tokens in it."""
    some, dtype = rows(), torch.float32 if device == "cpu" else torch.bfloat16
    odd = [dict(input_ids=[5, 6, 7], labels=[5, 6, 7]), dict(input_ids=[9] * 60, labels=[-100] * 30 + [9] * 30)]
    expected = []
    exact = adapted(folder, "cpu", torch.float32)
    for row in [*some, *odd]:
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        target = torch.tensor(row["labels"][1:])
        expected.append(float(torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")))
    model = adapted(folder, device, dtype)
    with compiled.applied(model, len(some), 200, device, common) as packed:
        found = [*packed.losses(some), *packed.losses(odd[:1]), *packed.losses(odd[1:])]
        assert found == [*packed.losses(some), *packed.losses(odd[:1]), *packed.losses(odd[1:])]
        assert found == pytest.approx(expected, rel=1e-5 if device == "cpu" else 1e-2)
        assert packed.losses(some[3:5]) == pytest.approx(expected[3:5], rel=1e-5 if device == "cpu" else 1e-2)
        beginnings = [packed.beginning(row) for row in [*some, *odd]]
    assert len(set(beginnings)) == (3 if common else 1) and model.training
    assert all(p.grad is None for p in model.parameters())


def test_nothing_drops_while_rows_are_measured(folder: Path, device: str) -> None:
    model = adapted(folder, device, torch.float32 if device == "cpu" else torch.bfloat16, dropout=0.5)
    with compiled.applied(model, 8, 200, device, COMMON) as packed:
        state = torch.random.get_rng_state()
        first = packed.losses(rows())
        assert packed.losses(rows()) == first and torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_a_shared_prefix_is_computed_once(folder: Path, device: str) -> None:
    model, some = adapted(folder, device, torch.float32 if device == "cpu" else torch.bfloat16), rows()
    sizes = [len(row["input_ids"]) for row in some]
    with compiled.applied(model, len(some), 200, device, COMMON) as packed:
        for count in (8, 3, 1):
            made = packed.pack(some[:count])
            assert made["input_ids"].numel() == sum(sizes[:count]) - (count - 1) * (COMMON - 1)
            assert int(made["weights"].sum()) == labels_of(some[:count])
            assert made["cu_seqlens"].shape == made["cu_seqlens_k"].shape == (10,)
        with torch.no_grad():
            hidden = model.get_base_model().model(
                inputs_embeds=model.get_input_embeddings()(made["input_ids"].to(device)), attention_mask=None,
                use_cache=False, **{name: made[name] for name in ("position_ids", "cu_seqlens", "cu_seqlens_k", "shared_prefix", "longest")},
            ).last_hidden_state  # fmt: skip
    if device == "cpu":
        alone = model.get_base_model().model(input_ids=torch.tensor([some[0]["input_ids"]])).last_hidden_state
        assert torch.allclose(hidden, alone, atol=1e-5)


def test_the_loss_holds_one_chunk_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slopes: list[Any] = []

    def step(logits: torch.Tensor, *labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert all(slope() is None for slope in slopes)
        losses, slope = real(logits, *labels)
        slopes.append(weakref.ref(slope))
        return losses, slope

    real = cross_entropy._step
    monkeypatch.setattr(cross_entropy, "_step", step)
    monkeypatch.setattr(cross_entropy, "CHUNK", 8)
    hidden, weight = torch.randn(30, 4, requires_grad=True), torch.randn(20, 4)
    labels, counted = torch.randint(0, 20, (30,)), torch.randint(0, 3, (30,))
    found = cross_entropy.CrossEntropy.apply(hidden, weight, labels, counted)
    each = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    assert len(slopes) == 4 and float(found.detach()) == pytest.approx(float((each * counted).sum()), rel=1e-5)
    (gradient,) = torch.autograd.grad(found, hidden)
    (expected,) = torch.autograd.grad((each * counted).sum(), hidden)
    assert torch.allclose(gradient, expected, atol=1e-5)


def test_dropout_leaves_each_row_its_own_prefix(folder: Path, device: str) -> None:
    for dropout, shared in ((0.0, COMMON - 1), (0.1, 0)):
        model = adapted(folder, device, torch.float32, dropout=dropout)
        with compiled.applied(model, 8, 200, device, COMMON) as packed:
            assert packed.shared == shared
    with compiled.applied(model, 8, 200, device, compiled.FEWEST_SHARED) as packed:
        assert packed.shared == 0


def test_the_same_bytes_each_time(folder: Path, device: str) -> None:
    model = adapted(folder, device, torch.float32 if device == "cpu" else torch.bfloat16)
    with deterministic():
        first, second = (packed_run(model, rows(), 4, device) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_recomputed_layers_give_the_same_gradients(folder: Path, device: str) -> None:
    model = adapted(folder, device, torch.float32 if device == "cpu" else torch.bfloat16)
    found = []
    for count in (0, 1, 2):
        engine.recompute(model, count)
        found.append(packed_run(model, rows(), 4, device))
    assert all(distance(gradients, found[0][1]) < 1e-6 for _, gradients in found[1:])


def test_an_embedding_on_the_host_changes_nothing(folder: Path, device: str) -> None:
    model = adapted(folder, device, torch.float32 if device == "cpu" else torch.bfloat16)
    weight = model.get_input_embeddings().weight
    with compiled.applied(model, 8, 200, device) as packed:
        assert packed.movable() == weight.nbytes
    with deterministic():
        there, moved = (packed_run(model, rows(), 4, device, on_host) for on_host in (False, True))
    assert moved[0] == there[0] and distance(moved[1], there[1]) == 0
    assert model.get_input_embeddings().weight.device.type == device
    if device == "cuda":
        with compiled.applied(model, 8, 200, device) as packed:
            before = torch.cuda.memory_allocated()
            packed.place_embedding(on_host=True)
            assert before - torch.cuda.memory_allocated() >= packed.movable()


def test_weights_dequantized_once_change_nothing(folder: Path, device: str) -> None:
    model = adapted(folder, device, torch.bfloat16, quantization_config=precision.nf4(torch.bfloat16))
    precision.settle_4bit(Settings.from_env({}), model)
    layers = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
    weights = [layer.weight for layer in layers]
    with compiled.applied(model, 8, 200, device) as packed:
        assert packed.dequantized_bytes() == 2 * sum(layer.in_features * layer.out_features for layer in layers) > 0
    # bitsandbytes #1623; a flag that the first call set would have each decoder layer compiled twice
    assert all(layer.compute_type_is_set for layer in layers)
    assert all(type(layer).__name__ == "Linear4bit" for layer in layers)
    with deterministic():
        narrow, wide = (packed_run(model, rows(), 4, device, dequantized=dequantized) for dequantized in (False, True))
    assert narrow[0] == wide[0] and distance(wide[1], narrow[1]) == 0
    assert all(layer.weight is weight for layer, weight in zip(layers, weights, strict=True))


def test_an_adapted_weight_is_multiplied_once(folder: Path) -> None:
    model = adapted(folder, "cpu", torch.float32)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name]
    tied = model.config.tie_word_embeddings and model.get_input_embeddings().weight.numel()
    assert probe.multiplied(model) == sum(p.numel() for p in matrices) + int(tied)


def test_dropout_reaches_the_adapter_alone(folder: Path, device: str) -> None:
    model = adapted(folder, device, torch.float32 if device == "cpu" else torch.bfloat16, dropout=0.5)
    torch.manual_seed(0)
    first, second = (packed_run(model, rows(), 4, device)[0] for _ in range(2))
    assert first != second
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    first, second = (packed_run(model, rows(), 4, device)[0] for _ in range(2))
    assert first == second


def test_afterwards_the_model_is_what_it_was(folder: Path, device: str) -> None:
    model = adapted(folder, device, torch.float32)
    ids = torch.tensor([rows()[2]["input_ids"]], device=device)
    before = model(input_ids=ids).logits
    if device == "cpu":
        packed_run(model, rows(), 4, device)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_attention_of_another_scale_is_refused_and_not_computed_wrongly(folder: Path) -> None:
    model = adapted(folder, "cpu", torch.float32)
    model.get_base_model().model.layers[1].self_attn.scaling = 0.3
    with pytest.raises(NotImplementedError, match="scaled by"), compiled.applied(model, 8, 200, "cpu"):
        pass
