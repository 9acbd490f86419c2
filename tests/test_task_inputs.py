"""GPT-1's input transformations: figure 1 by tokens, what is cut, and tokens nobody can spell."""

import dataclasses

import numpy as np
import pytest

from gptjax.data.examples import Example
from gptjax.data.task_config import TaskDataConfig
from gptjax.data.task_inputs import (
  NEW_TOKENS,
  TaskTokens,
  encode_examples,
  find_task_tokens,
  new_tokens,
)
from gptjax.data.tokenizer import load_tokenizer, make_char_tokenizer, train_bpe
from gptjax.errors import ConfigError, DataError

S, D, E = 100, 101, 102
TOKENS = TaskTokens(start=S, delimiter=D, extract=E)


class Letters:
  """A tokenizer of which the id of a letter is its place in the alphabet, and of a space 0."""

  def encode_arrays(self, texts):
    return [np.array([ord(c) - 96 if c != " " else 0 for c in text], np.int32) for text in texts]


def encode(example, family, max_length=64, target=""):
  task = TaskDataConfig(family=family, target=target).task
  return encode_examples([example], task, Letters(), TOKENS, max_length)


def rows(encoded, index=0):
  return [np.concatenate(pieces).tolist() for pieces in encoded.sequences[index]]


@pytest.mark.parametrize(
  ("family", "example", "expected"),
  [
    ("classification", Example("", ("abc",)), [[S, 1, 2, 3, E]]),
    ("classification", Example("", ("a", "b")), [[S, 1, 0, 2, E]]),
    ("entailment", Example("", ("ab",), ("c",)), [[S, 1, 2, D, 3, E]]),
    ("similarity", Example("", ("ab",), ("c",)), [[S, 1, 2, D, 3, E], [S, 3, D, 1, 2, E]]),
    (
      "multiple_choice",
      Example("", ("a", "b"), choices=("c", "de", "f")),
      [[S, 1, 0, 2, D, 3, E], [S, 1, 0, 2, D, 4, 5, E], [S, 1, 0, 2, D, 6, E]],
    ),
  ],
)
def test_sequences_are_those_of_figure_1(family, example, expected):
  encoded = encode(example, family)
  assert rows(encoded) == expected
  assert encoded.num_sequences == len(expected) and encoded.num_cut == 0
  assert encoded.lengths_N.tolist() == [max(map(len, expected))]


@pytest.mark.parametrize(
  ("texts", "max_length", "kept"),
  [
    (("aaaaa", "bbbbb"), 13, (5, 5)),
    (("aaaaa", "bbbbb"), 12, (4, 4)),
    (("aaaaaaaa", "b"), 8, (4, 1)),
    (("a", "bbbbbbbb"), 8, (1, 4)),
    (("aaaa", "bbb"), 9, (3, 3)),
  ],
)
def test_the_longest_text_is_cut_and_no_mark_is_lost(texts, max_length, kept):
  first, second = texts
  encoded = encode(Example("", (first,), (second,)), "entailment", max_length)
  (row,) = rows(encoded)
  assert row == [S] + [1] * kept[0] + [D] + [2] * kept[1] + [E]
  assert encoded.num_cut == (kept != (len(first), len(second)))
  # The original keeps half of the context less two tokens of each text.
  assert min(kept) >= min(max_length // 2 - 2, len(first), len(second))


def test_a_passage_is_cut_before_its_question_and_answers_and_alike_for_all():
  example = Example("", ("p" * 50, "q" * 5), choices=("c" * 10, "d"))
  encoded = encode(example, "multiple_choice", max_length=40)
  first, second = rows(encoded)
  assert len(first) == 40 and encoded.num_cut == 1
  context = [S] + [16] * 21 + [0] + [17] * 5 + [D]
  assert first == [*context, *[3] * 10, E] and second == [*context, 4, E]


def test_a_length_without_room_is_refused():
  example = Example("", ("a", "b"), choices=("c", "d"))
  assert len(rows(encode(example, "multiple_choice", max_length=7))[0]) == 7
  with pytest.raises(ConfigError, match=r"raise data\.max_length"):
    encode(example, "multiple_choice", max_length=5)


def test_labels_are_classes_or_scores():
  task = TaskDataConfig(family="classification").task
  examples = [Example("", ("a",), label=2), Example("", ("a",))]
  labels_N = encode_examples(examples, task, Letters(), TOKENS, 8).labels_N
  assert labels_N.dtype == np.int32 and labels_N.tolist() == [2, 0]
  score = dataclasses.replace(task, target="score")
  examples = [Example("", ("a",), label=2.5)]
  labels_N = encode_examples(examples, score, Letters(), TOKENS, 8).labels_N
  assert labels_N.dtype == np.float32 and labels_N.tolist() == [2.5]


def test_a_pair_makes_the_same_rows_in_both_orders():
  one, other = Example("", ("ab",), ("c",)), Example("", ("c",), ("ab",))
  assert rows(encode(one, "similarity")) == rows(encode(other, "similarity"))
  assert rows(encode(one, "entailment")) != rows(encode(other, "entailment"))


def test_marks_may_be_left_out():
  example = Example("", ("ab",), choices=("c", "d"))
  config = TaskDataConfig(family="multiple_choice", marks=("extract",))
  assert new_tokens(config) == [NEW_TOKENS["extract"]]
  tokens = TaskTokens(None, None, E)
  encoded = encode_examples([example], config.task, Letters(), tokens, 4)
  assert rows(encoded) == [[1, 2, 3, E], [1, 2, 4, E]] and encoded.num_cut == 0
  bare = TaskDataConfig(family="classification", marks=())
  assert find_task_tokens(bpe(), bare) == TaskTokens(None, None, None)
  with pytest.raises(ConfigError, match=r"no effect without \"start\""):
    TaskDataConfig(family="classification", marks=(), start_token="$")


def bpe():
  return train_bpe(["to be or not to be <|start|> $"] * 9, 270)


@pytest.mark.parametrize("make", [bpe, lambda: make_char_tokenizer(["tobe rn<|sa>$"])])
def test_new_tokens_reload_and_no_text_spells_them(tmp_path, make):
  old, config = make(), TaskDataConfig(family="entailment")
  old.save(tmp_path / "old.json")
  grown = load_tokenizer(tmp_path / "old.json", additional_special_tokens=new_tokens(config))
  assert list(grown.added_tokens.values()) == [old.vocab_size + i for i in range(3)]
  assert grown.roles == old.roles
  grown.save(tmp_path / "tokenizer.json")
  loaded = load_tokenizer(tmp_path / "tokenizer.json", additional_special_tokens=new_tokens(config))
  assert loaded.added_tokens == {} and loaded.roles == old.roles
  assert loaded.vocab_size == old.vocab_size + 3
  tokens = find_task_tokens(loaded, config)
  text = f"to be {NEW_TOKENS['start']}"
  example = Example("", (text,), ("$",))
  encoded = encode_examples([example], config.task, loaded, tokens, 64)
  (row,) = rows(encoded)
  marks = {tokens.start, tokens.delimiter, tokens.extract}
  assert [token for token in row if token in marks] == [
    tokens.start,
    tokens.delimiter,
    tokens.extract,
  ]
  assert row[1 : row.index(tokens.delimiter)] == old.encode(text)


def test_roles_may_go_to_tokens_that_are_there():
  tokenizer = bpe()
  config = TaskDataConfig(
    family="entailment", start_token="<|endoftext|>", delimiter_token="$", extract_token="to"
  )
  assert new_tokens(config) == []
  tokens = find_task_tokens(tokenizer, config)
  assert tokens.start == tokenizer.end_id
  assert tokens.delimiter == tokenizer.encode("$")[0]
  assert new_tokens(dataclasses.replace(config, extract_token="")) == [NEW_TOKENS["extract"]]


@pytest.mark.parametrize(
  ("fields", "error", "message"),
  [
    ({}, DataError, r"no \"<\|start\|>\""),
    ({"start_token": "<s>", "delimiter_token": "$", "extract_token": "t"}, ConfigError, "<s>"),
    ({"start_token": "$", "delimiter_token": "$", "extract_token": "t"}, ConfigError, "different"),
  ],
)
def test_a_token_that_is_not_there_is_one_line(fields, error, message):
  with pytest.raises(error, match=message):
    find_task_tokens(bpe(), TaskDataConfig(family="entailment", **fields))
