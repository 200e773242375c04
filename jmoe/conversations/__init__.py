"""Conversations, texts and completions as files hold them: read for fine-tuning and for generation, and checked."""
