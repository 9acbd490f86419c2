"""Templates: what a file says, what becomes of an example, and what is refused."""

import itertools
import tomllib
from pathlib import Path

import pytest

from gptjax.data.adapters import ADAPTERS
from gptjax.data.examples import Example, make_examples
from gptjax.data.records import read_files
from gptjax.errors import ConfigError
from gptjax.evaluate.templates import load_template, read_template, ready_templates

SETS = Path(__file__).parents[2] / "shared" / "data" / "tasks"
needs_sets = pytest.mark.skipif(not SETS.is_dir(), reason="needs ../shared/data")
# Of each set that is here: its file, its first example as it is put, and the right answer.
PUT = {
  "sst2": (
    "classification/sst2/dev.tsv",
    "Review: it 's a charming and often affecting journey .\nSentiment:",
    " positive",
  ),
  "gpt1-sst2": (
    "classification/sst2/dev.tsv",
    "it 's a charming and often affecting journey . very",
    " positive",
  ),
  "cola": (
    "classification/cola/in_domain_dev.tsv",
    "The sailors rode the breeze clear of the rocks.\nquestion: Is this sentence grammatical?\n"
    "answer:",
    " yes",
  ),
  "gpt1-cola": (
    "classification/cola/in_domain_dev.tsv",
    "",
    "The sailors rode the breeze clear of the rocks.",
  ),
  "rte": (
    "entailment/rte/train.tsv",
    "No Weapons of Mass Destruction Found in Iraq Yet.\nquestion: Weapons of Mass Destruction Found"
    " in Iraq. True or False?\nanswer:",
    " False",
  ),
  "copa": (
    "multiple_choice/copa/train.jsonl",
    "My body cast a shadow over the grass because",
    " the sun was rising.",
  ),
  "jcommonsenseqa": (
    "multiple_choice/jcommonsenseqa_ja/train-v1.3.json",
    "質問: 主に子ども向けのもので、イラストのついた物語が書かれているものはどれ？\n回答:",
    "絵本",
  ),
  "stsb": (
    "similarity/stsb/sts-train.csv",
    "A plane is taking off.\nAn air plane is taking off.\nHow similar are they, from 0 to 5?",
    None,
  ),
  "nsmc": ("classification/nsmc_ko/train.tsv", None, " 긍정"),
  "snli": ("entailment/snli/snli_1.0_dev_subset.jsonl", None, " neither"),
  "kornli": ("entailment/kornli_ko/xnli.dev.ko.tsv", None, " 알 수 없음"),
  "mrpc": ("similarity/mrpc/msr_paraphrase_train.txt", None, " yes"),
  "korsts": ("similarity/korsts_ko/sts-dev.tsv", None, None),
  "jsts": ("similarity/jsts_ja/train-v1.3.json", None, None),
  "commonsenseqa": ("multiple_choice/commonsenseqa/train_rand_split.jsonl", None, " ignore"),
  "arc": (
    "multiple_choice/arc_challenge/ARC-Challenge-Dev.jsonl",
    None,
    " Record the details of the investigation.",
  ),
  "race": ("multiple_choice/race_middle/dev_middle.jsonl", None, " see its color"),
  "gpt1-race": ("multiple_choice/race_middle/dev_middle.jsonl", None, " see its color"),
}


@needs_sets
@pytest.mark.parametrize("name", PUT)
def test_every_example_of_a_real_set_becomes_text(name):
  file, prompt, answer = PUT[name]
  template = load_template(name)
  form = template.data
  records = read_files([str(SETS / file)], form.file_format, form.column_names, form.text_columns)
  examples, _ = make_examples(form, itertools.islice(records, 200), needs_labels=True)
  for example in examples:
    words = template.words(example) or (None,)
    filled = {template.fill(example, word) for word in words}
    assert len(filled) == len(set(words))
    assert all(text for _, text in filled)
  first = examples[0]
  words = template.words(first)
  is_class = form.target == "class" and bool(words)
  put = template.fill(first, words[first.label] if is_class else (words or [None])[0])
  assert prompt is None or put[0] == prompt
  assert answer is None or put[1] == answer


def test_there_is_a_ready_one_for_every_adapter():
  ready = {name: load_template(name) for name in ready_templates()}
  assert set(ADAPTERS) <= set(ready)
  assert {name for name in ready if name.startswith("gpt1-")} == {
    "gpt1-cola",
    "gpt1-sst2",
    "gpt1-race",
    "gpt1-winograd",
  }


CHOICE = '[data]\nfamily = "multiple_choice"\n'
LABELS = '[answers]\nno = "bad"\nyes = "good"\n[data]\nfamily = "classification"\n'


def parse(text):
  return read_template(tomllib.loads(text))


def test_fields_filters_braces_and_spaces():
  template = parse(
    'prompt = "{{{text|no_period}}} is {text|lower_first}: "\nanswer = "{answer}!"\n' + CHOICE
  )
  example = Example("0", ("A dog.",), choices=("x{y}", "z"), label=0)
  # The space before an answer is its own; braces in a text are text.
  assert template.fill(example, "x{y}") == ("{A dog} is a dog.:", " x{y}!")
  assert template.words(example) == ("x{y}", "z")


def test_labels_are_those_of_the_answers_where_nothing_else_says():
  template = parse('prompt = "{text}"\n' + LABELS)
  assert template.data.labels == ("no", "yes")
  assert template.words(Example("0", ("a",), label=1)) == ("bad", "good")


def test_a_blank_parts_the_text():
  template = load_template("gpt1-winograd")
  example = Example("0", ("The cup fits not as _ is big.",), choices=("the cup", "it"), label=0)
  assert template.fill(example, "the cup") == ("The cup fits not as the cup", " is big.")
  for text in ("no blank", "_ and _"):
    with pytest.raises(ConfigError, match="must be there once"):
      template.fill(Example("0", (text,), choices=("a", "b")), "a")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('prompt = "{txt}"\n' + CHOICE, 'the field "{txt}"; did you mean "text"'),
    ('prompt = "{text"\n' + CHOICE, 'prompt has a "{" by itself; write it twice'),
    ('prompt = "{text|upper_first}"\n' + CHOICE, 'did you mean "lower_first"'),
    ('promt = "{text}"\n' + CHOICE, 'unknown config key "promt"; did you mean "prompt"'),
    ('prompt = "a"\nnormalization = "tokens"\n' + CHOICE, 'did you mean "token"'),
    ('prompt = "a"\n[data]\nadaptor = "copa"', 'unknown key "data.adaptor"; did you mean'),
    ('prompt = "a"\n[data]\nadapter = "coppa"', 'did you mean "copa"'),
    ('prompt = "a"', 'data.family is ""'),
    ('prompt = "a"\n[answers]\nx = "y"\n' + CHOICE, "has no effect on multiple choice"),
    ('prompt = "a"\n[answers]\nnegative = "bad"\n[data]\nadapter = "sst2"', '"positive"'),
    ('prompt = "a"\n[answers]\na = "b"\n[data]\nadapter = "stsb"', "named by numbers"),
    ('prompt = "a"\n[data]\nadapter = "sst2"', 'no word for the label "negative"'),
    ('prompt = "a"\nstop = ["."]\n' + CHOICE, "stop is ('.',), which has no effect"),
    ('prompt = "a"\nnum_beams = 0\ndecide = "completion"\n' + LABELS, "num_beams is 0"),
    ('prompt = "{answer}"\ndecide = "completion"\n' + LABELS, "prompt holds {answer}"),
    ('prompt = ""\ndecide = "threshold"\n' + CHOICE, "tells two labels apart"),
    ('prompt = "a"\nanswer = ""\n' + CHOICE, 'answer is ""'),
    ('prompt = "a"\n' + CHOICE + 'text_columns = ["answer"]', 'a column is called "answer"'),
    ('prompt = "{before}"\n' + CHOICE, 'the field "{before}"'),
  ],
)
def test_what_is_no_template_is_refused(text, message):
  with pytest.raises(ConfigError) as caught:
    parse(text)
  assert message in str(caught.value)


def test_a_file_that_is_none_is_named(tmp_path):
  with pytest.raises(ConfigError, match='template "cop" is no file; did you mean "copa"'):
    load_template("cop")
  (tmp_path / "bad.toml").write_text("prompt = ")
  with pytest.raises(ConfigError, match="bad"):
    load_template(str(tmp_path / "bad.toml"))
