"""Training steps replayed as a CUDA graph: the bits of plain steps, whatever comes in between."""

import gc
import subprocess
import sys

import pytest
import torch

from milonga.data.windows import Batch
from milonga.layers.recompute import CHEAP
from milonga.models import ModelConfig
from milonga.segments import Segments
from milonga.training import CapturedGradient, OptimizerConfig, build_optimizer, list_checkpoints, train, training_step
from milonga.training.muon import StackedMuon
from tests.gpu.helpers import CONFIGS, SAMBA
from tests.training import runs

pytestmark = [
    pytest.mark.gpu,
    # PyTorch names operations whose order it does not promise; here the bits are compared
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]

CUDA = torch.device("cuda")
LARGE = SAMBA.replace(d_model=256, repeats=4)


def batch_of(
    seed: int, rows: int = 4, length: int = 40, vocabulary: int = 256, segments: Segments | None = None
) -> Batch:
    """Random tokens; some targets are left out, another number in each batch."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(vocabulary, (rows, length + 1), generator=generator)
    targets = text[:, 1:].clone()
    targets[0, : seed % 7] = -100
    index = torch.arange(rows)
    count = rows * length
    return Batch(text[:, :-1].clone(), targets, segments, index, index, torch.ones(rows).bool(), count, count)


class Trained:
    """A model trained step by step, with its passes captured or not."""

    def __init__(self, config: ModelConfig, capture: bool, precision: str = "fp32", accumulation: int = 1):
        self.network = config.build(seed=0, device=CUDA)
        self.optimizer = build_optimizer(self.network, OptimizerConfig(lr=1e-2))
        self.said = said = list[str]()
        self.gradient = CapturedGradient(capture, capturing=lambda: said.append("capturing"))
        self.settings = {"precision": precision, "accumulation": accumulation}

    def step(self, batch: Batch, carried: bool = False) -> tuple[float, int, float]:
        """-> (nats, targets, norm)."""
        state = self.network.init_state(batch.tokens.shape[0]) if carried else None
        result = training_step(
            self.network, self.optimizer, batch, state, device=CUDA, lr=1e-2, gradient_of=self.gradient, **self.settings
        )
        return result.nats, result.tokens, result.grad_norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a step moves, as it is now."""
        held = dict(self.network.named_parameters()) | self.optimizer.tensors()
        return {name: tensor.detach().clone() for name, tensor in held.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    differ = [name for name in one if not torch.equal(one[name].nan_to_num(7.0), other[name].nan_to_num(7.0))]
    assert not differ


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize(("precision", "accumulation", "cheap"), [("fp32", 1, ()), ("bf16", 1, CHEAP), ("bf16", 2, ())])
def test_replayed_steps_are_plain_steps(name: str, precision: str, accumulation: int, cheap: tuple) -> None:
    """To the last bit: losses, norms, weights and moments. Weights move at every step, so the casts are made anew."""
    plain, captured = (Trained(CONFIGS[name], capture, precision, accumulation) for capture in (False, True))
    for trained in (plain, captured):
        trained.network.recompute = cheap
        trained.network.residual_dtype = torch.bfloat16 if cheap else None
    for seed in range(6):
        before = captured.tensors()
        assert captured.step(batch_of(seed)) == plain.step(batch_of(seed)), seed
        after = captured.tensors()
        assert_same(after, plain.tensors())
        assert not any(torch.equal(before[key], after[key]) for key in before), "everything moves"
        assert captured.gradient.captured is (seed >= 2)
    assert captured.said == ["capturing"]
    assert not plain.gradient.captured


def test_other_batches_in_between_change_no_bit() -> None:
    """Another shape, packed sequences, a carried state, a hook: launched kernel by kernel, and then replayed again."""
    plain, captured = (Trained(SAMBA, capture, "bf16", 2) for capture in (False, True))
    order = (
        ["same"] * 4
        + ["wide", "same", "packed", "packed", "carried", "same", "hooked", "same"]
        + ["wide"] * 3
        + ["same"]
    )
    calls, passes = [], None
    for seed, kind in enumerate(order):
        batch = batch_of(seed, 6, 40) if kind == "wide" else batch_of(seed)
        if kind == "packed":
            batch = batch_of(seed, 1, 160, segments=Segments([0, 9, 40, 41, 160]))
        results = []
        for trained in (captured, plain):
            hook = None
            if kind == "hooked":
                hook = trained.network.sublayers[1].register_forward_hook(lambda *_: calls.append(1))
            results.append(trained.step(batch, kind == "carried"))
            if hook is not None:
                hook.remove()
        assert results[0] == results[1], (seed, kind)
        assert_same(captured.tensors(), plain.tensors())
        passes = passes or captured.gradient._passes
        assert captured.gradient._passes is passes, "one graph all along"
    assert captured.said == ["capturing"]
    assert len(calls) == 4, "two micro-batches of either model"


def test_changes_that_a_graph_would_not_see_are_captured_anew() -> None:
    plain, captured = (Trained(SAMBA, capture, "bf16") for capture in (False, True))
    for seed in range(12):
        for trained in (captured, plain):
            if seed == 4:
                trained.network.residual_dtype = torch.bfloat16
            if seed == 8:
                trained.network.norm.weight.data = trained.network.norm.weight.data.clone() * 1.5
        assert captured.step(batch_of(seed)) == plain.step(batch_of(seed)), seed
    assert_same(captured.tensors(), plain.tensors())
    assert captured.said == ["capturing"] * 3


def test_a_step_inside_an_outer_autocast_is_the_same_step() -> None:
    """Whose cache of casts outlives the capture."""
    plain, captured = (Trained(SAMBA, capture, "bf16", 2) for capture in (False, True))
    for seed in range(6):
        results = []
        for trained in (plain, captured):
            with torch.autocast("cuda", torch.bfloat16):
                trained.network(torch.zeros(1, 4, dtype=torch.int64, device=CUDA))
                results.append(trained.step(batch_of(seed)))
        assert results[0] == results[1], seed
    assert captured.gradient.captured
    assert_same(captured.tensors(), plain.tensors())


def test_a_batch_without_a_finite_loss_moves_nothing() -> None:
    """And the next ones move the weights again, as plain steps do."""
    plain, captured = (Trained(CONFIGS["mamba"], capture, "bf16") for capture in (False, True))
    for trained in (plain, captured):
        with torch.no_grad():
            trained.network.embedding.weight[200] = float("nan")
    for seed in range(7):
        batch = batch_of(seed, vocabulary=200)
        if seed in (3, 5):
            batch.tokens[1, 5] = 200
        before = captured.tensors()
        got, expected = captured.step(batch), plain.step(batch)
        if seed in (3, 5):
            assert got[0] != got[0]
            assert expected[0] != expected[0]
            assert_same(before, captured.tensors())
        else:
            assert got == expected
            assert not torch.equal(before["head.weight"], captured.tensors()["head.weight"])
        assert_same(captured.tensors(), plain.tensors())


def test_a_replay_waits_for_nothing() -> None:
    captured = Trained(SAMBA, True)
    for seed in range(3):
        captured.step(batch_of(seed))
    parameters, batch = list(captured.optimizer.names.values()), batch_of(3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.gradient(captured.network, parameters, batch, None, device=CUDA)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_stays_and_is_that_of_plain_steps() -> None:
    def measured(capture: bool) -> tuple[int, list[int], list[int]]:
        gc.collect()
        torch.cuda.empty_cache()
        trained, batch = Trained(LARGE, capture, "bf16"), batch_of(0, 8, 2048)
        torch.cuda.reset_peak_memory_stats()
        allocated, reserved = [], []
        for _ in range(20):
            trained.step(batch)
            allocated.append(torch.cuda.memory_allocated())
            reserved.append(torch.cuda.memory_reserved())
        return torch.cuda.max_memory_allocated(), allocated[3:], reserved[3:]

    for capture in (False, True):  # whichever libraries keep workspaces have them from here on
        measured(capture)
    plain, _, _ = measured(False)
    peak, allocated, reserved = measured(True)
    assert plain > 2**28, "steps large enough to tell"
    assert peak <= 1.02 * plain
    assert len(set(allocated)) == 1
    assert len(set(reserved)) == 1


def test_a_graph_is_given_up_where_steps_beside_it_do_not_fit() -> None:
    plain, captured = (Trained(LARGE, capture, "bf16") for capture in (False, True))
    batches = [batch_of(seed, 8, 2048) for seed in range(3)]
    batches.append(batch_of(3, 1, 8 * 2048, segments=Segments([0, 5000, 8 * 2048])))
    batches += [batch_of(4, 8, 2048)]
    expected = [plain.step(batch) for batch in batches]
    plain.optimizer.zero_grad()
    got = [captured.step(batch) for batch in batches[:3]]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved() + 2**27) / torch.cuda.get_device_properties(CUDA).total_memory
    )
    try:
        with pytest.warns(RuntimeWarning, match=r"training\.capture"):
            got.append(captured.step(batches[3]))
        got.append(captured.step(batches[4]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert got == expected
    assert not captured.gradient.captured
    assert_same(captured.tensors(), plain.tensors())


_CANNOT = """
import torch
from milonga.errors import UserError
from tests.gpu.test_training_gpu import SAMBA, Trained, batch_of

trained = Trained(SAMBA, True)
norm = type(trained.network.norm)

class Reading(norm):
    def forward(self, *values):
        assert float(values[0].sum()) < 1e30  # reads a number back in the middle of the pass
        return super().forward(*values)

trained.network.norm.__class__ = Reading
before = torch.cuda.current_stream()
try:
    for seed in range(3):
        with torch.random.fork_rng(devices=[0]):
            torch.manual_seed(seed)
            trained.step(batch_of(seed))
except UserError as error:
    assert seed == 2 and torch.cuda.current_stream() == before
    print(error)
"""


def test_muon_by_stacks_is_muon_and_the_same_on_every_run() -> None:
    """Every matrix moves as PyTorch's own step moves it, but for the rounding of products in bf16."""
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(shape, generator=generator) for shape in [(64, 192), (192, 64), (64, 192), (64, 64)]]
    settings = {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"}
    moved = []
    for kind in (torch.optim.Muon, StackedMuon, StackedMuon):
        parameters = [torch.nn.Parameter(value.to(CUDA, copy=True)) for value in start]
        optimizer, generator = kind(parameters, **settings), torch.Generator().manual_seed(4)
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(CUDA)
            optimizer.step()
        moved.append([p.detach().cpu() - value for p, value in zip(parameters, start, strict=True)])
    for single, stacked, again in zip(*moved, strict=True):
        assert (single - stacked).norm() < 0.02 * single.norm()
        assert torch.equal(stacked, again)


def test_a_step_that_cannot_be_captured_says_what_to_do() -> None:
    done = subprocess.run([sys.executable, "-c", _CANNOT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "training.capture=false" in done.stdout
    assert len(done.stdout.strip().splitlines()) == 1


class _Stopped(Exception):
    pass


def test_a_run_resumed_is_the_uninterrupted_run_captured_or_not(tmp_path) -> None:
    texts, phases = runs.write_texts(tmp_path / "texts"), []
    common = {"device": "cuda", "precision": "bf16", "accumulation": 2, "evaluate_every": 4, "save_every": 5}
    made = runs.config(texts, data={"isolate": False}, **common)

    def stopping(report) -> None:
        phases.append(report.phase)
        if report.phase == "training" and report.done == 8:
            raise _Stopped

    train(made, tmp_path / "whole", progress=lambda report: phases.append(report.phase))
    assert phases.count("capturing") == 1
    with pytest.raises(_Stopped):
        train(made, tmp_path / "broken", progress=stopping)
    train(made, tmp_path / "broken", resume=True)
    train(runs.config(texts, data={"isolate": False}, **common, capture=False), tmp_path / "plain")
    expected = runs.contents(list_checkpoints(tmp_path / "plain")[-1])
    for name in ("whole", "broken"):
        held = runs.contents(list_checkpoints(tmp_path / name)[-1])
        assert held.keys() == expected.keys()
        assert not [key for key in held if "/" in key and held[key] != expected[key]]
        assert runs.without_clock(tmp_path / name) == runs.without_clock(tmp_path / "plain")
