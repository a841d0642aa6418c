"""The engine: a model served from a shared prefix store.

    from stemcache import Engine, SamplingParams

    with Engine.load("path-or-hub-name") as engine:
        for completion in engine.generate(["..."], SamplingParams(max_tokens=32)):
            print(completion.text, completion.usage.cached_tokens)

Invariant: a request is checked before it is queued, so what reaches the engine's thread can be served.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stemcache.engine import attention
from stemcache.engine.activity import Activity
from stemcache.engine.apart import apart
from stemcache.engine.blend import Blend
from stemcache.engine.cache import Cache
from stemcache.engine.checkpoint import Checkpoint, device_named, load_checkpoint
from stemcache.engine.cold import ColdCache, ColdOptions, ColdStats
from stemcache.engine.completions import completions
from stemcache.engine.cost import CostSurface
from stemcache.engine.families import require_served
from stemcache.engine.freed_memory import give_back_freed_memory, keep_freed_memory
from stemcache.engine.grammar import GrammarCompiler
from stemcache.engine.loop import EngineLoop
from stemcache.engine.movable import require_movable
from stemcache.engine.options import MAX_RUNNING, MAX_STEP_LOGITS, MAX_STEP_TOKENS, EngineOptions
from stemcache.engine.outputs import Completion
from stemcache.engine.pins import PinInfo
from stemcache.engine.policies import QUEUES
from stemcache.engine.prompts import Prompts, TemplateOptions
from stemcache.engine.request_check import RequestCheck
from stemcache.engine.runner import ModelRunner
from stemcache.engine.salts import Salts
from stemcache.engine.sampling import SamplingParams
from stemcache.engine.sequence import Request
from stemcache.engine.stream import Stream
from stemcache.engine.tentative import Tentative
from stemcache.engine.token_rules import TokenRules
from stemcache.prefixtree.expected import NOTHING, Expected
from stemcache.prefixtree.explain import Explanation
from stemcache.prefixtree.namespace import Namespace
from stemcache.prefixtree.store import StoreStats

PUBLIC: Final = b"stemcache.public"
"""The tenant whose chunks all others may have, as copies (prefixtree/corpus.py). For what is nobody's secret."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot: sequences running and waiting, preemptions since the start, and the store's counters."""

    running: int
    waiting: int
    preemptions: int
    store: StoreStats


class Engine:
    """Serves one model. Methods may be called from any thread; computation happens on the engine's own.

    Attributes:
        prompts: the tokenizer and the chat template. grammars: what compiles the grammars of requests.
        cache: what is cached, for its owner to look at and change.
        cost: how long steps take, learned while serving; anybody may read it.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        *,
        pool_bytes: int = 2 << 30,
        chunk_tokens: int = 64,
        max_step_tokens: int = MAX_STEP_TOKENS,
        max_running: int = MAX_RUNNING,
        eviction: str = "pgdsf",
        queue: str = "cache",
        cold: ColdOptions | None = None,
    ) -> None:
        if queue not in QUEUES:
            raise ValueError(f"queue must be one of {', '.join(QUEUES)}, not {queue!r}")
        keep_freed_memory()
        self.model_name = name
        self.created = int(time.time())
        self.prompts = Prompts(checkpoint.tokenizer)
        make = partial(
            ModelRunner, checkpoint.model, pool_bytes=pool_bytes, chunk_tokens=chunk_tokens, max_running=max_running
        )
        # Each thread has a GPU of its own that is current: what the caller's is stays its choice.
        self._runner = apart(make) if checkpoint.model.device.type == "cpu" else make()
        self._fingerprint = checkpoint.fingerprint
        self.cost = CostSurface()
        self._cold = ColdCache(self._runner.pool, cold or ColdOptions(), self.cost)
        self.vocab_size = self._runner.vocab_size
        self.chunk_tokens = chunk_tokens
        pool_tokens = self._runner.pool.n_chunks * chunk_tokens
        self.max_model_len = min(self._runner.context_length, pool_tokens)
        self._eos = _eos_ids(checkpoint)
        self.grammars = GrammarCompiler(checkpoint.tokenizer, self.vocab_size, self._eos)
        self._loop = EngineLoop(
            self._runner,
            self.prompts,
            self._eos,
            self._cold,
            self.cost,
            max_step_tokens=max_step_tokens,
            max_running=max_running,
            max_logit_rows=max(1, MAX_STEP_LOGITS // self.vocab_size),
            eviction=eviction,
            cache_first=queue == "cache",
        )
        self._request_check = RequestCheck(
            self.vocab_size, self.max_model_len, self._runner.context_length, has_text=self.prompts.backend is not None
        )
        self._loop.store.share(self.namespace(PUBLIC))
        self._salts = Salts()
        self.cache = Cache(self._loop, self._runner.layout, self.namespace, self._salts)

    @classmethod
    def load(
        cls,
        path_or_name: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "auto",
        **options: Unpack[EngineOptions],
    ) -> Engine:
        """Load a folder in Hugging Face's form, or a hub name.

        device: "auto", "cpu" or "cuda"; "auto" is the CPU until the GPU's path has been seen to run on one.
        dtype: "auto" (the checkpoint's own where it is computed natively), "float32", "bfloat16" or "float16".
        options: see EngineOptions.
        Raises ModelLoadError, CapacityError when the pool cannot hold one chunk, ValueError for other values that are
        none, TierError for a cold tier that cannot be used as asked.
        """
        checkpoint = apart(partial(load_checkpoint, path_or_name, device=device_named(device), dtype=dtype))
        name = Path(path_or_name).name if Path(path_or_name).exists() else str(path_or_name)
        return cls(checkpoint, name, **options)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str = "model",
        **options: Unpack[EngineOptions],
    ) -> Engine:
        """Serve a model that is already in memory, which is then stemcache's: its attention is switched, and on a CPU
        its projections are fused and bfloat16 weights packed, so it can be neither trained nor saved any more.

        options: see EngineOptions. Without a tokenizer only token ids are served. Raises ModelLoadError.

        A thread that has computed with torch keeps threads that slow the engine's (see `apart`): make the model on one
        that ends, as `load` does, where each millisecond counts.
        """
        require_served(model.config)
        attention.register()
        model.set_attn_implementation(attention.NAME)
        return cls(Checkpoint(model.eval(), tokenizer, os.urandom(32)), name, **options)

    # -- prompts -----------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.prompts.encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_special_tokens: bool = False,
        **options: Unpack[TemplateOptions],
    ) -> list[int]:
        """Token ids of a conversation, by the model's chat template. Raises InvalidRequestError."""
        return self.prompts.encode_chat(messages, add_special_tokens=add_special_tokens, **options)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids; empty without a tokenizer. Raises InvalidRequestError for ids that are none."""
        self._request_check.require_ids("tokens", tokens)
        return self.prompts.decode(tokens, skip_special_tokens=skip_special_tokens)

    # -- requests ----------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        *,
        tenant: bytes = b"",
        cache_salt: bytes = b"",
        priority: int = 0,
        blend: Blend | None = None,
        tentative: Tentative | None = None,
        expected: Expected = NOTHING,
    ) -> Stream:
        """Queue a prompt of token ids and return the stream of its deltas.

        tenant: requests of different tenants never share chunks, and tenants that wait take turns.
        cache_salt: nor do a tenant's requests with different salts.
        priority: which of a tenant's waiting requests goes first, the smallest.
        blend: passages of the prompt that may be moved to their places if they were read alone. Not exact.
        tentative: compute it only while there is nothing else to do; its stream is good once it was kept.
        expected: how often the prompt's beginnings were asked for elsewhere: what `pgdsf` keeps follows it a little.
        Raises InvalidRequestError, ContextLengthError, EngineClosedError, and BlendRefusedError as `require_movable`.
        """
        params = params or SamplingParams()
        self._loop.require_alive()
        self._request_check.require_tokens(prompt, params)
        room = self._request_check.room(len(prompt), params)
        if blend is not None:
            self._request_check.require_blend(prompt, params, blend)
            self.require_movable()
        grammar = None if params.grammar is None else self.grammars.compile(params.grammar)
        rules = TokenRules.of(
            params, eos=self._eos, vocab_size=self.vocab_size, encode=lambda text: self.encode(text, False)
        )
        stream = Stream(len(prompt), lambda: self._loop.cancel(request))
        if params.prompt_logprobs is not None:
            stream.prompt_logprobs.append(None)  # the first token's: nothing stands before it
        namespace = self.namespace(tenant, cache_salt)
        request = Request(
            list(prompt), params, namespace, room, stream, tenant, priority, rules, grammar, blend, tentative, expected
        )
        self._salts.note(tenant, cache_salt)
        self._loop.submit(request)
        return stream

    def share(self, prompt: Sequence[int]) -> PinInfo:
        """Read a prompt that is nobody's secret and keep it: all tenants find its beginning, as copies of their own.

        Raises InvalidRequestError as `submit`, and where pins would hold more than their share of the pool.
        """
        self.cache.require_pin_room(prompt, tenant=PUBLIC)
        list(self.submit(prompt, SamplingParams(max_tokens=0), tenant=PUBLIC))
        return self.cache.pin(prompt, tenant=PUBLIC)

    def require_movable(self) -> None:
        """Raise BlendRefusedError unless tokens can be moved in this model, by its configuration and by trying it."""
        require_movable(self._runner.config)
        if not self._loop.mover.is_proved:
            self._loop.call(lambda: self._loop.mover.prove_rotation(self._runner))

    def namespace(self, tenant: bytes = b"", cache_salt: bytes = b"") -> Namespace:
        """Where a tenant's chunks are, for one of its salts."""
        return Namespace.of(
            model=self._fingerprint,
            dtype=self._runner.layout.dtype,
            chunk_tokens=self._runner.layout.chunk_tokens,
            tenant=tenant,
            salt=cache_salt,
            **self._cold.namespace_fields,
        )

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], params: SamplingParams | None = None
    ) -> Iterator[Completion]:
        """Complete all prompts at once; yields each prompt's choices in order, as soon as they are complete.

        Raises what `submit` raises, before anything is computed. Dropping the iterator cancels what is left.
        """
        streams: list[Stream] = []
        try:
            for prompt in prompts:
                tokens = self.encode(prompt) if isinstance(prompt, str) else prompt
                streams.append(self.submit(tokens, params))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return completions(streams)

    def explain(self, prompt: Sequence[int], *, tenant: bytes = b"", cache_salt: bytes = b"") -> Explanation:
        """What a request with this prompt would find in the cache now, and why not more (`cache` can do the rest).

        Raises InvalidRequestError for token ids that are none, EngineClosedError.
        """
        self._request_check.require_tokens(prompt, SamplingParams())
        return self.cache.explain(prompt, tenant=tenant, cache_salt=cache_salt)

    # -- life --------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """A consistent snapshot, taken between two steps."""
        scheduler, store = self._loop.scheduler, self._loop.store
        return self._loop.call(
            lambda: EngineStats(len(scheduler.running), len(scheduler.waiting), scheduler.preemptions, store.stats())
        )

    def activity(self) -> Activity:
        """What the engine does at this moment, without waiting for its running step; also when it is closed."""
        loop = self._loop
        arriving = len(loop.arriving)  # before the scheduler's: what arrives in between is counted twice, never missed
        return Activity.of(
            loop.scheduler, loop.store, arriving=arriving, generated_tokens=loop.delivery.generated_tokens
        )

    def require_alive(self) -> None:
        """Raise EngineClosedError unless the engine can take requests. Does not wait."""
        self._loop.require_alive()

    def cold_stats(self) -> ColdStats:
        """The tiers below the device. Does not wait for the engine; a disk tier's numbers are read from its file."""
        return self._cold.stats()

    def check(self) -> None:
        """Prove that no slot, lease or chunk is lost. Raises InvariantError."""
        self._loop.call(self._loop.store.check)

    def clear_cache(self) -> int:
        """Drop all chunks that no request uses; returns how many."""
        return self._loop.call(self._loop.store.clear)

    def close(self) -> None:
        """End all requests and free the engine's thread, and what it left behind; idempotent."""
        self._loop.close()
        give_back_freed_memory()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _eos_ids(checkpoint: Checkpoint) -> frozenset[int]:
    """End-of-sequence tokens by generation config, model config and tokenizer, whichever names them."""
    named = [
        getattr(checkpoint.model.generation_config, "eos_token_id", None),
        checkpoint.model.config.eos_token_id,
        getattr(checkpoint.tokenizer, "eos_token_id", None),
    ]
    return frozenset(i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids]))
