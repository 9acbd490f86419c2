"""Zero-shot and few-shot: what a model is given, how its answers compare, and the receipt."""

import json
import math
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from families import make_config, make_params

from gptjax.checkpoint.models import Loaded, save_run
from gptjax.cli.main import main
from gptjax.data.examples import Example
from gptjax.data.tokenizer import make_char_tokenizer
from gptjax.errors import ConfigError, DataError
from gptjax.evaluate.answers import Judge, Question
from gptjax.evaluate.completions import complete, make_generator
from gptjax.evaluate.prompting import PromptProtocol, ask, measure_prompts
from gptjax.evaluate.scoring import Scorer, Scores
from gptjax.evaluate.templates import load_template, read_template
from gptjax.generate.options import DecodingOptions

TOKENIZER = make_char_tokenizer(["abcdefghijklmnopqrstuvwxyz ABCDEFGHIJQ.:?!_é\n"], end_token="<e>")


def template(text):
  return read_template(tomllib.loads(text))


CHOICE = template('prompt = "Q: {text}\\nA:"\n[data]\nfamily = "multiple_choice"')
LABELS = """
prompt = "{text}:"
[answers]
no = "bad"
yes = "good"
[data]
family = "classification"
"""


class Planted:
  """A scorer by a table: {scored text: log-likelihood of each token}; keeps what it is given."""

  def __init__(self, logprobs, default=-1.0):
    self._logprobs, self._default = logprobs, default
    self.given = []

  def score(self, rows, advance):
    found = []
    for row in rows:
      text = TOKENIZER.decode(row.tokens)
      context, scored = text[: -row.num_scored], text[-row.num_scored :]
      self.given.append((context, scored))
      value = self._logprobs.get((context, scored), self._logprobs.get(scored, self._default))
      values_S = np.full(row.num_scored, value, np.float32)
      found.append(Scores(values_S, values_S > -1, *np.zeros((2, row.num_scored, 0))))
    advance(len(rows))
    return found


def fake_model(context_length=512):
  config = SimpleNamespace(context_length=context_length, vocab_size=TOKENIZER.vocab_size)
  ids = {"bos": (), "eos": (TOKENIZER.end_id,), "pad": ()}
  return SimpleNamespace(config=config, tokenizer=TOKENIZER, token_ids=ids)


def judge(asked, scorer, start="none", context_length=512):
  return Judge(asked, fake_model(context_length), scorer, start)


def questions(*examples):
  return [Question(example) for example in examples]


def test_the_three_normalisations_choose_by_what_they_say():
  # By sum "aa" is best, by token "bbbbbb", by byte "cé" would be worst and by character not; after
  # "Answer:" only "dd" is unlikely, so that it gains the most.
  example = Example("0", ("x",), choices=("aa", "bbbbbbb", "dd"), label=1)
  scorer = Planted({" aa": -1.0, " bbbbbbb": -0.5, " dd": -1.2, ("Answer:", " dd"): -9.0})
  answers = judge(CHOICE, scorer).ask(questions(example))
  (line,) = answers.lines
  assert line["tokens"] == [3, 8, 3]
  np.testing.assert_allclose(line["logprobs"], [-3, -4, -3.6], rtol=1e-6)
  np.testing.assert_allclose(line["unconditional"], [-3, -4, -27], rtol=1e-6)
  # none: 0; token: -1, -.5, -1.2; character: -3/2, -4/7, -3.6/2; unconditional: 0, 0, 23.4.
  accuracy = {name: metrics["accuracy"] for name, metrics in answers.by_normalization.items()}
  assert accuracy == {"none": 0, "token": 1, "byte": 1, "character": 1, "unconditional": 0}
  assert answers.metrics == {"accuracy": 1}
  assert line["prediction"] == 1


def test_bytes_and_characters_are_counted_without_the_space_around():
  example = Example("0", ("x",), choices=("éé", "aaa"), label=0)
  answers = judge(CHOICE, Planted({" éé": -1.0, " aaa": -1.0})).ask(questions(example))
  # Sums -3 and -4: a byte costs 3/4 and 4/3, a character 3/2 and 4/3.
  accuracy = {name: metrics["accuracy"] for name, metrics in answers.by_normalization.items()}
  assert accuracy["byte"] == 1 and accuracy["character"] == 0


def test_questions_with_fewer_answers_never_choose_what_they_lack():
  few = Example("0", ("x",), choices=("a", "b"), label=0)
  many = Example("1", ("y",), choices=("a", "b", "c", "d"), label=3)
  scorer = Planted({" a": -2.0, " b": -3.0, " c": -4.0, " d": -0.5})
  answers = judge(CHOICE, scorer).ask(questions(few, many))
  assert all(metrics["accuracy"] in (0.5, 1.0) for metrics in answers.by_normalization.values())
  assert answers.metrics["accuracy"] == 1
  assert [len(line["logprobs"]) for line in answers.lines] == [2, 4]


def test_what_the_model_reads_of_shots_and_instructions():
  asked = template('instructions = "Do it."\nseparator = "\\n"\n' + LABELS)
  shots = Example("1", ("one",), label=1), Example("2", ("two",), label=0)
  scorer = Planted({})
  judge(asked, scorer, start="end").ask([Question(Example("0", ("zero",), label=0), shots)])
  before = "<e>Do it.\none: good\ntwo: bad\nzero:"
  assert scorer.given[:2] == [(before, " bad"), (before, " good")]
  assert sorted(scorer.given[2:]) == [("<e>Answer:", " bad"), ("<e>Answer:", " good")]


def test_a_long_prompt_loses_its_beginning_and_is_counted():
  example = Example("0", ("a" * 40,), choices=("b", "c"), label=0)
  scorer = Planted({})
  answers = judge(CHOICE, scorer, context_length=16).ask(questions(example))
  assert (answers.num_prompts, answers.num_cut) == (2, 2)
  assert scorer.given[0] == ("a" * 12 + "\nA:", " b")


def test_the_second_label_is_above_the_threshold():
  cola = load_template("gpt1-cola")
  texts = {"good a": -1.0, "good b": -2.0, "bad a": -3.0, "bad bb": -2.5}
  examples = [
    Example(str(index), (text,), label=int(text.startswith("good")))
    for index, text in enumerate(texts)
  ]
  # Without a start token the first letter has nothing before it, and is not scored.
  scorer = Planted({text[1:]: value for text, value in texts.items()})
  judged = judge(cola, scorer)
  judged.fit(examples)
  assert judged.threshold == pytest.approx(-2.5)
  answers = judged.ask(questions(*examples))
  assert answers.metrics == {"matthews": 1, "accuracy": 1}
  assert scorer.given[0] == ("g", "ood a")
  judged.threshold = -3.5
  assert judged.ask(questions(*examples)).metrics == {"matthews": 0, "accuracy": 0.5}


def test_the_two_words_of_sst2_after_very():
  sst2 = load_template("gpt1-sst2")
  scorer = Planted({" positive": -0.5, " negative": -0.4})
  answers = judge(sst2, scorer).ask(questions(Example("0", ("a film",), label=1)))
  # Two words of nine letters and the same number of tokens here; the sum decides.
  assert answers.lines[0]["prediction"] == 0
  assert scorer.given[0] == ("a film very", " negative")


def test_winograd_scores_what_comes_after_the_referent():
  winograd = load_template("gpt1-winograd")
  example = Example("0", ("It is as _ is big.",), choices=("a cup", "an egg"), label=1)
  scorer = Planted({("It is as an egg", " is big."): -0.5})
  answers = judge(winograd, scorer).ask(questions(example))
  assert answers.metrics == {"accuracy": 1}
  assert scorer.given[:2] == [("It is as a cup", " is big."), ("It is as an egg", " is big.")]


def test_a_score_is_the_mean_of_numbers_weighted_by_likelihood():
  text = 'prompt = "{text}?"\n[answers]\n0 = "a"\n5 = "b"\n[data]\nfamily = "classification"\n'
  asked = template(text + 'target = "score"\nscore_range = [0.0, 5.0]')
  scorer = Planted({("x?", " a"): math.log(0.3) / 2, ("x?", " b"): math.log(0.1) / 2})
  examples = Example("0", ("x",), label=1.0), Example("1", ("y",), label=5.0)
  shot = Question(Example("2", ("z",), label=1.4), (Example("3", ("w",), label=2.6),))
  answers = judge(asked, scorer).ask([*questions(*examples), shot])
  assert answers.is_right_N is None
  assert set(answers.metrics) == {"pearson", "spearman"}
  by_token = [0.3**0.5, 0.1**0.5]
  assert answers.lines[0]["prediction"] == pytest.approx(5 * by_token[1] / sum(by_token))
  assert answers.lines[1]["prediction"] == pytest.approx(2.5)
  # The shot says the nearest number.
  assert ("w? b\n\nz?", " a") in scorer.given


def protocol(**changes):
  return PromptProtocol("t", **{"template": template(LABELS), "seed": 3} | changes)


EXAMPLES = [
  Example(str(index), (letter,), label=index % 2) for index, letter in enumerate("abcdef")
]


def shots_of(orders):
  return [[tuple(shot.id for shot in question.shots) for question in order] for order in orders]


def test_shots_are_drawn_without_the_question_and_orders_are_of_one_draw():
  asked = ask(EXAMPLES, EXAMPLES, protocol(shots=3, orders=4))
  orders = shots_of(asked)
  assert [question.example for question in asked[0]] == EXAMPLES
  for index, tried in enumerate(zip(*orders)):
    assert len(set(tried)) == 4
    assert len({frozenset(shots) for shots in tried}) == 1
    assert len(set(tried[0])) == 3 and str(index) not in tried[0]
  # Each question has a draw of its own; over all of them every example is drawn.
  assert len({frozenset(shots) for shots in orders[0]}) > 2
  assert {shot for shots in orders[0] for shot in shots} == set("012345")


def test_draws_follow_the_seed_alone():
  one = shots_of(ask(EXAMPLES, EXAMPLES, protocol(shots=2)))[0]
  assert shots_of(ask(EXAMPLES, EXAMPLES, protocol(shots=2, orders=2)))[0] == one
  assert shots_of(ask(EXAMPLES, EXAMPLES, protocol(shots=2, seed=4)))[0] != one
  # All of a pool of others, also the one with the question's number.
  pool = EXAMPLES[:2]
  for shots in shots_of(ask(EXAMPLES, pool, protocol(shots=2, train=("f.tsv",))))[0]:
    assert set(shots) == {"0", "1"}
  # Of few questions, the shots are drawn from all examples.
  for index, shots in enumerate(shots_of(ask(EXAMPLES[:2], EXAMPLES, protocol(shots=5)))[0]):
    assert set(shots) == set("012345") - {str(index)}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"shots": 6}, "shots is 6, and there are 5 examples"),
    ({"shots": -1}, "shots is -1"),
    ({"shots": 2, "orders": 3}, "orders is 3, and 2 shots have 2"),
    ({"orders": 2}, "orders is 2, and 0 shots have 1"),
    ({"train": ("f.tsv",)}, "train has no effect without shots"),
    ({"seed": -1}, "seed is -1"),
    ({"limit": 0}, "limit is 0"),
    ({"start": "eos"}, 'start is "eos"'),
    ({"template": load_template("gpt1-cola")}, "fits a threshold to training examples"),
    ({"template": load_template("gpt1-cola"), "shots": 1}, "shots is 1, which has no effect"),
  ],
)
def test_protocols_that_do_not_fit_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message):
    ask(EXAMPLES, EXAMPLES, protocol(**changes))


@pytest.fixture(scope="module")
def model():
  config = make_config("gpt2", vocab_size=TOKENIZER.vocab_size, context_length=48)
  ids = {"bos": (), "eos": (TOKENIZER.end_id,), "pad": ()}
  return Loaded(config, make_params(config, gain=2.0), TOKENIZER, ids)


@pytest.fixture(scope="module")
def scorer(model):
  return Scorer(model)


@pytest.fixture(scope="module")
def files(tmp_path_factory, model):
  """A run, a file of choices, and one of questions that the model answers in its own words."""
  folder = tmp_path_factory.mktemp("prompts")
  save_run(folder / "run", model.config, model.params, model.tokenizer)
  rng = np.random.default_rng(0)
  words = ["cup", "big egg", "a", "do it", "he"]
  with (folder / "choice.jsonl").open("w") as file:
    for _ in range(12):
      text, *choices = rng.choice(words, 4, replace=False)
      record = {"text": text, "choices": choices[: rng.integers(2, 4)], "label": 1}
      file.write(json.dumps(record) + "\n")
  asked = ["cup", "egg", "is it", "do"]
  prompts = [TOKENIZER.encode(f"Q: {question}\nA:") for question in asked]
  options = DecodingOptions(max_new_tokens=32, stop=("\n",))
  texts = complete(make_generator(model), prompts, options, batch_size=3)
  assert len(set(texts)) > 1
  with (folder / "qa.jsonl").open("w") as file:
    for question, text in zip(asked, [*texts[:3], "never"], strict=True):
      file.write(json.dumps({"question": question, "answer": text.strip() or "x"}) + "\n")
  return folder


def test_the_likelihoods_are_those_of_the_scorer_whatever_the_batch(model, scorer, files):
  lines, small = [], []
  asked = PromptProtocol("choice", load_template("choice"))
  data = [str(files / "choice.jsonl")]
  found = measure_prompts(data, model, scorer, asked, keep=lines.append)
  again = measure_prompts(data, model, Scorer(model, batch_size=1), asked, keep=small.append)
  assert found["accuracy"] == again["accuracy"]
  for line, other in zip(lines, small, strict=True):
    np.testing.assert_allclose(line["logprobs"], other["logprobs"], rtol=1e-5)
  right = [line["prediction"] == line["label"] for line in lines]
  assert found["accuracy"] == np.mean(right)
  deviation = np.std(right, ddof=1) / np.sqrt(len(right))
  assert found["accuracy_standard_error"] == pytest.approx(deviation)
  assert found["counts"]["examples"] == 12


def test_several_orders_have_a_mean_and_a_deviation(model, scorer, files):
  asked = PromptProtocol("choice", load_template("choice"), shots=3, orders=2, seed=5, limit=3)
  found = measure_prompts([str(files / "choice.jsonl")], model, scorer, asked)
  values = [order["accuracy"] for order in found["orders"]]
  assert found["task"] == "fewshot" and len(values) == 2
  assert found["accuracy"] == pytest.approx(np.mean(values))
  assert found["accuracy_deviation"] == pytest.approx(np.std(values, ddof=1))


def test_completions_are_right_where_they_are_equal(model, scorer, files):
  lines = []
  asked = PromptProtocol("completion", load_template("completion"))
  found = measure_prompts([str(files / "qa.jsonl")], model, scorer, asked, keep=lines.append)
  expected = [line["label"] == line["prediction"] for line in lines]
  assert found["exact_match"] == np.mean(expected) >= 0.5
  assert not expected[-1]


@pytest.mark.slow
def test_a_receipt_is_repeated_and_other_data_are_noticed(files, capsys, tmp_path):
  run, data = str(files / "run"), str(files / "choice.jsonl")
  flags = ["--shots", "2", "--orders", "2", "--seed", "5", "--template", "choice", "--json"]
  assert main(["evaluate", "fewshot", "--model", run, "--data", data, *flags]) == 0
  printed = capsys.readouterr().out
  receipt = json.loads(printed)
  assert receipt["protocol"]["template"]["prompt"] == "{text}"
  assert receipt["by_normalization"].keys() == {
    "none",
    "token",
    "byte",
    "character",
    "unconditional",
  }
  (tmp_path / "receipt.json").write_text(printed)
  again = ["evaluate", "receipt", "--model", run, "--receipt", str(tmp_path / "receipt.json")]
  assert main([*again, "--data", data]) == 0
  assert capsys.readouterr().out == "equal\n"
  (tmp_path / "other.jsonl").write_text(Path(data).read_text().partition("\n")[2])
  assert main([*again, "--data", str(tmp_path / "other.jsonl")]) == 1
  assert "the data is not the same" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["fewshot", "--shots", "12"], "shots is 12, and there are 11 examples to draw them from"),
    (["fewshot", "--shots", "0"], "--shots is 0; it must be at least 1"),
    (["choice", "--template", "copa"], 'no column "premise"'),
    (["choice", "--template", "chioce"], 'did you mean "choice"'),
    (["choice", "--predictions", "no/folder/p.jsonl"], "cannot be written"),
    (["choice", "--normalization", "tokens"], 'did you mean "token"'),
  ],
)
def test_mistakes_are_one_line(files, arguments, message, capsys):
  verb, *rest = arguments
  if "--template" not in rest:
    rest += ["--template", "choice"]
  named = ["--model", str(files / "run"), "--data", str(files / "choice.jsonl")]
  assert main(["evaluate", verb, *named, *rest]) == 2
  lines = capsys.readouterr().err.splitlines()
  assert message in lines[-1] and lines[-1].startswith("gptjax: ")


def test_an_empty_file_and_one_without_examples_are_refused(model, scorer, tmp_path):
  (tmp_path / "empty.jsonl").write_text("")
  asked = PromptProtocol("choice", load_template("choice"))
  with pytest.raises(DataError, match="empty"):
    measure_prompts([str(tmp_path / "empty.jsonl")], model, scorer, asked)
