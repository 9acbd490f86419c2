"""A model that grows by rows computes what it did for the ids it had."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, make_batch, make_config, make_params, make_tokens

from gptjax.errors import ConfigError
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_head, lm_logits
from gptjax.model.parameters import model_specs
from gptjax.model.vocabulary import grow_vocabulary, is_vocabulary
from gptjax.tree import named_leaves

KEY = jax.random.key(3)


def logits_of(params, config, tokens):
  hidden = hidden_states(params["decoder"], make_batch(tokens), config)
  return np.asarray(lm_logits(params, hidden, config))


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
@pytest.mark.parametrize("more", [1, 40])
def test_old_ids_keep_their_logits_and_new_ones_have_rows(family, more):
  config = FAMILIES[family]
  params = make_params(config)
  grown, new_config = grow_vocabulary(params, config, 61 + more, KEY)
  shapes = {name: spec.shape for name, spec in named_leaves(model_specs(new_config)).items()}
  assert {name: leaf.shape for name, leaf in named_leaves(grown).items()} == shapes
  tokens = make_tokens(config)
  before, after = logits_of(params, config, tokens), logits_of(grown, new_config, tokens)
  assert after.shape[-1] == 61 + more
  np.testing.assert_allclose(after[..., :61], before, rtol=1e-5, atol=1e-5)
  table, _ = lm_head(grown, new_config)
  is_tied = table is grown["decoder"]["token_embedding"]["embedding"]
  assert is_tied == (family == "gpt2")
  assert not np.asarray(table[61 + more :]).any()
  tokens[:, 0] = 61
  assert np.isfinite(logits_of(grown, new_config, tokens)).all()


def test_new_rows_are_drawn_as_any_weight_and_repeat():
  config = make_config("gptj", model_dim=48)
  params = make_params(config)
  (grown, _), (again, _), (other, _) = (
    grow_vocabulary(params, config, 1061, key) for key in (KEY, KEY, jax.random.key(4))
  )
  for name in ("decoder/token_embedding/embedding", "lm_head/kernel"):
    rows, same, others = (np.asarray(named_leaves(t)[name])[61:1061] for t in (grown, again, other))
    # 48,000 numbers: their mean and deviation are off by less than 2 %.
    assert rows.std() == pytest.approx(config.init_std, rel=0.02)
    assert abs(rows.mean()) < 0.02 * config.init_std
    np.testing.assert_array_equal(rows, same)
    assert (rows != others).all()
  assert not np.asarray(grown["lm_head"]["bias"][61:1061]).any()


def test_other_leaves_and_dtypes_stay():
  config = FAMILIES["gptj"]
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), make_params(config))
  params["task_head"] = {"kernel": jnp.ones((3, 61))}
  grown, _ = grow_vocabulary(params, config, 70, KEY)
  assert grown["task_head"]["kernel"] is params["task_head"]["kernel"]
  for name, leaf in named_leaves(params).items():
    found = named_leaves(grown)[name]
    assert found.dtype == leaf.dtype
    assert is_vocabulary(name) or found is leaf


@pytest.mark.parametrize("vocab_size", [60, 61])
def test_a_vocabulary_never_shrinks(vocab_size):
  config = FAMILIES["gpt2"]
  with pytest.raises(ConfigError, match="has 61 ids and cannot grow"):
    grow_vocabulary(make_params(config), config, vocab_size, KEY)
