"""gpt-oss as a model of the lm-evaluation-harness."""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from jmoe.evaluate.generation import FinishedReply, generate_replies
from jmoe.evaluate.generation_options import CHAT_LIMIT, PLAIN_LIMIT, for_generate
from jmoe.evaluate.score import Score, Span, score
from jmoe.gpt_oss.config import warn_past_positions
from jmoe.gpt_oss.model import GptOss
from jmoe.text import chat_text, encode
from jmoe.text.channels import CONTROL, ENDS_OF_REPLIES, has_channels

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise ImportError('evaluation needs the lm-evaluation-harness: pip install "jmoe[eval]"') from missing

type Adapter = int | Callable[[Instance], int]
"""Every request's adapter, or what names each request's own; -1 is the model without."""

END_OF_TEXT = "<|endoftext|>"

HERE = "\ufdd1"
"""Marks a place in a conversation; no character, for programs' own use."""


class HarnessModel(TemplateLM):
    """A model and its tokenizer, as lm_eval.simple_evaluate takes them.

    Requests are run longest first, in batches padded to few sizes, and answered in their own order.

    A context with `<|start|>` is a conversation. The answer to one is in channels where the tokenizer has them: what
    counts is its final channel, in which alone the strings that end it are looked for.

    Attributes:
      replies: each request for which text was generated, and what the model wrote.
      cut_contexts: the (task, document) of each context that was cut from the left to fit in max_length.
      scored_in_headers: tasks whose given answers were scored where a reply names its channel.
    """

    def __init__(
        self,
        model: GptOss,
        tokenizer: Any,
        *,
        adapter: Adapter | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int | None = None,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """The harness's view of the model.

        Args:
          tokenizer: what jmoe.text.load_tokenizer returns.
          adapter: which of the model's adapters answers, for all requests or by request; None: 0 if there is one.
          batch_size: sequences computed at once.
          max_length: tokens of context and answer together, beyond which contexts are cut from the left; None: as many
            as the model's positions are stretched to.
          max_gen_toks: tokens of an answer for which the task sets no limit; None: 2048 in a conversation, else 256,
            but no more than half of max_length.
          seed: of sampled answers.
          stop_tokens: what ends an answer; None: the configuration's stop_tokens.
          template_variables: what the chat template is told beside the messages, such as reasoning_effort.

        Raises:
          ValueError: a number is out of range, or the model has no such adapter.
        """
        super().__init__()
        rope = model.config.rope
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = int(rope.factor * rope.original_max_position_embeddings) if max_length is None else max_length
        self.max_gen_toks = max_gen_toks
        self.seed = seed
        self.ends = model.config.stop_tokens if stop_tokens is None else tuple(stop_tokens)
        self.template_variables = dict(template_variables or {})
        self.has_channels = has_channels(tokenizer)
        added = tokenizer.get_added_vocab()
        self.control = {added[name]: name for name in CONTROL if name in added}
        self.replies: list[tuple[Instance, FinishedReply]] = []
        self.cut_contexts: set[tuple[str | None, int | None]] = set()
        self.scored_in_headers: set[str | None] = set()
        for name in ("batch_size", "max_length", "max_gen_toks"):
            if (getattr(self, name) or 1) < 1 or getattr(self, name) == 0:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        warn_past_positions(model.config, max_length or 0)
        self.adapters = 0 if model.lora is None else next(iter(model.lora.scale.values())).shape[1]
        if adapter is None and self.adapters > 1:
            raise ValueError(f"adapter must be given with {self.adapters} adapters, got None")
        self.adapter: Adapter = adapter if adapter is not None else self.adapters - 1
        if isinstance(self.adapter, int):
            self.check_adapter(self.adapter)

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self.model.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context, as with the harness's HFLM: BOS, or EOS where there is none."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's directory, without slashes: a part of file names in the harness's cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the checkpoint's chat template writes it, up to where its reply begins.

        Control tokens in messages are marked as jmoe.text.chat_text does it: tok_encode makes text of them.

        add_generation_prompt: False where the last message is the beginning of the reply.

        Raises:
          ValueError: the checkpoint has no chat template, or the template refuses the messages.
        """
        if add_generation_prompt:
            return chat_text(self.tokenizer, chat_history, reply=True, variables=self.template_variables)
        *before, begun = chat_history
        turns = [*before, {**begun, "content": begun["content"] + HERE}]
        text, here, _ = chat_text(self.tokenizer, turns, reply=False, variables=self.template_variables).rpartition(
            HERE
        )
        if not here:
            raise ValueError(f"the chat template must write how the last message begins, {begun['content']!r}")
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The text's tokens; gpt-oss puts none before them.

        Control tokens may be written in it, as with the harness's HFLM; those that apply_chat_template marked are text.
        """
        return encode(self.tokenizer, string)

    def is_conversation(self, context: Sequence[int]) -> bool:
        """Whether a chat template, or a task's own text, has written turns."""
        return any(self.control.get(token) == "<|start|>" for token in context)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results about the model."""
        adapter = self.adapter if isinstance(self.adapter, int) else "by request"
        told = {"template_variables": self.template_variables} if self.template_variables else {}
        return {"model_dtype": str(self.model.dtype), "adapter": adapter, **told}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each request's continuation.

        Raises:
          ValueError: a continuation is empty or longer than max_length.
        """
        pairs = []
        for request in requests:
            with of_task(request):
                context, continuation = self.encode_pair(*request.args)
                self.check_continuation(continuation)
            self.note_context(request, context, self.max_length + 1 - len(continuation))
            if self.has_channels and self.in_header(context) and self.control.get(continuation[0]) != "<|channel|>":
                self.scored_in_headers.add(request.task_name)
            pairs.append((request.args, context, continuation))
        adapters = [self.adapter_of(request) for request in requests]
        found = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm, adapters=adapters)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def in_header(self, context: Sequence[int]) -> bool:
        """Whether a conversation ends in the header of a message."""
        return next((self.control[token] for token in reversed(context) if token in self.control), "") == "<|start|>"

    def note_context(self, request: Instance, context: Sequence[int], room: int) -> None:
        """Remembers the document of a context that is longer than the room for it."""
        if len(context) > room:
            self.cut_contexts.add((request.task_name, request.doc_id))

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of each; an empty context is the prefix token."""
        if context:
            return self._encode_pair(context, continuation)
        tokens = self.tok_encode(continuation)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text's log-probability in nats, in windows of max_length tokens that predict every token once."""
        windows, adapters, owners = [], [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            with of_task(request):
                tokens = self.tok_encode(text)
            for window in get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((("", text), *make_disjoint_window(window)))
                adapters.append(self.adapter_of(request))
                owners.append(owner)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm, adapters=adapters)
        for owner, (log_probability, _) in zip(owners, found, strict=True):
            totals[owner] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        adapters: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """loglikelihood of contexts and continuations that are tokens already."""
        if adapters is None:
            if not isinstance(self.adapter, int):
                raise ValueError("adapters must be given where each request has its own, got None")
            adapters = [self.adapter] * len(requests)
        spans = [self.span(context, continuation) for _, context, continuation in requests]
        # Spans that share a row of the batch become neighbours.
        order = sorted(range(len(spans)), key=lambda i: (-len(spans[i].tokens), spans[i].tokens, adapters[i]))
        answers: dict[int, Score] = {}
        with tqdm(total=len(spans), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in batches(
                order, [(tuple(span.tokens), own) for span, own in zip(spans, adapters, strict=True)], self.batch_size
            ):
                ids = [adapters[i] for i in batch] if self.adapters else None
                answers |= zip(batch, score(self.model, [spans[i] for i in batch], ids, self.batch_size), strict=True)
                bar.update(len(batch))
        return [(answers[i].log_probability, answers[i].greedy) for i in range(len(spans))]

    def span(self, context: list[int], continuation: list[int]) -> Span:
        """What the model reads and should predict, the context cut from the left to fit in max_length.

        Raises:
          ValueError: the continuation is empty or longer than max_length.
        """
        self.check_continuation(continuation)
        return Span((context + continuation)[-(self.max_length + 1) : -1], continuation)

    def check_continuation(self, continuation: Sequence[int]) -> None:
        """Raises ValueError unless there is something to score, no longer than max_length."""
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(f"a continuation must be 1 to {self.max_length} tokens, got {len(continuation)}")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer that follows each request's context, up to the first of its `until` strings.

        Options of a request: as jmoe.evaluate.generation_options knows them.

        Raises:
          ValueError: another option, or max_gen_toks leaves no room for a context.
        """
        prompts = []
        groups: dict[tuple[str, bool], list[int]] = {}
        for i, request in enumerate(requests):
            with of_task(request):
                prompts.append(self.tok_encode(request.args[0]) or [self.prefix_token_id])
            options = json.dumps(request.args[1], sort_keys=True)
            groups.setdefault((options, self.is_conversation(prompts[i])), []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for (options, conversation), members in groups.items():
                members.sort(key=lambda i: -len(prompts[i]))
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    replies = self.generate_batch(
                        [requests[i] for i in batch],
                        [prompts[i] for i in batch],
                        json.loads(options),
                        conversation,
                        start,
                    )
                    for i, reply in zip(batch, replies, strict=True):
                        answers[i] = reply.text
                        self.replies.append((requests[i], reply))
                        self.cache_hook.add_partial("generate_until", requests[i].args, reply.text)
                    bar.update(len(batch))
        return answers

    def generate_batch(
        self,
        requests: Sequence[Instance],
        prompts: Sequence[list[int]],
        options: dict[str, Any],
        conversation: bool,
        number: int,
    ) -> list[FinishedReply]:
        """What follows prompts of the same options; number: makes this batch's samples its own."""
        with of_task(requests[0]):
            until, wanted = for_generate(options, self.default_limit(conversation))
            room = self.max_length - wanted["max_new_tokens"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks must be below max_length {self.max_length}, got {wanted['max_new_tokens']}"
                )
        for request, prompt in zip(requests, prompts, strict=True):
            self.note_context(request, prompt, room)
        channels = conversation and self.has_channels
        adapters = [self.adapter_of(request) for request in requests]
        return generate_replies(
            self.model,
            self.tokenizer,
            [prompt[-room:] for prompt in prompts],
            until,
            channels,
            stop_tokens=self.stop_tokens(until, channels),
            adapter_ids=adapters if self.adapters else None,
            **{**wanted, "seed": wanted.get("seed", self.seed) + number},
        )

    def default_limit(self, conversation: bool) -> int:
        """The tokens of an answer for which the task sets no limit."""
        if self.max_gen_toks is not None:
            return self.max_gen_toks
        return min(CHAT_LIMIT if conversation else PLAIN_LIMIT, max(1, self.max_length // 2))

    def stop_tokens(self, until: Sequence[str], channels: bool = False) -> list[int]:
        """The tokens that end an answer, and those of `until` that are special and so in no text.

        channels: whether the answer is in channels, where control tokens end no more than a message of several.
        """
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        named = {tokens[0] for tokens in map(self.tok_encode, until) if len(tokens) == 1 and tokens[0] in special}
        ends = {self.tokenizer.get_vocab().get(END_OF_TEXT), self.tokenizer.eos_token_id} - {None}
        within = {token for token, name in self.control.items() if name not in ENDS_OF_REPLIES}
        return sorted({*self.ends, *ends, *named} - (within if channels else set()))

    def adapter_of(self, request: Instance) -> int:
        """The adapter that answers the request."""
        return self.adapter if isinstance(self.adapter, int) else self.check_adapter(self.adapter(request))

    def check_adapter(self, adapter: int) -> int:
        """The adapter's number.

        Raises:
          ValueError: the model has none of this number.
        """
        if not -1 <= adapter < self.adapters:
            raise ValueError(f"adapter must be in [-1, {self.adapters}), got {adapter}")
        return adapter


@contextlib.contextmanager
def of_task(request: Instance) -> Iterator[None]:
    """Names the request's task in a ValueError."""
    try:
        yield
    except ValueError as error:
        if request.task_name is None:
            raise
        raise ValueError(f"task {request.task_name}, document {request.doc_id}: {error}") from error


def batches(order: Iterable[int], inputs: Sequence[tuple], most: int) -> Iterable[list[int]]:
    """The indices in runs with at most so many different inputs."""
    run: list[int] = []
    different: set[tuple] = set()
    for i in order:
        if len(different | {inputs[i]}) > most:
            yield run
            run, different = [], set()
        run.append(i)
        different.add(inputs[i])
    if run:
        yield run
