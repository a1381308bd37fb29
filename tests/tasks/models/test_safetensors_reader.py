"""Safetensors files read and written without torch, against the safetensors package and torch's own rounding."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from tasks.core.artifacts import digest
from tasks.core.errors import BadModel
from tasks.deltas.lazy_tensors import ComputedTensor
from tasks.merge.safetensors_writer import Planned, write_shards
from tasks.models.safetensors_reader import INDEX, read_header, rounded, stored_in, widened

TENSORS = {
    "b.matrix": torch.arange(24, dtype=torch.bfloat16).reshape(4, 6) / 7,
    "a.vector": torch.linspace(-1, 1, 5, dtype=torch.float16),
    "c.cube": torch.arange(12.0, dtype=torch.float64).reshape(2, 3, 2) / 3,
    "d.number": torch.tensor(2.5),
    "e.counts": torch.arange(3),
    "f.nothing": torch.zeros(0, 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    save_file(TENSORS, tmp_path / "base" / "model.safetensors")
    return tmp_path / "base"


def test_what_is_stored_is_what_safetensors_reads(folder: Path) -> None:
    stored = stored_in(folder)
    assert stored.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert stored[name].shape == tuple(tensor.shape)
        if tensor.is_floating_point() and tensor.numel():
            assert torch.equal(torch.from_numpy(stored[name].floats()).reshape(tensor.shape), tensor.float())
    assert np.array_equal(stored["b.matrix"].floats(1, 3), TENSORS["b.matrix"][1:3].float().numpy())
    with pytest.raises(BadModel, match="no tensor to compute with"):
        stored["e.counts"].floats()


def test_a_copy_has_the_same_bytes_and_its_digest_is_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    out.mkdir()
    planned = {name: Planned(tensor.dtype, tensor) for name, tensor in stored_in(folder).items()}
    (digests,) = write_shards({out: planned}, 1 << 30).values()
    copied = load_file(out / "model.safetensors")
    assert all(torch.equal(copied[name], tensor) for name, tensor in TENSORS.items())
    assert digests == {"model.safetensors": digest(out / "model.safetensors")}


def bits_of_subnormals(bits: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """What float32 below 2^-126, given by their bits, are in a format: in whole numbers, which nothing flushes."""
    sign, multiple = bits >> 31, bits & 0x7FFFFF  # of 2^-149; of 2^-133 in bfloat16
    if dtype == "F64":
        exact: np.ndarray[Any, Any] = np.ldexp(np.where(sign, -1.0, 1.0) * multiple, -149).view(np.uint64)
        return exact
    if dtype == "F32":
        return bits
    nearest = np.rint(multiple / (1 << 16)) if dtype == "BF16" else np.zeros(len(bits))
    half: np.ndarray[Any, Any] = (sign << 15).astype(np.uint16) | nearest.astype(np.uint16)
    return half


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_numbers_are_rounded_as_torch_rounds_them_whatever_the_process_flushes(dtype: str, flushes: bool) -> None:
    """All patterns of the upper half with lower halves around the middle, where ties are decided.

    Numbers too small to be normal are held to whole numbers: torch flushes them in a thread that was told to, as every
    training does, and on CPUs with instructions for bfloat16 always.
    """
    torch.set_flush_denormal(flushes)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    bits = ((np.arange(1 << 16, dtype=np.uint32)[:, None] << 16) + low).reshape(-1)
    limit = {"BF16": 3.3895e38, "F16": 65504.0}.get(dtype, np.inf)
    bits = bits[np.isfinite(bits.view(np.float32)) & (np.abs(bits.view(np.float32)) <= limit)]
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype]
    whole = {2: np.uint16, 4: np.uint32, 8: np.uint64}[kind.itemsize]
    small = (bits & 0x7F800000) == 0
    want = torch.from_numpy(bits.view(np.float32).copy()).to(kind).view(torch.uint8).numpy().view(whole)
    want[small] = bits_of_subnormals(bits[small], dtype)
    found = rounded(bits.view(np.float32), dtype)
    assert np.array_equal(found.view(whole), want)
    back = torch.frombuffer(bytearray(found), dtype=kind).float().numpy().view(np.uint32)
    if dtype == "F64":
        back[small] = bits[small]
    assert np.array_equal(widened(found, dtype).view(np.uint32), back)


@pytest.mark.parametrize("flushes", [False, True])
def test_float64_too_small_for_a_normal_float32_are_rounded_to_even(flushes: bool) -> None:
    torch.set_flush_denormal(flushes)
    least = 2.0**-149
    numbers = np.array([0.5, 0.75, 1.5, 2.5, -0.75, -0.25, (1 << 23) - 0.25, (1 << 23) - 1, 1 << 23]) * least
    expected = [0, 1, 2, 2, (1 << 31) + 1, 1 << 31, 1 << 23, (1 << 23) - 1, 1 << 23]
    assert widened(numbers.view(np.uint8), "F64").view(np.uint32).tolist() == expected


@pytest.mark.parametrize(
    ("number", "dtype"), [(float("nan"), "BF16"), (3.4e38, "BF16"), (70000.0, "F16"), (float("inf"), "F32")]
)
def test_a_number_that_a_format_cannot_hold_is_refused(number: float, dtype: str) -> None:
    with pytest.raises(BadModel, match=f"not finite in {dtype}"):
        rounded(np.array([1.0, number], dtype=np.float32), dtype)


def test_the_name_of_a_tensor_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    planned = {"w": Planned("F16", ComputedTensor(lambda: torch.full((2, 2), 1e6), (2, 2)))}
    with pytest.raises(BadModel, match=r"^w: holds numbers"):
        write_shards({tmp_path: planned}, 1 << 30)


@pytest.mark.parametrize("most", [100, 1000, 4000, 1 << 30])
def test_shards_are_split_as_the_hub_s_library_splits_them(tmp_path: Path, most: int) -> None:
    tensors = {
        f"t{number:02d}": torch.full((size, 4), float(number)) for number, size in enumerate((5, 60, 7, 30, 1, 90, 2))
    }
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    planned = {name: Planned("F32", tensor) for name, tensor in stored_in(tmp_path / "base").items()}
    write_shards({tmp_path / "out": planned}, most)
    want = split_torch_state_dict_into_shards(tensors, max_shard_size=most)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == len(want.filename_to_tensors)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    if want.is_sharded:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["metadata"]["total_size"] == want.metadata["total_size"]
        assert index["weight_map"] == want.tensor_to_filename
    assert stored_in(tmp_path / "out").keys() == tensors.keys()


def test_several_folders_are_written_in_one_pass(tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    numbers = torch.arange(12.0).reshape(3, 4)
    steps: list[None] = []

    def times(factor: int) -> ComputedTensor:
        return ComputedTensor(lambda: numbers * factor, (3, 4))

    wanted = {place: {"w": Planned("F32", times(factor))} for factor, place in enumerate(places)}
    write_shards(wanted, 1 << 30, lambda: steps.append(None))
    assert [load_file(place / "model.safetensors")["w"].sum().item() for place in places] == [0.0, 66.0]
    assert len(steps) == 2


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(BadModel, match=r"is cut|header"):
            stored_in(folder)
    file.write_bytes(whole + b"x")
    with pytest.raises(BadModel, match="longer than its header says"):
        stored_in(folder)


def test_an_absurd_header_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 1 << 60) + b"x" * 5112)
    with pytest.raises(BadModel, match="the header says 1152921504606846976 bytes, the file has 5120"):
        read_header(file)


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b'{"a": {"dtype": "F32", "shape": [null], "data_offsets": [0, 4]}}',
        b"{",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',  # another size than its shape
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',  # a gap
        b'{"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}, "b": {"dtype": "I8", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(BadModel, match=r"header|is cut"):
        stored_in(tmp_path)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"x": "model-2.safetensors", "a.vector": "model.safetensors"}})
    )
    with pytest.raises(BadModel, match=r"model-2\.safetensors"):
        stored_in(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": "../model.safetensors"}}'])
def test_an_index_that_is_none_is_refused(folder: Path, index: str) -> None:
    (folder / INDEX).write_text(index)
    with pytest.raises(BadModel, match="is no index of weights"):
        stored_in(folder)


def test_a_tensor_that_two_files_hold_or_none_is_refused(folder: Path) -> None:
    save_file({"a.vector": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(BadModel, match="another file holds too"):
        stored_in(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
    with pytest.raises(BadModel, match="no file holds"):
        stored_in(folder)


def test_a_disk_that_cannot_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says so to the first sync alone, and that one is not the last."""
    synced = Event()

    def failing(descriptor: int) -> None:
        synced.set()
        raise OSError(errno.EIO, "the disk is broken")

    def numbers() -> torch.Tensor:
        assert synced.wait(timeout=30)
        return torch.zeros(3, 4)

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(OSError, match="the disk is broken"):
        write_shards({tmp_path: {"w": Planned("F32", ComputedTensor(numbers, (3, 4)))}}, 1 << 30)
