"""Makes Triton's interpreter fit the NumPy beside it. Import it before the kernels run, under `TRITON_INTERPRET=1`."""

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy(tensor, scope) -> None:
    """Triton 3.6 makes loop bounds with int(array), which NumPy 2.4 refuses for an array of one element."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _with_boolean_mask(access, place: int):
    """Triton 3.9 computes `a & b` of two masks in integers and then refuses the result as a mask."""

    def call(builder, *arguments, **settings):
        mask = arguments[place] if place < len(arguments) else settings["mask"]
        if isinstance(mask, interpreter.TensorHandle):  # a descriptor's is an array
            mask.data = mask.data.astype(bool)
        return access(builder, *arguments, **settings)

    return call


def prepare() -> None:
    """Patch the interpreter, once a process."""
    interpreter._patch_lang_tensor = _patch_tensor_for_numpy
    builder = interpreter.InterpreterBuilder
    builder.create_masked_load = _with_boolean_mask(builder.create_masked_load, 1)
    builder.create_masked_store = _with_boolean_mask(builder.create_masked_store, 2)
