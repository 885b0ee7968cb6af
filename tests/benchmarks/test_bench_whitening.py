import json
from pathlib import Path

from benchmarks import bench_whitening


def test_whitening_is_never_worse_and_full_rank_is_exact(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = ["--models", "mlp", "small_vit", "--images", "16", "--ranks", "0.25", "0.5", "--output", str(output)]
    assert bench_whitening.main(flags) == 0
    result = json.loads(output.read_text())
    names = {row["layer"] for row in result["rows"]}
    assert {"0.weight", "2.weight", "4.weight", "encoder.layers.encoder_layer_1.mlp.0.weight"} <= names
    assert "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in names
    for row in result["summary"]:
        assert row["worst_ratio"] <= 1 + 1e-9
        assert row["mean_ratio"] <= 0.7
        assert row["full_rank_difference"] <= 1e-10
