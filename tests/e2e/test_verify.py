"""`verify`: damage is named file by file, and tensor by tensor where the hashes have been made to fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import QUICK, ROOT, call, environment, schema_errors, train
from finetune import files
from finetune.errors import OutputError
from finetune.run import record as records
from finetune.settings import Settings
from finetune.verbs import verify
from finetune.weights.shards import index as index_of


@pytest.fixture(scope="module")
def original(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and, trained on it, `out`."""
    home = tmp_path_factory.mktemp("verify")
    shutil.copytree(llama, home / "base")
    train(home / "base", home / "out", MAX_STEPS=2)
    return home


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the run, on the same base."""
    return Path(shutil.copytree(original / "out", tmp_path / "out"))


def said(output: Path, **values: str) -> str:
    return "\n".join(verify.lines(Settings.from_env({"OUTPUT_DIR": str(output), **values})))


def refused(output: Path, **values: str) -> str:
    with pytest.raises(OutputError) as caught:
        said(output, **values)
    return str(caught.value)


def shards(output: Path) -> list[Path]:
    found = sorted((output / "merged").glob("*.safetensors"))
    assert len(found) == 3
    return found


def tampered(output: Path, path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a file of tensors, and the record with it."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    recorded(output, path)


def recorded(output: Path, path: Path) -> None:
    record = json.loads((output / "run.json").read_text())
    record["files"] |= records.entries(output, [str(path.relative_to(output))], {})
    (output / "run.json").write_text(json.dumps(record))


def test_a_whole_run(run: Path) -> None:
    answer = call("verify", str(run), MODEL_NAME="org/another")
    assert answer.returncode == 0, answer.stderr
    assert "files are as the run wrote them" in answer.stdout
    assert "14 tensors are base + adapter, rounded once; the other 7 are the base's; all are finite" in answer.stdout


def test_of_a_float32_base_all_that_was_rounded_is_told(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    for path in base.glob("*.safetensors"):
        save_file({n: v.float() * 1.001 for n, v in load_file(path).items()}, path, metadata={"format": "pt"})
    output = tmp_path / "out"
    answer = call("train", **{**QUICK, "MODEL_NAME": base, "OUTPUT_DIR": output, "TARGET_MODULES": "q_proj"})
    assert answer.returncode == 0, answer.stderr
    said_so = "5 are the base's, 14 are the base's rounded to bfloat16"
    assert f"verified: 2 merged tensors changed as the adapter says, {said_so}\n" in answer.stdout
    record = json.loads((output / "run.json").read_text())
    assert not schema_errors(record) and (record["verification"]["kept"], record["verification"]["rounded"]) == (5, 14)
    assert f"2 tensors are base + adapter, rounded once; the other {said_so}; all are finite" in said(output)
    merged = {n: v for path in (output / "merged").glob("*.safetensors") for n, v in load_file(path).items()}
    for path in base.glob("*.safetensors"):
        for name, value in load_file(path).items():
            assert "q_proj" in name or torch.equal(merged[name], value if "norm" in name else value.bfloat16()), name

    # a merge that rounded the norms too, and a record that does not tell what was rounded
    for path in shards(output):
        save_file({n: v.bfloat16() for n, v in load_file(path).items()}, path, metadata={"format": "pt"})
        recorded(output, path)
    index = output / "merged" / "model.safetensors.index.json"
    files.write_json(index, index_of(shards(output)))
    recorded(output, index)
    assert "holds other tensors than the base's" in refused(output)
    del record["verification"]["rounded"]
    (output / "run.json").write_text(json.dumps(record))
    assert "verification.rounded is missing" in refused(output) and schema_errors(record)


def test_each_damaged_missing_or_added_file_is_named_at_once(run: Path) -> None:
    first, second, third = shards(run)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    content = bytearray(third.read_bytes())
    content[-1000] ^= 1
    third.write_bytes(content)
    (run / "adapter" / "adapter_model.bin").write_bytes(b"?")
    (run / "notes.txt").write_text("mine")
    answer = call("verify", OUTPUT_DIR=run)
    assert answer.returncode == 5 and answer.stderr.count("error: ") == 5 and "notes.txt" not in answer.stderr
    for words in (
        f"{first}: is missing",
        f"{third}: is not the file that the run wrote",
        "adapter_model.bin: is not of this run",
    ):
        assert words in answer.stderr
    assert f"{second}: has {second.stat().st_size:,} bytes, the run wrote" in answer.stderr


def test_added_links_are_named_wherever_they_lead(run: Path, tmp_path: Path) -> None:
    (run / "adapter" / "more").symlink_to(tmp_path)
    (run / "merged" / "gone.safetensors").symlink_to(tmp_path / "nothing")
    problem = refused(run)
    assert "adapter/more: is not of this run" in problem and "merged/gone.safetensors: is not of this run" in problem


def test_a_tensor_that_is_not_base_plus_adapter_is_named_though_its_hash_fits(run: Path) -> None:
    names = []
    for path in shards(run)[:2]:
        names.append(next(n for n in load_file(path) if "_proj" in n or n == "model.embed_tokens.weight"))
        tampered(run, path, lambda tensors: tensors[names[-1]].view(-1)[7:8].add_(1))
    problem = refused(run)
    assert all(name in problem for name in names) and "merged: is not base + adapter" in problem


def test_an_adapter_that_is_not_the_merged_one(run: Path) -> None:
    tampered(run, run / "adapter" / "adapter_model.safetensors", lambda t: [v.mul_(2) for n, v in t.items() if "lora_B" in n])  # fmt: skip
    assert "is not base + adapter" in refused(run)


def test_without_the_base_what_can_be_told_is_told(run: Path, original: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(original / "base", tmp_path / "moved")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["MODEL_NAME"] = str(tmp_path / "gone")
    (run / "run.json").write_text(json.dumps(record))
    lines = said(run)
    assert "the 21 merged tensors are complete and finite" in lines and "adapter's 14 targets is there" in lines
    assert f"Not checked: that merged is base + adapter: the base {tmp_path / 'gone'} is not on this machine" in lines
    assert "are base + adapter, rounded once" in said(run, MODEL_NAME=str(moved))
    (moved / "tokenizer_config.json").write_text("{}")
    assert f"{moved} is no longer the base of this run (tokenizer_config.json)" in said(run, MODEL_NAME=str(moved))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")

    path = shards(run)[0]
    tampered(run, path, spoil)
    assert f"{path}: {sorted(load_file(path))[0]} holds values that are not finite" in refused(run)
    tampered(run, path, lambda tensors: tensors[sorted(tensors)[0]].zero_())
    index = run / "merged" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop(sorted(load_file(path))[0])
    index.write_text(json.dumps(content))
    recorded(run, index)
    assert f"{index}: the index does not match the tensors in the shards" in refused(run)


def test_only_one_of_the_two_was_kept(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    shutil.rmtree(run / "merged")
    record["files"] = {name: entry for name, entry in record["files"].items() if not name.startswith("merged/")}
    (run / "run.json").write_text(json.dumps(record))
    assert "the adapter's 14 pairs are finite. Not checked: that merged is base + adapter: only adapter was kept" in said(run)  # fmt: skip


def test_the_memory_of_a_tensor_and_not_of_the_model(tmp_path: Path) -> None:
    """480 MB of weights in two folders, none larger than 8 MB."""
    code = f"""
import json, resource, sys, torch
from pathlib import Path
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
import tiny
from finetune.weights import adapter, compare, merge
from finetune.sources.model import Source
home = Path({str(tmp_path)!r})
if sys.argv[1] == "make":
    base = tiny.model(home / "base", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False))
    adapter.save(model, Source(str(base), None, base), home)
    merge.merge(Source(str(base), None, base), home)
else:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compare.compare(Source("", None, home / "base"), home)
    print(before // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    values = environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    for word in ("make", "compare"):
        answer = subprocess.run(
            [sys.executable, "-c", code, word], capture_output=True, text=True, env=values, timeout=280
        )
        assert answer.returncode == 0, answer.stderr
    weights = (tmp_path / "merged" / "model.safetensors").stat().st_size
    before, after = map(int, answer.stdout.split())
    # beside torch's own first uses: 8 MB of the base, 8 of the merged, and three float64 copies of 32
    assert weights > 220e6 and after - before < 200, (weights, before, after)
