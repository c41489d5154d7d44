"""`data`: look at the rows before they are trained. No GPU, no torch, no weights: of the model only tokenizer and config are fetched."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

from finetune import console, data, files, patches, sources
from finetune.data import shown
from finetune.errors import MachineError, SettingsError
from finetune.machine import disk
from finetune.settings import Settings

PAGE = "data.html"


def run(settings: Settings, environ: Mapping[str, str], _: str) -> None:
    """Print what is found, and write it to OUTPUT_DIR/data.html. The tokens stay in the store, where a run finds them.

    Raises SettingsError or HubError where rows or tokenizer are wrong or absent, MachineError where OUTPUT_DIR cannot be written.
    """
    if problems := [*disk.unwritable(settings, environ)]:
        raise MachineError(*problems)
    if problems := [*data.held_rows.missing(settings), *data.formats.template.missing(settings)]:
        raise SettingsError(*problems)
    patches.keep_out(["torch"])  # transformers imports it for tokenizers too, which takes seconds and half a GB
    from finetune.data import look, tokens

    console.hush()
    rows = data.load(settings)
    tokenizer = data.tokenizer(sources.fetch_words(settings))
    made = data.tokenize(rows, tokenizer, settings)
    found = look.look(rows, made, tokenizer, tokens.encoder(rows.format, tokenizer, settings, made.day))
    about, parts = made.describe(rows.dropped), look.parts(found, rows, settings.max_seq_length)
    lines = [about]
    for title, inside in parts:
        lines += ["", f"{title}:", *(f"  {line}" for line in inside)]
    lines += ["", f"Rows as they are trained (the loss is on what stands between {shown.OPEN} and {shown.CLOSE}):"]
    for place, text in found.examples:
        lines += [f"  {place}", shown.lines(text), ""]
    print(*lines, sep="\n", flush=True)
    path = Path(settings.output_dir) / PAGE
    files.write_text(path, page(settings.dataset_name, about, parts, found.examples))
    print(f"page: {path}", flush=True)


def page(name: str, about: str, parts: list[tuple[str, list[str]]], examples: list[tuple[str, str]]) -> str:
    """One HTML file that needs no other."""
    sections = "".join(
        f"<h2>{html.escape(title)}</h2><pre>{html.escape(chr(10).join(lines))}</pre>" for title, lines in parts
    )
    rows = "".join(f"<h3>{html.escape(place)}</h3><pre>{_marked(text)}</pre>" for place, text in examples)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f3f4f6; padding: 1rem; border-radius: .5rem }}
mark {{ background: #bbf7d0 }}
</style></head><body>
<h1>{html.escape(name)}</h1><pre>{html.escape(about)}</pre>{sections}
<h2>Rows as they are trained</h2><p>The loss is on what is <mark>marked</mark>.</p>{rows}
</body></html>
"""


def _marked(text: str) -> str:
    return html.escape(text).replace(shown.OPEN, "<mark>").replace(shown.CLOSE, "</mark>")
