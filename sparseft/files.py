"""Reading and writing files: safetensors, or text, atomic; and index lists at two bytes an entry."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparseft.index_lists import index_dtype

# a gap of this size or more is written as that many "skip on" codes before its remainder
_SKIP = 65535


def save(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON header to `path`, or leave what is there as it was.

    The file is written under a temporary name in the same folder, flushed to the disk and renamed: a full disk or a
    crash never leaves half a file, and never harms an older one.

    Raises:
        OSError: the file could not be written; `path` is untouched.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header)
    metadata = {"format": f"sparseft {kind} 1", "header": text, "checksum": _checksum(plain, text)}
    _replace(Path(path), lambda temporary: save_file(plain, temporary, metadata=metadata))


def save_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text to `path` as `save` writes tensors: all of it, or nothing.

    Raises:
        OSError: the file could not be written; `path` is untouched.
    """
    _replace(Path(path), lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise unless the folder that a file is to be written into is there."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"could not write {path}: there is no folder {folder}; make it first")


def _replace(path: Path, write: Callable[[str], Any]) -> None:
    check_folder(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"could not write {path}: {_reason(error)}; nothing at that path was changed") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save` wrote: tensors by name, and the header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, is damaged, or holds something else than `kind`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    wanted = f"sparseft {kind} 1"
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("format", "")
            if found != wanted:
                other = repr(found) if found.startswith("sparseft") else "safetensors of another program"
                raise ValueError(f"{path} must be a {wanted!r} file, got {other}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = metadata["header"]
        # one flipped bit in a list of gaps would shift every position after it
        if metadata["checksum"] != _checksum(tensors, text):
            raise ValueError(f"{path} is damaged: its checksum is of other contents; fetch it again")
        return tensors, json.loads(text)
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a readable {kind} file ({error}); if it was one it is cut short: fetch it again"
        ) from error


class Place(NamedTuple):
    """Where a tensor lies in a safetensors file: at byte `begin`, in a dtype that the format calls "F32", say."""

    dtype: str
    shape: tuple[int, ...]
    begin: int


def places(path: str | os.PathLike[str]) -> tuple[dict[str, Place], dict[str, str]]:
    """Return where the tensors of any safetensors file lie, in the order of the file, and its metadata.

    No tensor is read, and no checksum looked at.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not safetensors, or is cut short.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with safe_open(str(path), framework="pt") as checked:
            metadata = checked.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); if it was one it is cut short: fetch it again"
        ) from error
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    held = {name: entry for name, entry in header.items() if name != "__metadata__"}
    order = sorted(held, key=lambda name: held[name]["data_offsets"])
    return {
        name: Place(held[name]["dtype"], tuple(held[name]["shape"]), 8 + size + held[name]["data_offsets"][0])
        for name in order
    }, metadata


def encode_indices(indices: Tensor) -> Tensor:
    """Return sorted, unique positions as uint16 gaps: two bytes an entry unless entries lie 65,535 or more apart.

    indices: int32 or int64 [k]. Returns uint16 [k + skips].
    """
    positions = indices.cpu().numpy().astype(np.int64)
    gaps = np.diff(positions, prepend=0)
    skips = gaps // _SKIP
    codes = np.full(len(gaps) + int(skips.sum()), _SKIP, dtype=np.uint16)
    codes[np.arange(len(gaps)) + np.cumsum(skips)] = gaps % _SKIP
    return torch.from_numpy(codes)


def decode_indices(codes: Tensor, numel: int) -> Tensor:
    """Return the positions that `encode_indices` wrote, [k], int32 or int64 by `numel`.

    Raises:
        ValueError: the codes are no sorted, unique positions below numel.
    """
    if codes.dtype != torch.uint16 or codes.dim() != 1:
        raise ValueError(f"index codes must be uint16 [n], got {codes.dtype} {list(codes.shape)}; the file is damaged")
    values = codes.numpy()
    positions = np.cumsum(values, dtype=np.int64)[values != _SKIP]
    if len(positions) and (positions[-1] >= numel or bool((np.diff(positions) <= 0).any())):
        raise ValueError(f"indices must be sorted, unique and below {numel}; the file is damaged or was tampered with")
    return torch.from_numpy(positions).to(index_dtype(numel))


def _checksum(tensors: dict[str, Tensor], header: str) -> str:
    """Return a 128-bit blake2b hash of everything in a file."""
    total = hashlib.blake2b(header.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _reason(error: Exception) -> str:
    # not str(error), which names a temporary file
    return getattr(error, "strerror", None) or str(error)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
