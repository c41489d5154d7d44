"""Which files hold the rows that DATASET_NAME, DATASET_CONFIG and DATASET_SPLIT name, on this machine."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.data import opened, sheets
from finetune.data.opened import PACKED, File
from finetune.data.reading import READERS
from finetune.errors import SettingsError
from finetune.settings import SPLIT, Settings
from finetune.sources import local

# which `datasets` puts beside the rows
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
SAMPLES = Path(__file__).parent.parent / "samples"
TEXT = ".txt"  # in a folder it is a note where there are other files
SPLITS = ("train", "training", "validation", "valid", "dev", "val", "test", "testing", "eval")
# endings of files that hold rows, but are not read; and what to do
UNREAD = {
    **dict.fromkeys((".xls", ".ods"), "save the sheet as CSV (UTF-8)"),
    **dict.fromkeys((".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz"), "unpack it, and give the file or folder"),
}
TAKEN = f"{', '.join(READERS)}, each also .gz, .zst or .zip"


def on_hub(name: str) -> bool:
    """Whether DATASET_NAME is a name on the Hub: not the bundled rows, not on this machine, and not named like a file."""
    ending = (*READERS, *PACKED, *UNREAD)
    a_file = name.lower().endswith(ending) or name.startswith((".", "/", "~")) or "," in name or glob.has_magic(name)
    return name != "samples" and not a_file and not os.path.exists(name)


def missing(settings: Settings) -> Iterator[str]:
    """What is wrong with the files or the folder that DATASET_NAME names, in sentences; nothing is read but a folder's names."""
    if problem := local.url("DATASET_NAME", settings.dataset_name):
        yield problem
    elif not on_hub(settings.dataset_name):
        try:
            files(settings, [])
        except SettingsError as error:
            yield from error.problems


def files(settings: Settings, notes: list[str]) -> list[File]:
    """The files of DATASET_NAME, in the order of their rows: one, those of names with commas, of a glob or a folder, or the bundled ones.

    notes: gets sentences on which files a folder or a glob stands for. Raises SettingsError where there are none, or it is not clear which.
    """
    name = settings.dataset_name
    if name == "samples":
        languages = [settings.dataset_config] if settings.dataset_config else ["en", "zh"]
        bundled = [File(f"samples/{language}.jsonl", SAMPLES / f"{language}.jsonl") for language in languages]
        return _train_only(settings, bundled)
    found: list[File] = []
    problems: list[str] = []
    for part in opened.parts(name):
        try:
            found += _named(part, settings, notes)
        except SettingsError as error:
            problems += error.problems
    if problems:
        raise SettingsError(*problems)
    return found


def _named(name: str, settings: Settings, notes: list[str]) -> list[File]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path, settings, notes)
    if (matches := opened.matches(name)) is not None:
        if not matches:
            raise SettingsError(
                f"DATASET_NAME={name}: no file matches; in a container the path is the one that it is mounted at"
            )
        notes.append(f"{name}: {_list([*map(str, matches)])}")
        return _train_only(settings, [file for match in matches for file in _file(str(match), match)])
    return _train_only(settings, _file(name, path))


def _file(shown: str, path: Path) -> list[File]:
    """The file, or those in a zip. Raises SettingsError where it is not there, or of no known kind."""
    file = File(shown, path)
    known = file.kind in READERS or path.suffix.lower() == ".zip"
    if not known:
        remedy = next(
            (remedy for end, remedy in UNREAD.items() if path.name.lower().removesuffix(".gz").endswith(end)), ""
        )
        raise SettingsError(
            f"DATASET_NAME={shown}: not a known kind of file; it takes {TAKEN}. {remedy[:1].upper()}{remedy[1:]}, for example "
            f"DATASET_NAME=rows.{'csv' if 'CSV' in remedy else 'jsonl'}"
            if remedy
            else f"DATASET_NAME={shown}: not a known kind of file; it takes {TAKEN}, for example DATASET_NAME=rows.jsonl"
        )
    if not path.is_file():
        raise SettingsError(
            f"DATASET_NAME={shown}: there is no such file; give its path, in a container the one it is mounted at"
        )
    return [*map(sheets.chosen, _members(file) if path.suffix.lower() == ".zip" else [file])]


def _members(file: File) -> list[File]:
    found = opened.members(file)
    kinds = sorted({member.kind for member in found if member.kind in READERS})
    if len(kinds) > 1 and TEXT in kinds:
        kinds.remove(TEXT)
    if len(kinds) != 1:
        raise SettingsError(
            f"DATASET_NAME={file.shown}: holds {'files of ' + ', '.join(kinds) if kinds else 'no file of rows'}, and it takes files of "
            f"one kind out of {', '.join(READERS)}; unpack it, and give one of the files"
        )
    return [member for member in found if member.kind == kinds[0]]


def _train_only(settings: Settings, found: list[File]) -> list[File]:
    if split_of(settings) != "train":
        raise SettingsError(
            f"DATASET_SPLIT={settings.dataset_split}: a file or folder has only the split train, for example DATASET_SPLIT=train[0:500]"
        )
    return found


def split_of(settings: Settings) -> str:
    """The name of the split."""
    return parsed(settings.dataset_split)["name"]


def parsed(split: str) -> re.Match[str]:
    """A split's name, start and stop."""
    found = re.fullmatch(SPLIT, split)
    assert found is not None  # checked by settings
    return found


# Folders


def _folder(name: str, path: Path, settings: Settings, notes: list[str]) -> list[File]:
    shown = name.rstrip("/")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(shown, path, settings)
    patterns = _card(shown, path, settings)
    found = _of_card(shown, path, patterns, settings) if patterns else _of_names(shown, path, settings)
    kept = [file for file in found if file.path.stat().st_size] or found
    left: dict[str, list[str]] = {"hidden": [], "empty": [], "not of this split": []}
    for file in _candidates(path):
        why = "hidden" if file.name.startswith(".") else "not of this split" if file.stat().st_size else "empty"
        if file not in {each.path for each in kept}:
            left[why].append(str(file.relative_to(path)))
    told = "".join(f"; left out: {_list(names)} ({why})" for why, names in left.items() if names)
    notes.append(f"{name}: {_list([file.shown.removeprefix(f'{shown}/') for file in kept])}{told}")
    return kept


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 10 else f"{', '.join(names[:9])} … {names[-1]} ({len(names)} files)"


def _candidates(path: Path) -> list[Path]:
    """Files of known kinds in the folder, in its data/, and in folders that are named after a split."""
    folders = [path, path / "data", *(path / split for split in SPLITS), *(path / "data" / split for split in SPLITS)]
    inside = (file for folder in folders if folder.is_dir() for file in folder.iterdir())
    known = [file for file in inside if opened.kind(file.name) in READERS or file.suffix.lower() == ".zip"]
    rows = (file for file in known if file.is_file() and file.name not in DESCRIPTIONS)
    return sorted(rows, key=lambda file: str(file.relative_to(path)))


def _of_names(shown: str, path: Path, settings: Settings) -> list[File]:
    """The files that hold a split, known by their names, as on the Hub. Where no name tells of `train`, all that tell of no split are it."""
    rows = [file for file in _candidates(path) if not file.name.startswith(".")]
    if len({opened.kind(file.name) for file in rows}) > 1:
        rows = [file for file in rows if opened.kind(file.name) != TEXT]
    by_split: dict[str, list[Path]] = {}
    for file in rows:
        by_split.setdefault(_split_in(file, path), []).append(file)
    wanted = split_of(settings)
    chosen = by_split.get(wanted) or (by_split.get("", []) or rows if wanted == "train" else [])
    if rows and not chosen:
        splits = sorted(name for name in by_split if name) or ["train"]
        raise SettingsError(
            f"DATASET_SPLIT={settings.dataset_split}: {shown} has only the split{'s' * (len(splits) > 1)} {', '.join(splits)}, for "
            f"example DATASET_SPLIT={splits[0]}"
        )
    _one_kind(shown, path, chosen)
    return [file for found in chosen for file in _file(f"{shown}/{found.relative_to(path)}", found)]


def _split_in(file: Path, folder: Path) -> str:
    """The split that a name begins with, or that a folder is named after; "" for none."""
    if file.parent not in (folder, folder / "data"):
        return file.parent.name
    found = re.match(rf"({'|'.join(SPLITS)})(?![a-z])", file.name, re.IGNORECASE)
    return found[1].lower() if found else ""


def _one_kind(shown: str, path: Path, found: Sequence[Path]) -> None:
    kinds = sorted({opened.kind(file.name) for file in found})
    if not kinds:
        raise SettingsError(
            f"DATASET_NAME={shown}: the folder holds no rows; it takes files of one kind out of {', '.join(READERS)}, in the "
            "folder or in its data/, for example train-00000.parquet and train-00001.parquet"
        )
    if len(kinds) > 1:
        example = next(file for file in found if opened.kind(file.name) == kinds[0]).relative_to(path)
        raise SettingsError(
            f"DATASET_NAME={shown}: the folder holds rows of {len(kinds)} kinds ({', '.join(kinds)}), and it takes one; name one "
            f"file, for example DATASET_NAME={shown}/{example}"
        )


def _saved(shown: str, path: Path, settings: Settings) -> list[File]:
    """The files of a folder that save_to_disk of `datasets` wrote: of one data set, or of several splits."""
    wanted = split_of(settings)
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            if wanted not in splits:
                raise SettingsError(
                    f"DATASET_SPLIT={settings.dataset_split}: {shown} has {', '.join(splits)}, for example DATASET_SPLIT={splits[0]}"
                )
            path, shown = path / wanted, f"{shown}/{wanted}"
        else:
            _train_only(settings, [])
        names = [entry["filename"] for entry in json.loads((path / "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"DATASET_NAME={shown}: looks like a folder of save_to_disk, but is not whole ({error}); save it again"
        ) from None
    return [file for name in names for file in _file(f"{shown}/{name}", path / name)]


# A data set's card says which files are which split: the `configs` of the Hub


def _card(shown: str, path: Path, settings: Settings) -> dict[str, list[str]]:
    """Split -> patterns of file names, of the configuration that DATASET_CONFIG names; {} where no card tells."""
    card, config = path / "README.md", settings.dataset_config
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    known: dict[str, Any] = {}
    if head:
        import yaml

        try:
            said = yaml.safe_load(head[1]) or {}
            known = {
                each.get("config_name", "default"): each for each in said.get("configs") or [] if each.get("data_files")
            }
        except (yaml.YAMLError, AttributeError):
            raise SettingsError(
                f"DATASET_NAME={shown}: the head of its README.md is not YAML; mend or remove it, or name the files, for example "
                f"DATASET_NAME={shown}/*.jsonl"
            ) from None
    if not known:
        return {}
    default = next((name for name, each in known.items() if each.get("default") or name == "default"), None)
    chosen = config or default or (next(iter(known)) if len(known) == 1 else "")
    if chosen not in known:
        raise SettingsError(
            f"DATASET_CONFIG={config or ''}: {shown} has {', '.join(known)}, for example DATASET_CONFIG={next(iter(known))}"
        )
    return _patterns(known[chosen]["data_files"])


def _patterns(said: Any) -> dict[str, list[str]]:
    """What `data_files` of a card says, in each of the forms that the Hub takes."""
    entries = said if isinstance(said, list) else [said]
    found: dict[str, list[str]] = {}
    for entry in entries:
        split, paths = (
            (entry.get("split", "train"), entry.get("path", [])) if isinstance(entry, dict) else ("train", entry)
        )
        found.setdefault(split, []).extend([paths] if isinstance(paths, str) else paths)
    return found


def _of_card(shown: str, path: Path, patterns: dict[str, list[str]], settings: Settings) -> list[File]:
    wanted = split_of(settings)
    if wanted not in patterns:
        raise SettingsError(
            f"DATASET_SPLIT={settings.dataset_split}: {shown} has {', '.join(patterns)}, for example "
            f"DATASET_SPLIT={next(iter(patterns))}"
        )
    found = [
        Path(match) for pattern in patterns[wanted] for match in sorted(glob.glob(str(path / pattern), recursive=True))
    ]
    found = [match for match in dict.fromkeys(found) if match.is_file()]
    if not found:
        raise SettingsError(
            f"DATASET_NAME={shown}: its README.md names {', '.join(patterns[wanted])} as the files of {wanted}, and none is there"
        )
    return [file for match in found for file in _file(f"{shown}/{os.path.relpath(match, path)}", match)]
