"""The run, top to bottom."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from finetune import console, data, sources
from finetune.engines import refusals
from finetune.engines.choose import choose
from finetune.machine import cuda, gpus, memory, preflight
from finetune.run import evaluation, folder, inputs, last, provenance
from finetune.run.identity import versions
from finetune.run.record import SCHEMA_VERSION, Record, below, entries, made
from finetune.settings import Settings
from finetune.sources import publish
from finetune.weights.parameters import parameters


class Clock:
    """Seconds of each part of the run, since the part before it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = self.last = time.perf_counter()

    def mark(self, name: str) -> None:
        """The part called `name` ends now."""
        now = time.perf_counter()
        self.seconds[name], self.last = round(now - self.last, 2), now


def run(settings: Settings, environ: Mapping[str, str], recorded: Record | None = None) -> None:
    """Train, verify, record, publish if asked; a complete run is only published. recorded: a run with the same inputs."""
    console.beat("starting")  # in a container that was started again, the last beat is that of the run before
    clock, output, visible = Clock(), Path(settings.output_dir), cuda.visible(environ)
    print(*inputs.look(settings, visible, environ), sep="\n", flush=True)
    if settings.push_to_hub or inputs.from_hub(settings):
        sources.hub().login(settings, publishes=settings.push_to_hub)
    with folder.locked(output), last.noted(output), refusals.memory_told():
        train_in(output, settings, environ, recorded, visible, clock)
    if settings.push_to_hub:
        folder.verify(output)
        publish.publish(settings, output)


def train_in(
    output: Path,
    settings: Settings,
    environ: Mapping[str, str],
    recorded: Record | None,
    visible: list[gpus.Gpu],
    clock: Clock,
) -> None:
    """All of a run that is written to `output`."""
    gpu = visible[0] if visible else None
    rows = data.load(settings)
    source = sources.fetch_model(settings)
    preflight.check(settings, visible, environ, parameters(source))
    _ = source.hashing  # begins
    clock.mark("inputs_s")
    choice = choose(settings, gpu, source.config())
    engine = choice.open(settings)
    # these import trl, transformers and peft, and unsloth must come before them
    from finetune.engines import checks
    from finetune.inference import answer
    from finetune.training import fit as train
    from finetune.weights import adapter, layout, merge

    console.quiet()
    clock.mark("import_s")
    tokenizer = data.tokenizer(source)
    tokens = data.tokenize(rows, tokenizer, settings, folder.day(settings, output, recorded))
    console.phase("loading", f"{tokens.describe(rows.dropped)}\n{data.shown.told(tokens.first(tokenizer))}")
    identity = {
        **settings.deciding(),
        **choice.deciding(),
        **inputs.check(source, rows, tokens, recorded),
        **versions(provenance.versions()),
    }
    if folder.begin(settings, output, identity):
        return print(f"{output}: this run is complete already; OVERWRITE=1 trains it again", flush=True)
    clock.mark("data_s")

    with console.stage("loading", "loading the model"):
        model = engine.load(settings, source)
    checks.check_fits(model, settings, tokens)
    if settings.save_merged:
        layout.check_mergeable(model, source)
    folder.claim(settings, output, identity)
    clock.mark("load_s")
    prompt = data.format_of(rows.format, tokenizer, settings, tokens.day).prompt(settings.sample_question)
    ask = answer.sample(engine, model, tokenizer, evaluation.prompts(prompt, tokens.held_out), settings)
    before = ask("before")
    clock.mark("before_s")
    console.phase("training", train.describe(train.order_of(settings, tokens)))
    fit = train.fit(
        model,
        tokens,
        tokenizer,
        settings,
        choice,
        engine,
        output / "checkpoints",
        recorded["training"]["plan"] if recorded else None,
    )
    clock.mark("train_s")

    console.phase("saving", "saving the adapter")
    words = data.rewritten(source.folder, tokens.texts(tokenizer))
    adapter.save(model, source, output, words)
    with merge.meanwhile(source, output, "cuda" if visible else "cpu", words, settings.save_merged) as merging:
        after = ask("after")
        clock.mark("after_s")
        del model, ask
        gc.collect()  # the trainer and its callbacks hold each other, and keep the model in memory
    merged = merging.result()
    if merged and words:
        print(data.misread(output / "merged", tokens.texts(tokenizer)), end="", flush=True)
    if not settings.save_adapter:
        shutil.rmtree(output / "adapter")
    clock.mark("export_s")
    record = made(
        schema_version=SCHEMA_VERSION,
        settings=settings.record(),
        engine=dataclasses.asdict(choice),
        model=dict(name=source.name, commit=source.commit, files=source.digests),
        dataset={**rows.record(), **tokens.record(), "dropped": rows.dropped + tokens.dropped},
        training=fit.record(),
        memory=dict(
            training_gib=round(fit.peak_gib, 3),
            process_gib=round(memory.peak_gib(), 3),
        ),
        verification=merged.record() if merged else None,
        evaluation=evaluation.record(tokens.held_out, fit.course),
        samples=dict(
            evaluation.samples(settings.sample_question, prompt, tokens.held_out, before, after),
            row=tokens.first(tokenizer),
        ),
        environment=provenance.environment(gpu, environ),
        timings=dict(
            clock.seconds,
            plan_s=round(fit.plan_s, 2),
            first_step_s=round(fit.first_step_s, 2),
            started_s=round(fit.started_s, 2),
            **({"evaluation_s": round(fit.course.seconds, 2)} if fit.course else {}),
            total_s=round(time.perf_counter() - clock.began, 2),
        ),
        files=entries(output, below(output), merged.sha256 if merged else {}),
    )
    finish(output, record, fit.metrics)


def finish(output: Path, record: Record, metrics: list[dict[str, float]]) -> None:
    """Write the record and its pages, and say what came of the run."""
    from finetune.run import report  # and with it matplotlib, for which the first update should not wait

    print(report.summary(output, report.write(output, record, metrics)), flush=True)
