"""`milonga bench`: its commands and their options, declared here as `cli/main.py` declares the others: nothing that
measures is imported before a command runs."""

from typing import Annotated, NoReturn

import typer


def _example(command: str) -> str:
    return f"\b\nExample:\n  {command}"


app = typer.Typer(
    help="Measure speed and memory on this machine, beside what it could do and beside other libraries.",
    epilog=_example("milonga bench ops --op scan,conv"),
    rich_markup_mode=None,
)

Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda or cuda:N. [default: cuda where there is one, else cpu]", metavar="DEVICE"
    ),
]
Json = Annotated[
    str | None, typer.Option("--json", help="Write the result as JSON to this file; - prints it.", metavar="FILE")
]
Out = Annotated[
    str | None,
    typer.Option(help="Write bench.html, a page with table and plot, and bench.json here.", metavar="FOLDER"),
]
Plot = Annotated[str | None, typer.Option(help="Write the plot as a PNG or SVG file.", metavar="FILE")]
Peers = Annotated[bool, typer.Option("--peers/--no-peers", help="Also measure other libraries that are installed.")]


def _finish(code: int) -> NoReturn:
    raise typer.Exit(code)


@app.callback()
def _bench() -> None:
    pass


@app.command(
    short_help="Every op against its floor.", epilog=_example("milonga bench ops --op scan --shape 1,1024,512")
)
def ops(
    op: Annotated[
        str | None,
        typer.Option(
            help="Ops, separated by commas: scan, conv, attention, norm, swiglu, rotary, loss, linear. [default: all]",
            metavar="OPS",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="B,T,E[,N] of scan, B,T,E[,W] of conv, B,T,H,G,K[,w] of attention, B,T,D of norm, B,T,F of swiglu, "
            "B,T,H,K of rotary, B,T,D,V of loss, B,T,D,F of linear; may be repeated.",
            metavar="NUMBERS",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="bf16, fp16 or fp32. [default: bf16 on a GPU, fp32 on a CPU]", metavar="DTYPE"),
    ] = None,
    pass_: Annotated[str, typer.Option("--pass", help="forward, both (with backward), or all.")] = "all",
    peers: Peers = True,
    device: Device = None,
    json_: Json = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Medians of every op, the floor that bytes and operations set at the rates measured in the same run, and peers."""
    from milonga.cli.bench_run import Outputs, run_bench_ops

    _finish(run_bench_ops(op, shape or [], dtype, pass_, peers, device, Outputs(json_, out, plot)))


@app.command(
    short_help="Whole training steps.",
    epilog=_example("milonga bench train --preset samba-421m --batch 4 --length 2048"),
)
def train(
    preset: Annotated[
        list[str] | None,
        typer.Option(help="A shape of the bench or a named model; may be repeated.", metavar="NAME"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="Model, micro-batch, window and precision of this recipe.", metavar="RECIPE"),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a step.", min=1, metavar="N")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.", min=1, metavar="N")] = None,
    precision: Annotated[
        str | None, typer.Option(help="bf16 or fp32. [default: bf16 on a GPU, fp32 on a CPU]", metavar="NAME")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Run through torch.compile.")] = False,
    capture: Annotated[
        bool, typer.Option("--capture/--no-capture", help="On a GPU replay both passes as a CUDA graph.")
    ] = True,
    recompute: Annotated[
        str | None,
        typer.Option(
            help="Results made again in the backward pass: norm, gate, conv, dt, rotary, cast, scan, separated by "
            "commas; none for no result. [default: what keeps the shape below its peers' memory]",
            metavar="NAMES",
        ),
    ] = None,
    residual: Annotated[
        str | None, typer.Option(help="Residual stream in fp32 or bf16. [default: fp32]", metavar="NAME")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic/--any-order", help="The same bits on every run, or faster attention.")
    ] = True,
    seconds: Annotated[float, typer.Option(help="How long steps of a model are timed.", min=0)] = 6.0,
    peers: Peers = True,
    device: Device = None,
    json_: Json = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Tokens a second, memory and utilisation of the library's training step, beside its matrix products alone."""
    from milonga.cli.bench_run import Engine, Outputs, TrainChanges, run_bench_train

    outputs = Outputs(json_, out, plot)
    changes = TrainChanges(batch, length, recompute, residual, deterministic)
    engine = Engine(compile_, capture)
    _finish(run_bench_train(preset or [], recipe, changes, precision, engine, seconds, peers, device, outputs))


Models = Annotated[
    str | None,
    typer.Option(help="samba, swa, mamba, transformer or named models, separated by commas.", metavar="NAMES"),
]
Small = Annotated[
    bool | None,
    typer.Option("--small/--paper", help="Narrow models, or the paper's 1.7B shapes. [default: small on a CPU]"),
]
Lengths = Annotated[
    str | None, typer.Option("--lengths", help="Lengths, separated by commas, such as 1K,2K,64K.", metavar="LENGTHS")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="bf16, fp16 or fp32. [default: as for ops]", metavar="DTYPE")
]


@app.command(
    short_help="Reading prompts.", epilog=_example("milonga bench prefill --model samba,transformer --lengths 4K,128K")
)
def prefill(
    model: Models = None,
    lengths: Lengths = None,
    total: Annotated[
        str | None,
        typer.Option(
            help="Tokens of all rows together. [default: 128K, 1K with --small, or the longest length]",
            metavar="LENGTH",
        ),
    ] = None,
    small: Small = None,
    dtype: Dtype = None,
    device: Device = None,
    json_: Json = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Tokens a second of prompts of several lengths, as many rows as make a fixed total; random weights."""
    from milonga.cli.bench_run import Outputs, run_bench_prefill

    _finish(run_bench_prefill(model, lengths, total, small, dtype, device, Outputs(json_, out, plot)))


@app.command(
    short_help="Generating.", epilog=_example("milonga bench decode --model samba,transformer --lengths 1K,64K")
)
def decode(
    model: Models = None,
    lengths: Lengths = None,
    batch: Annotated[int, typer.Option(help="Rows that generate together.", min=1, metavar="N")] = 16,
    steps: Annotated[int | None, typer.Option(help="Steps timed together.", min=1, metavar="N")] = None,
    small: Small = None,
    dtype: Dtype = None,
    device: Device = None,
    json_: Json = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """A decoded step at several positions, and whole generations; random weights and caches."""
    from milonga.cli.bench_run import Outputs, run_bench_decode

    _finish(run_bench_decode(model, lengths, batch, steps, small, dtype, device, Outputs(json_, out, plot)))


@app.command(
    "first-use", short_help="What compiling costs.", epilog=_example("milonga bench first-use --what ops:scan+conv")
)
def first_use(
    what: Annotated[
        str | None,
        typer.Option(help="ops (or ops:scan+conv), train, prefill; separated by commas.", metavar="PARTS"),
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Run training through torch.compile.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    json_: Json = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Seconds that a first run takes beyond the second, with empty caches of compiled kernels and with filled ones."""
    from milonga.cli.bench_run import Outputs, run_bench_first_use

    _finish(run_bench_first_use(what, compile_, dtype, device, Outputs(json_, out, plot)))
