"""What a run leaves for people and programs: run.json, metrics.jsonl, curves.png, samples.md, report.html, model cards."""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.metadata
import io
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import __version__, files
from finetune.environment import NUMERIC

if TYPE_CHECKING:
    from finetune.data import Rows, Tokens
    from finetune.engines import Choice
    from finetune.machine.gpus import Gpu
    from finetune.settings import Settings
    from finetune.sources.model import Source
    from finetune.training.fit import Fit
    from finetune.weights.merge import Merged

SCHEMA_VERSION = 2  # of run.json; the schema is run.schema.json beside this file
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "huggingface-hub", "tokenizers", "safetensors", "unsloth", "unsloth-zoo", "triton", "numpy")  # fmt: skip
CURVES = (
    ("loss", "training loss"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("epoch", "epoch"),
)
ROOT = Path(__file__).resolve().parent.parent.parent


class Clock:
    """Seconds of each part of the run, since the part before it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        """The part called `name` ends now."""
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 2), now


def record(
    settings: Settings, choice: Choice, source: Source, rows: Rows, tokens: Tokens, fit: Fit, merged: Merged | None,
    answers: tuple[str, str], machine: dict[str, Any], clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    """The content of run.json but for `files`: all that decided the result, and what came of it.

    machine: as `environment` gives it.
    """
    timings = {
        **clock.seconds,
        "plan_s": round(fit.plan_s, 2),
        "first_step_s": round(fit.first_step_s, 2),
        "started_s": round(fit.started_s, 2),
        "total_s": round(time.perf_counter() - clock.began, 2),
    }
    return dict(
        schema_version=SCHEMA_VERSION,
        settings=settings.record(),
        engine=dataclasses.asdict(choice),
        model=dict(name=source.name, commit=source.commit, files=source.digests),
        dataset={**rows.record(), **tokens.record(), "dropped": rows.dropped + tokens.dropped},
        training=fit.record(),
        memory=dict(
            training_gib=round(fit.peak_gib, 3),
            process_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        ),
        verification=merged.record() if merged else None,
        samples=dict(question=settings.sample_question, before=answers[0], after=answers[1]),
        environment=machine,
        timings=timings,
    )


def summary(output: Path, record: dict[str, Any]) -> str:
    """The last lines of a run: what came of it, and where everything is."""
    training, verified = record["training"], record["verification"]
    losses = training["losses"]
    lines = [
        f"done: {training['steps']} updates, loss {losses[0]:.4f} to {losses[-1]:.4f}, {record['timings']['total_s']:.0f} s in all"
    ]
    if record["settings"]["MAX_NEW_TOKENS"]:
        lines += [f"before: {_start(record['samples']['before'])}", f"after:  {_start(record['samples']['after'])}"]
    if verified:
        lines.append(
            f"verified: {verified['changed']} merged tensors changed as the adapter says, {same(verified['kept'], verified['rounded'])}"
        )
        if verified["rounded_away"]:
            lines.append(
                f"note: {verified['rounded_away']} adapted tensors did not change: the learning was too small for 16 bits"
            )
        if verified["unreached"]:
            lines.append(
                f"note: {verified['unreached']} adapted tensors did not change: nothing was learned for them, as for "
                f"{verified['unreached_first']}; TARGET_MODULES may name layers that this training does not use"
            )
    for name, what in (("adapter", "LoRA adapter and tokenizer"), ("merged", "merged 16-bit weights"), ("report.html", "report with curves"), ("samples.md", "answers before and after"), ("run.json", "record of the run")):  # fmt: skip
        if (output / name).exists():
            lines.append(f"{what + ':':26} {output / name}")
    return "\n".join(lines)


def same(kept: int, rounded: int) -> str:
    """What is said of merged tensors without a target. rounded: those that were wider than 16 bits in the base."""
    return f"{kept} are the base's" + (f", {rounded} are the base's rounded to bfloat16" if rounded else "")


def _start(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else flat[:200] + " …"


def environment(gpu: Gpu | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """Everything of the machine and the program that can decide a result, as JSON values."""
    import torch

    build = ROOT / "build.json"
    made = json.loads(build.read_bytes()) if build.is_file() else {}
    return dict(
        program=__version__,
        revision=made.get("revision") or _git("rev-parse", "HEAD"),
        dirty=made["dirty"] if "dirty" in made else bool(_git("status", "--porcelain")),
        image=bool(made),
        lock_sha256=made.get("lock_sha256") or _lock(),
        python=platform.python_version(),
        platform=platform.platform(),
        packages=versions(),
        gpu=gpu.name if gpu else None,
        gpu_capability=".".join(map(str, gpu.capability)) if gpu else None,
        driver=gpu.driver if gpu else None,
        cuda=torch.version.cuda if gpu else None,
        cpu=_cpu(),
        cpu_threads=torch.get_num_threads(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        variables={name: environ[name] for name in NUMERIC if environ.get(name)},
    )


def _lock() -> str | None:
    """sha256 of the lock that `make` installed here, which an older driver makes another one; else of the one beside the program."""
    stamp, lock = Path(sys.prefix) / ".stamp-main", ROOT / "docker" / "requirements.txt"
    try:
        return stamp.read_text(encoding="utf-8").split()[1]  # after the version of Python: scripts/bootstrap.sh
    except (OSError, IndexError):
        return files.sha256(lock) if lock.is_file() else None


def _cpu() -> str | None:
    """The CPU's kind. A virtual machine may hide the name; family and model tell the generation all the same."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return None
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{said.get('model name')}, family {said.get('cpu family')}, model {said.get('model')}"


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*words: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def write(output: Path, record: dict[str, Any], metrics: list[dict[str, float]]) -> None:
    """Write everything but the weights into `output`, run.json last: where it exists, the run is complete.

    record: run.json without `files`, which are added here with their sha256.
    """
    files.write_text(output / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metrics))
    curves = draw_curves(metrics)
    files.write_bytes(output / "curves.png", curves)
    files.write_text(output / "samples.md", samples(record))
    weights = entries(output, below(output))
    record = {**record, "files": weights}
    own = ["README.md", "curves.png", "metrics.jsonl", "report.html", "samples.md"]
    for folder in ("adapter", "merged"):
        if (output / folder).is_dir():
            files.write_text(output / folder / "README.md", card(record, folder))
            own.append(f"{folder}/README.md")
    files.write_text(output / "README.md", card(record, "adapter" if (output / "adapter").is_dir() else "merged"))
    files.write_text(output / "report.html", page(record, curves))
    record["files"] = {**weights, **entries(output, own)}
    files.write_json(output / "run.json", record)


def entries(output: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """What run.json says of files, under their names."""
    return {
        name: dict(sha256=sha256, bytes=(output / name).stat().st_size)
        for name, sha256 in files.digests(output, names).items()
    }


def below(output: Path) -> list[str]:
    """Names of all files in `output`/adapter and `output`/merged, relative to `output`."""
    return [f"{folder}/{name}" for folder in ("adapter", "merged") for name in files.below(output / folder)]


def draw_curves(metrics: list[dict[str, float]]) -> bytes:
    """The tutorial's four curves over the global step, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    steps = [row["step"] for row in metrics]
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, CURVES, strict=True):
        axes.plot(
            steps,
            [row[key] for row in metrics],
            color="#2563eb",
            linewidth=1.5,
            marker="o" if len(steps) < 20 else None,
            markersize=3,
        )
        axes.set_title(title)
        axes.set_xlabel("global step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def samples(record: dict[str, Any]) -> str:
    """samples.md: the question, answered before and after."""
    s = record["samples"]
    return f"# Before and after\n\n## Question\n\n{s['question']}\n\n## Before training\n\n{s['before']}\n\n## After training\n\n{s['after']}\n"


def card(record: dict[str, Any], kind: str) -> str:
    """The model card of `adapter` or `merged`, with metadata that the Hub accepts."""
    from huggingface_hub import ModelCardData

    settings, training = record["settings"], record["training"]
    base, dataset = settings["MODEL_NAME"], settings["DATASET_NAME"]
    metadata = ModelCardData(
        base_model=base if _on_hub(record["model"]) else None,
        base_model_relation="adapter" if kind == "adapter" else "finetune",
        datasets=[dataset] if _on_hub(record["dataset"]) else None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["lora", "sft", "trl", *(["unsloth"] if record["engine"]["name"] == "unsloth" else [])],
    )
    rows = [
        ("base model", _at(base, record["model"]["commit"])), ("data", _at(dataset, record["dataset"]["commit"])),
        ("rows", str(record["dataset"]["trained"])), ("updates", str(training["steps"])),
        ("loss, first and last update", f"{training['losses'][0]:.4f}, {training['losses'][-1]:.4f}"),
        ("LoRA", f"r {settings['LORA_R']}, alpha {settings['LORA_ALPHA']}, on {', '.join(settings['TARGET_MODULES'])}"),
        ("frozen weights in training", "4 bits (NF4)" if settings["LOAD_IN_4BIT"] else "16 bits"),
        ("seed", str(settings["SEED"])),
    ]  # fmt: skip
    what = "LoRA adapter" if kind == "adapter" else "Merged 16-bit weights (base + adapter)"
    load = (
        "from peft import AutoPeftModelForCausalLM\n\nmodel = AutoPeftModelForCausalLM.from_pretrained(FOLDER_OR_REPOSITORY)"
        if kind == "adapter" and _on_hub(record["model"])
        # adapter_config.json does not say where a local base stands
        else "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE_FOLDER), FOLDER_OR_REPOSITORY)"
        if kind == "adapter"
        else "from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained(FOLDER_OR_REPOSITORY)"
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n# {settings['RUN_NAME']}\n\n{what}, fine-tuned on one GPU or CPU with trl.\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n```python\n{load}\n```\n\n"
        "Trained on text that may hold errors; not a medical device, and no substitute for a physician.\n"
    )


def _on_hub(part: dict[str, Any]) -> bool:
    return part["commit"] is not None


def _at(name: str, commit: str | None) -> str:
    return f"{name} at {commit[:12]}" if commit else Path(name).name


def page(record: dict[str, Any], curves: bytes) -> str:
    """report.html: one file that needs nothing else."""
    escape = html.escape
    training, s = record["training"], record["samples"]

    def table(rows: list[tuple[str, Any]]) -> str:
        body = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(_shown(v))}</td></tr>" for k, v in rows)
        return f"<table>{body}</table>"

    summary = [
        ("engine", f"{record['engine']['name']} ({record['engine']['reason']})"),
        ("device", record["environment"]["gpu"] or "CPU"),
        ("updates", training["steps"]),
        ("loss, first and last", f"{training['losses'][0]:.4f}, {training['losses'][-1]:.4f}"),
        ("seconds an update", training["step_s"]),
        ("tokens a second", training["tokens_per_s"]),
        ("peak memory", f"{record['memory']['training_gib']:.2f} GiB"),
        *((f"{name.removesuffix('_s')}, seconds", value) for name, value in record["timings"].items()),
    ]
    hashes = [(name, f"{e['sha256']}  {e['bytes']:,} bytes") for name, e in record["files"].items()]
    image = base64.b64encode(curves).decode()
    title = escape(record["settings"]["RUN_NAME"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid #e5e7eb; overflow-wrap: anywhere }}
th {{ font-weight: 600; width: 18rem }}
img {{ max-width: 100% }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f3f4f6; padding: 1rem; border-radius: .5rem }}
</style></head><body>
<h1>{title}</h1>{table(summary)}
<h2>Curves</h2><img alt="loss, learning rate, gradient norm and epoch over the global step" src="data:image/png;base64,{image}">
<h2>Before and after</h2><p>{escape(s["question"])}</p>
<h3>Before training</h3><pre>{escape(s["before"])}</pre><h3>After training</h3><pre>{escape(s["after"])}</pre>
<h2>Rows</h2>{table(list(record["dataset"].items()))}
<h2>Verification</h2>{table(list((record["verification"] or {}).items()))}
<h2>Settings</h2>{table(list(record["settings"].items()))}
<h2>Environment</h2>{table([(k, v) for k, v in record["environment"].items() if k != "packages"] + list(record["environment"]["packages"].items()))}
<h2>Files, sha256</h2>{table(hashes)}
</body></html>
"""


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
