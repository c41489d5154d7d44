"""Rows of .xlsx files: the one sheet that has some. Cells become the text that CSV would hold."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import zipfile
from collections.abc import Iterator
from typing import Any

from finetune.data import tables
from finetune.data.opened import File
from finetune.errors import SettingsError, first_line

KIND = ".xlsx"
Cells = tuple[Any, ...]


def chosen(file: File) -> File:
    """The file with the name of its sheet; of other kinds the file itself. Raises SettingsError where several sheets have rows."""
    if file.kind != KIND:
        return file
    with _sheets(file, formulas=False) as sheets:
        full = [name for name, sheet in sheets.items() if len([*itertools.islice(_lines(sheet), 2)]) == 2]
        if len(full) > 1:
            raise SettingsError(
                f"DATASET_NAME={file.shown}: {len(full)} sheets have rows ({', '.join(full)}), and it takes one; save the one as CSV "
                "(UTF-8), for example DATASET_NAME=rows.csv"
            )
        if not sheets:
            raise SettingsError(f"DATASET_NAME={file.shown}: has no sheet with cells; save the rows as CSV (UTF-8)")
        return dataclasses.replace(file, sheet=(full or [*sheets])[0])


def rows(file: File) -> Iterator[tuple[int, dict[str, str] | str]]:
    """The rows with their lines in the sheet; a text instead of a row says why it is bad. Lines without a value are left out.

    Raises SettingsError where the file is damaged.
    """
    # values are those that the spreadsheet computed; where it did not, only the formula tells that there is something
    with _sheets(file, formulas=False) as values, _sheets(file, formulas=True) as formulas:
        names: list[str] = []
        written = _every(formulas[file.sheet])
        for (line, cells), said in zip(_every(values[file.sheet]), written, strict=True):
            texts = [*map(_text, cells)]
            lost = [at for at, (cell, there) in enumerate(zip(cells, said[1], strict=True)) if cell is None and there]
            if lost:
                name = names[lost[0]] if lost[0] < len(names) else f"column {lost[0] + 1}"
                yield (
                    line,
                    f"has a formula without its value in {name}; open and save the file in the spreadsheet, or save it as CSV",
                )
                continue
            while texts and not texts[-1]:
                texts.pop()
            if not texts:
                continue
            if not names:
                tables.named_once(file, names := texts)
            elif len(texts) > len(names):
                yield line, "has more cells than the first line has names"
            else:
                yield line, dict(zip(names, texts + [""] * (len(names) - len(texts)), strict=True))


@contextlib.contextmanager
def _sheets(file: File, formulas: bool) -> Iterator[dict[str, Any]]:
    from xml.etree.ElementTree import ParseError

    import openpyxl

    with file.at_once() as path:
        try:
            with open(path, "rb") as stream:
                book = openpyxl.load_workbook(stream, read_only=True, data_only=not formulas)
                try:
                    yield {sheet.title: sheet for sheet in book.worksheets}
                finally:
                    book.close()
        except (OSError, zipfile.BadZipFile, KeyError, ValueError, ParseError) as error:
            raise SettingsError(
                f"DATASET_NAME={file.shown}: not a whole .xlsx file ({first_line(error)}); save it again, or as CSV (UTF-8)"
            ) from None


def _every(sheet: Any) -> Iterator[tuple[int, Cells]]:
    """Each line with its number. What the file says of its size is not believed: some programs write a wrong one."""
    sheet.reset_dimensions()
    return enumerate(sheet.iter_rows(values_only=True), 1)


def _lines(sheet: Any) -> Iterator[Cells]:
    return (cells for _, cells in _every(sheet) if any(cell is not None for cell in cells))


def _text(cell: Any) -> str:
    """A cell as a spreadsheet writes it to CSV, but numbers with all digits and dates as 2026-01-31."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return str(cell.date())
    return str(cell).replace("_x000D_", "\r")  # how Excel writes a carriage return
