"""An HF folder is written whole or not at all, and transformers reads the same bytes back."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from tempo_megatron.checkpoint.hf_read import HFTensors
from tempo_megatron.checkpoint.hf_write import CONFIG, SIDE_FILES, HFWriter, copy_side_files, dtype_change
from tempo_megatron.checkpoint.safetensors_stream import SafetensorsWriter
from tests.checkpoint.hf_models import policy, same_tensors, stored


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    policy("qwen3").save_pretrained(folder)
    # as a person may write it: other order, other indentation, no final newline
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))
    (folder / "tokenizer.json").write_text('{"version":  "1.0"}')
    return folder


def stream(folder: Path) -> Iterator[tuple[str, Tensor]]:
    tensors = HFTensors(folder)
    return ((name, tensors(name)) for name in sorted(tensors.names))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("shard_bytes", "shards"), [(5 << 30, 1), (3000, None), (1, None)])
def test_same_bytes_and_names_as_transformers(
    source: Path, tmp_path: Path, shard_bytes: int, shards: int | None
) -> None:
    target = tmp_path / "new" / "model"
    HFWriter(target, shard_bytes).write(stream(source), source)
    assert list(target.parent.iterdir()) == [target]
    assert same_tensors(stored(target), stored(source))
    files = sorted(path.name for path in target.glob("*.safetensors"))
    if shards == 1:
        assert files == ["model.safetensors"]
    else:
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        state = policy("qwen3").state_dict().values()
        assert index["metadata"] == {
            "total_parameters": sum(t.numel() for t in state),
            "total_size": sum(t.nbytes for t in state),
        }
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    model, loading = hf.AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert same_tensors(dict(model.state_dict()), dict(policy("qwen3").state_dict()))


def test_side_files_travel_byte_for_byte(source: Path, tmp_path: Path) -> None:
    """Whatever form the tokenizer is in, and templates in a folder of their own; nothing else of the source."""
    model = shutil.copytree(source, tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    names = [name for name in SIDE_FILES if name not in (CONFIG, "additional_chat_templates")]
    for name in (*names, "additional_chat_templates/rag.jinja", "README.md", "modeling_own.py", ".hidden"):
        (model / name).write_bytes(f"\r\n {name}\xff".encode("latin-1"))
    HFWriter(tmp_path / "exported").write(stream(model), model)
    copy_side_files(model, tmp_path / "checkpoint")
    copy_side_files(model, tmp_path / "checkpoint")  # into a folder that is there
    kept = {path.relative_to(model): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    for left_out in ("README.md", "modeling_own.py", ".hidden"):
        del kept[Path(left_out)]
    for folder in (tmp_path / "exported", tmp_path / "checkpoint"):
        found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        weights = found.pop(Path("model.safetensors"), None)
        assert (weights is None) is (folder.name == "checkpoint")
        assert found == {path: data for path, data in kept.items() if path != Path("model.safetensors")}


@pytest.mark.parametrize("shard_bytes", [2048, 3000, 10_000])
def test_shards_are_no_larger_than_asked(source: Path, tmp_path: Path, shard_bytes: int) -> None:
    HFWriter(tmp_path / "model", shard_bytes).write(stream(source), source)
    tensors = HFTensors(tmp_path / "model")
    held: dict[Path, list[int]] = {}
    for name in tensors.names:
        held.setdefault(tensors.file_of(name), []).append(tensors(name).nbytes)
    assert all(sum(sizes) <= shard_bytes or len(sizes) == 1 for sizes in held.values())


def test_memory_of_the_stream_may_be_used_again(source: Path, tmp_path: Path) -> None:
    buffer = torch.empty(13 * 16)

    def reusing() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream(source):
            if tensor.numel() <= buffer.numel():
                yield name, buffer[: tensor.numel()].copy_(tensor.flatten()).view(tensor.shape)
            else:
                yield name, tensor

    HFWriter(tmp_path / "model").write(reusing(), source)
    assert same_tensors(stored(tmp_path / "model"), stored(source))


def test_config_is_changed_only_where_asked(source: Path, tmp_path: Path) -> None:
    old = json.loads((source / "config.json").read_text())
    HFWriter(tmp_path / "a").write(stream(source), source, dtype_change(source, old["dtype"]))
    assert (tmp_path / "a" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    HFWriter(tmp_path / "b").write(stream(source), source, {**dtype_change(source, "bfloat16"), "use_cache": None})
    wanted = {key: value for key, value in old.items() if key != "use_cache"} | {"dtype": "bfloat16"}
    assert list(json.loads((tmp_path / "b" / "config.json").read_text()).items()) == list(wanted.items())


@pytest.mark.parametrize(
    ("keys", "changed"),
    [({}, {"dtype"}), ({"torch_dtype": "float16"}, {"torch_dtype"}), ({"dtype": "float16"}, {"dtype"})],
)
def test_dtype_goes_where_the_config_has_it(tmp_path: Path, keys: dict[str, str], changed: set[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(keys))
    assert dtype_change(tmp_path, "float32") == dict.fromkeys(changed, "float32")


# ---------------------------------------------------------------- broken off


class Crash(Exception):
    pass


def crash_in_stream(source: Path, at: int) -> Iterator[tuple[str, Tensor]]:
    for i, item in enumerate(stream(source)):
        if i == at:
            raise Crash
        yield item


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("at", [0, 1, 11, 24])
def test_crash_in_the_stream(source: Path, tmp_path: Path, at: int, before: bool) -> None:
    target = tmp_path / "model"
    if before:
        HFWriter(target).write(iter([("old", torch.ones(3))]), source)
    old = contents(target) if before else None
    with pytest.raises(Crash):
        HFWriter(target, 2048).write(crash_in_stream(source, at), source)
    assert (contents(target) if target.exists() else None) == old
    assert [path.name for path in tmp_path.iterdir()] == ["model"] * before


class Death:
    """From the n-th of the writer's calls that touch the disk on, every one fails: no handler cleans anything up."""

    CALLS = ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (shutil, "copyfile"), (SafetensorsWriter, "close"))

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.calls, self.n = 0, n
        for module, name in self.CALLS:
            monkeypatch.setattr(module, name, self._counted(getattr(module, name)))

    def _counted(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            self.calls += 1
            if self.calls >= self.n:
                raise Crash
            real(*args, **kwargs)

        return call


def loads(folder: Path) -> bool:
    try:
        hf.AutoModelForCausalLM.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


@pytest.mark.parametrize("before", [False, True])
def test_death_at_any_time(source: Path, tmp_path: Path, before: bool) -> None:
    """The folder is the old or the new one, nothing else loads, and the next writer goes on from there."""
    target = tmp_path / "model"
    old, new = {"old": torch.ones(3)}, stored(source)
    for n in range(1, 100):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if before:
            HFWriter(target).write(old.items(), source)
        with pytest.MonkeyPatch.context() as patched:
            death = Death(patched, n)
            with suppress(Crash):
                HFWriter(target, 4096).write(stream(source), source)
        if death.calls < n:
            break
        hidden = [path for path in tmp_path.iterdir() if path != target and (path / "config.json").exists()]
        assert all(same_tensors(stored(path), new) or same_tensors(stored(path), old) for path in hidden)
        if target.exists():
            assert same_tensors(stored(target), new) or (before and same_tensors(stored(target), old))
        with pytest.raises(Crash):
            HFWriter(target).write(crash_in_stream(source, 1), source)
        if before:
            assert same_tensors(stored(target), new) or same_tensors(stored(target), old)
        HFWriter(target, 4096).write(stream(source), source)
        assert same_tensors(stored(target), new)
        assert list(tmp_path.iterdir()) == [target]
    assert 15 < n < 99


def test_what_a_death_leaves_does_not_load(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    partial = tmp_path / ".model.partial"
    seen = []
    for n in range(1, 100, 3):
        with pytest.MonkeyPatch.context() as patched:
            death = Death(patched, n)
            with suppress(Crash):
                HFWriter(target, 4096).write(stream(source), source)
        if target.exists():  # it died after the folder got its name, or not at all
            break
        assert death.calls >= n
        if not (partial / "config.json").exists():
            seen.append(n)
            assert not loads(partial)
    assert len(seen) > 4


def test_full_disk_leaves_the_older_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    HFWriter(target).write(iter([("old", torch.ones(3))]), source)
    old = contents(target)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model")

    monkeypatch.setattr(SafetensorsWriter, "close", full)
    with pytest.raises(OSError, match="No space left"):
        HFWriter(target).write(stream(source), source)
    assert contents(target) == old
    assert list(tmp_path.iterdir()) == [target]
