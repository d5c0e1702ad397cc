"""How long one decoded step and one prefill take, for a shape with random weights, beside the bytes they must move."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from milonga.data.text import Text
from milonga.errors import UserError
from milonga.inference import LanguageModel, Session
from milonga.inference.batch import Ticket
from milonga.inference.captured import Decoder
from milonga.inference.sampling import Sampling
from milonga.models import ModelConfig, Network
from milonga.models.network import NetworkState, allocate
from milonga.state import named_tensors

Drawing = Literal["none", "greedy", "plain", "sorted", "host"]

PREFILL_TOKENS = 131072  # of all rows of a piece, on a GPU


@dataclass(frozen=True)
class DecodeTime:
    """One decoded step of all rows: milliseconds, and what a step cannot go below."""

    milliseconds: float  # median
    spread: float  # of the repeats: (longest - shortest) / median
    floor_milliseconds: float  # bytes over the bandwidth of a large copy, measured in the same run
    weight_bytes: int
    state_bytes: int  # read and written in a step, all rows
    copy_gigabytes_per_second: float
    batch: int
    position: int
    captured: bool
    drawing: Drawing
    dtype: str
    device: str

    def to_json(self) -> dict[str, object]:
        """The fields, JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class PrefillTime:
    """Reading prompts of one length: milliseconds for all rows."""

    milliseconds: float  # median
    spread: float
    length: int
    batch: int
    piece: int
    peak_bytes: int  # of memory on the device; 0 on a CPU
    dtype: str
    device: str

    def to_json(self) -> dict[str, object]:
        """The fields, JSON-ready."""
        return asdict(self)


@torch.no_grad()
def random_network(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> Network:
    """A network of this shape with random weights, made on the device: large shapes do not pass through the host."""
    network = config.build(device="meta").to(dtype).eval()
    allocate(network, device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in network.named_parameters():
        last = name.rpartition(".")[2]
        if last == "A_log":
            parameter.copy_(torch.arange(1, parameter.shape[1] + 1, device=device).log().expand_as(parameter))
        elif last == "dt_bias":
            parameter.uniform_(-7, -2, generator=generator)
        elif parameter.ndim == 1:
            parameter.fill_(0 if last.endswith("bias") else 1)
        else:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
    return network


def copy_bandwidth(device: torch.device | str, size: int = 1 << 30) -> float:
    """Bytes a second of a large copy on the device, reading and writing counted."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds, _ = _timed(lambda: target.copy_(source), torch.device(device), inner=4, repeats=5)
    return 2 * size / seconds


def _timed(work: Callable[[], object], device: torch.device, *, inner: int, repeats: int) -> tuple[float, float]:
    """-> (median seconds of one call, spread): `inner` calls at a time, by the device's own clock on a GPU."""
    work()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(inner):
                work()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end) / 1e3 / inner)
        else:
            began = time.perf_counter()
            for _ in range(inner):
                work()
            times.append((time.perf_counter() - began) / inner)
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


@torch.no_grad()
def fill_state(state: NetworkState, position: int) -> None:
    """Random caches, as if `position` tokens had been read."""
    for name, tensor in named_tensors(state):
        if name.endswith("position"):
            tensor.fill_(position)
        elif tensor.numel():
            tensor.normal_()


def step_state_bytes(state: NetworkState, position: int) -> int:
    """Bytes of the state that one step reads and writes: recurrent sums and columns both ways, of rings the keys."""
    total = 0
    for name, tensor in named_tensors(state):
        size = tensor.numel() * tensor.element_size()
        if name.endswith((".k", ".v")):
            slots = tensor.shape[1]
            total += size * min(position, slots) // max(slots, 1)
        else:
            total += 2 * size
    return total


def weight_bytes(network: Network) -> int:
    """Bytes of the weights that one step reads: all but an embedding that is not the head too."""
    spared = set() if network.head.weight is network.embedding.weight else {"embedding.weight"}
    weights = [*network.named_parameters(), *network.named_buffers()]  # stored in fewer bits they are buffers
    return sum(weight.numel() * weight.element_size() for name, weight in weights if name not in spared)


def measure_decode(
    config: ModelConfig | Network,
    batch: int,
    *,
    position: int = 0,
    captured: bool = True,
    drawing: Drawing = "none",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    steps: int = 64,
    repeats: int = 5,
    bandwidth: float | None = None,
) -> DecodeTime:
    """Time one decoded step of `batch` rows that each have read `position` tokens, their caches random.

    Args:
        config: a shape, which gets random weights; or a network.
        batch: rows.
        position: of the first step timed; the steps go on from there.
        captured: with CUDA graphs; else each kernel launched from Python, as on a CPU.
        drawing: what chooses the next token: nothing, the device (see `draw_on_device`), or a copy of the logits to the
            host and back in every step.
        dtype: of a network made here.
        device: of a network made here.
        steps: timed together.
        repeats: of the timing; the median counts.
        bandwidth: bytes a second that the floor counts with; measured here if absent.

    Raises:
        UserError: if a number is below 1, or the position below 0.
    """
    if batch < 1 or steps < 1 or repeats < 1 or position < 0:
        raise UserError("decode: batch, steps and repeats must be at least 1, position at least 0")
    network = config if isinstance(config, Network) else random_network(config, device, dtype)
    where = network.embedding.weight.device
    total = steps * (repeats + 2)
    decoder = Decoder(network, batch, capacity=position + total, buckets=[batch])
    fill_state(decoder.state, position)
    work = _decoding(decoder, batch, captured and where.type == "cuda", drawing)
    for _ in range(3):
        work()
    fill_state(decoder.state, position)
    seconds, spread = _timed(work, where, inner=steps, repeats=repeats)
    speed = bandwidth or copy_bandwidth(where, 1 << 30 if where.type == "cuda" else 1 << 26)
    read, states = weight_bytes(network), step_state_bytes(decoder.state, position + total // 2)
    return DecodeTime(
        milliseconds=seconds * 1e3,
        spread=spread,
        floor_milliseconds=(read + states) / speed * 1e3,
        weight_bytes=read,
        state_bytes=states,
        copy_gigabytes_per_second=speed / 1e9,
        batch=batch,
        position=position,
        captured=captured and where.type == "cuda",
        drawing=drawing,
        dtype=str(network.head.weight.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
    )


def _decoding(decoder: Decoder, batch: int, captured: bool, drawing: Drawing) -> Callable[[], None]:
    """One step, drawn as asked for."""
    host = torch.empty(batch, 1, dtype=torch.int64, pin_memory=decoder.device.type == "cuda")

    def none() -> None:
        decoder.step(batch, capture=captured)

    def on_host() -> None:
        host[:, 0] = decoder.logits.cpu().argmax(-1)
        decoder.tokens.copy_(host, non_blocking=True)
        decoder.step(batch, capture=captured)

    if drawing == "none":
        return none
    if drawing == "host":
        return on_host
    return lambda: decoder.advance(batch, drawing)


@dataclass(frozen=True)
class Divergence:
    """How long texts that are written together stay what each is alone, byte for byte."""

    first: tuple[int | None, ...]  # of each text the first token that differs; None where none does
    tokens: int  # written of each
    exact: bool

    @property
    def diverged(self) -> int:
        """Texts with a token that differs."""
        return sum(place is not None for place in self.first)


def first_divergence(
    lm: LanguageModel,
    *,
    texts: int = 16,
    tokens: int = 1000,
    exact: bool = False,
    temperature: float = 0.0,
    prompt: Text = b"",
) -> Divergence:
    """Write texts together, then each alone in a batch of the same kind with the same seed, and compare.

    Text i begins with the prompt and i more bytes of value 65 + i % 26, so that no two are alike.

    Raises:
        UserError: if a number is below 1.
    """
    if texts < 1 or tokens < 1:
        raise UserError("first_divergence: texts and tokens must be at least 1")
    starts = []
    for index in range(texts):
        session = lm.session()
        session.feed(prompt)
        session.feed(bytes([65 + index % 26]) * index)
        starts.append(session)
    settings = [Sampling(temperature=temperature, seed=index) for index in range(texts)]
    pairs = list(zip(starts, settings, strict=True))
    together = _written_by(lm, pairs, texts, tokens, exact)
    alone = [_written_by(lm, [pair], texts, tokens, exact)[0] for pair in pairs]
    first = []
    for left, right in zip(together, alone, strict=True):
        differs = [index for index, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
        first.append(differs[0] if differs else None)
    return Divergence(tuple(first), tokens, exact)


def _written_by(
    lm: LanguageModel, pairs: list[tuple[Session, Sampling]], rows: int, tokens: int, exact: bool
) -> list[list[bytes]]:
    """The tokens of texts written in one batch."""
    batch = lm.batch(max_rows=rows, exact=exact)
    tickets = [batch.join(session, sampling, tokens) for session, sampling in pairs]
    written: dict[Ticket, list[bytes]] = {ticket: [] for ticket in tickets}
    while batch.rows or batch.waiting:
        for event in batch.run():
            written[event.ticket].append(event.data)
    return [written[ticket] for ticket in tickets]


def measure_prefill(
    config: ModelConfig | Network,
    length: int,
    batch: int = 1,
    *,
    piece: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    repeats: int = 3,
) -> PrefillTime:
    """Time reading `batch` prompts of `length` random tokens, in pieces of `piece` tokens of each row.

    Memory is bounded by the piece; by default all rows of a piece have 131072 tokens together, on a CPU 256. A piece
    with all of a prompt lets full attention read keys that lie together, as its fastest kernels want them.

    Raises:
        UserError: if a number is below 1.
    """
    if length < 1 or batch < 1 or repeats < 1 or (piece is not None and piece < 1):
        raise UserError("prefill: length, batch, piece and repeats must be at least 1")
    network = config if isinstance(config, Network) else random_network(config, device, dtype)
    where = network.embedding.weight.device
    size = min(length, piece or max(1, (PREFILL_TOKENS if where.type == "cuda" else 256) // batch))
    tokens = torch.randint(network.config.vocab_size, (batch, length), device=where)

    @torch.inference_mode()
    def work() -> None:
        # nothing was read yet: attention has no ring to look into
        state = network.resized(network.init_state(batch), length) if length > size else None
        for start in range(0, length, size):
            last = start + size >= length
            output = network(tokens[:, start : start + size], state, logits="last" if last else "none")
            assert output.state is not None
            state = output.state

    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    seconds, spread = _timed(work, where, inner=1, repeats=repeats)
    return PrefillTime(
        milliseconds=seconds * 1e3,
        spread=spread,
        length=length,
        batch=batch,
        piece=size,
        peak_bytes=torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0,
        dtype=str(network.head.weight.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
    )
