"""Which engine trains, and why."""

from __future__ import annotations

import dataclasses
import gc
import importlib
from typing import TYPE_CHECKING, Any

from finetune import console
from finetune.engines.compiled import served
from finetune.settings import Settings

if TYPE_CHECKING:
    from finetune.engines.engine import Engine
    from finetune.machine.gpus import Gpu

MODULES = {"transformers": "plain", "unsloth": "unsloth"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The engine's name, why it was taken, whether it trains on the compiled path, and to the same bytes each time."""

    name: str
    reason: str
    compiled: bool = False
    deterministic: bool = False

    def describe(self) -> str:
        """One line for the console."""
        return f"engine: {self.name}{', compiled' if self.compiled else ''} ({self.reason})"

    def deciding(self) -> dict[str, Any]:
        """The part that decides the trained weights."""
        return dict(engine=self.name, compiled=self.compiled, deterministic=self.deterministic)

    def open(self, settings: Settings) -> Engine:
        """Say what was chosen, and open it with all libraries that training needs. Import nothing that imports them before this."""
        print(self.describe(), flush=True)
        console.hush()  # on a CPU with AVX512-BF16, bitsandbytes warns of a package that nothing here needs
        gc.disable()  # it would walk a million lasting objects again and again, a tenth of the time that imports take
        try:
            with console.stage("loading", "loading the libraries"):
                engine: Engine = importlib.import_module(f"finetune.engines.{MODULES[self.name]}")
                engine.prepare(settings)
        finally:
            gc.freeze()
            gc.enable()
        return engine


def choose(settings: Settings, gpu: Gpu | None, config: dict[str, Any]) -> Choice:
    """ENGINE. If that is auto: transformers on a CPU and where the compiled path serves, otherwise unsloth.

    The compiled path was the faster one on an H100 (benchmarks/h100); other GPUs were not measured. config: the model's config.json.
    """
    against = served.why_not(settings, gpu, config)
    if settings.engine == "unsloth":
        return Choice("unsloth", "ENGINE=unsloth")
    if settings.engine == "transformers":
        why = f"ENGINE=transformers{f'; not compiled: {against}' if gpu and against else ''}"
    elif gpu is None:
        why = "no GPU is visible"
    elif not against:
        why = "its compiled path is the fastest for this GPU and model"
    elif settings.full_determinism is True:
        why = f"FULL_DETERMINISM=1, which unsloth cannot keep; not compiled: {against}"
    else:
        return Choice("unsloth", f"a CUDA GPU, and the compiled path is out: {against}")
    cheap = gpu is None or not against  # under a tenth of the time there: benchmarks/h100
    return Choice(
        "transformers", why, not against, cheap if settings.full_determinism == "auto" else settings.full_determinism
    )
