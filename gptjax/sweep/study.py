"""The trials of a sweep on an Optuna storage: who runs which, and what came of it.

The only file that knows Optuna. Its `ask` would make a new trial for every worker that comes; here
the trials that are wanted are put into the storage first, each with its index, and a worker takes
one: turning "waiting" into "running" is exclusive in every storage, whatever the machines. A lock
on the trial's run directory tells the running trials whose worker lives from those that were
interrupted, which are gone on with.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import uuid
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.checkpoint.run_directory import is_remote, latest_step
from gptjax.errors import CheckpointError, ConfigError, UserError
from gptjax.sweep.config import Plan
from gptjax.sweep.space import Domain, Setting

try:
  import optuna
  from optuna.storages.journal import JournalFileBackend
  from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError as error:
  raise UserError(
    "sweeps need the package optuna; run `.venv/bin/pip install -e '.[sweep]'`"
  ) from error

STUDY_NAME = "gptjax"
LEAST_VALUES = 4  # of the objective, to say which key decided it
MOST_STARTS = 3  # of a trial from one step: more, and it is what ends its processes
_STATES = {
  TrialState.WAITING: "waiting",
  TrialState.RUNNING: "running",
  TrialState.COMPLETE: "complete",
  TrialState.PRUNED: "pruned",
  TrialState.FAIL: "failed",
}


@dataclasses.dataclass(frozen=True)
class Record:
  """What is known of a trial.

  Attributes:
    index: its place in the sweep, which gives its run directory.
    state: "waiting", "running", "complete", "pruned" or "failed".
    setting: values of the keys that vary; {} before it is drawn.
    seed: of its run; None is the experiment's own.
    value: of the objective; of a pruned trial the last one seen.
    seconds: from the first start to the end; None before.
    reason: why it failed.
    worker: process that runs it, or ran it last: "host:pid".
    starts: completed updates at each start; more than one: it was interrupted.
  """

  index: int
  state: str
  setting: Setting
  seed: int | None
  value: float | None
  seconds: float | None
  reason: str
  worker: str
  starts: tuple[int, ...]

  @property
  def is_finished(self) -> bool:
    return self.state in ("complete", "pruned", "failed")


class Study:
  """A sweep in a storage.

  Args:
    plan: the sweep.
    workdir: its folder, on a disk; run directories of trials are in it.
    url: an Optuna storage URL, or a path of a journal file; "" is a journal in the folder.

  Raises:
    UserError: the storage cannot be opened, or holds another sweep.
  """

  def __init__(self, plan: Plan, workdir: str | os.PathLike, url: str = ""):
    if is_remote(workdir):
      raise ConfigError(
        f'--workdir "{workdir}" is on an object store, which has no locks; give a folder on a disk,'
        " shared where several machines work on one sweep"
      )
    self.workdir = Path(workdir).expanduser()
    self._plan = plan
    self._place = _place(self.workdir)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self._storage = _open_storage(url or str(self.workdir / "journal.log"))
    self._study = optuna.create_study(
      storage=self._storage,
      study_name=STUDY_NAME,
      direction=plan.sweep.direction,
      pruner=_make_pruner(plan),
      load_if_exists=True,
    )
    self._check_identity()
    self._study.set_user_attr(f"place {self._place}", f"{socket.gethostname()}:{self.workdir}")

  def enqueue(self) -> None:
    """Puts the trials that are wanted and not there yet into the storage.

    Two processes that do so at once may both add a trial; the first of an index counts, and the
    others are never looked at.
    """
    known = self._trials()
    for index in range(self._plan.trials):
      if index not in known:
        self._study.enqueue_trial({}, user_attrs={"index": index})

  def records(self) -> list[Record]:
    """Returns what is known of the trials that are wanted, by index."""
    trials = self._trials()
    return [
      self._record(index, trials[index]) for index in sorted(trials) if index < self._plan.trials
    ]

  def compilations(self) -> dict[str, int]:
    """Returns how often each process compiled the training step: {"host:pid": count}."""
    attributes = self._study.user_attrs
    name = "compilations "
    return {
      key.removeprefix(name): value for key, value in attributes.items() if key.startswith(name)
    }

  def set_compilations(self, count: int) -> None:
    """Keeps how often this process compiled the training step."""
    self._study.set_user_attr(f"compilations {worker_name()}", count)

  def importances(self) -> dict[str, float]:
    """Returns each key's share of the objective's variance, the largest first; {} is unknown.

    Keys are those that every complete trial has, with several values.

    Source: fANOVA (Hutter et al. 2014), a random forest's account of the complete trials.
    """
    complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    keys = [
      key
      for key in self._plan.space
      if all(key in trial.params for trial in complete)
      and len({trial.params[key] for trial in complete}) > 1
    ]
    if not keys or len({trial.value for trial in complete}) < LEAST_VALUES:
      return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    shares = optuna.importance.get_param_importances(self._study, evaluator=evaluator, params=keys)
    return {key: float(share) for key, share in shares.items()}

  @contextlib.contextmanager
  def take(self) -> Iterator["Trial | None"]:
    """Takes a trial for as long as the context is open: an interrupted one, else one that waits.

    Yields:
      The trial, or None where there is none to take.
    """
    for index, frozen in self._candidates():
      with _try_lock(self.run_path(index) / ".trial_lock") as is_ours:
        if is_ours and self._claim(frozen):
          yield Trial(self, self._plan, index, frozen._trial_id)
          return
    yield None

  def run_path(self, index: int) -> Path:
    """Returns the run directory of a trial."""
    return self.workdir / "trials" / f"{index:04d}"

  def _trials(self) -> dict[int, FrozenTrial]:
    first: dict[int, FrozenTrial] = {}
    for trial in self._study.get_trials(deepcopy=False):
      first.setdefault(trial.user_attrs["index"], trial)
    return first

  def _record(self, index: int, trial: FrozenTrial) -> Record:
    attributes = trial.user_attrs
    return Record(
      index=index,
      state=_STATES[trial.state],
      setting=attributes.get("setting", {}),
      seed=self._plan.seed(index),
      value=trial.value if trial.state.is_finished() else None,
      seconds=trial.duration.total_seconds() if trial.duration else None,
      reason=attributes.get("reason", ""),
      worker=attributes.get("worker", ""),
      starts=tuple(attributes.get("starts", ())),
    )

  def _candidates(self) -> list[tuple[int, FrozenTrial]]:
    """Lists what may be taken: running trials of this folder first, then those that wait."""
    trials = self._trials()
    wanted = [(index, trials[index]) for index in sorted(trials) if index < self._plan.trials]
    running = [pair for pair in wanted if pair[1].state == TrialState.RUNNING]
    waiting = [pair for pair in wanted if pair[1].state == TrialState.WAITING]
    ours = [pair for pair in running if self._is_here(pair[1])]
    return ours + [pair for pair in waiting if self._is_drawable(pair[0], trials)]

  def _is_here(self, trial: FrozenTrial) -> bool:
    """Says whether a running trial's run directory is in this folder.

    One whose worker died between taking it and saying where is here if all of the sweep is.
    """
    places = [key for key in self._study.user_attrs if key.startswith("place ")]
    place = trial.user_attrs.get("place")
    return place == self._place or (place is None and len(places) == 1)

  def _is_drawable(self, index: int, trials: Mapping[int, FrozenTrial]) -> bool:
    """Says whether the setting of a trial can be known: other seeds wait for the first one's."""
    first = index - index % self._plan.num_seeds
    is_given = self._plan.settings is not None or first == index
    return is_given or "setting" in trials[first].user_attrs

  def _claim(self, frozen: FrozenTrial) -> bool:
    """Makes a trial, whose lock is held, this process's own; False where another was first."""
    state = self._storage.get_trial(frozen._trial_id).state
    if state == TrialState.WAITING:
      with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
        if self._storage.set_trial_state_values(frozen._trial_id, TrialState.RUNNING):
          self._storage.set_trial_user_attr(frozen._trial_id, "place", self._place)
          return True
      return False
    return state == TrialState.RUNNING and frozen.state == TrialState.RUNNING

  def _check_identity(self) -> None:
    """Raises ConfigError unless the storage's sweep is this one; a new one becomes it."""
    here, there = self._plan.identity(), self._study.user_attrs.get("identity")
    if there is None:
      self._study.set_user_attr("identity", here)
    elif there != here:
      raise ConfigError(
        f"the storage holds a sweep of {_difference(json.loads(there), json.loads(here))};"
        " choose another --workdir (and --storage), or the same sweep to go on"
      )


class Trial:
  """A trial that this process runs.

  Attributes:
    index: its place in the sweep.
    setting: values of the keys that vary.
    path: its run directory.
  """

  def __init__(self, study: Study, plan: Plan, index: int, trial_id: int):
    self._owner, self._plan, self.index = study, plan, index
    study._study.sampler = self._sampler()
    self._trial = optuna.trial.Trial(study._study, trial_id)
    self.path = study.run_path(index)
    self.setting = self._suggest()
    self._trial.set_user_attr("setting", self.setting)
    self._trial.set_user_attr("worker", worker_name())
    self._reported = set(study._storage.get_trial(trial_id).intermediate_values)

  @property
  def seed(self) -> int | None:
    return self._plan.seed(self.index)

  def start(self) -> None:
    """Counts a start. Raises UserError where the trial has ended its processes again and again."""
    starts = self._trial.user_attrs.get("starts", [])
    step = latest_step(self.path) or 0
    if starts[-MOST_STARTS:] == [step] * MOST_STARTS:
      raise UserError(
        f"its process was ended {MOST_STARTS} times after step {step}, before the next checkpoint;"
        " perhaps it ran out of memory"
      )
    self._trial.set_user_attr("starts", [*starts, step])

  def report(self, step: int, value: float) -> bool:
    """Takes a value of the objective; returns whether the trial is hopeless."""
    if step in self._reported:  # measured again after an interruption
      return False
    self._reported.add(step)
    self._trial.report(value, step)
    return self._trial.should_prune()

  def complete(self, value: float) -> None:
    """Ends the trial with its value."""
    self._owner._study.tell(self._trial, value)

  def prune(self) -> None:
    """Ends the trial as hopeless."""
    self._owner._study.tell(self._trial, state=TrialState.PRUNED)

  def fail(self, reason: str) -> None:
    """Ends the trial without a value."""
    self._trial.set_user_attr("reason", reason)
    self._owner._study.tell(self._trial, state=TrialState.FAIL)

  def _sampler(self) -> optuna.samplers.BaseSampler:
    """Makes what draws the setting: by the trial's index alone, so that restarts repeat nothing."""
    plan, number = self._plan, self.index // self._plan.num_seeds
    if plan.settings is not None:
      return _Given(plan.settings[number])
    if self.index % plan.num_seeds:
      first = self._owner._trials()[number * plan.num_seeds]
      return _Given(first.user_attrs["setting"])
    make = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
    seeds = np.random.SeedSequence([plan.sweep.sampler_seed, number])
    return make[plan.sweep.method](seed=int(seeds.generate_state(1)[0]))

  def _suggest(self) -> Setting:
    given = self._plan.settings
    keys = given[self.index // self._plan.num_seeds] if given is not None else self._plan.space
    setting: Setting = {}
    for key in keys:
      domain = self._plan.space[key]
      if domain.is_active(setting):
        setting[key] = _suggest(self._trial, key, domain)
    return setting


class _Given(optuna.samplers.BaseSampler):
  """Draws what it was given."""

  def __init__(self, setting: Setting):
    self._setting = setting

  def infer_relative_search_space(self, study, trial):
    return {}

  def sample_relative(self, study, trial, search_space):
    return {}

  def sample_independent(self, study, trial, param_name, param_distribution):
    value = self._setting[param_name]
    is_choice = isinstance(param_distribution, optuna.distributions.CategoricalDistribution)
    return _label(value) if is_choice else value


def worker_name() -> str:
  """Names this process among those of all machines."""
  return f"{socket.gethostname()}:{os.getpid()}"


def _suggest(trial: optuna.Trial, key: str, domain: Domain) -> Any:
  if domain.choices:
    by_label = {_label(choice): choice for choice in domain.choices}
    return by_label[trial.suggest_categorical(key, list(by_label))]
  if domain.is_int:
    return trial.suggest_int(key, domain.low, domain.high, step=domain.step or 1, log=domain.is_log)
  return trial.suggest_float(key, domain.low, domain.high, step=domain.step, log=domain.is_log)


def _label(choice: Any) -> Any:
  """Returns a choice as storages take it: they know no lists."""
  is_plain = choice is None or isinstance(choice, bool | int | float | str)
  return choice if is_plain else json.dumps(choice)


def _make_pruner(plan: Plan) -> optuna.pruners.BasePruner:
  sweep = plan.sweep
  first = sweep.pruner_start_steps or plan.config({}).eval.every_steps
  if sweep.pruner == "median":
    return optuna.pruners.MedianPruner(sweep.pruner_start_trials, n_warmup_steps=first)
  if sweep.pruner == "halving":
    return optuna.pruners.SuccessiveHalvingPruner(first, sweep.pruner_factor)
  return optuna.pruners.NopPruner()


def _open_storage(url: str) -> optuna.storages.BaseStorage:
  if not is_remote(url):
    Path(url).expanduser().parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(JournalFileBackend(str(Path(url).expanduser())))
  try:
    storage = optuna.storages.RDBStorage(url)
    # Optuna leaves connections open, of which Python 3.13 warns.
    weakref.finalize(storage, storage.engine.dispose)
    return storage
  except Exception as error:  # of SQLAlchemy, of a driver that is not installed, of a server
    reason = str(error).strip().splitlines()[0]
    raise ConfigError(
      f'--storage "{url}" cannot be opened: {reason}; give an Optuna storage URL, such as'
      " sqlite:///FILE or mysql://HOST/NAME, or a path"
    ) from error


def _place(workdir: Path) -> str:
  """Returns a name for the folder that no other folder has, on whatever machine."""
  path = workdir / ".place"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with _locked(workdir / ".place_lock"):
      if not path.exists():
        path.write_text(uuid.uuid4().hex)
      return path.read_text()
  except OSError as error:
    raise CheckpointError(
      f'"{workdir}" cannot be written: {error.strerror or error}; choose another --workdir'
    ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  with open(path, "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
  """Yields whether the lock could be had; it dies with its process, however that dies."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
    else:
      yield True


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
  """Says in what two sweeps differ, first of all."""
  if there["sweep"] != here["sweep"]:
    return "another space or method"
  for group, values in here["config"].items():
    for key in values if isinstance(values, dict) else ():
      old, new = there["config"][group].get(key), values[key]
      if old != new:
        return f"another config ({group}.{key} is {old!r} there and {new!r} here)"
  return "another config"
