"""Tiny real runs, and processes that train them: what the tests of this folder share."""

import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

from milonga.errors import UserError
from milonga.training import Interrupted, RunConfig, read_metrics, train
from milonga.training.metrics import CLOCK_FIELDS

# children are forked from a server that has everything loaded: they start at once
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.training.preload"])

SENTENCES = (
    "the cat sat on the mat and looked at the moon",
    "a ship came in from the sea with the evening tide",
    "nobody knew where the road behind the mill would end",
)


def write_texts(folder, documents=6, lines=12):
    """A folder of short documents, each different."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        text = [
            f"{number}.{line} {SENTENCES[(number + line) % 3]}, {number * line}\n" for line in range(lines + number)
        ]
        (folder / f"{number}.txt").write_text("".join(text))
    return folder


def settings(folder, **training):
    """A run's settings over the texts of `folder`, with the smallest model that has every kind of layer."""
    return {
        "name": "tiny",
        "model": {
            "vocab_size": 256,
            "d_model": 16,
            "pattern": "mamba swa mlp",
            "layers": {
                "mamba": {"kind": "mamba", "d_state": 4},
                "swa": {"kind": "attention", "heads": 2, "window": 5},
                "mlp": {"kind": "swiglu", "d_hidden": 24},
            },
        },
        "data": {"paths": [str(folder)], "heldout": 0.2},
        "training": {
            "steps": 12,
            "batch": 4,
            "window": 24,
            "optimizer": {"lr": 0.01},
            "evaluate_every": 6,
            "save_every": 5,
            "log_every": 2,
            "device": "cpu",
        }
        | training,
        "evaluation": {"tokens": 256},
    }


def config(folder, data=None, **training):
    """The checked config of `settings`."""
    made = settings(folder, **training)
    made["data"] |= data or {}
    return RunConfig.parse(made, "test")


def without_clock(run):
    """A run's metrics, but for the fields that tell the time."""
    return [{key: value for key, value in line.items() if key not in CLOCK_FIELDS} for line in read_metrics(run)]


def contents(checkpoint):
    """What a checkpoint's tensor files hold: every tensor's dtype, shape and bytes, and what the headers say."""
    held = {}
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            held[path.name] = file.metadata()
            for name in file.keys():  # noqa: SIM118  a handle, not a dict
                tensor = file.get_tensor(name)
                raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                held[f"{path.name}/{name}"] = (tensor.dtype, tuple(tensor.shape), raw)
    return held


def _work(dumped, out, resume, file_limit):
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(RunConfig.parse(dumped, "test"), out, resume=resume)
    except Interrupted as stopped:
        print(f"child: {stopped}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(stopped.exit_code)
    except UserError as error:
        (Path(out) / "error.txt").write_text(str(error))
        os._exit(2)


def start(made, out, *, resume=False, file_limit=None):
    """A process that trains, its number of threads fixed."""
    process = PROCESSES.Process(target=_work, args=(made.model_dump(mode="json"), str(out), resume, file_limit))
    process.start()
    return process


def finish(process, seconds=60):
    """Its exit code."""
    process.join(seconds)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def _wait(process, reached, seconds):
    end = time.monotonic() + seconds
    while not reached():
        assert process.exitcode is None, "it ended before it got there"
        assert time.monotonic() < end, "it never got there"
        time.sleep(0.001)


def wait_for_step(process, run, step, seconds=60):
    """Wait until the run's metrics hold a line of `step` or a later one."""
    path = run / "metrics.jsonl"
    _wait(process, lambda: path.exists() and any(line["step"] >= step for line in read_metrics(run)), seconds)


def wait_for_save(process, run, seconds=60):
    """Wait until a checkpoint is half written."""
    _wait(process, lambda: any((run / "checkpoints").glob(".step-*.partial")), seconds)
