"""A whole gpt-oss: how fast it generates, is fine-tuned and loaded, and in how much memory."""
