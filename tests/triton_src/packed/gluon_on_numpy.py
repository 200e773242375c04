"""Runs Gluon kernels on numpy, program after program: their own Python bodies, and their inline PTX as it stands.

Gluon's values do not depend on layouts, so that none is looked at, except that what crosses lanes takes the last 32
elements of an array as a warp's lanes. What a GPU would leave undefined is made visible: a copy into shared memory
leaves NaN until it is waited for, and an address outside its array or a wait that nobody can end is an error.
"""

import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from triton.experimental.gluon import language as gl

from jmoe.triton_src.plan import Plan
from tests.triton_src.packed.ptx_on_numpy import run_ptx

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp32": np.dtype(np.float32), "int32": np.dtype(np.int32)}
DTYPES |= {"int64": np.dtype(np.int64)}
POLLS = 8
"""How often a program may look in vain whether others have written: they do not run meanwhile."""
BUFFER_DTYPES = {"bfloat16": DTYPES["bf16"], "float32": DTYPES["fp32"], "int32": DTYPES["int32"]}


class Tensor(np.ndarray):
    """An array with the methods of a Gluon tensor."""

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return tensor(array)

    def __getitem__(self, index: Any) -> Any:
        return tensor(super().__getitem__(index))

    # A kernel's values do not change: += makes another.
    __iadd__, __isub__, __imul__ = np.ndarray.__add__, np.ndarray.__sub__, np.ndarray.__mul__

    def to(self, dtype: Any) -> Any:
        return tensor(np.asarray(self).astype(DTYPES[dtype.name]))

    def permute(self, dims: Iterable[int]) -> Any:
        return self.transpose(dims)

    @property
    def numel(self) -> int:
        return self.size

    @property
    def type(self) -> Any:
        return types.SimpleNamespace(layout=None)


def tensor(value: Any) -> Any:
    """A Tensor of what numpy makes of the value."""
    return np.asarray(value).view(Tensor)


class Pointer:
    """Addresses in an array, as element numbers."""

    def __init__(self, array: np.ndarray, at: Any = 0) -> None:
        self.array, self.at = array, tensor(np.asarray(at, np.int64))

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.array, self.at + offset)

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.array, self.at[index])

    def to(self, dtype: Any) -> "Pointer":
        """An address as an integer, which nothing but inline PTX is given."""
        return self

    def places(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """(addresses, mask) of one shape; raises IndexError of one outside the array."""
        at, ok = np.broadcast_arrays(self.at, True if mask is None else mask)
        used = at[ok]
        if used.size and (used.min() < 0 or used.max() >= self.array.size):
            raise IndexError(f"addresses {used.min()} to {used.max()} of an array of {self.array.size}")
        return np.where(ok, at, 0), np.asarray(ok)


class Shared:
    """A view of shared memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def index(self, i: Any) -> "Shared":
        return Shared(self.array[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        assert start + length <= self.array.shape[dim]
        return Shared(self.array[(np.s_[:],) * dim + (np.s_[start : start + length],)])

    def permute(self, dims: Iterable[int]) -> "Shared":
        return Shared(self.array.transpose(tuple(dims)))

    def load(self, layout: Any) -> Any:
        return tensor(self.array.copy())

    def store(self, value: Any) -> None:
        self.array[...] = value


class Copies:
    """cp.async: groups of copies that are there when they are waited for."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def async_load(self, shared: Shared, pointer: Pointer, mask: Any = None) -> None:
        shared.array[...] = np.nan

        def copy() -> None:
            shared.array[...] = load(pointer, mask, 0)

        self.open.append(copy)

    def commit_group(self) -> None:
        self.groups.append(self.open)
        self.open = []

    def wait_group(self, pending: int) -> None:
        while len(self.groups) > pending:
            for copy in self.groups.pop(0):
                copy()


def load(pointer: Pointer, mask: Any = None, other: Any = 0, eviction_policy: str = "", volatile: bool = False) -> Any:
    # Each thread would read for itself what other programs change meanwhile, and threads would go different ways.
    assert not volatile
    at, ok = pointer.places(mask)
    return tensor(np.where(ok, pointer.array.reshape(-1)[at], np.asarray(other).astype(pointer.array.dtype)))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    at, ok = pointer.places(mask)
    at, ok, values = np.broadcast_arrays(at, ok, np.asarray(value).astype(pointer.array.dtype))
    pointer.array.reshape(-1)[at[ok]] = values[ok]


class Atomics:
    """Atomic additions of programs that run one after the other."""

    def __init__(self) -> None:
        self.polls = 0

    def atomic_add(self, pointer: Pointer, value: Any, mask: Any = None, sem: str = "", scope: str = "") -> Any:
        self.polls = self.polls + 1 if isinstance(value, int) and value == 0 else 0
        if self.polls > POLLS:
            raise RuntimeError("a program waits for one that has not run")
        before = load(pointer, mask)
        store(pointer, before + value, mask)
        return before


def multiply(a: Any, b: Any, acc: Any, is_async: bool = False) -> Any:
    """acc + a b, in float32 as tensor cores have it, but for the order of the sum."""
    operands = [np.asarray(x.array if isinstance(x, Shared) else x).astype(np.float32) for x in (a, b)]
    return tensor(np.asarray(acc) + operands[0] @ operands[1])


def inline_asm(text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    """A value of the dtype, or one of each of them."""
    done = run_ptx(text, constraints, [arg if isinstance(arg, Pointer) else np.asarray(arg, np.int32) for arg in args])
    kinds = [DTYPES[kind.name] for kind in (dtype if isinstance(dtype, tuple) else (dtype,))]
    values = tuple(tensor(array.view(kind)) for array, kind in zip(done, kinds, strict=True))
    return values if isinstance(dtype, tuple) else values[0]


def clamp(x: Any, low: Any, high: Any, propagate_nan: Any = None) -> Any:
    return np.minimum(np.maximum(x, low), high)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def language() -> types.SimpleNamespace:
    """What kernels know as gl and tl, but for program_id and atomic_add."""
    names = {
        name: getattr(gl, name)
        for name in dir(gl)
        if name.endswith("Layout") or name in ("constexpr", "int32", "int64", "bfloat16", "float32")
    }
    return types.SimpleNamespace(
        **names,
        PropagateNan=types.SimpleNamespace(ALL=None, NONE=None),
        to_tensor=lambda value: tensor(np.int32(value)),
        arange=lambda start, end, layout=None: tensor(np.arange(start, end, dtype=np.int32)),
        zeros=lambda shape, dtype, layout=None: tensor(np.zeros(tuple(shape), DTYPES[dtype.name])),
        where=lambda c, a, b: tensor(np.where(c, a, b)),
        minimum=lambda a, b, propagate_nan=None: np.minimum(a, b),
        maximum=lambda a, b, propagate_nan=None: np.maximum(a, b),
        clamp=clamp,
        sigmoid=sigmoid,
        exp=np.exp,
        sum=lambda x, axis: tensor(np.asarray(x).sum(axis, dtype=x.dtype)),
        max=lambda x, axis: tensor(np.asarray(x).max(axis)),
        min=lambda x, axis: tensor(np.asarray(x).min(axis)),
        join=lambda a, b: tensor(np.stack(np.broadcast_arrays(a, b), -1)),
        split=lambda x: (x[..., 0], x[..., 1]),
        expand_dims=lambda x, axis: tensor(np.expand_dims(x, axis)),
        permute=lambda x, dims: tensor(np.asarray(x).transpose(tuple(dims))),
        reshape=lambda x, shape: x.reshape(tuple(shape)),
        broadcast=lambda a, b: tuple(map(tensor, np.broadcast_arrays(a, b))),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        inline_asm_elementwise=inline_asm,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(
            np.full(tuple(map(int, shape)), np.nan, DTYPES[dtype.name])
        ),
        load=load,
        store=store,
        barrier=lambda: None,
        range=lambda *args, **kwargs: (tensor(np.int32(i)) for i in range(*map(int, args))),
        static_range=lambda *args: range(*args),
    )


class Functions:
    """Jitted functions' bodies, with numpy for Gluon in their globals."""

    def __init__(self) -> None:
        self.gl = language()
        self.copies = types.SimpleNamespace()
        self.replaced = {"async_copy": self.copies, "mma_v2": multiply, "warpgroup_mma": multiply}
        self.replaced |= {"warpgroup_mma_wait": wait_for_products, "fence_async_shared": lambda: None}
        self.replaced |= {"gl": self.gl, "tl": self.gl, "range": self.gl.range}
        self.functions: dict[types.FunctionType, Callable[..., Any]] = {}

    def run(self, kernel: Any, program: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
        """One program."""
        copies = Copies()
        vars(self.copies).update({name: getattr(copies, name) for name in ("async_load", "commit_group", "wait_group")})
        self.gl.program_id = lambda axis: tensor(np.int32(program[axis]))
        self.gl.atomic_add = Atomics().atomic_add
        with np.errstate(all="ignore"):  # integers wrap around, infinities and NaN are results, as on a GPU
            self.function(kernel.fn)(**arguments)

    def python(self, value: Any) -> Any:
        """What stands for a global of the kernels."""
        if isinstance(value, gl.constexpr):
            return value.value
        if getattr(value, "__triton_aggregate__", False):
            return self.aggregate(value)
        if inspect.isfunction(function := getattr(value, "fn", None)):
            return self.function(function)
        return value

    def function(self, function: types.FunctionType) -> Callable[..., Any]:
        """A jitted function's body."""
        if function not in self.functions:
            names: dict[str, Any] = {"__builtins__": function.__globals__["__builtins__"]}
            body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
            self.functions[function] = body
            used = {name: function.__globals__[name] for name in names_of(function) if name in function.__globals__}
            names |= {name: self.python(value) for name, value in used.items()} | self.replaced
        return self.functions[function]

    def aggregate(self, kind: Any) -> type:
        """A class of the aggregate's fields and jitted methods."""
        fields = kind.__aggregate_fields__

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            given = dict(zip(fields, args, strict=False)) | kwargs
            assert sorted(given) == sorted(fields)
            vars(self).update(given)

        methods = {
            name: self.function(value.fn)
            for name, value in vars(kind).items()
            if inspect.isfunction(getattr(value, "fn", None))
        }
        return type(kind.__name__, (), {"__init__": init, **methods})


def wait_for_products(num_outstanding: int, deps: list[Any]) -> Any:
    """What the wait hands on; products are done at once."""
    return deps[0] if len(deps) == 1 else tuple(deps)


def names_of(function: types.FunctionType) -> tuple[str, ...]:
    return function.__code__.co_names


def run_plan(
    plan: Plan, buffers: Mapping[str, np.ndarray], programs: Iterable[int] | None = None
) -> dict[str, np.ndarray]:
    """The buffers and what the plan writes, which is NaN, or the least integer, where it writes nothing.

    programs: numbers of those that run, in this order; all of them, in the order of their numbers, if not given.
    """
    plan.check_names()
    written = {buffer.name: poisoned(buffer.shape, buffer.dtype) for buffer in plan.outputs.values()}
    everything = {**buffers, **written}
    arguments: dict[str, Any] = {**plan.scalars, **plan.constexprs}
    names = {**plan.operands, **{parameter: buffer.name for parameter, buffer in plan.outputs.items()}}
    arguments |= {p: None if name is None else Pointer(everything[name]) for p, name in names.items()}
    functions = Functions()
    grid = plan.grid[::-1]
    for number in range(math.prod(grid)) if programs is None else programs:
        functions.run(plan.kernel, tuple(map(int, np.unravel_index(number, grid)))[::-1], arguments)
    return everything


def python_body(function: Any) -> Callable[..., Any]:
    """A jitted function, to be called with numpy's arrays."""
    body = Functions().function(function.fn)
    return lambda *args: body(*(tensor(arg) if isinstance(arg, np.ndarray) else arg for arg in args))


def poisoned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array that no kernel has written."""
    kind = BUFFER_DTYPES[dtype]
    return np.full(shape, -(2**31) if dtype == "int32" else np.nan, kind)
