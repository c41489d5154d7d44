"""Every setting, declared once: its name in lower case, its type, its default, what is allowed, and its help.

`MAX_STEPS=60` in the environment becomes `settings.max_steps`, and `Settings.from_env` is the only way from one to the
other. The reference (`env`), env.example and the README's table are generated from the declarations below.
Standard library only: `--help` and a refused value must answer at once, without the import of torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from finetune.errors import SettingsError


class Secret:
    """A value that never shows itself: `reveal()` is the only way to read it."""

    def __init__(self, value: str):
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "<SECRET>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    also: tuple[float, ...] = (),
    example: str | None = None,
    unless: tuple[str, Any] | None = None,
    free: bool = False,
) -> Any:
    """Declare one setting.

    low, high: allowed range, both ends included; `also` are allowed values outside it.
    unless: (other, value): if the user changes `other` but not this one, the default is `value`.
    free: changing it leaves the trained weights as they are, so a run may be resumed with another value.
    """
    return dataclasses.field(
        default=default,
        metadata=dict(help=help, low=low, high=high, also=also, example=example, unless=unless, free=free),
    )


MICRO_BATCH, ACCUMULATION = 2, 4  # of the recipe: an update has 8 rows
WAYS = ("chat", "alpaca")  # values of PROMPT_TEMPLATE that name no file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The resolved settings of one run. `auto` stays `auto` here and in run.json: the run decides where it uses the value."""

    # Model
    model_name: str = setting(
        "unsloth/DeepSeek-R1-Distill-Llama-8B", "Model to fine-tune: a Hub name or a folder, in 16 bits."
    )
    model_revision: str = setting("main", "Branch, tag or commit of the model.", example="0123abc")
    max_seq_length: int = setting(2048, "Tokens a row may have; longer rows are cut and counted.", low=8)
    load_in_4bit: bool = setting(True, "Hold the frozen weights in 4 bits (NF4).")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = setting(
        "auto", "Compute type; auto: bfloat16 where the GPU has it, else float16, and float32 on a CPU."
    )

    # Data
    dataset_name: str = setting(
        "FreedomIntelligence/medical-o1-reasoning-SFT",
        "Rows to train on: a Hub data set, a file, a folder, a glob, several of these with commas, or `samples` "
        "(bundled rows).",
    )
    dataset_config: str | None = setting(
        "zh", "Configuration of the data set (samples: en, zh).", unless=("dataset_name", None)
    )
    dataset_split: str = setting(
        "train[0:500]",
        "Split, with a slice if wanted: train, train[:100], train[10%:20%].",
        unless=("dataset_name", "train"),
    )
    dataset_revision: str = setting("main", "Branch, tag or commit of the data set.", example="0123abc")
    streaming: bool = setting(
        False, "Read a Hub data set over the network, without keeping its files on the disk.", free=True
    )
    prompt_columns: tuple[str, ...] = setting(
        ("Question",), "Columns that fill the first {} of the template: what the model is asked."
    )
    completion_columns: tuple[str, ...] = setting(
        ("Complex_CoT", "Response"), "Columns that fill the other {}: what it should answer."
    )
    prompt_template: str | None = setting(
        None,
        "Text file with one {} for each column; unset: the medical reasoning template. Rows with instruction and "
        "output take `chat` (the model's chat template) or `alpaca` (Alpaca's own text); unset: `chat` where the model "
        "has a chat template.",
        example="template.txt",
    )
    dataset_format: Literal[
        "auto", "columns", "messages", "sharegpt", "alpaca", "prompt_completion", "prompt_completion_chat", "text"
    ] = setting("auto", "Form of the rows; auto: by their columns.")
    train_on: Literal["all", "response", "last"] = setting(
        "all", "Loss on the whole text, as in the tutorial, only on the responses, or only on the last one."
    )
    keep_reasoning: Literal["auto", "last", "template"] = setting(
        "auto",
        "Reasoning in conversations. auto: all that rows hold is trained; last: only what follows the last question; "
        "template: what the chat template keeps.",
    )
    drop_bad_rows: bool = setting(False, "Leave out malformed rows and count them, instead of stopping at them.")
    dataset_num_proc: int = setting(2, "Processes that tokenize (about 0.7 GB each).", low=1, high=64, free=True)

    # LoRA
    lora_r: int = setting(16, "Rank of the adapter.", low=1, high=1024)
    lora_alpha: int = setting(16, "Scale of the adapter: alpha / r.", low=1, high=100_000)
    lora_dropout: float = setting(0.0, "Dropout before the adapter.", low=0, high=0.9)
    lora_bias: Literal["none", "all", "lora_only"] = setting("none", "Which biases are trained.")
    target_modules: tuple[str, ...] = setting(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        "Linear layers that get an adapter; all-linear takes every one but the head. In models with vision or sound "
        "only the text decoder is adapted.",
    )
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(r) instead.")
    gradient_checkpointing: Literal["auto", "unsloth", "true", "false"] = setting(
        "auto",
        "Recompute activations to save memory. auto: as many layers as the GPU's memory makes necessary, and all of "
        "them on a CPU; unsloth: all, with that engine's offloading.",
    )

    # Training
    per_device_train_batch_size: int | Literal["auto"] = setting(
        "auto",
        "Rows in one forward pass. auto for this and GRADIENT_ACCUMULATION_STEPS: 8 rows an update, in as few passes "
        "as fit the GPU's memory; on a CPU 2 rows a pass. If only this one is auto: 2.",
        low=1,
        high=100_000,
    )
    gradient_accumulation_steps: int | Literal["auto"] = setting(
        "auto",
        "Forward passes in one update. auto: planned if PER_DEVICE_TRAIN_BATCH_SIZE is auto too, otherwise 4.",
        low=1,
        high=100_000,
    )
    max_memory: float | None = setting(
        None,
        "GiB of GPU memory that training plans with and does not exceed; unset: all that is free.",
        low=1,
        example="12",
    )
    warmup_steps: int = setting(5, "Updates until the learning rate is reached.", low=0)
    max_steps: int = setting(
        60,
        "Number of updates; -1: NUM_TRAIN_EPOCHS decides. If both are set, this one wins.",
        low=1,
        also=(-1,),
        unless=("num_train_epochs", -1),
    )
    num_train_epochs: float | None = setting(
        None, "Passes over the rows; set it, and not MAX_STEPS, for a full run.", low=0.001, high=1000, example="1"
    )
    learning_rate: float = setting(2e-4, "Peak learning rate.", low=1e-12, high=10)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        setting(
            "linear",
            "How the learning rate changes during the run.",
        )
    )
    optim: Literal[
        "adamw_8bit", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "paged_adamw_32bit", "adafactor", "sgd"
    ] = setting("adamw_8bit", "Optimizer, by its name in transformers.")
    weight_decay: float = setting(0.01, "Weight decay.", low=0, high=1)
    max_grad_norm: float = setting(1.0, "Gradient norm above which gradients are scaled down.", low=0)
    seed: int = setting(3407, "Seed of adapter, row order and dropout.", low=0, high=2**32 - 1)
    logging_steps: int = setting(10, "Updates between two lines of progress.", low=1, free=True)
    save_steps: int = setting(20, "Updates between two checkpoints; 0: only the last.", low=0, free=True)
    save_total_limit: int = setting(2, "Checkpoints kept.", low=1, free=True)
    engine: Literal["auto", "unsloth", "transformers"] = setting(
        "auto", "auto: the one that was faster on an H100; on a CPU always transformers."
    )
    torch_compile: bool = setting(
        True,
        "Compile the decoder layers where the transformers engine can (a GPU of capability 8.0, bfloat16; Llama, "
        "Qwen2, Qwen3).",
    )
    full_determinism: bool | Literal["auto"] = setting(
        "auto", "Same settings, data and kind of GPU give the same bytes. auto: where it is cheap (CPU, compiled path)."
    )
    report_to: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "Tracker; wandb writes offline where WANDB_API_KEY is unset.", free=True
    )
    health_timeout: float = setting(
        1800,
        "Seconds that one update may take before the container counts as unhealthy; 0: any time.",
        low=0,
        free=True,
    )

    # Did it help?
    eval_rows: int = setting(
        64, "Most rows that are held out of training, to measure the loss on them before and after; 0: none.", low=0
    )
    eval_split: str = setting(
        "auto",
        "Which rows are held out. auto: those right after DATASET_SPLIT; where all rows are in it, the last 5 % of them, "
        "if these are at least 8. Or a split, with a slice if wanted: test, train[500:600].",
    )
    eval_dataset_name: str | None = setting(
        None, "Rows to measure on, from another place, named as in DATASET_NAME; its split is train if EVAL_SPLIT is auto.",
        example="/data/held-out.jsonl",
    )  # fmt: skip
    eval_steps: int = setting(0, "Updates between two measurements; 0: only before and after training.", low=0)
    load_best_model_at_end: bool = setting(
        False, "Keep the adapter of the measurement with the lowest loss on held-out rows, not the last one."
    )
    early_stopping_patience: int = setting(
        0, "End training when so many measurements in a row bring no lower loss on held-out rows; 0: never.", low=0
    )
    early_stopping_threshold: float = setting(
        0.0, "How much lower the loss has to be to count as lower for EARLY_STOPPING_PATIENCE.", low=0
    )
    eval_questions: int = setting(
        3,
        "Held-out rows that are asked beside SAMPLE_QUESTION, on a GPU, in the same time; 0: none.",
        low=0,
        high=31,
        free=True,
    )

    # Before and after
    sample_question: str = setting(
        "一个患有急性阑尾炎的病人已经发病5天,腹痛稍有减轻但仍然发热,在体检时发现右下腹有压痛的包块,此时应如何处理?",
        "Question answered before and after training.",
        free=True,
    )
    max_new_tokens: int = setting(1200, "Most tokens of an answer; 0: no question is asked.", low=0, free=True)

    # Output
    output_dir: str = setting("outputs", "Folder that receives everything.", free=True)
    run_name: str = setting(
        "DeepSeek-R1-Medical-COT",
        "Title of the model card and of the tracker's run.",
        unless=("model_name", "fine-tuned"),
        free=True,
    )
    save_adapter: bool = setting(True, "Keep the adapter.", free=True)
    save_merged: bool = setting(True, "Write the merged 16-bit weights.", free=True)
    overwrite: bool = setting(False, "Start again from the beginning and replace the run in OUTPUT_DIR.", free=True)
    tolerance: float | None = setting(
        None,
        "For `reproduce`: relative difference of the losses that is accepted where the bytes differ, as between "
        "GPU models.",
        low=0,
        high=1,
        example="0.01",
        free=True,
    )

    # Hub
    hf_token: Secret | None = setting(
        None, "Token for private models and for pushing; HF_TOKEN_FILE reads it from a file.", free=True
    )
    push_to_hub: bool = setting(False, "Publish after verification.", free=True)
    hub_model_id: str | None = setting(
        None, "Repository of the adapter.", example="you/DeepSeek-R1-Medical-COT", free=True
    )
    hub_merged_model_id: str | None = setting(
        None,
        "Repository of the merged weights. Set it to publish them too.",
        example="you/DeepSeek-R1-Medical-COT-merged",
        free=True,
    )
    hub_private_repo: bool = setting(True, "New repositories are private.", free=True)
    wandb_api_key: Secret | None = setting(
        None, "Key of Weights & Biases; WANDB_API_KEY_FILE reads it from a file.", free=True
    )

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str], command_line: Mapping[str, str] | None = None, *, publishes: bool = False
    ) -> Settings:
        """Read the settings out of `environ`; `command_line` wins over it, and may hold no unknown name.

        publishes: whether they must be enough to publish with, whatever PUSH_TO_HUB says.

        Raises SettingsError with every problem at once, each as `NAME=value: what is wrong, what is allowed, an example`.
        """
        words = dict(command_line or {})
        merged = {**environ, **words}
        problems = [*_unknown(environ, strict=False), *_unknown(words, strict=True)]
        values: dict[str, Any] = {}
        for declared in declarations():
            try:
                value = declared.read(merged, words)
                if value is not None:
                    values[declared.field] = value
            except ValueError as error:
                problems.append(str(error))
        changed = {d.field for d in declarations() if values.get(d.field, d.default) != d.default}
        for declared in declarations():
            other, value = declared.unless or ("", None)
            if other in changed and declared.field not in values:
                values[declared.field] = value
        settings = cls(**values)
        settings = settings.replaced(output_dir=os.path.expanduser(settings.output_dir))
        problems += _cross_checks(settings, publishes or settings.push_to_hub)
        if problems:
            raise SettingsError(*problems)
        return settings

    @property
    def rows_of_a_pass(self) -> int:
        """Rows of one forward pass where nothing is planned."""
        size = self.per_device_train_batch_size
        return MICRO_BATCH if size == "auto" else size

    @property
    def rows_per_update(self) -> int:
        """Rows of one update: 2 x 4 as in the recipe, where a number does not say otherwise."""
        passes = self.gradient_accumulation_steps
        return self.rows_of_a_pass * (ACCUMULATION if passes == "auto" else passes)

    @property
    def micro_batch(self) -> int | None:
        """Rows of one forward pass; None: planned."""
        planned = self.per_device_train_batch_size == self.gradient_accumulation_steps == "auto"
        return None if planned else self.rows_of_a_pass

    @property
    def recomputes(self) -> bool | None:
        """Whether the activations of all layers are recomputed, or those of none; None: planned."""
        return None if self.gradient_checkpointing == "auto" else self.gradient_checkpointing != "false"

    @property
    def template_file(self) -> str | None:
        """The file that PROMPT_TEMPLATE names; None: it names none, but a way to write rows."""
        return None if self.prompt_template in WAYS else self.prompt_template

    def replaced(self, **values: Any) -> Settings:
        """A copy with other values."""
        return dataclasses.replace(self, **values)

    def secrets(self) -> list[str]:
        """The secrets themselves, for whoever has to keep them out of a text."""
        found = (getattr(self, d.field) for d in declarations() if d.secret)
        return [value.reveal() for value in found if value is not None]

    def record(self) -> dict[str, Any]:
        """The settings as JSON values under their names, secrets left out."""
        found = {d.name: getattr(self, d.field) for d in declarations() if not d.secret}
        return typing.cast("dict[str, Any]", json.loads(json.dumps(found)))

    def deciding(self) -> dict[str, Any]:
        """The part of `record()` that decides the trained weights."""
        free = {d.name for d in declarations() if d.free}
        return {name: value for name, value in self.record().items() if name not in free}


@dataclasses.dataclass(frozen=True)
class Declaration:
    """One setting as declared in `Settings`."""

    field: str
    type: Any
    default: Any
    help: str
    low: float | None
    high: float | None
    also: tuple[float, ...]
    example: str | None
    unless: tuple[str, Any] | None
    free: bool

    @property
    def name(self) -> str:
        return self.field.upper()

    @property
    def secret(self) -> bool:
        return Secret in typing.get_args(self.type)

    @property
    def kind(self) -> Any:
        """The type without `None` and without `auto`."""
        options = typing.get_args(self.type)
        return options[0] if type(None) in options or self.planned else self.type

    @property
    def planned(self) -> bool:
        """Whether the value may be `auto` beside a number or a yes or no."""
        return Literal["auto"] in typing.get_args(self.type)

    def allowed(self) -> str:
        """What a value may be, in words."""
        if not self.planned:
            return self._allowed()
        return f"auto, {self._allowed()}" if self.kind is bool else f"auto, or {self._allowed()}"

    def _allowed(self) -> str:
        if self.kind is bool:
            return "1 or 0 (also true/false, yes/no, on/off)"
        if typing.get_origin(self.kind) is Literal:
            return "one of " + ", ".join(typing.get_args(self.kind))
        if typing.get_origin(self.kind) is tuple:
            return "names with commas between"
        if self.kind in (int, float):
            noun = "a whole number" if self.kind is int else "a number"
            if self.low is not None and self.high is not None:
                noun += f" from {self.low:.10g} to {self.high:.10g}"
            elif self.low is not None:
                noun += f" of at least {self.low:g}"
            return " or ".join([noun, *(f"{value:g}" for value in self.also)])
        return "text"

    def shown_default(self) -> str:
        return text(self.default)

    def read(self, environ: Mapping[str, str], command_line: Mapping[str, str]) -> Any:
        """The value the user gave, or None. Raises ValueError with the whole sentence for the user."""
        raw = _unquote(environ.get(self.name, ""))
        if any("\ud800" <= letter <= "\udfff" for letter in raw):  # how Python keeps bytes that are no UTF-8
            shown = "" if self.secret else f"={ascii(raw)[1:-1]}"
            raise ValueError(f"{self.name}{shown}: not UTF-8; write it in UTF-8")
        if not self.secret:
            return self.parse(raw) if raw else None
        if self.name in command_line:
            raise ValueError(
                f"{self.name}: a secret on the command line shows in process lists and logs; "
                f"set it in the environment, or {self.name}_FILE to the file that holds it"
            )
        file = _unquote(environ.get(f"{self.name}_FILE", ""))
        if raw and file:
            raise ValueError(f"{self.name} and {self.name}_FILE are both set: keep one")
        if file:
            shown = (
                f"={file}" if "/" in file else ""
            )  # without one it may be the secret itself, given to the wrong name
            try:
                raw = Path(file).read_text(encoding="utf-8").strip()
            except (OSError, ValueError) as error:  # not UTF-8, or a name with a NUL
                reason = _closed(file) or getattr(error, "strerror", None) or "not a text file"
                raise ValueError(
                    f"{self.name}_FILE{shown}: cannot be read ({reason}); it takes the path of a file that holds "
                    f"nothing but the secret, for example {self.name}_FILE=/run/secrets/{self.field}"
                ) from None
            if not raw:
                raise ValueError(f"{self.name}_FILE{shown}: the file is empty; it takes a file that holds the secret")
        if raw and not (raw.isascii() and raw.isprintable() and " " not in raw):
            raise ValueError(f"{self.name}: holds spaces or characters that no token has; copy it again")
        return Secret(raw) if raw else None

    def parse(self, raw: str) -> Any:
        """One value from its text. Raises ValueError with the whole sentence for the user."""
        kind, value = self.kind, raw.strip()
        if self.planned and value.lower() == "auto":
            return "auto"
        try:
            if kind is bool:
                return _BOOLEANS[value.lower()]
            if kind is int:
                return self._in_range(int(value), raw) if re.fullmatch(r"[+-]?[0-9]{1,18}", value) else self._bad(value)
            if kind is float:
                return self._in_range(float(value), raw) if re.fullmatch(_FLOAT, value) else self._bad(value)
            if typing.get_origin(kind) is Literal:
                value = value.lower()
                if value not in typing.get_args(kind) and value in _BOOLEANS:
                    value = str(_BOOLEANS[value]).lower()  # GRADIENT_CHECKPOINTING=1
                return value if value in typing.get_args(kind) else self._bad(raw)
            if typing.get_origin(kind) is tuple:
                names = tuple(name.strip() for name in value.split(","))
                return names if all(names) and len(set(names)) == len(names) else self._bad(raw)
        except (KeyError, OverflowError):
            self._bad(raw)
        return raw

    def _in_range(self, value: float, raw: str) -> Any:
        inside = (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
        )
        return value if inside or value in self.also else self._bad(raw)

    def _bad(self, raw: str) -> Any:
        hint = "; a comment needs a line of its own" if " #" in raw else ""
        example = self.example or text(self.default)
        raise ValueError(
            f"{self.name}={raw}: not allowed{hint}; it takes {self.allowed()}, for example {self.name}={example}"
        )


def _closed(file: str) -> str | None:
    """Who may read a file that this user may not, and the way out; None: it is not that."""
    try:
        if os.access(file, os.R_OK):
            return None
        found = os.stat(file)
    except OSError:
        return None
    return (
        f"it belongs to user {found.st_uid} with mode {found.st_mode & 0o7777:04o}, and this is user {os.getuid()}: run as its owner "
        f"(docker run --user {found.st_uid}:{found.st_gid}), or chown {os.getuid()} {file}"
    )


def declarations() -> tuple[Declaration, ...]:
    """All settings, in the order in which they are declared."""
    global _DECLARATIONS
    if not _DECLARATIONS:
        types = typing.get_type_hints(Settings)
        _DECLARATIONS = tuple(
            Declaration(field=f.name, type=types[f.name], default=f.default, **f.metadata)
            for f in dataclasses.fields(Settings)
            if f.metadata
        )
    return _DECLARATIONS


_DECLARATIONS: tuple[Declaration, ...] = ()
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_FLOAT = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
# Names that other programs use for these settings. Variables that start with _LIBRARIES belong to the libraries.
_SYNONYMS = {
    "MODEL": "MODEL_NAME",
    "MODEL_ID": "MODEL_NAME",
    "BASE_MODEL": "MODEL_NAME",
    "DATASET": "DATASET_NAME",
    "MAX_LENGTH": "MAX_SEQ_LENGTH",
    "MAX_SEQ_LEN": "MAX_SEQ_LENGTH",
    "LORA_RANK": "LORA_R",
    "RANK_R": "LORA_R",
    "LR": "LEARNING_RATE",
    "EPOCHS": "NUM_TRAIN_EPOCHS",
    "NUM_EPOCHS": "NUM_TRAIN_EPOCHS",
    "STEPS": "MAX_STEPS",
    "BATCH_SIZE": "PER_DEVICE_TRAIN_BATCH_SIZE",
    "TRAIN_BATCH_SIZE": "PER_DEVICE_TRAIN_BATCH_SIZE",
    "GRAD_ACCUM": "GRADIENT_ACCUMULATION_STEPS",
    "HUGGINGFACE_TOKEN": "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN": "HF_TOKEN",
    "HF_API_TOKEN": "HF_TOKEN",
    "HUB_TOKEN": "HF_TOKEN",
    "LOAD_IN_8BIT": "LOAD_IN_4BIT",
    "OUTPUT_PATH": "OUTPUT_DIR",
}
_LIBRARIES = (
    *("HF_HUB_", "HF_HOME", "HF_ENDPOINT", "HF_DATASETS_", "HF_TOKEN_PATH", "WANDB_", "CUDA_", "NVIDIA_", "TORCH"),
    *("UNSLOTH_", "BNB_"),
)


def _unknown(names: Mapping[str, str], *, strict: bool) -> Iterator[str]:
    """A sentence for each name that is nearly a setting's; with `strict`, for each name that is not a setting's."""
    known = {d.name for d in declarations()} | {f"{d.name}_FILE" for d in declarations() if d.secret}
    squeezed = {name.replace("_", ""): name for name in known}
    for name in names:
        if name in known or (not names[name] and not strict):
            continue
        upper = name.upper().replace("-", "_")
        right = _SYNONYMS.get(upper) or squeezed.get(upper.replace("_", ""))
        if right is None and len(upper) > 4 and not (upper.startswith(_LIBRARIES) and not strict):
            right = next((k for k in sorted(known) if len(k) > 4 and _one_slip(upper, k)), None)
        if right is not None:
            shown = "" if right.startswith(tuple(d.name for d in declarations() if d.secret)) else names[name]
            yield f"{name}: there is no such setting; did you mean {right}? For example {right}={shown}"
        elif strict and upper.startswith(_LIBRARIES):
            yield f"{name}: is a variable of the libraries and no setting; set it in the environment or in .env, and not here"
        elif strict:
            near = _nearest(upper, known)
            yield f"{name}: there is no such setting; {near}`env` lists them all, for example MAX_STEPS=60"


def _nearest(name: str, known: set[str]) -> str:
    """For a name with more than one slip."""
    import difflib  # takes some milliseconds, and only a mistake needs it

    found = difflib.get_close_matches(name, sorted(known), 1, 0.75)
    return f"did you mean {found[0]}? " if found else ""


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter added, left out or changed, or two neighbours swapped, makes `a` into `b`."""
    if abs(len(a) - len(b)) > 1 or a == b:
        return a == b
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    swapped = rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:]
    return rest_a[1:] == rest_b[1:] or rest_a[1:] == rest_b or rest_a == rest_b[1:] or swapped


def _cross_checks(s: Settings, publishes: bool) -> Iterator[str]:
    """Sentences on values that do not go together, before anything is downloaded."""
    for name in ("MODEL_NAME", "DATASET_NAME", "EVAL_DATASET_NAME", "PROMPT_TEMPLATE", "OUTPUT_DIR"):
        path = os.fsencode(getattr(s, name.lower()) or "")
        if len(path) > 3900 or any(len(part) > 240 for part in path.split(b"/")):  # files below it need room too
            yield f"{name}: a path of {len(path)} bytes, or a name in it, is too long; a name has at most 240 bytes"
    if s.max_steps == -1 and s.num_train_epochs is None:
        yield "MAX_STEPS=-1: needs the number of passes over the rows, for example NUM_TRAIN_EPOCHS=1"
    if s.lr_scheduler_type == "polynomial" and s.learning_rate <= 1e-7:
        yield (
            f"LEARNING_RATE={s.learning_rate:g} with LR_SCHEDULER_TYPE=polynomial, which ends at 1e-7: for example "
            "LR_SCHEDULER_TYPE=linear"
        )
    if s.engine == "unsloth" and s.full_determinism is True:
        yield (
            "FULL_DETERMINISM=1 with ENGINE=unsloth: its kernels add numbers in a changing order; use ENGINE=transformers, or "
            "FULL_DETERMINISM=0"
        )
    if publishes:
        if s.hub_model_id is None:
            yield "HUB_MODEL_ID: publishing needs a repository, for example HUB_MODEL_ID=you/DeepSeek-R1-Medical-COT"
        if s.hf_token is None:
            yield "HF_TOKEN: publishing needs a token that may write; set it, or HF_TOKEN_FILE to the file with it"
        if s.push_to_hub and not s.save_adapter:
            yield "SAVE_ADAPTER=0: there would be nothing to publish; set SAVE_ADAPTER=1, or PUSH_TO_HUB=0"
    if s.hub_merged_model_id is not None and not s.save_merged:
        yield "HUB_MERGED_MODEL_ID with SAVE_MERGED=0: there would be no merged weights; set SAVE_MERGED=1"
    if s.hub_merged_model_id is not None and s.hub_merged_model_id == s.hub_model_id:
        yield (
            f"HUB_MERGED_MODEL_ID={s.hub_merged_model_id}: must differ from HUB_MODEL_ID, since a folder with both "
            "loads as the adapter"
        )
    for name, value in (("HUB_MODEL_ID", s.hub_model_id), ("HUB_MERGED_MODEL_ID", s.hub_merged_model_id)):
        if value is not None and not re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]{0,95}", value, re.ASCII):
            yield (
                f"{name}={value}: not a repository name; it takes owner/name, for example "
                f"{name}=you/DeepSeek-R1-Medical-COT"
            )
    if not re.fullmatch(SPLIT, s.dataset_split):
        yield (
            f"DATASET_SPLIT={s.dataset_split}: not a split; it takes a name and perhaps a slice, for example "
            "DATASET_SPLIT=train[0:500]"
        )
    if s.eval_split != "auto" and not re.fullmatch(SPLIT, s.eval_split):
        yield (
            f"EVAL_SPLIT={s.eval_split}: not a split; it takes auto, or a name and perhaps a slice, for example "
            "EVAL_SPLIT=train[500:564]"
        )
    for name, wanted in (
        ("LOAD_BEST_MODEL_AT_END", s.load_best_model_at_end),
        ("EARLY_STOPPING_PATIENCE", s.early_stopping_patience),
    ):
        if wanted and not (s.eval_steps and s.eval_rows):
            yield f"{name}={text(wanted)}: needs measurements during training, for example EVAL_STEPS=20 (and EVAL_ROWS not 0)"
    if s.early_stopping_threshold and not s.early_stopping_patience:
        yield (
            f"EARLY_STOPPING_THRESHOLD={s.early_stopping_threshold:g}: counts only with EARLY_STOPPING_PATIENCE, for example "
            "EARLY_STOPPING_PATIENCE=3"
        )
    if s.dataset_name == "samples" and s.dataset_config not in (None, "en", "zh"):
        yield f"DATASET_CONFIG={s.dataset_config}: the bundled rows have en and zh, for example DATASET_CONFIG=en"
    if s.dataset_format not in ("auto", "columns"):
        alpaca = s.dataset_format == "alpaca" and s.template_file is None
        given = dict(
            PROMPT_COLUMNS=s.prompt_columns != Settings.prompt_columns,
            COMPLETION_COLUMNS=s.completion_columns != Settings.completion_columns,
            PROMPT_TEMPLATE=s.prompt_template is not None and not alpaca,
        )
        if named := [name for name, changed in given.items() if changed]:
            yield (
                f"DATASET_FORMAT={s.dataset_format} with {' and '.join(named)}: only rows with columns take "
                f"{'them' if len(named) > 1 else 'it'}; leave one of the two out, or use DATASET_FORMAT=columns"
            )
    if set(s.prompt_columns) & set(s.completion_columns):
        yield (
            "COMPLETION_COLUMNS: a column cannot be both asked and answered, for example PROMPT_COLUMNS=Question "
            "COMPLETION_COLUMNS=Complex_CoT,Response"
        )


SPLIT = r"(?P<name>[\w.-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?"


def _unquote(value: str) -> str:
    """Remove a pair of quotes around a value: `docker run --env-file` keeps them, and no value needs them."""
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def text(value: Any) -> str:
    """A value as it is written in the environment; empty for None. `from_env` reads the same value out of it again."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, tuple | list):
        return ",".join(value)
    return "" if value is None else repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def reference() -> str:
    """The text of env.example: every setting, commented out, with its help, what is allowed, and its default."""
    lines = [
        "# Settings of the fine-tuning image, with their defaults. Made from finetune/settings.py by make env-example.",
        "# Copy this to .env and remove the # before each line that you change. One NAME=value on each line; comments on lines of their own.",
    ]
    for d in declarations():
        allowed = d.allowed()
        extra = "" if allowed == "text" else f" ({allowed})"
        default = d.shown_default() or d.example or ""
        unless = f" If {d.unless[0].upper()} is changed: {text(d.unless[1]) or 'none'}." if d.unless else ""
        lines += ["", f"# {d.help}{extra}{unless}", f"# {d.name}={default}"]
    return "\n".join(lines) + "\n"


def table() -> str:
    """The README's table of settings."""
    rows = ["| variable | default | |", "| --- | --- | --- |"]
    for d in declarations():
        default = f"`{d.shown_default()}`" if d.shown_default() else ""
        rows.append(f"| `{d.name}` | {default} | {d.help}{'' if d.allowed() == 'text' else f' ({d.allowed()})'} |")
    return "\n".join(rows) + "\n"
