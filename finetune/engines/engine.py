"""What training asks of an engine. The modules `plain` and `unsloth` are engines."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from finetune.settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.engines.compiled.path import Packed
    from finetune.sources.model import Source


class Engine(Protocol):
    """PARTIAL: whether some layers may be recomputed and others not. KEEPS_INPUTS: whether a recomputed layer keeps its input on the GPU."""

    PARTIAL: bool
    KEEPS_INPUTS: bool

    def prepare(self, settings: Settings) -> None:
        """Import the libraries, in the order that they need. Raises MachineError where the engine cannot start."""

    def load(self, settings: Settings, source: Source) -> PeftModel:
        """The frozen base, in 4 bits where that is set, with a fresh adapter in float32, ready to train.

        Raises SettingsError for a model or TARGET_MODULES that cannot be trained, MachineError where the weights do not fit the GPU.
        """

    def answering(self, model: PeftModel) -> AbstractContextManager[None]:
        """The model set up for generation for a while, and for training afterwards."""

    def layers(self, model: PeftModel) -> int:
        """The number of decoder layers whose activations can be recomputed."""

    def recompute(self, model: PeftModel, count: int) -> None:
        """From now on, recompute the activations of the first `count` layers in the backward pass. `count`: 0 to `layers(model)`."""

    def checkpointing(self, count: int) -> bool:
        """The trainer's argument `gradient_checkpointing` for `count` recomputed layers. True: it may switch all of them on again."""

    def path(
        self, model: PeftModel, compiled: bool, max_rows: int, longest: int, shared: int
    ) -> AbstractContextManager[Packed | None]:
        """The model set up for training for a while. Yields the compiled path's micro-batches, or None: the trainer makes its own.

        compiled: whether the compiled path was chosen. max_rows: the most rows of a micro-batch. longest: tokens of the longest row.
        shared: length of the prefix whose tokens and labels are the same in every row.
        """
