"""Every rule must be met by a model in some test of this folder, so that a rule cannot be added and never tried."""

import importlib

import pytest
import torch
from torch import nn

import compress
from compress.rules.registry import RULES, base_name, rule
from compress.trace import record
from tests.compress.helpers import Apply, as_double, assert_exact, between, frozen_reasons, image

FAMILIES = (
    "attention", "convolution", "elementwise", "factories", "indexing", "matmul", "normalization", "pooling",
    "reductions", "shape", "spectral", "views",
)  # fmt: skip

# why no model here reaches the rule
UNREACHED = {
    "another device or backend has this operator; the CPU reaches the same rule by another name": {
        "convolution_overrideable", "cudnn_convolution", "mkldnn_convolution", "_convolution", "cudnn_batch_norm",
        "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
        "_batch_norm_with_update_functional", "mkldnn_max_pool2d", "_fused_dropout",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable",
    },
    "without data PyTorch takes attention apart; models that are traced with a real forward pass come here": {
        "_scaled_dot_product_flash_attention_for_cpu"
    },
    "drawn at random for every channel, so that two runs cannot be compared: see test_pooling": {
        "fractional_max_pool2d"
    },
    "PyTorch turns it into another operator first, in every overload but those that write to a given result": {
        "avg_pool1d", "adaptive_avg_pool1d", "softmax", "log_softmax",
    },
    "see test_matmul: refused, as it sums over the batch": {"addbmm"},
}  # fmt: skip


def _is_decomposed(name: str) -> bool:
    """Whether PyTorch turns every overload into other operators before a dispatch mode sees it."""
    found = []
    for overload in getattr(getattr(torch.ops.aten, name, None), "overloads", list)():
        full = f"aten::{name}" + ("" if overload == "default" else f".{overload}")
        try:
            found.append(torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeImplicitAutograd"))
        except RuntimeError:  # made for TorchScript only
            continue
    return bool(found) and all(found)


def test_every_rule_is_met_by_a_test() -> None:
    met = set()
    for family in FAMILIES:
        cases = importlib.import_module(f"tests.compress.rules.test_{family}").CASES
        for make in cases.values():
            model, inputs = make()
            trace = record(model.double(), as_double(inputs))
            met |= {base_name(op) for op in trace.ops}
    explained = set().union(*UNREACHED.values())
    unmet = {name for name in RULES if not _is_decomposed(name)} - met - explained
    assert not unmet, f"no case of tests/compress/rules reaches these rules: {sorted(unmet)}"
    assert explained <= set(RULES), f"explained, but no rule: {sorted(explained - set(RULES))}"


def test_every_rule_is_about_an_operator_that_exists() -> None:
    missing = {name for name in RULES if not hasattr(torch.ops.aten, name) and "::" not in name}
    assert missing <= {"batch_norm_with_update"}  # older releases have it


def test_an_operator_has_one_rule() -> None:
    with pytest.raises(ValueError, match="'cat' has two rules"):
        rule("cat")(lambda labels, op: None)


def test_an_operator_without_a_rule_freezes_by_name_and_the_rest_prunes() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.into = nn.Conv2d(3, 11, 1), nn.Conv2d(11, 7, 1)
            self.after, self.head = nn.Conv2d(7, 13, 1), nn.Conv2d(13, 5, 1)

        def forward(self, x):
            x = self.into(self.before(x).relu())
            return self.head(self.after(torch.logcumsumexp(x, -1)).relu())

    graph = compress.trace(Spectrum(), image())
    assert [group.name for group in graph.groups] == ["before.weight", "after.weight"]
    assert "aten.logcumsumexp.default has no rule" in frozen_reasons(graph, "into.weight")
    assert "into.weight [0]" in str(graph)
    gaps = [(str(gap.op.func), gap.why, gap.in_training) for gap in graph.labels.gaps]
    assert gaps[:1] == [("aten.logcumsumexp.default", "has no rule", False)]
    result = assert_exact(Spectrum(), image())
    assert result.model.into.out_channels == 7
    assert result.model.before.out_channels < 11
    assert result.model.after.out_channels < 13


def test_a_custom_operator_without_a_rule_freezes_and_one_with_a_rule_prunes() -> None:
    @torch.library.custom_op("prunus_tests::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    double.register_autograd(lambda ctx, grad: grad * 2)
    model = between(lambda x: torch.ops.prunus_tests.double(x))
    graph = compress.trace(model, image())
    assert not graph.groups
    assert "prunus_tests.double.default in 1 has no rule" in frozen_reasons(graph, "0.weight")
    with pytest.raises(compress.PruneError, match=r"nothing can be pruned: .*prunus_tests\.double\.default"):
        compress.prune(model, image(), budget=compress.Budget(channels=0.5))
    RULES["prunus_tests::double"] = RULES["clone"]
    try:
        assert_exact(model, image())
    finally:
        del RULES["prunus_tests::double"]


def test_a_rule_that_meets_a_use_it_does_not_cover_freezes() -> None:
    model = nn.Sequential(
        nn.Linear(3, 11), Apply(lambda _, x: x.view(torch.int32).view(torch.float32)), nn.Linear(11, 5)
    )
    graph = compress.trace(model, image(7, 3))
    assert not graph.groups
    assert "has no rule for a view as another dtype" in frozen_reasons(graph, "0.weight")
    assert {gap.in_training for gap in graph.labels.gaps} == {False, True}
