"""`milonga presets`: every named model with its size and the size of its state."""

import torch

from milonga.cli import console
from milonga.models import PRESETS, Preset
from milonga.models.accounting import flops_per_token, parameter_count, state_bytes

# The text length at which states are compared, in tokens (bytes for byte-level models), and the precision they are in.
LENGTH = 1_000_000
DTYPE = torch.bfloat16


def facts(name: str, preset: Preset) -> dict[str, object]:
    """One preset as `--json` prints it."""
    config = preset.config
    return {
        "name": name,
        "parameters": parameter_count(config),
        "parameters_published": preset.parameters_published,
        "pattern": config.pattern,
        "repeats": config.repeats,
        "layers": len(config.stack),
        "d_model": config.d_model,
        "vocab_size": config.vocab_size,
        "tied": config.tied,
        "flops_per_token": flops_per_token(config),
        "state_bytes": state_bytes(config, 0, dtype=DTYPE),
        "state_bytes_at_1m": state_bytes(config, LENGTH, dtype=DTYPE),
        "source": preset.source,
        "note": preset.note,
    }


def _shown_pattern(pattern: str, repeats: int) -> str:
    """`(mamba mlp swa mlp) x 6`; a long pattern by its runs: `(mamba mlp) x 11, (attn mlp) x 1`."""
    words = pattern.split()
    if len(words) <= 4:
        return f"({pattern}) x {repeats}"
    pairs = [" ".join(words[i : i + 2]) for i in range(0, len(words), 2)]
    runs: list[tuple[str, int]] = []
    for pair in pairs:
        if runs and runs[-1][0] == pair:
            runs[-1] = (pair, runs[-1][1] + 1)
        else:
            runs.append((pair, 1))
    return ", ".join(f"({pair}) x {times}" for pair, times in runs)


def run_presets(json_: bool) -> int:
    """Print all presets; the exit code."""
    every = [facts(name, preset) for name, preset in PRESETS.items()]
    if json_:
        console.print_json(every)
        return 0
    rows = []
    for (name, preset), fact in zip(PRESETS.items(), every, strict=True):
        config = preset.config
        millions = f"{parameter_count(config) / 1e6:,.1f}M"
        at_length = console.size(state_bytes(config, LENGTH, dtype=DTYPE))
        grows = " (grows)" if fact["state_bytes"] != fact["state_bytes_at_1m"] else ""
        shown = _shown_pattern(config.pattern, config.repeats)
        rows.append((name, millions, preset.parameters_published or "-", shown, config.d_model, at_length + grows))
    headings = ("preset", "parameters", "printed", "layers", "width", "state at 1M tokens, bf16")
    console.stdout.print(console.table("", headings, rows, right=(1, 2, 4)))
    for name, preset in PRESETS.items():
        if preset.note:
            console.stdout.print(f"{name}: {preset.note}", markup=False)
    return 0
