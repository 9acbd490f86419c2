"""Lines of metrics.jsonl and the trackers."""

import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint.run_directory import RunDirectory
from gptjax.errors import ConfigError
from gptjax.train.metrics import MetricsWriter, make_trackers

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="extra gptjax[tensorboard]")


def test_lines_in_the_run_directory_keep_every_bit(tmp_path):
  run = RunDirectory(tmp_path)
  loss = np.float32(3.1415927)
  with MetricsWriter(run.append_metrics) as writer:
    writer.write(7, seconds=1.5, bad_steps=2, train_loss=jnp.float32(loss), mfu=None)
    writer.write(np.int64(8), train_loss=jnp.float32("nan"), grad_norm=np.float32("inf"))
  first, second = run.read_metrics()
  assert list(first) == ["step", "train_loss", "seconds", "bad_steps"]
  assert np.float32(first["train_loss"]) == loss and first["bad_steps"] == 2
  assert second["step"] == 8
  assert np.isnan(second["train_loss"]) and second["grad_norm"] == float("inf")


class _Recorder:
  def __init__(self):
    self.lines, self.is_closed = [], False

  def write(self, step, values):
    self.lines.append((step, dict(values)))

  def close(self):
    self.is_closed = True


def test_writer_feeds_file_and_trackers():
  lines, tracker = [], _Recorder()
  with MetricsWriter(lines.append, [tracker]) as writer:
    writer.write(1, train_loss=2.0, grad_norm=float("nan"))
  assert lines[0]["step"] == 1 and np.isnan(lines[0]["grad_norm"])
  assert tracker.lines == [(1, {"train_loss": 2.0})]
  assert tracker.is_closed


def _read_scalars(folder):
  """Scalars that TensorBoard would show: a restart hides what lies at its step and later."""
  scalars = {}
  for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]
      if event.HasField("session_log"):
        scalars = {key: value for key, value in scalars.items() if key[1] < event.step}
      for value in event.summary.value:
        if value.HasField("simple_value"):
          assert (value.tag, event.step) not in scalars, "duplicate step"
          scalars[value.tag, event.step] = value.simple_value
  return scalars


def test_tensorboard_resumes_without_duplicates(tmp_path):
  for resume_step, steps in ((0, (10, 20, 30)), (20, (30, 40))):
    trackers = make_trackers(["tensorboard"], str(tmp_path), "{}", resume_step=resume_step)
    with MetricsWriter(lambda line: None, trackers) as writer:
      for step in steps:
        writer.write(step, train_loss=step + resume_step / 1000)
  scalars = _read_scalars(tmp_path / "tensorboard")
  # TensorBoard stores float32.
  expected = {10: 10.0, 20: 20.0, 30: np.float32(30.02), 40: np.float32(40.02)}
  assert scalars == {("train_loss", step): value for step, value in expected.items()}


@pytest.mark.parametrize("name, module", [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_missing_tracker_names_the_extra(monkeypatch, tmp_path, name, module):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ConfigError, match=rf"'\.\[{name}\]'") as error:
    make_trackers([name], str(tmp_path), "{}")
  assert "\n" not in str(error.value)


def test_trackers_refuse_object_stores():
  with pytest.raises(ConfigError, match="gs://bucket/run") as error:
    make_trackers(["tensorboard"], "gs://bucket/run", "{}")
  assert "\n" not in str(error.value)
  assert make_trackers([], "gs://bucket/run", "{}") == []


def test_wandb_is_offline_and_keeps_its_id(monkeypatch, tmp_path):
  monkeypatch.delenv("WANDB_MODE", raising=False)
  calls, logged = [], []
  ids = iter(["first", "second"])
  run = types.SimpleNamespace(
    log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
  )
  fake = types.SimpleNamespace(
    init=lambda **options: calls.append(options) or run,
    util=types.SimpleNamespace(generate_id=lambda: next(ids)),
  )
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for resume_step in (0, 5, 0):
    (tracker,) = make_trackers(
      ["wandb"], str(tmp_path / "run"), '{"seed": 3}', resume_step=resume_step
    )
    tracker.write(resume_step + 1, {"train_loss": 1.0})
    tracker.close()
  assert [call["id"] for call in calls] == ["first", "first", "second"]
  assert calls[0]["mode"] == "offline" and calls[0]["config"] == {"seed": 3}
  assert logged[:2] == [(1, {"train_loss": 1.0}), "end"]
