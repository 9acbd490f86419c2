"""What a sweep found: settings by their mean over seeds, and which of them differ at all."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence

from scipy import stats

from gptjax.evaluate.statistics import CONFIDENCE, half_width
from gptjax.sweep.space import Setting
from gptjax.sweep.study import Record


@dataclasses.dataclass(frozen=True)
class Group:
  """The trials of one setting, which differ by seed alone.

  Attributes:
    setting: without the seed.
    records: of its trials.
  """

  setting: Setting
  records: tuple[Record, ...]

  @property
  def values(self) -> dict[int | None, float]:
    """{seed: objective} of the complete trials."""
    return {_seed(r): r.value for r in self.records if r.state == "complete"}

  @property
  def mean(self) -> float | None:
    return statistics.mean(self.values.values()) if self.values else None

  @property
  def half_width(self) -> float | None:
    """Half of the 95 % interval of the mean (Student); None for fewer than two seeds."""
    return half_width([*self.values.values()])


def group_by_setting(records: Sequence[Record], direction: str) -> list[Group]:
  """Groups drawn trials; first the settings that most seeds have completed, the best one first."""
  by_setting: dict[str, list[Record]] = {}
  for record in records:
    if record.setting:
      by_setting.setdefault(json.dumps(_without_seed(record.setting)), []).append(record)
  groups = [
    Group(_without_seed(members[0].setting), tuple(members)) for members in by_setting.values()
  ]
  sign = 1 if direction == "minimize" else -1

  def rank(group: Group):
    return -len(group.values), sign * group.mean if group.values else math.inf

  return sorted(groups, key=rank)


def p_value(one: Group, other: Group) -> float | None:
  """Returns how likely a difference of means as large as this is by chance; None is unknown.

  A paired t-test over the seeds that both have (they share initial parameters and data), else
  Welch's.
  """
  shared = sorted(one.values.keys() & other.values.keys(), key=str)
  if len(shared) >= 2:
    a, b = ([group.values[seed] for seed in shared] for group in (one, other))
    differences = [x - y for x, y in zip(a, b)]
    if len(set(differences)) == 1:
      return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_rel(a, b).pvalue)
  a, b = list(one.values.values()), list(other.values.values())
  if len(a) < 2 or len(b) < 2:
    return None
  return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def as_good_as_best(groups: Sequence[Group]) -> list[Group]:
  """Returns the settings that the best one, groups[0], cannot be told from."""
  return [
    group
    for group in groups[1:]
    if (p := p_value(groups[0], group)) is not None and p >= 1 - CONFIDENCE
  ]


def _seed(record: Record) -> int | None:
  return record.setting.get("seed", record.seed)


def _without_seed(setting: Setting) -> Setting:
  return {key: value for key, value in setting.items() if key != "seed"}
