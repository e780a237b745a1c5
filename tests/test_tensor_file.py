"""Files of tensors: any safetensors reader reads them, and only what fits is read."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megazh.errors import DataError
from megazh.tensor_file import NamedTensor, TensorReader, file_bytes, write_tensor_file


def made_tensors() -> list[NamedTensor]:
    """A tensor of each width, wide ones first."""
    torch.manual_seed(0)
    return [
        NamedTensor("a", (3, 5), torch.randn(15)),
        NamedTensor("b", (7,), torch.randn(7).bfloat16()),
        NamedTensor("字", (4,), torch.arange(4, dtype=torch.uint8)),
    ]


def test_the_library_reads_what_was_written_and_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", made_tensors()
    digest = write_tensor_file(path, tensors)
    data = path.read_bytes()
    assert digest == hashlib.sha256(data).hexdigest()
    assert len(data) == file_bytes(tensors)
    found = load_file(path)
    assert found.keys() == {"a", "b", "字"}
    for tensor in tensors:
        assert torch.equal(found[tensor.key], tensor.values.view(tensor.shape))
        assert found[tensor.key].dtype == tensor.values.dtype


@pytest.mark.parametrize(("begin", "end"), [(0, 15), (0, 1), (3, 11), (5, 10), (14, 15)])
def test_any_range_of_a_matrix(tmp_path: Path, begin: int, end: int) -> None:
    write_tensor_file(tmp_path / "x.safetensors", made_tensors())
    with TensorReader(tmp_path / "x.safetensors") as reader:
        assert torch.equal(reader.read("a", "F32", [3, 5], begin, end), made_tensors()[0].values[begin:end])
        assert torch.equal(reader.read("b", "BF16", [7]), made_tensors()[1].values)


@pytest.mark.parametrize(
    ("key", "dtype", "shape", "problem"),
    [
        ("c", "F32", [3, 5], "holds no c"),
        ("a", "F16", [3, 5], r"a is F32 \[3, 5\], and the manifest names F16 \[3, 5\]"),
        ("a", "F32", [15], r"a is F32 \[3, 5\], and the manifest names F32 \[15\]"),
    ],
)
def test_another_tensor_than_the_manifest_names(
    tmp_path: Path, key: str, dtype: str, shape: list[int], problem: str
) -> None:
    write_tensor_file(tmp_path / "x.safetensors", made_tensors())
    with TensorReader(tmp_path / "x.safetensors") as reader, pytest.raises(DataError, match=problem):
        reader.read(key, dtype, shape)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (9).to_bytes(8, "little") + b"not json!",
        b"\x80\x04\x95" + bytes(40),
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(60) + bytes(8),
    ],
)
def test_damaged_and_foreign_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"x.safetensors: not a file of tensors"):
        TensorReader(tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=r"y.safetensors: cannot be read"):
        TensorReader(tmp_path / "y.safetensors")
