"""Both passes of a training step as one CUDA graph, captured once and replayed from step to step.

A deep network of short layers is thousands of kernels a step; launched one by one from Python they come later than the
GPU could take them. A graph of them is one launch. It holds the micro-batches, autocast with its casts of the weights,
the losses, the backward pass, the sum of the losses and the norm of the gradient: the kernels of the plain step, so the
same bits. What looks at numbers or changes from step to step (the learning rate, clipping, the optimizer, leaving out a
step that is not finite) stays outside.
"""

import gc
import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from milonga.data.windows import Batch
from milonga.errors import UserError
from milonga.models import Network, NetworkState
from milonga.ops.gpu.capture import captured_into
from milonga.training.step import (
    Forward,
    Gradient,
    Piece,
    count_targets,
    gradient,
    gradient_norm,
    micro_batches,
    piece_backward,
)

Precision = Literal["fp32", "bf16"]
Result = TypeVar("Result")

# Steps of a shape that are launched kernel by kernel before it is captured: they compile kernels and fill caches.
EAGER = 2


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where steps are captured, one stream a device: the libraries of products keep a workspace for every stream."""
    return torch.cuda.Stream(device)


class StaticPasses:
    """Both passes over buffers that stay where they are. On a GPU they are captured; anywhere they run as they stand.

    Args:
        network: its parameters stay where they are.
        parameters: of the network, those to be moved.
        batch: of the shape of all batches to come; without segments.
        device, precision, accumulation: as in `gradient`.

    Attributes:
        nats, norm: as in `Gradient`, of the last run.
        gradients: one a parameter, None where it has none.
    """

    def __init__(
        self,
        network: Network,
        parameters: Sequence[nn.Parameter],
        batch: Batch,
        *,
        device: torch.device,
        precision: Precision,
        accumulation: int,
    ):
        assert batch.segments is None
        self.network, self.parameters = network, list(parameters)
        self.device, self.precision, self.accumulation = device, precision, accumulation
        self.count = torch.ones((), dtype=torch.float32, device=device)
        # a buffer for each piece rather than for the batch: kernels see the alignment that they see in a plain step
        self.pieces: list[Piece] = []
        for piece in micro_batches(batch, accumulation):
            tokens, targets = (torch.zeros(piece.tokens.shape, dtype=torch.int64, device=device) for _ in range(2))
            self.pieces.append(Piece(tokens, targets, None, piece.rows))
        self._staging: Tensor | None = None
        self._staged: torch.cuda.Event | None = None
        if device.type == "cuda":  # copies from pinned memory do not wait for what the GPU still has to do
            self._staging = torch.empty(2, *batch.tokens.shape, dtype=torch.int64, pin_memory=True)
            self._staged = torch.cuda.Event()
        self._graph: torch.cuda.CUDAGraph | None = None
        self.nats = self.norm = torch.zeros((), device=device)
        self.gradients: list[Tensor | None] = []

    def load(self, batch: Batch) -> int:
        """Copy a batch in: -> its targets that count."""
        targets = count_targets(batch)
        self.count.fill_(max(1, targets))
        if self._staging is not None and self._staged is not None and batch.tokens.is_cpu and batch.targets.is_cpu:
            self._staged.synchronize()
            self._staging[0].copy_(batch.tokens)
            self._staging[1].copy_(batch.targets)
            batch = batch._replace(tokens=self._staging[0], targets=self._staging[1])
        for buffer, piece in zip(self.pieces, micro_batches(batch, self.accumulation), strict=True):
            buffer.tokens.copy_(piece.tokens, non_blocking=True)
            buffer.targets.copy_(piece.targets, non_blocking=True)
        if self._staged is not None:
            self._staged.record()
        return targets

    def run(self) -> None:
        """Both passes over what was loaded, each kernel launched from here."""
        self._forget()
        nats = torch.zeros((), dtype=torch.float64, device=self.device)
        for piece in self.pieces:
            total, _ = piece_backward(
                self.network, piece, None, self.count, device=self.device, precision=self.precision
            )
            nats += total
        self.nats, self.norm = nats, gradient_norm(self.parameters)
        self.gradients = [parameter.grad for parameter in self.parameters]

    def capture(self) -> None:
        """Make a graph of `run`; nothing is computed yet.

        Raises:
            UserError: if something in it cannot be captured.
            torch.OutOfMemoryError: if it does not fit.
        """
        self._forget()
        graph, stream = torch.cuda.CUDAGraph(), _stream(self.device)
        torch.clear_autocast_cache()  # the graph casts the weights itself, at every replay
        try:
            with captured_into(graph, stream):
                self.run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            raise UserError(
                f"training.capture: this network's step cannot be captured as a CUDA graph ({_line(first)}); "
                "train with --set training.capture=false"
            ) from error
        finally:
            torch.clear_autocast_cache()  # nor may later casts be found in the graph's memory
        self._graph = graph

    def replay(self) -> None:
        """As `run`, from the graph; every parameter's `grad` is that of the graph."""
        assert self._graph is not None
        self._graph.replay()
        for parameter, gradient_ in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient_

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class CapturedGradient:
    """`gradient`, replayed from a CUDA graph where that computes the same; pass it to `training_step`.

    The first two steps of a shape are launched kernel by kernel, the third captures. One shape is captured: batches of
    other shapes, packed batches and steps with a state are launched kernel by kernel in between, and so is everything
    on a CPU. If there is no memory for the graph, or if such a step, or another piece of work given to `beside`, does
    not fit beside its memory, the graph is given up with a warning. `.grad` of the parameters is overwritten by the
    next step.

    What was captured is captured anew when parameters are moved or frozen and when the network's `recompute`,
    `residual_dtype` or `training` change; after other changes inside the network, call `release`.

    Args:
        capture: false launches every step kernel by kernel.
        capturing: called just before a step is captured.
    """

    def __init__(self, capture: bool = True, *, capturing: Callable[[], None] | None = None):
        self._capture, self._capturing = capture, capturing
        self._passes: StaticPasses | None = None
        self._shape: tuple[int, ...] = ()  # of what is captured
        self._seen: dict[tuple[int, ...], int] = {}
        self._settings: Hashable = None

    @property
    def captured(self) -> bool:
        """Whether a graph is at hand."""
        return self._passes is not None

    def __call__(
        self,
        network: Forward,
        parameters: Sequence[nn.Parameter],
        batch: Batch,
        state: NetworkState | None,
        *,
        device: torch.device,
        precision: Precision = "fp32",
        accumulation: int = 1,
    ) -> Gradient:
        """As `gradient`.

        Raises:
            UserError: if the step cannot be captured for another reason than memory.
        """

        def plain() -> Gradient:
            for parameter in parameters:
                parameter.grad = None
            return gradient(
                network, parameters, batch, state, device=device, precision=precision, accumulation=accumulation
            )

        if not self._capture or device.type != "cuda" or obstacle(network, batch, state) is not None:
            return self.beside(plain)
        assert isinstance(network, Network)
        settings = _settings(network, parameters, precision, accumulation)
        if settings != self._settings:
            self.release()
            self._settings = settings
        shape = tuple(batch.tokens.shape)
        if self._passes is None and self._seen.get(shape, 0) < EAGER:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            return _aside(device, plain)
        if self._passes is not None and shape != self._shape:
            return self.beside(plain)
        with torch.cuda.device(device):
            if self._passes is None:
                make = partial(
                    StaticPasses,
                    network,
                    parameters,
                    batch,
                    device=device,
                    precision=precision,
                    accumulation=accumulation,
                )
                if not self._made(make):
                    return plain()
                self._shape = shape
            passes = self._passes
            assert passes is not None
            tokens = passes.load(batch)
            passes.replay()
        return Gradient(passes.nats, passes.norm, tokens, None)

    def _made(self, make: Callable[[], StaticPasses]) -> bool:
        """Capture: -> whether there was memory for it. If not, a warning says that steps are launched as before."""
        if self._capturing is not None:
            self._capturing()
        try:
            passes = make()
            passes.capture()
        except torch.OutOfMemoryError:
            passes = None
        self._passes = passes
        if passes is None:
            self._give_up("there is no memory for a step as a CUDA graph")
        return passes is not None

    def beside(self, work: Callable[[], Result]) -> Result:
        """`work()`, which allocates memory of its own; where that runs out, once more without the graph."""
        try:
            return work()
        except torch.OutOfMemoryError:
            if self._passes is None:
                raise
        self._give_up("the captured step and what ran between two of its replays do not fit into memory together")
        return work()

    def _give_up(self, why: str) -> None:
        self.release()
        self._capture = False
        gc.collect()  # what was half made
        torch.cuda.empty_cache()
        warnings.warn(
            f"training.capture: {why}; from here on every step is launched kernel by kernel",
            RuntimeWarning,
            stacklevel=3,
        )

    def release(self) -> None:
        """Forget the graph and give its memory back. The next steps begin anew."""
        self._seen.clear()
        self._settings = None
        if self._passes is None:
            return
        for parameter in self._passes.parameters:
            parameter.grad = None
        self._passes = None
        gc.collect()
        torch.cuda.empty_cache()


def obstacle(network: Forward, batch: Batch, state: NetworkState | None) -> str | None:
    """Why a replay would not compute what a plain step does; None if it would."""
    if state is not None:
        return "a state is carried from step to step"
    if batch.segments is not None:
        return "sequences of other lengths are packed in each batch"
    if type(network) is not Network:
        return "the network is compiled, wrapped or sharded"
    if torch.is_anomaly_enabled() or torch._C._len_torch_dispatch_stack() or _has_any_global_hook():
        return "every operation is watched"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "a hook takes what is kept for the backward pass"
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return "a module has a hook"
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in network.parameters()):
        return "a parameter has a hook"
    return None


def _settings(network: Network, parameters: Sequence[nn.Parameter], precision: str, accumulation: int) -> Hashable:
    """What a graph was captured for, beside the shape."""
    places = tuple((parameter.data_ptr(), parameter.requires_grad) for parameter in parameters)
    own = (id(network), network.training, tuple(network.recompute), network.residual_dtype)
    return precision, accumulation, own, places


def _aside(device: torch.device, work: Callable[[], Result]) -> Result:
    """`work()` on the stream on which steps are captured: what libraries keep for a stream is made before."""
    stream, here = _stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        result = work()
    here.wait_stream(stream)
    return result


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
