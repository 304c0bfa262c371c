"""What users know from other engines and does not exist here by that name, and what does the same.

`ELSEWHERE` is for requests (`SamplingParams`), `ENGINES` for what a runtime is loaded with: as an
option of the commands and as a keyword of `Runtime.load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

_SEVERAL = "submit the prompt several times, each with its own seed (the prefix cache shares it)"
_TEXT = "it is about text, and the runtime knows tokens only: do it where you tokenise"
_GRAMMAR = "fill a mask per token and give it to Runtime.set_request_mask"
_STOPS = "tokenise the texts and give them as stop_sequences"
# Settings of other engines, and what does the same here.
ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("n", "best_of"), _SEVERAL),
        "use_beam_search": "there is no beam search; " + _SEVERAL,
        **dict.fromkeys(("stop", "stop_strs", "stop_strings", "stop_regex"), _STOPS),
        "length_penalty": "there is no beam search, which it is of; logit_bias of the "
        "end-of-sequence token makes outputs longer or shorter",
        "early_stopping": "there is no beam search, which it is of; leave it out",
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

_ROWS = "give {bs}, rows of all ranks together"
_LENGTH = "give {max_seq_len}, tokens of prompt and output together"
_MEMORY = (
    "give {num_pages}, pages of KV cache; by default it is what the rows can use, or what memory "
    "allows"
)
_EAGER = "nothing runs that was not captured; to debug, take the CPU twin ({device})"
_CHUNKS = (
    "give {ladder} keys with so many prompt tokens, such as 8+512, and {prefill_budget} to have "
    "fewer of them in a step"
)
_RANKS = (
    "ranks share the experts, and each has attention for its own rows: start with torchrun "
    "--nproc-per-node N, and {bs} is for all of them"
)
_NODE = "one process runs the whole model on its GPU, and all ranks are on one node; leave it out"
_NUMBERS = "weights keep what the checkpoint has, FP8 or BF16; leave it out"
_KV = "there is no FP8 KV cache; leave it out"
_PREFIXES = "the prefix cache is on; {prefix_cache}"
_NO_CODE = "the architecture is DeepSeek-V3's and no code of a checkpoint is run; leave it out"
_SPECULATION = "there is no speculative decoding; leave it out"
_TOKENS = "the runtime knows tokens only, and runtime.generate takes the checkpoint's tokenizer"
_SERVER = "there is no server here: put Runtime.submit and Runtime.step into yours"
# Options of other engines' servers; {name} is spelled as an option here or as a keyword.
ENGINES: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("max_num_seqs", "max_running_requests", "max_concurrency"), _ROWS),
        **dict.fromkeys(("max_length", "max_total_len", "max_input_len"), _LENGTH),
        **dict.fromkeys(("gpu_memory_utilization", "mem_fraction_static"), _MEMORY),
        **dict.fromkeys(("free_gpu_memory_fraction", "kv_cache_free_gpu_mem_fraction"), _MEMORY),
        **dict.fromkeys(("max_total_tokens", "num_gpu_blocks_override"), _MEMORY),
        "block_size": "give {page_size}, tokens of a KV page",
        "tokens_per_block": "give {page_size}, tokens of a KV page",
        **dict.fromkeys(("enforce_eager", "disable_cuda_graph"), _EAGER),
        **dict.fromkeys(
            ("cudagraph_capture_sizes", "cuda_graph_sizes", "cuda_graph_config"),
            "give {ladder}, such as 1,2,4,8+64",
        ),
        "cuda_graph_max_bs": "give {bs}, and {ladder} for the sizes below it",
        "compilation_config": "give {ladder} for the sizes that are captured; nothing else is set",
        **dict.fromkeys(("max_num_batched_tokens", "max_num_tokens"), _CHUNKS),
        **dict.fromkeys(("chunked_prefill_size", "max_prefill_tokens"), _CHUNKS),
        **dict.fromkeys(("enable_chunked_prefill", "enable_chunked_context"), _CHUNKS),
        **dict.fromkeys(("tensor_parallel_size", "tp_size", "tp", "tensor_parallel"), _RANKS),
        **dict.fromkeys(("data_parallel_size", "dp_size", "dp", "enable_dp_attention"), _RANKS),
        **dict.fromkeys(("enable_expert_parallel", "expert_parallel_size", "ep"), _RANKS),
        "moe_expert_parallel_size": _RANKS,
        **dict.fromkeys(("pipeline_parallel_size", "pp_size", "pp", "nnodes"), _NODE),
        **dict.fromkeys(("dtype", "quantization", "quantization_config"), _NUMBERS),
        "kv_cache_dtype": _KV,
        **dict.fromkeys(("enable_prefix_caching", "enable_block_reuse"), _PREFIXES),
        **dict.fromkeys(("no_enable_prefix_caching", "disable_radix_cache"), _PREFIXES),
        "trust_remote_code": _NO_CODE,
        **dict.fromkeys(("speculative_config", "speculative_algorithm"), _SPECULATION),
        **dict.fromkeys(("tokenizer", "tokenizer_path", "skip_tokenizer_init"), _TOKENS),
        **dict.fromkeys(("host", "port", "served_model_name", "api_key"), _SERVER),
        "attention_backend": "give {attention}",
        "moe_a2a_backend": "give {transport}",
        "all2all_backend": "give {transport}",
        "load_format": "a preset's name as {model} has random weights, a directory its own",
        "hf_overrides": "give {overrides}",
        "num_hidden_layers": "give {layers}",
        "download_dir": "give {model} as a directory; nothing is downloaded",
        "random_seed": "give {seed} for a preset's weights; a request has its own",
    }
)


class _Options(dict[str, str]):
    """Our names as options of the commands."""

    def __missing__(self, name: str) -> str:
        return "--" + name.replace("_", "-")


_AS_OPTIONS = _Options(
    device="--device cpu",
    overrides="--override KEY=VALUE",
    prefix_cache="--no-prefix-cache ends it",
)


class _Keywords(dict[str, str]):
    """The same as keywords of `Runtime.load`."""

    def __missing__(self, name: str) -> str:
        return f"{name}="


_AS_KEYWORDS = _Keywords(device="device='cpu'", prefix_cache="prefix_cache=False ends it")


def unknown_setting(name: str, known: Sequence[str]) -> str:
    """What to tell who gave `name` to a `SamplingParams`: what does it here, and what there is."""
    remedy = ELSEWHERE.get(name) or _nearest(name, known) or "leave it out"
    return f"SamplingParams has no {name!r}: {remedy}; it has {', '.join(known)}"


def unknown_keyword(name: str, known: Sequence[str]) -> str:
    """What to tell who gave `name` to `Runtime.load`."""
    remedy = ENGINES.get(name)
    if remedy is not None:
        return f"there is no option {name!r} here: {remedy.format_map(_AS_KEYWORDS)}"
    remedy = _nearest(name, known)
    return f"unknown option {name!r}; {remedy or 'known: ' + ', '.join(sorted(known))}"


def unknown_arguments(given: Sequence[str], known: Sequence[str]) -> str:
    """What to tell who gave these to a command.

    Args:
        given: what its parser has left over, values of unknown options among it.
        known: its options, dashes before them.
    """
    reasons = []
    for argument in given:
        option = argument.partition("=")[0]
        name = option.lstrip("-").replace("-", "_")
        if not option.startswith("--"):
            continue
        if f"--{name.replace('_', '-')}" in known:
            reasons.append(f"{option} is spelled --{name.replace('_', '-')} here")
        elif name in ENGINES:
            reasons.append(f"there is no {option} here: {ENGINES[name].format_map(_AS_OPTIONS)}")
        elif near := _nearest(option, known):
            reasons.append(f"{option}: {near}")
    text = f"unrecognized arguments: {' '.join(given)}"
    return f"{text} ({'; '.join(reasons)})" if reasons else text


def _nearest(name: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches  # only mistakes need it

    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else ""
