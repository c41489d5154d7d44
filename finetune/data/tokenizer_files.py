"""The model's tokenizer. Where it has a tokenizer.json, that file's ids are the ids, whatever class other files name.

transformers 5 builds some classes anew from vocabulary and merges, with the class's own way to split and to decode: DeepSeek's
files, which name LlamaTokenizerFast, lose every space and every Chinese character so (transformers #45488, #46710).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, processors

from finetune import files
from finetune.errors import SettingsError, first_line
from finetune.sources.model import TOKENIZER_FILES, Source, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Chinese, accents whole and in two parts, emoji, code, white space of all kinds, digits
PROBE = (
    "Below is an instruction.\n### Question:\n一个患有急性阑尾炎的病人已经发病5天,has fever.\n\n\tdef f(x):\n        return  x ** 2  # café, cafe\u0301\r\n"
    "🙂👩🏽‍⚕️ 12.5 mg; 3,000 µg — don't STOP…   かな 한국어 العربية ไทย \u00a0end "
)
PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that read tokenizer.json as it is
# Their 4.x versions put a BOS in front where add_bos_token says so; 5 leaves that to tokenizer.json, which may not know.
BOS_CLASSES = ("Llama", "CodeLlama", "Gemma", "Cohere")


def load(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder. Its PAD, set in memory only, is a token that the model knows, and not EOS if there is another.

    Prints one line if it is not read as the folder's files say. Raises SettingsError where it cannot be loaded, where it
    cannot be made to give the ids of its tokenizer.json, or has no EOS.
    """
    loaded, why = _read(source)
    if why:
        print(f"tokenizer: {why}", flush=True)
    if not loaded.is_fast:
        raise SettingsError(
            f"MODEL_NAME={source.name}: its tokenizer ({type(loaded).__name__}) does not tell which characters a token stands for; take "
            "a model that has a tokenizer.json"
        )
    if loaded.eos_token_id is None:
        raise SettingsError(
            f"MODEL_NAME={source.name}: its tokenizer has no EOS token, so a model could never end an answer"
        )
    _set_pad(loaded, source)
    there = [name for name in TOKENIZER_FILES if (source.folder / name).is_file()]
    loaded.made_of = files.digests(source.folder, there)
    return loaded


def made_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """sha256 of each file that `load` made it of; {}: it comes from elsewhere."""
    found: dict[str, str] = getattr(tokenizer, "made_of", {})
    return found


def _read(source: Source) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer, and why it is not read as transformers would; "" where it is."""
    try:
        read = _reading(source.folder)
    except Exception as error:  # transformers reads config.json too, and an odd one may raise anything; tokenizers raises a bare Exception
        raise SettingsError(
            f"MODEL_NAME={source.name}: its tokenizer or config.json cannot be loaded ({first_line(error)})"
        ) from None
    if read.patched:
        raise SettingsError(
            f"MODEL_NAME={source.name}: transformers makes other tokens than its tokenizer.json, whichever class reads it; take a copy "
            "of the model whose tokenizer_config.json has no setting that changes the text, such as fix_mistral_regex"
        )
    loaded, why = read.own, ""
    if read.misleads([PROBE]):
        reader = type(read.named).__name__ if read.named is not None else "the class that tokenizer_config.json names"
        why = f"tokenizer.json is read as it is; {reader} would change the text (transformers #45488)"
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):  # a class may know what the files do not say
        text = getattr(read.named, name, None)
        if text and getattr(loaded, name) is None and text in loaded.get_vocab():
            setattr(loaded, name, text)
    if read.bos:
        why += f"{'; ' if why else ''}each text begins with {loaded.bos_token}, as add_bos_token says"
    return loaded, why


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a folder's tokenizer may be read. named: by the class that transformers takes, None where that fails.

    own: as its tokenizer.json has it; the same as `named` where that class reads the file as it is, or there is no such file.
    patched: whether even then other parts than the file's are used. bos: whether `own` was made to add a BOS.
    """

    named: PreTrainedTokenizerBase | None
    own: PreTrainedTokenizerBase
    patched: bool = False
    bos: bool = False

    def misleads(self, texts: Iterable[str]) -> bool:
        """Whether loading this folder gives other ids, offsets or texts than its tokenizer.json, for one of the texts."""
        if self.named is self.own:
            return False
        return self.named is None or any(
            _differs(self.named.backend_tokenizer, self.own.backend_tokenizer, text) for text in texts
        )


def _reading(folder: Path) -> Reading:
    names = ("tokenizer.json", "tokenizer_config.json", "config.json")
    return _read_once(folder, tuple((folder / name).stat().st_mtime_ns for name in names if (folder / name).is_file()))


# a vocabulary of 128,000 takes a second to read, and it is needed when the run begins and when it ends
@functools.lru_cache(maxsize=1)
def _read_once(folder: Path, changed: tuple[int, ...]) -> Reading:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = folder / "tokenizer.json"
    named: Any = None
    try:
        named = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:
        if not place.is_file():
            raise
    if not place.is_file():
        return Reading(named, named)
    parts, own = _parts_of(place), named
    if named is None or not _reads_file(type(named)) or _parts(named.backend_tokenizer) != parts:
        own = PreTrainedTokenizerFast.from_pretrained(folder)
    patched, bos = _parts(own.backend_tokenizer) != parts, _lacks_bos(folder, own)
    if bos:
        own.backend_tokenizer.post_processor = _with_bos(own)
    return Reading(named, own, patched, bos)


def _reads_file(kind: type) -> bool:
    """Whether a class takes tokenizer.json as it is. transformers builds classes with an __init__ of their own anew."""
    from transformers import PreTrainedTokenizerFast

    return kind is PreTrainedTokenizerFast or "__init__" not in vars(kind)


def _parts(backend: Any) -> tuple[bytes, ...]:
    """What, beside the vocabulary, decides ids, offsets and decoded texts."""
    return tuple(
        getattr(part, "__getstate__", bytes)() for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder)
    )


def _parts_of(place: Path) -> tuple[bytes, ...]:
    """The same of a tokenizer.json, read without its vocabulary, which would take most of the time."""
    content = json.loads(place.read_text(encoding="utf-8"))
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    return _parts(Tokenizer.from_str(json.dumps({**content, "model": empty, "added_tokens": []})))


def _differs(one: Any, other: Any, text: str) -> bool:
    second = other.encode(text, add_special_tokens=False)
    try:
        first = one.encode(text, add_special_tokens=False)
    except Exception:
        # a class may lack what the text needs, such as an unknown token; tokenizers raises a bare Exception
        return True
    decoded = (each.decode(second.ids, skip_special_tokens=False) for each in (one, other))
    return (first.ids, first.offsets) != (second.ids, second.offsets) or len(set(decoded)) > 1


def _lacks_bos(folder: Path, own: PreTrainedTokenizerBase) -> bool:
    """Whether tokenizer_config.json asks for a BOS that tokenizer.json does not add, as DeepSeek's do."""
    config = config_of(folder)
    if config.get("add_bos_token") is not True or own.bos_token_id is None:
        return False
    named = str(config.get("tokenizer_class") or "")
    return named.startswith(BOS_CLASSES) and own.bos_token_id not in own.backend_tokenizer.encode("a").ids


def _with_bos(own: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's post-processor, with a BOS in front of each text, as Llama 3's tokenizer.json has it."""
    bos, before = str(own.bos_token), own.backend_tokenizer.post_processor
    added = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, own.bos_token_id)]
    )
    return processors.Sequence([before, added]) if before else added


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's tokenizer_config.json; {} where there is none that can be read."""
    return read_object(folder / "tokenizer_config.json")


def _set_pad(loaded: PreTrainedTokenizerBase, source: Source) -> None:
    """Take a PAD that the model knows and that is not its EOS, where there is one."""
    config = source.config()
    text = config.get("text_config", config)  # of a model that takes pictures too
    size = text.get("vocab_size") if isinstance(text, dict) else None
    known = size if isinstance(size, int) else math.inf
    if loaded.pad_token_id is None or loaded.pad_token_id == loaded.eos_token_id or loaded.pad_token_id >= known:
        # any special token that the model knows will do, except these two: its label is always IGNORE_INDEX
        taken = {loaded.eos_token, loaded.bos_token}
        special = [
            t for t in [*map(str, loaded.added_tokens_decoder.values()), loaded.unk_token]
            if t and t not in taken and loaded.convert_tokens_to_ids(t) < known
        ]  # fmt: skip
        likely = sorted(special, key=lambda t: (not re.search("pad", t, re.IGNORECASE), "reserved" not in t))
        loaded.pad_token = likely[0] if likely else loaded.eos_token


def rewritten(folder: Path, texts: Iterable[str]) -> dict[str, bytes]:
    """Files to write in place of the folder's own, so that any program that loads a copy gets the ids of its tokenizer.json.

    texts: to test the class that transformers takes, beside a fixed text. {} if the folder's own files are right.
    """
    if not (folder / "tokenizer.json").is_file():
        return {}
    read = _reading(folder)
    config = config_of(folder)
    # beside an adapter there is no config.json: the class named there is used, while here the model's type may overrule it
    untried = type(read.named).__name__ in PLAIN and config.get("tokenizer_class") not in (None, *PLAIN)
    if not read.bos and not untried and not read.misleads([PROBE, *texts]):
        return {}
    config.pop("auto_map", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 and 5 read tokenizer.json for it as it is
    found = {"tokenizer_config.json": _json(config)}
    if read.bos:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["post_processor"] = json.loads(read.own.backend_tokenizer.post_processor.__getstate__())
        found["tokenizer.json"] = _json(content)
    return found


def misread(folder: Path, texts: Iterable[str]) -> str:
    """A line on a folder that transformers reads otherwise than its tokenizer.json, whatever the files beside it say; "" on others.

    It takes Qwen2Tokenizer for every model of type qwen2, whichever class the folder names.
    """
    if not (folder / "tokenizer.json").is_file() or not (read := _reading(folder)).misleads([PROBE, *texts]):
        return ""
    return (
        f"note: {folder}: transformers takes {type(read.named).__name__} for this type of model, which gives other tokens than those that were "
        f"trained. Load the tokenizer with PreTrainedTokenizerFast.from_pretrained\n"
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
