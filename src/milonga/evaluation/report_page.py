"""The report as one HTML page that needs nothing but itself."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_CSS = """
:root {
  color-scheme: light dark;
  --page: #fcfbf8; --card: #ffffff; --ink: #1c1b19; --muted: #6b675f; --grid: #e4e0d7;
  --model: #0f6b6b; --second: #9c8a68; --other: #c2501f; --wash: #e3efec;
  --face: ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16171a; --card: #1e2024; --ink: #ecebe6; --muted: #a09c92; --grid: #34363b;
    --model: #56c2b6; --second: #85795f; --other: #f0915c; --wash: #1f3836;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 var(--face);
  -webkit-text-size-adjust: 100%; }
main { max-width: 70rem; margin: 0 auto; padding: clamp(1.25rem, 4vw, 3.5rem) clamp(1rem, 4vw, 2.5rem); }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 .5rem;
  text-wrap: balance; }
h2 { font-size: 1.05rem; letter-spacing: -0.005em; margin: 0 0 .15rem; }
p { margin: 0; }
.lead { color: var(--muted); max-width: 46rem; text-wrap: pretty; }
.over { color: var(--model); font-weight: 600; font-size: .85rem; letter-spacing: .01em; margin-bottom: .6rem; }
.figures { display: grid; grid-template-columns: repeat(6, auto); justify-content: space-between; gap: 1.5rem 1.6rem;
  margin: 2.2rem 0 2.6rem; padding: 1.6rem 0; border-block: 1px solid var(--grid); }
.figures dt { color: var(--muted); font-size: .85rem; line-height: 1.35; }
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; gap: .2rem; }
.figures dd { margin: 0; font-size: 1.7rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.1;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures dd small { font-size: .95rem; font-weight: 500; letter-spacing: 0; color: var(--muted); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.25rem; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px;
  padding: 1.25rem clamp(1rem, 3vw, 1.5rem); min-width: 0; display: flex; flex-direction: column; }
.wide { grid-column: 1 / -1; }
.card > p { color: var(--muted); font-size: .9rem; }
svg { display: block; width: 100%; height: auto; margin-top: auto; padding-top: .9rem; overflow: visible; }
svg text { font-variant-numeric: tabular-nums; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 1.4rem .9rem; align-items: center;
  margin-block: auto; padding-block: 1.2rem .4rem; }
.bars i { display: block; height: 1.3rem; border-radius: 4px; background: var(--grid); }
.bars .own { font-weight: 650; }
.bars i.own { background: var(--model); }
.bars b { font-weight: inherit; font-variant-numeric: tabular-nums; }
.text { font: 1.05rem/1.65 ui-serif, Georgia, "Times New Roman", serif; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 1rem 0 0; max-width: 44rem; }
mark { background: var(--wash); color: inherit; border-radius: 3px; padding: .08em .2em; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.2rem; margin: .9rem 0 0;
  font-size: .92rem; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; margin-top: .9rem; font-variant-numeric: tabular-nums;
  min-width: 100%; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { color: var(--muted); font-weight: 500; } .right { text-align: right; } tr.own td { font-weight: 600; }
pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-x: auto; margin: .9rem 0 0; }
code { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; }
footer { color: var(--muted); font-size: .85rem; margin-top: 2rem; }
@media (max-width: 66rem) { .figures { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 36rem) { .figures { grid-template-columns: 1fr 1fr; gap: 1.3rem 1rem; }
  .figures dd { font-size: 1.4rem; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: .6rem; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""

# The page may load nothing, from anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Figure:
    """A headline: `2.03` `bits per byte`, with a line about it."""

    value: str
    unit: str
    about: str


@dataclass(frozen=True)
class Card:
    """A framed part of the page: a title, a sentence, and a body that is HTML."""

    title: str
    sentence: str
    body: str
    wide: bool = False


def figures(items: Sequence[Figure]) -> str:
    """The headline figures."""
    rows = "".join(
        f"<div><dt>{escape(item.about)}</dt><dd>{escape(item.value)} <small>{escape(item.unit)}</small></dd></div>"
        for item in items
    )
    return f'<dl class="figures">{rows}</dl>'


def card(part: Card) -> str:
    """A framed part."""
    wide = " wide" if part.wide else ""
    sentence = f"<p>{escape(part.sentence)}</p>" if part.sentence else ""
    return f'<section class="card{wide}"><h2>{escape(part.title)}</h2>{sentence}{part.body}</section>'


def bars(rows: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars, longest for the largest value; the first row is ours."""
    most = max(value for _, value in rows)
    cells = []
    for index, (name, value) in enumerate(rows):
        own = ' class="own"' if index == 0 else ""
        width = 100 * value / most
        cells.append(f'<span{own}>{escape(name)}</span><i{own} style="width:{width:.1f}%"></i><b{own}>{value:.3f}</b>')
    return f'<div class="bars">{"".join(cells)}</div>'


def sample(prompt: str, text: str) -> str:
    """A generated text behind its prompt, which is marked."""
    return f'<div class="text"><mark>{escape(prompt)}</mark>{escape(text)}</div>'


def facts(rows: Mapping[str, str]) -> str:
    """Names and values."""
    cells = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items())
    return f'<dl class="facts">{cells}</dl>'


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), own: Sequence[int] = ()
) -> str:
    """A table; the columns in `right` are flush right, the rows in `own` are ours."""

    def cells(tag: str, row: Sequence[str]) -> str:
        made = ""
        for index, cell in enumerate(row):
            side = ' class="right"' if index in right else ""
            made += f"<{tag}{side}>{escape(cell)}</{tag}>"
        return made

    head = f"<tr>{cells('th', headings)}</tr>"
    body = ""
    for index, row in enumerate(rows):
        mine = ' class="own"' if index in own else ""
        body += f"<tr{mine}>{cells('td', row)}</tr>"
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def preformatted(text: str) -> str:
    """Text as it is."""
    return f"<pre>{escape(text)}</pre>"


def page(*, title: str, over: str, lead: str, headline: str, cards: Iterable[Card], footer: str) -> str:
    """The whole document."""
    parts = "\n".join(card(part) for part in cards)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<p class="over">{escape(over)}</p>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{headline}
<div class="grid">
{parts}
</div>
<footer>{footer}</footer>
</main>
</body>
</html>
"""
