"""A safetensors file written tensor by tensor: nothing is held back until the file is complete."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

#: Room for the header, which can only be written when the last tensor is known; what is left of it are spaces, as
#: the format allows. A multiple of 8, so that tensors are aligned.
HEADER_BYTES = 1 << 17

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsWriter:
    """Writes one file; it is not readable as safetensors before ``close``.

    Attributes:
        names: the tensors written so far.
        data_bytes: their bytes.
    """

    def __init__(self, path: Path) -> None:
        self.names: list[str] = []
        self.data_bytes = 0
        self._entries = [json.dumps({"__metadata__": {"format": "pt"}})[1:-1]]
        self._header_bytes = len(self._entries[0]) + 2
        self._file = path.open("wb")
        self._file.write(bytes(8 + HEADER_BYTES))

    def fits(self, name: str, tensor: Tensor) -> bool:
        """Whether the header has room for the tensor, and its data would be aligned to its dtype."""
        room = HEADER_BYTES - self._header_bytes - 1
        return len(self._entry(name, tensor)) <= room and self.data_bytes % tensor.dtype.itemsize == 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a CPU tensor of float32, bfloat16 or float16 that ``fits``."""
        entry = self._entry(name, tensor)
        # flat, because a 0-dimensional tensor cannot be viewed as bytes
        self._file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        self.names.append(name)
        self._entries.append(entry)
        self._header_bytes += len(entry) + 1
        self.data_bytes += tensor.nbytes

    def _entry(self, name: str, tensor: Tensor) -> str:
        place = [self.data_bytes, self.data_bytes + tensor.nbytes]
        value = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        return json.dumps({name: value}, separators=(",", ":"))[1:-1]

    def close(self) -> None:
        """Write the header; the file is whole."""
        header = ("{" + ",".join(self._entries) + "}").encode().ljust(HEADER_BYTES)
        self._file.seek(0)
        self._file.write(HEADER_BYTES.to_bytes(8, "little") + header)
        self._file.close()
