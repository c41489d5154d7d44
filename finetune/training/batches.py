"""How some rows become a loss: the forward pass of a micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import cross_entropy

from finetune.data import IGNORE_INDEX
from finetune.engines import passes
from finetune.engines.token_losses import of_logits, token_losses

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]  # input_ids and labels, lists of ints
HEAD_TOKENS = 32  # of the pass that shows whether the head alone gives the logits


class MicroBatches(Protocol):
    """Computes the loss of rows, and says which parts of the model can be moved. `Packed` is the compiled path's; else `Padded`, `Recipes`.

    shared: length of the shared prefix, computed once for each micro-batch. pads: whether rows are padded.
    """

    shared: int
    pads: bool

    def loss(self, rows: Sequence[Row], count: Tensor) -> Tensor:
        """Summed cross entropy of the rows' labels, divided by `count`: the labels of the whole update. A number, with its graph."""
        ...

    def losses(self, rows: Sequence[Row]) -> list[float]:
        """Summed cross entropy of each row, without dropout and without gradients. The rows have one `beginning`."""
        ...

    def beginning(self, row: Row) -> tuple[int, ...]:
        """What rows of one micro-batch have to have in common, where they are not the rows that are trained."""
        ...

    def movable(self) -> int:
        """Bytes on the GPU that `place_embedding` frees."""
        ...

    def place_embedding(self, on_host: bool) -> None:
        """Keep the input embedding in the host's memory, or not."""
        ...

    def dequantized_bytes(self) -> int:
        """Bytes on the GPU that `dequantize` takes."""
        ...

    def dequantize(self, on: bool) -> bool:
        """Keep 16-bit copies of the 4-bit weights, or drop them. Returns whether there are copies now."""
        ...


class _InPlace:
    """Micro-batches of a model in which nothing can be moved."""

    shared = 0

    def beginning(self, row: Row) -> tuple[int, ...]:
        return ()

    def movable(self) -> int:
        return 0

    def place_embedding(self, on_host: bool) -> None:
        pass

    def dequantized_bytes(self) -> int:
        return 0

    def dequantize(self, on: bool) -> bool:
        return False


class Padded(_InPlace):
    """Rows filled up to the longest, through the model as transformers has it, with the loss of its own logits."""

    pads = True

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, sample: Row):
        """model: with an adapter or without. dtype: of the activations. sample: a row, to find out how the loss can be computed."""
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        self.model = model
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = next(model.parameters()).device if not torch.cuda.is_available() else torch.device("cuda")
        self.dtype = dtype
        self.collate = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)
        self.chunked = self._head_is_all(sample["input_ids"][:HEAD_TOKENS])

    def loss(self, rows: Sequence[Row], count: Tensor) -> Tensor:
        """As `MicroBatches` says. Where the head alone gives the logits, they are computed in chunks, and never all at once."""
        batch = {name: value.to(self.device) for name, value in self.collate(list(rows)).items()}
        labels = batch.pop("labels")
        with self._autocast():
            if self.chunked:
                return _in_chunks(self.base.get_output_embeddings(), self._hidden(**batch), labels, count)
            outputs = self.model(**batch, use_cache=False)
        return _of_logits(outputs.logits, labels, count)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def losses(self, rows: Sequence[Row]) -> list[float]:
        """As `MicroBatches` says. In evaluation mode, so that also what is no module drops nothing."""
        training = self.model.training
        batch = {name: value.to(self.device) for name, value in self.collate(list(rows)).items()}
        labels = batch.pop("labels")[:, 1:]
        self.model.eval()
        try:
            with self._autocast():
                if self.chunked:
                    head, hidden = self.base.get_output_embeddings(), self._hidden(**batch)[:, :-1]
                    found = [token_losses(*row, head.weight, head.bias) for row in zip(hidden, labels, strict=True)]
                else:
                    logits = self.model(**batch, use_cache=False).logits[:, :-1]
                    found = [of_logits(*row) for row in zip(logits, labels, strict=True)]
        finally:
            self.model.train(training)
        return [float(losses.double().sum()) for losses in found]

    def _hidden(self, **batch: Tensor) -> Tensor:
        hidden: Tensor = self.base.base_model(**batch, use_cache=False).last_hidden_state
        return hidden

    def _autocast(self) -> Any:
        lower = self.device.type == "cuda" and self.dtype is not torch.float32
        return torch.autocast("cuda", self.dtype) if lower else contextlib.nullcontext()

    def _head_is_all(self, sample: list[int]) -> bool:
        """Whether the head alone turns hidden states into the model's logits, bit for bit. Granite, for example, also divides by 8."""
        training, ids = self.model.training, torch.tensor([sample], device=self.device)
        self.model.eval()  # nothing is drawn
        try:
            with torch.no_grad(), self._autocast():
                logits = self.base(input_ids=ids, use_cache=False).logits
                hidden = self._hidden(input_ids=ids)
                return torch.equal(self.base.get_output_embeddings()(hidden), logits)
        except Exception:  # the parts may not be where other models have them: Llama 4's are not
            return False
        finally:
            self.model.train(training)


class Recipes(_InPlace):
    """The recipe's own trainer makes micro-batch and loss: trl's SFTTrainer, as unsloth has patched it."""

    def __init__(self, trainer: Any):
        """trainer: an SFTTrainer of the model."""
        self.trainer, self.model = trainer, trainer.model
        self.collate = trainer.data_collator
        self.pads = not getattr(self.collate, "padding_free", False)
        trainer.model_accepts_loss_kwargs = True  # the loss is divided by our count, whatever the model says of itself

    def loss(self, rows: Sequence[Row], count: Tensor) -> Tensor:
        """As `MicroBatches` says."""
        trainer = self.trainer
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            batch = trainer._prepare_inputs(self.collate(list(rows)))
            loss: Tensor = trainer.compute_loss(self.model, batch, num_items_in_batch=count)
        return loss

    def losses(self, rows: Sequence[Row]) -> list[float]:
        """As `MicroBatches` says, row by row through the pass of training: unsloth's other pass keeps the logits of whole rows."""
        found = []
        with passes.without_dropout(self.model):
            for row in rows:
                count = max(1, labels_of([row]))
                found.append(count * float(self.loss([row], torch.tensor(count, device=self.model.device)).detach()))
        return found


def labels_of(rows: Sequence[Row]) -> int:
    """How many tokens the loss is on. The first of a row is not counted, because no token before it predicts it."""
    return sum(label != IGNORE_INDEX for row in rows for label in row["labels"][1:])


def _of_logits(logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """Cross entropy of all of a model's logits (rows, tokens, words), divided by the labels of the whole update."""
    flat, following = logits[:, :-1].reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1)
    return cross_entropy(flat, following, ignore_index=IGNORE_INDEX, reduction="sum") / count


def _in_chunks(head: Any, hidden: Tensor, labels: Tensor, count: Tensor) -> Tensor:
    """The same as trl computes it from hidden states, a few tokens at a time."""
    from trl.trainer import sft_trainer

    size = sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE
    loss: Tensor = sft_trainer._chunked_cross_entropy_loss(
        hidden, head.weight, size, labels=labels, num_items_in_batch=count, lm_head_bias=head.bias
    )[0]
    return loss
