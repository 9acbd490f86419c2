"""Ready formats of well-known sets: the columns and labels of their official files.

Each is what `data.adapter` names; other splits of the same set have the same format.
"""

from dataclasses import replace

from gptjax.data.task_format import TaskFormat

_STS = TaskFormat(
  family="similarity",
  target="score",
  text_columns=("sentence1",),
  text2_columns=("sentence2",),
  label_column="score",
  score_range=(0.0, 5.0),
  metrics=("pearson", "spearman"),
  file_format="tsv",
)
_NLI = TaskFormat(
  family="entailment",
  text_columns=("sentence1",),
  text2_columns=("sentence2",),
  label_column="gold_label",
  labels=("entailment", "neutral", "contradiction"),
  skipped_labels=("-",),
  file_format="tsv",
)
# Of two texts that say the same or do not.
_PARAPHRASE = TaskFormat(family="similarity", metrics=("f1", "accuracy"), file_format="tsv")
_KEYED_QUESTION = TaskFormat(
  family="multiple_choice",
  text_columns=("question.stem",),
  choice_columns=("question.choices.text",),
  choice_label_column="question.choices.label",
  label_column="answerKey",
  id_columns=("id",),
)

ADAPTERS: dict[str, TaskFormat] = {
  "sst2": TaskFormat(
    family="classification",
    text_columns=("sentence",),
    labels=("negative", "positive"),
    label_values=("0", "1"),
  ),
  "cola": TaskFormat(
    family="classification",
    column_names=("source", "label", "author_mark", "sentence"),
    text_columns=("sentence",),
    labels=("unacceptable", "acceptable"),
    label_values=("0", "1"),
    metrics=("matthews", "accuracy"),
  ),
  "nsmc": TaskFormat(
    family="classification",
    text_columns=("document",),
    id_columns=("id",),
    labels=("negative", "positive"),
    label_values=("0", "1"),
    file_format="tsv",
    # The official files have a few.
    skipped_faults=("empty_text",),
  ),
  "rte": replace(
    _NLI,
    label_column="label",
    labels=("entailment", "not_entailment"),
    id_columns=("index",),
  ),
  "snli": replace(_NLI, id_columns=("pairID",)),
  "mnli": _NLI,
  "qnli": replace(
    _NLI,
    text_columns=("question",),
    text2_columns=("sentence",),
    label_column="label",
    labels=("entailment", "not_entailment"),
    id_columns=("index",),
  ),
  "kornli": _NLI,
  "mrpc": replace(
    _PARAPHRASE,
    text_columns=("#1 String",),
    text2_columns=("#2 String",),
    label_column="Quality",
    labels=("not_equivalent", "equivalent"),
    label_values=("0", "1"),
  ),
  "qqp": replace(
    _PARAPHRASE,
    text_columns=("question1",),
    text2_columns=("question2",),
    label_column="is_duplicate",
    id_columns=("id",),
    labels=("not_duplicate", "duplicate"),
    label_values=("0", "1"),
    # GLUE's file has broken lines and empty questions.
    skipped_faults=("unequal_columns", "empty_text"),
  ),
  "stsb": replace(
    _STS,
    column_names=("genre", "filename", "year", "id", "score", "sentence1", "sentence2"),
  ),
  "korsts": _STS,
  "jsts": replace(_STS, label_column="label", id_columns=("sentence_pair_id",)),
  "copa": TaskFormat(
    family="multiple_choice",
    text_columns=("premise", "question"),
    choice_columns=("choice1", "choice2"),
    id_columns=("idx",),
    # As the question is put in Roemmele et al. 2011.
    wording={
      "question": {
        "cause": "What was the CAUSE of this?",
        "effect": "What happened as a RESULT?",
      }
    },
  ),
  "story_cloze": TaskFormat(
    family="multiple_choice",
    text_columns=tuple(f"InputSentence{number}" for number in range(1, 5)),
    choice_columns=("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"),
    label_column="AnswerRightEnding",
    label_values=("1", "2"),
    id_columns=("InputStoryid",),
  ),
  "commonsenseqa": _KEYED_QUESTION,
  "arc": _KEYED_QUESTION,
  "race": TaskFormat(
    family="multiple_choice",
    text_columns=("article", "questions"),
    choice_columns=("options",),
    label_column="answers",
    label_values=("A", "B", "C", "D"),
    list_columns=("questions", "options", "answers"),
    id_columns=("id",),
    # The official files are .txt, each one JSON object.
    file_format="json",
  ),
  "jcommonsenseqa": TaskFormat(
    family="multiple_choice",
    text_columns=("question",),
    choice_columns=tuple(f"choice{number}" for number in range(5)),
    id_columns=("q_id",),
  ),
}

# Written by what is published of these sets: they have not met a real file yet, and say so.
NOT_RUN = ("mnli", "qnli", "qqp", "story_cloze")
