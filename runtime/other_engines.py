"""What requests may ask for in other engines and not here by that name, and what does the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

_SEVERAL = "submit the prompt several times, each with its own seed (the prefix cache shares it)"
_TEXT = "it is about text, and the runtime knows tokens only: do it where you tokenise"
_GRAMMAR = "fill a mask per token and give it to Runtime.set_request_mask"
# Settings of other engines, and what does the same here.
ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("n", "best_of"), _SEVERAL),
        "use_beam_search": "there is no beam search; " + _SEVERAL,
        "stop": "tokenise the texts and give them as stop_sequences",
        "bad_words": "forbid tokens with logit_bias={token: -inf}, or a token mask",
        "allowed_token_ids": "give a mask of the tokens to Runtime.set_request_mask",
        **dict.fromkeys(("guided_decoding", "structured_outputs", "response_format"), _GRAMMAR),
        **dict.fromkeys(("json_schema", "regex", "ebnf", "guided_json"), _GRAMMAR),
        "logits_processors": "no host code runs in a step: use logit_bias, penalties or a mask",
        **dict.fromkeys(("max_new_tokens", "max_completion_tokens"), "give it as max_tokens"),
        "min_new_tokens": "give it as min_tokens",
        "top_logprobs": "give it as logprobs, which is a number",
        "random_seed": "give it as seed",
        **dict.fromkeys(("stop_words", "stop_words_list"), "give tokens as stop_sequences"),
        "end_id": "give it in stop_token_ids",
        "stream": "Runtime.step returns every token as it comes",
        "echo": "prompt_logprobs=0 returns the prompt's tokens with their log-probs",
        **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), _TEXT),
        **dict.fromkeys(("detokenize", "include_stop_str_in_output", "suffix"), _TEXT),
    }
)


def unknown_setting(name: str, known: Sequence[str]) -> str:
    """What to tell who gave `name` to a `SamplingParams`: what does it here, and what there is."""
    from difflib import get_close_matches  # only mistakes need it

    remedy = ELSEWHERE.get(name)
    if remedy is None:
        near = get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "leave it out"
    return f"SamplingParams has no {name!r}: {remedy}; it has {', '.join(known)}"
