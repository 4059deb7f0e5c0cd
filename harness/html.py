"""A report as one static page: report.html with the matrix, the failures and the skips written into it.

The page reads without its script, which only filters, recolours and explains what is already there. What it
explains lies in the marks' data attributes, so every string passes through one escape.
"""

import re
from collections import Counter, defaultdict
from html import escape
from pathlib import Path
from typing import Any

from harness.report import Cell, Report, duration, number, worst

TEMPLATE = Path(__file__).with_name("report.html")
LETTERS = {"pass": "", "fail": "F", "error": "E", "skip": "S", "none": ""}  # a pass is a plain square
AXES = ("tp", "pp", "vpp", "ep", "etp", "cp", "sp", "dp", "split", "layout")
GROUPS = {  # a row belongs to the last group whose pattern its mechanisms match
    "Dense": "",
    "Mixture of experts": r"\b(moe|experts?|router)\b",
    "Latent attention": r"\b(mla|dsa|latent attention)\b",
    "Linear attention, state space": r"\b(mamba\d?|ssm|gdn|kda|delta|lightning|linear|short conv|hybrid)\b",
    "Multimodal": r"\b(vision|vl|audio|image|video|omni|multimodal)\b",
}


def _tag(name: str, text: str = "", **attributes: object) -> str:
    """An element; `text` is HTML already, attributes are escaped here and left out where None or empty."""
    named = {k.strip("_").replace("_", "-"): v for k, v in attributes.items() if v not in (None, "")}
    return f"<{name}{''.join(f' {k}="{escape(str(v))}"' for k, v in named.items())}>{text}</{name}>"


def _group(mechanisms: list[str]) -> str:
    words = " ".join(re.findall(r"[a-z0-9]+", " ".join(mechanisms).lower()))
    return [name for name, pattern in GROUPS.items() if re.search(pattern, words)][-1]


def _heads(layouts: list[str]) -> str:
    """A layout's sizes one above the other, a line per axis: `tp2-sp` is `2` on the line tp, `sp` on the line sp."""
    words = {x: [re.fullmatch(r"([a-z]+)([\d.]*)", word) for word in x.split("-")] for x in layouts}
    sizes = {x: {w[1]: w[2] or w[1] for w in ws if w} if all(ws) else {"layout": x} for x, ws in words.items()}
    found = {axis for size in sizes.values() for axis in size}
    axes = [a for a in AXES if a in found] + sorted(found.difference(AXES))
    heads = _tag("th", "".join(_tag("span", a) for a in axes), class_="corner")
    for x, size in sizes.items():
        stack = "".join(_tag("span", escape(size.get(a, ""))) for a in axes)
        heads += _tag("th", stack, scope="col", title=x, aria_label=x)
    return _tag("tr", heads)


def _mark(c: Cell) -> str:
    numbers = {}
    if c.status == "pass" and c.value is not None and c.margin is not None:
        numbers = {"data_value": number(c.value, 0).replace("e-0", "e-"), "data_margin": f"{max(c.margin, -99):.1f}"}
    return _tag("i", class_=c.status, data_check=c.check, data_says=c.says, data_time=duration(c.seconds),
                data_detail=c.detail, **numbers)


def _square(key: str, where: str, cells: dict[str, list[Cell]]) -> str:
    """One layout of one row: its worst status, and a mark per check in a fixed order."""
    status = worst(c.status for found in cells.values() for c in found)
    marks = "".join("".join(map(_mark, found)) or "<i></i>" for found in cells.values())
    return _tag("td", _tag("b", LETTERS[status]) + _tag("span", marks), id=key, class_=status, tabindex=-1,
                aria_label=f"{where}: {'not run' if status == 'none' else status}")


def page(report: Report) -> str:
    names, layouts, checks = report.axes()
    rows, found, keys = {r["row"]: r for r in report.rows}, defaultdict(list), {}
    groups = dict.fromkeys(GROUPS, "")
    for c in report.cells:
        found[c.row, c.layout, c.check].append(c)
    for i, name in enumerate(names):
        row = {"mechanisms": []} | rows.get(name, {})
        about = row | {"mechanisms": ", ".join(row["mechanisms"])}
        title = "\n".join(about.get(k, "") for k in ("architecture", "model_type", "mechanisms", "reference"))
        line = escape(name) + _tag("small", escape(about["mechanisms"]))
        line = _tag("th", line, scope="row", title=title, data_row=name)
        for j, x in enumerate(layouts):
            keys[name, x] = f"c{i}-{j}"
            line += _square(keys[name, x], f"{name} {x}", {check: found[name, x, check] for check in checks})
        groups[_group(row["mechanisms"])] += _tag("tr", line, class_="row")
    body = ""
    for name, lines in groups.items():
        head = _tag("th", _tag("span", name), scope="rowgroup", colspan=len(layouts) + 1)
        body += _tag("tbody", _tag("tr", head, class_="group") + lines) if lines else ""
    failures, n = "", report.summary()
    for c in (c for status in ("fail", "error") for c in report.cells if c.status == status):
        where = _tag("a", f"{escape(c.row)} {_tag('code', escape(c.layout))}", href=f"#{keys[c.row, c.layout]}")
        line = [_tag("b", LETTERS[c.status], class_=c.status), where, escape(c.check), escape(c.says),
                _tag("pre", escape(c.detail))]
        failures += _tag("tr", "".join(_tag("td", x) for x in line))
    bad, ran = n["fail"] + n["error"], n["pass"] + n["fail"] + n["error"]
    good = f"All {ran:,} comparisons pass" if ran else "Nothing was compared"
    facts = report.environment | {"total time": duration(report.seconds)} | report.speed
    reasons = Counter(c.detail for c in report.cells if c.status == "skip").most_common()
    parts = {
        "headline": f"{bad:,} of {ran:,} comparisons do not pass" if bad else good,
        "counts": "".join(_tag("li", f"{_tag('b', LETTERS[s], class_=s)} {n[s]:,} {s}") for s in list(LETTERS)[:4]),
        "facts": "".join(_tag("div", _tag("dt", escape(str(k))) + _tag("dd", escape(number(v) if isinstance(v, float) else str(v))))
                         for k, v in facts.items()),
        "columns": str(len(layouts) or 1),
        "choices": "".join(_tag("label", f'<input type=radio name=check value="{escape(x)}">' + _tag("span", escape(x)))
                           for x in checks),
        "checks": escape(", ".join(checks)),
        "heads": _heads(layouts),
        "body": body,
        "failures": failures,
        "skips": "".join(_tag("tr", _tag("td", f"{count:,}") + _tag("td", escape(why))) for why, count in reasons),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], TEMPLATE.read_text(encoding="utf-8"))
