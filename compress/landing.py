"""What becomes of a layer's output, channel by channel, until something else meets it: a residual stream, a ReLU."""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.recorder import Op, TensorRef, Trace
from compress.rules.registry import base_name
from compress.sites import Key, Site
from compress.uses import Uses

RESHAPES = {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "alias", "clone"}
NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm"}
SCALINGS, SHIFTS = {"mul", "div"}, {"add", "sub"}


@dataclass(frozen=True)
class Landing:
    """``steps``, each affine and elementwise, are applied to a site's output; ``end`` is the first operator after them.

    ``adds``: the end adds it (as its ``first`` argument or second) to another activation of the same shape, a residual
    stream with channels on ``axis``. ``rectified``: the sum (or, where nothing is added, the output itself) goes
    through a ReLU and nowhere else. ``intercept`` is a parameter or buffer that shifts the site's outputs one by one,
    with the sign of its effect: a bias, or the mean that a batch norm takes off.
    """

    steps: tuple[Op, ...] = ()
    end: Op | None = None
    adds: bool = False
    first: bool = True
    axis: int = 1
    rectified: bool = False
    intercept: tuple[str, int] | None = None

    @property
    def reshaped(self) -> bool:
        """Whether what lands is the output in another shape or order."""
        return any(base_name(op) in RESHAPES for op in self.steps)


def find_landings(trace: Trace, sites: Sequence[Site]) -> dict[Key, Landing]:
    """The landing of each site."""
    walk = _Walk(trace)
    return {site.key: walk.landing(site) for site in sites}


class _Walk:
    def __init__(self, trace: Trace) -> None:
        self.uses = Uses(trace)
        self.names = {ref.id: name for name, ref in trace.parameters.items()}
        self.weights = set(self.names)
        for op in trace.evaluation:
            if op.tensors and all(t.id in self.weights for t in op.tensors):
                self.weights.update(ref.id for ref in op.outputs)

    def landing(self, site: Site) -> Landing:
        ref, maker, steps = site.result, site.op, list[Op]()
        axis = 1 if site.is_convolution else len(ref.shape) - 1
        intercept = (site.bias, 1) if site.bias is not None and self._only_use(site.bias) else None
        # (the matrices of a batched product share what is added to them)
        shifted = (
            not site.is_convolution and site.groups > 1
        )  # from here on a shift of the site's outputs is no shift by the same number
        while (op := self.uses.only_reader(ref, maker)) is not None:
            name = base_name(op)
            others = [t for t in op.tensors if t.id != ref.id]
            known = all(t.id in self.weights for t in others)
            if name in RESHAPES:
                moved = _moved(op, name, axis, ref)
                if moved is None:
                    break
                axis = moved
            elif name in NORMS and op.arguments["input"] == ref and not op.arguments.get("training"):
                intercept = intercept or (None if shifted else self._named(op.arguments["running_mean"], -1))
                shifted = True
            elif name in SCALINGS | SHIFTS and others and known and op.outputs[0].shape == ref.shape:
                if name == "add" and others[0].shape == (ref.shape[axis],) and axis == len(ref.shape) - 1:
                    intercept = intercept or (None if shifted else self._named(others[0], 1))
                shifted = shifted or name in SCALINGS
            else:
                return self._end(op, name, ref, steps, axis, intercept)
            steps.append(op)
            ref, maker = op.outputs[0], op
        return Landing(intercept=intercept)

    def _end(
        self, op: Op, name: str, ref: TensorRef, steps: Sequence[Op], axis: int, intercept: tuple[str, int] | None
    ) -> Landing:
        others = [t for t in op.tensors if t.id != ref.id]
        adds = name == "add" and [t.shape for t in others] == [ref.shape] and op.arguments["alpha"] == 1
        following = self.uses.only_reader(op.outputs[0], op) if adds else op
        rectified = following is not None and base_name(following) == "relu"
        return Landing(tuple(steps), op, adds, op.tensors[0] == ref, axis, rectified, intercept)

    def _only_use(self, name: str) -> bool:
        return sum(len(self.uses.of(ref)) for ref, known in self.names.items() if known == name) == 1

    def _named(self, ref: TensorRef | None, sign: int) -> tuple[str, int] | None:
        """A parameter or buffer that is used here and nowhere else."""
        name = self.names.get(ref.id) if ref is not None else None
        return (name, sign) if name is not None and self._only_use(name) else None


def _moved(op: Op, name: str, axis: int, ref: TensorRef) -> int | None:
    """Where the channels are after a reshape; None where it takes them apart."""
    arguments, rank = op.arguments, len(ref.shape)
    if name == "permute":
        return [d % rank for d in arguments["dims"]].index(axis)
    if name in ("transpose", "t"):
        pair = (0, 1) if name == "t" else (arguments["dim0"] % rank, arguments["dim1"] % rank)
        return {pair[0]: pair[1], pair[1]: pair[0]}.get(axis, axis)
    if name in ("alias", "clone"):
        return axis
    shape = op.outputs[0].shape
    if axis == rank - 1:  # what comes before is merged or split
        return len(shape) - 1 if shape and shape[-1] == ref.shape[-1] else None
    return axis if shape[: axis + 1] == ref.shape[: axis + 1] else None
