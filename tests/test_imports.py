"""The house rules that a reading of the source can enforce, and proofs that they are enforced."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = "ground"
# A room may import from itself and from rooms of a lower number.
FLOORS = {
  GROUND: 0,
  "model": 1,
  "data": 2,
  "checkpoint": 3,
  "generate": 4,
  "evaluate": 5,
  "train": 6,
  "api": 7,
  "serve": 8,
  "sweep": 8,
  "cli": 9,
}
PARALLEL_WORDS = {
  "pmap",
  "shard_map",
  "Mesh",
  "AbstractMesh",
  "make_mesh",
  "set_mesh",
  "use_mesh",
  "get_abstract_mesh",
}
CONFIG_WORDS = {"ConfigDict", "FrozenConfigDict", "ml_collections"}
FOREIGN_TENSOR = re.compile(
  r"\b(transformer\.(h|wte|wpe|ln_f)\b|gpt_neox\.|attn\.(c_attn|c_proj|masked_bias|bias)\b"
  r"|mlp\.c_(fc|proj)\b|ln_[12f]\.(weight|bias)\b|w[tp]e\.weight\b|lm_head\.weight\b)"
)


def package_sources():
  """Returns {dotted name: source} of every module under gptjax/."""
  sources = {}
  for path in sorted((ROOT / "gptjax").rglob("*.py")):
    parts = path.relative_to(ROOT).with_suffix("").parts
    sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
  return sources


def room_of(module):
  """Names the room of a dotted module."""
  parts = module.split(".")
  if len(parts) == 1:
    return "api"  # gptjax/__init__.py is the public interface
  if parts[1] == "__main__":
    return "cli"
  return parts[1] if len(parts) > 2 or parts[1] in FLOORS else GROUND


def imports_of(source, known):
  """Returns the modules of gptjax that a source imports, inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      whole = [f"{node.module}.{alias.name}" for alias in node.names]
      names = [name if name in known else node.module for name in whole]
    else:
      continue
    found.update(name for name in names if name and name.split(".")[0] == "gptjax")
  return found


def relative_imports(sources):
  return [
    f"{module} imports by dots, line {node.lineno}; write gptjax. instead"
    for module, source in sources.items()
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.ImportFrom) and node.level
  ]


def upward_imports(sources):
  """Lists imports of another room that is not below, and folders that are no room."""
  strangers = {room_of(module) for module in sources} - set(FLOORS)
  violations = [f"gptjax/{room} is not a room" for room in sorted(strangers)]
  for module, source in sources.items():
    for imported in sorted(imports_of(source, sources)):
      room, other = room_of(module), room_of(imported)
      if room != other and FLOORS.get(other, 99) >= FLOORS.get(room, 99):
        violations.append(f"{module} ({room}) imports {imported} ({other})")
  return violations


def import_cycles(sources):
  graph = {module: imports_of(source, sources) for module, source in sources.items()}
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    return [" -> ".join(error.args[1])]
  return []


def identifiers(source):
  """Yields the names that code uses, as variables, attributes, or imports; no strings."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Name):
      yield node.id
    elif isinstance(node, ast.Attribute):
      yield node.attr
    elif isinstance(node, ast.alias):
      yield from node.name.split(".")
    elif isinstance(node, ast.ImportFrom):
      yield from (node.module or "").split(".")


def words_outside(sources, words, owner):
  return [
    f"{module} says {word}"
    for module, source in sources.items()
    if module != owner
    for word in sorted(words.intersection(identifiers(source)))
  ]


def foreign_tensor_names(sources):
  """Lists strings outside of checkpoint/ that hold another library's tensor names."""
  return [
    f"{module} knows {match.group()}, line {node.lineno}"
    for module, source in sources.items()
    if room_of(module) != "checkpoint"
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
    if (match := FOREIGN_TENSOR.search(node.value))
  ]


def functions_without_assertion(source):
  """Lists test functions with no assert, no pytest.raises or warns, no assert_* or check_* call."""
  return [
    node.name
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    if not any(_asserts(inner) for inner in ast.walk(node))
  ]


def _asserts(node):
  if not isinstance(node, ast.Call):
    return isinstance(node, ast.Assert)
  name = getattr(node.func, "attr", getattr(node.func, "id", ""))
  # The last two are of Playwright's expect(...).
  return name in ("raises", "warns") or name.startswith(
    ("assert_", "check_", "to_have_", "to_contain_")
  )


def test_rooms_import_only_what_lies_below():
  sources = package_sources()
  assert len(sources) > 5
  assert upward_imports(sources) == []
  assert relative_imports(sources) == []


def test_no_module_imports_itself_in_a_circle():
  assert import_cycles(package_sources()) == []


def test_only_parallel_speaks_of_devices_side_by_side():
  assert words_outside(package_sources(), PARALLEL_WORDS, owner="gptjax.parallel") == []


def test_only_config_touches_a_config_dict():
  assert words_outside(package_sources(), CONFIG_WORDS, owner="gptjax.config") == []


def test_only_checkpoint_knows_foreign_tensors():
  assert foreign_tensor_names(package_sources()) == []


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_every_test_asserts(path):
  assert functions_without_assertion(path.read_text()) == []


@pytest.mark.parametrize(
  "planted",
  [
    {"gptjax.model.planted": "from gptjax.train import loop", "gptjax.train.loop": ""},
    {"gptjax.model.planted": "def f():\n  import gptjax.data.tokenizer"},
    {"gptjax.tree": "from gptjax.model.config import ModelConfig"},
    {"gptjax.data.planted": "import gptjax"},
    {"gptjax.sweep.planted": "from gptjax.serve.app import app"},
    {"gptjax.train.planted": "from gptjax import api", "gptjax.api": ""},
    {"gptjax.misc.planted": ""},
  ],
)
def test_an_upward_import_is_caught(planted):
  assert len(upward_imports(planted)) == 1


def test_downward_imports_are_free():
  allowed = {
    "gptjax.train.step": "from gptjax import parallel\nfrom gptjax.model.config import X",
    "gptjax.train.loop": "import jax\nfrom gptjax.train.step import step",
    "gptjax.cli.main": "import gptjax\nfrom gptjax.serve import app",
    "gptjax.parallel": "",
  }
  assert upward_imports(allowed) == []


def test_a_circle_and_a_dotted_import_are_caught():
  circle = {
    "gptjax.model.a": "from gptjax.model import b",
    "gptjax.model.b": "def f():\n  from gptjax.model.a import g",
  }
  assert len(import_cycles(circle)) == 1
  assert len(relative_imports({"gptjax.model.a": "from . import b\nfrom .b import c"})) == 2


@pytest.mark.parametrize(
  ("words", "source"),
  [
    (PARALLEL_WORDS, "import jax\nf = jax.pmap(g)"),
    (PARALLEL_WORDS, "from jax.experimental.shard_map import shard_map as s"),
    (PARALLEL_WORDS, "from jax.sharding import Mesh as M"),
    (CONFIG_WORDS, "import ml_collections as mc"),
    (CONFIG_WORDS, "def f(config: ConfigDict): ..."),
  ],
)
def test_a_word_out_of_its_file_is_caught(words, source):
  assert words_outside({"gptjax.train.planted": source}, words, owner="gptjax.other") != []
  assert words_outside({"gptjax.other": source}, words, owner="gptjax.other") == []


def test_a_mode_named_in_a_string_is_no_word_of_code():
  source = 'mode = "pmap"  # or a Mesh'
  assert words_outside({"gptjax.train.config": source}, PARALLEL_WORDS, owner="") == []


@pytest.mark.parametrize("name", ["transformer.h", "{x}.attn.c_attn.weight", "ln_f.bias"])
def test_a_foreign_tensor_name_is_caught(name):
  assert len(foreign_tensor_names({"gptjax.model.planted": f"key = f'{name}'"})) == 1
  assert foreign_tensor_names({"gptjax.checkpoint.table": f"key = f'{name}'"}) == []


def test_a_test_without_assertion_is_caught():
  source = """
def test_nothing():
  print(run())

class TestGroup:
  def test_also_nothing(self):
    raises = 1

def test_asserts():
  assert run()

def test_raises():
  with pytest.raises(ValueError):
    run()

def test_helper():
  check_close(run())
  np.testing.assert_allclose(1, 1)

def helper():
  pass
"""
  assert functions_without_assertion(source) == ["test_nothing", "test_also_nothing"]
