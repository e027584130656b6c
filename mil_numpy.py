"""A saved Core ML program run by numpy: what convert.py proves its packages with, on machines that have no Core ML.

An .mlpackage is read from disk as Core ML reads it, the protobuf of the program and the file of its weights, and its operations
are executed one by one. Nothing of coremltools takes part but the description of the protobuf. Two kinds of arithmetic: exact
(the program's formulas in fp32 or fp64) shows whether the program computes what the model computes; rounded (every result rounded to
the type that the program declares for it, mostly fp16) shows what is lost on the device.

    package = Package("out/flow-coreml/Flow.mlpackage")
    decode = package.function("decode", rounded=True)
    state = decode.init_state()
    outputs = decode({"x": row, ...}, state)                    # state is updated in place
"""

import json
from pathlib import Path

import numpy as np
from coremltools.proto import MIL_pb2, Model_pb2

DTYPES = {
    "FLOAT16": np.float16, "FLOAT32": np.float32, "FLOAT64": np.float64, "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16,
    "INT32": np.int32, "INT64": np.int64, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32,
}  # fmt: skip
PACKED_BITS = {"UINT1": 1, "UINT2": 2, "UINT3": 3, "UINT4": 4, "UINT6": 6, "INT4": 4}  # several to a byte, the lowest bits first
SENTINEL = 0xDEADBEEF  # begins the description of each entry of a weight file
FP16_MAX = 65504.0


def type_of(value_type) -> tuple[str, tuple[int | None, ...]]:
    """(name of the data type, shape with None where it is not fixed) of a type in the protobuf; a state's is that of its tensor."""
    if value_type.WhichOneof("type") == "stateType":
        value_type = value_type.stateType.wrappedType
    tensor = value_type.tensorType
    shape = tuple(d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions)
    return MIL_pb2.DataType.Name(tensor.dataType), shape


def unpack(raw: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array from the bytes of a weight file; integers of 1 to 6 bits come out as int8 or uint8."""
    if dtype in DTYPES:
        return raw.view(DTYPES[dtype]).reshape(shape)
    bits, n = PACKED_BITS[dtype], int(np.prod(shape))
    stream = np.unpackbits(raw, bitorder="little")[: n * bits].reshape(n, bits)
    values = np.packbits(stream, axis=1, bitorder="little")[:, 0]
    if dtype == "INT4":
        values = ((values ^ 8).astype(np.int8) - 8).astype(np.int8)
    return values.reshape(shape)


class Package:
    """An .mlpackage on disk. Raises ValueError when it is not one, or is cut short."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.spec = Model_pb2.Model()
        try:
            manifest = json.loads((self.path / "Manifest.json").read_text(encoding="utf-8"))
            model = self.path / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
            self.spec.ParseFromString(model.read_bytes())
        except Exception as problem:
            raise ValueError(f"{path} is not an .mlpackage that can be read ({type(problem).__name__}): convert again") from problem
        self.functions = self.spec.mlProgram.functions
        if not self.functions:
            raise ValueError(f"{path} holds no ML program: convert again")
        weights = model.parent / "weights" / "weight.bin"
        self.blob = np.memmap(weights, np.uint8, "r") if weights.exists() else np.zeros(0, np.uint8)
        self.cache = {}  # weights as they are computed with, shared by the functions: prefill and decode have the same

    def size(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())

    def operations(self, function: str) -> list:
        """The operations of a function in their order."""
        blocks = self.functions[function].block_specializations
        if len(blocks) != 1:
            raise ValueError(f"{self.path}: {function} has {len(blocks)} specialisations, expected one")
        return list(next(iter(blocks.values())).operations)

    def function(self, name: str, rounded: bool = False, dtype=np.float32) -> "Function":
        return Function(self, name, rounded, dtype)

    def constant(self, value) -> np.ndarray:
        """The array of a value of the protobuf, written there or in the weight file."""
        dtype, shape = type_of(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            offset = value.blobFileValue.offset
            header = self.blob[offset : offset + 64]
            if len(header) < 64 or header[:4].view("<u4")[0] != SENTINEL:
                raise ValueError(f"{self.path}: no weights at offset {offset} of weight.bin: convert again")
            size, start = (int(n) for n in header[8:24].view("<u8"))
            if start + size > len(self.blob):
                raise ValueError(f"{self.path}: weight.bin is cut short: convert again")
            return unpack(self.blob[start : start + size], dtype, shape)
        tensor = value.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind == "bytes":  # how 8- and 16-bit numbers are written
            return unpack(np.frombuffer(tensor.bytes.values, np.uint8), dtype, shape)
        if kind == "strings":
            return np.array(list(tensor.strings.values)).reshape(shape)
        values = list(getattr(tensor, kind).values) if kind else []
        return np.array(values, DTYPES[dtype]).reshape(shape)


class Function:
    """One function of a package, ready to run: `inputs`, `states` and `outputs` map names to (data type, shape).

    `rounded` rounds every result to its declared type; else everything of a floating type is computed in `dtype`.
    `peaks` holds, for every operation with an fp16 result, the largest magnitude that occurred, to see what would overflow.
    """

    def __init__(self, package: Package, name: str, rounded: bool, dtype):
        if name not in package.functions:
            raise ValueError(f"{package.path} has no function {name}, only {', '.join(package.functions)}")
        function = package.functions[name]
        self.package, self.rounded, self.dtype, self.peaks = package, rounded, np.dtype(dtype), {}
        args = {i.name: (i.type.WhichOneof("type") == "stateType", type_of(i.type)) for i in function.inputs}
        self.inputs = {n: kind for n, (is_state, kind) in args.items() if not is_state}
        self.states = {n: kind for n, (is_state, kind) in args.items() if is_state}
        self.constants, self.program, types = {}, [], {}
        for op in package.operations(name):
            types.update({out.name: type_of(out.type) for out in op.outputs})
            if op.type == "const":
                self.constants[op.outputs[0].name] = self.weight(op, (op.attributes["val"].blobFileValue.offset,))
            elif op.type.startswith("constexpr_"):
                self.constants[op.outputs[0].name] = self.decompressed(op)
            else:
                if op.type not in OPERATIONS and op.type not in ("read_state", "write_state"):
                    raise ValueError(f"{package.path}: the operation {op.type} is not known to mil_numpy.py: add it to OPERATIONS")
                arguments = {key: self.names(argument) for key, argument in op.inputs.items()}
                self.program.append((op.type, arguments, [(out.name, *type_of(out.type)) for out in op.outputs]))
        # What goes into a softmax is masked with large numbers on purpose.
        self.masked = {arguments["x"] for kind, arguments, _ in self.program if kind == "softmax"}
        outputs = next(iter(function.block_specializations.values())).outputs
        self.outputs = {n: types[n] for n in outputs}

    def names(self, argument):
        """What an operation's input refers to: the name of a value, a list of names, or a value that stands in its place."""
        parts = [a.name if a.WhichOneof("binding") == "name" else self.package.constant(a.value) for a in argument.arguments]
        return parts if len(parts) > 1 else parts[0]

    def weight(self, op, offsets: tuple) -> np.ndarray:
        """The value of a const; large ones are converted once for all functions of the package."""
        key = (offsets, self.dtype)
        if offsets[0] and key in self.package.cache:
            return self.package.cache[key]
        value = self.package.constant(op.attributes["val"])
        if value.dtype in (np.float16, np.float32):
            value = value.astype(self.dtype)
        if offsets[0]:
            self.package.cache[key] = value
        return value

    def decompressed(self, op) -> np.ndarray:
        """The weights that a constexpr operation stands for, decompressed once for all functions of the package."""
        given = {k: v.arguments[0] for k, v in op.inputs.items()}
        raw = {k: v.value for k, v in given.items() if v.WhichOneof("binding") == "value"} | dict(op.attributes)
        named = {k: self.constants[v.name] for k, v in given.items() if v.WhichOneof("binding") == "name"}
        key = (op.type, *(v.blobFileValue.offset for v in raw.values()), *(id(v) for v in named.values()), self.dtype)
        if key not in self.package.cache:
            values = {k: self.package.constant(v) for k, v in raw.items() if k != "name"} | named
            declared, _ = type_of(op.outputs[0].type)
            result = CONSTEXPR[op.type](**values)
            # On the device the weights exist in their declared type, whatever the arithmetic after it.
            self.package.cache[key] = result.astype(DTYPES[declared]).astype(self.dtype), named  # named: their ids stay theirs
        return self.package.cache[key][0]

    def init_state(self) -> dict[str, np.ndarray]:
        """All states at zero, as Core ML makes them."""
        return {name: np.zeros(shape, self.dtype) for name, (_, shape) in self.states.items()}

    def rounding(self, value: np.ndarray, declared: str) -> np.ndarray:
        if declared in ("FLOAT16", "FLOAT32"):
            if self.rounded:
                value = value.astype(DTYPES[declared])
            return value.astype(self.dtype, copy=False)
        return value.astype(DTYPES[declared], copy=False)

    def __call__(self, inputs: dict[str, np.ndarray], state: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Run the function. Raises ValueError when an input is missing, is not known or has another shape than declared."""
        values = dict(self.constants)
        if inputs.keys() != self.inputs.keys():
            raise ValueError(f"inputs {sorted(inputs)}, expected {sorted(self.inputs)}")
        for name, (declared, shape) in self.inputs.items():
            if inputs[name].shape != shape:
                raise ValueError(f"{name} has shape {inputs[name].shape}, expected {shape}")
            values[name] = self.rounding(inputs[name], declared)
        with np.errstate(over="ignore", under="ignore"):
            for kind, arguments, outputs in self.program:
                if kind == "write_state":
                    state[arguments["input"]] = values[arguments["data"]]
                    continue
                if kind == "read_state":
                    values[outputs[0][0]] = state[arguments["input"]]
                    continue
                given = {k: self.look_up(values, v) for k, v in arguments.items()}
                results = OPERATIONS[kind](**given)
                for (name, declared, shape), result in zip(outputs, results if isinstance(results, list) else [results]):
                    if None not in shape and result.shape != shape:
                        raise ValueError(f"{kind} {name} gives the shape {result.shape}, declared is {shape}")
                    if declared == "FLOAT16" and name not in self.masked:
                        self.peaks[name] = max(self.peaks.get(name, 0.0), float(np.abs(result).max(initial=0)))
                    values[name] = self.rounding(result, declared)
        return {name: values[name] for name in self.outputs}

    @staticmethod
    def look_up(values: dict, argument):
        if isinstance(argument, list):
            return [values[a] if isinstance(a, str) else a for a in argument]
        return values[argument] if isinstance(argument, str) else argument


# ---- compressed weights ----


def blockwise_shift_scale(data, scale, offset=None):
    """(data - offset) * scale, each scale for a block of the data: scale's dimensions divide those of data."""
    blocks = [n // m for n, m in zip(data.shape, scale.shape)]

    def spread(x):
        for axis, n in enumerate(blocks):
            x = np.repeat(x, n, axis)
        return x.astype(np.float32)

    shifted = data.astype(np.float32) - (0 if offset is None else spread(offset))
    return shifted * spread(scale)


def lut_to_dense(indices, lut, vector_axis=None):
    """Palette look-up: lut [*groups, entries, vector length]; each group of the indices has its own palette."""
    groups, (entries, vector) = lut.shape[:-2], lut.shape[-2:]
    if vector != 1:
        raise ValueError("palettes of vectors are not used by convert.py")
    number = np.arange(int(np.prod(groups))).reshape(groups)  # which palette
    for axis, (n, m) in enumerate(zip(indices.shape, groups)):
        number = np.repeat(number, n // m, axis)
    return lut.reshape(-1, entries)[number, indices]


CONSTEXPR = {"constexpr_blockwise_shift_scale": blockwise_shift_scale, "constexpr_lut_to_dense": lut_to_dense}

# ---- operations ----


def bounds(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None) -> tuple:
    """The numpy index of slice_by_index and slice_update; a masked begin or end means as far as there is."""
    index = []
    for axis in range(x.ndim):
        def flag(mask, axis=axis):
            return mask is not None and bool(mask[axis])

        if flag(squeeze_mask):
            index.append(int(begin[axis]))
            continue
        low = None if flag(begin_mask) else int(begin[axis])
        high = None if flag(end_mask) else int(end[axis])
        index.append(slice(low, high, None if stride is None else int(stride[axis])))
    return tuple(index)


def slice_by_index(x, **where):
    return x[bounds(x, **where)]


def slice_update(x, update, **where):
    index = bounds(x, **where)
    if x[index].shape != update.shape:  # Core ML has no broadcasting here, and numpy would hide an index beyond the end
        raise ValueError(f"slice_update of {x[index].shape} with {update.shape}: the position is beyond the end of the state")
    x = x.copy()
    x[index] = update
    return x


def conv(x, weight, bias=None, strides=None, pad_type=None, pad=None, dilations=None, groups=1):
    """1x1 convolutions, as which the Neural Engine takes matrices.  x [B, C, H, W], weight [O, C, 1, 1]"""
    if weight.shape[2:] != (1, 1) or int(groups) != 1 or np.any(np.asarray(strides) != 1) or np.any(np.asarray(pad) != 0):
        raise ValueError(f"only 1x1 convolutions are known to mil_numpy.py, not {weight.shape}")
    B, C, H, W = x.shape
    y = (weight[:, :, 0, 0] @ x.reshape(B, C, H * W)).reshape(B, -1, H, W)
    return y if bias is None else y + bias[:, None, None]


def matmul(x, y, transpose_x=False, transpose_y=False):
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


def softmax(x, axis):
    e = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return e / e.sum(axis=int(axis), keepdims=True)


def attention(query, key, value, attn_mask=None):
    """softmax(q kᵀ / sqrt(D) + mask) v: the scale is part of the operation."""
    scores = query @ key.swapaxes(-1, -2) * query.dtype.type(query.shape[-1] ** -0.5)
    return softmax(scores if attn_mask is None else scores + attn_mask, -1) @ value


def split(x, axis, split_sizes=None, num_splits=None):
    if split_sizes is None:
        return list(np.split(x, int(num_splits), int(axis)))
    return list(np.split(x, np.cumsum(split_sizes)[:-1], int(axis)))


def concat(values, axis, interleave=False):
    if interleave:
        raise ValueError("interleaved concat is not known to mil_numpy.py")
    return np.concatenate(values if isinstance(values, list) else [values], int(axis))


def reduce(function):
    def run(x, axes=None, keep_dims=False):
        return np.asarray(function(x, axis=None if axes is None else tuple(int(a) for a in axes), keepdims=bool(keep_dims)))

    return run


def sigmoid(x):
    return (0.5 * (1 + np.tanh(0.5 * x))).astype(x.dtype)


def reshape(x, shape):
    return x.reshape([int(n) for n in shape])


OPERATIONS = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "pow": lambda x, y: x**y,
    "abs": lambda x: np.abs(x),
    "sign": lambda x: np.sign(x),
    "ceil": lambda x: np.ceil(x),
    "square": lambda x: x * x,
    "exp": lambda x: np.exp(x),
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "inverse": lambda x, epsilon: 1 / (x + epsilon),  # not 1 / x
    "rsqrt": lambda x, epsilon: 1 / np.sqrt(x + epsilon),
    "sqrt": lambda x: np.sqrt(x),
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "softmax": softmax,
    "reduce_max": reduce(np.max),
    "reduce_sum": reduce(np.sum),
    "reduce_mean": reduce(np.mean),
    "matmul": matmul,
    "linear": lambda x, weight, bias=None: x @ weight.T if bias is None else x @ weight.T + bias,
    "conv": conv,
    "scaled_dot_product_attention": attention,
    "reshape": reshape,
    "transpose": lambda x, perm: x.transpose([int(p) for p in perm]),
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(int(a) for a in axes)),
    "squeeze": lambda x, axes=None: np.squeeze(x, None if axes is None else tuple(int(a) for a in axes)),
    "tile": lambda x, reps: np.tile(x, [int(r) for r in reps]),
    "concat": concat,
    "split": split,
    "slice_by_index": slice_by_index,
    "slice_update": slice_update,
    "identity": lambda x: x,
    "cast": lambda x, dtype: x,  # the result is rounded to its declared type as any other
}
