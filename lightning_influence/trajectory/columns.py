"""Values to Arrow and back without `pa.array`, `pa.scalar` and `to_numpy`.

Those import pandas if it is installed: 0.4 s of a fit, or of its first question.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def encode_rows(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """A record batch of rows, each with all columns of the schema."""
    return pa.RecordBatch.from_arrays([encode([row[f.name] for row in rows], f.type) for f in schema], schema=schema)


def encode(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """An array of lists, structs, binaries, booleans or numbers, any of which may be None."""
    present = np.fromiter((value is not None for value in values), bool, len(values))
    buffers = [None if present.all() else _bits(present)]
    children = None
    if pa.types.is_list(kind):
        buffers.append(_offsets(values))
        children = [encode([item for value in values if value is not None for item in value], kind.value_type)]
    elif pa.types.is_struct(kind):
        children = [encode([value and value[f.name] for value in values], f.type) for f in kind]
    elif pa.types.is_binary(kind):
        buffers += [_offsets(values), pa.py_buffer(b"".join(value or b"" for value in values))]
    else:
        dtype = bool if pa.types.is_boolean(kind) else kind.to_pandas_dtype()
        plain = np.array([0 if value is None else value for value in values], dtype)
        buffers.append(_bits(plain) if pa.types.is_boolean(kind) else pa.py_buffer(plain))
    return pa.Array.from_buffers(kind, len(values), buffers, children=children)


def number(value: int, kind: pa.DataType | None = None) -> pa.Scalar:
    """An integer to compare a column with; int64 unless another type is given."""
    return encode([value], kind or pa.int64())[0]


def steps_between(table: pa.Table, after: int, until: int) -> pa.Table:
    """The rows of later steps than one, up to another."""
    steps = table["step"]
    return table.filter(pc.and_(pc.greater(steps, number(after)), pc.less_equal(steps, number(until))))


def to_numpy(numbers: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """An array of numbers, read-only as far as it is not copied; where some are missing, of floats with NaN."""
    if isinstance(numbers, pa.ChunkedArray):
        numbers = numbers.combine_chunks()
    if numbers.null_count:
        return numbers.to_numpy(zero_copy_only=False)
    dtype = np.dtype(numbers.type.to_pandas_dtype())
    if not len(numbers):
        return np.empty(0, dtype)
    return np.frombuffer(numbers.buffers()[1], dtype, len(numbers), numbers.offset * dtype.itemsize)


def _bits(flags: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(flags, bitorder="little"))


def _offsets(values: Sequence[Any]) -> pa.Buffer:
    lengths = [0 if value is None else len(value) for value in values]
    return pa.py_buffer(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
