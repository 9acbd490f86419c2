"""Ready formats of well-known sets: the columns and labels of their official files.

Each is what `data.adapter` names; other splits of the same set have the same format. Those in
NOT_RUN have never met a real file.
"""

from gptjax.data.task_format import TaskFormat

_STS_COLUMNS = ("genre", "filename", "year", "id", "score", "sentence1", "sentence2")
_STS = TaskFormat(
  family="similarity",
  target="score",
  text_columns=("sentence1",),
  text2_columns=("sentence2",),
  label_column="score",
  id_columns=("genre", "filename", "year", "id"),
  score_range=(0.0, 5.0),
  metrics=("pearson", "spearman"),
  file_format="tsv",
)

ADAPTERS: dict[str, TaskFormat] = {
  "sst2": TaskFormat(
    family="classification",
    text_columns=("sentence",),
    label_column="label",
    labels=("negative", "positive"),
    label_values=("0", "1"),
  ),
}

NOT_RUN = ("mnli", "qnli", "qqp", "story_cloze")
