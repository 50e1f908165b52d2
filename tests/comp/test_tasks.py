from pathlib import Path
from typing import Any

import pytest

from comp.data.layout import Row, write_rows
from comp.tasks import TASKS, build_task
from comp.tasks.names import METRIC_NAMES


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_built_from_a_file(name: str, tokenizer: Any, openmoji_file: Path) -> None:
    task = build_task(name, tokenizer=tokenizer, image_size=32, data=openmoji_file, num_train=400)
    batch = next(task.batches("val", batch_size=3))
    assert (task.name, task.metric_name) == (name, METRIC_NAMES[name])
    assert batch["pixel_values"].shape[-3:] == (3, 32, 32)


def test_an_unknown_task_suggests_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="'nlvr'; did you mean 'nlvr2'"):
        build_task("nlvr", tokenizer=tokenizer, image_size=64)


def test_a_missing_file_is_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        build_task("vqa", tokenizer=tokenizer, image_size=64, data=tmp_path / "gone.parquet")


def test_a_file_of_another_data_set_is_named(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    write_rows(path, [Row(id="1", split="train")], metadata={"name": "toy"})
    with pytest.raises(ValueError, match=r"toy\.parquet holds rows of no kind, which task 'vqa'"):
        build_task("vqa", tokenizer=tokenizer, image_size=64, data=path)
