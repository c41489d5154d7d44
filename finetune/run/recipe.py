"""The run, top to bottom."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from pathlib import Path

from finetune import console, data, engines, sources
from finetune.inference import answer
from finetune.machine import gpus, preflight
from finetune.run import folder, inputs, report
from finetune.settings import Settings
from finetune.sources import publish
from finetune.weights.parameters import parameters


def run(settings: Settings, environ: Mapping[str, str], recorded: inputs.Record | None = None) -> None:
    """Train, verify, record, publish if asked; a complete run is only published. recorded: a run.json with the same inputs."""
    console.beat("starting")  # in a container that was started again, the last beat is that of the run before
    clock, output, visible = report.Clock(), Path(settings.output_dir), gpus.gpus(environ)
    print(*inputs.look(settings, visible, environ), sep="\n", flush=True)
    sources.hub().login(settings, publishes=settings.push_to_hub)
    with folder.locked(output), engines.memory_told():
        train_in(output, clock, visible, settings, environ, recorded)
    if settings.push_to_hub:
        folder.verify(output)
        publish.publish(settings, output)


def train_in(
    output: Path, clock: report.Clock, visible: list[gpus.Gpu], settings: Settings, environ: Mapping[str, str],
    recorded: inputs.Record | None,
) -> None:  # fmt: skip
    """All of a run that is written to `output`."""
    rows = data.load(settings)
    source = sources.fetch_model(settings)
    preflight.check(settings, visible, environ, parameters(source))
    _ = source.hashing  # begins
    clock.mark("inputs_s")
    choice = engines.choose(settings, visible[0] if visible else None, source.config())
    console.phase("loading", choice.describe())
    engine = choice.open(settings)
    # these import trl, transformers and peft, and unsloth must come before them
    from finetune.training import fit as train
    from finetune.weights import adapter, layout, merge

    console.quiet()
    clock.mark("import_s")
    tokenizer = data.tokenizer(source)
    own_file = (source.folder / "tokenizer.json").is_file()
    tokens = data.tokenize(rows, tokenizer, settings, folder.day(settings, output, recorded), own_file)
    console.phase("loading", f"data: {tokens.describe()}, {rows.dropped + tokens.dropped} dropped")
    print(*(f"data: {note}" for note in tokens.notes), sep="\n", end="\n" * bool(tokens.notes), flush=True)
    identity = folder.identity(settings, {**choice.deciding(), **inputs.check(source, rows, tokens, recorded)})
    if folder.begin(settings, output, identity):
        return print(f"{output}: this run is complete already; OVERWRITE=1 trains it again", flush=True)
    clock.mark("data_s")

    model = engine.load(settings, source)
    engines.check_fits(model, settings, tokens)
    if settings.save_merged:
        layout.check_mergeable(model, source)
    folder.claim(settings, output, identity)
    clock.mark("load_s")
    asked = data.format_of(rows.messages, tokenizer, settings, tokens.day)
    ask = answer.sample(engine, model, tokenizer, asked.prompt(settings.sample_question), settings)
    before = ask("before")
    clock.mark("before_s")
    console.phase("training", train.describe(train.order_of(settings, tokens)))
    fit = train.fit(model, tokens, tokenizer, settings, choice, engine, output / "checkpoints", recorded)
    clock.mark("train_s")
    after = ask("after")
    clock.mark("after_s")

    console.phase("saving", "saving the adapter")
    words = data.rewritten(source.folder, tokens.texts(tokenizer))
    adapter.save(model, source, output, words)
    del model, ask
    gc.collect()  # the trainer and what it calls back hold each other, and the model with them
    merged = merge.merge(source, output, "cuda" if visible else "cpu", words) if settings.save_merged else None
    if merged and words and (misread := data.misread(output / "merged", tokens.texts(tokenizer))):
        print(f"note: {misread}", flush=True)
    if not settings.save_adapter:
        shutil.rmtree(output / "adapter")
    clock.mark("export_s")
    machine = report.environment(visible[0] if visible else None, environ)
    record = report.record(settings, choice, source, rows, tokens, fit, merged, (before, after), machine, clock)
    report.write(output, record, fit.metrics)
    print(report.summary(output, record), flush=True)
