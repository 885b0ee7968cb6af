"""Who reads a tensor of a recorded run; operators that write in place give it another value under the same name."""

from compress.recorder import Op, TensorRef, Trace


class Uses:
    """The operators of the evaluation run by the tensors among their arguments."""

    def __init__(self, trace: Trace) -> None:
        self._readers: dict[int, list[Op]] = {}
        for op in trace.evaluation:
            for ref in dict.fromkeys(t.id for t in op.tensors):
                self._readers.setdefault(ref, []).append(op)
        self._outputs = {ref.id for ref in trace.outputs}

    def of(self, ref: int) -> list[Op]:
        """All that read it, whatever its value then."""
        return self._readers.get(ref, [])

    def only_reader(self, ref: TensorRef, made_by: Op) -> Op | None:
        """The one operator that reads the value that ``made_by`` gave; None if there is none, or several, or the model
        gives it as an output."""
        readers = []
        for op in self.of(ref.id):
            if op.index > made_by.index:
                readers.append(op)
                if any(output.id == ref.id for output in op.outputs):  # from here on it has another value
                    return op if len(readers) == 1 else None
        return readers[0] if len(readers) == 1 and ref.id not in self._outputs else None
