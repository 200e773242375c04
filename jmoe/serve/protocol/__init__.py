"""What requests hold, as pydantic models; names are OpenAI's, or vLLM's where OpenAI has none."""
