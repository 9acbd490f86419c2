"""A heat map to look at: one offline HTML page, or coloured text for a terminal."""

import html
import json
from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from gptjax.chart import Series, line_chart
from gptjax.evaluate.heatmap import Cell, Token
from gptjax.report import grid, headline, render_report, section, table, text

# Surprise that has the full colour: one in 4096.
FULL_BITS = 12.0
_MOST_SURPRISING = 15
_CONTEXT_CELLS = 8
# xterm's colours from pale to strong, behind black text: readable on light and dark terminals.
_TERMINAL_SHADES = (230, 223, 216, 215, 209, 203, 197)


def render_page(title: str, cells: Sequence[Cell]) -> str:
  """Builds the page: the figures, the text, surprise along it, and what surprised most."""
  bits = [token.bits for cell in cells for token in cell.tokens if token.bits is not None]
  num_bytes = sum(len(cell.text.encode()) for cell in cells)
  mean = sum(bits) / len(bits)
  cards = {
    "tokens scored": f"{len(bits):,}",
    "bits per token": f"{mean:.3f}",
    "perplexity": f"{2**mean:.4g}",
    "bits per byte": f"{sum(bits) / num_bytes:.3f}",
  }
  along = Series("bits", range(1, len(bits) + 1), bits, smoothing=max(1, len(bits) // 40))
  return render_report(
    title,
    [
      headline(cards),
      section(
        "Surprise",
        text("Stronger colour is more surprise. Point at a token for what the model preferred."),
        _legend(),
        _map(cells),
      ),
      section(
        "Along the text",
        grid(line_chart("bits of surprise", [along], x_label="token"), _most_surprising(cells)),
      ),
    ],
  )


def terminal_text(cells: Sequence[Cell]) -> Text:
  """Colours the text for a terminal."""
  coloured = Text()
  for cell in cells:
    shade = _TERMINAL_SHADES[int(_heat(cell.bits) * (len(_TERMINAL_SHADES) - 1))]
    is_plain = cell.bits is None or _heat(cell.bits) < 1 / FULL_BITS
    coloured.append(
      cell.text, None if is_plain else Style(color="black", bgcolor=f"color({shade})")
    )
  return coloured


def most_surprising(cells: Sequence[Cell], number: int = _MOST_SURPRISING) -> list[tuple]:
  """Returns (text before, token, bits, what was likelier) of the most surprising cells."""
  known = [index for index, cell in enumerate(cells) if cell.bits is not None]
  known.sort(key=lambda index: cells[index].bits, reverse=True)
  return [
    (
      "".join(cell.text for cell in cells[max(0, index - _CONTEXT_CELLS) : index]),
      cells[index].text,
      cells[index].bits,
      _list_alternatives(cells[index].tokens[0]),
    )
    for index in known[:number]
  ]


def _heat(bits: float | None) -> float:
  return 0.0 if bits is None else min(bits / FULL_BITS, 1.0)


def _map(cells: Sequence[Cell]) -> str:
  """The text as spans; what a token's card shows is in one script element."""
  spans, cards = [], []
  for cell in cells:
    words = html.escape(cell.text)
    if not cell.tokens:
      spans.append(words)
      continue
    heat = "none" if cell.bits is None else f"{_heat(cell.bits):.3f}"
    spans.append(f'<span style="--heat:{heat}" tabindex="0">{words}</span>')
    cards.append([_card(token) for token in cell.tokens])
  # "<" would let a token close the script element.
  data = json.dumps(cards, ensure_ascii=False).replace("<", "\\u003c")
  return (
    f'<style>{_STYLE}</style><div class="heatmap"><pre>{"".join(spans)}</pre>'
    f'<div class="card" role="status"></div><script type="application/json">{data}</script></div>'
    f"<script>{_SCRIPT}</script>"
  )


def _card(token: Token) -> list:
  alternatives = [[_visible(text), round(p, 6)] for text, p in token.alternatives]
  return [_visible(token.text), token.bits and round(token.bits, 3), alternatives]


def _legend() -> str:
  steps = "".join(
    f'<span style="--heat:{bits / FULL_BITS:.3f}">{bits:g}</span>' for bits in (0, 2, 4, 6, 8, 10)
  )
  last = f'<span style="--heat:1">{FULL_BITS:g}+</span>'
  return f'<p class="heatmap scale">bits {steps}{last}</p>'


def _most_surprising(cells: Sequence[Cell]) -> str:
  rows = [
    (_visible(before), _visible(token), bits, alternatives)
    for before, token, bits, alternatives in most_surprising(cells)
  ]
  return table(["after", "came", "bits", "likelier"], rows)


def _list_alternatives(token: Token) -> str:
  return ", ".join(f"“{_visible(text)}” {_percent(p)}" for text, p in token.alternatives)


def _percent(probability: float) -> str:
  digits = 0 if probability >= 0.1 else 1
  return f"{100 * probability:.{digits}f}%"


def _visible(text: str) -> str:
  """Shows spaces at the ends, and newlines."""
  shown = text.replace("\n", "↵").replace("\t", "⇥")
  stripped = shown.strip(" ")
  if not stripped:
    return "␣" * len(shown)
  left = len(shown) - len(shown.lstrip(" "))
  return "␣" * left + stripped + "␣" * (len(shown) - left - len(stripped))


_STYLE = """
.heatmap { position: relative; }
.heatmap pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 14px 16px; font: 16px/1.9 Georgia, "Noto Serif", "Noto Serif CJK JP", serif; }
.heatmap span { background: color-mix(in srgb, var(--c1) calc(var(--heat) * 62%), transparent);
  border-radius: 3px; padding: 2px 0; }
.heatmap span[style*="none"] { background: none; border-bottom: 1px dotted var(--dim); }
.heatmap pre span:hover, .heatmap pre span:focus { outline: 2px solid var(--c0); }
.scale { color: var(--dim); font-size: 13px; }
.scale span { color: var(--ink); padding: 2px 10px; margin-left: 4px; }
.heatmap .card { position: absolute; z-index: 1; display: none; min-width: 210px;
  padding: 10px 12px; background: var(--page); border: 1px solid var(--dim); border-radius: 8px;
  font-size: 13px; font-variant-numeric: tabular-nums; pointer-events: none;
  box-shadow: 0 4px 14px #0004; }
.heatmap .card b { font-size: 14px; }
.heatmap .card div { display: grid; grid-template-columns: minmax(70px, max-content) 90px 52px;
  gap: 8px; align-items: center; }
.heatmap .card i { height: 8px; border-radius: 2px; background: var(--c0); }
"""

# Under the pointer, or with the focus: a card with the token, its bits, and what was likelier.
_SCRIPT = """
{
  const map = document.currentScript.previousElementSibling;
  const card = map.querySelector(".card");
  const spans = [...map.querySelectorAll("pre span")];
  const data = JSON.parse(map.querySelector("script").textContent);
  const percent = (p) => (100 * p).toFixed(p >= 0.1 ? 0 : p >= 0.001 ? 1 : 3) + "%";
  const make = (tag, text) => {
    const element = document.createElement(tag);
    element.textContent = text;
    return element;
  };
  const show = (event) => {
    const index = spans.indexOf(event.target.closest("pre span"));
    card.style.display = index < 0 ? "none" : "block";
    if (index < 0) return;
    card.replaceChildren();
    for (const [text, bits, alternatives] of data[index]) {
      card.append(make("b", text || "?"), make("span", bits === null ? " nothing before it"
        : ` ${bits.toFixed(2)} bits, ${percent(2 ** -bits)}`));
      for (const [other, p] of alternatives) {
        const row = make("div", ""), bar = make("i", "");
        bar.style.width = `${Math.max(1, 100 * p)}%`;
        row.append(make("span", other), bar, make("span", percent(p)));
        card.append(row);
      }
    }
    const box = map.getBoundingClientRect(), at = spans[index].getClientRects()[0];
    const left = Math.min(at.left - box.left, box.width - card.offsetWidth);
    card.style.left = `${Math.max(0, left)}px`;
    card.style.top = `${at.bottom - box.top + 6}px`;
  };
  for (const name of ["pointerover", "focusin"]) map.addEventListener(name, show);
  for (const name of ["pointerleave", "focusout"])
    map.addEventListener(name, () => { card.style.display = "none"; });
}
"""
