"""Labelled sets: every kind of file, every adapter on its real files, each fault in one line."""

import dataclasses
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from gptjax.config import apply_overrides, from_mapping, to_config_dict
from gptjax.data.adapters import ADAPTERS, NOT_RUN
from gptjax.data.examples import Example
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_format import check_format
from gptjax.data.tasks import MOST_FOUND_LABELS, load_task, read_examples
from gptjax.errors import ConfigError, DataError

TASKS = Path(__file__).parents[2] / "shared" / "data" / "tasks"
needs_shared = pytest.mark.skipif(not TASKS.is_dir(), reason="needs ../shared/data")

TEXTS = ['said "no', "日本語 text", "third 😀"]
LABELS = ["b", "a", "b"]


def config_of(path, **fields):
  return TaskDataConfig(**({"family": "classification", "files": (str(path),)} | fields))


def read(path, **fields):
  """Reads a file as it is read for prediction, all labels known or none."""
  examples, _ = read_examples(config_of(path, **fields), (str(path),), needs_labels=True)
  return examples


def write_table(path, rows, separator="\t"):
  path.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))
  return path


def write_json(path, *records):
  path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
  return path


def records():
  return [{"text": text, "label": label} for text, label in zip(TEXTS, LABELS)]


def write_tsv(path):
  write_table(path, [("text", "label"), *zip(TEXTS, LABELS)])


def write_marked_tsv(path):
  write_tsv(path)
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def write_csv(path):
  quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
  write_table(path, [("text", "label"), *zip(quoted, LABELS)], separator=",")


def write_lines(path):
  write_json(path, *records())


def write_list(path):
  path.write_text(json.dumps(records(), indent=2))


def write_compressed(path):
  path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n\n" for r in records()).encode()))


def write_parquet(path):
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records()), path)


@pytest.mark.parametrize(
  ("name", "write"),
  [
    ("a.tsv", write_tsv),
    ("a.tsv", write_marked_tsv),
    ("a.csv", write_csv),
    ("a.jsonl", write_lines),
    ("a.json", write_lines),
    ("a.json", write_list),
    ("a.jsonl.gz", write_compressed),
    ("a.parquet", write_parquet),
  ],
)
def test_every_kind_of_file_has_the_same_examples(tmp_path, name, write):
  write(tmp_path / name)
  examples = read(tmp_path / name, labels=("a", "b"))
  assert [example.text for example in examples] == [(text,) for text in TEXTS]
  assert [example.label for example in examples] == [1, 0, 1]
  assert [example.id for example in examples] == ["0", "1", "2"]


def test_one_record_over_several_lines_is_one_example(tmp_path):
  (tmp_path / "a.txt").write_text(json.dumps(records()[0], indent=1))
  (example,) = read(tmp_path / "a.txt", file_format="json", labels=("a", "b"))
  assert example == Example("0", (TEXTS[0],), label=1)


def test_a_table_without_header_takes_names_from_the_left(tmp_path):
  names = {"column_names": ("label", "text"), "file_format": "tsv", "labels": ("a", "b")}
  file = write_table(tmp_path / "a.csv", [("a", "x"), ("b", "y", "more")])
  assert [example.text for example in read(file, **names)] == [("x",), ("y",)]
  # A header that names the texts is a header all the same.
  file = write_table(tmp_path / "b.tsv", [("text", "id", "label"), ("x", "7", "b")])
  assert read(file, **names) == [Example("0", ("x",), label=1)]


def test_labels_found_in_training_are_kept_in_the_config(tmp_path):
  file = write_table(tmp_path / "a.tsv", [("text", "label"), ("x", 10), ("y", 9), ("z", "no")])
  data = load_task(config_of(file))
  assert data.task.labels == data.config.labels == ("9", "10", "no")
  again = from_mapping(TaskDataConfig, dataclasses.asdict(data.config))
  assert again == data.config and again.task == data.task


def test_labels_of_json_are_spelled_as_text(tmp_path):
  file = write_json(tmp_path / "a.jsonl", *({"text": "x", "label": v} for v in (1.0, 0, True)))
  examples = read(file, labels=("no", "yes", "true"), label_values=("0", "1", "true"))
  assert [example.label for example in examples] == [1, 0, 2]


def test_whole_numbers_are_one_label_however_they_are_written(tmp_path):
  table = write_table(tmp_path / "a.tsv", [("text", "label"), ("x", "1.0"), ("y", "0"), ("z", "9")])
  for labels in (("0", "1"), ("0.0", "1.0")):
    examples = read(table, labels=labels, skipped_labels=("9.0",))
    assert [example.label for example in examples] == [1, 0]
  data = load_task(config_of(table, valid_files=(str(table),), skipped_labels=("9.0",)))
  assert data.task.labels == ("0", "1")


def test_validation_is_drawn_by_text(tmp_path):
  rows = [(f"text {number // 3}", "ab"[number % 2]) for number in range(300)]
  forth = load_task(config_of(write_table(tmp_path / "a.tsv", [("text", "label"), *rows])))
  back = load_task(config_of(write_table(tmp_path / "b.tsv", [("text", "label"), *rows[::-1]])))
  held_out = {example.text for example in forth.valid}
  assert held_out == {example.text for example in back.valid}
  assert not held_out & {example.text for example in forth.train}
  assert (len(forth.train), len(forth.valid), len(held_out)) == (270, 30, 10)
  assert forth.notes == ("30 of the training examples are drawn for validation",)


def test_validation_files_have_the_labels_of_training(tmp_path):
  train = write_table(tmp_path / "a.tsv", [("text", "label"), ("x", "a"), ("y", "b")])
  valid = write_table(tmp_path / "v.tsv", [("text", "label"), ("z", "b")])
  data = load_task(config_of(train, valid_files=(str(valid),)))
  assert data.valid == [Example("0", ("z",), label=1)] and data.notes == ()
  write_table(valid, [("text", "label"), ("z", "c")])
  with pytest.raises(DataError, match=r'v.tsv" line 2: "label" is "c", not in the set'):
    load_task(config_of(train, valid_files=(str(valid),)))


def test_answers_of_every_shape(tmp_path):
  fields = {"family": "multiple_choice", "text_columns": ("q",)}
  wide = [("q", "c0", "c1", "c2", "label"), ("?", "x", "y", "z", 2), ("!", "x", "y", "", 1)]
  examples = read(
    write_table(tmp_path / "a.tsv", wide), choice_columns=("c0", "c1", "c2"), **fields
  )
  assert [(e.choices, e.label) for e in examples] == [(("x", "y", "z"), 2), (("x", "y"), 1)]
  nested = {"q": "?", "answers": {"text": ["x", "y"], "key": [1, 2]}, "label": 2}
  (example,) = read(
    write_json(tmp_path / "b.jsonl", nested),
    choice_columns=("answers.text",),
    choice_label_column="answers.key",
    **fields,
  )
  assert (example.choices, example.label) == (("x", "y"), 1)
  lettered = {"q": "?", "choices": ["x", "y"], "label": "A"}
  (example,) = read(write_json(tmp_path / "c.jsonl", lettered), label_values=("A", "B"), **fields)
  assert (example.choices, example.label) == (("x", "y"), 0)


def test_examples_without_label_are_for_prediction_only(tmp_path):
  file = write_table(tmp_path / "a.tsv", [("text",), ("x",)])
  config = config_of(file, labels=("a", "b"))
  examples, _ = read_examples(config, (str(file),))
  assert examples == [Example("0", ("x",))]
  with pytest.raises(DataError, match='has no column "label"'):
    read_examples(config, (str(file),), needs_labels=True)
  write_table(file, [("text", "label"), ("x", "-1"), ("y", "a")])
  assert [example.label for example in read_examples(config, (str(file),))[0]] == [None, 0]
  with pytest.raises(DataError, match=r'has no "label", but "-1".*name "-1" in data.labels'):
    read_examples(config, (str(file),), needs_labels=True)
  scores = write_table(tmp_path / "b.tsv", [("text", "text2", "label"), ("x", "y", "-1.0")])
  for score_range, known in (((0.0, 5.0), None), ((-1.0, 1.0), -1.0), ((), -1.0)):
    fields = {"family": "similarity", "target": "score", "score_range": score_range}
    ((example,), _) = read_examples(config_of(scores, **fields), (str(scores),))
    assert example.label == known
  question = {"article": "x", "questions": ["?", "!"], "options": [["a", "b"], ["c", "d"]], "id": 1}
  file = write_json(tmp_path / "a.jsonl", question)
  examples, _ = read_examples(TaskDataConfig(adapter="race"), (str(file),))
  assert [(example.id, example.label) for example in examples] == [("1-1", None), ("1-2", None)]


def test_what_is_left_out_is_said(tmp_path):
  rows = [("text", "label"), ("x", "a"), ("", "b"), ("y", "-"), ("z", "b", "more"), ("w", "b")]
  data = load_task(
    config_of(
      write_table(tmp_path / "a.tsv", rows),
      skipped_faults=("empty_text", "unequal_columns"),
      skipped_labels=("-",),
      valid_files=(str(write_table(tmp_path / "v.tsv", [("text", "label"), ("v", "a")])),),
    )
  )
  assert [example.text for example in data.train] == [("x",), ("w",)]
  assert data.notes == (
    "1 examples left out: empty text",
    '1 examples left out: label "-"',
    "1 examples left out: unequal columns",
  )


def test_hub_classes_are_spelled_by_their_names(monkeypatch):
  datasets = pytest.importorskip("datasets")
  features = datasets.Features(
    {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
  )
  rows = [{"text": "x", "label": 1}, {"text": "y", "label": 0}]
  made = datasets.Dataset.from_list(rows, features=features)
  asked = []
  monkeypatch.setattr(
    datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or made
  )
  config = TaskDataConfig(
    family="classification", hub="some/set:part", hub_valid_split="validation", labels=("yes", "no")
  )
  data = load_task(config)
  assert [example.label for example in data.train] == [0, 1]
  assert [kwargs["split"] for _, kwargs in asked] == ["train", "validation"]
  assert asked[0][0] == ("some/set", "part")


CHOICE = {"family": "multiple_choice", "text_columns": ("q",)}
LABELLED = {"labels": ("a", "b")}


@pytest.mark.parametrize(
  ("name", "content", "fields", "message"),
  [
    ("a.tsv", "text\tlabel\nx\tc\n", LABELLED, 'line 2: "label" is "c", not in the set; .*: a, b'),
    ("a.tsv", "texts\tlabel\nx\ta\n", LABELLED, 'no column "text"; did you mean "texts"'),
    ("a.tsv", "text\tlable\nx\ta\n", LABELLED, 'no column "label"; did you mean "lable"'),
    ("a.tsv", "text\tlabel\n \ta\n", LABELLED, 'line 2 has an empty "text"'),
    ("a.tsv", "text\tlabel\nx\t\n", LABELLED, 'has no "label"'),
    ("a.tsv", "text\tlabel\nx\ta\nx\n", LABELLED, "line 3 has 1 columns where 2 are named"),
    ("a.csv", 'text,label\n"x\ny",a\nx,a,b\n', LABELLED, "line 4 has 3 columns where 2"),
    ("a.csv", 'text,label\n"x,a\ny,b\n', {}, "line 3 has 1 columns where 2 are named"),
    ("a.tsv", "text\ttext\tlabel\nx\ty\ta\n", LABELLED, 'has two columns "text"'),
    ("a.tsv", "text\tlabel\n", LABELLED, "no example"),
    ("a.tsv", "text\tlabel\n", {}, "no example"),
    ("a.tsv", "", LABELLED, "is empty"),
    ("a.txt", "x", LABELLED, "unknown kind.*data.file_format"),
    ("a.tsv", "text\tlabel\nx\ta\n", {}, "has 1 different values in training"),
    ("a.tsv", "text\tid\tlabel\nx\t1\ta\ny\t1\tb\n", {"id_columns": ("id",)}, "line 3 has the id"),
    ("a.jsonl", '{"text": "x", "label": "a"}\n{"text"', LABELLED, "line 2 is not JSON"),
    ("a.jsonl", '{"text": "x", "label": "a"}\n[1]', LABELLED, "must be one object"),
    ("a.json", "[1]", LABELLED, "record 1 is 1; it must be a JSON object"),
    ("a.json", '{"text": ', LABELLED, "cannot be read"),
    ("a.jsonl", '{"text": ["x"], "label": "a"}\n', LABELLED, "must be a text"),
    ("a.jsonl", '{"text": NaN, "label": "a"}\n', LABELLED, 'an empty "text"'),
    ("a.jsonl", '{"text": "x", "label": ["a"]}\n', {}, "must be one label"),
    ("a.jsonl", '{"q": "?", "choices": ["x"], "label": 0}\n', CHOICE, "one answer to choose from"),
    ("a.jsonl", '{"q": "?", "choices": [], "label": 0}\n', CHOICE, "no answers to choose from"),
    ("a.jsonl", '{"q": "?", "choices": "x", "label": 0}\n', CHOICE, "must be a list of answers"),
    ("a.jsonl", '{"q": "?", "choices": ["x", ""], "label": 0}\n', CHOICE, 'an empty "choices"'),
    ("a.jsonl", '{"q": "?", "choices": ["x", "y"], "label": 2}\n', CHOICE, '"2", not in the set'),
    (
      "a.jsonl",
      '{"q": ["?", "!"], "choices": [["x", "y"]], "label": 0}\n',
      CHOICE | {"list_columns": ("q", "choices")},
      '2 of "q", 1 of "choices"',
    ),
    (
      "a.jsonl",
      '{"q": "?", "choices": {"text": ["x", "y"], "key": ["A"]}, "label": "A"}\n',
      CHOICE | {"choice_columns": ("choices.text",), "choice_label_column": "choices.key"},
      "each of the 2 answers",
    ),
    (
      "a.tsv",
      "text\ttext2\tlabel\nx\ty\t5.5\n",
      {"family": "similarity", "target": "score", "score_range": (0.0, 5.0)},
      '"5.5"; a score must be a number from 0 to 5',
    ),
    (
      "a.tsv",
      "text\ttext2\tlabel\nx\ty\tnan\n",
      {"family": "similarity", "target": "score"},
      "a score must be a number",
    ),
    (
      "a.jsonl",
      '{"text": "why", "label": "a"}\n',
      LABELLED | {"wording": {"text": {"how": "How?"}}},
      'no words for text "why"',
    ),
  ],
)
def test_a_fault_is_one_line_with_its_place(tmp_path, name, content, fields, message):
  (tmp_path / name).write_text(content)
  with pytest.raises(DataError, match=message) as caught:
    load_task(config_of(tmp_path / name, **fields))
  assert "\n" not in str(caught.value)


def test_too_many_labels_and_a_single_text_are_refused(tmp_path):
  rows = [("text", "label"), *((f"x{n}", f"l{n}") for n in range(MOST_FOUND_LABELS + 1))]
  with pytest.raises(DataError, match=r'more than 200 different values.*target "score"'):
    load_task(config_of(write_table(tmp_path / "a.tsv", rows)))
  rows = [("text", "label"), ("x", "a"), ("x", "b")]
  with pytest.raises(DataError, match=r"none can be held out; give data.valid_files"):
    load_task(config_of(write_table(tmp_path / "a.tsv", rows)))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"adapter": "sst3"}, 'did you mean "sst2"'),
    ({"family": "entailement"}, 'did you mean "entailment"'),
    ({"family": "similarity", "target": "scores"}, 'did you mean "score"'),
    ({"family": "multiple_choice", "target": "score"}, "multiple choice has classes"),
    ({"family": "classification", "text2_columns": ("b",)}, "has no effect"),
    ({"family": "classification", "choice_columns": ("b",)}, "has no effect"),
    ({"family": "classification", "label_values": ("0", "1")}, "has no effect"),
    ({"family": "classification", "score_range": (0.0, 1.0)}, "has no effect"),
    ({"family": "similarity", "target": "score", "labels": ("a", "b")}, "has no effect"),
    ({"family": "classification", "labels": ("a", "a")}, "each must be there once"),
    ({"family": "classification", "labels": ("a",)}, "at least two"),
    ({"family": "classification", "label_column": "text"}, "a text column too"),
    ({"adapter": "sst2", "labels": ("a", "b", "c")}, "give each label its value"),
    ({"adapter": "stsb", "score_range": (5.0, 0.0)}, "lowest, highest"),
    ({"adapter": "stsb", "metrics": ("accuracy",)}, "metrics of a score"),
    ({"adapter": "race", "metrics": ("f1",)}, "metrics of a class"),
    ({"adapter": "snli", "metrics": ("f1",)}, 'use "macro_f1"'),
    ({"adapter": "sst2", "skipped_faults": ("empty",)}, 'did you mean "empty_text"'),
    ({"adapter": "sst2", "wording": {"text": {}}}, "none of the text columns"),
    ({"adapter": "sst2", "file_format": "xls"}, "must be one of: csv, json, tsv"),
    ({"valid_fraction": 0.0}, "valid_fraction"),
    ({"num_buckets": 0}, "num_buckets"),
    ({"max_length": 4}, "max_length"),
    ({"files": ("a",), "hub": "b"}, "keep one"),
    ({"hub": "a", "valid_files": ("b",)}, r"set data\.hub_valid_split"),
    ({"files": ("a",), "hub_valid_split": "b"}, r"without data\.hub"),
  ],
)
def test_a_config_that_does_not_fit_is_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    TaskDataConfig(**fields)


def test_a_task_needs_a_family_and_files():
  with pytest.raises(ConfigError, match=r"name the family of the task, or a data.adapter"):
    load_task(TaskDataConfig(files=("a",)))
  with pytest.raises(ConfigError, match=r"data.files is empty"):
    load_task(TaskDataConfig(adapter="sst2"))


def test_overrides_change_the_files_of_a_task():
  config = to_config_dict(_Group(TaskDataConfig(adapter="sst2", files=("a",), valid_files=("b",))))
  apply_overrides(config, {"data.files": '["c"]', "data.text_columns": '["body"]'})
  assert (config.data.files, config.data.valid_files) == (("c",), ())
  data = from_mapping(_Group, config.to_dict()).data
  assert data.format.text_columns == ("body",) and data.format.labels == ("negative", "positive")


@dataclasses.dataclass(frozen=True)
class _Group:
  data: TaskDataConfig


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_says_all_that_a_task_needs(name):
  form = TaskDataConfig(adapter=name).format
  check_format(form)
  assert form.metrics and form.text_columns and form.label_column
  if form.target == "class" and form.family != "multiple_choice":
    assert len(form.labels) >= 2


# Examples, those left out, and one of them, counted and read by hand.
REAL = [
  ("sst2", "classification/sst2/train.tsv", 67349, 0, (1, "contains no wit , only labored", 0)),
  ("sst2", "classification/sst2/dev.tsv", 872, 0, (1, "unflinchingly bleak and desperate", 0)),
  ("cola", "classification/cola/in_domain_train.tsv", 8551, 0, (0, "Our friends won't buy", 1)),
  ("cola", "classification/cola/in_domain_dev.tsv", 527, 0, (0, "The sailors rode the", 1)),
  ("nsmc", "classification/nsmc_ko/train.tsv", 30000, 0, (1, "이런걸 가져오는 배급사가", 0)),
  ("rte", "entailment/rte/train.tsv", 2490, 0, (0, "No Weapons of Mass", 1)),
  ("snli", "entailment/snli/snli_1.0_dev_subset.jsonl", 1273, 16, (0, "Two women are", 1)),
  ("kornli", "entailment/kornli_ko/xnli.dev.ko.tsv", 2490, 0, (1, "그리고 그가 말했다", 2)),
  ("mrpc", "similarity/mrpc/msr_paraphrase_train.txt", 4076, 0, (1, "Yucaipa owned Domi", 0)),
  ("stsb", "similarity/stsb/sts-train.csv", 5749, 0, (1, "A man is playing a large", 3.8)),
  ("stsb", "similarity/stsb/sts-dev.csv", 1500, 0, (1, "A young child is riding", 4.75)),
  ("korsts", "similarity/korsts_ko/sts-train.tsv", 5749, 0, (1, "한 남자가 큰 플루트를", 3.8)),
  ("korsts", "similarity/korsts_ko/sts-dev.tsv", 1500, 0, (1, "어린아이가 말을", 4.75)),
  ("jsts", "similarity/jsts_ja/train-v1.3.json", 12451, 0, (1, "二人の男性がジャンボ", 3.8)),
  ("copa", "multiple_choice/copa/train.jsonl", 368, 0, (2, "The women met for coffee", 1)),
  ("copa", "multiple_choice/copa/val.jsonl", 100, 0, (0, "The man turned on the", 1)),
  (
    "commonsenseqa",
    "multiple_choice/commonsenseqa/train_rand_split.jsonl",
    9741,
    0,
    (1, "Sammy wanted to go to", 1),
  ),
  (
    "arc",
    "multiple_choice/arc_challenge/ARC-Challenge-Dev.jsonl",
    294,
    0,
    (1, "High-pressure systems stop", 2),
  ),
  ("race", "multiple_choice/race_middle/dev_middle.jsonl", 1436, 0, (1, "What is color?", 2)),
  (
    "race",
    "multiple_choice/race_middle/train_middle.jsonl",
    6068,
    0,
    (3, "Drinking water is good for your health", 1),
  ),
  (
    "jcommonsenseqa",
    "multiple_choice/jcommonsenseqa_ja/train-v1.3.json",
    8939,
    0,
    (1, "未成年者を監護・教育し", 1),
  ),
]


@needs_shared
@pytest.mark.parametrize(
  ("adapter", "file", "num_examples", "num_left_out", "known"),
  [
    pytest.param(
      *row,
      id=Path(row[1]).parent.name + "-" + Path(row[1]).stem,
      marks=pytest.mark.slow if row[2] > 6000 else [],
    )
    for row in REAL
  ],
)
def test_adapters_read_the_real_files(adapter, file, num_examples, num_left_out, known):
  path = str(TASKS / file)
  examples, notes = read_examples(TaskDataConfig(adapter=adapter), (path,), needs_labels=True)
  assert len(examples) == num_examples
  assert notes == ((f'{num_left_out} examples left out: label "-"',) if num_left_out else ())
  index, text, label = known
  assert examples[index].text[0].startswith(text) and examples[index].label == label


@needs_shared
def test_real_questions_are_put_with_their_context():
  folder = TASKS / "multiple_choice"
  (copa, *_), _ = read_examples(
    TaskDataConfig(adapter="copa"), (str(folder / "copa/val.jsonl"),), needs_labels=True
  )
  assert copa == Example(
    "0",
    ("The man turned on the faucet.", "What happened as a RESULT?"),
    choices=("The toilet filled with water.", "Water flowed from the spout."),
    label=1,
  )
  (race, *_), _ = read_examples(
    TaskDataConfig(adapter="race"), (str(folder / "race_middle/dev_middle.jsonl"),)
  )
  assert race.id == "middle13.txt-1" and race.label == 0
  assert race.text[1] == "When something reflects light, we can   _  ."
  assert race.choices == ("see its color", "see its heat", "not see its color", "see nothing")


NLI_HEADER = (
  *("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"),
  *("sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"),
)
STORY_HEADER = (
  *("InputStoryid", "InputSentence1", "InputSentence2", "InputSentence3", "InputSentence4"),
  *("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"),
)


@pytest.mark.parametrize(
  ("adapter", "name", "header", "row", "expected"),
  [
    (
      "mnli",
      "train.tsv",
      NLI_HEADER,
      (0, 31193, "31193n", "government", "(", "(", "(", "(", "One.", "Two.", "neutral", "neutral"),
      Example("0", ("One.",), ("Two.",), label=1),
    ),
    (
      "qnli",
      "train.tsv",
      ("index", "question", "sentence", "label"),
      (7, "When?", 'In "May".', "not_entailment"),
      Example("7", ("When?",), ('In "May".',), label=1),
    ),
    (
      "qqp",
      "train.tsv",
      ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
      (133273, 213221, 213222, "How?", "In which way?", 1),
      Example("133273", ("How?",), ("In which way?",), label=1),
    ),
    (
      "story_cloze",
      "test.csv",
      STORY_HEADER,
      ("b929f263", "One.", '"Two, too."', "Three.", "Four.", "Bad.", "Good.", 2),
      Example("b929f263", ("One.", "Two, too.", "Three.", "Four."), (), ("Bad.", "Good."), 1),
    ),
  ],
)
def test_adapters_that_met_no_real_file_read_their_published_columns(
  tmp_path, adapter, name, header, row, expected
):
  separator = "," if name.endswith(".csv") else "\t"
  file = write_table(tmp_path / name, [header, row], separator)
  config = TaskDataConfig(adapter=adapter, files=(str(file),), valid_files=(str(file),))
  data = load_task(config)
  assert data.train == [expected]
  assert data.notes == (f'adapter "{adapter}" has not met a real file yet: look at some examples',)


def test_adapters_are_run_or_marked():
  assert set(NOT_RUN) == set(ADAPTERS) - {row[0] for row in REAL}
