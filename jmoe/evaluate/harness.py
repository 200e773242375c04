"""gpt-oss as a model of the lm-evaluation-harness."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

from jmoe.evaluate.generation import generate_texts
from jmoe.evaluate.score import Score, Span, score
from jmoe.gpt_oss.config import warn_past_positions
from jmoe.gpt_oss.model import GptOss
from jmoe.text import encode

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise ImportError('evaluation needs the lm-evaluation-harness: pip install "jmoe[eval]"') from missing

type Adapter = int | Callable[[Instance], int]
"""Every request's adapter, or what names each request's own; -1 is the model without."""

END_OF_TEXT = "<|endoftext|>"
GENERATION_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


class HarnessModel(TemplateLM):
    """A model and its tokenizer, as lm_eval.simple_evaluate takes them.

    Requests are run longest first, in batches padded to few sizes, and answered in their own order.
    """

    def __init__(
        self,
        model: GptOss,
        tokenizer: Any,
        *,
        adapter: Adapter | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        stop_tokens: Sequence[int] | None = None,
    ) -> None:
        """The harness's view of the model.

        Args:
          tokenizer: what jmoe.text.load_tokenizer returns.
          adapter: which of the model's adapters answers, for all requests or by request; None: 0 if there is one.
          batch_size: sequences computed at once.
          max_length: tokens of context and answer together, beyond which contexts are cut from the left; None: as many
            as the model's positions are stretched to.
          max_gen_toks: tokens of an answer for which the task sets no limit.
          seed: of sampled answers.
          stop_tokens: what ends an answer; None: the configuration's stop_tokens.

        Raises:
          ValueError: a number is out of range, or the adapter is none of the model's.
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
        for name in ("batch_size", "max_length", "max_gen_toks"):
            if getattr(self, name) < 1:
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
        """What stands before a text without context: the end of another, <|endoftext|>."""
        token = self.tokenizer.get_vocab().get(END_OF_TEXT)
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's directory, without slashes: a part of file names in the harness's cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the checkpoint's chat template writes it, up to where its reply begins.

        add_generation_prompt: False where the last message is the beginning of the reply.
        """
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The text's tokens; gpt-oss puts none before them."""
        return encode(self.tokenizer, string)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into its results about the model."""
        adapter = self.adapter if isinstance(self.adapter, int) else "by request"
        return {"model_dtype": str(self.model.dtype), "adapter": adapter}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether greedy decoding gives it) of each request's continuation.

        Raises:
          ValueError: a continuation is empty or longer than max_length.
        """
        pairs = [(request.args, *self.encode_pair(*request.args)) for request in requests]
        adapters = [self.adapter_of(request) for request in requests]
        found = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm, adapters=adapters)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

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
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(text),
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
        if not 1 <= len(continuation) <= self.max_length:
            raise ValueError(f"a continuation must be 1 to {self.max_length} tokens, got {len(continuation)}")
        return Span((context + continuation)[-(self.max_length + 1) : -1], continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each request's context, up to the first of its `until` strings.

        Options of a request: until, max_gen_toks, do_sample, temperature and top_p.

        Raises:
          ValueError: another option, or max_gen_toks leaves no room for a context.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for options, members in groups.items():
                members.sort(key=lambda i: -len(prompts[i]))
                for start in range(0, len(members), self.batch_size):
                    batch = members[start : start + self.batch_size]
                    adapters = [self.adapter_of(requests[i]) for i in batch]
                    texts = self.generate_batch([prompts[i] for i in batch], json.loads(options), adapters, start)
                    for i, text in zip(batch, texts, strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return answers

    def generate_batch(
        self, prompts: Sequence[list[int]], options: dict[str, Any], adapters: list[int], number: int
    ) -> list[str]:
        """The texts that follow prompts of the same options; number: makes this batch's samples its own."""
        wanted = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        if unknown := sorted(wanted.keys() - GENERATION_OPTIONS):
            raise ValueError(f"generation takes {sorted(GENERATION_OPTIONS)}, got {unknown} too")
        limit = wanted["max_gen_toks"]
        if limit >= self.max_length:
            raise ValueError(f"max_gen_toks must be below max_length {self.max_length}, got {limit}")
        return generate_texts(
            self.model,
            self.tokenizer,
            [prompt[-(self.max_length - limit) :] for prompt in prompts],
            wanted["until"],
            stop_tokens=self.stop_tokens(wanted["until"]),
            max_new_tokens=limit,
            temperature=wanted.get("temperature", 0.0),
            top_p=wanted.get("top_p", 1.0),
            seed=self.seed + number,
            adapter_ids=adapters if self.adapters else None,
        )

    def stop_tokens(self, until: Sequence[str]) -> list[int]:
        """The tokens that end an answer, and those of `until` that are special and so in no text."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        named = [tokens[0] for tokens in map(self.tok_encode, until) if len(tokens) == 1 and tokens[0] in special]
        return sorted({*self.ends, self.prefix_token_id, *named})

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
