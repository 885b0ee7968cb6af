"""The School data of the Inner London Education Authority: exam scores of the students of 139 schools."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from mtl.data.tasks import TaskData, of_rows, split_rows, standardize


def load_school(path: str | os.PathLike[str]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """Students of all schools, as published in ``school.mat`` (Argyriou et al. 2008; MALSAR).

    Args:
        path: a MATLAB file (version 5 to 7) with the cells ``X``, one (students, F) matrix per school, and ``Y``, the
            scores of the same students

    Returns:
        X (N, F): the published file has N = 15,362 students and F = 28 columns: year, percentage of pupils with free
            meals, percentage in the top band of verbal reasoning, sex, band, ethnic group, kind of school, and a
            constant; y (N,): exam scores; task (N,): the school of each student, 0 to T - 1

    Raises:
        ValueError: for a file that is missing or is something else, and for schools whose matrices do not fit.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        contents = loadmat(os.fspath(path))
    except (OSError, ValueError, TypeError, NotImplementedError, MatReadError) as error:
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from None
    if "X" not in contents or "Y" not in contents:
        raise ValueError(f"{path} has no cells X and Y with one matrix per school; it has {_names(contents)}")
    features = [np.atleast_2d(np.asarray(cell, float)) for cell in contents["X"].ravel()]
    scores = [np.asarray(cell, float).ravel() for cell in contents["Y"].ravel()]
    if len(features) != len(scores):
        raise ValueError(f"{path}: X has {len(features)} schools, but Y has {len(scores)}")
    for school, (rows, labels) in enumerate(zip(features, scores, strict=True)):
        if rows.shape != (len(labels), features[0].shape[1]):
            raise ValueError(
                f"{path}: school {school} has features of shape {rows.shape} and {len(labels)} scores, but "
                f"({len(labels)}, {features[0].shape[1]}) was expected"
            )
    task = np.repeat(np.arange(len(scores)), [len(labels) for labels in scores])
    return np.concatenate(features), np.concatenate(scores), task


def school_tasks(
    path: str | os.PathLike[str], *, validation: float = 0.1, test: float = 0.25, seed: int = 0
) -> dict[str, TaskData]:
    """Each school a regression task with students of its own, for ``mtl.fit``.

    Features have mean 0 and deviation 1 over the training students of all schools; scores likewise.

    Args:
        path: as for ``load_school``
        validation: fraction of each school's students
        test: likewise
        seed: of the choice

    Raises:
        ValueError: as ``load_school``, and for fractions that leave nothing.
    """
    features, scores, task = load_school(path)
    parts = {}
    for school in range(int(task.max()) + 1):
        here = torch.from_numpy(np.flatnonzero(task == school))
        parts[f"school{school}"] = [here[rows] for rows in split_rows(len(here), validation, test, seed + school)]
    train = torch.cat([rows[0] for rows in parts.values()])
    inputs = torch.from_numpy(features)
    inputs = standardize(inputs, inputs[train])
    targets = torch.from_numpy(scores)
    targets = ((targets - targets[train].mean()) / targets[train].std()).float()
    return {name: of_rows(inputs, {name: targets}, {name: 1}, rows) for name, rows in parts.items()}


def _names(contents: Mapping[str, object]) -> list[str]:
    return sorted(name for name in contents if not name.startswith("__"))
