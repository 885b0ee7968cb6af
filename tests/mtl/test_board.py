import time
from pathlib import Path

from mtl.board import Board


def test_files_of_one_second_are_read_in_the_order_of_writing(tmp_path: Path) -> None:
    # what the tenth writer of this process and second would be sorted before
    earlier = tmp_path / f"events.out.tfevents.{int(time.time()):010d}.zzz.9.9"
    earlier.touch()
    with Board(tmp_path, 1):
        pass
    assert sorted(file.name for file in tmp_path.iterdir())[0] == earlier.name
    assert len(list(tmp_path.iterdir())) == 2
