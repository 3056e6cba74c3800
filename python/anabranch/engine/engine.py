"""`Engine`: a model, its cache and the loop, behind generate() and stream()."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from anabranch import hf
from anabranch._check import seeds_of, told, whole
from anabranch.backends.registry import choose
from anabranch.engine.drafting import draft_of
from anabranch.engine.drafts import check_draft
from anabranch.engine.fit import check_model, check_rotation
from anabranch.engine.loop import Call
from anabranch.engine.options import prepare_config
from anabranch.engine.request import Request
from anabranch.engine.sampling import Samplers
from anabranch.kv.cache import TreeCache
from anabranch.records.events import Event
from anabranch.runner.graph import DecodeGraph, unfit
from anabranch.runner.invariant import Invariant, check_rows, require_invariant
from anabranch.runner.linear import linear_context
from anabranch.strategies import Plain, Strategy
from anabranch.strategies.plain import is_plain
from anabranch.text.prompts import Prompt, Text, check_template, split_prompts
from anabranch.text.tokens import Tokens


class Engine:
    """Runs strategies on a Hugging Face decoder.

    model: any decoder; it is switched to ``attn_implementation="anabranch"`` if it is not already (an encoder, a
        state-space model or the like is refused, with the reason).
    tokenizer: None: prompts, headers and answers are token ids.
    num_pages: pages of the cache, each of `page_size` tokens; None: as many as free memory allows.
    backend: attention backend of every forward: "auto", "cpu", "triton", "cuda" or "reference".
    batch_invariant: the same seed gives the same tokens, bit for bit, alone, in a batch and after a pre-emption, in
        float32, bfloat16 and float16. On a CPU only, and slower (see docs/guides/strategies.md). A
        model with an operation whose rows are not known to be independent is refused, by the operation's name.
    max_rows: most tokens one forward takes; longer prompts are prefilled in chunks, beside what is decoding.
    max_threads: most threads, of all prompts of a call, that decode at a time; more wait for their turn, which changes
        no token. None: as many as fit the pages.
    own_linear: on a CPU, linear layers run through a kernel of ours while the engine's forwards last (see
        engine/linear.py); True or False decide, None: where it pays.
    cuda_graphs: a decode step whose tree is that of the steps before is one CUDA graph replay (see `DecodeGraph`).
        None: on a CUDA device with a backend that allows it ("triton", "cuda"). True asks for it, and raises ValueError
        elsewhere. A model whose forward cannot be captured runs without, and a warning says so.

    ``engine.cache`` is its `TreeCache`. An engine serves one Python thread at a time; `abort` may come from any.

    >>> engine = ab.Engine(model, tokenizer)
    >>> engine.generate("Is the sea salty?", strategy=ab.SelfConsistency(8), max_new_tokens=64).text
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        num_pages: int | None = None,
        page_size: int = 16,
        backend: str = "auto",
        max_rows: int = 512,
        max_threads: int | None = None,
        own_linear: bool | None = None,
        cuda_graphs: bool | None = None,
        batch_invariant: bool = False,
    ):
        max_rows = whole(max_rows, "max_rows", 1, hint=" (tokens a forward)")
        if max_threads is not None:
            max_threads = whole(max_threads, "max_threads", 1, hint=" (threads decoding at a time) or None")
        if num_pages is not None:
            num_pages = whole(num_pages, "num_pages", 1, hint=", or None for as many as free memory allows")
        page_size = whole(page_size, "page_size", 1, hint=" (tokens a page)")
        if cuda_graphs is not None and not isinstance(cuda_graphs, bool):
            raise ValueError(f"cuda_graphs={cuda_graphs!r}; pass True, False or None (where they can be had)")
        if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise TypeError(f"tokenizer: expected a Transformers tokenizer or None, got {told(tokenizer)}")
        shape = hf.enable(model)
        choose(backend, shape.device, shape.dtype, shape.head_dim)  # raises for one that is unknown or cannot run
        if not isinstance(batch_invariant, bool):
            raise ValueError(f"batch_invariant={batch_invariant!r}; pass True or False")
        if batch_invariant:
            require_invariant(model, backend, own_linear)
            backend = "cpu"
        self.max_threads = max_threads
        self.model, self.tokenizer, self.backend, self.max_rows = model, tokenizer, backend, max_rows
        self.cache = TreeCache.for_model(model, num_pages=num_pages, page_size=page_size)
        self.cache.batch_invariant = batch_invariant
        self.linear: Any = linear_context(model, own_linear)
        if batch_invariant:
            self.linear = Invariant(model)
            check_rows(model, self.linear, backend)
        self.graphs = self._decode_graph(cuda_graphs)
        self._runs: set[Call] = set()
        self._tokens = Tokens(tokenizer)

    # ---------------------------------------------------------------------------------------- public

    def generate(
        self,
        prompt: Prompt | list[Prompt],
        strategy: Strategy | None = None,
        generation_config: Any = None,
        seed: int | list[int] = 0,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Answer one prompt (→ `Result`) or many (→ a list of them); many share their forwards.

        prompt: a string, tokenised as it stands (no chat template); a list of token ids; or a chat
            (``[{"role": "user", "content": …}]``) through the tokenizer's chat template. A list of those is many. A
            chat that ends with a message of the assistant is continued: what is written goes on with that message.
        strategy: None decodes plainly: greedy, it equals ``model.generate(do_sample=False)`` token for token in
        float32.
        generation_config: Transformers' own; by default the model's. Further keywords set its fields
            (``do_sample=True, temperature=0.7``); ``logits_processor=`` and ``stopping_criteria=`` take lists, as in
            Transformers.
        seed: of all sampling; a thread's stream depends on the seed and the thread's place in the tree alone. With
            ``Engine(batch_invariant=True)`` the same seed gives the same answer whatever else is in the call; without,
            a score's last bits depend on the rows beside it, which shows seldom in float32 and often in bfloat16. A
            list gives each prompt its own.
        max_new_tokens: most tokens sampled one after another (along the critical path) for one prompt; default: the
            config's ``max_new_tokens``, else 256. ``max_total_tokens=``: most tokens sampled over all threads of a
            prompt.
        ``chat_template_kwargs={"enable_thinking": False, "tools": […], "documents": […]}``: what the chat template
        takes besides the messages. ``"continue_final_message"`` and ``"add_generation_prompt"`` decide themselves
        whether a chat's last message is continued; given together with a prompt that is no chat it is an error.
        ``logprobs=True`` records the log-probability of every sampled token (of the raw scores, before any processor)
        in the result's tree and trace.

        Prompts, and threads, that do not fit the cache together wait for one another. Raises ValueError, before
        anything ran, for an empty prompt, ids outside the vocabulary, an option that is not honoured, or a prompt that
        can never fit in ``num_pages`` or, with a model that looks its positions up in a table (GPT-2, OPT), in that
        table; a thread that decodes to the table's end stops there with reason "length". Raises it later where scores
        leave no token to choose (all −inf, or a NaN). The model runs in its own dtype, under torch.autocast too. After
        any exception, a strategy's own or Ctrl-C, all pages are free again and the engine is as good as new.
        """
        run, many = self._prepare(prompt, strategy, generation_config, seed, max_new_tokens, kwargs, streaming=False)
        for _ in self._drive(run):
            pass
        return list(run.results) if many else run.results[0]

    def stream(
        self,
        prompt: Prompt | list[Prompt],
        strategy: Strategy | None = None,
        generation_config: Any = None,
        seed: int | list[int] = 0,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> Iterator[Event]:
        """Like `generate`, as it happens: yields `Token`, `Fork`, `Join`, `Discard` and, for each prompt, `Finish` with
        its `Result`. Leaving the loop early frees everything."""
        run, _ = self._prepare(prompt, strategy, generation_config, seed, max_new_tokens, kwargs, streaming=True)
        return self._drive(run)

    def abort(self) -> None:
        """End everything that is running and free every page. generate() then returns what there was so far."""
        for run in list(self._runs):
            run.abort()

    @property
    def vocab_size(self) -> int:
        """Token ids that the model has embeddings for; follows ``model.resize_token_embeddings``."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    # ---------------------------------------------------------------------------------------- inside

    def _decode_graph(self, setting: bool | None) -> DecodeGraph | None:
        if setting is False:
            return None
        reason = unfit(self.cache, self.backend)
        if reason is None and hf.is_compiled(self.model):
            reason = "the model is compiled by torch.compile, which has graphs of its own; pass the model itself"
        if reason is None:
            return DecodeGraph(self.model, self.cache, self.backend)
        if setting:
            raise ValueError(f"cuda_graphs=True: {reason}, or leave cuda_graphs out")
        return None

    def _drive(self, run: Call) -> Iterator[Event]:
        self._runs.add(run)
        try:
            yield from run.drive()
        finally:
            run.release()
            self._runs.discard(run)

    def _prepare(
        self,
        prompt: Any,
        strategy: Any,
        config: Any,
        seed: Any,
        max_new_tokens: Any,
        kwargs: dict[str, Any],
        streaming: bool,
    ) -> tuple[Call, bool]:
        """Check everything and set up the run; nothing in the cache changes here."""
        strategy = Plain() if strategy is None else strategy
        if not isinstance(strategy, Strategy):
            raise TypeError(
                f"strategy: got {strategy!r}; pass an instance of a Strategy, such as ab.SelfConsistency(n=8), or None"
            )
        limit = check_model(self.model, self.cache)
        extra, criteria = (kwargs.pop(name, None) for name in ("logits_processor", "stopping_criteria"))
        budget = kwargs.pop("max_total_tokens", None)
        if budget is not None:
            budget = whole(budget, "max_total_tokens", 1, hint=", or None")
        logprobs = kwargs.pop("logprobs", False)
        if not isinstance(logprobs, bool):
            raise ValueError(
                f"logprobs={logprobs!r}; pass True to record each sampled token's log-probability, or False"
            )
        template = check_template(kwargs.pop("chat_template_kwargs", None))
        plain = is_plain(strategy)
        if (draft := draft_of(strategy)) is not None:
            check_draft(draft.draft, self)
        prepared = prepare_config(self.model, config, max_new_tokens, kwargs, samples=not plain)
        samplers = Samplers(self.model, self.tokenizer, prepared, extra, criteria)
        if self._tokens.tokenizer is not self.tokenizer:
            self._tokens = Tokens(self.tokenizer)
        text = Text(self.tokenizer, self.vocab_size, samplers.base.eos_ids, self._tokens)
        prompts, many = split_prompts(prompt)
        seeds = seeds_of(seed, len(prompts))
        ids = [text.prompt_ids(p, f"prompt[{i}]" if many else "prompt", template) for i, p in enumerate(prompts)]
        # Without anything that could end it early, plain decoding writes all it may; its last token needs no place.
        base = samplers.base
        endless = plain and not budget and not base.eos_ids and not base.criteria and not base.stop_strings
        self._check_room(ids, prepared.max_new_tokens - 1 if endless else 0, many)
        _check_positions(ids, limit, many)
        check_rotation(self.model, ids, prepared.max_new_tokens, self.max_rows, many)
        buffer: deque[Event] = deque()
        requests = [
            Request(
                i,
                tokens,
                strategy,
                s,
                cache=self.cache,
                text=text,
                samplers=samplers,
                max_total_tokens=budget,
                max_new_tokens=prepared.max_new_tokens,
                logprobs=logprobs,
                position_limit=limit,
                emit=buffer.append if streaming else None,
                prompt=prompts[i],
                template=template,
                draft=draft,
            )
            for i, (tokens, s) in enumerate(zip(ids, seeds, strict=True))
        ]
        return Call(self, requests, buffer), many

    def _check_room(self, ids: list[list[int]], more: int, many: bool) -> None:
        """ValueError for a prompt that, with `more` tokens behind it, can never fit in the cache."""
        pages, size = self.cache.num_pages, self.cache.page_size
        for i, tokens in enumerate(ids):
            if len(tokens) + more > pages * size:
                what = f"{len(tokens)} tokens" + (f" and {more} more" if more else "")
                raise ValueError(
                    f"prompt{f'[{i}]' if many else ''}: {what} can never fit in num_pages={pages} of {size} tokens; "
                    f"make the engine with num_pages of at least {-(-(len(tokens) + more) // size) + (not more)}"
                    + (", or use a smaller max_new_tokens" if more else "")
                )


def _check_positions(ids: list[list[int]], limit: int | None, many: bool) -> None:
    """ValueError for a prompt that is longer than the positions which the model has embeddings for."""
    for i, tokens in enumerate(ids):
        if limit is not None and len(tokens) > limit:
            raise ValueError(
                f"prompt{f'[{i}]' if many else ''}: {len(tokens)} tokens, but the model has embeddings for {limit} "
                "positions; shorten it, or use a model with a longer context"
            )
