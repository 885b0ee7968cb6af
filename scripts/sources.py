"""Where models, criteria and data come from: ``layers:resnet20_cifar``, ``my_net.py:build``, ``imagefolder:PATH``."""

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

import layers.models
from compress.criteria import CRITERIA, Criterion
from mtl.data import ImageData, cifar10, cifar100, digits, image_folder

MODEL_SOURCES = "layers:NAME, torchvision:NAME, timm:NAME or FILE.py:FACTORY"
DATA_SOURCES = "digits, imagefolder:PATH, cifar10:PATH or cifar100:PATH"

Channels = Sequence[float] | None


def build_model(source: str, num_classes: int) -> nn.Module:
    """Builds the model that ``source`` names, with random weights and ``num_classes`` outputs where it can be told.

    Raises ``ValueError`` for a source, file or name that does not exist, and for a factory that fails.
    """
    kind, _, name = source.rpartition(":")
    if kind.endswith(".py"):
        factory = _from_file(Path(kind), name, "model")
    elif kind == "layers":
        _check_name(f"model {source!r}", name, layers.models.__all__)
        factory = getattr(layers.models, name)
    elif kind == "torchvision":
        factory = _from_torchvision(source, name)
    elif kind == "timm":
        factory = _from_timm(source, name)
    else:
        raise ValueError(f"model {source!r} is none of {MODEL_SOURCES}")
    try:
        model = factory(num_classes=num_classes) if _takes_num_classes(factory) else factory()
    except Exception as error:
        raise ValueError(f"model {source!r} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {source!r} gave a {type(model).__name__}; the factory must return a torch.nn.Module")
    return model


def find_criterion(source: str) -> str | Criterion:
    """The name of a criterion as it is, or the function that ``FILE.py:FUNCTION`` names.

    Raises ``ValueError`` for a name, file or function that does not exist, and for a file that cannot be imported.
    """
    if source in CRITERIA:
        return source
    file, _, name = source.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"criterion {source!r} is none of {', '.join(CRITERIA)}, nor FILE.py:FUNCTION")
    return _from_file(Path(file), name, "criterion")


def open_data(source: str, *, mean: Channels, std: Channels, image_size: int | None, validation: float) -> ImageData:
    """Reads the images that ``source`` names; ``validation`` is the fraction of the training images that is kept apart.

    Raises ``ValueError`` for a source that does not exist, is empty or damaged, and for options that it does not take.
    """
    kind, _, path = source.partition(":")
    if kind not in ("digits", "imagefolder", "cifar10", "cifar100") or (kind == "digits") != (not path):
        raise ValueError(f"data {source!r} is none of {DATA_SOURCES}")
    if (mean is None) != (std is None):
        raise ValueError(f"--{'std' if std is None else 'mean'} is missing; give --mean and --std together, or neither")
    if image_size is not None and kind != "imagefolder":
        raise ValueError(f"--image-size is for imagefolder only; the images of {kind} have one size")
    if kind == "digits":
        data = digits(validation=validation)
        return data if mean is None else replace(data, mean=tuple(mean), std=tuple(std or ()))
    if kind == "imagefolder":
        return image_folder(path, image_size=image_size, mean=mean, std=std, validation=validation)
    return (cifar10 if kind == "cifar10" else cifar100)(path, mean=mean, std=std, validation=validation)


def _from_file(file: Path, name: str, what: str) -> Callable[..., object]:
    if not file.is_file():
        raise ValueError(f"{what} file {file} does not exist; give FILE.py:NAME")
    # A name of its own: a file called layers.py must not replace our package.
    spec = importlib.util.spec_from_file_location(f"{what}_of_{file.stem}", file)
    assert spec is not None  # a path that ends in .py always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(file.parent.resolve()))  # as `python FILE.py` would find what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{what} file {file} cannot be imported: {type(error).__name__}: {error}") from error
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    _check_name(f"{what} '{file}:{name}'", name, functions)
    return getattr(module, name)


def _from_torchvision(source: str, name: str) -> Callable[..., object]:
    import torchvision.models

    _check_name(f"model {source!r}", name, torchvision.models.list_models(module=torchvision.models))
    builder = torchvision.models.get_model_builder(name)
    return lambda num_classes: builder(weights=None, num_classes=num_classes)


def _from_timm(source: str, name: str) -> Callable[..., object]:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"model {source!r} needs timm, which is not installed; run: pip install timm") from error
    _check_name(f"model {source!r}", name.partition(".")[0], timm.list_models())  # a tag after the dot names weights
    return lambda num_classes: timm.create_model(name, num_classes=num_classes)


def _check_name(source: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3) or known[:6]
        raise ValueError(f"{source} does not exist; there is {', '.join(close) or 'nothing of the kind'}")


def _takes_num_classes(factory: Callable[..., object]) -> bool:
    parameters = inspect.signature(factory).parameters
    return "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
