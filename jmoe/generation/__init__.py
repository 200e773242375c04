"""Prompts to replies: what `jmoe generate` does between its flags and jmoe.gpt_oss.generate."""
