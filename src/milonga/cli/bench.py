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
    str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda where there is one, else cpu]", metavar="DEVICE")
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
        str | None, typer.Option(help="bf16, fp16 or fp32. [default: bf16 on a GPU, fp32 on a CPU]", metavar="DTYPE")
    ] = None,
    pass_: Annotated[str, typer.Option("--pass", help="forward, both (with backward), or all.")] = "all",
    peers: Peers = True,
    device: Device = None,
    json_: Json = None,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Medians of every op, the floor that bytes and operations set at the rates measured in the same run, and peers."""
    from milonga.cli.bench_run import run_bench_ops

    _finish(run_bench_ops(op, shape or [], dtype, pass_, peers, device, json_, out, plot))
