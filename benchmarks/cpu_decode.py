"""A Mamba of 90M parameters that writes a text on the CPU, beside transformers in the same run.

    python benchmarks/cpu_decode.py [--json]

Both have 24 layers of width 768 with random weights, and read and write one token at a time with as many threads as
PyTorch takes. Milonga's tokens go through a session, sampling included; those of transformers are the likeliest, chosen
by the network's own cache. They take short turns, so that a busy machine slows both; the fastest turn of
each counts. Without transformers (it is in the `bench` extra) only the speeds are shown.
"""

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from figures import Figure, main

from milonga.inference import LanguageModel
from milonga.layers import MambaConfig
from milonga.layers.linear import Storage, store_weights
from milonga.models import ModelConfig

WIDTH, LAYERS, VOCABULARY = 768, 24, 256
TURNS, SECONDS = 50, 0.15  # of a turn
WARM = 5
STORED: dict[str, Storage | None] = {"fp32": None, "bf16": "bf16", "int8": "int8"}
DEMANDED: dict[str, float | None] = {"fp32": 3.0, "bf16": None, "int8": 8.0}
Write = Callable[[int], object]


def ours(storage: Storage | None) -> Write:
    """Writes so many tokens of a session, the weights stored in fp32 or as said."""
    config = ModelConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, pattern="mamba", repeats=LAYERS, layers={"mamba": MambaConfig()}
    )
    network = config.build()
    if storage is not None:
        store_weights(network, storage)
    session = LanguageModel(network).session()
    session.feed(b"The ")
    return lambda count: list(session.generate_bytes(count))


def transformers() -> Write:
    """The same of `MambaForCausalLM`, greedily, with its cache; it computes in fp32."""
    from transformers import MambaConfig as PeerConfig
    from transformers import MambaForCausalLM

    config = PeerConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=16)
    model = MambaForCausalLM(config).eval()
    with torch.inference_mode():
        read = model(torch.randint(0, VOCABULARY, (1, 4)), use_cache=True)
    here = {"cache": read.cache_params, "token": read.logits[:, -1].argmax(-1, keepdim=True), "position": 4}

    def write(count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                place = torch.tensor([here["position"]])
                out = model(here["token"], cache_params=here["cache"], use_cache=True, cache_position=place)
                here["token"] = out.logits[:, -1].argmax(-1, keepdim=True)
                here["position"] += 1

    return write


def speed(write: Write) -> float:
    """Tokens a second of one turn."""
    began, written = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < SECONDS:
        write(1)
        written += 1
    return written / taken


def figures() -> list[Figure]:
    """Tokens a second, and how many times those of transformers."""
    contenders = {f"Milonga, weights in {name}": ours(storage) for name, storage in STORED.items()}
    peer = find_spec("transformers") is not None
    if peer:
        contenders["transformers"] = transformers()
    best = dict.fromkeys(contenders, 0.0)
    for write in contenders.values():
        write(WARM)
    for turn in range(TURNS):
        print(f"turn {turn + 1} of {TURNS}", end="\r", file=sys.stderr)
        for name, write in contenders.items():
            best[name] = max(best[name], speed(write))
    threads = torch.get_num_threads()
    made = [Figure(f"{name}, {threads} threads", rate, None, "tokens/s") for name, rate in best.items()]
    if peer:
        made += [
            Figure(f"{name} / transformers", best[f"Milonga, weights in {name}"] / best["transformers"], demanded, "x")
            for name, demanded in DEMANDED.items()
        ]
    return made


if __name__ == "__main__":
    main(figures)
