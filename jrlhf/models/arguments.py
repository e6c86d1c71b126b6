"""Arguments of transformers' calls that are none here, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jrlhf.errors import ConfigError, suggest

_TOKEN = "set the environment variable HF_TOKEN"
_SIZES = "a mesh places the weights: give mesh={'fsdp': 4}"
_LABELS = "give num_labels; names of labels come from config.json"
_LENGTH = "give max_new_tokens, which does not count the prompt"
_GREEDY = "decode greedily, or sample with do_sample=True"
_STEP = "a loss is a trainer's: see SFTTrainer"

FROM_PRETRAINED = {
    "device_map": "give mesh={'fsdp': 4} instead",
    "trust_remote_code": "jrlhf never runs code from a checkpoint",
    "quantization_config": "give load_in_8bit=True (int8) or load_in_4bit=True (nf4)",
    "subfolder": "give the directory itself",
    "token": _TOKEN,
    "use_auth_token": _TOKEN,
    "cache_dir": "set the environment variable HF_HOME",
    "local_files_only": "set the environment variable HF_HUB_OFFLINE=1",
    "force_download": "delete the model's directory under HF_HOME",
    "proxies": "set the environment variable HTTPS_PROXY",
    "variant": "the files without a variant are read",
    "use_safetensors": "nothing but safetensors is read",
    "low_cpu_mem_usage": "each device's part is read by itself, always",
    "max_memory": _SIZES,
    "offload_folder": _SIZES,
    "tp_plan": _SIZES,
    "device_mesh": _SIZES,
    "config": "config.json decides; from_config builds a model with random weights",
    "rope_scaling": "write rope_parameters into config.json",
    "ignore_mismatched_sizes": "only a classifier's head is drawn anew; nothing else may differ",
    "id2label": _LABELS,
    "label2id": _LABELS,
    "num_labels": "this model has no classifier: use AutoModelForSequenceClassification",
    "problem_type": "the trainer's loss decides",
    "gguf_file": "give the path of the .gguf file itself",
    "use_cache": "training has no cache, generation always one",
    "attn_kernel": "give attn_implementation",
    "output_loading_info": "what is missing, unexpected or misshapen is an error",
}
GENERATE = {
    "num_beams": f"there is no beam search: {_GREEDY}",
    "num_beam_groups": f"there is no beam search: {_GREEDY}",
    "penalty_alpha": f"there is no contrastive search: {_GREEDY}",
    "generation_config": "give its fields: max_new_tokens, do_sample, temperature, top_k, top_p, …",
    "max_length": _LENGTH,
    "min_length": "give min_new_tokens, which does not count the prompt",
    "num_return_sequences": "repeat the prompts: np.repeat(input_ids, n, axis=0)",
    "stopping_criteria": "give eos_token_id; `jrlhf generate` takes --stop_strings",
    "stop_strings": "give eos_token_id; `jrlhf generate` takes --stop_strings",
    "logits_processor": "give temperature, top_k, top_p, min_p or repetition_penalty",
    "no_repeat_ngram_size": "give repetition_penalty",
    "streamer": "tokens come when all rows have ended",
    "use_cache": "generation always has a cache",
    "return_dict_in_generate": "the tokens are all that is returned",
    "output_scores": "the tokens are all that is returned",
    "assistant_model": "there is no speculative decoding",
}
CALL = {
    "labels": _STEP,
    "inputs_embeds": "give input_ids",
    "past_key_values": "generate keeps its cache by itself",
    "use_cache": "generate keeps its cache by itself",
    "output_hidden_states": "model.net.hidden(model.params, ids) gives the last hidden states",
    "output_attentions": "they are never held whole",
    "output_router_logits": "model.net.hidden_and_routing gives sums of the routing",
    "return_dict": "what is returned has the attributes logits and value",
}
SAVE = {
    "safe_serialization": "nothing but safetensors is written",
    "push_to_hub": "call push_to_hub(repo_id)",
    "state_dict": "model.params are what is saved",
    "is_main_process": "the first process writes",
    "save_peft_format": "adapters are saved by a PeftModel",
}
SAVE_ADAPTER = SAVE | {
    "max_shard_size": "an adapter is one file",
    "save_embedding_layers": "name them in modules_to_save",
    "path_initial_model_for_weight_conversion": "initial values are kept as they are",
}
COUNT = {
    "only_trainable": "a PeftModel has get_nb_trainable_parameters()",
    "exclude_embeddings": "subtract model.config.vocab_size * model.config.hidden_size",
}
# Values, besides None, that ask for what happens anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "local_files_only": (False,),
    "force_download": (False,),
    "subfolder": ("",),
    "use_safetensors": (True,),
    "low_cpu_mem_usage": (True, False),
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    "use_cache": (True, False),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "return_dict_in_generate": (False,),
    "output_scores": (False,),
    "output_hidden_states": (False,),
    "output_attentions": (False,),
    "output_router_logits": (False,),
    "return_dict": (True,),
    "safe_serialization": (True,),
    "save_embedding_layers": ("auto", False),
    "push_to_hub": (False,),
    "is_main_process": (True,),
    "only_trainable": (False,),
    "exclude_embeddings": (False,),
}


def check(
    call: str, given: Mapping[str, Any], elsewhere: Mapping[str, str], known: Iterable[str]
) -> None:
    """Lets arguments pass that ask for nothing, and names the first other one.

    Args:
        call: what was called.
        given: arguments that it does not have.
        elsewhere: what to write instead of some.
        known: the ones that it has.

    Raises:
        ConfigError: an argument that would mean something.
    """
    for name, value in sorted(given.items()):
        if name not in elsewhere:
            raise ConfigError(f"{call} has no argument {name!r}.{suggest(name, list(known))}")
        plain = value is None or isinstance(value, bool | int | str)
        if not plain or value not in (None, *_NEUTRAL.get(name, ())):
            raise ConfigError(f"{call}: {name} is not supported: {elsewhere[name]}.")
