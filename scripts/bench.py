"""Time every engine and the two baselines on the same rows, one after the other, and print one table. `make bench`.

usage: bench.py [--cases NAME/NAME] [--out FOLDER] [--steps 20] [--timeout 300]

Needs the standard workload (benchmarks/workload.py) in the folder WORK, default /tmp/work. Each case is a process of its own;
its result is in FOLDER/bench.json as soon as it ends. Times of an update are medians from the ninth on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune import files  # noqa: E402
from finetune.machine import gpus  # noqa: E402
from finetune.sources.model import Source  # noqa: E402
from finetune.weights.parameters import parameters  # noqa: E402

SKIPPED = 8  # updates that compile and warm up
CASES: dict[str, dict[str, str] | list[str]] = {
    "tutorial": ["unsloth"],
    "trl": ["transformers"],
    "tutorial, whole run": ["unsloth", "--steps", "60", "--merge", "{folder}"],
    "whole run": {"MAX_STEPS": "60", "SAVE_MERGED": "1", "SAVE_STEPS": "20"},
    "auto": {},
    "auto, 12 GiB": {"MAX_MEMORY": "12"},
    "auto, 8 GiB": {"MAX_MEMORY": "8"},
    "not deterministic": {"FULL_DETERMINISM": "0"},
    "uncompiled": {"ENGINE": "transformers", "TORCH_COMPILE": "0"},
    "unsloth, planned": {"ENGINE": "unsloth"},
    "unsloth, 2 x 4": {"ENGINE": "unsloth", "PER_DEVICE_TRAIN_BATCH_SIZE": "2", "GRADIENT_CHECKPOINTING": "unsloth"},
}


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="/".join(CASES), help=f"names with a slash between: {'/'.join(CASES)}")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--timeout", type=float, default=300)
    given = parser.parse_args()
    chosen = given.cases.split("/")
    if unknown := [name for name in chosen if name not in CASES]:
        parser.error(f"--cases: there is no {', '.join(unknown)}; there are {'/'.join(CASES)}")
    given.out.mkdir(parents=True, exist_ok=True)
    work = Path(os.environ.get("WORK", "/tmp/work"))
    if not (work / "rows.json").is_file():
        parser.error(f"WORK={work}: holds no workload; make it with TOKENIZER=… python benchmarks/workload.py")
    here = machine() | dict(parameters=parameters(Source("model", None, work / "model")))
    results: list[dict[str, Any]] = []
    for name in chosen:
        results.append(dict(case=name, **run(name, given.steps, given.timeout, given.out, work)))
        files.write_json(given.out / "bench.json", dict(machine=here, results=results))
    print(table(results, here["parameters"], here["flop_per_s"]))


def run(name: str, steps: int, timeout: float, out: Path, work: Path) -> dict[str, Any]:
    """One case, in a process of its own."""
    case = CASES[name]
    folder = out / name.replace(", ", "-").replace(" ", "-")
    if isinstance(case, list):
        command = [sys.executable, str(ROOT / "benchmarks" / "tutorial.py"), "--steps", str(steps)]
        command += [word.format(folder=folder) for word in case]
        environ = dict(os.environ, WORK=str(work))
    else:
        settings = workload(work, folder, steps) | case
        command = [sys.executable, str(ROOT / "entrypoint.py"), "train", *(f"{k}={v}" for k, v in settings.items())]
        environ = dict(os.environ)
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    began = time.time()
    with open(out / f"{folder.name}.log", "wb") as log:
        try:
            code = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=timeout, env=environ
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    found: dict[str, Any] = dict(command=" ".join(command[1:]), exit=code, total_s=round(time.time() - began, 1))
    if code:
        print("\n".join(lines(out / f"{folder.name}.log")[-15:]), flush=True)
        return found
    found |= baseline(out / f"{folder.name}.log") if isinstance(case, list) else ours(folder)
    if (folder / "merged").is_dir():
        found["copy_gb_per_s"] = copied(folder / "merged", folder)
    print(json.dumps({k: v for k, v in found.items() if k not in ("losses", "steps_s", "command")}), flush=True)
    return found


def workload(work: Path, folder: Path, steps: int) -> dict[str, str]:
    """Settings for updates on the standard workload and nothing else; results go to `folder`."""
    values = {
        "MODEL_NAME": work / "model", "DATASET_NAME": work / "rows.json", "MAX_STEPS": steps, "MAX_NEW_TOKENS": 0, "EVAL_ROWS": 0,
        "SAVE_STEPS": 0, "SAVE_MERGED": 0, "LOGGING_STEPS": 1, "OVERWRITE": 1, "OUTPUT_DIR": folder,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def lines(log: Path) -> list[str]:
    """What a program printed, whose locale may have another encoding: what we look for is ASCII."""
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


def baseline(log: Path) -> dict[str, Any]:
    """What benchmarks/tutorial.py printed."""
    line = next(line for line in lines(log) if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    return dict(
        plan=f"{result['micro_batch']} x {result['accumulation']}", step_s=result["median_step_s"],
        tokens_per_s=result["tokens_per_s"], peak_gib=result["peak_gib"], import_s=result["import_s"],
        load_s=result["load_s"], first_step_s=result["first_step_s"], started_s=result["started_s"], merge_s=result["merge_s"],
        losses=result["losses"],
    )  # fmt: skip


def ours(folder: Path) -> dict[str, Any]:
    """What a run of this program recorded."""
    record = json.loads((folder / "run.json").read_bytes())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][SKIPPED:]
    plan, timings = record["training"]["plan"], record["timings"]
    return dict(
        engine=record["engine"], plan=f"{plan['micro_batch']} x {plan['accumulation']}", checkpointing=plan["checkpointing"],
        recomputed=plan["recomputed"], step_s=round(statistics.median(row["step_s"] for row in rows), 3),
        tokens_per_s=round(sum(row["tokens"] for row in rows) / sum(row["step_s"] for row in rows)),
        peak_gib=round(record["memory"]["training_gib"], 2), forecast_gib=plan["forecast_gib"],
        forecast_step_s=plan["forecast_step_s"], import_s=timings["import_s"], load_s=timings["load_s"],
        first_step_s=timings["first_step_s"], started_s=timings["started_s"], losses=record["training"]["losses"], steps_s=[row["step_s"] for row in rows],
        timings=timings, verification=record["verification"], adapter_sha256=record["files"]["adapter/adapter_model.safetensors"]["sha256"],
    )  # fmt: skip


def copied(folder: Path, to: Path) -> float:
    """GB a second of a plain copy of a folder's weights, written through to the disk of `to`."""
    began, size = time.time(), 0
    for file in sorted(folder.glob("*.safetensors")):
        target = to / "copied.partial"
        shutil.copyfile(file, target)
        with open(target, "rb") as stream:
            os.fsync(stream.fileno())
        size += target.stat().st_size
        target.unlink()
    return round(size / 1e9 / (time.time() - began), 3)


def machine() -> dict[str, Any]:
    """GPU, driver, versions, and what a plain product of matrices reaches here."""
    from finetune.run import provenance

    visible = gpus.gpus(os.environ)
    if not visible:
        sys.exit("error: no GPU is visible, and there is nothing to time without one")
    gpu = visible[0]
    code = "from finetune.training import probe; print(probe.speed(8192))"
    speed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120).stdout
    return dict(gpu=gpu.name, driver=gpu.driver, versions=provenance.versions(), flop_per_s=float(speed or "nan"))


def table(results: list[dict[str, Any]], parameters: int, flop_per_s: float) -> str:
    """The results side by side; the first baseline is the measure.

    The floor is the arithmetic alone: 4 FLOP a token and weight, forward and through the activations backward.
    """
    measure = next((r for r in results if r["case"].startswith("tutorial") and "step_s" in r), None)
    lines = [
        "| run | plan | s/update | tokens/s | times the tutorial | share of the floor | peak GiB (forecast) | import s | load s | from process start to the end of the first update, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        if "step_s" not in r:
            lines.append(f"| {r['case']} | failed: exit {r['exit']} | | | | | | | | |")
            continue
        ratio = f"{r['tokens_per_s'] / measure['tokens_per_s']:.2f}" if measure else ""
        forecast = f" ({r['forecast_gib']:.1f})" if r.get("forecast_gib") else ""
        floor = 4 * parameters * r["tokens_per_s"] / flop_per_s
        plan = r["plan"] + (f", {r['checkpointing']}" if "checkpointing" in r else ', "unsloth" or full')
        lines.append(
            f"| {r['case']} | {plan} | {r['step_s']} | {r['tokens_per_s']:,} | {ratio} | {floor:.0%} | {r['peak_gib']}{forecast} | "
            f"{r['import_s']} | {r['load_s']} | {r['started_s']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
