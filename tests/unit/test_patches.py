"""Each patch does what it says, and nothing is left of it afterwards. Where a fault of others no longer shows, its patch can go."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.optim import optimizer

from conftest import ROOT
from finetune import patches


def test_each_patch_says_why_where_it_is_discussed_and_when_it_goes() -> None:
    own = [f for f in vars(patches).values() if callable(f) and getattr(f, "__module__", "") == patches.__name__]
    assert len(own) > 5
    for patch in own:
        said = " ".join((patch.__doc__ or "").split())
        assert re.search(r"Why: .* Upstream: .* Goes when ", said), patch.__name__
        assert re.search(r"#\d+|docs/upstream/|_register_custom_module", said), patch.__name__
        assert all((ROOT / page).is_file() for page in re.findall(r"docs/upstream/[\w-]+\.(?:md|py)", said)), said


def test_what_is_kept_out_is_not_found_and_what_is_imported_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept_out.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    patches.keep_out(["kept_out", "json"])
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("kept_out")
        assert importlib.import_module("json").loads("1") == 1
    finally:
        del sys.modules["kept_out"]


def test_packages_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = importlib.metadata.packages_distributions
    monkeypatch.setattr(importlib.metadata, "packages_distributions", made)  # to be set back
    patches.list_packages_once()
    listed = importlib.metadata.packages_distributions()
    assert listed is importlib.metadata.packages_distributions() and listed.keys() == made().keys()


@pytest.mark.parametrize(("optim", "waits"), [("adamw_8bit", 0), ("paged_adamw_8bit", 2)])
def test_only_a_paged_optimizer_waits(monkeypatch: pytest.MonkeyPatch, optim: str, waits: int) -> None:
    counted: list[Any] = []

    def wait(tensor: Any) -> None:
        counted.append(tensor)

    monkeypatch.setattr(optimizer, "sync_gpu", wait)
    parameters = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    adam = bitsandbytes.optim.AdamW32bit(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    with patches.optimizer_does_not_wait(optim):
        adam.step()
    assert len(counted) == waits and optimizer.sync_gpu is wait
    adam.step()
    assert len(counted) == waits + 2


@pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with AVX512-BF16, the only one that packs weights")
def test_a_4_bit_layer_trains_after_it_answered() -> None:
    script = ROOT / "docs" / "upstream" / "bitsandbytes-cpu-packing.py"
    shown = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 1, f"{shown.stdout}: patches.keep_4bit_layout can go"
    layer = bitsandbytes.nn.Linear4bit(256, 192, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    patches.keep_4bit_layout(layer)
    with torch.no_grad():
        layer.eval()(torch.randn(4, 256))
    x = torch.randn(4, 256, requires_grad=True)
    layer.train()(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_an_adapter_keeps_its_type() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    with patches.adapter_keeps_its_type(model):
        for p in model.parameters():
            p.data = p.data.to(torch.bfloat16)
    assert [p.dtype for p in model.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert all(torch.equal(p, was) for p, was in zip(list(model.parameters())[2:], before[2:], strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_forward_and_compiler_are_taken_off_again(fails: bool) -> None:
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    expected, seen = layer(x), []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    try:
        with (
            patches.forwards_replaced([layer], lambda self, x: self.weight.sum() + x),
            patches.compiled([layer], backend=backend),
        ):
            assert torch.equal(layer(x), layer.weight.sum() + x) and len(seen) == 1
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert torch.equal(layer(x), expected) and len(seen) == 1 and "forward" not in vars(layer)


def test_without_a_gpu_its_tests_are_collected_and_not_taken_for_done() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert answer.returncode == 5, answer.stdout + answer.stderr
    skipped = re.search(r"(\d+) skipped", answer.stdout)
    assert skipped and int(skipped[1]) > 50 and "passed" not in answer.stdout
    assert "needs a CUDA GPU" in answer.stdout
    for asked in ((ROOT / ".ci" / "run").read_text(), (ROOT / "pyproject.toml").read_text()):
        assert "gpu" not in asked


def test_only_patches_change_what_others_made() -> None:
    """By the names that they change; another place of the same name would be another patch."""
    names = (
        "sync_gpu",
        "support_avx512bf16_for_cpu",
        "_compiled_call_impl",
        "_unsloth_gradient_checkpointing",
        "sys.modules.set",
    )
    found = {
        path.relative_to(ROOT).as_posix()
        for path in Path(ROOT, "finetune").rglob("*.py")
        if any(name in path.read_text() for name in names)
    }  # fmt: skip
    assert found == {"finetune/patches.py"}
