"""What the engine checks of a request before it queues it: tokens against the vocabulary, lengths against the room.

Invariant: a request that passes can be served to its end, and one that does not is told which parameter to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stemcache.engine.blend import Blend
from stemcache.engine.errors import ContextLengthError, InvalidRequestError
from stemcache.engine.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestCheck:
    """The limits of one engine, in tokens. `max_model_len` is what the model's context and the pool both hold.

    has_text: there is a tokenizer, so that stop strings and bad words mean something.
    """

    vocab_size: int
    max_model_len: int
    context_length: int
    has_text: bool

    def require_tokens(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise InvalidRequestError unless all token ids are some, and there is text where text is asked for."""
        if not prompt:
            raise InvalidRequestError("the prompt is empty: give at least one token", param="prompt")
        named = {
            "prompt": prompt,
            "logit_bias": params.logit_bias,
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": params.allowed_token_ids,
        }
        for param, tokens in named.items():
            self.require_ids(param, tokens or ())
        if params.stop and not self.has_text:
            raise InvalidRequestError("this model has no tokenizer, so there is no text to stop at", param="stop")
        if params.bad_words and not self.has_text:
            raise InvalidRequestError("this model has no tokenizer, so it knows no words", param="bad_words")

    def require_blend(self, prompt: Sequence[int], params: SamplingParams, blend: Blend) -> None:
        """Raise InvalidRequestError unless the passages are parts of the prompt, and its logits are not asked for."""
        if blend.passages and blend.passages[-1][1] > len(prompt):
            raise InvalidRequestError(
                f"the last passage ends at {blend.passages[-1][1]}, the prompt at {len(prompt)}", param="blend"
            )
        if params.prompt_logprobs is not None:
            raise InvalidRequestError(
                "log-probabilities of the prompt need all of it computed: leave them out, or do not blend",
                param="prompt_logprobs",
            )

    def require_ids(self, param: str, tokens: Iterable[int]) -> None:
        """Raise InvalidRequestError, naming `param`, for what is no token id of the model."""
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise InvalidRequestError(
                    f"token ids must be integers from 0 to {self.vocab_size - 1}; got {token!r}", param=param
                )

    def room(self, n_prompt: int, params: SamplingParams) -> int:
        """How many tokens may be generated at most. Raises ContextLengthError."""
        room = self.max_model_len - n_prompt
        # OpenAI's words: litellm, for one, knows an overlong prompt by them, not by the code.
        limit = f"this model's maximum context length is {self.max_model_len} tokens"
        if self.max_model_len < self.context_length:
            limit += ", as the pool holds no more (see pool_bytes)"
        if room < (params.max_tokens != 0):
            raise ContextLengthError(
                f"{limit}; the prompt has {n_prompt}, and at least one more is for the answer: shorten the prompt"
            )
        if params.max_tokens is None:
            return room
        if params.max_tokens > room:
            raise ContextLengthError(
                f"{limit}; {n_prompt} of the prompt and max_tokens={params.max_tokens} are more: ask for fewer",
                param="max_tokens",
            )
        return params.max_tokens
