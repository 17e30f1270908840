"""Files of tensors, read without torch: safetensors and torch's own."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from vmonarch_jax.models.wan.weights.stored import Stored, read_metadata, write_safetensors
from wan_weights import (
    assert_same,
    written,
)

HERE = Path(__file__).parent
PTH = HERE.parent / "goldens/wan/tensors.pth"


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_])
def test_safetensors_of_every_dtype(tmp_path, dtype):
    random = np.random.default_rng(0)
    want = {"a": random.normal(size=(3, 5)).astype(dtype), "b.c": np.array(1, dtype)}
    want["empty"] = np.zeros((0, 4), dtype)
    stored = written(tmp_path, want)
    assert_same({key: tensor.read() for key, tensor in stored.items()}, want)
    shapes = {key: (value.shape, value.dtype) for key, value in want.items()}
    write_safetensors(tmp_path / "ours.safetensors", shapes, want.__getitem__, {"made": "here"})
    assert_same(load_file(tmp_path / "ours.safetensors"), want)
    assert read_metadata(tmp_path / "ours.safetensors") == {"format": "pt", "made": "here"}


def test_safetensors_damaged(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file({"a": np.ones((4, 5), np.float32)}, whole)
    data = whole.read_bytes()
    path = tmp_path / "x.safetensors"
    for cut in (0, 7, 40, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"x\.safetensors: expected"):
            Stored([path])
    for wrong in (data.replace(b"F32", b"F99"), data.replace(b"[4,5]", b"[4,6]")):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="expected a whole safetensors file"):
            Stored([path])
    with pytest.raises(ValueError, match="expected a file of weights, got none"):
        Stored([tmp_path / "none.safetensors"])
    with pytest.raises(ValueError, match="expected each key once, got 'a'"):
        Stored([whole, whole])


def test_pth_without_torch():
    stored = Stored([PTH])
    whole = np.arange(24, dtype=np.float32)
    want = {
        "matrix": whole.reshape(4, 6),
        "transposed": whole.reshape(4, 6).T,
        "window": whole[3:21].reshape(3, 6)[:, 1:4],
        "half": (np.arange(5) / 4).astype(np.float16),
        "bfloat": (np.arange(6) / 8).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "parameter": np.array([1.5, -2.5], np.float32),
        "scalar": np.array(7, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "whole": np.arange(3),
    }
    got = {key: tensor.read() for key, tensor in stored.items()}
    assert_same(got, want)
    assert {key: value.dtype for key, value in got.items()} == {k: v.dtype for k, v in want.items()}
    with pytest.raises(ValueError, match="read-only"):
        got["matrix"][0, 0] = 1


def pth(path, pickled, values=bytes(64), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", values)
    return path


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensor_pickle(offset=0, shape=(2, 3), strides=(3, 1), kind="FloatStorage", state=b""):
    """What torch.save writes for {"a": tensor}, by hand."""
    out = io.BytesIO()
    out.write(b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((")
    for text in ("storage",):
        out.write(b"X" + len(text).to_bytes(4, "little") + text.encode())
    out.write(b"ctorch\n" + kind.encode() + b"\n")
    for text in ("0", "cpu"):
        out.write(b"X" + len(text).to_bytes(4, "little") + text.encode())
    out.write(b"K\x10tQ")
    for values in (offset, shape, strides):
        out.write(pickle.dumps(values, 2)[2:-1])
    out.write(b"\x89NtR" + state + b"s.")
    return out.getvalue()


def test_pth_runs_nothing(tmp_path):
    path = tmp_path / "x.pth"
    touched = tmp_path / "touched"
    for bad in (Call(os.mkdir, str(touched)), Call(eval, "1"), {"a": Call(print, "b")}):
        with pytest.raises(ValueError, match=r"expected tensors alone, got .*not run"):
            Stored([pth(path, pickle.dumps(bad, 2))])
    assert not touched.exists()
    assert Stored([pth(path, tensor_pickle())])["a"].read().shape == (2, 3)
    for wrong in (
        {"offset": 11}, {"shape": (5, 6)}, {"strides": (16, 1)}, {"offset": -1},
        {"strides": (-3, 1)}, {"kind": "NoStorage"}, {"shape": (2,)}, {"shape": "ab"},
        {"kind": "DoubleStorage"}, {"state": b"}X\x04\x00\x00\x00pathX\x01\x00\x00\x00/sb"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            Stored([pth(path, tensor_pickle(**wrong))])
    for other in ([1], {"a": 1}, {1: 2}, 3):
        with pytest.raises(ValueError, match="expected named tensors"):
            Stored([pth(path, pickle.dumps(other, 2))])
    with pytest.raises(ValueError, match="expected plain values"):
        Stored([pth(path, tensor_pickle(), compression=zipfile.ZIP_DEFLATED)])
    path.write_bytes(PTH.read_bytes()[:-40])
    with pytest.raises(ValueError, match="expected a zip archive"):
        Stored([path])


def test_pth_damaged_bytes_are_value_errors(tmp_path):
    data, path = tensor_pickle(), tmp_path / "x.pth"
    random = np.random.default_rng(0)
    for _ in range(300):
        spoilt = bytearray(data)
        for place in random.integers(len(data), size=3):
            spoilt[place] = random.integers(256)
        try:
            for tensor in Stored([pth(path, bytes(spoilt))]).values():
                tensor.read()
        except ValueError:
            pass
