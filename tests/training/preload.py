"""Imported by the server from which the tests' processes are forked: everything slow is loaded once, on one thread."""

import torch

from tests.training import runs

torch.set_num_threads(1)
_network = runs.RunConfig.parse(runs.settings("nowhere"), "test").model.build()
_bytes = torch.zeros(2, 8, dtype=torch.int64)
_network(_bytes, _network.init_state(2), targets=_bytes).losses.sum().backward()
