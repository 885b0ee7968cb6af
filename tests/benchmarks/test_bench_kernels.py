import json
from pathlib import Path

from benchmarks import bench_kernels_gpu, bench_kernels_memory


def test_kept_bytes_and_time(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    flags = ["--quick", "--without-compile", "--repeats", "1", "--only", "chain", "--output", str(output)]
    assert bench_kernels_memory.main(flags) == 0
    chain = json.loads(output.read_text())["models"]["chain"]
    assert chain["eager"]["kept"] == 1
    assert 0.49 < chain["memory_efficient"]["kept"] < 0.55
    assert all(row["seconds"] > 0 for row in chain.values())


def test_dry_run_without_gpu(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    assert bench_kernels_gpu.main(["--dry-run", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["dry_run"]
    assert all(row["forward_fraction"] > 0 and row["backward_fraction"] > 0 for row in found["norms"])
