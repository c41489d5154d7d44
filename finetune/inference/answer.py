"""Greedy answers: the sample question before and after training, and `ask`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import console, data, engines, sources
from finetune.errors import HubError, Refusal, SettingsError
from finetune.run import folder
from finetune.settings import Settings
from finetune.sources.model import Source
from finetune.verbs import verify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sample(
    engine: engines.Engine, model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, settings: Settings
) -> Callable[[str], str]:
    """A function that gives `model` the prompt, and says whether before or after training; "" where nothing is asked."""

    def ask(when: str) -> str:
        if not settings.max_new_tokens:
            return ""
        console.phase("asking", f"asking the sample question {when} training")
        with engine.answering(model):
            return answer(model, tokenizer, prompt, settings.max_new_tokens)

    return ask


def answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, limit: int, show: bool = False) -> str:
    """The model's greedy continuation of `prompt`, at most `limit` new tokens, without special tokens.

    show: print it as it comes.
    """
    import torch
    from transformers import TextStreamer

    begun = bool(tokenizer.bos_token) and prompt.startswith(str(tokenizer.bos_token))
    inputs = tokenizer(prompt, add_special_tokens=not begun, return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    autocast: Any = nullcontext()
    if model.device.type == "cuda" and _dtype(model) is not torch.float32:
        autocast = torch.autocast("cuda", _dtype(model))  # the adapter is float32, the base is not
    ends = {tokenizer.eos_token_id, *_ids(getattr(model.generation_config, "eos_token_id", None))}
    with torch.inference_mode(), autocast:
        produced = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=limit, do_sample=False,
            num_beams=1, num_return_sequences=1,
            temperature=None, top_p=None, top_k=None, use_cache=True, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=sorted(ends), streamer=streamer,
        )  # fmt: skip
    new = produced[0, inputs["input_ids"].shape[1] :]
    opened = "<think>" if prompt.endswith("<think>") else ""
    return opened + str(tokenizer.decode(new, skip_special_tokens=True))


def _dtype(model: Any) -> Any:
    """The floating type of the model's embedding, which is the base's."""
    return model.get_input_embeddings().weight.dtype


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def ask(question: str, settings: Settings) -> None:
    """Print the trained model's answer: the adapter on its base in 4 bits, as trained, else the merged weights.

    MODEL_NAME, where it is given, says where the base is now.

    Raises SettingsError where OUTPUT_DIR holds no finished run, or no weights that can be loaded.
    """
    console.hush()
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    output = Path(settings.output_dir)
    record = folder.finished(output)
    console.quiet()
    there = [output / part for part in ("adapter", "merged") if (output / part).is_dir()]
    if not there:
        raise SettingsError(
            f"OUTPUT_DIR={output}: neither adapter nor merged weights are there; train with SAVE_ADAPTER=1"
        )
    dtype = engines.compute_dtype(settings)
    place: dict[str, Any] = dict(dtype=dtype, device_map={"": 0 if torch.cuda.is_available() else "cpu"})
    base = _base(record, settings, output) if there[0] == output / "adapter" else None
    found = there[0] if base else output / "merged"
    own = Source(str(found), None, found)
    with engines.loading(base or own, variable="MODEL_NAME" if base else "OUTPUT_DIR"):
        four_bits = bool(base and record["settings"]["LOAD_IN_4BIT"])
        if four_bits:
            place["quantization_config"] = engines.nf4(dtype)
        model: Any = AutoModelForCausalLM.from_pretrained((base or own).folder, trust_remote_code=False, **place)
    engines.settle_4bit(settings.replaced(load_in_4bit=four_bits), model)
    if base:
        with engines.loading(own, "verify says which of its files is damaged", "OUTPUT_DIR"):
            model = PeftModel.from_pretrained(model, found)
    loaded = data.tokenizer(own)
    as_trained = settings.replaced(
        prompt_template=record["settings"]["PROMPT_TEMPLATE"],
        prompt_columns=tuple(record["settings"]["PROMPT_COLUMNS"]),
        completion_columns=tuple(record["settings"]["COMPLETION_COLUMNS"]),
    )
    form = data.format_of(bool(record["dataset"]["messages"]), loaded, as_trained, folder.day_of(record))
    model.eval()
    with engines.memory_told("ask for fewer tokens, for example MAX_NEW_TOKENS=200"):
        answer(model, loaded, form.prompt(question), settings.max_new_tokens or 1200, show=True)


def _base(record: dict[str, Any], settings: Settings, output: Path) -> Source | None:
    """The base of the recorded run, from this machine or the Hub; None: it is nowhere, and the merged weights are there.

    Raises SettingsError where they are not.
    """
    base, why_not = verify.at_hand(record, settings)
    refusal: type[Refusal] = SettingsError
    if base is None and (commit := record["model"]["commit"]):
        try:
            sources.fetch_model(settings.replaced(model_name=record["settings"]["MODEL_NAME"], model_revision=commit))
            base, why_not = verify.at_hand(record, settings)
        except (HubError, SettingsError) as error:
            refusal, why_not = type(error), f"{error} {why_not}"
    if base is None and not (output / "merged").is_dir():
        raise refusal(f"OUTPUT_DIR={output}: {why_not}, for example MODEL_NAME=/models/base")
    if base is None:
        print(f"the merged weights answer, since the adapter lacks its base: {why_not}", flush=True)
    return base
