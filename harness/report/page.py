"""A report as one static page: report.html with the matrix, the failures and the skips written into it.

The page reads without its script, which only filters, recolours and explains what is already there. What it
explains lies in the marks' data attributes, so every string passes through one escape.
"""

import re
from collections import Counter, defaultdict
from html import escape
from itertools import groupby
from pathlib import Path

from harness.report.cells import Cell, Report, duration, number, worst

TEMPLATE = Path(__file__).with_name("report.html")
LETTERS = {"pass": "", "fail": "F", "error": "E", "skip": "S", "none": ""}  # a pass is a plain square
AXES = ("tp", "pp", "vpp", "ep", "etp", "cp", "sp", "dp", "split")
GROUPS = {  # a row belongs to the last group whose pattern its mechanisms match
    "Dense": "",
    "Mixture of experts": r"\b(moe|experts?|router)\b",
    "Latent attention": r"\b(mla|dsa|latent attention)\b",
    "Linear attention, state space": r"\b(mamba\d?|ssm|gdn|kda|delta|lightning|linear|short conv|hybrid)\b",
    "Multimodal": r"\b(vision|vl|audio|image|video|omni|multimodal)\b",
}


def _tag(name: str, *inside: str, **attributes: object) -> str:
    """An element; `inside` is HTML already, attributes are escaped here and left out where empty."""
    named = {k.strip("_").replace("_", "-"): v for k, v in attributes.items() if v != ""}
    opening = name + "".join(f' {k}="{escape(str(v))}"' for k, v in named.items())
    return f"<{opening}>{''.join(inside)}</{name}>"


def _group(mechanisms: str) -> str:
    words = " ".join(re.findall(r"[a-z0-9]+", mechanisms.lower()))
    return [name for name, pattern in GROUPS.items() if re.search(pattern, words)][-1]


def _heads(layouts: list[str]) -> str:
    """A layout's sizes one above the other, a line per axis: `tp2-sp` is `2` on line tp, `sp` on line sp."""
    words = {x: re.findall(r"(?:^|-)([a-z]*)([^-]*)", x) for x in layouts}
    sizes = {x: {axis: size or axis for axis, size in pairs} for x, pairs in words.items()}
    found = {axis for size in sizes.values() for axis in size}
    axes = [a for a in AXES if a in found] + sorted(found.difference(AXES))
    heads = [_tag("th", *(_tag("span", escape(a)) for a in axes), class_="corner")]
    for x, size in sizes.items():
        stack = (_tag("span", escape(size.get(a, ""))) for a in axes)
        heads.append(_tag("th", *stack, scope="col", title=x, aria_label=x))
    return _tag("tr", *heads)


def _mark(c: Cell) -> str:
    numbers = {}
    if c.status == "pass" and c.value is not None and c.margin is not None:
        short = number(c.value, 0).replace("e-0", "e-")  # has to fit a square
        numbers = {"data_value": short, "data_margin": f"{max(c.margin, -99):.1f}"}
    return _tag(
        "i",
        class_=c.status,
        data_check=c.check,
        data_says=c.says,
        data_time=duration(c.seconds),
        data_detail=c.detail,
        **numbers,
    )


def _square(key: str, where: str, cells: list[list[Cell]]) -> str:
    """One layout of one row: its worst status, and a mark per check, always in the same place."""
    status = worst(c.status for found in cells for c in found)
    marks = ("".join(map(_mark, found)) or "<i></i>" for found in cells)
    return _tag(
        "td",
        _tag("b", LETTERS[status]),
        _tag("span", *marks),
        id=key,
        class_=status,
        tabindex=-1,
        aria_label=f"{where}: {'not run' if status == 'none' else status}",
    )


def _matrix(report: Report, checks: list[str], keys: dict[tuple[str, str], str]) -> str:
    rows, groups, found = {r["row"]: r for r in report.rows}, defaultdict(list), defaultdict(list)
    for c in report.cells:
        found[c.row, c.layout, c.check].append(c)
    for name, pairs in groupby(keys, key=lambda pair: pair[0]):
        about, squares = rows.get(name, {}), []
        mechanisms = ", ".join(about.get("mechanisms", []))
        facts = about.get("architecture"), about.get("model_type"), mechanisms, about.get("reference")
        head = _tag(
            "th",
            escape(name),
            _tag("small", escape(mechanisms)),
            scope="row",
            data_row=name,
            title="\n".join(filter(None, facts)),
        )
        for pair in pairs:
            squares.append(_square(keys[pair], " ".join(pair), [found[*pair, check] for check in checks]))
        groups[_group(mechanisms)].append(_tag("tr", head, *squares, class_="row"))
    out, columns = "", 1 + len({layout for _, layout in keys})
    for name in filter(groups.get, GROUPS):
        head = _tag("th", _tag("span", name), scope="rowgroup", colspan=columns)
        out += _tag("tbody", _tag("tr", head, class_="group"), *groups[name])
    return out


def _failure(c: Cell, key: str) -> str:
    where = _tag("a", escape(c.row), " ", _tag("code", escape(c.layout)), href=f"#{key}")
    line = _tag("b", LETTERS[c.status], class_=c.status), where, escape(c.check), escape(c.says)
    stack = _tag("details", _tag("summary", "stack"), _tag("pre", escape(c.stack))) if c.stack else ""
    return _tag("tr", *(_tag("td", x) for x in line), _tag("td", _tag("pre", escape(c.detail)), stack))


def page(report: Report) -> str:
    """The whole page as text."""
    rows, layouts, checks = report.axes()
    keys = {(row, x): f"c{i}-{j}" for i, row in enumerate(rows) for j, x in enumerate(layouts)}
    failures = [c for status in ("fail", "error") for c in report.cells if c.status == status]
    skips = Counter(c.detail for c in report.cells if c.status == "skip").most_common()
    counts, ran = list(report.summary().items())[:4], sum(c.status != "skip" for c in report.cells)
    good = f"All {ran:,} comparisons pass" if ran else "Nothing was compared"
    facts = report.environment | {"total time": duration(report.seconds)} | report.speed
    facts = {escape(str(k)): escape(f"{v:.3g}" if isinstance(v, float) else str(v)) for k, v in facts.items()}
    radio = '<input type="radio" name="check" value="{0}"><span>{0}</span>'
    parts: dict[str, str | list[str]] = {
        "headline": f"{len(failures):,} of {ran:,} comparisons do not pass" if failures else good,
        "counts": [_tag("li", _tag("b", LETTERS[s], class_=s if n else "skip"), f" {n:,} {s}") for s, n in counts],
        "facts": [_tag("div", _tag("dt", k), _tag("dd", v)) for k, v in facts.items()],
        "columns": str(len(layouts) or 1),
        "choices": [_tag("label", radio.format(escape(x))) for x in checks],
        "checks": escape(", ".join(checks)),
        "heads": _heads(layouts),
        "body": _matrix(report, checks, keys),
        "failures": [_failure(c, keys[c.row, c.layout]) for c in failures],
        "skips": [_tag("tr", _tag("td", f"{count:,}"), _tag("td", escape(why))) for why, count in skips],
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda m: "".join(parts[m[1]]), TEMPLATE.read_text(encoding="utf-8"))
