"""Tensors in files by key, memory-mapped, one at a time: safetensors and PyTorch's `.pth`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_TORCH = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
# What Python's unpickler raises on bytes that are no pickle.
_DAMAGE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    struct.error,
)
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit, so a damaged length reads as damage


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: nothing is read before `read`.

    Attributes:
      path: the file.
      shape: of the tensor.
      dtype: of its values.
      offset: of its first value in the file, in bytes.
      strides: values from one index to the next on each axis, or `None`: row-major.
    """

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    strides: tuple[int, ...] | None = None

    def __setstate__(self, state: object) -> None:
        raise ValueError(f"{self.path}: expected a plain tensor, got one with a state of its own")

    def read(self) -> np.ndarray:
        """A read-only view of the file; its pages are let go with the last reference to it."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        if self.strides is None:
            extent = math.prod(self.shape)
        else:
            extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        # One mapping a tensor: a mapping of the whole file would keep every page it touched.
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (extent * self.dtype.itemsize,))
        values = raw.view(np.ndarray).view(self.dtype)
        if self.strides is None:
            return values.reshape(self.shape)
        strides = [s * self.dtype.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(values, self.shape, strides, writeable=False)


class Stored(Mapping[str, Tensor]):
    """The tensors of some files by key; `stored[key].shape`, `stored[key].read()`.

    Raises:
      ValueError: a file is missing, damaged or of an unknown kind, or two files have one key.

    Example:
      stored = Stored([folder / "diffusion_pytorch_model.safetensors"])
      kernel = stored["blocks.0.ffn.0.weight"].read()
    """

    def __init__(self, paths: Sequence[pathlib.Path]) -> None:
        self.paths = tuple(map(pathlib.Path, paths))
        self._tensors: dict[str, Tensor] = {}
        for path in self.paths:
            for key, tensor in _header(path).items():
                if key in self._tensors:
                    raise ValueError(
                        f"expected each key once, got {key!r} in {self._tensors[key].path.name} "
                        f"and in {path}"
                    )
                self._tensors[key] = tensor

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _header(path: pathlib.Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of weights, got none")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    if path.suffix in (".pth", ".pt", ".bin"):
        return read_pth(path)
    raise ValueError(f"{path}: expected .safetensors or .pth, got {path.suffix or 'no suffix'!r}")


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of one file.

    Layout: 8 bytes of the header's length, little-endian; a JSON header with dtype, shape and
    `data_offsets` of each key; the values.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 <= length <= min(size - 8, _HEADER_LIMIT):
            raise ValueError(
                f"{path}: expected a safetensors header within the file's {size} bytes, got a "
                f"length of {length}: is the download complete?"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for key, entry in header.items():
            dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
            shape = tuple(map(int, entry["shape"]))
            first, last = entry["data_offsets"]
            if last - first != math.prod(shape) * dtype.itemsize or first < 0:
                raise ValueError(f"{key!r} of {shape} {dtype} in bytes {first} to {last}")
            if 8 + length + last > size:
                raise ValueError(f"{key!r} to end at {8 + length + last} of {size} bytes")
            tensors[key] = Tensor(path, shape, dtype, 8 + length + first)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a whole safetensors file, got {type(error).__name__}: {error}"
        ) from error
    return tensors, metadata


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    return _read_safetensors(path)[1]


def write_safetensors(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file, one tensor at a time.

    Args:
      path: the file; it appears, or is replaced, when it is complete.
      tensors: shape and dtype by key.
      read: gives the tensor of a key; called once for each, in order.
      metadata: of the file; "format": "pt" is added, which Diffusers and Transformers ask for.
    """
    names = {np.dtype(dtype): name for name, dtype in _SAFETENSORS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    offset = 0
    for key, (shape, dtype) in tensors.items():
        last = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[key] = {
            "dtype": names[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [offset, last],
        }
        offset = last
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values start aligned
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, (shape, dtype) in tensors.items():
            value = np.asarray(read(key), dtype, order="C")
            if value.shape != tuple(shape):
                raise ValueError(f"{key}: expected {tuple(shape)}, got {value.shape}")
            file.write(value.reshape(-1).view(np.uint8).data)
    os.replace(unfinished, path)


class _Refused(ValueError):
    """Says by itself what is wrong with a file."""


class _Restricted(pickle.Unpickler):
    """Rebuilds dicts of tensors and nothing else: no name but those below is ever looked up."""

    def __init__(self, file: Any, storage: Callable[[str, np.dtype, int], int], path: Any) -> None:
        super().__init__(file)
        self._storage = storage
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _first
        if module == "torch" and name in _TORCH:
            return name
        raise _Refused(
            f"{self._path}: expected tensors alone, got {module}.{name}, which is not run: a .pth "
            "file can hold any program"
        )

    def persistent_load(self, pid: Any) -> tuple[np.dtype, int, int]:
        kind, name, key, _, count = pid
        if kind != "storage" or name not in _TORCH:
            raise _Refused(f"{self._path}: expected the values of a tensor, got {pid!r}")
        dtype = np.dtype(_TORCH[name])
        return dtype, self._storage(str(key), dtype, int(count)), int(count)

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
        dtype, start, count = storage
        shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
        if len(shape) != len(strides):
            raise _Refused(f"{self._path}: expected strides of {shape}, got {strides}")
        reach = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if min((offset, 0, *shape, *strides)) < 0 or (0 not in shape and reach >= count):
            raise _Refused(
                f"{self._path}: expected a tensor within {count} values, got offset {offset}, "
                f"shape {shape} and strides {strides}"
            )
        dense = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        # numpy's own reshape is safer than strides wherever it does
        kept = None if strides == dense else strides
        return Tensor(self._path, shape, dtype, start + offset * dtype.itemsize, kept)


def _first(value: Any, *_: Any) -> Any:
    return value


def read_pth(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote, without torch and without running anything.

    The file is a zip archive: `data.pkl` names the tensors, `data/<n>` are their values,
    uncompressed, so that they can be mapped where they lie. The dict of tensors may lie under
    "state_dict".

    Raises:
      ValueError: it is no such archive, is damaged, or holds anything but named tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in entries if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise _Refused(f"{path}: expected one data.pkl inside, got {len(pickles)}")
            root = pickles[0].removesuffix("data.pkl")
            order = entries.get(root + "byteorder")
            if order is not None and archive.read(order) != b"little":
                raise _Refused(f"{path}: expected little-endian values, got big-endian ones")

            def storage(key: str, dtype: np.dtype, count: int) -> int:
                info = entries.get(f"{root}data/{key}")
                if info is None or info.compress_type != zipfile.ZIP_STORED:
                    raise _Refused(f"{path}: expected plain values data/{key}, got none")
                if info.file_size < count * dtype.itemsize:
                    raise _Refused(
                        f"{path}: expected {count * dtype.itemsize} bytes in data/{key}, "
                        f"got {info.file_size}"
                    )
                return _start(path, info)

            with archive.open(pickles[0]) as file:
                found = _Restricted(file, storage, path).load()
    except _Refused:
        raise
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: expected a zip archive as torch.save writes since 1.6, got {error}: is the "
            "download complete?"
        ) from error
    except (ValueError, *_DAMAGE) as error:
        raise ValueError(
            f"{path}: expected named tensors, got {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected named tensors, got {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: expected named tensors, got {type(value).__name__} {key!r}")
    return dict(found)


def _start(path: pathlib.Path, info: zipfile.ZipInfo) -> int:
    """Where an entry's values begin: its local header's lengths may differ from the directory's."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path}: expected {info.filename} at {info.header_offset}, got none")
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name + extra
