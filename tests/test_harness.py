"""EleutherAI's harness on gptjax: its own transformers model, and no option without effect."""

import json
from pathlib import Path

import numpy as np
import pytest

from gptjax.checkpoint.models import Loaded, load_model
from gptjax.cli.main import main
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate.prompting import PromptProtocol, measure_prompts
from gptjax.evaluate.scoring import Scorer
from gptjax.evaluate.templates import load_template
from gptjax.model.config import ModelConfig

SHARED = Path(__file__).parents[2] / "shared" / "data"
CONTEXT = 96
# One task of each kind of request, on files, as the harness's users write them.
TASKS = {
  "local_copa": {
    "output_type": "multiple_choice",
    "file": ("json", "tasks/multiple_choice/copa/val.jsonl"),
    "doc_to_text": "{{premise}} {{ 'because' if question == 'cause' else 'therefore' }}",
    "doc_to_choice": "{{[choice1, choice2]}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}],
  },
  "local_wikitext": {
    "output_type": "loglikelihood_rolling",
    "file": ("text", "corpora/eval_dev/wiki.valid.tokens"),
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
  },
  "local_arc": {
    "output_type": "generate_until",
    "file": ("json", "tasks/multiple_choice/arc_challenge/ARC-Challenge-Dev.jsonl"),
    "doc_to_text": "Question: {{question.stem}}\nAnswer:",
    "doc_to_target": "{{answerKey}}",
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8},
    "metric_list": [{"metric": "exact_match"}],
  },
}

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness")


@pytest.fixture(scope="module")
def harness():
  """The adapter's module; the import takes seconds."""
  from gptjax.evaluate import harness

  return harness


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
  """A folder of TASKS in the harness's own format."""
  if not SHARED.is_dir():
    pytest.skip("needs ../shared/data")
  folder = tmp_path_factory.mktemp("tasks")
  for name, task in TASKS.items():
    kind, file = task["file"]
    content = {
      "task": name,
      "dataset_path": kind,
      "dataset_kwargs": {"data_files": {"validation": str(SHARED / file)}},
      "validation_split": "validation",
      **{key: value for key, value in task.items() if key != "file"},
    }
    (folder / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
  return folder


def run_tasks(model, tasks, limit):
  """Returns (figures, {task: [answer of each request]}) of the harness."""
  from lm_eval.evaluator import simple_evaluate
  from lm_eval.tasks import TaskManager

  found = simple_evaluate(
    model=model,
    tasks=list(TASKS),
    task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    limit=limit,
    bootstrap_iters=0,
  )
  figures = {
    (task, name): value
    for task, values in found["results"].items()
    for name, value in values.items()
    if isinstance(value, float)
  }
  answers = {
    task: [answer for sample in samples for answers in sample["resps"] for answer in answers]
    for task, samples in found["samples"].items()
  }
  return figures, answers


def disagreements(ours, theirs):
  """Counts the answers that differ: texts, greedy or not, and numbers by more than 1e-4."""

  def differ(left, right):
    if isinstance(left, tuple | list):
      return any(differ(*pair) for pair in zip(left, right, strict=True))
    if isinstance(left, str | bool):
      return left != right
    return not np.isclose(left, right, rtol=1e-4, atol=0)

  return sum(differ(*pair) for task in ours for pair in zip(ours[task], theirs[task], strict=True))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
  """Two folders of random GPT-2s with the real tokenizer, as transformers writes them."""
  torch = pytest.importorskip("torch", reason="needs the extra test-hf")
  transformers = pytest.importorskip("transformers", reason="needs the extra test-hf")
  pytest.importorskip("accelerate", reason="needs the extra test-hf")
  folder = tmp_path_factory.mktemp("hf")
  words = folder / "words"
  words.mkdir()
  for ours, theirs in {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}.items():
    (words / ours).write_bytes((SHARED / "tokenizers/gpt2" / theirs).read_bytes())
  # As large as these, random weights write texts that differ.
  sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": CONTEXT}
  for seed, name in enumerate(("model", "other")):
    config = transformers.GPT2Config(**sizes, initializer_range=0.3)
    torch.manual_seed(seed)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / name)
    transformers.GPT2TokenizerFast.from_pretrained(words).save_pretrained(folder / name)
  return folder


@pytest.mark.hf
def test_three_tasks_give_the_numbers_of_the_harness_s_own_model(harness, tasks, hf_folder):
  from lm_eval.models.huggingface import HFLM

  theirs = HFLM(pretrained=str(hf_folder / "model"), device="cpu", dtype="float32", batch_size=1)
  figures, answers = run_tasks(theirs, tasks, limit=8)
  ours_adapter = harness.HarnessModel(hf_folder / "model")
  ours, our_answers = run_tasks(ours_adapter, tasks, limit=8)
  assert {task for task, _ in figures} == set(TASKS)
  assert ours == pytest.approx(figures, rel=1e-4)
  assert len(set(answers["local_arc"])) > 4
  assert disagreements(our_answers, answers) == 0

  requests = make_requests("loglikelihood", [("One day", " they")])
  answer = ours_adapter.loglikelihood(requests, disable_tqdm=True)
  other = harness.HarnessModel(hf_folder / "other").loglikelihood(requests, disable_tqdm=True)
  assert disagreements({"one": answer}, {"one": other}) == 1


@pytest.mark.hf
def test_our_own_choices_are_those_of_the_harness(harness, tasks, hf_folder, tmp_path):
  (tmp_path / "copa.toml").write_text(
    'prompt = "{premise} {question}"\n[data]\nadapter = "copa"\n[data.wording.question]\n'
    'cause = "because"\neffect = "therefore"\n'
  )
  loaded = load_model(hf_folder / "model")
  theirs = harness.run_tasks(harness.HarnessModel(loaded), ["local_copa"], str(tasks), limit=40)
  asked = PromptProtocol("copa", load_template(str(tmp_path / "copa.toml")), limit=40)
  data = [str(SHARED / TASKS["local_copa"]["file"][1])]
  ours = measure_prompts(data, loaded, Scorer(loaded), asked)
  for normalization, metric in {
    "none": "acc",
    "character": "acc_norm",
    "byte": "acc_bytes",
  }.items():
    accuracy = theirs["results"]["local_copa"][f"{metric},none"]
    assert ours["by_normalization"][normalization]["accuracy"] == pytest.approx(accuracy)
  assert ours["counts"]["examples"] == 40


@pytest.fixture(scope="module")
def model():
  """A small model of characters, and no file."""
  import jax

  from gptjax.model.parameters import init_parameters

  tokenizer = make_char_tokenizer(["abcdefgh .\n"], end_token="<end>")
  config = ModelConfig(
    vocab_size=tokenizer.vocab_size, context_length=24, num_layers=1, num_heads=2, model_dim=16
  )
  params = init_parameters(config, jax.random.key(0))
  params = jax.tree.map(lambda leaf: leaf * 8, params)
  return Loaded(config, params, tokenizer, {"bos": (), "eos": (tokenizer.end_id,), "pad": ()})


def make_requests(kind, arguments):
  from lm_eval.api.instance import Instance

  return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


PAIRS = [("ab ", "cd"), ("", "a"), ("abcdefgh" * 4, " a."), ("b", "c"), ("h g f", " e d c")]
TEXTS = [("abc " * 13,), ("a",), ("",), ("hgfe\n" * 9,)]
PROMPTS = [
  ("abc", {"until": ["d"], "max_gen_toks": 6}),
  ("abcdefgh" * 4, {"until": "\n", "max_gen_toks": 6}),
  ("h", {"until": ["d"], "max_gen_toks": 6}),
]


def answer_all(adapter):
  return (
    adapter.loglikelihood(make_requests("loglikelihood", PAIRS), disable_tqdm=True),
    adapter.loglikelihood_rolling(make_requests("loglikelihood_rolling", TEXTS), True),
    adapter.generate_until(make_requests("generate_until", PROMPTS), disable_tqdm=True),
  )


def test_answers_do_not_depend_on_the_batch_size(harness, model):
  pairs, rolling, texts = answer_all(harness.HarnessModel(model))
  small, small_rolling, small_texts = answer_all(harness.HarnessModel(model, batch_size=1))
  np.testing.assert_allclose(pairs, small, rtol=1e-5)
  np.testing.assert_allclose(rolling, small_rolling, rtol=1e-5)
  assert texts == small_texts
  assert rolling[2] == 0 and rolling[0] < rolling[1] < 0


def test_a_rolling_text_is_the_sum_of_its_windows(harness, model):
  adapter = harness.HarnessModel(model, max_length=10)
  (total,) = adapter.loglikelihood_rolling(
    make_requests("loglikelihood_rolling", [("abcdefgh abcdefgh",)]), True
  )
  # 17 characters: the first 10 after the end token, then 7 that see the 3 before and one more.
  first = adapter._loglikelihood_tokens([(("", ""), [model.tokenizer.end_id], ids("abcdefgh a"))])
  second = adapter._loglikelihood_tokens([(("", ""), ids("h a"[-4:]), ids("bcdefgh"))])
  longer = adapter._loglikelihood_tokens([(("", ""), ids("gh a"), ids("bcdefgh"))])
  assert total == pytest.approx(first[0][0] + longer[0][0], rel=1e-6)
  assert total != pytest.approx(first[0][0] + second[0][0], rel=1e-6)


def ids(text):
  return make_char_tokenizer(["abcdefgh .\n"]).encode(text)


def test_sampled_texts_follow_the_seed_of_the_harness(harness, model):
  import random

  options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
  requests = make_requests("generate_until", [("abc", options), ("abc", options)])
  adapter = harness.HarnessModel(model)
  drawn = []
  for seed in (3, 3, 4):
    random.seed(seed)
    drawn.append(adapter.generate_until(requests, disable_tqdm=True))
  assert drawn[0] == drawn[1] != drawn[2]
  assert drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"device": "cuda"}, "device is 'cuda', which has no effect"),
    ({"batch_size": "large"}, "batch_size is 'large'; it must be a whole number or auto"),
    ({"max_length": 25}, "max_length is 25; it must be from 1 to 24"),
  ],
)
def test_an_option_without_effect_is_refused(harness, model, options, message):
  with pytest.raises(ConfigError, match=message):
    harness.HarnessModel(model, **options)


def test_misspelt_decoding_options_and_no_room_are_refused(harness, model):
  adapter = harness.HarnessModel(model)
  for given, message in {
    "top_kk": ({"top_kk": 3}, 'did you mean "top_k"'),
    "long": ({"max_gen_toks": 24}, "max_new_tokens is 24"),
    "several": ({"num_return_sequences": 2}, "num_return_sequences is 2"),
  }.values():
    with pytest.raises(ConfigError, match=message):
      adapter.generate_until(make_requests("generate_until", [("a", given)]), True)


def test_tasks_that_there_are_not_are_refused(harness, model, tmp_path):
  adapter = harness.HarnessModel(model)
  with pytest.raises(ConfigError, match='no task "lambada_opnai"; the nearest are lambada_openai'):
    harness.run_tasks(adapter, ["lambada_opnai"])
  with pytest.raises(ConfigError, match="which is no folder"):
    harness.run_tasks(adapter, ["copa"], str(tmp_path / "none"))


def test_a_model_without_tokenizer_is_refused(harness, model):
  with pytest.raises(DataError, match="no tokenizer"):
    harness.HarnessModel(Loaded(model.config, model.params, None, model.token_ids))


@pytest.mark.hf
def test_a_folder_is_loaded_by_name(harness, hf_folder):
  from lm_eval.api.registry import get_model

  adapter = get_model("gptjax").create_from_arg_string(f"pretrained={hf_folder / 'model'}")
  assert adapter.max_length == load_model(hf_folder / "model").config.context_length == CONTEXT
  assert adapter.prefix_token_id == adapter.eot_token_id == 50256


def test_the_command_scores_the_weights_it_is_asked_for(harness, hf_folder, monkeypatch, capsys):
  def run_tasks(model, *args, **options):
    return {"results": {}, "versions": {}}

  monkeypatch.setattr(harness, "run_tasks", run_tasks)
  flags = ["--model", str(hf_folder / "model"), "--tasks", "x", "--json", "--weights"]
  receipts = []
  for weights in ("float32", "int8"):
    assert main(["evaluate", "harness", *flags, weights]) == 0
    receipts.append(json.loads(capsys.readouterr().out))
  assert [receipt["weights"] for receipt in receipts] == ["float32", "int8"]
  assert receipts[0]["model_hash"] != receipts[1]["model_hash"]
