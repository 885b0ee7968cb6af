from torch import nn

import compress
from compress.counts import Lump
from compress.overview import GroupFacts
from compress.table import at_once, some
from tests.compress.helpers import image
from tests.compress.test_overview import Residual


def test_the_table_tells_groups_reasons_and_reach() -> None:
    text = str(compress.trace(Residual(), image(1, 3)))
    rows = {line.split()[1]: line.split() for line in text.splitlines() if "yes" in line or " no " in line}
    assert rows["stem.weight"][2:5] == ["20", "100.0%", "1"]
    assert rows["stem.weight"][-1] == "no"
    assert rows["inner.weight"][-1] == "yes"
    for part in ("why removal is not exact", "layer_norm", "never removed", "head.weight [0]", "output of the model"):
        assert part in text
    assert text.splitlines()[-1].startswith("1,760 MACs can be brought down to 1.8%, 18.2% with exact_only=True (")


def test_a_model_of_which_nothing_can_go() -> None:
    text = str(compress.trace(nn.Linear(3, 5), image(7, 3)))
    assert text.endswith("nothing can be removed from the 105 MACs")
    assert "channel groups" not in text


def test_lumps_say_what_goes_with_what() -> None:
    group = compress.ChannelGroup(1, "qkv.weight", 12, ())
    lumps = (Lump({1: 1, 3: 64}, {}), Lump({1: 2}, {}))
    assert at_once(GroupFacts(group, 0.5, lumps)) == "1 with 64 of #3, or 2"


def test_long_lists_are_cut() -> None:
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
