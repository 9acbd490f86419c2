"""What requests may say and answers do say, as typed models: they check, and make the OpenAPI page.

Requests are strict: no field that is not here, no number in quotes. What OpenAI has and this server
has not is accepted at the value that switches it off, and refused by name otherwise.

Source: OpenAI's API reference, and what its Python client 3.54 sends and reads.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from gptjax.errors import did_you_mean
from gptjax.generate.options import DecodingOptions

MAX_TEXTS = 128
MAX_PROMPTS = 2048
MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 300
# Entries of every other list of a request.
MAX_LISTED = 32

Whole = Annotated[int, Field(ge=0, le=2**31 - 1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Text = Annotated[str, Field(min_length=1, max_length=256)]
Texts = Annotated[list[Text], Field(max_length=MAX_LISTED)]
Ids = Annotated[list[Whole], Field(max_length=MAX_LISTED)]
Run = Annotated[list[Whole], Field(min_length=1, max_length=MAX_LISTED)]
PromptIds = Annotated[list[Whole], Field(min_length=1)]
Prompts = (
  str
  | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
  | PromptIds
  | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)
_HELP = {option.name: option.metadata["help"] for option in dataclasses.fields(DecodingOptions)}

_PARSE = Field(default=True, description="text that spells a special token becomes it, as OpenAI's")


class Strict(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
  """A request, or a part of one.

  Attributes:
    off: {field that this server does not have: values that switch it off}.
    instead: {field that this server does not have: what there is instead}.
  """

  off: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
  instead: ClassVar[Mapping[str, str]] = {}

  @model_validator(mode="before")
  @classmethod
  def _check_names(cls, data: Any) -> Any:
    if not isinstance(data, dict):
      return data
    for name, value in data.items():
      if name in cls.model_fields or any(value == off for off in cls.off.get(name, ())):
        continue
      code = "unsupported_parameter"
      if name in cls.instead:
        text = f'"{name}" is not supported; {cls.instead[name]}'
      elif name in cls.off:
        text = f'"{name}" is not supported; leave it out'
      else:
        code = "unknown_parameter"
        text = f'unknown field "{name}"{did_you_mean(name, cls.model_fields)}'
      facts = {"text": text, "field": name, "code": code}
      raise PydanticCustomError("field", "{text}", facts)
    return {name: value for name, value in data.items() if name in cls.model_fields}


def _option(name: str) -> Any:
  return Field(default=None, description=_HELP[name])


class Decoding(Strict):
  """Decoding options, by the names that `gptjax generate` has for them."""

  instead = {
    "max_new_tokens": 'use "max_tokens"',
    "num_return_sequences": 'use "n"',
    "pad_token_id": "answers are not padded",
    "beyond_context": "a text ends with the context",
    "allowed_tokens": "a function cannot be sent",
    "attention_mask": "prompts are not padded",
    "draft_model": 'use "prompt_lookup_num_tokens"',
    "num_draft_tokens": 'use "prompt_lookup_num_tokens"',
  }

  max_length: Whole | None = _option("max_length")
  min_new_tokens: Whole | None = _option("min_new_tokens")
  min_length: Whole | None = _option("min_length")
  do_sample: bool | None = Field(
    default=None, description="draw tokens; default true, except at temperature 0 and with beams"
  )
  temperature: Annotated[float, Field(ge=0)] | None = _option("temperature")
  top_k: Whole | None = _option("top_k")
  top_p: Probability | None = _option("top_p")
  min_p: Probability | None = _option("min_p")
  typical_p: Annotated[float, Field(gt=0, le=1)] | None = _option("typical_p")
  seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = _option("seed")
  num_beams: Annotated[int, Field(ge=1, le=MAX_LISTED)] | None = _option("num_beams")
  length_penalty: float | None = _option("length_penalty")
  early_stopping: bool | Literal["never"] | None = _option("early_stopping")
  repetition_penalty: Annotated[float, Field(gt=0)] | None = _option("repetition_penalty")
  frequency_penalty: Penalty | None = _option("frequency_penalty")
  presence_penalty: Penalty | None = _option("presence_penalty")
  no_repeat_ngram_size: Whole | None = _option("no_repeat_ngram_size")
  bad_words_ids: Annotated[list[Run], Field(max_length=MAX_LISTED)] | None = _option(
    "bad_words_ids"
  )
  bad_words: Texts | None = _option("bad_words")
  logit_bias: (
    Annotated[
      dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
      Field(max_length=MAX_BIASED_TOKENS),
    ]
    | None
  ) = Field(default=None, description="{token id: number added to its logit}; -100 forbids it")
  suppress_tokens: Ids | None = _option("suppress_tokens")
  begin_suppress_tokens: Ids | None = _option("begin_suppress_tokens")
  forced_bos_token_id: Whole | None = _option("forced_bos_token_id")
  forced_eos_token_id: Whole | Ids | None = _option("forced_eos_token_id")
  eos_token_id: Whole | Literal[-1] | Ids | None = _option("eos_token_id")
  stop: Text | Texts | None = _option("stop")
  prompt_lookup_num_tokens: Annotated[int, Field(ge=0, le=MAX_LISTED)] | None = _option(
    "prompt_lookup_num_tokens"
  )


class StreamOptions(Strict):
  """How a stream ends."""

  off = {"include_obfuscation": (None, False)}

  include_usage: bool = Field(
    default=False, description="a last piece that counts the tokens of all"
  )


class Generating(Decoding):
  """What completions and chats have in common."""

  off = {
    "user": (None,),
    "store": (None, False),
    "metadata": (None, {}),
    "service_tier": (None, "auto", "default"),
    "safety_identifier": (None,),
    "prompt_cache_key": (None,),
  }

  model: str | None = Field(default=None, description="a name of /v1/models; default the model")
  n: Annotated[int, Field(ge=1, le=MAX_TEXTS)] | None = Field(
    default=None, description="texts for each prompt; default 1"
  )
  stream: bool | None = None
  stream_options: StreamOptions | None = None


class CompletionRequest(Generating):
  """A request to continue prompts."""

  off = Generating.off | {"suffix": (None, "")}
  instead = Decoding.instead | {"top_logprobs": 'use "logprobs", a number'}

  prompt: Prompts = Field(description="a text, texts, ids of one prompt, or of several")
  parse_special_tokens: bool = _PARSE
  max_tokens: Whole | None = Field(
    default=None, description="new tokens at most; default 16; 0 with echo scores the prompt"
  )
  best_of: Annotated[int, Field(ge=1, le=MAX_TEXTS)] | None = Field(
    default=None, description="draw this many texts, and answer with the likeliest n"
  )
  echo: bool | None = Field(default=None, description="answer with the prompt, too")
  logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
    default=None, description="log-probabilities of tokens, and of this many alternatives"
  )


class TextPart(Strict):
  """A part of a message."""

  type: Literal["text"]
  text: str


class Message(Strict):
  """A message of a chat."""

  off = {
    "tool_calls": (None, []),
    "refusal": (None,),
    "audio": (None,),
    "function_call": (None,),
    "annotations": (None, []),
    "tool_call_id": (None,),
  }

  role: Literal["system", "developer", "user", "assistant"]
  content: str | list[TextPart]
  name: str | None = None

  def for_template(self) -> dict[str, str]:
    """Returns what a chat template sees: the parts of a content are one text."""
    content = self.content
    if not isinstance(content, str):
      content = "".join(part.text for part in content)
    named = {} if self.name is None else {"name": self.name}
    return {"role": self.role, "content": content} | named


class ChatRequest(Generating):
  """A request to answer in a chat."""

  off = Generating.off | {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
  }

  messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_PROMPTS)]
  max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
    default=None, description="new tokens at most; default as many as the context has room for"
  )
  max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
    default=None, description="the newer name of max_tokens"
  )
  logprobs: bool | None = Field(default=None, description="log-probabilities of tokens")
  top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
    default=None, description="with logprobs, those of this many alternatives"
  )


class EmbeddingRequest(Strict):
  """A request for embeddings."""

  off = {"dimensions": (None,), "user": (None,)}

  input: Prompts = Field(description="a text, texts, ids of one text, or of several")
  model: str | None = None
  encoding_format: Literal["float", "base64"] | None = Field(
    default=None, description="numbers, or little-endian float32 in base64; default float"
  )


class Classified(Strict):
  """A text, and what a task may need beside it."""

  text: str = Field(description="also the premise, the first text, or the context")
  text2: str | None = Field(default=None, description="the hypothesis or second text")
  choices: Annotated[list[str], Field(max_length=MAX_LISTED)] | None = Field(
    default=None, description="answers to choose from"
  )


class ClassifyRequest(Strict):
  """A request for what a fine-tuned model tells of texts."""

  input: str | Annotated[list[str | Classified], Field(min_length=1, max_length=MAX_PROMPTS)] = (
    Field(description="a text or several; with text2 or choices, as the task needs them")
  )
  model: str | None = None


class TokenizeRequest(Strict):
  """A request for the ids of a text."""

  prompt: str
  model: str | None = None
  add_special_tokens: bool = Field(
    default=False, description="what the tokenizer puts around a text, if it does"
  )
  parse_special_tokens: bool = _PARSE


class DetokenizeRequest(Strict):
  """A request for the text of ids."""

  tokens: list[Whole]
  model: str | None = None


class Error(BaseModel):
  """What went wrong, for people (message) and programs (code)."""

  message: str
  type: str
  param: str | None
  code: str | None


class ErrorBody(BaseModel):
  """An answer that is an error."""

  error: Error


class Usage(BaseModel):
  """Tokens read and written; of embeddings nothing is written."""

  prompt_tokens: int
  completion_tokens: int | None = None
  total_tokens: int


class CompletionLogprobs(BaseModel):
  """Entries a token, the prompt's first where it is echoed; the very first has no probability."""

  tokens: list[str]
  token_logprobs: list[float | None]
  top_logprobs: list[dict[str, float] | None] | None
  text_offset: list[int]


class CompletionChoice(BaseModel):
  """One text."""

  index: int
  text: str
  logprobs: CompletionLogprobs | None
  finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
  """Texts, or a piece of a stream of them."""

  id: str
  object: Literal["text_completion"] = "text_completion"
  created: int
  model: str
  choices: list[CompletionChoice]
  usage: Usage | None = None
  seed: int | None = Field(default=None, description="of the draws; given again, they repeat")


class TopLogprob(BaseModel):
  """A token that might have been."""

  token: str
  logprob: float
  bytes: list[int] | None


class TokenLogprob(TopLogprob):
  """A token, and those that might have been."""

  top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
  """An entry a token."""

  content: list[TokenLogprob]
  refusal: None = None


class ChatMessage(BaseModel):
  """What is answered, or a piece of it."""

  role: Literal["assistant"] | None = None
  content: str | None = None
  refusal: None = None


class ChatChoice(BaseModel):
  """One answer."""

  index: int
  message: ChatMessage
  logprobs: ChatLogprobs | None
  finish_reason: Literal["stop", "length"] | None


class ChatPiece(BaseModel):
  """A piece of one answer."""

  index: int
  delta: ChatMessage
  logprobs: ChatLogprobs | None
  finish_reason: Literal["stop", "length"] | None


class _Chat(BaseModel):
  id: str
  created: int
  model: str
  usage: Usage | None = None
  seed: int | None = Field(default=None, description="of the draws; given again, they repeat")
  chat_template: str = Field(
    description='whose template made a prompt of the messages: "model" or "plain"'
  )


class ChatCompletion(_Chat):
  """Answers in a chat."""

  object: Literal["chat.completion"] = "chat.completion"
  choices: list[ChatChoice]


class ChatCompletionChunk(_Chat):
  """A piece of a stream of answers."""

  object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
  choices: list[ChatPiece]


class Embedding(BaseModel):
  """The direction of a text, of length 1."""

  object: Literal["embedding"] = "embedding"
  index: int
  embedding: list[float] | str


class Embeddings(BaseModel):
  """The mean of the last hidden states of each text, scaled to length 1."""

  object: Literal["list"] = "list"
  data: list[Embedding]
  model: str
  usage: Usage


class Classification(BaseModel):
  """What is told of a text: a label and the probability of each, or a score."""

  index: int
  label: str | int | None = Field(
    default=None, description="the likeliest class, or number of the answer"
  )
  probabilities: dict[str, float] | list[float] | None = None
  score: float | None = None


class Classes(BaseModel):
  """What is told of each text."""

  object: Literal["list"] = "list"
  data: list[Classification]
  model: str


class ModelCard(BaseModel):
  """A model that is served."""

  id: str
  object: Literal["model"] = "model"
  created: int
  owned_by: Literal["gptjax"] = "gptjax"
  context_length: int
  vocab_size: int


class Models(BaseModel):
  """The models that are served."""

  object: Literal["list"] = "list"
  data: list[ModelCard]


class Tokens(BaseModel):
  """The ids of a text."""

  tokens: list[int]
  count: int
  max_model_len: int


class TokenizerInfo(BaseModel):
  """The tokenizer, as the lm-evaluation-harness asks for it."""

  vocab_size: int
  bos_token: str | None
  eos_token: str | None
  pad_token: str | None
  unk_token: str | None
  chat_template: str = Field(description="in jinja2; of the model, or the plain one")


class Detokenized(BaseModel):
  """The text of ids."""

  prompt: str


class Health(BaseModel):
  """Whether requests are taken: starting, ready, stopping or failed."""

  status: str
