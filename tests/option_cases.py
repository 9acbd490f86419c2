"""For each decoding option a case where it changes the answer, or must be refused.

CASES[name] is (options of both runs, what one run has besides). The answers of the two runs differ
on any model with at least 32 tokens, random weights and the prompt PROMPT; "how" says what to do.
"""

PROMPT = [1, 2, 3, 1, 2]
SAMPLED = {"do_sample": True, "seed": 0, "max_new_tokens": 12}
BEAMS = {"num_beams": 4, "max_new_tokens": 12}
# A text that says 7 again and again, and then a rule that keeps it from doing so.
ONLY_7 = {"logit_bias": {7: 1000.0}, "max_new_tokens": 6, "eos_token_id": -1}
ENDS_AT_ONCE = {"logit_bias": {7: 1000.0}, "eos_token_id": 7}

CASES = {
  "max_new_tokens": ({}, {"max_new_tokens": 3}),
  "max_length": ({}, {"max_length": len(PROMPT) + 3}),
  "min_new_tokens": (ENDS_AT_ONCE, {"min_new_tokens": 3}),
  "min_length": (ENDS_AT_ONCE, {"min_length": len(PROMPT) + 3}),
  # how: with max_new_tokens beyond the context, "error" refuses and "slide" answers.
  "beyond_context": ({"max_new_tokens": 64}, {"beyond_context": "slide"}),
  "do_sample": ({"seed": 0, "max_new_tokens": 12}, {"do_sample": True}),
  "temperature": (SAMPLED, {"temperature": 5.0}),
  "top_k": (SAMPLED, {"top_k": 1}),
  "top_p": (SAMPLED, {"top_p": 1e-6}),
  "min_p": (SAMPLED, {"min_p": 1.0}),
  "typical_p": (SAMPLED, {"typical_p": 1e-6}),
  "seed": (SAMPLED, {"seed": 1}),
  # how: scores differ where the tokens do not.
  "num_beams": ({"max_new_tokens": 12}, {"num_beams": 4}),
  "length_penalty": (BEAMS, {"length_penalty": -2.0}),
  # how: end tokens must be likely, so that some beams end before others; compare over several
  # prompts, or take a bias of the end token between the margins of the model.
  "early_stopping": (
    BEAMS | {"eos_token_id": 7, "logit_bias": {7: 4.0}, "length_penalty": 2.0},
    {"early_stopping": True},
  ),
  "num_return_sequences": (SAMPLED, {"num_return_sequences": 2}),
  "repetition_penalty": (ONLY_7, {"repetition_penalty": 1e6}),
  "frequency_penalty": (ONLY_7, {"frequency_penalty": 2000.0}),
  "presence_penalty": (ONLY_7, {"presence_penalty": 2000.0}),
  "no_repeat_ngram_size": (ONLY_7, {"no_repeat_ngram_size": 2}),
  "bad_words_ids": (ONLY_7, {"bad_words_ids": [[7, 7]]}),
  # how: any text that the tokenizer spells as token 7.
  "bad_words": (ONLY_7, {"bad_words": ["7"]}),
  "logit_bias": ({"max_new_tokens": 6}, {"logit_bias": {7: 1000.0, 9: 1000.0}}),
  "suppress_tokens": (ONLY_7, {"suppress_tokens": [7]}),
  "begin_suppress_tokens": (ONLY_7, {"begin_suppress_tokens": [7]}),
  "forced_bos_token_id": (ONLY_7, {"forced_bos_token_id": 9}),
  "forced_eos_token_id": (ONLY_7, {"forced_eos_token_id": 9}),
  "allowed_tokens": (ONLY_7, {"allowed_tokens": lambda prompt, ids: [9, 11]}),
  "eos_token_id": (ONLY_7, {"eos_token_id": 7}),
  # how: two prompts' rows of ids, of which one ends early (forced_bos_token_id is not needed: give
  # prompts of different lengths); only the padding of Generation.tokens differs.
  "pad_token_id": ({"max_new_tokens": 3}, {"pad_token_id": 30}),
  # how: the text of token 7.
  "stop": (ONLY_7, {"stop": "7"}),
  # how: Generation.top_logprobs appears; the tokens stay.
  "top_logprobs": ({"max_new_tokens": 3}, {"top_logprobs": 2}),
  # how: greedy tokens must stay the same; what changes is the number of forward passes.
  "prompt_lookup_num_tokens": (ONLY_7, {"prompt_lookup_num_tokens": 3}),
  "draft_model": (ONLY_7, {"draft_model": "gpt2"}),
  "num_draft_tokens": (ONLY_7 | {"draft_model": "gpt2"}, {"num_draft_tokens": 2}),
  # how: a prompt of ids [[0, 0, *PROMPT]]; without the mask, the zeros are tokens.
  "attention_mask": ({"max_new_tokens": 12}, {"attention_mask": [[0, 0, 1, 1, 1, 1, 1]]}),
}

# (options, what the one line must say): options without effect, or that contradict each other.
REFUSED = [
  ({"temperature": 0.7}, "temperature=0.7 has no effect without sampling"),
  ({"top_k": 50}, "add do_sample=True"),
  ({"top_p": 0.9}, "top_p=0.9 has no effect"),
  ({"min_p": 0.1}, "min_p=0.1 has no effect"),
  ({"typical_p": 0.5}, "typical_p=0.5 has no effect"),
  ({"do_sample": True, "temperature": 0, "top_k": 5}, "temperature 0"),
  ({"length_penalty": 2.0}, "length_penalty=2.0 has no effect without beams"),
  ({"early_stopping": "never"}, "early_stopping='never' has no effect without beams"),
  ({"num_draft_tokens": 3}, "without a draft_model"),
  ({"num_return_sequences": 2}, "same greedy text 2 times"),
  ({"num_return_sequences": 2, "do_sample": True, "temperature": 0}, "same greedy text"),
  ({"num_return_sequences": 5, "num_beams": 4}, "more than num_beams=4"),
  ({"draft_model": "a", "prompt_lookup_num_tokens": 2}, "give one of them"),
  ({"draft_model": "a", "num_beams": 2}, "cannot be combined with draft_model"),
  ({"draft_model": "a", "allowed_tokens": max}, "allowed_tokens is asked before each token"),
  ({"prompt_lookup_num_tokens": 2, "allowed_tokens": max}, "speculation guesses several"),
  ({"prompt_lookup_num_tokens": 2, "num_beams": 2}, "prompt_lookup_num_tokens"),
  ({"beyond_context": "slide", "num_beams": 2}, "greedy search and sampling only"),
  ({"max_length": 9, "max_new_tokens": 4}, "max_length=9 counts the prompt"),
  ({"min_length": 9, "min_new_tokens": 4}, "min_length=9 counts the prompt"),
  ({"max_length": 5}, "a prompt has 5 tokens already"),
  ({"min_new_tokens": 4, "max_new_tokens": 3}, "min_new_tokens=4 asks for 9 tokens"),
  ({"min_length": 9, "max_length": 8}, "raise max_length"),
  ({"min_new_tokens": 21}, "the limit is 25"),
  ({"max_length": 33}, "exceeds the model's context of 32"),
  ({"max_new_tokens": 28}, "5 tokens and 28 new ones exceed the model's context of 32"),
  ({"eos_token_id": [3, 40]}, "eos_token_id has the token 40, but the model's are 0 to 39"),
  ({"pad_token_id": 40}, "pad_token_id has the token 40"),
  ({"forced_bos_token_id": 40}, "forced_bos_token_id"),
  ({"forced_eos_token_id": 40}, "forced_eos_token_id"),
  ({"suppress_tokens": [40]}, "suppress_tokens"),
  ({"begin_suppress_tokens": [40]}, "begin_suppress_tokens"),
  ({"bad_words_ids": [[3, 40]]}, "bad_words_ids"),
  ({"logit_bias": {40: 1.0}}, "logit_bias"),
  ({"forced_bos_token_id": 3, "suppress_tokens": [3]}, "forces what suppress_tokens"),
  ({"forced_eos_token_id": [3, 4], "suppress_tokens": [3, 4]}, "forces what suppress_tokens"),
  ({"suppress_tokens": list(range(40))}, "leaves no token"),
  ({"suppress_tokens": [0], "begin_suppress_tokens": list(range(1, 40))}, "leaves no token"),
  ({"bad_words_ids": [[0]]}, "has the end token 0 alone"),
]
