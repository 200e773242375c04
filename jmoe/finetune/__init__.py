"""Fine-tuning gpt-oss with LoRA."""
