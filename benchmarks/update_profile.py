"""Where the time of an update goes, on the standard workload: GPU time by kind of kernel, and CPU time by function.

  python3 benchmarks/update_profile.py [OUT.json] [SETTING=value ...]

Trains as `entrypoint.py train` does. Twelve updates run as they are, two under torch.profiler, and two under cProfile.
"""

from __future__ import annotations

import cProfile
import itertools
import json
import os
import pstats
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # torch is imported here already

import torch  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from finetune import files  # noqa: E402
from finetune.run import recipe  # noqa: E402
from finetune.settings import Settings  # noqa: E402
from finetune.training import trainer  # noqa: E402
from scripts import bench  # noqa: E402

PLAIN, EACH = 12, 2
KINDS = {  # the first whose word is in the kernel's name
    "attention": ("flash",),
    "NF4 to bfloat16": ("kDequantize",),
    "optimizer": ("Optimizer",),
    "matrix products": ("nvjet", "gemm", "cutlass", "splitK", "cublas"),
    "activation functions, norms, rotary embedding, loss (compiled)": ("triton_",),
    "copies": ("Memcpy", "Memset"),
}


class Profiler(TrainerCallback):  # type: ignore[misc]
    """Profiles the updates after the first PLAIN."""

    def __init__(self) -> None:
        self.cpu = cProfile.Profile()
        kinds = torch.profiler.ProfilerActivity
        self.gpu = torch.profiler.profile(activities=[kinds.CUDA])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step in (PLAIN, PLAIN + EACH):
            torch.cuda.synchronize()
        if step == PLAIN:
            self.gpu.start()
        elif step == PLAIN + EACH:
            self.gpu.stop()
            self.cpu.enable()
        elif step == PLAIN + 2 * EACH:
            self.cpu.disable()


def main(words: list[str]) -> None:
    """Run and write the profile."""
    out = Path(words.pop(0)) if words and "=" not in words[0] else ROOT / "outputs" / "profile.json"
    work, folder = Path(os.environ.get("WORK", "/tmp/work")), out.parent / "profiled"
    given = dict(word.split("=", 1) for word in words)
    settings = Settings.from_env(bench.workload(work, folder, PLAIN + 2 * EACH) | given)
    profiler, made = Profiler(), trainer.UpdateTrainer.__init__

    def made_profiled(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.add_callback(profiler)

    trainer.UpdateTrainer.__init__ = made_profiled  # type: ignore[method-assign]
    recipe.run(settings, os.environ)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((folder / "run.json").read_text())
    found = dict(
        command=f"python3 benchmarks/update_profile.py OUT.json {' '.join(words)}".strip(),
        machine=bench.machine(), plan=record["training"]["plan"], engine=record["engine"],
        update_ms=round(1e3 * statistics.median(row["step_s"] for row in rows[8:PLAIN]), 1),
        tokens=dict(timed=mean(rows[8:PLAIN]), profiled=mean(rows[PLAIN : PLAIN + EACH])), **kernels(profiler.gpu),
        cpu_ms=functions(profiler.cpu),
    )  # fmt: skip
    files.write_json(out, found)
    print(json.dumps({k: v for k, v in found.items() if k not in ("machine", "plan", "engine")}, indent=1))


def mean(rows: list[dict[str, float]]) -> int:
    """Tokens of an update."""
    return round(statistics.mean(row["tokens"] for row in rows))


def kernels(profile: Any) -> dict[str, Any]:
    """GPU milliseconds and launches of an update, by kind, and of the largest kernels."""
    kinds: dict[str, float] = defaultdict(float)
    rows = []
    for event in profile.key_averages():
        milliseconds = event.self_device_time_total / 1e3 / EACH
        if milliseconds:
            kinds[
                next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "other")
            ] += milliseconds
            rows.append(dict(kernel=event.key[:100], ms=round(milliseconds, 2), calls=event.count // EACH))
    rows.sort(key=lambda row: -row["ms"])
    return dict(
        gpu_ms=round(sum(kinds.values()), 1), gpu_ms_by_kind={kind: round(ms, 1) for kind, ms in kinds.items()},
        launches=sum(row["calls"] for row in rows), **waits(profile), kernels=rows[:40],
    )  # fmt: skip


def waits(profile: Any) -> dict[str, Any]:
    """Milliseconds of an update in which the GPU does nothing, and the longest such times, with the kernels around them."""
    work = [event for event in profile.events() if event.self_device_time_total]
    work.sort(key=lambda event: event.time_range.start)
    gaps = [
        dict(ms=round((after.time_range.start - before.time_range.end) / 1e3, 2), after=before.name[:60], before=after.name[:60])
        for before, after in itertools.pairwise(work)
    ]  # fmt: skip
    gaps.sort(key=lambda gap: -gap["ms"])
    return dict(idle_ms=round(sum(max(0.0, gap["ms"]) for gap in gaps) / EACH, 1), longest_waits=gaps[: 10 * EACH])


def functions(profile: cProfile.Profile) -> dict[str, float]:
    """CPU milliseconds of an update in the functions that took most, themselves and what they called; slowed by the profiler."""
    stats: Any = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = [
        (f"{Path(file).name}:{line} {name}", own, total) for (file, line, name), (_, _, own, total, _) in stats.items()
    ]
    largest = sorted(rows, key=lambda row: -row[1])[:40]
    return {f"{name} (total {total / EACH * 1e3:.0f})": round(own / EACH * 1e3, 1) for name, own, total in largest}


if __name__ == "__main__":
    main(sys.argv[1:])
