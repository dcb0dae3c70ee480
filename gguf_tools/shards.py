"""The weights of a Hugging Face model folder: one safetensors file, or several with an index of which tensor is where."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf_tools.document import read_object
from gguf_tools.errors import FileError
from gguf_tools.safetensors import SafetensorsFile, open_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """The file that each tensor of a model is in.

    Raises:
        FileError: there are no safetensors weights, a shard is missing or damaged, or disagrees with the index.
    """
    if not folder.is_dir():
        what = "is no folder, but a Hugging Face model is one" if folder.exists() else "does not exist"
        raise FileError(f"{folder}: {what}.")
    if (folder / SINGLE).exists():
        file = open_safetensors(folder / SINGLE)
        return dict.fromkeys(file.tensors, file)
    if (folder / INDEX).exists():
        return _indexed(folder)
    if any(folder.glob("pytorch_model*.bin")):
        raise FileError(f"{folder}: holds pytorch_model.bin, which only torch reads; save the model as safetensors first.")
    raise FileError(f"{folder}: holds neither {SINGLE} nor {INDEX}.")


def _indexed(folder: Path) -> dict[str, SafetensorsFile]:
    path = folder / INDEX
    places = read_object(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FileError(f"{path}: its weight_map must say for each tensor the name of a file.")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FileError(f"{path}: names {name!r:.80}, but a shard is a .safetensors file in the same folder.")
        if not (folder / name).exists():
            raise FileError(f"{folder / name}: is missing; {INDEX} lists {len(names)} files.")
    shards: Mapping[str, SafetensorsFile] = {name: open_safetensors(folder / name) for name in names}
    for tensor, name in places.items():
        if tensor not in shards[name].tensors:
            raise FileError(f"{folder / name}: lacks {tensor[:120]}, which {INDEX} says is there.")
    for name, shard in shards.items():
        stray = next((tensor for tensor in shard.tensors if places.get(tensor) != name), None)
        if stray is not None:
            raise FileError(f"{folder / name}: holds {stray[:120]}, which {INDEX} does not place there.")
    return {tensor: shards[name] for tensor, name in places.items()}
