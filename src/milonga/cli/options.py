"""Options that several commands take; nothing slow is imported here."""

from typing import Annotated

import typer

Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda or cuda:N. [default: cuda where there is one, else cpu]", metavar="DEVICE"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Run = Annotated[str, typer.Argument(help="A run's folder, a checkpoint folder or a weight file.", metavar="RUN")]

# How a model is loaded to write.
Dtype = Annotated[
    str | None,
    typer.Option(help="Of weights and activations: float32, bfloat16... [default: the file's]", metavar="DTYPE"),
]
Weights = Annotated[
    str | None,
    typer.Option(help="On a CPU: hold weights in bf16 or int8, to write faster. [default: as is]", metavar="KIND"),
]

# How text is drawn, for every command that writes some.
Temperature = Annotated[float, typer.Option(help="Below 1 safer, above 1 bolder; 0 always the likeliest.", min=0)]
TopK = Annotated[int | None, typer.Option(help="Choose among the K likeliest only.", min=1, metavar="K")]
TopP = Annotated[
    float | None, typer.Option(help="Choose among the likeliest that have P of the probability.", max=1, metavar="P")
]
MinP = Annotated[
    float | None,
    typer.Option(help="Leave out what is less than P times as likely as the likeliest.", min=0, max=1, metavar="P"),
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: what was read or written lately is less likely.", metavar="X")
]
RepetitionWindow = Annotated[int, typer.Option(help="How many bytes (tokens) back that looks.", metavar="N")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help=r"End before this text; may be repeated. \n, \t and \xHH stand for bytes.", metavar="TEXT"),
]
Ban = Annotated[str, typer.Option(help=r"Bytes that are never written, such as \n or \xff.", metavar="BYTES")]
Begin = Annotated[str, typer.Option(help="What the text must begin with.", metavar="TEXT")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same text.")]
Load = Annotated[str | None, typer.Option("--load", help="Go on from this state file.", metavar="FILE")]
Logprobs = Annotated[
    int | None,
    typer.Option(help="With --json: log-probabilities of each token and its K likeliest.", min=0, metavar="K"),
]

# What a tokenizer is learned from.
LearnFrom = Annotated[
    list[str], typer.Option(help="Learn from this file, folder or glob; may be repeated.", metavar="PATH")
]
HeldoutTexts = Annotated[
    list[str] | None,
    typer.Option(help="Measure on these texts; may be repeated. [default: a twentieth of the data]", metavar="PATH"),
]

# Speculative decoding.
Drafter = Annotated[
    str | None, typer.Option(help="Write faster: this smaller run drafts, or ngram: the text itself.", metavar="RUN")
]
Rule = Annotated[
    str | None,
    typer.Option(
        "--rule",
        help="With --drafter: exact (as plain sampling), greedy (as plain, the likeliest) or top_k (lossy). "
        "[default: exact]",
        metavar="RULE",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="With --drafter: bytes drafted at a time, or adaptive: as many as pay if a round costs 2 plain steps and "
        "each drafted token 0.2 more. [default: 8]",
        metavar="N|adaptive",
    ),
]
