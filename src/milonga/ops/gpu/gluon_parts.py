"""Parts of Gluon paths: what the versions of Triton call by different names."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Copies from `pointer` to shared memory past the registers: (shared, pointer, mask). The first name from Triton 3.8 on.
load_to_shared = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
# Triton 3.9 and later
_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def reinterpreted(shared, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory as `shape`, laid out in another way."""
    if _PUBLIC:
        view = shared.reinterpret(dtype, shape, layout)
    else:
        view = shared._reinterpret(dtype, shape, layout)
    return view
