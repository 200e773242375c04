"""Text to tokens and back, and a reply's text by channel."""

from jmoe.text.tokenizer import Message as Message
from jmoe.text.tokenizer import ReasoningEffort as ReasoningEffort
from jmoe.text.tokenizer import chat_text as chat_text
from jmoe.text.tokenizer import check_vocabulary as check_vocabulary
from jmoe.text.tokenizer import encode as encode
from jmoe.text.tokenizer import load_tokenizer as load_tokenizer
from jmoe.text.tokenizer import mark as mark
from jmoe.text.tokenizer import without_marks as without_marks

__all__ = [
    "Message",
    "ReasoningEffort",
    "chat_text",
    "check_vocabulary",
    "encode",
    "load_tokenizer",
    "mark",
    "without_marks",
]
