"""Hugging Face's files: safetensors, its index, config.json and generation_config.json."""
