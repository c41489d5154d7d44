#!/usr/bin/env python3
"""Time the default run as a user types it, beside the tutorial's script: answers, evaluation, merged weights. usage: answers.py OUT.json

Needs the standard workload (benchmarks/workload.py) in the folder WORK, default /tmp/work, and a GPU for itself. Every case is a
process of its own, timed from its start to its exit. silent_s: the longest time without a new line on the screen. What is done is in
OUT.json as soon as a case ends; cases that are there already are not repeated.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from finetune import files  # noqa: E402
from finetune.inference import decode  # noqa: E402
from finetune.machine import gpus  # noqa: E402
from finetune.run import provenance  # noqa: E402

WORK = Path(os.environ.get("WORK", "/tmp/work"))
PLACE = WORK / "answers"
DEFAULT = {
    "MODEL_NAME": str(WORK / "model"),
    "DATASET_NAME": str(WORK / "rows.json"),
    "EVAL_DATASET_NAME": str(WORK / "held_out.json"),
    "MAX_STEPS": "60",
    "SAVE_STEPS": "0",
}  # fmt: skip  (60 and 1,200 tokens an answer are the defaults; a checkpoint is not written by the script either)
SMALL = {"MAX_STEPS": "4", "MAX_NEW_TOKENS": "100", "SAVE_MERGED": "0"}
CASES: dict[str, dict[str, str]] = {
    "cold": {}, "warm": {}, "within 12 GiB": SMALL | {"MAX_MEMORY": "12"}, "within 8 GiB": SMALL | {"MAX_MEMORY": "8"},
}  # fmt: skip


def main() -> None:
    """All cases."""
    out = Path(sys.argv[1])
    found: dict[str, Any] = json.loads(out.read_bytes()) if out.exists() else {}
    gpu = gpus.gpus(os.environ)[0]
    found |= dict(
        gpu=gpu.name, driver=gpu.driver, versions=provenance.versions(), command="benchmarks/answers.py OUT.json"
    )
    cases: dict[str, Any] = found.setdefault("cases", {})

    def done(name: str, result: dict[str, Any]) -> None:
        cases[name] = result
        found["summary"] = summary(cases)
        files.write_json(out, found)
        print(name, {k: v for k, v in result.items() if k not in ("said", "timings")}, flush=True)

    if "cold" not in cases:
        shutil.rmtree(PLACE / "cache", ignore_errors=True)
    for name in ("cold", "warm"):
        if name not in cases:
            done(name, train(name))
    if "script" not in cases:
        done("script", script())
    if "ask" not in cases:
        done("ask", ask("warm"))
    if "decode" not in cases:
        followed([sys.executable, "benchmarks/decode.py", str(PLACE / "decode.json")], {})
        done("decode", json.loads((PLACE / "decode.json").read_bytes())["results"])
    for name in ("within 12 GiB", "within 8 GiB"):
        if name not in cases:
            done(name, train(name))


def train(name: str) -> dict[str, Any]:
    """One run of this program. memory: its peaks in GiB."""
    folder = PLACE / name.replace(" ", "-")
    settings = DEFAULT | {"OUTPUT_DIR": str(folder), "OVERWRITE": "1"} | CASES[name]
    command = [sys.executable, "entrypoint.py", "train", *(f"{k}={v}" for k, v in settings.items())]
    seen = followed(command, caches())
    record = json.loads((folder / "run.json").read_bytes())
    if name != "warm":  # of which the answers are asked
        shutil.rmtree(folder / "merged", ignore_errors=True)
    return dict(
        seconds=seen.seconds, silent_s=seen.silent, command=" ".join(command[1:]), timings=record["timings"], memory=record["memory"],
        plan=record["training"]["plan"]["reason"], step_s=record["training"]["step_s"], tokens_per_s=record["training"]["tokens_per_s"],
        evaluation={k: v for k, v in (record.get("evaluation") or {}).items() if not isinstance(v, list)},
        adapter_sha256=record["files"]["adapter/adapter_model.safetensors"]["sha256"], said=seen.lines,
    )  # fmt: skip


def ask(name: str) -> dict[str, Any]:
    """The question, asked of the adapter on its base in 4 bits and of the merged weights. first_s: from process start to the first letters."""
    result, folder, aside = {}, PLACE / name, PLACE / "adapter-aside"
    question, tokens = "一个患有急性阑尾炎的病人已经发病5天,腹痛稍有减轻但仍然发热,此时应如何处理?", 400
    command = [sys.executable, "entrypoint.py", "ask", question, f"OUTPUT_DIR={folder}", f"MAX_NEW_TOKENS={tokens}"]
    for part in ("adapter", "merged"):
        seen = followed(command, caches())
        speed = (tokens - decode.EVERY) / (seen.last - seen.first)  # letters come EVERY tokens
        result[part] = dict(seconds=seen.seconds, first_s=seen.first, tokens_per_s=round(speed, 1))
        if part == "adapter":
            shutil.move(folder / "adapter", aside)
    shutil.move(aside, folder / "adapter")
    return result


def script() -> dict[str, Any]:
    """The tutorial's script, its one answer included."""
    seen = followed([sys.executable, "benchmarks/tutorial_whole.py", str(PLACE / "script")], {})
    shutil.rmtree(PLACE / "script", ignore_errors=True)
    return dict(seconds=seen.seconds, silent_s=seen.silent, **json.loads(seen.lines[-1]))


def caches() -> dict[str, str]:
    """Variables for caches of this measurement alone."""
    place = PLACE / "cache"
    return dict(
        TORCHINDUCTOR_CACHE_DIR=str(place / "inductor"), TRITON_CACHE_DIR=str(place / "triton"), HF_HOME=str(place / "hf"),
        XDG_CACHE_HOME=str(place),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a process wrote, and when, in seconds from its start. silent: the longest time in which it wrote nothing."""

    lines: list[str]
    seconds: float
    silent: float
    first: float
    last: float


def followed(command: list[str], environ: dict[str, str]) -> Seen:
    """Run a command to its end. Ends this program with its last lines where it fails."""
    began = time.monotonic()
    times, text = [0.0], b""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    while some := os.read(process.stdout.fileno(), 2**16):
        times.append(round(time.monotonic() - began, 1))
        text += some
    code = process.wait()
    seconds = round(time.monotonic() - began, 1)
    lines = text.decode(errors="replace").splitlines()
    if code:
        raise SystemExit("\n".join([f"{command}: ended with {code}", *lines[-30:]]))
    silent = max(later - earlier for earlier, later in itertools.pairwise([*times, seconds]))
    return Seen(lines, seconds, round(silent, 1), times[1], times[-1])


def summary(cases: dict[str, Any]) -> dict[str, Any]:
    """The figures that are quoted."""
    reads: dict[str, Any] = dict(
        script_s=lambda: cases["script"]["seconds"],
        warm_s=lambda: cases["warm"]["seconds"],
        cold_s=lambda: cases["cold"]["seconds"],
        times_the_script=lambda: round(cases["script"]["seconds"] / cases["warm"]["seconds"], 2),
        script_answer_tokens_per_s=lambda: cases["script"]["answer"]["tokens_per_s"],
        decode_16bit_tokens_per_s=lambda: cases["decode"]["16 bits, folded, 1 rows"]["tokens_per_s"],
        decode_4bit_tokens_per_s=lambda: cases["decode"]["4 bits + adapter, as they lie, 1 rows"]["tokens_per_s"],
        decode_batch8_tokens_per_s=lambda: cases["decode"]["4 bits + adapter, folded, 8 rows"]["tokens_per_s"],
        generate_tokens_per_s=lambda: cases["decode"]["16 bits, transformers' generate"]["tokens_per_s"],
        first_update_s=lambda: round(cases["warm"]["timings"]["started_s"] - cases["warm"]["timings"]["before_s"], 1),
        ask_first_token_s=lambda: cases["ask"]["adapter"]["first_s"],
        ask_tokens_per_s=lambda: cases["ask"]["adapter"]["tokens_per_s"],
        evaluation_s=lambda: cases["warm"]["timings"]["evaluation_s"],
    )
    found = {}
    for name, read in reads.items():
        try:
            found[name] = read()
        except KeyError:
            continue  # its case has not ended yet
    return found


if __name__ == "__main__":
    main()
