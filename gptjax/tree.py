"""Named paths of a pytree of dicts: `layers/attention/query/kernel`, and masks over them."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

PyTree = Any


def path_name(path: tuple) -> str:
  """Names a jax key path with slashes: `decoder/layers/mlp/up/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """Returns {path name: leaf} in the tree's own order."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
  """Maps `function(path name, leaf)` over a tree."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path_name(path), leaf), tree)


def split_named(tree: PyTree, pattern: str) -> tuple[PyTree, PyTree]:
  """Parts a tree into (what does not match, what matches), each with None in the others' places.

  Args:
    pattern: regular expression over paths; "" matches nothing.
  """

  def keep(matching):
    return map_named(
      lambda name, leaf: leaf if bool(pattern and re.search(pattern, name)) == matching else None,
      tree,
    )

  return keep(False), keep(True)


def join_named(tree: PyTree, other: PyTree) -> PyTree:
  """Undoes `split_named`."""
  return jax.tree.map(
    lambda leaf, alternative: alternative if leaf is None else leaf,
    tree,
    other,
    is_leaf=lambda leaf: leaf is None,
  )


def match_first(rules: Sequence[tuple[str, Any]], name: str) -> Any:
  """Returns the value of the first rule whose regular expression is found in `name`.

  Raises:
    LookupError: no rule matches. Rules must cover every path, so this is a bug, not bad input.
  """
  for pattern, value in rules:
    if re.search(pattern, name):
      return value
  raise LookupError(f"no rule for {name}")


def count_parameters(tree: PyTree) -> int:
  """Counts the elements of all arrays (or shape structs) of a tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
