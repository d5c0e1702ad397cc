"""The page and the plots of a measurement."""

import re

import pytest

from milonga.bench.figures import Figure, lines
from milonga.bench.page import check_plot, figure_table, render, write_plot
from milonga.bench.result import Bar, Bars, BenchResult, Line, Lines, Table
from milonga.errors import UserError

BARS = Bars("Times", "milliseconds", [("scan", [Bar("floor", 1.0, "second"), Bar("milonga", 1.5, "model")])])
CURVES = Lines(
    "Rates",
    "tokens",
    "tokens/s",
    [
        Line("samba", [(64, 1e3), (1024, 2e3)]),
        Line("samba (published)", [(1024, 900.0)], solid=False),
    ],
)


def result(*plots):
    return BenchResult(
        "ops",
        {"dtype": "fp32"},
        [{"ms": 1.5}],
        [Figure("scan <B8>", 1.5, 2.0, "ms", at_least=False, aim=1.0), Figure("other", 3, None, "x")],
        [Table("A table", ("op", "ms"), [("scan", "1.5"), ("a & b", "2")], right=(1,), own=(0,))],
        plots,
        {"copy_bytes_per_second": {"1048576": 5e10}, "product_flops_per_second": {"fp32": 2e11}},
        ["a note"],
    )


def test_the_page_holds_everything_and_loads_nothing():
    page = render(result(BARS, CURVES), "milonga bench ops")
    assert page.count("<svg") == 2
    assert "a &amp; b" in page
    assert "scan &lt;B8&gt;" in page
    assert "a note" in page
    assert "50 GB/s" in page
    assert "milonga bench ops" in page
    assert '<tr class="own"><td>scan</td><td class="right">1.5</td>' in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert len(re.findall(r' id="', page)) == len(set(re.findall(r' id="([^"]*)"', page)))


def test_figures_are_shown_with_what_is_demanded():
    table = figure_table(result().figures)
    assert table.rows[0] == ("scan <B8>", "1.5 ms", "at most 2", "1", "ok")
    assert table.rows[1] == ("other", "3 x", "", "", "")
    assert lines(result().figures)[0].split() == ["scan", "<B8>", "1.5", "ms", "at", "most", "2", "(aim", "1)", "ok"]


@pytest.mark.parametrize("plot", [BARS, CURVES], ids=["bars", "curves"])
def test_a_plot_is_written_as_a_file(plot, tmp_path):
    write_plot(result(plot), tmp_path / "a.png")
    write_plot(result(plot), tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_plots_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"\.png or \.svg"):
        check_plot("plot.jpg")
    check_plot(None)
    with pytest.raises(UserError, match="nothing was measured"):
        write_plot(result(), tmp_path / "a.png")
