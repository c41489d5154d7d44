"""A file of rows as it lies on the disk: perhaps compressed, perhaps in a zip, perhaps in another encoding than UTF-8."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import io
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from finetune.errors import SettingsError, first_line

PACKED = (".gz", ".zst", ".zip")
MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x00\x00\xfe\xff": "UTF-32",
}  # the bytes that such a text begins with
SAMPLE = 2**16  # bytes from which an encoding is guessed
KOREAN = 8  # letters at the least: of Chinese ones in GB18030, six of ten are Korean letters too
# Encodings in the order in which they are tried: the first and the last of the letters that their texts are made of, and how many
# of the letters beyond ASCII have to be such. Korean's letters are a part of GB18030's, but Chinese texts hardly keep to that part.
ENCODINGS = {
    "EUC-KR": ("\uac00", "\ud7a3", 1.0),
    "GB18030": ("\u4e00", "\u9fff", 0.8),
    "Big5": ("\u4e00", "\u9fff", 0.8),
    "Shift_JIS": ("\u3040", "\u9fff", 0.8),
    "Windows-1251": ("\u0400", "\u04ff", 0.8),
}


@dataclasses.dataclass(frozen=True)
class File:
    """A file of rows. shown: its name in messages. member: of a zip; "" for a file that is none. sheet: of an .xlsx file."""

    shown: str
    path: Path
    member: str = ""
    sheet: str = ""

    @property
    def kind(self) -> str:
        """How the name ends without .gz and .zst, such as .jsonl."""
        return kind(self.member or self.path.name)

    @property
    def packed(self) -> bool:
        """Whether the content is compressed."""
        return self.path.suffix.lower() in PACKED

    @contextlib.contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """The content. Raises SettingsError where the file cannot be read, or is damaged."""
        try:
            with contextlib.ExitStack() as closing:
                yield closing.enter_context(self._stream(closing))
        except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "encrypted" not in str(error):
                raise
            raise SettingsError(
                f"DATASET_NAME={self.shown}: cannot be unpacked ({first_line(error)}); copy it again, or give the file without "
                "compression"
            ) from None
        except OSError as error:
            raise SettingsError(
                f"DATASET_NAME={self.shown}: cannot be read ({error.strerror or first_line(error)})"
            ) from None

    def _stream(self, closing: contextlib.ExitStack) -> IO[bytes]:
        suffix = self.path.suffix.lower()
        if suffix == ".gz":
            return cast("IO[bytes]", gzip.open(self.path, "rb"))
        if suffix == ".zip":
            archive = closing.enter_context(zipfile.ZipFile(self.path))
            return archive.open(self.member)
        if suffix == ".zst":
            import pyarrow

            raw = pyarrow.CompressedInputStream(closing.enter_context(pyarrow.OSFile(str(self.path))), "zstd")
            return io.BufferedReader(raw)
        return open(self.path, "rb")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[Path]:
        """A path for readers that jump in a file: the file's own, or that of an unpacked copy."""
        if not self.packed:
            yield self.path
            return
        with tempfile.NamedTemporaryFile() as copy, self.stream() as stream:
            shutil.copyfileobj(stream, copy, 2**20)
            copy.flush()
            yield Path(copy.name)


def parts(name: str) -> list[str]:
    """The names in a DATASET_NAME, which may have commas between them."""
    there = os.path.exists(Path(name).expanduser())
    return [name] if there else [part.strip() for part in name.split(",") if part.strip()]


def matches(name: str) -> list[Path] | None:
    """The files that a glob stands for, sorted; None: it is none."""
    path = Path(name).expanduser()
    if os.path.lexists(path) or not glob.has_magic(name):
        return None
    return [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(match)]


def paths(name: str) -> list[Path]:
    """The files and folders that a DATASET_NAME names, whatever they hold, and whether they are there or not."""
    found = ((matches(part), Path(part).expanduser()) for part in parts(name))
    return [place for several, path in found for place in (several if several is not None else [path])]


def kind(name: str) -> str:
    """How a file's name ends without .gz and .zst, in small letters: .jsonl of rows.jsonl.gz. Of a zip: .zip."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix


def members(file: File) -> list[File]:
    """The files in a zip, without those that some systems add. Raises SettingsError where it is damaged."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir() and info.file_size]
    except (OSError, zipfile.BadZipFile) as error:
        raise SettingsError(
            f"DATASET_NAME={file.shown}: cannot be unpacked ({first_line(error)}); copy it again"
        ) from None
    hidden = ("__MACOSX/", ".")
    kept = sorted(name for name in names if not name.startswith(hidden) and "/." not in name)
    return [File(f"{file.shown}/{name}", file.path, name) for name in kept]


def marked(file: File, start: bytes) -> None:
    """Raise SettingsError where a text begins with the mark of another encoding than UTF-8."""
    if name := next((name for mark, name in MARKS.items() if start.startswith(mark)), None):
        raise SettingsError(f"DATASET_NAME={file.shown}: is {name} and not UTF-8; {_remedy(file, name)}")


def not_utf8(file: File) -> SettingsError:
    """The refusal of a text that is not UTF-8, with the place of its first bad byte, counted in the unpacked text."""
    begin, number = 0, 0
    with file.stream() as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                where = f"byte {begin + error.start + 1} (line {number})"
                return SettingsError(f"DATASET_NAME={file.shown}: {wrong(file, where, line + stream.read(SAMPLE))}")
            begin += len(line)
    return SettingsError(f"DATASET_NAME={file.shown}: is not UTF-8")


def wrong(file: File, where: str, sample: bytes) -> str:
    """What to say of bytes that are not UTF-8. sample: some, from which the encoding is guessed."""
    name = encoding(sample)
    return f"is not UTF-8 at {where}" + (f", but looks like {name}" if name else "") + f"; {_remedy(file, name)}"


def encoding(sample: bytes) -> str:
    """The likeliest encoding of bytes that are not UTF-8; "" where none is likely."""
    sample = sample[:SAMPLE]
    for name, (first, last, share) in ENCODINGS.items():
        try:
            text = sample.decode(name)
        except UnicodeDecodeError as error:
            if error.start < len(sample) - 4:  # at the end a letter may be cut
                continue
            text = sample[: error.start].decode(name)
        foreign = [char for char in text if char > "\x7f" and char.isalpha()]
        fits = [char for char in foreign if first <= char <= last and _common(char, name)]
        enough = _words(text) if name == "Windows-1251" else name != "EUC-KR" or len(foreign) >= KOREAN
        if foreign and len(fits) >= share * len(foreign) and enough:
            return name
    return "Windows-1252" if any(byte > 0xBF for byte in sample) and b"\x00" not in sample else ""


def _words(text: str) -> bool:
    """Whether words beyond ASCII are whole: an accent of French, read as Russian, stands alone between ASCII letters."""
    words = [word for word in re.findall(r"[^\W\d_]+", text) if not word.isascii()]
    return sum(not re.search("[A-Za-z]", word) for word in words) > len(words) / 2


def _common(char: str, name: str) -> bool:
    """Chinese that is read in a wrong encoding is mostly rare characters, which GB2312 does not have."""
    if name != "GB18030":
        return True
    try:
        char.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


def _remedy(file: File, name: str) -> str:
    source, target = file.member or file.path.name, f"utf8{file.kind}"
    if not name:
        return "save it as UTF-8"
    return f"save it as UTF-8, for example with: iconv -f {name} -t UTF-8 {source} > {target}"
