"""Models that transformers saved load without it, and what we save transformers loads: same logits.

Sizes, activations and options are drawn at odd values for each family.
"""

import functools

import jax
import numpy as np
import pytest
from families import FAMILIES, make_batch, make_config, make_params, relative_error

from gptjax.checkpoint.convert import load_foreign
from gptjax.checkpoint.export import save_hf
from gptjax.data.tokenizer import train_bpe
from gptjax.model.decoder import hidden_states
from gptjax.model.heads import lm_logits
from gptjax.model.vocabulary import grow_vocabulary
from gptjax.tree import named_leaves

pytestmark = pytest.mark.hf

TOLERANCE = 1e-5  # both sides are float32
SMALL = {"vocab_size": 61, "n_positions": 24, "n_embd": 24, "n_layer": 2, "n_head": 3}
NEO = {
  "vocab_size": 61,
  "max_position_embeddings": 24,
  "hidden_size": 24,
  "num_layers": 4,
  "num_heads": 3,
  "attention_types": [[["global", "local"], 2]],
  "window_size": 5,
}
NEOX = {
  "vocab_size": 61,
  "max_position_embeddings": 24,
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "intermediate_size": 40,
}
# {name: (class of transformers' config and model, options)}
CASES = {
  "gpt1": ("OpenAIGPT", SMALL),
  "gpt1-silu": ("OpenAIGPT", SMALL | {"afn": "silu", "n_layer": 1}),
  "gpt2": ("GPT2", SMALL),
  "gpt2-options": (
    "GPT2",
    SMALL
    | {"n_inner": 17, "activation_function": "relu", "layer_norm_epsilon": 1e-3, "n_head": 1}
    | {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_layer": 3},
  ),
  "gpt2-unscaled": ("GPT2", SMALL | {"scale_attn_weights": False, "activation_function": "gelu"}),
  "gpt2-untied": ("GPT2", SMALL | {"tie_word_embeddings": False}),
  "gptj": ("GPTJ", SMALL | {"rotary_dim": 4}),
  "gptj-all-rotated": ("GPTJ", SMALL | {"rotary_dim": 8, "n_inner": 40, "n_layer": 1}),
  "gptneo": ("GPTNeo", NEO),
  "gptneo-options": (
    "GPTNeo",
    NEO
    | {"intermediate_size": 40, "window_size": 1, "activation_function": "silu"}
    | {"attention_types": [[["local"], 3], [["global"], 1]], "tie_word_embeddings": False},
  ),
  "gptneox": ("GPTNeoX", NEOX),
  "gptneox-sequential": (
    "GPTNeoX",
    NEOX | {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_fast"},
  ),
  "gptneox-rotary": (
    "GPTNeoX",
    NEOX
    | {"tie_word_embeddings": True, "layer_norm_eps": 1e-3}
    | {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.75}},
  ),
}
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def torch():
  pytest.importorskip("transformers")
  return pytest.importorskip("torch")


def make_theirs(torch, name):
  """Makes a random model in which biases and norms matter too."""
  import transformers

  prefix, options = CASES[name]
  suffix = "LMHeadModel" if prefix in ("GPT2", "OpenAIGPT") else "ForCausalLM"
  ids = {"bos_token_id": None, "eos_token_id": None}
  config = getattr(transformers, f"{prefix}Config")(**options, **ids)
  model = getattr(transformers, f"{prefix}{suffix}")(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.copy_(noise / 4 + (1 if parameter.mean() == 1 else 0))
  return model


def their_logits(torch, model):
  with torch.no_grad():
    return model(input_ids=torch.from_numpy(TOKENS.astype(np.int64))).logits.numpy()


@functools.partial(jax.jit, static_argnames="config")
def our_logits(params, config):
  batch = make_batch(np.pad(TOKENS, ((0, 0), (0, 1))))
  return lm_logits(params, hidden_states(params["decoder"], batch, config), config)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(torch, tmp_path, name):
  """Theirs, ours, theirs again: equal logits, and equal tensors in the end."""
  import transformers

  model = make_theirs(torch, name)
  expected = their_logits(torch, model)
  model.save_pretrained(tmp_path / "theirs")
  config, params = load_foreign(tmp_path / "theirs", report=lambda line: None)
  assert relative_error(our_logits(params, config), expected) < TOLERANCE
  save_hf(tmp_path / "ours", config, params)
  again, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  assert type(again) is type(model)
  # Not bit for bit: an activation may come back by another name of the same function.
  assert relative_error(their_logits(torch, again.eval()), expected) < 1e-6
  tensors, ours = model.state_dict(), again.state_dict()
  assert tensors.keys() == ours.keys()
  assert all(torch.equal(tensors[key], ours[key]) for key in tensors)


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "gptj", "gptneo", "gptneox"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_model_bin(torch, tmp_path, name, zipped):
  """The state dict as transformers 4 saved it, in both of torch's formats, in half precision."""
  model = make_theirs(torch, name)
  halves = {key: tensor.half() for key, tensor in model.state_dict().items()}
  model.load_state_dict(halves)  # not model.half(), which rounds GPT-J's table of angles too
  model.config.save_pretrained(tmp_path)
  torch.save(halves, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
  config, params = load_foreign(tmp_path, report=lambda line: None)
  expected = their_logits(torch, model)
  assert relative_error(our_logits(params, config), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "gptj", "gptneo", "gptneox"])
def test_a_perturbed_tensor_is_noticed(torch, tmp_path, name):
  """The companion: moving one entry of any array of ours moves the logits."""
  model = make_theirs(torch, name)
  expected = their_logits(torch, model)
  model.save_pretrained(tmp_path)
  config, params = load_foreign(tmp_path, report=lambda line: None)
  for path, leaf in named_leaves(params).items():
    node = wrong = jax.tree.map(lambda a: a, params)
    *parents, last = path.split("/")
    for parent in parents:
      node = node[parent]
    first = (TOKENS[0, 0],) if "token_embedding" in path else (0,)
    node[last] = leaf.at[(*first, *(0,) * (leaf.ndim - 1))].add(0.5)
    if path.endswith("key/bias"):
      continue  # adds the same to all scores of a query, which softmax does not see
    assert relative_error(our_logits(wrong, config), expected) > 3 * TOLERANCE, path


@pytest.mark.parametrize("family", ["gpt1", "gpt2", "gptj", "gptneo", "gptneox"])
def test_our_models_in_shards(torch, tmp_path, family):
  import transformers

  config = FAMILIES[family]
  params = make_params(config)
  save_hf(tmp_path / "x", config, params, max_shard_bytes=15_000)
  assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 2
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
  assert relative_error(our_logits(params, config), their_logits(torch, model)) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_a_model_that_grew(torch, tmp_path, family):
  import transformers

  config = make_config(family, vocab_multiple=128)
  params, config = grow_vocabulary(make_params(config), config, 150, jax.random.key(0))
  save_hf(tmp_path / "ours", config, params)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
  expected = their_logits(torch, model)
  assert expected.shape[-1] == 150
  assert relative_error(our_logits(params, config), expected) < TOLERANCE


def test_biases_we_do_not_have(torch, tmp_path):
  """nanoGPT's models without biases, with its exact gelu, in a GPT-2 of transformers."""
  import transformers

  no_biases = dict.fromkeys(("norm_bias", "qkv_bias", "attention_output_bias", "mlp_bias"), False)
  config = make_config("gpt2", activation="gelu", **no_biases)
  params = make_params(config)
  save_hf(tmp_path / "x", config, params)
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
  assert relative_error(our_logits(params, config), their_logits(torch, model)) < TOLERANCE


def test_the_tokenizer_and_generation(torch, tmp_path):
  """AutoTokenizer reads our folder, and generate stops at our end token."""
  import transformers

  tokenizer = train_bpe(["to be or not to be"] * 5, 300, "<|endoftext|>")
  config = make_config("gpt2", vocab_size=tokenizer.vocab_size)
  save_hf(tmp_path / "x", config, make_params(config), tokenizer)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
  text = "not to be, or to be? 日本"
  assert theirs(text)["input_ids"] == tokenizer.encode(text)
  assert theirs.decode(tokenizer.encode(text)) == text
  assert theirs.eos_token_id == tokenizer.end_id
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x")
  assert model.generation_config.eos_token_id == tokenizer.end_id
