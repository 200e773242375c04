"""LoRA on a checkpoint's experts and attention, trained on a file of text."""
