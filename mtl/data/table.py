"""CSV files: columns of numbers are features, and one column per task is its target."""

from __future__ import annotations

import csv as csv_format
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mtl.data.tasks import MISSING_CLASS, TaskData, of_rows, split_rows, standardize

Columns = Mapping[str, list[str]]


def csv(
    path: str | os.PathLike[str],
    targets: Mapping[str, str] | Sequence[str],
    *,
    features: Sequence[str] | None = None,
    classes: Sequence[str] = (),
    validation: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
) -> TaskData | dict[str, TaskData]:
    """A file whose rows all tasks share, or a folder with a file ``TASK.csv`` of rows of its own for each task.

    Features are numbers; they come out with mean 0 and deviation 1 over the training rows (of that file). A target
    column with text is a classification task, one with numbers a regression task. An empty cell in a target column is a
    missing label: NaN or ``MISSING_CLASS``.

    Args:
        path: of a file with a header line, or of a folder of such files
        targets: the target column of each task; or columns that name their tasks
        features: columns; default: those that all files have, less the targets
        classes: tasks whose numbers are classes
        validation: fraction of the rows
        test: likewise
        seed: of the choice

    Returns:
        for a file one data set with all targets, for a folder one per task.

    Raises:
        ValueError: for files and columns that do not exist, no column in common, and cells that are no numbers.
    """
    columns_of = dict(targets) if isinstance(targets, Mapping) else {name: name for name in targets}
    if not columns_of:
        raise ValueError("there are no targets: name a column for each task")
    unknown = sorted(set(classes) - set(columns_of))
    if unknown:
        raise ValueError(f"classes names {unknown[0]!r}, which is no task; the tasks are {', '.join(columns_of)}")
    whole = Path(path)
    own_rows = whole.is_dir()
    files = {task: whole / f"{task}.csv" if own_rows else whole for task in columns_of}
    tables = {file: _read(file) for file in dict.fromkeys(files.values())}
    chosen = _features(tables, features, set(columns_of.values()))
    found = {}
    for file, table in tables.items():
        labels, num_outputs = {}, {}
        for task, column in columns_of.items():
            if files[task] == file:
                labels[task], num_outputs[task] = _target(file, table, column, task in classes)
        inputs = torch.stack([_numbers(file, name, table[name]) for name in chosen], dim=1)
        rows = split_rows(len(inputs), validation, test, seed)
        found[file] = of_rows(inputs, labels, num_outputs, rows, standardize)
    return {task: found[file] for task, file in files.items()} if own_rows else found[whole]


def _read(file: Path) -> Columns:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            header, *rows = [row for row in csv_format.reader(lines, strict=True) if row] or [[]]
    except (OSError, UnicodeDecodeError, csv_format.Error) as error:
        raise ValueError(f"{file} cannot be read as CSV: {error}") from None
    if not rows:
        raise ValueError(f"{file} has no rows below its header")
    if len(set(header)) < len(header):
        raise ValueError(f"{file}: two columns have the same name; names must differ")
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"{file}: row {number} has {len(row)} cells, but the header has {len(header)}")
    return {name: [row[index].strip() for row in rows] for index, name in enumerate(header)}


def _features(tables: Mapping[Path, Columns], asked: Sequence[str] | None, targets: set[str]) -> list[str]:
    if asked is None:
        first, *others = tables.values()
        common = [name for name in first if name not in targets and all(name in other for other in others)]
        if not common:
            raise ValueError(
                f"{', '.join(str(file) for file in tables)}: no column is in all files and no target, so there is "
                "nothing to predict from: rename columns, or name features"
            )
        return common
    if not asked:
        raise ValueError("features is empty: name at least one column, or leave it out for all columns in common")
    both = sorted(targets.intersection(asked))
    if both:
        raise ValueError(f"column {both[0]!r} is a feature and a target: it would predict itself")
    for file, table in tables.items():
        _check_column(file, table, [*asked])
    return list(asked)


def _target(file: Path, table: Columns, column: str, is_class: bool) -> tuple[Tensor, int]:
    _check_column(file, table, [column])
    cells = table[column]
    known = sorted({cell for cell in cells if cell})
    if not known:
        raise ValueError(f"{file}: column {column!r} is empty, so its task has no data")
    if not is_class and all(_is_number(cell) for cell in known):
        return _numbers(file, column, [cell or "nan" for cell in cells]).float(), 1
    if all(_is_number(cell) for cell in known):
        known.sort(key=float)
    index = {cell: position for position, cell in enumerate(known)} | {"": MISSING_CLASS}
    return torch.tensor([index[cell] for cell in cells]), len(known)


def _check_column(file: Path, table: Columns, names: Sequence[str]) -> None:
    for name in names:
        if name not in table:
            raise ValueError(f"{file} has no column {name!r}; it has {', '.join(table)}")


def _numbers(file: Path, column: str, cells: Sequence[str]) -> Tensor:
    for number, cell in enumerate(cells, start=2):
        if not _is_number(cell):
            raise ValueError(
                f"{file}: row {number} of column {column!r} is {cell!r}, but a feature must be a number in every row: "
                "fill it in, or name the features without this column"
            )
    return torch.tensor([float(cell) for cell in cells], dtype=torch.float64)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
