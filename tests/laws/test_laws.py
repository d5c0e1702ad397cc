"""The laws every layer and every model obeys (docs/conventions.md). Lengths are drawn around the window."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from milonga.layers import KINDS, RMSNorm
from milonga.models import ModelConfig
from milonga.segments import Segments
from milonga.state import batch_size, clone, from_flat, merge, named_tensors, nbytes, select, to_flat
from tests.laws.subjects import LAYERS, MODELS, NAMES, WIDTH, WINDOW, Subject, on_devices, subject
from tests.ops.helpers import relative_rms

# Relative RMS between two orders of the same fp32 sums, through a whole model.
SPLIT_BOUND = 2e-6
LENGTHS = st.sampled_from([0, 1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1, 37])
SEEDS = st.integers(0, 2**31)
every_subject, every_layer, every_model = on_devices(NAMES), on_devices(LAYERS), on_devices(MODELS)


def assert_close(got: torch.Tensor, expected: torch.Tensor, bound: float = SPLIT_BOUND) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert relative_rms(got, expected) <= bound


def assert_same_state(got: object, expected: object, bound: float = SPLIT_BOUND) -> None:
    """Equal states; of a growing buffer, only the part that both have."""
    left, right = to_flat(got), to_flat(expected)
    assert left.keys() == right.keys()
    for name, value in left.items():
        other = right[name]
        if value.ndim > 1 and value.shape[1] != other.shape[1]:
            shared = min(value.shape[1], other.shape[1])
            assert not value[:, shared:].any() and not other[:, shared:].any(), name
            value, other = value[:, :shared], other[:, :shared]
        assert_close(value, other, bound)


def run_pieces(it: Subject, x: torch.Tensor, cuts: list[int]) -> tuple[torch.Tensor, object]:
    """Read `x` in pieces that end at `cuts` (repeats give empty pieces)."""
    state, outputs, start = it.empty(x.shape[0]), [], 0
    for end in [*sorted(cuts), x.shape[1]]:
        y, state = it.run(x[:, start:end], state)
        outputs.append(y)
        start = end
    return torch.cat(outputs, 1), state


@every_subject
@given(data=st.data(), batch=st.integers(1, 3), time=LENGTHS, seed=SEEDS)
def test_split(name: str, data: st.DataObject, batch: int, time: int, seed: int) -> None:
    """However a text is cut, outputs and final state are the same."""
    torch.manual_seed(seed)
    it = subject(name)
    cuts = data.draw(st.lists(st.integers(0, time), max_size=5))
    x = it.inputs(batch, time)
    with torch.no_grad():
        whole, state = it.run(x)
        pieces, state_after = run_pieces(it, x, cuts)
    assert_close(pieces, whole)
    assert_same_state(state_after, state)


@every_subject
def test_single_steps(name: str) -> None:
    """Step by step is one of the splits: far past the window."""
    it = subject(name)
    x = it.inputs(2, 5 * WINDOW + 2)
    with torch.no_grad():
        whole, state = it.run(x)
        pieces, state_after = run_pieces(it, x, list(range(1, x.shape[1])))
    assert_close(pieces, whole)
    assert_same_state(state_after, state)


@every_subject
@given(data=st.data(), time=st.integers(2, 20), seed=SEEDS)
def test_gradients_split(name: str, data: st.DataObject, time: int, seed: int) -> None:
    """Gradients flow through the carried state: cutting a text changes no gradient."""
    torch.manual_seed(seed)
    it = subject(name)
    cut = data.draw(st.integers(0, time))
    x = it.inputs(2, time)
    parameters = list(it.module.parameters())
    weight = torch.randn_like(it.run(x)[0])
    whole = torch.autograd.grad((it.run(x)[0] * weight).sum(), parameters)
    pieces = torch.autograd.grad((run_pieces(it, x, [cut])[0] * weight).sum(), parameters)
    for got, expected in zip(pieces, whole, strict=True):
        assert_close(got, expected, 10 * SPLIT_BOUND)


@every_subject
@given(data=st.data(), batch=st.integers(1, 3), before=LENGTHS, time=LENGTHS, seed=SEEDS)
def test_commit_keeps_steps(name: str, data: st.DataObject, batch: int, before: int, time: int, seed: int) -> None:
    """`commit(state, trace, keep=n)` is the state after n single steps, per row, and writes to nothing."""
    torch.manual_seed(seed)
    it = subject(name)
    keep = data.draw(st.lists(st.integers(0, time), min_size=batch, max_size=batch))
    x, history = it.inputs(batch, time), it.inputs(batch, before)
    with torch.no_grad():
        state = it.run(history)[1] if before else None
        untouched = clone(state) if before else None
        trace = it.trace(x, state)
        kept = it.commit(state, trace, torch.tensor(keep))
        assert_same_state(it.commit(state, trace), it.run(x, state)[1], 0.0)
        for row, steps in enumerate(keep):
            alone = select(state, [row]) if before else it.empty(1)
            for step in range(steps):
                alone = it.run(x[row : row + 1, step : step + 1], alone)[1]
            if batch_size(kept):
                assert_same_state(select(kept, [row]), alone)
        if before:
            assert_same_state(state, untouched, 0.0)


@every_subject
@given(data=st.data(), batch=st.integers(1, 3), before=LENGTHS, time=LENGTHS, seed=SEEDS)
def test_commit_in_place(name: str, data: st.DataObject, batch: int, before: int, time: int, seed: int) -> None:
    """`commit_` leaves in the given tensors what `commit` returns, bit for bit, whatever is kept of a piece."""
    torch.manual_seed(seed)
    it = subject(name)
    per_row = st.lists(st.integers(0, time), min_size=batch, max_size=batch).map(torch.tensor)
    keep = data.draw(st.one_of(st.none(), st.integers(0, time), per_row))
    x, history = it.inputs(batch, time), it.inputs(batch, before)
    with torch.no_grad():
        state = it.module.resized(it.run(history, it.empty(batch))[1], before + time)
        trace = it.trace(x, state)
        expected = it.commit(state, trace, keep)
        places = [tensor.data_ptr() for _, tensor in named_tensors(state)]
        assert it.module.commit_(state, trace, keep) is None
    assert places == [tensor.data_ptr() for _, tensor in named_tensors(state)]
    assert_same_state(state, expected, 0.0)


@every_subject
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=SEEDS)
def test_packed_commit_in_place(name: str, lengths: list[int], seed: int) -> None:
    """The same of packed sequences."""
    torch.manual_seed(seed)
    it = subject(name)
    with torch.no_grad():
        state = it.module.resized(it.run(it.inputs(len(lengths), 4))[1], 64)
        trace = it.trace(it.inputs(1, sum(lengths)), state, Segments.from_lengths(lengths))
        expected = it.commit(state, trace, torch.tensor(lengths) // 2)
        it.module.commit_(state, trace, torch.tensor(lengths) // 2)
    assert_same_state(state, expected, 0.0)


@every_layer
def test_a_step_in_place_is_a_step(name: str) -> None:
    """`step_` adds what the layer gives for one step, and leaves the state behind it, far past the window."""
    it = subject(name)
    norm = RMSNorm(WIDTH).to(it.device)
    x = it.inputs(2, 3 * WINDOW + 2)
    with torch.no_grad():
        state = it.module.resized(it.empty(2), x.shape[1])
        expected, after = it.run(norm(x))
        got = torch.cat([it.module.step_(x[:, t : t + 1], state, norm) for t in range(x.shape[1])], 1)
    assert_close(got, x + expected)
    assert_same_state(state, after)


def test_a_full_buffer_is_not_written_past() -> None:
    """Committing more steps than the buffer of full attention holds is an error, and writes nothing."""
    it = subject("full")
    with torch.no_grad():
        state = it.module.resized(it.empty(2), 3)
        untouched = clone(state)
        with pytest.raises(ValueError, match="resize it first"):
            it.module.commit_(state, it.trace(it.inputs(2, 4), state))
    assert_same_state(state, untouched, 0.0)


@every_subject
@given(lengths=st.lists(LENGTHS, min_size=1, max_size=5), carried=st.booleans(), seed=SEEDS)
def test_packed_is_separate(name: str, lengths: list[int], carried: bool, seed: int) -> None:
    """Sequences packed end to end, each after its own state, give what each gives alone. Some are empty."""
    torch.manual_seed(seed)
    it = subject(name)
    texts = [it.inputs(1, length) for length in lengths]
    with torch.no_grad():
        states = [it.run(it.inputs(1, 3 + 2 * index))[1] for index in range(len(lengths))] if carried else None
        packed_y, packed_state = it.run(
            torch.cat(texts, 1), merge(states) if states else None, Segments.from_lengths(lengths)
        )
        results = [it.run(text, states[index] if states else None) for index, text in enumerate(texts)]
    assert_close(packed_y, torch.cat([y for y, _ in results], 1))
    assert_same_state(packed_state, merge([state for _, state in results]))


@every_subject
@given(data=st.data(), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=SEEDS)
def test_packed_commit_keeps_steps(name: str, data: st.DataObject, lengths: list[int], seed: int) -> None:
    """`keep` per sequence of a packed piece."""
    torch.manual_seed(seed)
    it = subject(name)
    keep = [data.draw(st.integers(0, length)) for length in lengths]
    texts = [it.inputs(1, length) for length in lengths]
    with torch.no_grad():
        trace = it.trace(torch.cat(texts, 1), None, Segments.from_lengths(lengths))
        kept = it.commit(None, trace, torch.tensor(keep))
        alone = [it.run(text[:, :steps], it.empty(1))[1] for text, steps in zip(texts, keep, strict=True)]
    assert_same_state(kept, merge(alone))


@every_subject
@given(seed=SEEDS)
def test_rows_do_not_see_each_other(name: str, seed: int) -> None:
    """A row gives the same beside any other rows, at any place in the batch."""
    torch.manual_seed(seed)
    it = subject(name)
    x = it.inputs(3, 2 * WINDOW + 1)
    order = [2, 0, 1]
    with torch.no_grad():
        y, state = it.run(x)
        permuted, permuted_state = it.run(x[order])
        alone, _ = it.run(x[:1])
    assert_close(permuted, y[order])
    assert_close(alone, y[:1])
    if batch_size(state):
        assert_same_state(permuted_state, select(state, order))


@every_subject
@given(data=st.data(), seed=SEEDS)
def test_causal(name: str, data: st.DataObject, seed: int) -> None:
    """What comes later does not change what came before, to the last bit."""
    torch.manual_seed(seed)
    it = subject(name)
    time = 2 * WINDOW + 3
    cut = data.draw(st.integers(0, time))
    x = it.inputs(1, time)
    other = torch.cat([x[:, :cut], it.inputs(1, time - cut)], 1)
    with torch.no_grad():
        assert torch.equal(it.run(x)[0][:, :cut], it.run(other)[0][:, :cut])


@every_subject
def test_state_is_constant(name: str) -> None:
    """The state has the same size after any length of text; full attention's is the one that grows, and shows it."""
    it = subject(name)
    with torch.no_grad():
        sizes = [nbytes(it.run(it.inputs(1, time), it.empty(1))[1]) for time in (1, WINDOW, 64, 300)]
    assert sizes[0] == sizes[1] == sizes[2]
    assert (sizes[3] > sizes[2]) is it.grows
    if not it.grows:
        assert sizes[0] == nbytes(it.empty(1))


@every_layer
def test_nan_comes_out(name: str) -> None:
    """A NaN that goes in comes out at its step and stays out of earlier steps and other rows."""
    it = subject(name)
    x = it.inputs(2, 9)
    x[0, 4, 5] = float("nan")
    with torch.no_grad():
        y, _ = it.run(x)
    assert y[0, 4].isnan().all()
    assert not y[0, :4].isnan().any() and not y[1].isnan().any()


@every_subject
def test_state_survives_being_stored(name: str) -> None:
    """Flat tensors and back, clone, select and merge are exact, and a clone shares no memory."""
    it = subject(name)
    x, more = it.inputs(3, 11), it.inputs(3, 5)
    with torch.no_grad():
        state = it.run(x)[1]
        copy = clone(state)
        restored = from_flat(to_flat(state), like=it.empty(3))
        rejoined = merge([select(state, [0]), select(state, [1, 2])]) if batch_size(state) else state
        expected = it.run(more, state)[0]
        for other in (copy, restored, rejoined):
            assert torch.equal(it.run(more, other)[0], expected)
    for (_, tensor), (_, copied) in zip(named_tensors(state), named_tensors(copy), strict=True):
        assert tensor.numel() == 0 or tensor.data_ptr() != copied.data_ptr()


@every_subject
def test_sums_stay_fp32_in_bf16(name: str) -> None:
    """In a bf16 module recurrent states and the parameters of the recurrence stay fp32, unrounded."""
    it = subject(name)
    exact = {key: value.clone() for key, value in it.module.state_dict().items()}
    module = copy.deepcopy(it.module).bfloat16()
    floats = it.name in LAYERS
    low = Subject(it.name, module, lambda b, t: it.inputs(b, t).bfloat16() if floats else it.inputs(b, t), it.device)
    with torch.no_grad():
        _, state = low.run(low.inputs(2, 9), low.empty(2))
    for key, tensor in named_tensors(state):
        if key.endswith("ssm"):
            assert tensor.dtype == torch.float32
    for key, value in module.state_dict().items():
        if ".norm" in key or key.startswith("norm") or "scan." in key:
            assert torch.equal(value, exact[key]), key
        else:
            assert value.dtype == torch.bfloat16


@every_subject
@pytest.mark.parametrize("carried", [False, True])
def test_compiles_in_one_graph(name: str, carried: bool) -> None:
    """`torch.compile(fullgraph=True)` accepts both passes; a buffer that grows is committed outside the graph."""
    it = subject(name)
    torch.compiler.reset()
    x = it.inputs(2, 9)
    with torch.no_grad():
        state = it.run(it.inputs(2, 4))[1] if carried else None

    def outputs(x: torch.Tensor, state: object) -> torch.Tensor:
        return it.advance(x, state) if it.grows else it.run(x, state)[0]

    compiled = torch.compile(outputs, backend="aot_eager", fullgraph=True)
    parameters = list(it.module.parameters())
    expected, got = outputs(x, state), compiled(x, state)
    assert_close(got.detach(), expected.detach())
    for left, right in zip(
        torch.autograd.grad(got.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        assert_close(left, right, 10 * SPLIT_BOUND)


@pytest.mark.parametrize("name", MODELS)
def test_config_round_trip(name: str) -> None:
    """A config survives JSON, and builds the same weights from the same seed."""
    config = MODELS[name]
    again = ModelConfig.model_validate_json(config.model_dump_json())
    assert again == config
    left, right = config.build(seed=5).state_dict(), again.build(seed=5).state_dict()
    assert all(torch.equal(left[key], right[key]) for key in left)
    assert any(not torch.equal(value, config.build(seed=6).state_dict()[key]) for key, value in left.items())


@every_model
def test_losses_are_the_logits_losses(name: str) -> None:
    """Targets give the cross-entropy of the logits, and only then no state; `last` is the last of `all`."""
    it = subject(name)
    tokens = it.inputs(2, 9)
    network = it.module
    with torch.no_grad():
        output = network(tokens)
        trained = network(tokens, targets=tokens.roll(-1, 1))
        expected = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1).double(), tokens.roll(-1, 1).flatten(), reduction="none"
        )
        last = network(tokens, logits="last").logits
    assert relative_rms(trained.losses.flatten(), expected) < 1e-5
    assert trained.state is None and trained.logits is None
    assert_close(last, output.logits[:, -1])


@every_model
@given(
    batch=st.integers(1, 3), time=LENGTHS, carried=st.booleans(), steps=st.sampled_from(["last", "none"]), seed=SEEDS
)
def test_fewer_logits_change_nothing_else(
    name: str, batch: int, time: int, carried: bool, steps: str, seed: int
) -> None:
    """`last` are the last of `all`, and whatever logits are wanted the state is the same."""
    torch.manual_seed(seed)
    it = subject(name)
    tokens = it.inputs(batch, time)
    if time == 0:
        steps = "none"
    with torch.no_grad():
        state = it.run(it.inputs(batch, WINDOW + 3))[1] if carried else None
        expected, after = it.run(tokens, state)
        output = it.module(tokens, state, logits=steps)
    if steps == "last":
        assert_close(output.logits, expected[:, -1])
    assert_same_state(output.state, after)


@every_model
@given(lengths=st.lists(st.integers(1, 2 * WINDOW), min_size=1, max_size=4), carried=st.booleans(), seed=SEEDS)
def test_last_of_packed_is_the_last_of_each(name: str, lengths: list[int], carried: bool, seed: int) -> None:
    """`last` of sequences that are packed, each after its own state."""
    torch.manual_seed(seed)
    it, segments = subject(name), Segments.from_lengths(lengths)
    tokens = it.inputs(1, sum(lengths))
    with torch.no_grad():
        states = merge([it.run(it.inputs(1, 3 + 2 * index))[1] for index in range(len(lengths))]) if carried else None
        expected, after = it.run(tokens, states, segments)
        output = it.module(tokens, states, segments, logits="last")
    assert_close(output.logits, expected[0, segments.offsets[1:] - 1])
    assert_same_state(output.state, after)


def test_every_kind_is_under_the_laws() -> None:
    """A layer that is registered but not listed in `subjects.py` fails here."""
    assert {type(config) for config in LAYERS.values()} == set(KINDS.values())


@every_subject
@pytest.mark.parametrize("keep", [-1, 5, torch.tensor([1, 4]), torch.tensor([1, 2, 3])])
def test_keep_outside_the_piece_is_an_error(name: str, keep: int | torch.Tensor) -> None:
    """More steps than were read, or fewer than none, cannot be kept."""
    it = subject(name)
    if not batch_size(it.empty(2)):
        return
    with torch.no_grad(), pytest.raises(ValueError, match="commit: keep must"):
        it.commit(None, it.trace(it.inputs(2, 3)), keep)
