"""A figure of several pictures: side by side as it is written, one at a time with a slider where scripts run."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
.steps{display:flex;flex-direction:column;gap:14px}
.stepper{display:flex;flex-wrap:wrap;align-items:center;gap:8px 10px}.stepper[hidden]{display:none}
.stepper input{flex:1 1 110px;min-width:0;accent-color:var(--green)}
.stepper button{font:inherit;font-size:14px;color:var(--ink);background:var(--well);border:1px solid var(--edge);
border-radius:7px;min-width:38px;padding:4px 11px;cursor:pointer}
.stepper button:hover{border-color:var(--ink)}
.frames{list-style:none;margin:0;padding:0;display:grid;gap:30px 28px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
.frame{display:flex;flex-direction:column;gap:12px;min-width:0}
.frame .when{font-size:14px;color:var(--muted)}.frame .when b{color:var(--ink);margin-right:6px}
.frame .views{display:grid;gap:16px;align-items:start}
.frame .view{display:flex;flex-direction:column;gap:12px;min-width:0}
.live .frames{display:block}.live .frame[hidden]{display:none}
.live .frame .when{font-size:15px}
.live .frame .views{grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr));gap:20px 36px}
@media print{.stepper{display:none}.live .frames{display:grid}.live .frame[hidden]{display:flex}
.live .frame .views{grid-template-columns:1fr}}
"""

SCRIPT = """
(() => {
  for (const figure of document.querySelectorAll(".steps")) {
    const frames = [...figure.querySelectorAll(".frame")], bar = figure.querySelector(".stepper");
    if (!bar) continue;
    const slider = bar.querySelector("input"), play = bar.querySelector(".play");
    let timer = 0;
    const show = (at) => {
      frames.forEach((frame, place) => { frame.hidden = place !== at; });
      slider.value = at; slider.setAttribute("aria-valuetext", frames[at].dataset.name);
    };
    const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
    const step = (by) => show((Number(slider.value) + by + frames.length) % frames.length);
    slider.addEventListener("input", () => { stop(); show(Number(slider.value)); });
    for (const button of bar.querySelectorAll("[data-by]")) {
      button.addEventListener("click", () => { stop(); step(Number(button.dataset.by)); });
    }
    play.addEventListener("click", () => {
      if (timer) { stop(); return; }
      step(1); timer = setInterval(() => step(1), 1100); play.textContent = "Pause";
    });
    figure.classList.add("live"); bar.hidden = false; show(frames.length - 1);
  }
})();
"""


def stepped(title: str, frames: Sequence[tuple[str, str, Sequence[str]]], keys: str) -> str:
    """A figure of frames: each has a name (plain text), a line about it and its pictures (both HTML)."""
    items = "".join(
        f'<li class="frame" data-name="{escape(name)}"><p class="when"><b>{escape(name)}</b> {about}</p>'
        f'<div class="views">{"".join(f"""<div class="view">{view}</div>""" for view in views)}</div></li>'
        for name, about, views in frames
    )
    last = len(frames) - 1
    bar = (
        '<div class="stepper" hidden><button type="button" data-by="-1" aria-label="previous">&lsaquo;</button>'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{escape(title)}: which of '
        f'{len(frames)} moments"><button type="button" data-by="1" aria-label="next">&rsaquo;</button>'
        '<button type="button" class="play">Play</button></div>'
    )
    return (
        f'<figure class="card steps"><figcaption>{escape(title)}</figcaption>{bar if last else ""}{keys}'
        f'<ol class="frames">{items}</ol></figure>'
    )


__all__ = ["SCRIPT", "STYLE", "stepped"]
