"""One reply of the model as it is decoded: greedy, under a grammar if there is one, a draft ahead of it.

Tokens may be computed before they are chosen: a whole draft, or what a grammar leaves no or hardly any
choice about. `Reply.choose` then goes through the logits behind them; as far as greedy choice agrees they
are the reply, and where it departs the row is cut. So a draft changes what is computed, never what is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dualfocus.runtime.bundle import Bundle
from dualfocus.runtime.engines import Logits
from dualfocus.runtime.grammar import BoxCursor
from dualfocus.runtime.result import Counters, Generation, ReplyName, ReplyToken
from dualfocus.runtime.sequence import UNKNOWN, CachedSequence, Extension, likeliest, log_softmax
from dualfocus.runtime.turns import Prompt


class Reply:
    """A reply to `prompt`, in the making on `sequence`."""

    def __init__(
        self,
        name: ReplyName,
        bundle: Bundle,
        sequence: CachedSequence,
        prompt: Prompt,
        counters: Counters,
        *,
        cursor: BoxCursor | None = None,
        forced: bool = True,
    ) -> None:
        """`cursor` holds the reply to a grammar, and `forced` tokens of it are not decoded."""
        manifest = bundle.manifest
        self.name = name
        self.sequence = sequence
        self.counters = counters
        self._tokenizer = bundle.tokenizer
        self._eos = manifest.tokens.eos
        self._context = manifest.decoder.context
        self._most = min(manifest.max_new_tokens, self._context - len(prompt.tokens) + 1)
        self._prompt = prompt
        self._cursor = cursor
        self._forced = forced
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._shown = ""  # the text that was given out

    @property
    def done(self) -> bool:
        """The reply has ended, or is as long as it may be."""
        return len(self._tokens) == self._most or (bool(self._tokens) and self._tokens[-1] in self._eos)

    @property
    def generation(self) -> Generation:
        """The finished reply."""
        logprobs = self._logprobs
        if any(map(math.isnan, logprobs)):  # what ends a box is looked at when the history is prefilled
            start = len(self._prompt.tokens)
            at = range(start, start + len(logprobs))
            logprobs = self.sequence.recall((*self._prompt.tokens, *self._tokens), at)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True).strip()
        return Generation(text, tuple(self._tokens), tuple(logprobs))

    def begin(self, draft: Sequence[int]) -> Extension:
        """What brings the row to the prompt, with what is ahead behind it, and the history's replies scored.

        `draft` is what the reply is expected to be, where no grammar says it.
        """
        prompt, end = self._prompt, len(self._prompt.tokens)
        ahead = (self._ahead() or draft)[: self._context - end]
        scored = [at for reply in prompt.replies for at in reply]
        known = self.sequence.recall(prompt.tokens, scored)
        unknown = [at - 1 for at, logprob in zip(scored, known, strict=True) if math.isnan(logprob)]
        after = [*unknown, *range(end - 1, end + len(ahead))]
        extension = Extension.to(self.sequence, (*prompt.tokens, *ahead), after)
        kept = min(len(self.sequence.tokens), end)
        self.counters.tokens_reused += kept
        self.counters.tokens_prefilled += end - kept
        return extension

    def go_on(self) -> Extension:
        """What feeds the token chosen last, and what is ahead of it."""
        start = len(self.sequence.tokens)
        new = [self._tokens[-1], *self._ahead()][: self._context - start]
        return Extension(self.sequence, new, range(start, start + len(new)))

    def choose(self) -> list[ReplyToken]:
        """Choose tokens as far as logits reach, at least one."""
        chosen: list[ReplyToken] = []
        while not self.done:
            at = len(self._prompt.tokens) + len(self._tokens)
            logits = self.sequence.logits(at - 1)
            if logits is not None:
                token = self._greedy(logits)
                self._verify(at, token)
                chosen.append(self._take(token, log_softmax(logits, token)))
            elif (rest := self._ahead()) and rest[-1] in self._eos:  # no choice is left: nothing to compute
                chosen += [self._take(token, UNKNOWN) for token in rest]
            else:
                break
        return chosen

    def _ahead(self) -> list[int]:
        """Tokens that the grammar expects next."""
        if self._cursor is None or not self._forced:
            return []
        return self._cursor.ahead()[: self._most - len(self._tokens)]

    def _greedy(self, logits: Logits) -> int:
        return likeliest(logits, None if self._cursor is None else self._cursor.allowed)

    def _verify(self, at: int, token: int) -> None:
        """Cut the row where what it holds ahead of the choice is not what was chosen."""
        ahead = self.sequence.tokens[at:]
        if not ahead or self._is_forced:
            return
        accepted = ahead[0] == token
        self.counters.tokens_accepted += accepted
        self.counters.tokens_drafted += 1 if accepted else len(ahead)
        if not accepted:
            self.sequence.cut(at)

    def _take(self, token: int, logprob: float) -> ReplyToken:
        if self._cursor is not None:
            self.counters.tokens_forced += self._is_forced
            self._cursor.advance(token)
        self._tokens.append(token)
        self._logprobs.append(logprob)
        # a character may take several tokens, and a later one can undo an earlier: then nothing is added
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        new = text[len(self._shown) :] if text.startswith(self._shown) else ""
        if new.endswith("\ufffd") and not self.done:
            new = ""
        self._shown += new
        return ReplyToken(self.name, token, new)

    @property
    def _is_forced(self) -> bool:
        return self._forced and self._cursor is not None and len(self._cursor.allowed) == 1
