"""Files written from blocks: the library reads them, shards respect their size, and failures leave nothing."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megazh.exchange.shards import StreamedTensor, write_shards, write_streamed

WHOLE = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(5.0), "c": torch.arange(40.0).view(8, 5)}


def streamed(key: str, block: int = 4) -> StreamedTensor:
    """A tensor of `WHOLE` in blocks."""

    def blocks() -> Iterator[torch.Tensor]:
        yield from WHOLE[key].reshape(-1).split(block)

    return StreamedTensor(key, tuple(WHOLE[key].shape), torch.float32, blocks)


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    sizes: list[int] = []
    written = write_streamed(tmp_path / "x.safetensors", [streamed(key) for key in WHOLE], sizes.append)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (written.name, written.bytes) == ("x.safetensors", len(data))
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert sum(sizes) == 57 * 4
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[key], WHOLE[key]) for key in WHOLE)


@pytest.mark.parametrize("limit", [1, 80, 10**6])
def test_shards_of_a_size_and_their_index(tmp_path: Path, limit: int) -> None:
    names = write_shards(tmp_path, [streamed(key) for key in WHOLE], limit, lambda _: None)
    expected = {1: [["a"], ["b"], ["c"]], 80: [["a", "b"], ["c"]], 10**6: [["a", "b", "c"]]}[limit]
    assert [sorted(load_file(tmp_path / name)) for name in names] == expected
    for name in names:
        with safe_open(tmp_path / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    if len(names) == 1:
        assert names == ["model.safetensors"]
        assert [path.name for path in tmp_path.iterdir()] == names
        return
    assert names[0] == f"model-00001-of-0000{len(names)}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 57 * 4
    for key, name in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / name)[key], WHOLE[key])


@pytest.mark.parametrize("numbers", [torch.zeros(11), torch.zeros(13), torch.zeros(12).double()])
def test_blocks_that_are_not_the_tensor(tmp_path: Path, numbers: torch.Tensor) -> None:
    wrong = StreamedTensor("a", (4, 3), torch.float32, lambda: iter([numbers]))
    with pytest.raises(ValueError, match=r"^a: "):
        write_streamed(tmp_path / "x.safetensors", [wrong], lambda _: None)
    assert list(tmp_path.iterdir()) == []
