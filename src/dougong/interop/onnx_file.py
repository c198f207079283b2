"""What an ONNX file says it holds, and what is wrong with it. Weights that lie beside the graph are not loaded."""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dougong.core.errors import CheckpointError, MissingExtraError
from dougong.core.files import sha256

MODEL, EXTERNAL, CHECKSUMS = "model.onnx", "model.onnx_data", "SHA256SUMS"


@dataclass(frozen=True)
class OnnxFile:
    """A graph from outside."""

    opset: int
    inputs: dict[str, str]
    """name -> type and shape, such as "INT64 [batch_size, sequence_length]" """
    outputs: dict[str, str]
    tensors: dict[str, tuple[tuple[int, ...], str, int]]
    """initializer -> shape, type, bytes"""
    metadata: dict[str, str]
    bytes: int
    problems: list[str]


def read_onnx(path: Path) -> OnnxFile:
    """Raises CheckpointError for a file that cannot be read as a graph; what else is wrong stands in `problems`."""
    onnx = _package()
    try:
        return _described(onnx, path, onnx.load(str(path), load_external_data=False))
    except (OSError, TypeError, *_unreadable()) as error:     # names that are no text come as bytes
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is no whole ONNX file: {why}. Fetch or export it again.") from None


def _described(onnx: Any, path: Path, model: Any) -> OnnxFile:
    if not model.graph.node:
        raise ValueError("it holds no graph")
    named = (*model.graph.initializer, *model.graph.input, *model.graph.output)
    if not all(isinstance(text, str) for text in (*(one.name for one in named),
                                                  *(one.key for one in model.metadata_props))):
        raise ValueError("a name in it is no text")
    tensors = {tensor.name: _entry(onnx, tensor) for tensor in model.graph.initializer}
    beside, problems = _external(path, model, tensors)
    problems += changed_files(path.parent) if path.name == MODEL else []
    if not problems:
        try:
            onnx.checker.check_model(str(path))
        except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
            problems.append(f"{path.name} is no valid graph: {str(error).strip().splitlines()[0]}")
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    return OnnxFile(opset, _ports(onnx, model.graph.input), _ports(onnx, model.graph.output), tensors,
                    {entry.key: entry.value for entry in model.metadata_props},
                    path.stat().st_size + sum(file.stat().st_size for file in beside), problems)


def changed_files(directory: Path) -> list[str]:
    """Files that are not what `SHA256SUMS` says; none where there is no such list."""
    if not (directory / CHECKSUMS).is_file():
        return []
    problems = []
    for line in (directory / CHECKSUMS).read_text("utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        if os.path.basename(name) != name or not name:
            problems.append(f"{CHECKSUMS} is damaged: {line[:60]!r} names no file of this directory.")
        elif not (directory / name).is_file():
            problems.append(f"{name} is missing, and {CHECKSUMS} has it.")
        elif sha256(directory / name) != digest:
            problems.append(f"{name} was changed or is damaged: its checksum is not that of {CHECKSUMS}.")
    return problems


def _entry(onnx: Any, tensor: Any) -> tuple[tuple[int, ...], str, int]:
    shape = tuple(tensor.dims)
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    try:
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        size = 0
    return shape, name, prod(shape) * size


def _external(path: Path, model: Any, tensors: Any) -> tuple[set[Path], list[str]]:
    """Files beside the graph that hold tensors, and tensors that are not where the graph says."""
    files, problems = set(), []
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        size = tensors[tensor.name][2]
        if not where:
            if tensor.HasField("raw_data") and size and len(tensor.raw_data) != size:
                problems.append(f"{tensor.name} needs {size:,} bytes and has {len(tensor.raw_data):,}.")
            continue
        name = where.get("location", "")
        if os.path.basename(name) != name or not name:
            problems.append(f"{tensor.name} is said to be in {name!r}, which is no file of this directory.")
        elif not (path.parent / name).is_file():
            problems.append(f"{tensor.name} is said to be in {name}, which is missing.")
        else:
            files.add(path.parent / name)
            end = int(where.get("offset", 0)) + int(where.get("length", size))
            if end > (path.parent / name).stat().st_size:
                problems.append(f"{name} is cut off: {tensor.name} ends at byte {end:,} of "
                                f"{(path.parent / name).stat().st_size:,}.")
    return files, problems


def _ports(onnx: Any, values: Any) -> dict[str, str]:
    def told(value: Any) -> str:
        tensor = value.type.tensor_type
        shape = ", ".join(axis.dim_param or str(axis.dim_value) for axis in tensor.shape.dim)
        return f"{onnx.TensorProto.DataType.Name(tensor.elem_type)} [{shape}]"
    return {value.name: told(value) for value in values}


def _unreadable() -> tuple[type[Exception], ...]:
    from google.protobuf.message import DecodeError

    return DecodeError, ValueError


def _package() -> Any:
    try:
        import onnx
        import onnx.checker
    except ImportError:
        raise MissingExtraError("onnx", "onnx", "Reading ONNX files") from None
    return onnx
