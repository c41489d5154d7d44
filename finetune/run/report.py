"""What a run leaves for people: pictures, pages and model cards, made from the record alone; the curves, from the metrics."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from finetune import files
from finetune.data.formats.base import short
from finetune.run.record import PAGES, Dataset, Model, Point, Record, entries, same, shown

CURVES = {
    "loss": "training loss",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "epoch": "epoch",
}
MADE = {
    "adapter": "LoRA adapter and tokenizer",
    "merged": "merged 16-bit weights",
    "report.html": "report with curves",
    "samples.md": "answers before and after",
    "run.json": "record of the run",
}


def write(output: Path, record: Record, metrics: list[dict[str, float]]) -> Record:
    """Write all pages into `output`, and run.json last: where it exists, the run is complete.

    record: with the hashes of the weights. Returns it with those of the pages too.
    """
    files.write_text(output / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metrics))
    curves = draw_curves(metrics, course(record))
    files.write_bytes(output / "curves.png", curves)
    files.write_text(output / "samples.md", samples(record))
    kept = [folder for folder in ("adapter", "merged") if (output / folder).is_dir()]
    for folder in kept:
        files.write_text(output / folder / "README.md", card(record, folder))
    files.write_text(output / "README.md", card(record, kept[0] if kept else "merged"))
    files.write_text(output / "report.html", page(record, curves))
    pages = entries(output, [*PAGES, *(f"{folder}/README.md" for folder in kept)], {})
    whole: Record = {**record, "files": {**record["files"], **pages}}
    files.write_json(output / "run.json", whole)
    return whole


def summary(output: Path, record: Record) -> str:
    """The last lines of a run: what came of it, and where everything is."""
    training, verified = record["training"], record["verification"]
    losses = training["losses"]
    lines = [
        f"done: {training['steps']} updates, loss {losses[0]:.4f} to {losses[-1]:.4f}, {record['timings']['total_s']:.0f} s in all"
    ]
    if sentence := told(record):
        lines.append(f"{sentence}.")
    if record["settings"]["MAX_NEW_TOKENS"]:
        lines += [f"{when + ':':7} {short(record['samples'][when], 200)}" for when in ("before", "after")]
    if verified:
        lines.append(
            f"verified: {verified['changed']} merged tensors changed as the adapter says, {same(verified['kept'], verified['rounded'])}"
        )
        if verified["rounded_away"]:
            lines.append(
                f"note: {verified['rounded_away']} adapted tensors did not change: the learning was too small for 16 bits"
            )
        if verified["unreached"]:
            why = (
                "TARGET_MODULES may name layers that this training does not use"
                if verified["changed"] or verified["rounded_away"]
                else "the first update has a learning rate of 0 where WARMUP_STEPS is not 0; make more, for example MAX_STEPS=60"
            )
            lines.append(
                f"note: {verified['unreached']} adapted tensors did not change: nothing was learned for them, as for "
                f"{verified['unreached_first']}; {why}"
            )
    for name, what in MADE.items():
        if (output / name).exists():
            lines.append(f"{what + ':':26} {output / name}")
    return "\n".join(lines)


def told(record: Record) -> str:
    """Whether training helped, in one sentence; "": not measured."""
    evaluation = record.get("evaluation")
    return evaluation["sentence"] if evaluation else ""


def course(record: Record) -> list[Point]:
    """The loss on held-out rows, where it was measured."""
    evaluation = record.get("evaluation")
    return evaluation["course"] if evaluation else []


def draw_curves(metrics: list[dict[str, float]], held_out: Sequence[Point] = ()) -> bytes:
    """The tutorial's four curves over the global step, as PNG, and beside the training loss that on held-out rows."""
    figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    steps = [row["step"] for row in metrics]
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, CURVES.items(), strict=True):
        axes.plot(
            steps,
            [row[key] for row in metrics],
            color="#2563eb",
            linewidth=1.5,
            marker="o" if len(steps) < 20 else None,
            markersize=3,
        )
        if key == "loss" and held_out:
            points = [[point["step"] for point in held_out], [point["loss"] for point in held_out]]
            axes.plot(*points, color="#dc2626", linewidth=1.5, marker="o", markersize=4, label="held-out rows")
            axes.legend(frameon=False)
        axes.set_title(title)
        axes.set_xlabel("global step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def samples(record: Record) -> str:
    """samples.md: the question, answered before and after; then held-out questions with the rows' own answers."""
    s = record["samples"]
    pages = [
        f"# Before and after\n\n## Question\n\n{s['question']}\n\n## Before training\n\n{s['before']}\n\n## After training\n\n{s['after']}\n"
    ]
    for number, row in enumerate(s.get("held_out", []), 1):
        pages.append(
            f"# Held-out question {number}\n\n{row['question']}\n\n## Before training\n\n{row['before']}\n\n## After training\n\n"
            f"{row['after']}\n\n## Answer in the data\n\n{row['reference']}\n"
        )
    return "\n".join(pages)


def card(record: Record, kind: str) -> str:
    """The model card of `adapter` or `merged`, with metadata that the Hub accepts."""
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
    rows = {
        "base model": _at(base, record["model"]["commit"]),
        "data": _at(dataset, record["dataset"]["commit"]),
        "rows": record["dataset"]["trained"],
        "updates": training["steps"],
        "loss, first and last update": f"{training['losses'][0]:.4f}, {training['losses'][-1]:.4f}",
        "LoRA": f"r {settings['LORA_R']}, alpha {settings['LORA_ALPHA']}, on {', '.join(settings['TARGET_MODULES'])}",
        "frozen weights in training": "4 bits (NF4)" if settings["LOAD_IN_4BIT"] else "16 bits",
        "seed": settings["SEED"],
    }
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
    helped = f"{sentence}.\n\n" if (sentence := told(record)) else ""
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n# {settings['RUN_NAME']}\n\n{what}, fine-tuned on one GPU or CPU with trl.\n\n"
        f"| | |\n| --- | --- |\n{table}\n\n{helped}```python\n{load}\n```\n\n"
        "Trained on text that may hold errors; not a medical device, and no substitute for a physician.\n"
    )


def _on_hub(part: Model | Dataset) -> bool:
    return part["commit"] is not None


def _at(name: str, commit: str | None) -> str:
    return f"{name} at {commit[:12]}" if commit else Path(name).name


def _measured(record: Record) -> list[tuple[str, Any]]:
    """What was measured on held-out rows, for a table."""
    e = record.get("evaluation")
    if not e:
        return []
    losses = [("before", e["before"]), ("after", e["after"]), ("change", e["change"])]
    counts = ("rows", "labels", "truncated", "cut", "dropped", "duplicates")
    return [
        ("data", e["name"]),
        *((name, e[name]) for name in counts),  # type: ignore[literal-required]
        *((f"loss, {name}", f"{v['loss']:.4f} (95 %: {v['low']:.4f} to {v['high']:.4f})") for name, v in losses),
        ("perplexity, before and after", f"{e['before']['perplexity']:.4g}, {e['after']['perplexity']:.4g}"),
        ("adapter after update", f"{e['kept']}{', the best one' * e['best']}"),
    ]


def page(record: Record, curves: bytes) -> str:
    """report.html: one file that needs nothing else."""
    escape = html.escape
    training, s = record["training"], record["samples"]

    def table(rows: list[tuple[str, Any]]) -> str:
        body = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(shown(v))}</td></tr>" for k, v in rows)
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
    helped = f"<p><b>{escape(sentence)}.</b></p>" if (sentence := told(record)) else ""
    others = "".join(
        f'<h3>Held-out question {number}</h3><p>{escape(row["question"])}</p><table class="side"><tr><th>before training</th>'
        f"<th>after training</th><th>answer in the data</th></tr><tr>"
        + "".join(f"<td><pre>{escape(row[part])}</pre></td>" for part in ("before", "after", "reference"))
        + "</tr></table>"
        for number, row in enumerate(s.get("held_out", []), 1)
    )
    image = base64.b64encode(curves).decode()
    title = escape(record["settings"]["RUN_NAME"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px }}
th, td {{ text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid #e5e7eb; overflow-wrap: anywhere }}
th {{ font-weight: 600; width: 18rem }}
.side {{ table-layout: fixed }} .side th {{ width: auto }}
img {{ max-width: 100% }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f3f4f6; padding: 1rem; border-radius: .5rem }}
</style></head><body>
<h1>{title}</h1>{helped}{table(summary)}
<h2>Curves</h2><img alt="loss (of training and of held-out rows), learning rate, gradient norm and epoch over the global step" src="data:image/png;base64,{image}">
<h2>Before and after</h2><p>{escape(s["question"])}</p>
<h3>Before training</h3><pre>{escape(s["before"])}</pre><h3>After training</h3><pre>{escape(s["after"])}</pre>{others}
<h2>First row as it is trained</h2><p>The loss is on what stands between ‹ and ›.</p><pre>{escape(s.get("row", ""))}</pre>
<h2>Held-out rows</h2>{table(_measured(record))}
<h2>Rows</h2>{table(list(record["dataset"].items()))}
<h2>Verification</h2>{table(list((record["verification"] or {}).items()))}
<h2>Settings</h2>{table(list(record["settings"].items()))}
<h2>Environment</h2>{table([(k, v) for k, v in record["environment"].items() if k != "packages"] + list(record["environment"]["packages"].items()))}
<h2>Files, sha256</h2>{table(hashes)}
</body></html>
"""
