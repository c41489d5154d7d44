"""Files that are whole or not there: written beside their place, renamed when complete, known by their sha256."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from finetune.errors import MachineError, Refusal, of_machine

PIECE = 2**24  # bytes; a thread asks for the GIL after each, and waits up to 5 ms for it while another imports


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then give it its own."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, mode: int | None = None) -> None:
    """As `write_text`, for bytes. mode: of the file, set before the first byte is written."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as stream:
        if mode is not None:
            os.fchmod(stream.fileno(), mode)
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """While libraries write below `folder`, raise the system's own error for a full disk.

    safetensors only puts that error into its text, and torch.save reports it like a bug of its own.
    """
    try:
        yield
    except (OSError, Refusal):
        raise
    except Exception as error:
        if problem := of_machine(error):
            raise MachineError(f"{folder}: {problem}") from None
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**20))  # raises where there is no room
        raise


def temporary() -> str:
    """The folder for temporary files. Raises MachineError where there is none: tokenizing and compiling need one."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        raise MachineError(
            f"TMPDIR={os.environ.get('TMPDIR', '')}: no folder for temporary files can be written, neither there nor "
            "in /tmp. Give one, for example TMPDIR=/outputs, or with docker run --read-only add --tmpfs /tmp:exec"
        ) from None


def existing(folder: Path) -> Path:
    """The folder, or the first above it that exists. (`Path.exists` raises without the permission to look.)"""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.exists(place))


def runs_programs(folder: Path) -> bool:
    """Whether code can be loaded from files in the folder, or in the first above it that exists: not where it is mounted noexec."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as probe:
            probe.write(bytes(mmap.PAGESIZE))
            probe.flush()
            mmap.mmap(probe.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC).close()
    except PermissionError as error:
        return error.errno != errno.EPERM  # EACCES: it may not be written, which others say
    except OSError:
        return True
    return True


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, as people can read it."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def open_as_its_neighbours(adapter: Path) -> None:
    """Give an adapter's weights the mode of its other files: safetensors lets only the owner read them."""
    shutil.copymode(adapter / "adapter_config.json", adapter / "adapter_model.safetensors")


def copy(source: Path, target: Path, names: Collection[str], instead: Mapping[str, bytes]) -> None:
    """Copy those of the files that are in `source`. instead: the content of some, in place of the source's."""
    for name in names:
        if name in instead:
            write_bytes(target / name, instead[name])
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file or a folder if it is there. Of a link, remove only the link."""
    with contextlib.suppress(*(OSError,) if ignore_errors else ()):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors)
        else:
            path.unlink(missing_ok=True)


def publish(partial: Path, final: Path) -> None:
    """Give a finished folder its final name. Only then remove the folder that had that name."""
    old = final.with_name(f"{final.name}.old")
    remove(old)
    if os.path.lexists(final):
        os.replace(final, old)
    os.replace(partial, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    remove(old, ignore_errors=True)


def sha256(path: Path) -> str:
    """The file's sha256, in hex."""
    found, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(piece):
            found.update(piece[:count])
    return found.hexdigest()


def below(folder: Path) -> list[str]:
    """Relative names of all that lies below `folder` and is no folder itself, sorted.

    A link counts, wherever it leads.
    """
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def digests(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """sha256 of the files `names`, else of every file below `folder`. hashlib releases the GIL, so threads help."""
    names = below(folder) if names is None else sorted(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))
