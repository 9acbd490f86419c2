"""A pickle machine that cannot run anything: it builds plain containers, numbers and strings.

Python's own Unpickler looks names up and calls what it finds; here a name is only compared with a
table of our own functions, which see only plain values. What the machine builds is bounded too:
the length of the pickle, the number of its instructions, the types that are hashed.

The instructions are those that pickling protocols 2 to 5 write for state dicts.
"""

import mmap
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.checkpoint import lazy_tensor
from gptjax.checkpoint.lazy_tensor import Malformed

# A tensor takes some 50, so this is for 40,000 tensors; each makes at most one small object.
_MAX_INSTRUCTIONS = 2_000_000
_MAX_MARKS = 1000

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
  *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
  *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}

Allowed = Mapping[str, Callable[..., Any]]


class _Global:
  """A name of the allow-list, inert until REDUCE applies it."""

  __slots__ = ("name",)

  def __init__(self, name: str):
    self.name = name


class PickleStream:
  """A part of a mapped file as `pickletools` wants to read it, with a limit on its length."""

  def __init__(self, buffer: mmap.mmap, start: int = 0, stop: int | None = None):
    self._buffer = buffer
    self._place = start
    stop = len(buffer) if stop is None else stop
    self._stop = min(stop, start + lazy_tensor.MAX_INDEX_BYTES)

  def tell(self) -> int:
    """Returns the place in the file."""
    return self._place

  def read(self, count: int) -> bytes:
    """Returns at most `count` bytes; fewer, as a file does, at the end or the limit."""
    start, self._place = self._place, min(self._place + max(count, 0), self._stop)
    return self._buffer[start : self._place]

  def readline(self) -> bytes:
    """Returns the bytes up to the next line feed with it, or to the end. Only names are lines."""
    found = self._buffer.find(b"\n", self._place, self._stop)
    line = self.read((self._stop if found < 0 else found + 1) - self._place)
    if b"\\" in line:
      raise Malformed("its pickle has a name with a backslash")  # pickletools would warn of escapes
    return line


def unpickle(
  stream: PickleStream, allowed: Allowed, load_persistent: Callable[[Any], Any] | None = None
) -> Any:
  """Returns what one pickle describes and leaves the stream after it.

  Args:
    stream: at the start of a pickle.
    allowed: {"module.name": function} of the globals that may be called or referred to. The
      functions get plain values, `Global` names and each other's results, and check them.
    load_persistent: gets the persistent ids.

  Raises:
    Malformed: any other global, any other instruction, or a pickle that is damaged or too large.
  """
  machine = _Machine(allowed, load_persistent)
  try:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
      if count > _MAX_INSTRUCTIONS:
        raise Malformed(f"its pickle has more than {_MAX_INSTRUCTIONS} instructions")
      machine.run(opcode.name, argument)
    return machine.pop()
  except (ValueError, LookupError, TypeError, OverflowError) as error:
    raise Malformed(
      f"its pickle is damaged or cut off ({type(error).__name__} at byte {stream.tell()}); copy or"
      " download it again"
    ) from error


def global_name(value: Any) -> str | None:
  """Returns the "module.name" of an allowed global that was pickled by reference, or None."""
  return value.name if isinstance(value, _Global) else None


class _Machine:
  """The stack, the marks and the memo of one pickle."""

  def __init__(self, allowed: Allowed, load_persistent: Callable[[Any], Any] | None):
    self._allowed = allowed
    self._load_persistent = load_persistent
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []  # the stacks under each mark
    self._memo: dict[int, Any] = {}

  def run(self, name: str, argument: Any) -> None:
    """Executes one instruction."""
    if name in _LITERALS:
      self._stack.append(argument)
    elif name in _CONSTANTS:
      self._stack.append(_CONSTANTS[name])
    elif name in ("BINPUT", "LONG_BINPUT"):
      self._memo[argument] = self._stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
      self._stack.append(self._memo[argument])
    elif (instruction := getattr(self, f"_do_{name.lower()}", None)) is not None:
      instruction(argument)
    else:
      raise Malformed(f"its pickle has the instruction {name}, which no state dict needs")

  def pop(self) -> Any:
    """Takes the top of the stack."""
    return self._stack.pop()

  def _pop_mark(self) -> list[Any]:
    items, self._stack = self._stack, self._below.pop()
    return items

  def _do_proto(self, argument: int) -> None:
    if not 2 <= argument <= 5:
      raise Malformed(f"its pickle has protocol {argument}; 2 to 5 can be read")

  def _do_frame(self, argument: int) -> None:
    """Framing only says how much to read at once."""

  def _do_stop(self, argument: None) -> None:
    """`genops` ends here."""

  def _do_mark(self, argument: None) -> None:
    if len(self._below) > _MAX_MARKS:
      raise Malformed(f"its pickle nests more than {_MAX_MARKS} containers")
    self._below.append(self._stack)
    self._stack = []

  def _do_memoize(self, argument: None) -> None:
    self._memo[len(self._memo)] = self._stack[-1]

  def _do_empty_list(self, argument: None) -> None:
    self._stack.append([])

  def _do_empty_dict(self, argument: None) -> None:
    self._stack.append({})

  def _do_empty_tuple(self, argument: None) -> None:
    self._stack.append(())

  def _do_tuple(self, argument: None) -> None:
    items = self._pop_mark()
    self._stack.append(tuple(items))

  def _do_tuple1(self, argument: None) -> None:
    self._stack[-1:] = [(self._stack[-1],)]

  def _do_tuple2(self, argument: None) -> None:
    second, first = self.pop(), self.pop()
    self._stack.append((first, second))

  def _do_tuple3(self, argument: None) -> None:
    third, second, first = self.pop(), self.pop(), self.pop()
    self._stack.append((first, second, third))

  def _do_append(self, argument: None) -> None:
    self._extend([self.pop()])

  def _do_appends(self, argument: None) -> None:
    self._extend(self._pop_mark())

  def _extend(self, items: list[Any]) -> None:
    if type(self._stack[-1]) is not list:
      raise Malformed("its pickle appends to something that is no list")
    self._stack[-1].extend(items)

  def _do_setitem(self, argument: None) -> None:
    value, key = self.pop(), self.pop()
    self._update([(key, value)])

  def _do_setitems(self, argument: None) -> None:
    items = self._pop_mark()
    self._update(list(zip(items[::2], items[1::2], strict=True)))

  def _update(self, pairs: list[tuple[Any, Any]]) -> None:
    if type(self._stack[-1]) is not dict:
      raise Malformed("its pickle sets items of something that is no dict")
    self._stack[-1].update(checked_pairs(pairs))

  def _do_global(self, argument: str) -> None:
    self._push_global(*argument.split(" ", 1))

  def _do_stack_global(self, argument: None) -> None:
    name, module = self.pop(), self.pop()
    if not (isinstance(module, str) and isinstance(name, str)):
      raise Malformed("its pickle names a global by something that is no string")
    self._push_global(module, name)

  def _push_global(self, module: str, name: str) -> None:
    full_name = f"{module}.{name}"
    if full_name not in self._allowed:
      raise Malformed(
        f"its pickle asks for the global {lazy_tensor.spell(full_name)}, and only tensors and plain"
        " containers are read, nothing is run; save the state_dict() alone, or as safetensors"
      )
    self._stack.append(_Global(full_name))

  def _do_reduce(self, argument: None) -> None:
    arguments, function = self.pop(), self.pop()
    if not isinstance(function, _Global) or type(arguments) is not tuple:
      raise Malformed("its pickle calls something that is no global")
    self._stack.append(self._allowed[function.name](*arguments))

  def _do_build(self, argument: None) -> None:
    """Drops the attributes of an OrderedDict, where torch notes versions of modules."""
    self.pop()
    if type(self._stack[-1]) is not dict:
      raise Malformed("its pickle sets the state of something that is no dict")

  def _do_binpersid(self, argument: None) -> None:
    if self._load_persistent is None:
      raise Malformed("its pickle refers to a storage where there can be none")
    self._stack.append(self._load_persistent(self.pop()))


def checked_pairs(pairs: list[Any]) -> list[tuple[Any, Any]]:
  """Returns (key, value) pairs; Malformed unless the keys are strings or sizes.

  Hashing a deep tuple would overflow the C stack, and numbers can be chosen to collide.
  """
  for pair in pairs:
    is_pair = type(pair) in (list, tuple) and len(pair) == 2
    if not is_pair or not (isinstance(pair[0], str) or lazy_tensor.is_size(pair[0])):
      raise Malformed("its pickle has a dict whose keys are neither strings nor sizes")
  return [tuple(pair) for pair in pairs]
