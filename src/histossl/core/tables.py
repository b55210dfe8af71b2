"""Reads tables that people wrote, and ours that they may have saved again, in any encoding, separator and numbers.

A table may come from a program (UTF-8, commas) or from a spreadsheet of any country: with a byte-order mark, in UTF-16,
in Windows' or a Mac's eight bits, separated by semicolons or tabs, with `sep=;` in its first line, with decimal commas.
Cells that a spreadsheet would compute are written so that it does not.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from histossl.core.errors import FileFormatError, HistosslError
from histossl.core.names import row_list

_FORMULA = re.compile("'*[=+\\-@\\t\\r]")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

V = TypeVar("V")


def cell(value: V) -> V | str:
    """A value for a cell of a table that people open: an apostrophe precedes text that a spreadsheet would compute.

    Args:
        value: the value; text that is a number does not change.

    Returns:
        The value, or the text after an apostrophe.
    """
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def text_of(cell: str) -> str:
    """The inverse of `cell` for text.

    Args:
        cell: the text of a cell.

    Returns:
        The text without the apostrophe that `cell` added.
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def writer(file: IO[str]) -> Any:
    """As `csv.writer`, with rows that end in a line feed and quotes around cells that hold any end of a line.

    csv of Python before 3.13 does not quote a carriage return where rows end in a line feed alone.

    Args:
        file: open for text, with `newline=""`.

    Returns:
        The writer of `csv`.
    """
    return csv.writer(_LineFeeds(file), lineterminator="\r\n")


def dict_writer(file: IO[str], columns: Sequence[str]) -> csv.DictWriter[str]:
    """As `csv.DictWriter`, with rows and cells as of `writer`.

    Args:
        file: open for text, with `newline=""`.
        columns: in order; missing cells are empty.

    Returns:
        The writer of `csv`; it has not written the header.
    """
    return csv.DictWriter(_LineFeeds(file), list(columns), restval="", lineterminator="\r\n")


def write_frame(path: Path, frame: Any) -> None:
    """Write a data frame's columns as CSV with cells as of `cell`, six decimals, and rows as of `writer`.

    Args:
        path: of the file, which is replaced.
        frame: of pandas; its index is not written.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        frame.map(cell).to_csv(_LineFeeds(file), index=False, float_format="%.6f", lineterminator="\r\n")


class _LineFeeds:
    """What `csv` writes rows to, a row a call."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(row.removesuffix("\r\n") + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The file is closed by its owner."""

    def __iter__(self) -> _LineFeeds:  # pandas takes for a file what has this
        return self


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a table that histossl wrote; spreadsheets may have saved it again.

    Args:
        path: the file.

    Returns:
        One dict per row: column -> text as before `cell`; columns without a name are left out.

    Raises:
        FileFormatError: see `read_table`.
    """
    return [{name: text for name, text in row.items() if name} for row in read_table(path, ours=True).rows.values()]


Row = dict[str, str]
"""A slide: column -> text; slide_id and path are always present."""

# In lower case: what programs, GDC and TCGA write where nothing is known, and the errors of spreadsheets.
# "None", "null" and "-" may well be names of classes.
EMPTY = (
    "", "nan", "na", "n/a", "#n/a", "<na>", "nat", ".", "?", "--", "'--", "not reported", "[not available]",
    "[not applicable]", "[not evaluated]", "[unknown]", "[discrepancy]", "#value!", "#ref!", "#name?", "#div/0!",
    "#null!", "#num!",
)  # fmt: skip
SEPARATORS = ",;\t|"
SAVE = "save the table as 'CSV UTF-8'"
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_NOT_TEXT = (
    (b"PK\x03\x04", "an Excel or OpenDocument workbook"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
    (b"PAR1", "a Parquet file"),
    (b"\x1f\x8b", "gzipped"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
)
_SEP_LINE = re.compile(r"sep=(.)\r?\n?", re.IGNORECASE)
_COMMENT = re.compile(r'\s*("?\s*#|$)')
_COMMAS = re.compile(r"[+-]?[0-9]+(,[0-9]+)+")
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]*,[0-9]+([eE][+-]?[0-9]+)?")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+")
_GUESSED = {"cp1252": "Windows-1252", "mac-roman": "Mac Roman"}
_RUN = re.compile("[^\x00-\x7f]{2,}")
_SIGNS = "µ°²³±·×÷–—‘’“”„…€£§©®\xa0"
_BYTES = re.compile("[\udc80-\udcff]")
_UNSEEN = re.compile("[\u200b\u200e\u200f\u2060\ufeff]")


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        columns: names in the header, in order; those without a name are left out.
        rows: line of the file, the first being 1, -> column -> stripped text; "" is the column without a name.
        encoding: the encoding that it was read as.
        separator: the separator of cells.
        header: number of the line of the header.
        comments: number of lines before the header that begin with #.
    """

    columns: list[str]
    rows: dict[int, dict[str, str]]
    encoding: str = "utf-8"
    separator: str = ","
    header: int = 1
    comments: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the reading, such as a guessed encoding."""
        name = _GUESSED.get(self.encoding)
        found = [f"it is not UTF-8 and was read as {name}; {SAVE} if names look wrong"] if name else []
        if self.comments:
            found.append(f"{self.comments} lines that begin with # before the header are comments, and were not read")
        return tuple(found)


def decoded(data: bytes) -> tuple[str, str]:
    """Decode the text of a file of unknown encoding.

    A byte order mark decides; else it is UTF-8 if it is valid, UTF-16 if every other byte is zero, else Windows-1252,
    or Mac Roman where bytes are not valid in Windows-1252.

    Args:
        data: the content of the file.

    Returns:
        The text, and the name of its encoding.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding), encoding
    head = data[:4096]
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        zeros = head[first::2]
        if len(zeros) > 3 and zeros.count(0) > 0.6 * len(zeros):
            return data.decode(encoding), encoding
    for encoding in ("utf-8", "cp1252"):
        try:
            return data.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return data.decode("mac-roman"), "mac-roman"


def read_table(path: Path, error: type[HistosslError] = FileFormatError, ours: bool = False) -> Table:
    """Read a table that any program or spreadsheet saved.

    Args:
        path: the file.
        error: the class of errors to raise.
        ours: whether histossl wrote the table: then cells keep their spaces, names of files may be of any bytes, and
            rows may be shorter than the header.

    Returns:
        The table as text.

    Raises:
        HistosslError: of the class `error`: the file cannot be read, is not text, is empty, has a column twice, or has
            rows that are longer than the header. Names the rows.
    """
    text, encoding = _text_of(path, error, ours)
    named = _SEP_LINE.match(text)
    # The line stays, empty, so that rows are counted as in the file.
    text = "\n" + text[named.end() :] if named else text
    text, comments = _without_comments(text)
    separator = named[1] if named and named[1] in SEPARATORS else _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    lines: dict[int, list[str]] = {}
    try:
        for row in reader:
            lines[reader.line_num] = [_clean(cell, ours) for cell in row]
    except csv.Error as wrong:
        what = f"{path.name}: row {max(lines, default=0) + 1}: {wrong}"
        raise error(what, "close or remove the quote in this row") from wrong
    lines = {line: row for line, row in lines.items() if any(row)}
    if not lines:
        raise error(f"{path.name}: the file is empty", "it needs a header with the names of its columns")
    top = min(lines)
    header = lines.pop(top)
    header = [name.strip() for name in header]
    _check_shape(path, header, lines, error, ours)
    short = {line: row + [""] * (len(header) - len(row)) for line, row in lines.items()}
    rows = {line: dict(zip(header, row, strict=True)) for line, row in short.items()}
    if not ours and separator != ";":
        _check_thousands(path, rows, error)
    return Table([name for name in header if name], rows, encoding, separator, top, comments)


def _without_comments(text: str) -> tuple[str, int]:
    """Replace the lines before the header that begin with #, as in tables of cBioPortal, by empty ones; count them."""
    lines = text.splitlines(keepends=True)
    head = list(itertools.takewhile(_COMMENT.match, lines))
    count = sum("#" in line for line in head)
    return ("\n" * len(head) + "".join(lines[len(head) :]), count) if count else (text, 0)


def _check_thousands(path: Path, rows: dict[int, dict[str, str]], error: type[HistosslError]) -> None:
    """Refuse 1,234 unless other cells show that commas are decimal: it may be 1234 or 1.234."""
    commas = {line: cell for line, row in rows.items() for cell in row.values() if _COMMAS.fullmatch(cell)}
    odd = {line: cell for line, cell in commas.items() if _THOUSANDS.fullmatch(cell)}
    if odd and len(odd) == len(commas):
        some = f"{next(iter(odd.values()))!r} ({row_list(odd)})"
        what = f"{path.name}: the comma in numbers such as {some} may be of thousands or decimal"
        raise error(what, "write numbers without commas")


def _text_of(path: Path, error: type[HistosslError], ours: bool) -> tuple[str, str]:
    try:
        data = path.read_bytes()
    except OSError as wrong:
        raise error(f"{path}: {wrong.strerror or wrong}", "give the CSV file of the table") from wrong
    for magic, kind in _NOT_TEXT:
        if data.lstrip()[: len(magic)].lower() == magic.lower():
            raise error(f"{path.name}: is {kind}, not a table as text", f"open it and {SAVE}")
    try:
        text, encoding = decoded(data)
        if ours and encoding in _GUESSED and _names_files(data):
            text, encoding = data.decode("utf-8", "surrogateescape"), "utf-8"
    except UnicodeDecodeError as wrong:
        raise error(f"{path.name}: its text cannot be read ({wrong.reason})", SAVE) from wrong
    if "\0" in text:
        raise error(f"{path.name}: holds zero bytes, so it is no text", SAVE)
    if encoding in _GUESSED and not ours and not _looks_western(text):
        line, shown = next((k, line) for k, line in enumerate(text.splitlines(), 1) if not line.isascii())
        what = f"{path.name}: its encoding cannot be told: row {line} would read {shown[:60]!r} in {_GUESSED[encoding]}"
        raise error(what, f"open it in the program that wrote it and {SAVE}")
    return text, encoding


def _looks_western(text: str) -> bool:
    """Whether text from eight-bit bytes is of a Western language: single letters with accents, and common signs.

    Chinese, Japanese, Korean, Cyrillic and Greek encodings give runs of accented letters, or signs amid words.
    """
    odd = [char for char in text if not char.isascii()]
    runs = [run[0] for run in _RUN.finditer(text)]
    paired = sum(len(run) for run in runs if len(run) > 2 or not run.islower())  # öß is a pair of German
    return 2 * paired <= len(odd) and 10 * sum(char.isalpha() or char in _SIGNS for char in odd) >= 9 * len(odd)


def _names_files(data: bytes) -> bool:
    """Whether a table of ours names files by bytes that are not text; then such a file must exist."""
    text = data.decode("utf-8", "surrogateescape")
    odd = [line for line in text.splitlines() if _BYTES.search(line)]
    cells = [cell for row in csv.reader(odd, delimiter=_separator(text)) for cell in row if _BYTES.search(cell)]
    return any("/" in cell and os.path.lexists(cell) for cell in cells)


def _check_shape(
    path: Path, header: list[str], lines: dict[int, list[str]], error: type[HistosslError], ours: bool
) -> None:
    lowered = [name.casefold() for name in header if name]
    twice = sorted({name for name in header if name and lowered.count(name.casefold()) > 1})
    if twice:
        raise error(f"{path.name}: column {', '.join(map(repr, twice))} occurs twice", "keep one")
    # Spreadsheets drop empty cells at the end of a row, or add some.
    for row in lines.values():
        while len(row) > len(header) and not row[-1]:
            row.pop()
    uneven = [line for line, row in lines.items() if len(row) > len(header) or (len(row) < len(header) and not ours)]
    if uneven:
        what = f"{path.name}: {row_list(uneven)}: not {len(header)} cells, as the header has"
        raise error(what, "quote text that holds the separator")


def _separator(text: str) -> str:
    """The character that separates the header's cells, outside quotes; a comma where there is one cell."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    bare = re.sub(r'"(?:[^"]|"")*"', "", first)
    return max(SEPARATORS, key=bare.count)


def _clean(cell: str, ours: bool) -> str:
    return text_of(cell if ours else _UNSEEN.sub("", cell).strip())


def number(text: str) -> float:
    """Parse the number in a cell, with a decimal point or a decimal comma.

    Args:
        text: the text of the cell.

    Returns:
        The number.

    Raises:
        ValueError: the text is not a number.
    """
    return float(decimal_point(text.replace("\N{MINUS SIGN}", "-")))


def decimal_point(text: str) -> str:
    """Replace a decimal comma by a point.

    Args:
        text: the text of a cell.

    Returns:
        The text, unchanged unless it is a number with a decimal comma.
    """
    return text.strip().replace(",", ".") if _DECIMAL_COMMA.fullmatch(text.strip()) else text
