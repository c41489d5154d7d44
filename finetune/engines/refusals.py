"""What libraries raise while a model is loaded or used, as sentences for the user. Light: nothing here imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from finetune.errors import MachineError, SettingsError, first_line, of_machine
from finetune.settings import Settings
from finetune.sources.model import Source


@contextlib.contextmanager
def loading(
    source: Source, remedy: str = "take another model, or copy or download this one again", variable: str = "MODEL_NAME"
) -> Iterator[None]:
    """Whatever a library raises while it loads a model, as a SettingsError that names the model and the remedy.

    variable: which setting the folder comes from. Raises MachineError where the GPU's memory does not hold the weights.
    """
    try:
        yield
    except Exception as error:  # a damaged file or an odd config.json may raise anything
        if full := _out_of_memory(error):
            raise MachineError(
                f"{variable}={source.name}: its weights do not fit the GPU's memory ({full}); take a smaller "
                "model, or a GPU on which nothing else runs"
            ) from None
        if problem := of_machine(error):
            raise MachineError(f"{variable}={source.name}: {problem}") from None
        raise SettingsError(
            f"{variable}={source.name}: cannot be loaded as a causal language model ({first_line(error)}); {remedy}"
        ) from None


@contextlib.contextmanager
def memory_told(
    remedy: str = "plan for less, for example MAX_MEMORY=12; the same command goes on from the last checkpoint",
) -> Iterator[None]:
    """Raise MachineError when GPU memory runs out where there is no smaller plan: an answer, the optimizer, the merge."""
    try:
        yield
    except RuntimeError as error:
        if not (full := _out_of_memory(error)):
            raise
        raise MachineError(
            f"out of GPU memory ({full}). If another program uses this GPU, end it, or {remedy}."
        ) from None


def _out_of_memory(error: Exception) -> str | None:
    """The allocator's first sentence; None: another error. By name: importing torch would cost a refused run a second."""
    return str(error).partition(". ")[0] if type(error).__name__ == "OutOfMemoryError" else None


def not_causal(source: Source) -> SettingsError:
    """The refusal of a model whose prediction of a token depends on later tokens."""
    return SettingsError(
        f"MODEL_NAME={source.name}: is not a causal language model: its prediction of a token depends on later tokens, so it would "
        f"learn to copy. Take a model that generates text, for example {Settings.model_name}"
    )
