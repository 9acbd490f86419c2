"""Our weights in transformers' models: by name, without files."""

import numpy as np
import torch
import transformers

from gptjax.checkpoint.export import foreign_tensors
from gptjax.checkpoint.export_config import write_foreign_config

# In files they keep an older name of GPT-NeoX's head.
_MODULE_OF_FILE = {"embed_out.weight": "lm_head.weight"}


def to_hf(params, config) -> dict[str, np.ndarray]:
  """Renames parameters, or gradients, to transformers' modules; linear in the values."""
  tensors = foreign_tensors(config, params)
  return {_MODULE_OF_FILE.get(name, name): tensor for name, tensor in tensors.items()}


def to_file_names(tensors):
  """Renames tensors of transformers' modules as their files name them."""
  is_neox = any(name.startswith("gpt_neox.") for name in tensors)
  renamed = {module: name for name, module in _MODULE_OF_FILE.items()} if is_neox else {}
  return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def make_hf_model(params, config, dtype=torch.float64):
  """Returns a transformers model of a config, with our weights in it, without dropout."""
  fields = write_foreign_config(config)
  model_class = getattr(transformers, fields["architectures"][0])
  options = model_class.config_class(**fields, attn_implementation="eager")
  model = model_class(options).to(dtype).eval()
  tensors = to_hf(params, config)
  parameters = dict(model.named_parameters())
  assert parameters.keys() == tensors.keys()
  with torch.no_grad():
    for name, parameter in parameters.items():
      assert parameter.shape == tensors[name].shape, name
      parameter.copy_(torch.from_numpy(tensors[name]))
  return model


def hf_results(model, tokens_BL):
  """Returns (logits [B, L - 1, V], loss by their own shifting, {name: gradient})."""
  tokens = torch.from_numpy(tokens_BL.astype(np.int64))
  out = model(input_ids=tokens, labels=tokens)
  out.loss.backward()
  gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
  return out.logits[:, :-1].detach().numpy(), float(out.loss.detach()), gradients
