"""A comparison to look at: one offline HTML page, or lines for a terminal."""

import numpy as np

from gptjax.chart import Series, line_chart
from gptjax.evaluate.comparison import Comparison
from gptjax.report import grid, headline, key_values, render_report, section, table, text

_MOST = 8
_SHOWN_CHARACTERS = 160


def render_page(comparison: Comparison) -> str:
  """Builds the page: the verdict, both models, the difference along the text, its extremes."""
  found = comparison.receipt
  first, second = (side["model"] for side in found["models"])
  bytes_U = comparison.units.bytes_U
  of_first_U, of_second_U = (bits_U / bytes_U for bits_U in comparison.bits_U)
  numbers = range(1, len(bytes_U) + 1)
  smoothing = len(bytes_U) // 20
  lines = [
    Series(first, numbers, of_first_U.tolist(), smoothing),
    Series(second, numbers, of_second_U.tolist(), smoothing),
  ]
  unit = comparison.units.kind.removesuffix("s")
  return render_report(
    f"{first} and {second}",
    [
      headline(_cards(found)),
      section("Verdict", text(_explain(found))),
      section("Models", _models_table(found)),
      section(
        "Along the text",
        grid(
          line_chart("bits a byte", lines, x_label=unit),
          line_chart(
            "difference in bits a byte (below 0 the first is better)",
            [Series("difference", numbers, (of_first_U - of_second_U).tolist(), smoothing)],
            x_label=unit,
          ),
        ),
      ),
      section(f"Where {first} is better", _extremes(comparison, 1)),
      section(f"Where {second} is better", _extremes(comparison, -1)),
      section("Protocol", key_values(found["protocol"] | {"data": found["data_hash"][:12]})),
    ],
  )


def to_text(found: dict) -> str:
  """Writes the verdict in lines."""
  lines = [
    f"{side['model']:<40}{side['bits_per_byte']:.5f} bits a byte, {side['nats_per_token']:.5f}"
    f" nats a token, {side['tokens']:,} tokens"
    for side in found["models"]
  ]
  cards = [f"{name:<40}{value}" for name, value in _cards(found).items()]
  return "\n".join([*lines, *cards[1:], f"{'verdict':<40}{found['verdict']}"])


def _cards(found: dict) -> dict[str, str]:
  low, high = found["interval"]
  interval = "one unit" if low is None else f"{low:+.4f} … {high:+.4f}"
  return {
    "verdict": found["verdict"],
    "difference, bits a byte": f"{found['difference']:+.4f}",
    "95 % interval": interval,
    found["units"]: f"{found['counts']['units']:,}",
  }


def _explain(found: dict) -> str:
  counts = found["counts"]
  return (
    f"The difference is the first model's bits a byte less the second's. The first is better in"
    f" {counts['first_is_better_in']:,} of {counts['units']:,} {found['units']}. The interval takes"
    f" them as independent; where neighbours are alike it is somewhat too narrow."
  )


def _models_table(found: dict) -> str:
  names = ("model", "bits_per_byte", "nats_per_token", "tokens", "model_hash")
  rows = [[side[name] for name in names] for side in found["models"]]
  rows = [[*row[:-1], row[-1][:12]] for row in rows]
  return table([name.replace("_", " ") for name in names], rows, best={1: "min"})


def _extremes(comparison: Comparison, sign: int) -> str:
  """Lists the units with the largest differences in favour of the first (1) or second (-1)."""
  bytes_U = comparison.units.bytes_U
  first_U, second_U = (bits_U / bytes_U for bits_U in comparison.bits_U)
  difference_U = sign * (first_U - second_U)
  order = [index for index in np.argsort(difference_U)[:_MOST] if difference_U[index] < 0]
  rows = [
    (comparison.texts[i][:_SHOWN_CHARACTERS], float(first_U[i]), float(second_U[i])) for i in order
  ]
  return table(["text", "first, bits a byte", "second"], rows) if rows else text("Nowhere.")
