"""One step, two drivers: replicated data parallelism, or a mesh data x fsdp x tensor.

Owns devices, placement of state and batches, compilation, and processes; the only file that says
pmap, Mesh or shard_map. Knows nothing of models, losses, or files.

A step is `step(state, batch, *, axis_name) -> (state, metrics)`, pure, with batch arrays
[A, B, ...]: A micro-batches, always there. It must sum over `axis_name` (jax.lax.psum) what it sums
over rows when `axis_name` is not None, and divide once, after that.
"""

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.errors import ConfigError, check_choice
from gptjax.rendezvous import meet
from gptjax.tree import map_named, match_first

PyTree = Any
# A tuple with, for each dimension, a mesh axis, a tuple of them, or None.
ShardingRules = Sequence[tuple[str, tuple]]

_AXES = ("data", "fsdp", "tensor")
_ROW_AXES = ("data", "fsdp")
# What a dimension of a kernel's operand may be, and the axes that split it.
_AXES_OF_DIMENSION = {"rows": _ROW_AXES, "heads": ("tensor",), None: ()}
# Environments of several processes that jax recognises without a network on other machines.
_DETECTED_CLUSTERS = ("slurm", "gcetpu", "gketpu")


def set_host_devices(num_devices: int) -> None:
  """Makes the CPU show `num_devices` devices; call it before the first jax operation.

  A single one computes in the thread that calls it, whose memory `keep_freed_memory` can keep.

  Raises:
    ConfigError: not positive, or jax already runs with another number.
  """
  if num_devices < 1:
    raise ConfigError(f"train.host_devices is {num_devices}; it must be at least 1")
  try:
    jax.config.update("jax_num_cpu_devices", num_devices)
    jax.config.update("jax_cpu_enable_async_dispatch", num_devices > 1)
  except RuntimeError as error:
    raise ConfigError(
      f"train.host_devices is {num_devices}, but jax already runs with"
      f" {jax.local_device_count('cpu')}; set it before the first jax operation, or to that number"
    ) from error


def initialize_processes(
  coordinator: str = "",
  num_processes: int | None = None,
  process_id: int | None = None,
  timeout_seconds: float = 300,
) -> None:
  """Connects the processes of one run; a single process, nothing given or detected, returns.

  Call it before the first jax operation. TPU pods and SLURM are detected; elsewhere give all three.

  Args:
    coordinator: "host:port" of process 0.
    num_processes, process_id: how many, and which one this is.
    timeout_seconds: how long to wait for the others.

  Raises:
    ConfigError: some of the three are missing or out of range.
    UserError: some processes did not come; the message has their ids.
  """
  given = {
    "train.coordinator": coordinator or None,
    "train.num_processes": num_processes,
    "train.process_id": process_id,
  }
  missing = [flag for flag, value in given.items() if value is None]
  if jax.distributed.is_initialized():
    return
  method = "deactivate"
  if len(missing) == len(given):
    detected = _detect_processes(timeout_seconds)
    if detected is None:
      return
    method, coordinator, num_processes, process_id = detected
  elif missing:
    raise ConfigError(f"several processes need {', '.join(given)}; not set: {', '.join(missing)}")
  if not 0 <= process_id < num_processes:
    raise ConfigError(
      f"train.process_id is {process_id}; it must be from 0 to train.num_processes - 1"
      f" ({num_processes - 1})"
    )
  if num_processes == 1:
    return
  announce = functools.partial(print, file=sys.stderr)
  meet(coordinator, num_processes, process_id, timeout_seconds, announce)
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    initialization_timeout=math.ceil(timeout_seconds),
    cluster_detection_method=method,
  )


def _detect_processes(timeout_seconds: float) -> tuple[str, str, int, int] | None:
  """Returns (method, coordinator, num_processes, process_id) of a cluster jax recognises."""
  # The public jax.distributed.initialize detects and connects at once; the rendezvous has to
  # come between the two.
  from jax._src.clusters import ClusterEnv

  for cluster in ClusterEnv._cluster_types:
    if cluster.name in _DETECTED_CLUSTERS and cluster.is_env_present():
      num_processes = cluster.get_process_count()
      if num_processes == 1:
        return None
      port = os.environ.get("JAX_COORDINATOR_PORT")  # as jax has it
      address = cluster.get_coordinator_address(timeout_seconds, port)
      return cluster.name, address, num_processes, cluster.get_process_id()
  return None


def make_parallel(
  mode: str,
  *,
  mesh_data: int = -1,
  mesh_fsdp: int = 1,
  mesh_tensor: int = 1,
  sharding_rules: ShardingRules = (),
  devices: Sequence[jax.Device] | None = None,
) -> "Parallel":
  """Makes the driver of a run.

  Args:
    mode: "pmap" (each device holds the whole state) or "mesh".
    mesh_data, mesh_fsdp, mesh_tensor: sizes of the mesh; one may be -1: what is left.
    sharding_rules: (regular expression over a path, mesh axes of each dimension); the first that
      matches counts, none is replication. Paths of the optimiser state contain those of the
      parameters, so that one rule serves both. A dimension that its axes do not divide, and an
      array of fewer dimensions than the rule, are replicated.
    devices: a subset, for one process; None is all of them.

  Raises:
    ConfigError: sizes that do not fit the number of devices or processes, or have no effect.
  """
  check_choice("train.mode", mode, ("pmap", "mesh"))
  # Sorted, so that the devices of a process are neighbours.
  devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
  sizes = _mesh_sizes((mesh_data, mesh_fsdp, mesh_tensor), len(devices))
  if mode == "mesh":
    return MeshParallel(sizes, sharding_rules, devices)
  if sizes != (len(devices), 1, 1):
    raise ConfigError(
      f"train.mesh_data x mesh_fsdp x mesh_tensor is {_times(sizes)}, which has no effect in"
      ' train.mode "pmap"; set train.mode to "mesh"'
    )
  return ReplicatedParallel(devices)


def _mesh_sizes(sizes: tuple[int, int, int], num_devices: int) -> tuple[int, int, int]:
  """Replaces the -1 and checks the product."""
  names = "train.mesh_data x mesh_fsdp x mesh_tensor"
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise ConfigError(f"{names} is {_times(sizes)}; sizes are at least 1, and only one may be -1")
  known = math.prod(size for size in sizes if size != -1)
  filled = tuple(num_devices // known if size == -1 else size for size in sizes)
  if math.prod(filled) != num_devices:
    raise ConfigError(
      f"{names} is {_times(sizes)}, which does not fit {num_devices} devices; the product of"
      " the sizes must be that number"
    )
  return filled


def _times(sizes: Sequence[int]) -> str:
  return " x ".join(str(size) for size in sizes)


class Parallel:
  """What a run needs from its devices; made by `make_parallel`.

  Attributes:
    num_devices: of all processes.
    process_index, process_count: which rows to feed here.
    row_multiple: a micro-batch, over all processes, is padded to a multiple of this.
  """

  def __init__(self, mesh: Mesh, row_multiple: int):
    self._mesh = mesh
    self.num_devices = mesh.size
    self.row_multiple = row_multiple
    self.process_index = jax.process_index()
    self.process_count = len({device.process_index for device in mesh.devices.flat})
    # On host CPU devices a second program in flight waits for the first one's collectives, and
    # XLA aborts the process after 40 seconds. Accelerators keep dispatching ahead.
    self._blocks = self.num_devices > 1 and mesh.devices.flat[0].platform == "cpu"

  def init_state(self, init_fn: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Computes `init_fn(*arguments)` where it will live; no device ever holds more than its part.

    The same function, called again for the same shapes, is not compiled again.
    """
    shardings = self._shardings(jax.eval_shape(init_fn, *arguments))
    with self._scope():
      return jax.jit(init_fn, out_shardings=shardings)(*arguments)

  def abstract_state(self, init_fn: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Describes what `for_saving` gives and `from_saved` takes: ShapeDtypeStructs, placed."""
    shapes = jax.eval_shape(init_fn, *arguments)
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      shapes,
      self._saved_shardings(shapes),
    )

  def adopt(self, tree: PyTree) -> PyTree:
    """Puts arrays, the same in every process, where a state of their paths lives."""
    return jax.device_put(tree, self._shardings(tree))

  def shard_batch(self, batch: PyTree, accumulation: int) -> PyTree:
    """Splits this process's rows among micro-batches and devices, and sends them there.

    Row r of R belongs to micro-batch r // ceil(R / accumulation), whatever the number of devices.

    Args:
      batch: numpy arrays [R, ...] with the same R in every process; absent fields are None.
      accumulation: A, the number of micro-batches.

    Returns:
      Arrays that are [A, B, ...] inside the step. Rows that do not divide are padded with zeros,
      among them the loss weights.
    """
    local_multiple = self.row_multiple // self.process_count
    return jax.tree.map(
      lambda rows: self._put_rows(_split_rows(np.asarray(rows), accumulation, local_multiple)),
      batch,
    )

  def collect_rows(self, rows: PyTree, num_rows: int) -> PyTree:
    """Undoes `shard_batch` of one micro-batch, for what a program of `compile_map` gave.

    Returns:
      numpy arrays [num_rows, ...], without the padding.
    """
    return jax.tree.map(lambda leaf: self._join_rows(np.asarray(leaf))[:num_rows], rows)

  def by_process(self, rows: np.ndarray) -> np.ndarray:
    """Deals the rows [R, ...] of one micro-batch, of all devices, to the processes that fed them.

    Returns:
      [process, R / processes, ...], those of a process in the order in which it gave them.
    """
    return rows.reshape(self.process_count, -1, *rows.shape[1:])

  def to_host(self, tree: PyTree) -> PyTree:
    """Copies arrays to numpy, whole, in every process."""

    def copy(leaf):
      if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
      ):
        return multihost_utils.process_allgather(leaf, tiled=True)
      return leaf

    return jax.device_get(jax.tree.map(copy, tree))

  def for_saving(self, state: PyTree) -> PyTree:
    """Gives the view of the state, over all processes, that a checkpoint store takes."""
    return state

  def from_saved(self, state: PyTree) -> PyTree:
    """Undoes `for_saving`, or takes what was restored into `abstract_state`."""
    return state

  def for_decoding(self, params: PyTree) -> PyTree:
    """Gives parameters as one program of this process can use them, copying nothing."""
    return params

  def agree(self, is_wanted: bool) -> bool:
    """Says in every process whether any of them wants something; all must call it together."""
    if self.process_count == 1:
      return is_wanted
    return bool(multihost_utils.process_allgather(np.array(is_wanted)).any())

  def compile_step(self, step: Callable) -> "Program":
    """Compiles `step(state, batch, *, axis_name) -> (state, metrics)`; the state is donated."""
    raise NotImplementedError

  def compile_eval(self, function: Callable) -> "Program":
    """Compiles `function(state, batch, *, axis_name) -> sums`; nothing is donated."""
    raise NotImplementedError

  def compile_map(self, function: Callable) -> "Program":
    """Compiles `function(state, batch, *, axis_name) -> arrays [A, B, ...]` of the batch's rows."""
    raise NotImplementedError

  def _shardings(self, tree: PyTree) -> PyTree:
    raise NotImplementedError

  def _saved_shardings(self, tree: PyTree) -> PyTree:
    return self._shardings(tree)

  def _put_rows(self, rows: np.ndarray) -> jax.Array:
    raise NotImplementedError

  def _join_rows(self, rows: np.ndarray) -> np.ndarray:
    raise NotImplementedError

  def _scope(self) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def _split_rows(rows: np.ndarray, accumulation: int, multiple: int) -> np.ndarray:
  """Returns [A, B, ...] of [R, ...], zero-padded so that `multiple` divides B."""
  per_micro_batch = -(-rows.shape[0] // accumulation)
  padded = -(-per_micro_batch // multiple) * multiple
  no_padding = [(0, 0)] * (rows.ndim - 1)
  rows = np.pad(rows, [(0, per_micro_batch * accumulation - rows.shape[0]), *no_padding])
  rows = rows.reshape(accumulation, per_micro_batch, *rows.shape[1:])
  return np.pad(rows, [(0, 0), (0, padded - per_micro_batch), *no_padding])


class ReplicatedParallel(Parallel):
  """Every device holds the whole state and a part of the rows: jax.pmap."""

  def __init__(self, devices: Sequence[jax.Device]):
    mesh = Mesh(np.array(devices), ("data",))
    super().__init__(mesh, row_multiple=mesh.size)
    # pmap takes and gives arrays of this process's devices only.
    self._replicated = NamedSharding(mesh.local_mesh, PartitionSpec())
    self._by_device = NamedSharding(mesh.local_mesh, PartitionSpec("data"))

  def for_saving(self, state: PyTree) -> PyTree:
    if self.process_count == 1:
      # One copy of each array: of a replicated one, orbax would compile slices to share the work.
      return self.for_decoding(state)
    return multihost_utils.host_local_array_to_global_array(state, self._mesh, PartitionSpec())

  def from_saved(self, state: PyTree) -> PyTree:
    if self.process_count == 1:
      return state
    return multihost_utils.global_array_to_host_local_array(state, self._mesh, PartitionSpec())

  def for_decoding(self, params: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), params)

  def compile_step(self, step: Callable) -> "Program":
    return self._compile(step, out_axes=(None, None), donate_argnums=0)

  def compile_eval(self, function: Callable) -> "Program":
    return self._compile(function, out_axes=None)

  def compile_map(self, function: Callable) -> "Program":
    return self._compile(function, out_axes=0)

  def _compile(self, function: Callable, **options) -> "Program":
    options |= {"axis_name": "data", "devices": list(self._mesh.devices.flat)}
    return Program(
      function,
      "data",
      lambda traced, state: jax.pmap(traced, in_axes=(None, 0), **options),
      self._scope,
      self._blocks,
    )

  def _shardings(self, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: self._replicated, tree)

  def _saved_shardings(self, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: NamedSharding(self._mesh, PartitionSpec()), tree)

  def _put_rows(self, rows: np.ndarray) -> jax.Array:
    num_micro_batches, num_rows = rows.shape[:2]
    num_devices = self._mesh.local_mesh.size
    by_device = rows.reshape(
      num_micro_batches, num_devices, num_rows // num_devices, *rows.shape[2:]
    )
    return jax.device_put(by_device.swapaxes(0, 1), self._by_device)

  def _join_rows(self, rows: np.ndarray) -> np.ndarray:
    return rows.reshape(rows.shape[0] * rows.shape[2], *rows.shape[3:])


class MeshParallel(Parallel):
  """State and rows are split over a mesh by path rules; XLA inserts the communication."""

  def __init__(self, sizes: tuple[int, int, int], rules: ShardingRules, devices):
    mesh = Mesh(arrange(sizes, devices), _AXES, axis_types=(AxisType.Auto,) * 3)
    super().__init__(mesh, row_multiple=sizes[0] * sizes[1])
    self._rules = (*rules, ("", ()))
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._by_row = NamedSharding(mesh, PartitionSpec(None, _ROW_AXES))
    self._check_rows_of_processes(sizes)
    # Each part of the rows is on one device or on several of one process.
    parts = self._by_row.devices_indices_map((1, self.row_multiple)).items()
    owners = {index[1].start or 0: device.process_index for device, index in parts}
    self._parts_by_process = order_by_process(owners)

  def compile_step(self, step: Callable) -> "Program":
    def build(function, state):
      shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
      return jax.jit(function, donate_argnums=0, out_shardings=(shardings, self._replicated))

    return Program(step, None, build, self._scope, self._blocks, depends_on=jax.tree.structure)

  def compile_eval(self, function: Callable) -> "Program":
    def build(function, state):
      return jax.jit(function, out_shardings=self._replicated)

    return Program(function, None, build, self._scope, self._blocks)

  def compile_map(self, function: Callable) -> "Program":
    def build(function, state):
      return jax.jit(function, out_shardings=self._by_row)

    return Program(function, None, build, self._scope, self._blocks)

  def _shardings(self, tree: PyTree) -> PyTree:
    return map_named(
      lambda name, leaf: NamedSharding(
        self._mesh, _fit_spec(match_first(self._rules, name), np.shape(leaf), self._mesh.shape)
      ),
      tree,
    )

  def _put_rows(self, rows: np.ndarray) -> jax.Array:
    num_rows = rows.shape[1] * self.process_count
    shape = (rows.shape[0], num_rows, *rows.shape[2:])
    return jax.make_array_from_process_local_data(self._by_row, rows, shape)

  def _join_rows(self, rows: np.ndarray) -> np.ndarray:
    return rows[0]

  def by_process(self, rows: np.ndarray) -> np.ndarray:
    parts = rows.reshape(self.row_multiple, -1, *rows.shape[1:])
    return super().by_process(parts[self._parts_by_process].reshape(rows.shape))

  def _scope(self) -> contextlib.AbstractContextManager:
    return jax.set_mesh(self._mesh)

  def _check_rows_of_processes(self, sizes: tuple[int, int, int]) -> None:
    local = self._by_row.addressable_devices_indices_map((1, self.row_multiple))
    num_local_parts = len({index[1].start for index in local.values()})
    if num_local_parts * self.process_count != self.row_multiple:
      raise ConfigError(
        f"train.mesh_data x mesh_fsdp is {_times(sizes[:2])}; each of the {self.process_count}"
        " processes must own an equal part of the rows: make the product a multiple of that,"
        " or train.mesh_tensor smaller"
      )


def arrange(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """Lays devices out for a mesh: on one TPU slice along its links, elsewhere by process."""
  is_one_slice = len({getattr(device, "slice_index", 0) for device in devices}) == 1
  if devices[0].platform == "tpu" and is_one_slice:
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  return np.array(devices).reshape(sizes)


def order_by_process(owners: Mapping[int, int]) -> list[int]:
  """Orders parts of the rows by the process that owns them, then by place; {part: process}."""
  return sorted(owners, key=lambda part: (owners[part], part))


def _fit_spec(axes: tuple, shape: tuple[int, ...], mesh_shape: dict[str, int]) -> PartitionSpec:
  """Drops from a rule the axes that do not divide their dimension."""
  if len(axes) > len(shape):
    return PartitionSpec()
  return PartitionSpec(
    *(axis if size % _num_parts(axis, mesh_shape) == 0 else None for axis, size in zip(axes, shape))
  )


def _num_parts(axis: str | tuple[str, ...] | None, mesh_shape: dict[str, int]) -> int:
  names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
  return math.prod(mesh_shape[name] for name in names)


class Program:
  """A compiled step or evaluation: call it with (state, batch) as they lie on the devices.

  Attributes:
    compile_count: how often the function was traced, by calls and by `lower`; it grows when
      something has another shape than before.
  """

  def __init__(self, function, axis_name, build, scope, blocks, depends_on=lambda state: None):
    self._depends_on = depends_on  # what of a state `build` looks at
    self._function, self._axis_name = function, axis_name
    self._build, self._scope, self._blocks = build, scope, blocks
    self._compiled = {}
    self.compile_count = 0

  def __call__(self, state: PyTree, batch: PyTree) -> PyTree:
    with self._scope():
      outputs = self._program(state)(state, batch)
    return jax.block_until_ready(outputs) if self._blocks else outputs

  def lower(self, state: PyTree, batch: PyTree) -> Any:
    """Lowers without running, for `.compile().memory_analysis()`: bytes of one device.

    Args:
      state, batch: arrays or ShapeDtypeStructs with shardings.
    """
    with self._scope():
      return self._program(state).lower(state, batch)

  def _program(self, state: PyTree) -> Callable:
    key = self._depends_on(state)
    if key not in self._compiled:
      self._compiled[key] = self._build(self._trace, state)
    return self._compiled[key]

  def _trace(self, state: PyTree, batch: PyTree) -> PyTree:
    self.compile_count += 1
    return self._function(state, batch, axis_name=self._axis_name)


def per_device(function: Callable, in_dimensions: Sequence, out_dimensions: Any) -> Callable:
  """Runs a kernel that XLA cannot split (cuDNN, Pallas) on each device's rows and heads.

  Under pmap, on one device, and outside of any mesh it is `function` itself.

  Args:
    function: of arrays, returns one array; it must treat rows and heads independently.
    in_dimensions: for each argument a tuple with "rows", "heads" or None for each dimension; an
      absent argument (None) has ().
    out_dimensions: the same for the result.

  Returns:
    A function of the same arguments. Rows or heads that the mesh does not divide, in any of the
    arguments, are computed whole on every device.
  """

  def run(*arrays):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.axis_names != _AXES or AxisType.Auto not in mesh.axis_types:
      return function(*arrays)
    whole = {
      dimension
      for array, dimensions in zip(arrays, in_dimensions, strict=True)
      for size, dimension in zip(np.shape(array), dimensions)
      if size % _num_parts(_AXES_OF_DIMENSION[dimension], mesh.shape)
    }

    def spec(dimensions):
      return PartitionSpec(
        *(None if name in whole else _AXES_OF_DIMENSION[name] or None for name in dimensions)
      )

    # check_vma: kernels do not say how their results vary over devices.
    return jax.shard_map(
      function,
      in_specs=tuple(spec(dimensions) for dimensions in in_dimensions),
      out_specs=spec(out_dimensions),
      check_vma=False,
    )(*arrays)

  return run
