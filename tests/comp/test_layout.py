import itertools
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from comp.data.layout import (
    FILE_NAME,
    DataSet,
    EncodedImage,
    Row,
    epoch_order,
    read_metadata,
    read_rows,
    write_rows,
)

FACTS = {"name": "toy", "license": "CC0"}


def row(index: int, split: str = "train") -> Row:
    return Row(
        id=f"row-{index}",
        split=split,
        images=(EncodedImage(data=bytes([index % 256]) * 9), EncodedImage(path="a/b.png")),
        texts=("what is this?", "Γάτα 猫 🐈"),
        labels=("cat",),
        attributes={"kind": "mammal", "colour": ""},
    )


def write_many(path: Path, start: int) -> int:
    return write_rows(path, (row(start + i) for i in range(2000)), metadata=FACTS)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    rows = [row(0), row(1, "val"), Row(id="bare", split="test")]
    assert write_rows(path, rows, metadata=FACTS) == 3
    assert list(read_rows(path)) == rows


def test_only_the_splits_asked_for_are_read(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    write_rows(path, [row(0), row(1, "val"), row(2, "test")], metadata=FACTS)
    assert [one.id for one in read_rows(path, splits=["val", "test"])] == ["row-1", "row-2"]


def test_metadata_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    write_rows(path, [row(0)], metadata=FACTS)
    assert read_metadata(path) == FACTS


def test_row_groups_are_small_enough_to_stream(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    write_rows(path, (row(i) for i in range(10)), metadata=FACTS, rows_per_group=4)
    file = pq.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [4, 4, 2]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    write_rows(path, [row(0)], metadata=FACTS)

    def failing() -> Iterator[Row]:
        yield row(1)
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        write_rows(path, failing(), metadata=FACTS)
    assert list(read_rows(path)) == [row(0)]
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_that_write_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        counts = list(pool.map(write_many, [path, path], [0, 10_000]))
    assert counts == [2000, 2000]
    ids = [one.id for one in read_rows(path)]
    assert ids in (
        [f"row-{i}" for i in range(2000)],
        [f"row-{10_000 + i}" for i in range(2000)],
    )
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_split_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 'row-3': split must be one of .* 'restval'"):
        write_rows(tmp_path / "toy.parquet", [row(3, "restval")], metadata=FACTS)


def test_an_id_that_comes_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'row-3' comes twice"):
        write_rows(tmp_path / "toy.parquet", [row(3), row(3)], metadata=FACTS)


def test_a_data_set_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"toy\.parquet would have no rows"):
        write_rows(tmp_path / "toy.parquet", [], metadata=FACTS)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data set at .*gone"):
        read_metadata(tmp_path / "gone.parquet")


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.parquet"
    path.write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.parquet is not a Parquet file"):
        read_metadata(path)


def test_a_foreign_parquet_file_is_no_data_set(tmp_path: Path) -> None:
    path = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match="not a data set of comp"):
        list(read_rows(path))


def test_another_layout_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "later.parquet"
    table = pa.table({"a": [1]}).replace_schema_metadata({"comp.layout": "9"})
    pq.write_table(table, path)
    with pytest.raises(ValueError, match="layout 9, but this release reads layout 2"):
        read_metadata(path)


def test_images_by_path_are_read_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").write_bytes(b"png")
    assert EncodedImage(path="a/b.png").read(tmp_path) == b"png"


def test_a_path_that_climbs_out_of_the_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'\.\./secret' leaves the image root"):
        EncodedImage(path="../secret").read(tmp_path)


def test_an_image_that_is_gone_is_named_with_its_root(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image 'a/b\.png' is gone from .*; put it back"):
        EncodedImage(path="a/b.png").read(tmp_path)


def test_a_path_needs_an_image_root() -> None:
    with pytest.raises(ValueError, match=r"'a/b\.png' has no bytes; pass the image root"):
        EncodedImage(path="a/b.png").read()


def blocks_of(path: Path, count: int = 40, size: int = 4) -> DataSet:
    write_rows(
        path,
        (row(i, "val" if i % 10 == 9 else "train") for i in range(count)),
        metadata={**FACTS, "kind": "questions"},
        rows_per_group=size,
    )
    return DataSet(path)


def test_rows_are_fetched_by_number_in_the_order_asked_for(tmp_path: Path) -> None:
    splits = blocks_of(tmp_path / "toy.parquet").splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 36, "val": 4}
    assert [one.id for one in splits["train"].fetch([35, 0, 9, 0])] == [
        "row-38",
        "row-0",
        "row-10",
        "row-0",
    ]
    assert splits["val"].fetch([3]) == [row(39, "val")]


def test_a_directory_stands_for_the_file_in_it(tmp_path: Path) -> None:
    blocks_of(tmp_path / FILE_NAME)
    assert DataSet(tmp_path).kind == "questions"


def test_a_reader_keeps_a_few_row_groups_however_many_there_are(tmp_path: Path) -> None:
    rows = blocks_of(tmp_path / "toy.parquet", count=400).splits["train"]
    before = pa.total_allocated_bytes()
    rows.fetch(range(40))
    few = pa.total_allocated_bytes() - before
    rows.fetch(range(360))
    assert pa.total_allocated_bytes() - before <= 1.5 * few


def test_rows_of_one_set_are_read_in_another_process(tmp_path: Path) -> None:
    rows = blocks_of(tmp_path / "toy.parquet").splits["train"]
    rows.fetch([0])
    assert pickle.loads(pickle.dumps(rows)).fetch([5]) == rows.fetch([5])


def test_an_epoch_holds_every_row_once_and_few_row_groups_at_a_time() -> None:
    order = epoch_order([10] * 30, seed=0, epoch=0, window=4)
    assert sorted(order.tolist()) == list(range(300))
    windows = [set((order[i : i + 40] // 10).tolist()) for i in range(0, 300, 40)]
    assert all(len(groups) <= 4 for groups in windows)
    assert order[:40].tolist() != sorted(order[:40].tolist())


def test_rows_of_distant_row_groups_meet_and_epochs_differ() -> None:
    first, again, other = (
        epoch_order([10] * 30, seed=0, epoch=epoch, window=4).tolist() for epoch in (0, 0, 1)
    )
    assert first == again != other
    assert max(abs(a - b) for a, b in itertools.pairwise(first[:40])) > 40


def test_large_images_close_a_row_group(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    big = EncodedImage(data=bytes(9 << 20))
    write_rows(path, [Row(str(i), "train", [big]) for i in range(3)], metadata=FACTS)
    assert DataSet(path).splits["train"].blocks == (2, 1)
