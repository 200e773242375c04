"""LoRA on dense products, by each row's own adapter."""
