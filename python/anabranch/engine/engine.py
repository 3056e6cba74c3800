"""`Engine`: a model, its cache and the loop, behind generate(), stream(), add() and step()."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from anabranch import hf
from anabranch._check import told, whole
from anabranch.backends.formats import KVFormat
from anabranch.backends.registry import choose
from anabranch.engine.call import Call
from anabranch.engine.handle import Handle
from anabranch.engine.loop import Loop
from anabranch.engine.parallel import Ranks
from anabranch.engine.prepare import Preparation
from anabranch.engine.segments import Segments
from anabranch.errors import RankLost
from anabranch.kv.cache import TreeCache
from anabranch.kv.prefix import PrefixCache
from anabranch.records.events import Event
from anabranch.records.stats import EngineStats
from anabranch.runner.compiled import CompiledForward, unfit_to_compile
from anabranch.runner.graph import DecodeGraph, unfit
from anabranch.runner.invariant import Invariant, check_rows, require_invariant
from anabranch.runner.linear import linear_context
from anabranch.runner.ranks import sharded
from anabranch.strategies import Strategy
from anabranch.text.prompts import Prompt


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
    max_threads: most threads, of all requests, that decode at a time; more wait for their turn, which changes no token.
        None: as many as fit the pages.
    own_linear: on a CPU, linear layers run through a kernel of ours while the engine's forwards last (see
        `anabranch.runner.linear`); True or False decide, None: where it pays.
    cuda_graphs: a decode step whose tree is that of the steps before is one CUDA graph replay (see `DecodeGraph`).
        None: on a CUDA device with a backend that allows it ("triton", "cuda"). True asks for it, and raises ValueError
        elsewhere. A model whose forward cannot be captured runs without, and a warning says so.
    prefix_cache: whether what was computed is found again by requests that begin with the same tokens (prompts,
        conversations, branches that have ended): `Metrics.cached_tokens`, `stats`. A hit changes no token. Its pages
        count as free and are given up when they are needed, the least recently used first. It is forgotten when
        weights, adapters or hooks of the model change (see `clear_prefix_cache`).
    max_queue: most requests of `add` that may wait to begin; one more raises `QueueFull`. None: no limit. (`generate`
        and `stream` wait themselves, and are never refused.)
    compile: steps through the model's forward under torch.compile, on a CPU with a C++ compiler. True: behind the first
        few steps, which run as they are; raises ValueError where it cannot be had. "auto": only once this engine has
        worked for two minutes (or as long as compiling this model took here before), and only if a compiled step then
        proves faster. The compiled forward is compared with the eager one before it is used; a model that compiles to
        something else, or not at all, stays eager (True warns). ``engine.compiled`` says what steps do, and why (see
        docs/guides/compiled_steps.md).
    segment_vectors: what ParaThinker's models add to K and V: `SegmentVectors`, or what they are read from (a
        checkpoint's folder or file, a state dict). None: they are looked for in the model, and where it came from, once
        a strategy asks for them.
    kv_format: how the cache keeps K and V: "auto", in the model's dtype; "int8" or "fp8" (e4m3), a byte an element and
        a factor for each token and head: about half the memory of bfloat16, and answers that may differ in places (see
        docs/guides/own_loop.md). Backends "cpu", "triton" and "reference" have them.
    latent: for a model of multi-head latent attention (DeepSeek): the cache keeps its latents, one row for all heads,
        and its up-projections are absorbed (see docs/guides/attention_shapes.md). Steps run as they are, neither
        compiled nor captured; not with ``batch_invariant``.
    rank_timeout: with a model that is shared out among processes (``tp_plan="auto"``), seconds after which one that
        does not answer counts as lost: `RankLost`. Every process makes the engine; rank 0 takes requests, and the
        others `follow`, or make the same calls of `generate` (see docs/guides/tensor_parallel.md).

    ``engine.cache`` is its `TreeCache`. Any Python thread may call any method, at any time: requests of all callers
    share the forwards, join between any two of them and leave when they are answered.

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
        max_queue: int | None = None,
        segment_vectors: Any = None,
        prefix_cache: bool = True,
        kv_format: Any = "auto",
        compile: bool | str = "auto",
        latent: bool = False,
        rank_timeout: float = 120.0,
    ):
        max_rows = whole(max_rows, "max_rows", 1, hint=" (tokens a forward)")
        if max_threads is not None:
            max_threads = whole(max_threads, "max_threads", 1, hint=" (threads decoding at a time) or None")
        if max_queue is not None:
            max_queue = whole(max_queue, "max_queue", 1, hint=" (requests that wait to begin) or None")
        if num_pages is not None:
            num_pages = whole(num_pages, "num_pages", 1, hint=", or None for as many as free memory allows")
        page_size = whole(page_size, "page_size", 1, hint=" (tokens a page)")
        if cuda_graphs is not None and not isinstance(cuda_graphs, bool):
            raise ValueError(f"cuda_graphs={cuda_graphs!r}; pass True, False or None (where they can be had)")
        if not isinstance(compile, bool) and compile != "auto":
            raise ValueError(f"compile={compile!r}; pass True, False or 'auto' (where it pays)")
        if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
            raise TypeError(f"tokenizer: expected a Transformers tokenizer or None, got {told(tokenizer)}")
        if isinstance(rank_timeout, bool) or not isinstance(rank_timeout, (int, float)) or not rank_timeout > 0:
            raise ValueError(f"rank_timeout={rank_timeout!r}; pass seconds > 0")
        self.ranks = Ranks(model, float(rank_timeout)) if sharded(model) else None
        shape = hf.enable(model)
        fmt = KVFormat.of(kv_format, shape.dtype)
        if not isinstance(latent, bool):
            raise ValueError(f"latent={latent!r}; pass True or False")
        if latent and batch_invariant:
            raise ValueError("latent=True: its products have no batch-invariant form; leave one of the two out")
        if latent and self.ranks is not None:
            raise ValueError("latent=True: not with a model that is shared out among processes; leave latent out")
        head_dim, v_head_dim = hf.latent_dims(model) if latent else (shape.head_dim, shape.v_head_dim)
        # Raises for one that cannot run.
        choose(backend, shape.device, shape.dtype, head_dim, fmt.dtype, 0 if latent else v_head_dim)
        if not isinstance(batch_invariant, bool):
            raise ValueError(f"batch_invariant={batch_invariant!r}; pass True or False")
        if not isinstance(prefix_cache, bool):
            raise ValueError(f"prefix_cache={prefix_cache!r}; pass True or False")
        if batch_invariant and self.ranks is not None:
            raise ValueError(
                "batch_invariant=True: the model is shared out among processes, and the order in which their parts are "
                "summed may depend on the rows; load it whole, or leave batch_invariant out"
            )
        if batch_invariant:
            require_invariant(model, backend, own_linear)
            backend = "cpu"
        unfit_compile = unfit_to_compile(model, shape.device, batch_invariant)
        if latent:
            unfit_compile = "forwards over latents (latent=True) are not traced"
        if compile is True and unfit_compile is not None:
            raise ValueError(f"compile=True: {unfit_compile}, or leave compile out")
        self.max_threads, self.max_queue = max_threads, max_queue
        self.model, self.tokenizer, self.backend, self.max_rows = model, tokenizer, backend, max_rows
        if self.ranks is None:
            self.cache = TreeCache.for_model(
                model, num_pages=num_pages, page_size=page_size, kv_format=fmt, latent=latent
            )
        else:
            self.cache = self.ranks.make_cache(model, num_pages, page_size, fmt)
        self.cache.batch_invariant = batch_invariant
        self.prefixes = PrefixCache(self.cache) if prefix_cache else None
        self.linear: Any = linear_context(model, own_linear)
        if batch_invariant:
            self.linear = Invariant(model)
            check_rows(model, self.linear, backend)
        self.graphs = self._decode_graph(cuda_graphs)
        forward: Any = CompiledForward if self.ranks is None else self.ranks.forward
        self.compiled: CompiledForward = forward(
            model, self.cache, backend, compile, own_linear, self.linear, unfit=unfit_compile
        )
        self.segments = Segments(model, segment_vectors)
        self.prepare = Preparation(self)
        self.loop = Loop(self)
        self._nested: list[Loop] = []  # of calls that were made inside a step

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
        ``priority=`` and ``deadline=``: as for `add`.

        Prompts, and threads, that do not fit the cache together wait for one another. Raises ValueError, before
        anything ran, for an empty prompt, ids outside the vocabulary, an option that is not honoured, or a prompt that
        can never fit in ``num_pages`` or, with a model that looks its positions up in a table (GPT-2, OPT), in that
        table; a thread that decodes to the table's end stops there with reason "length". Raises it later where scores
        leave no token to choose (all −inf, or a NaN). The model runs in its own dtype, under torch.autocast too. After
        any exception, a strategy's own or Ctrl-C, all pages are free again and the engine is as good as new.
        """
        if self.ranks is not None and not self.ranks.leads:
            return self.ranks.follow(one_call=True)
        with self._told() as outcome:
            call, many = self.prepare.call(prompt, strategy, generation_config, seed, max_new_tokens, kwargs)
            with self._under_way(call) as loop:
                loop.wait(call, lambda: call.ended)
            results = call.outcome()
            outcome.append(results if many else results[0])
        return outcome[0]

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
        if self.ranks is not None and not self.ranks.leads:
            return self.ranks.finishes()
        with self._told(begins=True):
            call, _ = self.prepare.call(
                prompt, strategy, generation_config, seed, max_new_tokens, kwargs, listened=True
            )
        return self._events(call)

    def add(
        self,
        prompt: Prompt,
        strategy: Strategy | None = None,
        generation_config: Any = None,
        seed: int = 0,
        max_new_tokens: int | None = None,
        priority: int = 0,
        deadline: float | None = None,
        **kwargs: Any,
    ) -> Handle:
        """Take in one prompt and return at once; it joins whoever is there with the next step.

        The arguments are those of `generate`, which is adding and waiting, and further:

        priority: −100 to 100. A request of priority p goes before those that came up to 100 · p requests earlier: to
            begin, and to keep its pages in a shortage. (So a low one waits longer, but never for ever.)
        deadline: seconds from now. A request that is not answered by then ends: its `Handle.result` raises
            `DeadlineExceeded`, which holds what there was so far.

        Returns a `Handle`: ``.result()``, ``.events()``, ``.abort()``, ``.done``. An exception in the request's
        strategy, in one of its logits processors or in an ``until`` ends that request alone, and comes out of its
        ``result()``. Raises `QueueFull` when ``Engine(max_queue=…)`` requests wait already, and what `generate` raises
        before anything ran.

        >>> handle = engine.add("Is the sea salty?", max_new_tokens=64)
        >>> while engine.step(): ...
        >>> handle.result().text
        """
        self._require_lead("add")
        options = {**kwargs, "priority": priority, "deadline": deadline}
        call, many = self.prepare.call(
            prompt, strategy, generation_config, seed, max_new_tokens, options, listened=True
        )
        if many:
            raise ValueError(
                f"prompt: add takes one prompt, got a list of {len(call.requests)}; add each, or use generate"
            )
        self.loop.submit(call, limited=True)
        return Handle(self.loop, call)

    def step(self) -> bool:
        """Do one packed forward for all requests that are there; whether anything is left to do.

        What goes wrong with a request comes out of its own `Handle.result`, not of here. After Ctrl-C in the middle of
        a step all other requests go on with the next.
        """
        self._require_lead("step")
        if self.loop.turns.mine:
            raise RuntimeError("step: called inside a step, by a strategy, a logits processor or an until")
        return self.loop.step()

    def serve(self, stop: threading.Event) -> None:
        """Step whenever there is something to do, until `stop` is set: for a thread of its own.

        >>> stop = threading.Event()
        >>> thread = threading.Thread(target=engine.serve, args=(stop,))
        """
        if self.ranks is not None and not self.ranks.leads:
            self.ranks.follow()
            return
        work = self.loop.work
        while not stop.is_set():
            work.clear()
            if not self.step():
                work.wait(0.1)  # `stop` sets no `work`

    def abort(self) -> None:
        """End everything that is running or waiting and free every page. generate() then returns what there was so
        far."""
        for loop in (self.loop, *self._nested):
            loop.abort_all()

    def follow(self) -> None:
        """On every rank but 0: take part in rank 0's forwards until it closes the engine, or its program ends.

        Raises `RankLost` when rank 0 or another process is gone.

        >>> if torch.distributed.get_rank() == 0:
        ...     print(engine.generate("Is the sea salty?").text)
        ...     engine.close()
        ... else:
        ...     engine.follow()
        """
        if self.ranks is None or self.ranks.leads:
            raise RuntimeError(
                "follow: this process decides itself; the others of a model that is shared out follow it"
            )
        self.ranks.follow()

    @property
    def lost(self) -> RankLost | None:
        """Why nothing can be computed any more: another process of a model that is shared out is gone. None: all is
        well."""
        return None if self.ranks is None else self.ranks.group.lost

    def close(self) -> None:
        """End everything and free every page; under tensor parallelism the other processes' `follow` returns."""
        self.abort()
        if self.ranks is not None:
            self.ranks.close()

    def stats(self) -> EngineStats:
        """What is going on now, and what the prefix cache has saved since the engine was made."""
        prefixes, loop = self.prefixes, self.loop
        found = prefixes and (prefixes.lookups, prefixes.hits, prefixes.tokens_asked, prefixes.tokens_found)
        kept = self.cache.usage().pages_kept
        return EngineStats(
            len(loop.waiting), len(loop.active), loop.scheduler.steps, *(found or (0, 0, 0, 0)), pages_kept=kept
        )

    def clear_prefix_cache(self) -> None:
        """Forget all that was computed for requests that have ended.

        Needed only where the model was changed in a way that cannot be seen from its weights' versions, its adapters or
        its hooks, such as a part of a weight written through ``.data``, or an attribute that a module's forward reads.
        """
        if self.prefixes is not None:
            with self.loop.turns.between():
                self.prefixes.clear()

    @property
    def vocab_size(self) -> int:
        """Token ids that the model has embeddings for; follows ``model.resize_token_embeddings``."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    # ---------------------------------------------------------------------------------------- inside

    def _decode_graph(self, setting: bool | None) -> DecodeGraph | None:
        if setting is False:
            return None
        reason = unfit(self.cache, self.backend)
        if reason is None and self.ranks is not None:
            reason = "the model is shared out among processes, whose graphs would have to be captured together"
        if reason is None and hf.is_compiled(self.model):
            reason = "the model is compiled by torch.compile, which has graphs of its own; pass the model itself"
        if reason is None:
            return DecodeGraph(self.model, self.cache, self.backend)
        if setting:
            raise ValueError(f"cuda_graphs=True: {reason}, or leave cuda_graphs out")
        return None

    def _require_lead(self, what: str) -> None:
        if self.ranks is not None:
            self.ranks.refuse(what)

    def _told(self, begins: bool = False) -> AbstractContextManager[list[Any]]:
        """A call of generate or stream goes inside: what is put into the list, or its error, goes to the other
        processes of the model. begins: its end comes later, unless it fails here."""
        if self.ranks is None or self.loop.turns.mine:
            return nullcontext([])
        return self.ranks.telling(begins)

    @contextmanager
    def _under_way(self, call: Call) -> Iterator[Loop]:
        """A call's requests are in the loop inside; behind it they have ended, on any way out.

        Inside a step there is no waiting for another one: a call that is made there, by a strategy or an until, has a
        loop of its own.
        """
        nested = self.loop.turns.mine
        loop = Loop(self) if nested else self.loop
        if nested:
            self._nested.append(loop)
        try:
            loop.submit(call)
            yield loop
        finally:
            if not call.ended:
                loop.abort([call], drop=True)
            if nested:
                self._nested.remove(loop)

    def _events(self, call: Call) -> Iterator[Event]:
        with self._told() as outcome:
            with self._under_way(call) as loop:
                while not call.ended:
                    loop.wait(call, lambda: call.ended or bool(call.events))
                    yield from call.take()
            yield from call.take()
            outcome.append(call.outcome())
