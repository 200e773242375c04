"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Any

from jmoe.serve.chat_prompt import conversation_tokens
from jmoe.serve.errors import ApiError
from jmoe.serve.protocol.others import DetokenizeRequest, TokenizeRequest
from jmoe.serve.service import Service
from jmoe.text import encode


async def tokenize(asked: TokenizeRequest, service: Service) -> dict[str, Any]:
    """The tokens of a text, or of a conversation up to where the reply begins; nothing is put before them.

    Raises:
      ApiError: 404, the model is unknown; 400, the text cannot be encoded.
    """
    service.adapter(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise ApiError.invalid("prompt", "prompt: one of prompt and messages is needed")

    def work(tokenizer: Any) -> list[int]:
        if asked.messages is not None:
            return conversation_tokens(tokenizer, asked.messages, asked.tools, asked.reasoning_effort)
        try:
            return encode(tokenizer, asked.prompt or "")
        except ValueError as error:
            raise ApiError.of_value("prompt", error) from None

    tokens = await service.with_tokenizer(asked, work)
    return {"count": len(tokens), "max_model_len": service.model.max_model_len, "tokens": tokens}


async def detokenize(asked: DetokenizeRequest, service: Service) -> dict[str, Any]:
    """The text of tokens, control tokens written out.

    Raises:
      ApiError: 404, the model is unknown; 400, the vocabulary has no such token.
    """
    service.adapter(asked.model)

    def work(tokenizer: Any) -> str:
        tokens = list(asked.tokens)
        if max(tokens, default=0) >= service.model.vocab_size:
            raise ApiError.invalid("tokens", f"tokens: ids must be below {service.model.vocab_size}")
        return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)  # type: ignore[no-any-return]

    return {"prompt": await service.with_tokenizer(asked, work)}
