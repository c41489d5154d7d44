"""`verify`: is OUTPUT_DIR what the run left there, and are its merged weights base + adapter? No GPU, no network.

Every file against its sha256 in run.json, then block by block, in little memory. Where the base is not on this machine, what
can be told without it is checked, and what cannot is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune import sources
from finetune.errors import HubError, SettingsError
from finetune.run import folder, report
from finetune.settings import Settings
from finetune.sources.model import Source


def run(settings: Settings) -> Iterator[str]:
    """Lines that say what was found, as it is found. Raises SettingsError that names each file or tensor that is wrong."""
    from finetune.weights.compare import compare, structure  # torch, and inference imports this file

    output = Path(settings.output_dir)
    record = folder.verify(output)
    yield f"{output}: all {len(record['files'])} files are as the run wrote them"
    kept = {part for part in ("adapter", "merged") if (output / part).is_dir()}
    if not kept:
        return
    if kept == {"adapter", "merged"}:
        base, why_not = at_hand(record, settings)
        if base is not None:
            made = record.get("verification")
            found = compare(base, output, old=isinstance(made, dict) and "rounded" not in made)
            targets = found.changed + found.rounded_away + found.unreached
            yield (
                f"{output / 'merged'}: {targets} tensors are base + adapter, rounded once; the other "
                f"{report.same(found.kept, found.rounded)}; all are finite"
            )
            return
        missing = f"that merged is base + adapter: {why_not}"
    else:
        missing = f"that merged is base + adapter: only {kept.pop()} was kept"
    yield f"{output}: {structure(output)}. Not checked: {missing}"


def at_hand(record: Mapping[str, Any], settings: Settings) -> tuple[Source | None, str]:
    """The base of the recorded run on this machine, or None and why not.

    MODEL_NAME, where it is given, may say where the folder is now.
    """
    names = [record["settings"]["MODEL_NAME"], *([settings.model_name] if "model_name" in settings.given else [])]
    reasons = []
    for name in dict.fromkeys(names):
        source = sources.cached(name, record["model"]["commit"])
        if source is None:
            reasons.append(f"the base {name} is not on this machine")
            continue
        try:
            found = source.digests
        except (SettingsError, HubError) as error:
            reasons.append(str(error))
            continue
        recorded = record["model"]["files"]
        if found == recorded:
            return source, ""
        differ = sorted(file for file in {*found, *recorded} if found.get(file) != recorded.get(file))
        reasons.append(f"{name} is no longer the base of this run ({', '.join(differ)})")
    return None, "; ".join(reasons) + ". MODEL_NAME says where it is"
