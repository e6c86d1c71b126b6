"""Fields of transformers' TrainingArguments and of TRL that are no fields here, and why.

A config written for TRL reads on: what only steers PyTorch's machinery is taken and said to change
nothing, what would change the result is refused with what to write instead. A field that is neither
here nor in the config's class is an unknown key.
"""

from __future__ import annotations

from typing import Any

_MESH = "use mesh, for example mesh={'fsdp': 8}"
_LOADED = "give model_init_kwargs={%r: True}, and the trainer a peft_config"
_HEAD = "the head is chunked already; leave it out"
_BEST = "every checkpoint stays in output_dir (save_total_limit=None); load the one that you want"

# field -> what to do instead.
REFUSED: dict[str, str] = {
    "fp16": "float16 needs loss scaling; use bf16=True",
    "tf32": "set the environment variable JAX_DEFAULT_MATMUL_PRECISION",
    "fp16_full_eval": "evaluation computes as training does; use bf16=True",
    "deepspeed": _MESH,
    "fsdp": _MESH,
    "fsdp_config": _MESH,
    "parallelism_config": _MESH,
    "accelerator_config": "one process drives all local devices; use mesh",
    "use_cpu": "set the environment variable JAX_PLATFORMS=cpu",
    "no_cuda": "set the environment variable JAX_PLATFORMS=cpu",
    "trust_remote_code": "jrlhf never runs code from a checkpoint",
    "load_in_8bit": _LOADED % "load_in_8bit",
    "load_in_4bit": _LOADED % "load_in_4bit",
    "peft_config": "pass it to the trainer; on the command line use --use_peft and --lora_r, …",
    "use_liger_loss": _HEAD,
    "liger_kernel_config": _HEAD,
    "neftune_noise_alpha": "embedding noise is not supported",
    "auto_find_batch_size": "choose per_device_train_batch_size; shapes are fixed when compiled",
    "hub_always_push": "every push is waited for, so none is left out",
    "optim_args": "use adam_beta1, adam_beta2, adam_epsilon and weight_decay",
    "optim_target_modules": "use a peft_config, or num_layers_unfrozen",
    "logging_strategy": "logs come every logging_steps; a number beyond max_steps silences them",
    "logging_first_step": "use logging_steps=1",
    "eval_on_start": "call trainer.evaluate() before trainer.train()",
    "eval_delay": "evaluation begins with the first eval_steps",
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "save_only_model": "checkpoints hold the whole state; the model alone is trainer.save_model()",
    "ignore_data_skip": "a resumed run goes on at its place in the data, at no cost",
    "train_sampling_strategy": "the order of rows is a function of data_seed",
    "group_by_length": "use packing=True (SFT), which leaves no padding at all",
    "activation_offloading": "use gradient_checkpointing=True",
    "activation_checkpointing": "use gradient_checkpointing=True",
    "activation_checkpointing_kwargs": "use gradient_checkpointing_kwargs={'policy': …}",
    "eos_token": "set it on the tokenizer, and give that as processing_class",
    "pad_token": "set it on the tokenizer, and give that as processing_class",
    "dataset_kwargs": "prepare the rows before; tokens go in as input_ids",
    "chat_template_kwargs": "give them in a column chat_template_kwargs",
    "sync_ref_model": "the reference stays fixed",
    "ref_model_mixup_alpha": "the reference stays fixed",
    "ref_model_sync_steps": "the reference stays fixed",
    "label_smoothing_factor": "only DPO smooths labels (label_smoothing, loss_type='robust')",
    "include_for_metrics": "metrics are the algorithm's; use callbacks to add your own",
    "label_names": "columns have TRL's names; rename them in the dataset",
    "length_column_name": "lengths are counted",
    "debug": "set the environment variable JAX_DEBUG_NANS=True",
    "trackio_space_id": "report_to is tensorboard, wandb or None",
    "trackio_bucket_id": "report_to is tensorboard, wandb or None",
    "trackio_static_space_id": "report_to is tensorboard, wandb or None",
    "project": "set the environment variable WANDB_PROJECT",
    "overwrite_output_dir": "give another output_dir; what lies there is not deleted",
}

# Values of refused fields, besides None and False, that ask for what is done anyway.
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "logging_strategy": ("steps",),
    "eval_delay": (0,),
    "train_sampling_strategy": ("random",),
    "truncation_mode": ("keep_start",),
    "include_for_metrics": ([],),
    "length_column_name": ("length",),
    "debug": ("",),
    "project": ("huggingface",),
    "f_divergence_type": ("reverse_kl",),
    "top_entropy_quantile": (1.0,),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "log_multimodal": (True,),
    "vllm_importance_sampling_correction": (True,),
    "vllm_importance_sampling_mode": ("sequence_mask",),
    "vllm_importance_sampling_clip_max": (3.0,),
    "vllm_model_impl": ("vllm",),
    "sapo_temperature_neg": (1.05,),
    "sapo_temperature_pos": (1.0,),
    "vespo_k_pos": (2.0,),
    "vespo_lambda_pos": (3.0,),
    "vespo_k_neg": (3.0,),
    "vespo_lambda_neg": (2.0,),
    "entropy_coef_max": (1.0,),
    "entropy_coef_delta": (0.005,),
    "entropy_target": (0.2,),
    "discopop_tau": (0.05,),
    "f_alpha_divergence_coef": (0.5,),
    "ref_model_mixup_alpha": (0.6,),
    "ref_model_sync_steps": (512,),
    "vllm_server_host": ("0.0.0.0",),
    "vllm_server_port": (8000,),
    "vllm_server_timeout": (240.0,),
    "vllm_group_port": (51216,),
}

# Values of our own fields that leave the choice to us.
AS_YOU_LIKE: dict[str, tuple[Any, ...]] = {"pad_to_multiple_of": ("auto", None)}

_LOADER = "rows are tokenised once and lie in memory, so that no worker is waited for"
_ONE_PROCESS = "one process drives all local devices; there is no DDP"
_COMPILED = "every step is compiled already"

# field -> why any value gives the same result.
WITHOUT_EFFECT: dict[str, str] = {
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "dataloader_in_order": _LOADER,
    "dataset_num_proc": "the fast tokenizers use all cores by themselves",
    "remove_unused_columns": "columns that a trainer has no use for are never read",
    "save_safetensors": "models are always saved as safetensors",
    "ddp_find_unused_parameters": _ONE_PROCESS,
    "ddp_bucket_cap_mb": _ONE_PROCESS,
    "ddp_broadcast_buffers": _ONE_PROCESS,
    "ddp_static_graph": _ONE_PROCESS,
    "ddp_backend": _ONE_PROCESS,
    "ddp_timeout": _ONE_PROCESS,
    "local_rank": _ONE_PROCESS,
    "average_tokens_across_devices": "losses are always means over the tokens of the whole batch",
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "torch_empty_cache_steps": "XLA plans a step's memory when it compiles it",
    "use_liger_kernel": _HEAD.removesuffix("; leave it out"),
    "ds3_gather_for_generation": "parameters are laid out by the compiler",
    "use_cache": "training has no cache, generation always has one",
    "padding_free": "padding never counts; packing=True leaves it out",
    "bf16_full_eval": "evaluation computes as training does",
    "full_determinism": "runs are deterministic already",
    "skip_memory_metrics": "no memory is measured",
    "include_num_input_tokens_seen": "trainer.state.num_input_tokens_seen is always counted",
    "do_train": "trainer.train() trains",
    "do_eval": "trainer.evaluate() evaluates, and eval_strategy says when during training",
    "do_predict": "trainers do not predict",
    "eval_do_concat_batches": "metrics are added up batch by batch",
    "eval_use_gather_object": "metrics are added up batch by batch",
    "eval_accumulation_steps": "metrics are added up batch by batch",
    "prediction_loss_only": "metrics are added up batch by batch",
    "batch_eval_metrics": "metrics are added up batch by batch",
    "save_on_each_node": "every process writes its part of a checkpoint, the first one the model",
    "enable_jit_checkpoint": "SIGTERM always saves the last step",
    "restore_callback_states_from_checkpoint": "the trainer's state is always restored",
    "log_on_each_node": "the first process logs",
    "logging_nan_inf_filter": "an update with a loss that is not finite is left out, and said",
    "cache_implementation": "the sampler has one cache, sized to the rollout",
    "log_level_replica": "the level is that of Python's logging",
    "log_level": "the level is that of Python's logging",
}

_ENTROPY = "there is no entropy bonus; its mean is logged"
_PROCESS = "jrlhf samples in the training process; leave it out"
_ENGINE = "the engine is jrlhf's own; leave it out"
_ONE_MODEL = "sampler and scorer are one model: their ratio is 1"
_LOSSES = "it belongs to a loss that is not here; loss_type is grpo, bnpo, dapo or dr_grpo"

# The same for GRPO alone.
GRPO_REFUSED: dict[str, str] = {
    "generation_kwargs": "use temperature, top_k, top_p, min_p and repetition_penalty",
    "num_generations_eval": "the rollouts are the evaluation; see `jrlhf evaluate`",
    "cast_lm_head_to_fp32": "logits are float32 already; leave it out",
    "top_entropy_quantile": "every token is trained on",
    "multi_objective_aggregation": "rewards are summed by reward_weights",
    "off_policy_mask_threshold": "no token is left out; epsilon and delta clip",
    "max_tool_calling_iterations": "tools are not supported yet",
    "log_multimodal": "there are no images",
    "log_unique_prompts": "use log_completions=True",
    "log_completions_hub_repo": "use log_completions=True, which writes completions.jsonl",
    "use_transformers_paged": _ENGINE,
    "use_transformers_continuous_batching": _ENGINE,
    "transformers_continuous_batching_config": _ENGINE,
    "vllm_model_impl": _ENGINE,
    "vllm_enable_sleep_mode": _ENGINE,
    "vllm_max_model_length": _ENGINE,
    "vllm_structured_outputs_regex": _ENGINE,
    "vllm_server_base_url": _PROCESS,
    "vllm_server_host": _PROCESS,
    "vllm_server_port": _PROCESS,
    "vllm_server_timeout": _PROCESS,
    "vllm_group_port": _PROCESS,
    "vllm_importance_sampling_correction": _ONE_MODEL,
    "vllm_importance_sampling_mode": _ONE_MODEL,
    "vllm_importance_sampling_clip_max": _ONE_MODEL,
    "vllm_importance_sampling_clip_min": _ONE_MODEL,
    "vllm_importance_sampling_cap": _ONE_MODEL,
    "sapo_temperature_neg": _LOSSES,
    "sapo_temperature_pos": _LOSSES,
    "vespo_k_pos": _LOSSES,
    "vespo_lambda_pos": _LOSSES,
    "vespo_k_neg": _LOSSES,
    "vespo_lambda_neg": _LOSSES,
    "entropy_coef": _ENTROPY,
    "use_adaptive_entropy": _ENTROPY,
    "entropy_coef_min": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_delta": _ENTROPY,
    "entropy_target": _ENTROPY,
}
