"""Settings for every test."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "milonga", deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.register_profile("quick", hypothesis.settings.get_profile("milonga"), max_examples=5)
hypothesis.settings.load_profile("milonga")


@pytest.fixture(autouse=True)
def _seeded_and_filled():
    """Each test starts from the same seed, and memory from `torch.empty` holds NaN: what is read unwritten shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` run wherever a GPU is."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
