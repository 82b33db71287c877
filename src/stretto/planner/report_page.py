"""The planner's answer as one page for a browser; it needs no network and no other file.

The page is ``page/page.html`` with the style and the script beside it put in.  It follows the reader's light or dark
mode, every figure is reached by keyboard, and without the script only the tips are missing.
"""

from __future__ import annotations

import base64
import re
from html import escape
from importlib import resources

from stretto.planner.estimate import Estimate
from stretto.planner.explain import described
from stretto.planner.front import points
from stretto.planner.picture import picture
from stretto.planner.placement import placement_words
from stretto.planner.plan import Answer
from stretto.planner.report_bars import memory_bars, time_bars
from stretto.planner.report_plots import front_plot, roofline_plot
from stretto.planner.report_text import COLUMNS, figures, notes
from stretto.schedule.render.colours import declarations


def page(answer: Answer, command: str) -> str:
    """The page; ``command`` is what made it."""
    folder = resources.files("stretto.planner") / "page"
    read = {name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    request, training = answer.request, answer.request.run.training
    colours = {"light": declarations(dark=False), "dark": declarations(dark=True)}
    many = f"{request.devices} device{'s' if request.devices > 1 else ''}"
    values = {
        "title": escape(f"{request.model.name} on {request.cluster.name}"),
        "question": escape(
            f"{training.sequence_length} tokens × {training.global_batch_size} sequences a step, {training.dtype}, "
            f"{many}; best by {request.objective}"
        ),
        "style": _filled(read["page.css"], colours),
        "script": read["page.js"],
        "list": _list(answer),
        "time": time_bars(answer.plans),
        "memory": memory_bars(answer.plans),
        "front": front_plot(answer, points(answer)),
        "schedule": _schedule(answer.best),
        "roofline": roofline_plot(answer.best),
        "made": f"<pre><code>{escape(command)}</code></pre>"
        + "".join(f'<p class="note">{escape(line)}</p>' for line in map(_sentence, notes(answer)[1:])),
    }
    return _filled(read["page.html"], values)


def _filled(template: str, values: dict[str, str]) -> str:
    """The template with each ``{{name}}`` replaced, in one pass: what is put in isn't looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _list(answer: Answer) -> str:
    """The plans, best first, and why each beats the next."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    reasons = [*answer.reasons, None]
    rows = []
    for number, (plan, why) in enumerate(zip(answer.plans, reasons, strict=True), start=1):
        cells = "".join(
            f'<td data-name="{name}">{cell or "–"}</td>' for name, cell in zip(COLUMNS, figures(plan), strict=True)
        )
        before = f"<small>before {number + 1}: {escape(why)}</small>" if why else ""
        rows.append(
            f'<tr><th scope="row">{number}</th><td class="words"><b>{escape(described(plan.plan))}</b>{before}</td>'
            f"{cells}</tr>"
        )
    return (
        f'<table class="list"><thead><tr><th></th><th scope="col" class="words">plan</th>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table><p class="note">{escape(_sentence(notes(answer)[0]))} '
        f"{escape(_sentence('; '.join(placement_words(answer.best.plan, answer.best.work.cluster).splitlines())))}</p>"
    )


def _sentence(line: str) -> str:
    return line[0].upper() + line[1:] + "." * (not line.endswith("."))


def _schedule(best: Estimate) -> str:
    """The drawing, which is its own file inside the page, so that their styles don't mix."""
    shown = picture(best)
    data = base64.b64encode(shown.svg.encode()).decode()
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Drawing of the schedule">'
        f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(shown.words, quote=True)}"></div>'
        f'<p class="note">{escape(shown.words)} F forward, B backward (I inputs, W weights), R recompute; '
        "gradients over dp and the optimizer come after.</p>"
    )
