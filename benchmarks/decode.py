"""Decoding of GPT-2 124M with random weights, beside transformers on PyTorch and CTranslate2.

32-token prompts, 64 new tokens, float32: greedy alone, 8 rows sampled with top-k and top-p, and 5
beams without a repeated bigram. Each side has a process, and they take turns. A round is one
whole call, prompt included; a call for one token gives the latency of the first. Peers that are
not installed are left out. End tokens are off everywhere, so that all make 64.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.common import (
  Contestant,
  Figure,
  alternate,
  is_installed,
  machine,
  print_result,
  summarize,
)
from gptjax.api import Model, load
from gptjax.model.config import ModelConfig
from gptjax.model.parameters import init_parameters

PROMPT_TOKENS, NEW_TOKENS, THREADS = 32, 64, 2
CASES = {
  "greedy, 1 row": (1, {}),
  "top-k 50, top-p 0.95, 8 rows": (8, {"do_sample": True, "top_k": 50, "top_p": 0.95}),
  "5 beams, no repeated bigram": (1, {"num_beams": 5, "no_repeat_ngram_size": 2}),
}
GOALS = {
  "transformers": dict(zip(CASES, (1.6, 2.5, 2.5))),
  "ctranslate2": dict.fromkeys(CASES, 0.9),
}


def make_prompts(rows: int, vocab_size: int) -> list[list[int]]:
  """Draws prompts that every side reads."""
  return np.random.default_rng(0).integers(0, vocab_size, (rows, PROMPT_TOKENS)).tolist()


def timed(call: Callable[[int], object]) -> Callable[[int], dict[str, float]]:
  """Turns `call(new_tokens)` into a contestant's run, and calls it once of each kind."""
  started = time.perf_counter()
  call(NEW_TOKENS)
  first_call = time.perf_counter() - started
  call(1)

  def run(count: int) -> dict[str, float]:
    seconds = {}
    for name, new_tokens in (("first_token", 1), ("all_tokens", NEW_TOKENS)):
      started = time.perf_counter()
      for _ in range(count):
        call(new_tokens)
      seconds[name] = (time.perf_counter() - started) / count
    return seconds | {"first_call": first_call}

  return run


def make_ours(folder: str, rows: int, options: dict):
  """Contestant: gptjax."""
  model = load(folder)
  prompts = make_prompts(rows, model.config.vocab_size)
  seed = {"seed": 0} if "do_sample" in options else {}

  def call(new_tokens: int) -> object:
    return model.generate(prompts, max_new_tokens=new_tokens, eos_token_id=-1, **options, **seed)

  return timed(call)


def make_transformers(folder: str, rows: int, options: dict):
  """Contestant: transformers on PyTorch."""
  import torch
  import transformers

  torch.set_num_threads(THREADS)
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  model.generation_config = transformers.GenerationConfig(pad_token_id=0)
  tokens = torch.tensor(make_prompts(rows, model.config.vocab_size))

  def call(new_tokens: int) -> object:
    with torch.no_grad():
      return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, **options
      )

  return timed(call)


def make_ctranslate2(folder: str, rows: int, options: dict):
  """Contestant: CTranslate2 in float32."""
  import ctranslate2

  vocab_size = json.loads(Path(folder, "config.json").read_text())["vocab_size"]
  with tempfile.TemporaryDirectory() as converted:
    ctranslate2.converters.TransformersConverter(folder).convert(converted, force=True)
    generator = ctranslate2.Generator(converted, compute_type="float32", intra_threads=THREADS)
  prompts = [[f"t{i}" for i in row] for row in make_prompts(rows, vocab_size)]
  names = {"top_k": "sampling_topk", "top_p": "sampling_topp", "num_beams": "beam_size"}
  given = {names.get(key, key): value for key, value in options.items() if key != "do_sample"}

  def call(new_tokens: int) -> object:
    return generator.generate_batch(
      prompts,
      min_length=new_tokens,
      max_length=new_tokens,
      include_prompt_in_result=False,
      **given,
    )

  return timed(call)


def save_model(folder: str, config: ModelConfig) -> None:
  """Writes a model of random weights, and a tokenizer of words t0, t1, ... for CTranslate2."""
  Model(config, init_parameters(config, jax.random.key(0))).save(folder)
  vocab = {f"t{i}": i for i in range(config.vocab_size)}
  Tokenizer(WordLevel(vocab, unk_token="t0")).save(str(Path(folder, "tokenizer.json")))
  kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"}
  kind |= {"bos_token": "t0", "eos_token": "t0"}
  Path(folder, "tokenizer_config.json").write_text(json.dumps(kind))


def measure(config: ModelConfig, rounds: int) -> dict[str, dict[str, dict[str, Figure]]]:
  """Returns {case: {side: {first_token, all_tokens, first_call: Figure in seconds}}}."""
  makers = {"gptjax": "make_ours"}
  if is_installed("torch") and is_installed("transformers"):
    makers["transformers"] = "make_transformers"
    if is_installed("ctranslate2"):
      makers["ctranslate2"] = "make_ctranslate2"
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    save_model(folder, config)
    for case, (rows, options) in CASES.items():
      with ExitStack() as stack:
        sides = {}
        for side, maker in makers.items():
          arguments = {"folder": folder, "rows": rows, "options": options}
          sides[side] = stack.enter_context(Contestant(f"benchmarks.decode:{maker}", **arguments))
        rounds_of = alternate(sides, dict.fromkeys(sides, 1), rounds)
      results[case] = {
        side: {name: summarize([each[name] for each in given]) for name in given[0]}
        for side, given in rounds_of.items()
      }
  return results


def main(arguments: list[str] | None = None) -> dict:
  """Measures, prints, and returns the result."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=6)
  parser.add_argument("--quick", action="store_true", help="a tiny model: shows that it runs")
  options = parser.parse_args(arguments)
  tiny = {"num_layers": 1, "num_heads": 2, "model_dim": 32, "context_length": 128}
  config = ModelConfig(**{"vocab_size": 300, **tiny} if options.quick else {"vocab_size": 50_257})
  here = machine()
  results = measure(config, 2 if options.quick else options.rounds)
  rows, ratios = [], {}
  for case, sides in results.items():
    ours = sides["gptjax"]["all_tokens"].median
    for side, figures in sides.items():
      speed = CASES[case][0] * NEW_TOKENS / figures["all_tokens"].median
      ratio = None if side == "gptjax" else figures["all_tokens"].median / ours
      if ratio is not None:
        ratios[f"{case} / {side}"] = ratio
      rows.append(
        (
          f"{case}: {side}",
          f"{speed:.1f}",
          f"{1e3 * figures['first_token'].median:.0f}",
          f"{figures['first_call'].median:.1f}",
          None if ratio is None else f"{ratio:.2f}",
          None if ratio is None else f">= {GOALS[side][case]}",
        )
      )
  result = {
    "benchmark": "decode",
    "machine": here,
    "quick": options.quick,
    "seconds": results,
    "ratios": ratios,
    "goals": GOALS,
  }
  columns = ("GPT-2 124M, float32", "tokens/s", "1st token, ms", "1st call, s", "ours/its", "goal")
  title = "decode (--quick: not a measurement)" if options.quick else "decode"
  notes = ["Medians; ours/its is the ratio of our tokens a second to the peer's, in this run."]
  print_result(title, columns, rows, result, notes)
  return result


if __name__ == "__main__":
  main()
