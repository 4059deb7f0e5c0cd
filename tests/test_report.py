"""The report: what counts as green, and that no form of it loses or garbles a cell."""

import io
import json
import math
from html.parser import HTMLParser

import pytest
from rich.console import Console

from harness.report.cells import Cell, Report, number
from harness.report.page import page
from harness.report.terminal import ProgressPrinter, print_table

HOSTILE = """<script>alert("1")</script> ' & </td> {{headline}} [bold]x[/bold] [/] é ✓"""
SKIP = "no experts, so no expert parallelism"


def cell(row="llama3", layout="tp2", check="logits", status="pass", value=1.23e-6, limit=1e-4, detail=""):
    return Cell(row, layout, check, status, value, limit, "rel rms", 0.25, detail)


def row(name: str, layouts: list[str], mechanisms: tuple[str, ...] = ("GQA",)) -> dict:
    return {
        "row": name,
        "model_type": "llama",
        "architecture": "LlamaForCausalLM",
        "mechanisms": list(mechanisms),
        "reference": "transformers 5.23.0",
        "layouts": layouts,
    }


def report(*cells: Cell, rows: list[dict] | None = None) -> Report:
    rows = rows or [row("llama3", ["tp2"])]
    return Report(rows, list(cells), {"torch": "2.11.0", "threads": 2}, 12.5, {"two ranks, s": 0.1123})


@pytest.fixture
def mixed() -> Report:
    cells = [cell(layout=x, check=k) for x in ("tp1", "tp2-pp2") for k in ("config", "logits")]
    why = "first divergence: fc1\nlikely: order"
    cells += [
        cell("mixtral", "ep2", status="fail", value=2.31e-2, detail=why),
        cell("mixtral", "tp1", "logits", "fail", math.nan, detail="NaN in 3 logits"),
        cell("mixtral", "tp1", "config", "error", None, None, detail="rank 1 was killed"),
        cell("mixtral", "ep2", "config", "skip", None, None, detail=SKIP),
        cell("mixtral", "tp2-pp2", "config", "skip", None, None, detail=SKIP),
    ]
    moe = row("mixtral", ["tp1", "ep2"], ("GQA", "MoE"))
    return report(*cells, rows=[row("llama3", ["tp1", "tp2-pp2"]), moe])


def table(r: Report, width: int = 100) -> str:
    out = io.StringIO()
    print_table(r, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.parametrize("wrong", [{"status": "ok"}, {"status": "skip", "detail": " "}])
def test_cell_refuses(wrong):
    """An unknown status or a skip without a reason never becomes a cell, and the message names the cell."""
    with pytest.raises(ValueError, match="llama3 tp2 logits"):
        cell(**wrong)


@pytest.mark.parametrize("value", [2e-4, math.inf, math.nan])
def test_pass_over_its_limit_is_a_programming_error(value):
    with pytest.raises(AssertionError, match="llama3 tp2 logits"):
        cell(value=value)


@pytest.mark.parametrize(
    ("value", "limit", "says", "margin"),
    [
        (1.23e-6, 1e-4, "1.2e-06 <= 1.0e-04 rel rms", -1.91),
        (2.31e-2, 1e-4, "2.3e-02 > 1.0e-04 rel rms", 2.36),
        (0.0, 0.0, "0 <= 0 rel rms", -math.inf),
        (3.0, 0.0, "3 > 0 rel rms", math.inf),
        (math.nan, 1e-4, "nan > 1.0e-04 rel rms", math.inf),
        (291.0, None, "291 rel rms", None),
        (None, None, "", None),
    ],
)
def test_value_against_limit(value, limit, says, margin):
    c = cell(status="fail", value=value, limit=limit)
    assert c.says == says
    assert c.margin == (margin if margin is None else pytest.approx(margin, abs=0.01))


def test_numbers_are_short():
    """A blown-up value must not print three hundred digits."""
    short = {0: "0", 0.25: "0.25", 121280: "121,280", 3.4e38: "3.4e+38", -math.inf: "-inf"}
    assert [number(x) for x in short] == list(short.values())


@pytest.mark.parametrize(
    ("statuses", "ok"),
    [
        ([], False),
        (["skip"], False),
        (["pass"], True),
        (["pass", "skip"], True),
        (["pass", "fail"], False),
        (["pass", "error"], False),
    ],
)
def test_green_needs_a_comparison(statuses, ok):
    """Nothing failed is not enough: with zero comparisons the report is red in every form."""
    r = report(*(cell(status=s, value=None, detail="why") for s in statuses), rows=[row("llama3", ["tp2"])])
    assert (r.ok, r.exit_code) == (ok, 0 if ok else 1)
    assert ("NOT OK" in table(r)) is not ok
    assert (f"All {statuses.count('pass')} comparisons pass" in page(r)) is ok


def test_json_is_the_contract(mixed):
    """The exact keys that `verify --json` promises, readable by parsers that know no NaN."""
    data = json.loads(json.dumps(mixed.to_json(), allow_nan=False))
    assert list(data) == ["rows", "cells", "summary", "environment", "speed"]
    assert data["rows"] == mixed.rows
    assert data["cells"][4] == {
        "row": "mixtral",
        "layout": "ep2",
        "check": "logits",
        "status": "fail",
        "value": 2.31e-2,
        "limit": 1e-4,
        "unit": "rel rms",
        "seconds": 0.25,
        "detail": "first divergence: fc1\nlikely: order",
    }
    assert data["summary"] == {"pass": 4, "fail": 2, "error": 1, "skip": 2, "seconds": 12.5}
    assert data["cells"][5]["value"] == "NaN"


@pytest.mark.parametrize("value", [math.inf, -math.inf, 3, 0.0, None])
def test_json_round_trip(value):
    r = report(cell(), cell(status="fail", value=value, detail=HOSTILE))
    assert Report.from_json(json.loads(json.dumps(r.to_json(), allow_nan=False))) == r


def test_json_round_trip_of_nan(mixed):
    assert str(Report.from_json(mixed.to_json())) == str(mixed)  # NaN differs from itself


def test_save(mixed, tmp_path, capsys):
    """Files appear whole, in folders that may hold nothing else afterwards; `-` is standard output."""
    mixed.save_json(tmp_path / "report.json")
    mixed.save_html(tmp_path / "report.html")
    mixed.save_json("-")
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.html"}
    assert (tmp_path / "report.json").read_text() == capsys.readouterr().out
    assert (tmp_path / "report.html").read_text() == page(mixed)


def test_save_leaves_devices_alone(mixed, tmp_path):
    """`--json /dev/null` must not replace the device by a file."""
    link = tmp_path / "null"
    link.symlink_to("/dev/null")
    mixed.save_json(link)
    assert link.is_char_device()
    assert link.is_symlink()


class Elements(HTMLParser):
    """Every element with its attributes, and all text outside script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.text += data


def test_page_holds_every_cell(mixed):
    """Each square of rows x layouts once, each cell's check, numbers and detail, and failures as text too."""
    html = Elements(page(mixed))
    squares = [a["aria-label"] for tag, a in html.found if tag == "td" and "id" in a]
    assert squares == [
        "llama3 tp1: pass",
        "llama3 tp2-pp2: pass",
        "llama3 ep2: not run",
        "mixtral tp1: fail",
        "mixtral tp2-pp2: skip",
        "mixtral ep2: fail",
    ]
    assert [a["title"] for _, a in html.found if a.get("scope") == "col"] == ["tp1", "tp2-pp2", "ep2"]
    names = ("class", "data-check", "data-says", "data-detail")
    marks = [tuple(a.get(k, "") for k in names) for _, a in html.found if "data-check" in a]
    assert sorted(marks) == sorted((c.status, c.check, c.says, c.detail) for c in mixed.cells)
    for text in (
        "llama3",
        "mixtral",
        "Dense",
        "Mixture of experts",
        "3 of 7 comparisons do not pass",
        "2.3e-02 > 1.0e-04",
        "rank 1 was killed",
        SKIP,
        "2.11.0",
        "12.5 s",
    ):
        assert text in html.text


def test_page_escapes_every_string():
    """No name, detail or version can become markup, or a placeholder of the template."""
    info = {k: HOSTILE for k in row("", [])} | {"mechanisms": [HOSTILE], "layouts": [HOSTILE]}
    cells = [
        Cell(HOSTILE, HOSTILE, HOSTILE, "fail", 1.0, 0.5, HOSTILE, 1.0, HOSTILE),
        Cell(HOSTILE, HOSTILE, "x", "skip", None, None, "", 0.0, HOSTILE),
    ]
    html = Elements(page(Report([info], cells, {HOSTILE: HOSTILE}, 1.0, {})))
    assert sum(tag == "script" for tag, _ in html.found) == 1
    assert sum(tag == "td" and "id" in a for tag, a in html.found) == 1
    assert html.text.count(HOSTILE) >= 8
    assert HOSTILE in [a.get("title") for _, a in html.found]
    assert HOSTILE in [a.get("data-detail") for _, a in html.found]


def test_page_needs_nothing_else(mixed):
    """One file: no address of another, and no script or style from elsewhere."""
    html = page(mixed)
    for _, attributes in Elements(html).found:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    assert "http" not in html
    assert "@import" not in html


def test_table_says_what_failed(mixed):
    out = table(mixed)
    assert "2/2 FAIL  nan" in out
    assert "2 ok  1.2e-06" in out
    assert "FAIL  mixtral  ep2  logits  2.3e-02 > 1.0e-04 rel rms\n      first divergence: fc1\n" in out
    assert "ERROR mixtral  tp1  config" in out
    assert "rank 1 was killed" in out
    assert f"skip  2 x {SKIP}" in out
    assert "NOT OK: 4 pass, 2 fail, 1 error, 2 skip in 12.5 s\nspeed: two ranks, s 0.112\n" in out


def test_table_is_legible_in_a_log():
    """No colour codes, no line over 100 columns with six checks, no markup from other people's names."""
    checks = ("config", "complete", "roundtrip", "logits", "grads", "reload")
    r = report(*(cell("nemotron3_super_latent[/b]", f"tp{i}", k) for i in range(9) for k in checks))
    out = table(r)
    assert max(map(len, out.splitlines())) <= 100
    assert "nemotron3_super_latent[/b]" in out
    assert "\x1b" not in out
    assert "9 ok" in out


def run_progress(console: Console) -> None:
    with ProgressPrinter(console) as progress:
        progress.start(4)
        for c in cell(), cell(check="grads"), cell("[/x]"), cell("[/x]", "tp4", status="fail", value=1.0):
            progress.cell(c)


def test_progress_in_a_log():
    """Off a terminal: a line per layout once it is finished, and nothing else."""
    out = io.StringIO()
    run_progress(Console(file=out, width=100))
    assert out.getvalue() == "tp2  3 ok\ntp4  1/1 FAIL\n"


def test_progress_on_a_terminal():
    """On a terminal the bar counts rows x layouts, not cells."""
    out = io.StringIO()
    run_progress(Console(file=out, width=100, force_terminal=True))
    assert "75%" in out.getvalue()
    assert "100%" not in out.getvalue()
    assert "[/x] tp4" in out.getvalue()


def test_progress_survives_an_error_before_start():
    """Leaving the block before anything ran, as on an exception, prints and raises nothing of its own."""
    out = io.StringIO()
    with pytest.raises(KeyError), ProgressPrinter(Console(file=out)):
        raise KeyError
    assert not out.getvalue()
